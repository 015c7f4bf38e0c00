#!/usr/bin/env python3
"""Print the kernels of calls on a CUDA device by time, from torch's profiler.

The calls are those of benchmarks/cuda.py, on bf16 inputs with 16 heads of head_dim 128. Calls that do not fit into the time
limit are skipped and named.

    python3 benchmarks/cuda_kernels.py --seconds 20
    ncu --profile-from-start=off python3 benchmarks/cuda_kernels.py --once "forward 32K (128, 8)"
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

# Under another name than `cuda`, which is a package of NVIDIA's.
spec = importlib.util.spec_from_file_location("moba_cuda", Path(__file__).with_name("cuda.py"))
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

KI, MI = bench.KI, bench.MI
LONGEST_NAME = 60


def forward(tokens, choice):
    inputs = bench.Inputs(tokens)
    return lambda: inputs.moba(choice)


def backward(tokens, choice):
    import torch
    from moba.functional import varlen

    inputs = bench.Inputs(tokens)
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out = varlen(*leaves, inputs.cu, inputs.cu, *choice)[0]
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def decode(tokens, choice):
    cache = bench.Cache(tokens, 16)
    means = cache.means(choice[0])
    return lambda: cache.decode(choice, means)


# Each makes the inputs and returns the call.
CALLS = {
    f"{make.__name__} {bench.length(tokens)} {choice}": (make, tokens, choice)
    for make, tokens, choices in (
        (forward, 32 * KI, [*reversed(bench.CHOICES)]),
        (backward, 32 * KI, [*reversed(bench.CHOICES[1:])]),
        (decode, MI, [(128, 8), (4096, 12)]),
        (forward, MI, [(128, 8), (512, 3)]),
    )
    for choice in choices
}


def table(name, kernels):
    """Return lines about the kernels of a call: (name, number of launches, microseconds on the device)."""
    total = sum(microseconds for _, _, microseconds in kernels)
    lines = [f"## {name}: {total / 1e3:.3f} ms on the device"]
    for kernel, launches, microseconds in sorted(kernels, key=lambda k: -k[2]):
        share = 100 * microseconds / total
        lines.append(f"{microseconds:12.1f} us {share:4.0f}% x{launches} {kernel[:LONGEST_NAME]}")
    return lines


def kernels_of(call):
    """Profile one call after a warm-up; return its kernels as `table` takes them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = [(e.key, e.count, e.self_device_time_total) for e in profiler.key_averages()]
    return [
        (
            name.replace("moba::cuda::", "").replace("(anonymous namespace)::", ""),
            count,
            microseconds,
        )
        for name, count, microseconds in found
        if microseconds > 0
    ]


def run_once(call):
    """Run a call after a warm-up, the second time for a profiler that waits for it."""
    import torch

    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="time limit")
    parser.add_argument("--once", choices=CALLS, metavar="CALL", help="run one call for ncu")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    torch = bench.torch_with_device("cuda_kernels")
    if options.once:
        make, *arguments = CALLS[options.once]
        run_once(make(*arguments))
        return 0
    for name, (make, *arguments) in CALLS.items():
        if time.monotonic() > deadline:
            print(f"skipped {name}: no time was left")
            continue
        try:
            print("\n".join(table(name, kernels_of(make(*arguments)))), flush=True)
        except torch.OutOfMemoryError:
            print(f"skipped {name}: the device has too little memory")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.path.pop(0)  # hides cuda.py, which has the name of NVIDIA's package `cuda`
    sys.exit(main())
