"""What `make gpu-check` does on a machine without a GPU, and its benchmark's arithmetic, checks and report."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("moba_cuda_benchmark", ROOT / "benchmarks" / "cuda.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run(script, *arguments):
    return subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True)


@without_gpu
@pytest.mark.parametrize("script, says", (("tools/gpu_check.py", "gpu-check: this machine lacks"), ("benchmarks/cuda.py", "cuda: ")))
def test_without_a_gpu_one_line_says_what_is_missing(script, says):
    done = run(script)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(says) and done.stderr.count("\n") == 1


def test_a_dry_run_names_every_phase():
    done = run("tools/gpu_check.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in ("--preset cuda", "moba_cuda_device_tests", "test_cuda.py", "memcheck", "racecheck", "initcheck", "synccheck",
                 "benchmarks/cuda.py"):
        assert part in done.stdout


@pytest.mark.parametrize("tokens, block_size, top_k", ((1, 4, 1), (37, 4, 3), (64, 16, 9), (100, 7, 2)))
def test_pairs_are_counted(tokens, block_size, top_k):
    pairs = scored = 0
    for query in range(tokens):
        own = query // block_size
        pairs += min(own, top_k - 1) * block_size + query % block_size + 1
        scored += own
    assert bench.counts(tokens, block_size, top_k) == (pairs, scored)


def test_the_report_tells_met_from_missed(tmp_path):
    rows = [
        bench.row("fast", 0.5, "", (0.45, 0.92), detail="3 runs"),
        bench.row("small", 81.0, "GiB", (80, 80), at_most=True),
        bench.row("not reached", None, "x", (6, 11)),
    ]
    report = {"machine": {"gpu": "Some GPU (80GB)"}, "date": "2026-01-02", "command": "python3 benchmarks/cuda.py",
              "rows": rows, "skipped": ["decode: why"], "failed": []}
    path = bench.write(report, tmp_path)
    assert path.name == "some-gpu-80gb-2026-01-02.md"
    assert json.loads(path.with_suffix(".json").read_text()) == report
    text = path.read_text()
    assert "| fast | 0.5  | at least 0.45: met | at least 0.92: missed | 3 runs |" in text
    assert "| small | 81 GiB | at most 80: missed | at most 80: missed |  |" in text
    assert "| not reached | - | at least 6 | at least 11 |  |" in text
    assert "## Skipped\n- decode: why" in text and "failed" not in text


@pytest.mark.parametrize("routing", ("independent", "clustered", "sink-heavy"))
def test_its_problems_are_checked_before_they_are_timed(routing, monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    problem = bench.Problem(600, heads=4, kv_heads=2, batch=2, routing=routing)
    problem.verify((64, 3))
    problem.verify((1000, 3))
    right = problem.moba

    def without_a_block(choice, selection):
        return right((choice[0], choice[1] - 1), selection=selection)

    def with_another_output(choice, selection):
        out, *rest = right(choice, selection=selection)
        return out * 1.1, *rest

    for wrong in (without_a_block, with_another_output):
        monkeypatch.setattr(problem, "moba", wrong)
        with pytest.raises(AssertionError, match=r"\(64, 3\)"):
            problem.verify((64, 3))
