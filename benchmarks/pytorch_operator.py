#!/usr/bin/env python3
"""Measure the PyTorch package: the overhead of a call over its kernel, `moba_attn_varlen` against its naive form, and a
training step.

Compared calls are interleaved; times are medians of all rounds, and minima where an overhead of microseconds is measured.
Peak memory is measured in separate processes, in which freed memory returns to the system at once. Writes
benchmarks/results/pytorch-<machine>-<date>.json and .md after every part.

    .venv/bin/python benchmarks/pytorch_operator.py --rounds 5
"""

import argparse
import ctypes
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import moba
import torch
from machine import cpu_name, machine_name, peak_rss_bytes
from run import ROOT, length

PROGRAM = ROOT / "build" / "release" / "moba"


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict, rounds: int) -> dict:
    """Return the seconds of every call of each function, after one warm-up call."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def offsets(tokens: int) -> torch.Tensor:
    return torch.tensor([0, tokens], dtype=torch.int32)


# Overhead of a call


def call_cost(options) -> list:
    """Return the microseconds of a whole call on inputs so small that the kernel has almost no work."""
    calls = 500
    q, cu = torch.randn(1, 1, 16), offsets(1)
    leaf = q.clone().requires_grad_()

    def call(tensor):
        for _ in range(calls):
            moba.ops.attention(tensor, q, q, cu, cu, 16, 1)

    def both():
        for _ in range(calls):
            moba.ops.attention(leaf, q, q, cu, cu, 16, 1)[0].backward(q)

    modes = {
        "inference mode": torch.inference_mode()(lambda: call(q)),
        "gradients enabled, none required": lambda: call(q),
        "forward for a gradient": lambda: call(leaf),
        "forward and backward": both,
    }
    times = interleaved(modes, 3 * options.rounds)
    return [
        {
            "what": f"a call, its kernel included: {name}",
            "value": min(values) / calls * 1e6,
            "unit": "us",
        }
        for name, values in times.items()
    ]


def kernel_seconds(tokens: int) -> float:
    """Return the minimum time of the kernel alone, as `moba bench` measures it."""
    command = [
        PROGRAM,
        "bench",
        "--tokens",
        str(tokens),
        "--chunk-size",
        "512",
        "--topk",
        "3",
        "--heads",
        "4",
        "--head-dim",
        "64",
        "--threads",
        str(torch.get_num_threads()),
        "-o",
        "json",
    ]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return rows[0]["seconds_min"]


def addition_to_the_kernel(options) -> list:
    if not PROGRAM.exists():
        sys.exit(f"pytorch_operator: expected the program (`make build`), got no {PROGRAM}")
    tokens = 1024 if options.quick else 8192
    q, k, v = torch.randn(3, tokens, 4, 64).unbind(0)
    cu = offsets(tokens)
    kernel, operator = [], []
    with torch.inference_mode():
        for _ in range(options.rounds):
            kernel.append(kernel_seconds(tokens))
            call = {"": lambda: moba.ops.attention(q, k, v, cu, cu, 512, 3)}
            operator += interleaved(call, 5)[""]
    added = min(operator) / min(kernel) - 1
    what = f"{length(tokens)} tokens, 4 heads of head_dim 64, (512, 3): "
    return [
        {
            "what": what + "the kernel, timed by the program",
            "value": min(kernel) * 1e3,
            "unit": "ms",
        },
        {"what": what + "the operator", "value": min(operator) * 1e3, "unit": "ms"},
        {"what": what + "added", "value": added * 100, "unit": "%"},
    ]


# Separate processes


def available_bytes() -> int:
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024


def child(*arguments, threads: int) -> dict | None:
    """Return the JSON that this script prints when started with these hidden arguments; None if it ran out of memory."""
    limit = available_bytes()
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, arguments), str(threads)],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    if "allocate" in done.stderr or done.returncode == -9:
        return None
    sys.exit(f"pytorch_operator: {' '.join(map(str, arguments))} failed\n{done.stderr}")


def varlen_child(name: str, tokens: int) -> dict:
    q, k, v = torch.randn(3, tokens, 1, 128).unbind(0)
    cu = offsets(tokens)
    attend = getattr(moba, name)
    before = peak_rss_bytes()
    times = [seconds(lambda: attend(q, k, v, cu, tokens, 2048, 3)) for _ in range(2)]
    return {"seconds": times[1], "peak": peak_rss_bytes() - before}


def step_child(implementation: str, tokens: int) -> dict:
    step = training_step(tokens)
    step(implementation)
    step(implementation)
    return {"peak": peak_rss_bytes()}


# moba_attn_varlen


def against_naive(options) -> list:
    """Measure one head of head_dim 128, blocks of 2048 tokens, top-k 3."""
    q, k, v = torch.randn(3, 4096, 1, 128).unbind(0)
    fast, slow = (
        attend(q, k, v, offsets(4096), 4096, 256, 3)
        for attend in (moba.moba_attn_varlen, moba.moba_attn_varlen_naive)
    )
    assert (fast - slow).abs().max() < 1e-4

    tokens = 4096 if options.quick else 32768
    names = ("moba_attn_varlen", "moba_attn_varlen_naive")
    while True:
        rounds = [
            [child(name, tokens, threads=options.threads) for name in names]
            for _ in range(options.rounds)
        ]
        if all(result for pair in rounds for result in pair):
            break
        print(f"memory does not suffice for {names[1]} at {length(tokens)} tokens: half of them")
        tokens //= 2
    times = [statistics.median(pair[i]["seconds"] for pair in rounds) for i in range(2)]
    peaks = [statistics.median(pair[i]["peak"] for pair in rounds) for i in range(2)]
    what = f"{length(tokens)} tokens, 1 head of head_dim 128, (2048, 3): "
    return [
        *(
            {"what": what + f"`{name}`", "value": t * 1e3, "unit": "ms"}
            for name, t in zip(names, times)
        ),
        {
            "what": what + "naive / efficient (published for a GPU: 40)",
            "value": times[1] / times[0],
            "unit": "x",
        },
        *(
            {
                "what": what + f"`{name}`: memory without its inputs",
                "value": p / 2**20,
                "unit": "MiB",
            }
            for name, p in zip(names, peaks)
        ),
    ]


# A training step


def training_step(tokens: int):
    """Return a training step of a Llama of 4 layers of width 256 with an attention implementation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    moba.register_moba(moba.MoBAConfig(512, 3))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokens,
        )
    ).train()
    ids = torch.randint(256, (1, tokens))

    def step(implementation):
        model.set_attn_implementation(implementation)
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def attention_seconds(function) -> float:
    """Return the seconds of one call in attention's forward and backward passes."""
    with torch.profiler.profile() as profile:
        function()
    names = ("moba::attention", "_Attention", "_scaled_dot_product_flash_attention_for_cpu")
    return (
        sum(
            e.self_cpu_time_total
            for e in profile.key_averages()
            if any(name in e.key for name in names)
        )
        / 1e6
    )


def keep_freed_memory() -> None:
    """Make glibc keep freed memory. By default it maps and clears tensors above 32 MB again every time, which takes a fifth
    of a step with MoBA and belongs to neither implementation."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, 2**31 - 1)


def training(options) -> list:
    tokens = 1024 if options.quick else 16384
    keep_freed_memory()
    step = training_step(tokens)
    steps = {name: lambda name=name: step(name) for name in ("sdpa", "moba")}
    times = {
        name: statistics.median(values)
        for name, values in interleaved(steps, options.rounds).items()
    }
    inside = {name: attention_seconds(function) for name, function in steps.items()}
    peaks = {
        name: child("step", name, tokens, threads=options.threads)["peak"] / 2**20 for name in steps
    }
    what = f"Llama, 4 layers of width 256, {length(tokens)} tokens, "
    return [
        *(
            {"what": what + f"{name}: a step", "value": value, "unit": "s"}
            for name, value in times.items()
        ),
        *(
            {"what": what + f"{name}: attention in one step", "value": value, "unit": "s"}
            for name, value in inside.items()
        ),
        {"what": what + "sdpa / moba", "value": times["sdpa"] / times["moba"], "unit": "x"},
        *(
            {"what": what + f"{name}: peak of the process", "value": value, "unit": "MiB"}
            for name, value in peaks.items()
        ),
    ]


PARTS = {
    "A call": call_cost,
    "Overhead over the kernel": addition_to_the_kernel,
    "The published function": against_naive,
    "A training step": training,
}


def write(report: dict, name: str) -> None:
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# The PyTorch package on {report['machine']}",
        "",
        f"{report['date']}, torch {report['torch']}, {report['threads']} threads, f32. Made with `{report['command']}`.",
        "",
        "| | measured | |",
        "|---|---|---|",
    ]
    for rows in report["parts"].values():
        lines += [f"| {row['what']} | {row['value']:.4g} | {row['unit']} |" for row in rows]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        *what, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        print(
            json.dumps(
                step_child(what[1], int(what[2]))
                if what[0] == "step"
                else varlen_child(what[0], int(what[1]))
            )
        )
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="short lengths, to see that it works")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    date = datetime.date.today().isoformat()
    report = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "date": date,
        "torch": torch.__version__,
        "threads": options.threads,
        "command": f"python benchmarks/pytorch_operator.py --rounds {options.rounds} --threads {options.threads}"
        + " --quick" * options.quick,
        "parts": {},
    }
    for part, measure in PARTS.items():
        report["parts"][part] = measure(options)
        write(report, f"pytorch-{machine_name()}-{date}{'-quick' * options.quick}")
        for row in report["parts"][part]:
            print(f"{row['what']:90} {row['value']:10.4g} {row['unit']}", flush=True)


if __name__ == "__main__":
    main()
