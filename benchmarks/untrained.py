#!/usr/bin/env python3
"""Measure a model that was not trained with MoBA: full attention, MoBA as it is, with a sink, calibrated, and with an oracle for a gate.

Stages, in this order:

  calibrate  `moba calibrate` on code, prose and logs together, unless --calibration names a file
  loss       losses of held-out texts of each kind, the last half of 8K tokens
  needle     facts in code and prose, three lengths by the depths
  ruler      RULER's tasks

Writes benchmarks/results/untrained-<date>.json after every measurement; --continue resumes, --only names stages. The texts are
those that a Debian machine has: Python's sources, the manual of Vim, and the logs of dpkg and apt.

    .venv/bin/python benchmarks/untrained.py --threads 2
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {
    "code": "/usr/lib/python3*/**/*.py",
    "prose": "/usr/share/vim/vim*/doc/usr_*.txt",
    "logs": "/var/log/**/*.log",
}
STAGES = ("calibrate", "loss", "needle", "ruler")
PLAIN = ["--moba-chunk-size", 256, "--moba-topk", 4, "--moba-sink", 0, "--moba-full-tail", 0]
SINK = ["--moba-chunk-size", 256, "--moba-topk", 4, "--moba-sink", 1]
FINE = ["--moba-chunk-size", 64, "--moba-topk", 16, "--moba-sink", 1]


def split_texts(folder):
    """Copy every other file of a kind to `folder`/calibrate/kind and the others to `folder`/held-out/kind. A kind of few files
    is cut in halves."""
    for kind, pattern in KINDS.items():
        files = sorted(
            p for p in Path("/").glob(pattern[1:]) if p.is_file() and "test" not in p.parts
        )
        for part in ("calibrate", "held-out"):
            (folder / part / kind).mkdir(parents=True)
        for number, file in enumerate(files):
            text = file.read_text(errors="replace")
            if len(files) > 20:
                halves = {("calibrate", "held-out")[number % 2]: text}
            else:
                cut = text.rfind("\n", 0, len(text) // 2) + 1
                halves = {"calibrate": text[:cut], "held-out": text[cut:]}
            for part, half in halves.items():
                (folder / part / kind / f"{number}.txt").write_text(half)


class Results:
    """Results by name, in a file that is written after each."""

    def __init__(self, path, resume):
        self.path = path
        self.found = json.loads(path.read_text()) if resume and path.exists() else {}

    def run(self, options, name, *arguments):
        """Run the program unless this result is there; return its JSON."""
        if name in self.found:
            return self.found[name]
        command = [options.moba, *map(str, arguments), "-m", options.model, "-t", options.threads]
        print(name, flush=True)
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{name}: expected exit code 0, got {done.returncode}")
        self.found[name] = json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout
        self.save()
        return self.found[name]

    def save(self):
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def variants(calibration):
    """The attentions that are compared: names, and flags that give them."""
    return {
        "full": ["--attn", "full"],
        "moba 256x4, no sink": ["--attn", "moba", *PLAIN],
        "moba 256x4": ["--attn", "moba", *SINK],
        "moba 64x16": ["--attn", "moba", *FINE],
        "calibrated": ["--attn", "moba", "--calibration", calibration],
        "oracle 64x16": ["--attn", "oracle", *FINE],
    }


def without_tail(flags):
    """Losses have no full tail."""
    at = flags.index("--moba-full-tail") if "--moba-full-tail" in flags else len(flags)
    return flags[:at] + flags[at + 2 :]


def with_full(flags):
    """Add full attention, which the others are compared with."""
    return ["--attn", flags[1] if flags[1] == "full" else f"full,{flags[1]}", *flags[2:]]


def measure(options, folder, results):
    calibration = options.calibration or results.path.with_suffix(".moba.json")
    if "calibrate" in options.only and not options.calibration:
        data = [p for kind in KINDS for p in ("--data", folder / "calibrate" / kind)]
        if not calibration.exists():
            results.run(
                options, "calibrate", "calibrate", *data, "-o", calibration, *options.calibrate
            )
    for kind in KINDS if "loss" in options.only else ():
        for name, flags in variants(calibration).items():
            size = [
                "--seq-len",
                "8k",
                "--trailing",
                "4k",
                "--join",
                "--max-tokens",
                f"{8 * options.texts}k",
            ]
            data = ["--data", folder / "held-out" / kind]
            flags = without_tail(with_full(flags))
            results.run(
                options, f"loss {kind} {name}", "eval", "loss", *data, *size, "-o", "json", *flags
            )
    for name, flags in variants(calibration).items():
        if "needle" in options.only:
            grid = [
                "--lengths",
                "2k,4k,8k",
                "--depths",
                options.depths,
                "--per-cell",
                options.per_cell,
            ]
            results.run(options, f"needle {name}", "eval", "needle", *grid, "-o", "json", *flags)
        if "ruler" in options.only:
            size = ["--lengths", "8k", "--samples", options.samples]
            results.run(options, f"ruler {name}", "eval", "ruler", *size, "-o", "json", *flags)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moba", type=Path, default=ROOT / "build/release/moba")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, help="calibration to measure")
    parser.add_argument("--calibrate", nargs="*", default=[], help="flags of moba calibrate")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--texts", type=int, default=4, help="held-out texts of each kind")
    parser.add_argument("--depths", type=int, default=20)
    parser.add_argument("--per-cell", type=int, default=5)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--continue", dest="resume", action="store_true")
    parser.add_argument("--out", type=Path, help="file of the results")
    options = parser.parse_args()
    path = options.out or ROOT / f"benchmarks/results/untrained-{datetime.date.today()}.json"
    results = Results(path, options.resume)
    results.found["machine"] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": options.threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        split_texts(Path(folder))
        measure(options, Path(folder), results)


if __name__ == "__main__":
    main()
