#!/usr/bin/env python3
"""Compare the attention of `moba generate` with `moba bench` on the same shapes.

The program reads a prompt in chunks and decodes over KV caches, one for each layer; `moba bench` makes one call on plain
tensors for the prefill, and decodes over one cache, from memory. Every round runs both, so that a ratio compares
neighbours in time. The dtype i8 is that of the KV cache, with f32 activations, and has rows of decode only. Writes benchmarks/results/runner-attention-<machine>-<date>.json and .md.

    .venv/bin/python benchmarks/runner_attention.py --rounds 5 --threads 2
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from machine import cpu_name, machine_name

ROOT = Path(__file__).resolve().parents[1]
# SmolLM2-135M's attention.
LAYERS, SHAPE = 30, ["--heads", "9", "--kv-heads", "3", "--head-dim", "64"]
CHUNK_SIZE, TOPK, PREDICT = 256, 4, 64
MODES = {"full": 0, "moba": TOPK}


def output_of(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_program(options, dtype, mode):
    """Return the seconds of one layer's prefill and of one decode call in the program, and the prompt's length."""
    flags = ["--attn", mode, "--decode", mode]
    if mode == "moba":
        # MoBA for all tokens and no sink, as in `moba bench`.
        flags += ["--moba-chunk-size", str(CHUNK_SIZE), "--moba-topk", str(TOPK)]
        flags += ["--moba-sink", "0", "--moba-full-tail", "0"]
    command = [options.moba, "generate", "-m", options.model, "-f", options.document, "--json"]
    command += ["-p", "Summarise the text.", "-n", str(PREDICT), "--ignore-eos"]
    command += ["--dtype", "f32" if dtype == "i8" else dtype, "--kv-dtype", dtype]
    result = json.loads(output_of([*command, "-t", str(options.threads), *flags]))
    return {
        "prefill": result["attention_seconds"] / LAYERS,
        "decode": result["decode_attention_seconds"] / LAYERS / (PREDICT - 1),
        "tokens": len(result["prompt_ids"]),
    }


def run_bench(options, dtype, tokens):
    """Return the median seconds of `moba bench` by (phase, mode)."""
    command = [options.moba, "bench", "--tokens", str(tokens), *SHAPE, "-t", str(options.threads)]
    command += ["--chunk-size", str(CHUNK_SIZE), "--topk", ",".join(map(str, MODES.values()))]
    passes = ["decode"] if dtype == "i8" else ["forward", "decode"]
    command += ["--pass", *passes, "--dtype", dtype, "-o", "json"]
    rows = json.loads(output_of(command))
    phases = {"forward": "prefill", "decode": "decode"}
    names = {topk: mode for mode, topk in MODES.items()}
    return {(phases[r["pass"]], names[r["topk"]]): r["seconds_median"] for r in rows}


def measure(options):
    """Return the rows of the table: one for each dtype, phase and mode."""
    samples, tokens = {}, 0
    for number in range(options.rounds):
        for dtype in options.dtype:
            program = {mode: run_program(options, dtype, mode) for mode in MODES}
            tokens = program["full"]["tokens"]
            bench = run_bench(options, dtype, tokens)
            for (phase, mode), seconds in bench.items():
                key = (dtype, phase, mode)
                samples.setdefault(key, []).append((program[mode][phase], seconds))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = []
    for (dtype, phase, mode), pairs in samples.items():
        ratios = [program / bench for program, bench in pairs]
        rows.append(
            {
                "dtype": dtype,
                "phase": phase,
                "mode": mode,
                "program_seconds": statistics.median(p for p, _ in pairs),
                "bench_seconds": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "samples": pairs,
            }
        )
    return tokens, rows


def markdown(report):
    lines = [
        f"# Attention of the program against `moba bench`, {report['tokens']} tokens",
        "",
        f"{report['machine']}, {report['date']}, {report['threads']} threads, median of {report['rounds']} rounds. "
        f"Made with `{report['command']}`. SmolLM2-135M's shapes: 9 query heads on 3 kv heads of 64, {LAYERS} layers, "
        f"MoBA with ({CHUNK_SIZE}, {TOPK}). Times are of one layer: its whole prefill, or one decoded token; those of the "
        "program include extending the cache. `moba bench` decodes with emptied CPU caches; the program finds in them what "
        "the previous token left. i8 is a KV cache in int8, for queries in f32.",
        "",
        "| dtype | phase | attention | program (us) | bench (us) | ratio | range |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        lines.append(
            f"| {row['dtype']} | {row['phase']} | {'MoBA' if row['mode'] == 'moba' else 'full'} "
            f"| {row['program_seconds'] * 1e6:.0f} | {row['bench_seconds'] * 1e6:.0f} "
            f"| {row['ratio']:.2f} | {row['ratio_min']:.2f} to {row['ratio_max']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(ROOT / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    parser.add_argument("--moba", default=str(ROOT / "build/release/moba"), help="the program")
    parser.add_argument("--document", default="/usr/share/common-licenses/GPL-3")
    parser.add_argument("--dtype", nargs="+", default=["f32", "bf16", "f16", "i8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()

    tokens, rows = measure(options)
    report = {
        "command": f"python benchmarks/runner_attention.py --rounds {options.rounds} --threads {options.threads} "
        f"--dtype {' '.join(options.dtype)}",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "tokens": tokens,
        "threads": options.threads,
        "rounds": options.rounds,
        "results": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"runner-attention-{machine_name()}-{report['date']}"
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / f"{stem}.md").write_text(markdown(report))
    print(markdown(report), end="")


if __name__ == "__main__":
    main()
