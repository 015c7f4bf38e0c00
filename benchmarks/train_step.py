#!/usr/bin/env python3
"""Time a training step: moba train (full and MoBA) against the same Llama in PyTorch (transformers, SDPA, AdamW).

All use the same shape, tokens per step, threads and dtype, interleaved in every round; the first step of each is a warm-up.
Also measured: the peak memory of a long step with activation checkpointing, and the trainer's overhead in short steps, which
is the time between two lines of the log less the compute time of the steps between them. Writes
benchmarks/results/train-<machine>-<date>.json and .md.

    .venv/bin/python benchmarks/train_step.py --rounds 3 --threads 2
"""

import argparse
import datetime
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import cpu_name, peak_rss_bytes

ROOT = Path(__file__).resolve().parents[1]
SHAPE = dict(
    model_type="llama",
    vocab_size=264,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=65536,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)
PEER = "PyTorch, SDPA"
MODES = {"moba, MoBA (512, 3)": "moba", "moba, full": "full"}


def run_peer(options):
    """Train with PyTorch, in a separate process, and print a line of JSON for each step."""
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    shape = {name: value for name, value in SHAPE.items() if name != "model_type"}
    model = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**shape), attn_implementation="sdpa"
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    for _ in range(options.steps):
        ids = torch.randint(0, 256, (1, options.tokens))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bf16"):
            logits = model(ids).logits
        torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "memory_gib": peak_rss_bytes() / 2**30}), flush=True)


def train(options, folder, tokens, *flags, steps=None, watch=lambda out, run: None):
    """Return the lines of a run's log; `watch` is called while it runs."""
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [
        options.moba,
        "train",
        "--config",
        folder / "config.json",
        "--data",
        folder / "text.txt",
        "--out",
        out,
        "--steps",
        steps or options.steps,
        "--seq-len",
        tokens,
        "--batch-tokens",
        tokens,
        "--threads",
        options.threads,
        "--dtype",
        options.dtype,
        *flags,
    ]
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        watch(out, run)
    if run.returncode != 0:
        sys.exit(f"train_step: failed with {run.returncode}: {shlex.join(map(str, command))}")
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def measure(options, folder):
    peer = [
        sys.executable,
        __file__,
        "--peer",
        "--tokens",
        options.tokens,
        "--steps",
        options.steps,
        "--threads",
        options.threads,
        "--dtype",
        options.dtype,
    ]
    rounds = []
    for number in range(options.rounds):
        runs = {
            name: train(options, folder, options.tokens, "--attn", mode)
            for name, mode in MODES.items()
        }
        lines = subprocess.run(
            [str(word) for word in peer], check=True, capture_output=True, text=True
        ).stdout
        runs[PEER] = [json.loads(line) for line in lines.splitlines()]
        rounds.append(
            {
                name: {
                    "seconds": min(step["seconds"] for step in steps[1:]),
                    "attention_share": steps[-1].get("attention_share"),
                    "memory_gib": steps[-1]["memory_gib"],
                }
                for name, steps in runs.items()
            }
        )
        print(
            f"round {number + 1}: "
            + "; ".join(f"{k} {v['seconds']:.2f} s" for k, v in rounds[-1].items()),
            file=sys.stderr,
        )
    rows = {
        name: {
            key: None
            if rounds[0][name][key] is None
            else statistics.median(r[name][key] for r in rounds)
            for key in rounds[0][name]
        }
        for name in rounds[0]
    }
    for row in rows.values():
        row["speedup_over_peer"] = rows[PEER]["seconds"] / row["seconds"]
    return rows


def overhead(options, folder, tokens=2048, first=10, last=60):
    """Measure the share that everything but the passes and the optimiser (data, log, output) adds to a step."""
    seen = []

    def watch(out, run):
        log = out / "log.jsonl"
        for lines in (first, last):
            while run.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
                time.sleep(0.01)
            seen.append(time.perf_counter())

    log = train(options, folder, tokens, steps=last + 1, watch=watch)  # the last step also saves
    wall = (seen[1] - seen[0]) / (last - first)
    compute = statistics.mean(step["compute_seconds"] for step in log[first:last])
    return {
        "tokens": tokens,
        "steps": last - first,
        "seconds": wall,
        "compute_seconds": compute,
        "overhead": wall / compute - 1,
    }


def markdown(report):
    lines = [
        f"# A training step of {report['tokens']} tokens, 4 layers of width 256",
        "",
        f"{report['machine']}, {report['date']}, {report['threads']} threads, {report['dtype']}, median of "
        f"{report['rounds']} interleaved rounds, best step of each. Made with `{report['command']}`.",
        "",
        "| trainer, attention | step (s) | tokens/s | attention time | against the peer | peak memory (GiB) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["results"].items():
        share = "" if row["attention_share"] is None else f"{row['attention_share']:.0%}"
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {report['tokens'] / row['seconds']:.0f} | {share} "
            f"| {row['speedup_over_peer']:.2f}x | {row['memory_gib']:.2f} |"
        )
    long, short = report["long"], report["short"]
    return (
        "\n".join(
            [
                *lines,
                "",
                f"{long['tokens']} tokens with activation checkpointing: {long['seconds']:.2f} s a step, "
                f"peak memory {long['memory_gib']:.2f} GiB.",
                "",
                f"{short['tokens']} tokens: {1000 * short['seconds']:.0f} ms a step over {short['steps']} steps, "
                f"{1000 * short['compute_seconds']:.0f} ms of them in the passes and the optimiser; all else adds "
                f"{short['overhead']:.1%}.",
            ]
        )
        + "\n"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moba", default=str(ROOT / "build/release/moba"), help="the program")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--machine", default="x86_64", help="a short name for the file of results")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return run_peer(options)

    date = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPE))
        draw = random.Random(1)
        (folder / "text.txt").write_text("".join(draw.choices("abcdefghijklmnop \n", k=1 << 20)))
        report = {
            "command": shlex.join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
            "machine": f"{cpu_name()}, {os.cpu_count()} cores",
            "date": date,
            "tokens": options.tokens,
            "threads": options.threads,
            "dtype": options.dtype,
            "rounds": options.rounds,
            "results": measure(options, folder),
        }
        long = train(options, folder, 2 * options.tokens, "--activation-checkpointing")
        report["long"] = {
            "tokens": 2 * options.tokens,
            "seconds": min(step["seconds"] for step in long[1:]),
            "memory_gib": long[-1]["memory_gib"],
        }
        report["short"] = overhead(options, folder)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"train-{options.machine}-{options.dtype}-{date}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
