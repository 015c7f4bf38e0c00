"""The PyTorch operator: what it adds to its kernel, against the naive implementation, and a training step.

Rounds of the things compared are interleaved; medians, and the least time of a call for what it adds. Prints a table, and
with --out writes it as JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

import moba
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict, rounds: int) -> dict:
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def call_cost() -> dict:
    """Microseconds of a whole call on a problem so small that the kernel has nothing to do."""
    q = torch.randn(1, 1, 16)
    cu = torch.tensor([0, 1], dtype=torch.int32)
    leaf = q.clone().requires_grad_()

    def inference():
        with torch.inference_mode():
            for _ in range(500):
                moba.ops.attention(q, q, q, cu, cu, 16, 1)

    def training():
        for _ in range(500):
            moba.ops.attention(leaf, q, q, cu, cu, 16, 1)

    times = interleaved({"inference": inference, "training": training}, 9)
    return {f"call, {name}, us": min(values) / 500 * 1e6 for name, values in times.items()}


def peak_megabytes(tokens: int, expression: str) -> float:
    """Of a process of its own that evaluates it, above what it had with the inputs alone."""
    code = (
        "import torch, moba\n"
        "def peak():  # of this program; getrusage's would begin with its parent's\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        f"q, k, v = torch.randn(3, {tokens}, 1, 128).unbind(0)\n"
        f"cu = torch.tensor([0, {tokens}], dtype=torch.int32)\n"
        "before = peak()\n"
        f"{expression}\n"
        "print((peak() - before) / 1024)\n"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def naive_against_efficient(rounds: int, tokens: int) -> dict:
    """One head of 128, blocks of 2048, top-k 3."""
    q, k, v = torch.randn(3, tokens, 1, 128).unbind(0)
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    routing = (q, k, v, cu, tokens, 2048, 3)
    fast, slow = moba.moba_attn_varlen(*routing), moba.moba_attn_varlen_naive(*routing)
    assert (fast - slow).abs().max() < 1e-4
    times = interleaved(
        {"efficient": lambda: moba.moba_attn_varlen(*routing), "naive": lambda: moba.moba_attn_varlen_naive(*routing)},
        rounds,
    )
    efficient, naive = (statistics.median(values) for values in times.values())
    result = {"efficient, ms": efficient * 1e3, "naive, ms": naive * 1e3, "naive / efficient": naive / efficient}
    for name in ("moba_attn_varlen", "moba_attn_varlen_naive"):
        result[f"{name}, peak MB"] = peak_megabytes(tokens, f"moba.{name}(q, k, v, cu, {tokens}, 2048, 3)")
    return result


def training_step(rounds: int, tokens: int) -> dict:
    """A Llama of 4 layers, 256 wide; SDPA against MoBA (512, 3)."""
    moba.register_moba(moba.MoBAConfig(512, 3))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=tokens,
        )
    ).train()
    ids = torch.randint(256, (1, tokens))

    def step(implementation):
        model.set_attn_implementation(implementation)
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    times = interleaved({"sdpa": lambda: step("sdpa"), "moba": lambda: step("moba")}, rounds)
    sdpa, sparse = (statistics.median(values) for values in times.values())
    return {f"step of {tokens}, sdpa, s": sdpa, f"step of {tokens}, moba, s": sparse, "sdpa / moba": sdpa / sparse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--naive-tokens", type=int, default=32768, help="naive against efficient; 16 GB of memory")
    parser.add_argument("--tokens", type=int, default=16384, help="of the training step")
    parser.add_argument("--out", help="a JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
    }
    results |= call_cost() | naive_against_efficient(arguments.rounds, arguments.naive_tokens)
    results |= training_step(arguments.rounds, arguments.tokens)
    for name, value in results.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
