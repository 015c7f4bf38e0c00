#!/usr/bin/env python3
"""Time two builds of `moba`, interleaved row by row, to see whether a change costs speed.

Every row of `moba bench` runs A B A B ..., so that drift of the machine affects both; the ratio of a round compares two
neighbouring calls. Prints and writes the medians, the median ratio after/before and the spread of the rounds' ratios; a row is
within its spread where the ratios of its rounds lie on both sides of 1, or their median within 3% of it.

    .venv/bin/python benchmarks/compare_builds.py BEFORE/moba AFTER/moba --rounds 5
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
from pathlib import Path

from machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = {"full": (512, 0), "(512, 3)": (512, 3), "(128, 8)": (128, 8)}
ROWS = [
    (what, dtype, blocks)
    for what in ("forward", "backward", "decode")
    for dtype in ("f32", "bf16")
    for blocks in BLOCKS
]
NEAR = 0.03


def seconds(program: str, options: argparse.Namespace, what: str, dtype: str, blocks: str) -> float:
    chunk_size, top_k = BLOCKS[blocks]
    tokens = options.decode_tokens if what == "decode" else options.tokens
    command = [
        program,
        "bench",
        "--pass",
        what,
        "--dtype",
        dtype,
        "--tokens",
        str(tokens),
        "--threads",
        str(options.threads),
        "--chunk-size",
        str(chunk_size),
        "--topk",
        str(top_k),
        "--runs",
        "5",
        "-o",
        "json",
    ]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return rows[0]["seconds_median"]


def compare(options: argparse.Namespace, row: tuple[str, str, str]) -> dict:
    rounds = [
        [seconds(program, options, *row) for program in (options.before, options.after)]
        for _ in range(options.rounds)
    ]
    ratios = sorted(after / before for before, after in rounds)
    before, after = (statistics.median(times) for times in zip(*rounds))
    ratio = statistics.median(ratios)
    within = ratios[0] <= 1 <= ratios[-1] or abs(ratio - 1) <= NEAR
    return {
        "pass": row[0],
        "dtype": row[1],
        "blocks": row[2],
        "before_ms": before * 1e3,
        "after_ms": after * 1e3,
        "ratio": ratio,
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "within_spread": within,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="the program moba of the build before")
    parser.add_argument("after", help="the program moba of the build after")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--tokens", type=int, default=8192, help="length of forward and backward passes"
    )
    parser.add_argument(
        "--decode-tokens", type=int, default=131072, help="length of the cache that decode reads"
    )
    parser.add_argument("--name", default="builds", help="begins the names of the files written")
    options = parser.parse_args()

    results = []
    for row in ROWS:
        results.append(compare(options, row))
        r = results[-1]
        print(
            f"{r['pass']:8} {r['dtype']:4} {r['blocks']:8} {r['before_ms']:9.3f} ms {r['after_ms']:9.3f} ms   "
            f"{r['ratio']:.3f} ({r['ratio_min']:.3f} to {r['ratio_max']:.3f})",
            flush=True,
        )

    date = datetime.date.today().isoformat()
    lines = [
        f"# Two builds, interleaved: {options.name}",
        "",
        f"{cpu_name()}, {options.threads} threads, {date}; head_dim 128, one head, {options.tokens} tokens "
        f"(decode: {options.decode_tokens}), {options.rounds} rounds, medians. Made with `benchmarks/compare_builds.py`.",
        "",
        "| pass | dtype | blocks | before | after | after / before | range over rounds | within spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['pass']} | {r['dtype']} | {r['blocks']} | {r['before_ms']:.3f} ms | {r['after_ms']:.3f} ms | {r['ratio']:.3f} | "
        f"{r['ratio_min']:.3f} to {r['ratio_max']:.3f} | {'yes' if r['within_spread'] else 'no'} |"
        for r in results
    ]
    stem = ROOT / "benchmarks" / "results" / f"{options.name}-{date}"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
