#!/usr/bin/env python3
"""Measure time to first token on a long real document: moba (full and MoBA) against transformers with torch SDPA.

Both use the same weights, token ids, threads and dtype, interleaved in every round; medians of all rounds. Loading is
not timed. Writes benchmarks/results/ttft-<machine>-<date>.json and .md.

    .venv/bin/python benchmarks/ttft.py --rounds 5 --threads 2
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import cpu_name, peak_rss_bytes

ROOT = Path(__file__).resolve().parents[1]
FACT = "The special magic number for Berlin is 48213."
QUESTION = "What is the special magic number for Berlin?"
MODES = {"moba, full": ["--attn", "full"], "moba, MoBA": ["--attn", "moba"]}
PEER = "transformers, SDPA"


def document(path, depth):
    """Return a real text with one fact planted at a share of its length, at the start of a line."""
    text = Path(path).read_text()
    place = text.rindex("\n", 0, int(len(text) * depth)) + 1
    return text[:place] + FACT + "\n" + text[place:]


def run_peer(model, dtype, threads):
    """Prefill with transformers, in a separate process whose peak memory can be measured: read token ids and print
    seconds and peak memory, line by line."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    path = Path(model)
    place = (
        {"pretrained_model_name_or_path": path}
        if path.is_dir()
        else {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    )
    network = transformers.AutoModelForCausalLM.from_pretrained(
        **place,
        dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype],
        attn_implementation="sdpa",
    ).eval()
    for line in sys.stdin:
        ids = torch.tensor([json.loads(line)])
        with torch.inference_mode():
            start = time.perf_counter()
            logits = network(ids, use_cache=True, logits_to_keep=1).logits
            seconds = time.perf_counter() - start
        token = int(logits[0, -1].argmax())
        print(
            json.dumps({"seconds": seconds, "peak_rss_bytes": peak_rss_bytes(), "token": token}),
            flush=True,
        )


class Peer:
    def __init__(self, options):
        command = [
            sys.executable,
            __file__,
            "--peer",
            "--model",
            options.model,
            "--dtype",
            options.dtype,
            "--threads",
            str(options.threads),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def first_token(self, ids):
        print(json.dumps(ids), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def run_moba(options, text_file, flags):
    command = [
        options.moba,
        "generate",
        "-m",
        options.model,
        "-f",
        text_file,
        "-p",
        QUESTION,
        "-n",
        "16",
        "--json",
        "-t",
        str(options.threads),
        "--dtype",
        options.dtype,
        *flags,
    ]
    result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {
        "seconds": result["prefill_seconds"],
        "attention_seconds": result["attention_seconds"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "token": result["generated_ids"][0],
        "text": result["text"],
        "ids": result["prompt_ids"],
        "settings": result["settings"],
    }


def measure(options):
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text_file:
        text_file.write(document(options.document, options.depth))
        text_file.flush()
        peer = Peer(options)
        ids = run_moba(options, text_file.name, MODES["moba, full"])["ids"]
        rounds = []
        for number in range(options.rounds):
            results = {
                name: run_moba(options, text_file.name, flags) for name, flags in MODES.items()
            }
            results[PEER] = peer.first_token(ids)
            print(
                f"round {number + 1}: "
                + "; ".join(f"{k} {v['seconds']:.2f} s" for k, v in results.items()),
                file=sys.stderr,
            )
            rounds.append(results)
        peer.process.stdin.close()
    return len(ids), rounds


def summary(rounds):
    def median(name, key):
        return statistics.median(r[name][key] for r in rounds)

    rows = {}
    for name in rounds[0]:
        rows[name] = {
            "seconds": median(name, "seconds"),
            "peak_rss_bytes": median(name, "peak_rss_bytes"),
            "speedup_over_peer": median(PEER, "seconds") / median(name, "seconds"),
        }
        if name != PEER:
            rows[name]["attention_seconds"] = median(name, "attention_seconds")
            rows[name]["answer"] = rounds[0][name]["text"]
            settings = rounds[0][name]["settings"]
            rows[name]["settings"] = {**settings, "model": Path(settings["model"]).name}
    return rows


def markdown(report):
    lines = [
        f"# Time to first token, {report['prompt_tokens']} tokens",
        "",
        f"{report['machine']}, {report['date']}, {report['threads']} threads, {report['dtype']}, "
        f"median of {report['rounds']} interleaved rounds. Made with `{report['command']}`.",
        "",
        "| runner, attention | first token (s) | tokens/s | attention (s) | against the peer | peak memory (GiB) "
        "| answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["results"].items():
        attention = f"{row['attention_seconds']:.2f}" if "attention_seconds" in row else ""
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {report['prompt_tokens'] / row['seconds']:.0f} | {attention} "
            f"| {row['speedup_over_peer']:.2f}x | {row['peak_rss_bytes'] / 2**30:.2f} "
            f"| {' '.join(row.get('answer', '').split())} |"
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
    parser.add_argument(
        "--depth", type=float, default=0.4, help="where the fact is planted, 0 to 1"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--machine", help="a short name for the file of results")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return run_peer(options.model, options.dtype, options.threads)

    tokens, rounds = measure(options)
    date = datetime.date.today().isoformat()
    report = {
        "command": shlex.join(["python", "benchmarks/ttft.py", *sys.argv[1:]]),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "date": date,
        "prompt_tokens": tokens,
        "threads": options.threads,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "results": summary(rounds),
        "seconds_by_round": {name: [r[name]["seconds"] for r in rounds] for name in rounds[0]},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"ttft-{options.machine or platform.machine()}-{date}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
