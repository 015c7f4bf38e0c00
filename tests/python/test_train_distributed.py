"""examples/train_distributed.py: the same losses on any number of ranks, also after a checkpoint."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from ranks import on_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "train_distributed.py"
SIZES = ["--data", SCRIPT, "--tokens", 64, "--hidden", 32, "--moba-chunk-size", 8, "--steps", 100]


def train(*words):
    specification = importlib.util.spec_from_file_location("train_distributed", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script.train(script.parse([str(word) for word in (*SIZES, *words)]))


def relative(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    return ((a - b).abs() / b.abs()).max().item()


def test_losses_on_two_by_two_ranks_equal_one_process_and_continue_on_two(tmp_path):
    shared = ["--data-ranks", 2, "--context-ranks", 2, "--out", tmp_path / "run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run(
        [str(word) for word in (*torchrun, SCRIPT, *SIZES, *shared)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    four = [entry["loss"] for entry in log]
    assert [entry["step"] for entry in log] == list(range(100))

    (one,) = on_ranks(1, train, folder=tmp_path)
    assert relative(four, one) < 1e-4 and one[-1] < one[0] - 1

    resume = ["--resume", tmp_path / "run" / "step-50", "--context-ranks", 2, "--steps", 60]
    for continued in on_ranks(2, train, *resume, folder=tmp_path):
        assert len(continued) == 10 and relative(continued, one[50:60]) < 1e-4
