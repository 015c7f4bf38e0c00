"""`make gpu-check` without a GPU: its plan, and its benchmark's arithmetic, checks and report."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(script):
    spec = importlib.util.spec_from_file_location(f"moba_{Path(script).stem}_script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load("benchmarks/cuda.py")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True
    )


@without_gpu
@pytest.mark.parametrize(
    "script, says",
    (("tools/gpu_check.py", "gpu-check: this machine lacks"), ("benchmarks/cuda.py", "cuda: ")),
)
def test_missing_requirements_are_one_line(script, says):
    done = run(script)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(says) and done.stderr.count("\n") == 1


def test_a_dry_run_names_every_phase():
    done = run("tools/gpu_check.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in (
        "--preset cuda",
        "moba_cuda_device_tests",
        "test_cuda.py",
        "memcheck",
        "racecheck",
        "initcheck",
        "synccheck",
        "benchmarks/cuda.py",
    ):
        assert part in done.stdout


@pytest.mark.parametrize(
    "tokens, block_size, top_k", ((1, 4, 1), (37, 4, 3), (64, 16, 9), (100, 7, 2))
)
def test_pairs_are_counted(tokens, block_size, top_k):
    pairs = scored = 0
    for query in range(tokens):
        own = query // block_size
        pairs += min(own, top_k - 1) * block_size + query % block_size + 1
        scored += own
    assert bench.counts(tokens, block_size, top_k) == (pairs, scored)


@pytest.fixture
def report():
    return {
        "machine": {"gpu": "Some GPU (80GB)"},
        "date": "2026-01-02",
        "command": "python3 benchmarks/cuda.py",
        "rows": [],
        "skipped": ["decode: why"],
        "failed": [],
    }


def test_report_lists_measurements_and_skipped_parts(report, tmp_path):
    report["rows"] = [
        bench.row("fast", 0.5, "", detail="3 runs", choice=(512, 3)),
        bench.row("small", 81.0, "GiB"),
    ]
    path = bench.write(report, tmp_path)
    assert path.name == "some-gpu-80gb-2026-01-02.md"
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["rows"][0].pop("choice") == [512, 3] and written["rows"][1] == report["rows"][1]
    text = path.read_text()
    assert "| fast | 0.5 | 3 runs |" in text and "| small | 81 GiB |  |" in text
    assert "## Skipped\n- decode: why" in text and "failed" not in text


def test_targets_compare_the_report_with_the_goals(report, tmp_path):
    def row(part, value, unit="", **more):
        return {"part": part, **bench.row(f"{part} {value:g}", value, unit, **more)}

    report["rows"] = [
        row("forward", 0.42, choice=(512, 3)),
        row("million", 100.0, "x", choice=(128, 8)),
        row("memory", 81.0, "GiB"),
        row("decode", 0.5, choice=(128, 8), microseconds=19.0),
        row("decode", 0.7, choice=(128, 8), microseconds=21.0),
        row("linearity", 2.0, "x"),
    ]
    path = bench.write(report, tmp_path).with_suffix(".json")
    done = run("benchmarks/targets.py", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:-1] == [
        "| forward 0.42, stage 1 | >= 0.4 | 0.42 | met |",
        "| forward 0.42, stage 2 | >= 0.8 | 0.42 | not met |",
        "| million 100, stage 1 | >= 60x | 100x | met |",
        "| million 100, stage 2 | >= 110x | 100x | not met |",
        "| memory 81 | <= 80 GiB | 81 GiB | not met |",
        "| decode 0.5, stage 1 | >= 0.6 | 0.5 | not met |",
        "| decode 0.5, stage 2 | >= 0.8, or <= 20 us | 0.5, 19.0 us | met |",
        "| decode 0.7, stage 1 | >= 0.6 | 0.7 | met |",
        "| decode 0.7, stage 2 | >= 0.8, or <= 20 us | 0.7, 21.0 us | not met |",
    ]


@pytest.mark.parametrize("routing", ("independent", "clustered", "sink-heavy"))
def test_wrong_results_fail_verification(routing, monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    inputs = bench.Inputs(600, heads=4, kv_heads=2, batch=2, routing=routing)
    inputs.verify((64, 3))
    inputs.verify((1000, 3))
    right = inputs.moba

    def without_a_block(choice, selection):
        return right((choice[0], choice[1] - 1), selection=selection)

    def with_another_output(choice, selection):
        out, *rest = right(choice, selection=selection)
        return out * 1.1, *rest

    for wrong in (without_a_block, with_another_output):
        monkeypatch.setattr(inputs, "moba", wrong)
        with pytest.raises(AssertionError, match=r"\(64, 3\)"):
            inputs.verify((64, 3))


@pytest.mark.parametrize("choice", ((64, 3), (128, 100)))
def test_wrong_decoding_fails_verification(monkeypatch, choice):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    cache = bench.Cache(600, 2)
    means = cache.means(choice[0])
    cache.verify(choice, means)
    right = cache.decode
    monkeypatch.setattr(cache, "decode", lambda choice, means: right(choice, means) * 1.1)
    with pytest.raises(AssertionError, match="off by"):
        cache.verify(choice, means)
    monkeypatch.setattr(
        cache,
        "decode",
        lambda choice, means: right((choice[0], choice[1] - 1 if choice[1] < 9 else 2), means),
    )
    with pytest.raises(AssertionError, match="off by"):
        cache.verify(choice, means)


def test_decode_bytes_are_counted():
    cache = object.__new__(bench.Cache)
    cache.tokens, cache.heads = 1000, 2
    assert cache.read((64, 3)) == 2 * 128 * 2 * (
        15 + 2 * (2 * 64 + 40)
    )  # 15 complete blocks, 40 tokens in the last
    assert cache.read((100, 3)) == 2 * 128 * 2 * (
        9 + 2 * 300
    )  # the last block is complete, and the query's own
    assert cache.read((2000, 3)) == 2 * 128 * 2 * 2 * 1000


def test_outputs_of_two_runs_are_compared(tmp_path):
    check = load("tools/gpu_check.py")

    def written(name, *calls):
        path = tmp_path / name
        lines = []
        for test, seed, values in calls:
            digits = torch.tensor(values).bfloat16().view(torch.int16).numpy().tobytes().hex()
            lines.append(f"{test} {seed} bf16 {digits}\n")
        path.write_text("".join(lines))
        return path

    ones = [1.0, 2.0, float("nan"), 4.0]
    here = written("a", ("A.b", 1, ones), ("A.b", 1, ones), ("A.c", 1, []), ("only.here", 2, ones))
    assert check.differences(here, here) == (4, 12, 1.0, 0.0)
    there = written(
        "b", ("A.b", 1, ones), ("A.b", 1, [1.0, 2.015625, float("nan"), 3.0]), ("A.c", 1, [])
    )
    assert check.differences(here, there) == (3, 8, 6 / 8, 1 / 8)
    assert check.differences(here, written("c", ("A.b", 1, [1.0])))[3] == 1.0


def test_sanitized_tests_exist():
    check = load("tools/gpu_check.py")
    sources = "".join(path.read_text() for path in (ROOT / "tests" / "cuda").glob("*_test.cpp"))
    for test in check.SANITIZED.split(":"):
        suite, name = test.split(".")
        assert f"TEST({suite}, {name})" in sources or f"TEST_F({suite}, {name})" in sources
