"""`make gpu-check` without a GPU: its phases on a kit of fake programs, and its benchmark's arithmetic, checks and report."""

import gzip
import importlib.util
import json
import platform
import re
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(script):
    spec = importlib.util.spec_from_file_location(f"moba_{Path(script).stem}_script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load("benchmarks/cuda.py")
kernels = load("benchmarks/cuda_kernels.py")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True
    )


@without_gpu
@pytest.mark.parametrize(
    "script, says",
    (
        ("tools/gpu_check.py", "gpu-check: expected an NVIDIA GPU, got none"),
        ("benchmarks/cuda.py", "cuda: "),
        ("benchmarks/cuda_kernels.py", "cuda_kernels: "),
    ),
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
        "benchmarks/cuda_kernels.py",
        "ncu",
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


def test_replayed_graphs_read_live_memory(monkeypatch):
    made, replayed = [], []

    class Cache(bench.Cache):
        def __init__(self, tokens, heads):
            super().__init__(tokens, 2)

        def means(self, block_size):
            means = super().means(block_size)
            made.append(weakref.ref(means))
            return means

    class Graph:
        def replay(self):
            replayed.append(all(means() is not None for means in made))

    for name, fake in (
        ("Stream", mock.MagicMock),
        ("CUDAGraph", Graph),
        ("current_stream", mock.MagicMock),
        ("stream", mock.MagicMock()),
        ("graph", mock.MagicMock()),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    for name, fake in (
        ("DEVICE", "cpu"),
        ("MI", 8192),
        ("Cache", Cache),
        (
            "interleaved",
            lambda calls, rounds: {
                n: (c(), {"ms": 1, "spread": 0, "runs": 1})[1] for n, c in calls.items()
            },
        ),
    ):
        monkeypatch.setattr(bench, name, fake)
    rows = list(bench.Bench.decode(object.__new__(bench.Bench)))
    assert [row["choice"] for row in rows] == [(128, 8), (4096, 12)]
    assert replayed == [True, True] and len(made) == 6


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
    for test in check.SANITIZED:
        suite, name = test.split(".")
        assert f"TEST({suite}, {name})" in sources or f"TEST_F({suite}, {name})" in sources


def test_kernels_are_listed_by_time():
    assert kernels.table("forward", [("gate", 2, 500.0), ("attend", 1, 1500.0)]) == [
        "## forward: 2.000 ms on the device",
        "      1500.0 us   75% x1 attend",
        "       500.0 us   25% x2 gate",
    ]
    assert list(kernels.CALLS)[0] == "forward 32K (128, 8)"


# ---- a kit of fake programs ----

FAKE_TESTS = """
import json, os, signal, sys, time
from pathlib import Path

NAMES = {names}
options = dict(word.partition("=")[::2] for word in sys.argv[1:])
if "--gtest_list_tests" in options:
    print("Fake.\\n" + "\\n".join(f"  {{name}}  # GetParam() = 1" for name in [*NAMES, "DISABLED_Old"]))
    sys.exit()
name = options["--gtest_filter"].removeprefix("Fake.")
with open("calls.txt", "a") as calls:
    calls.write("device\\n")
Path(os.environ.get("MOBA_TEST_RESULTS", os.devnull)).write_text(f"Fake.{{name}} 1 bf16 803f0040\\n")
if name == "Crashes":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "Hangs":
    time.sleep(60)
failed = name == "Fails"
if failed:
    print("a_test.cpp:3: Failure\\nExpected: equal bits\\n  Actual: others")
result = {{"name": name, "result": "SKIPPED" if name == "Skips" else "COMPLETED", "swaps": "2"}}
if failed:
    result["failures"] = [{{}}]
report = {{"testsuites": [{{"name": "Fake", "testsuite": [result]}}]}}
if "--gtest_output" in options:
    Path(options["--gtest_output"].removeprefix("json:")).write_text(json.dumps(report))
sys.exit(1 if failed else 0)
"""
FAKE_PYTEST = """
def test_device():
    with open("calls.txt", "a") as calls:
        calls.write("pytorch\\n")
"""
FAKE_BENCHMARK = """
import sys
from pathlib import Path

open("calls.txt", "a").write("benchmark\\n")
Path(sys.argv[-1].partition("=")[2], "PREFIX.md").write_text("rows")
print("skipped million: takes up to 50 s, 9 s were left")
"""
FAKE_KERNELS = """
open("calls.txt", "a").write("kernels\\n")
print("## forward")
"""
FAKE_SANITIZER = """
import os, sys

open("calls.txt", "a").write("sanitizer\\n")
program = sys.argv.index("--error-exitcode") + 2
os.execv(sys.argv[program], sys.argv[program:])
"""
PHASES = [
    "C++ tests",
    "PyTorch tests",
    "comparison with the emulation",
    "sanitizers",
    "benchmark",
    "kernels by time",
]


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


class FakeMachine:
    """A machine with a GPU, and a kit: run() checks it with the kit in this process."""

    def __init__(self, folder, monkeypatch, capsys):
        self.kit, self.out, self.bin = folder / "kit", folder / "out", folder / "bin"
        self.capsys, self.monkeypatch = capsys, monkeypatch
        self.check = load("tools/gpu_check.py")
        self.set_tests("Passes", "AlsoPasses")
        tests = self.kit / "tests" / "python"
        tests.mkdir(parents=True)
        (tests / "test_cuda.py").write_text(FAKE_PYTEST)
        self.gpu("NVIDIA H100 80GB HBM3", "9.0", "580.95.05")
        program(self.kit / "benchmarks" / "cuda_kernels.py", FAKE_KERNELS)
        program(self.bin / "compute-sanitizer", FAKE_SANITIZER)
        program(self.bin / "ncu", 'print("metrics")')
        monkeypatch.setenv("PATH", str(self.bin))
        for name in ("CUDA_PATH", "CUDA_HOME"):
            monkeypatch.delenv(name, raising=False)
        self.torch("2.11.0+cu130", "13.0")
        self.manifest = {
            "architecture": 90,
            "commit": "abc",
            "machine": platform.machine(),
            "cuda": "13.0",
            "driver": "580",
            "torch": "2.10",
        }

    def gpu(self, name, capability, driver):
        program(self.bin / "nvidia-smi", f"print('{name}, {capability}, {driver}')")
        prefix = re.sub("[^a-z0-9]+", "-", name.lower())
        text = FAKE_BENCHMARK.replace("PREFIX", f"{prefix}-{bench.datetime.date.today()}")
        program(self.kit / "benchmarks" / "cuda.py", text)

    def torch(self, version, cuda):
        self.monkeypatch.setattr(self.check, "torch_here", lambda: (version, cuda))

    def set_tests(self, *names, sanitized=("Passes",)):
        program(self.kit / "bin" / "moba_cuda_device_tests", FAKE_TESTS.format(names=names))
        self.monkeypatch.setattr(self.check, "SANITIZED", tuple(f"Fake.{n}" for n in sanitized))
        emulated = {
            f"Fake.{name}": {"passed": True, "skipped": False, "swaps": 1} for name in names
        }
        (self.kit / "emulated").mkdir(exist_ok=True)
        (self.kit / "emulated" / "results.json").write_text(json.dumps(emulated))
        with gzip.open(self.kit / "emulated" / "outputs.txt.gz", "wt") as outputs:
            outputs.writelines(f"Fake.{name} 1 bf16 803f0040\n" for name in names)

    def run(self, *options):
        self.kit.mkdir(exist_ok=True)
        (self.kit / "kit.json").write_text(json.dumps(self.manifest))
        code = self.check.main(["--kit", str(self.kit), "--out", str(self.out), *options])
        said = self.capsys.readouterr()
        found = [*self.out.glob("*-check.json")] if self.out.exists() else []
        return code, said, json.loads(found[0].read_text()) if found else None


@pytest.fixture
def machine(tmp_path, monkeypatch, capsys):
    return FakeMachine(tmp_path, monkeypatch, capsys)


def test_kit_runs_its_phases_in_order(machine):
    code, said, report = machine.run()
    assert code == 0 and report["failed"] == [], said.out
    assert [phase["phase"] for phase in report["phases"]] == PHASES
    calls = (machine.kit / "calls.txt").read_text().split()
    assert calls[:3] == ["device", "device", "pytorch"] and calls[-2:] == ["benchmark", "kernels"]
    assert sorted(calls[3:-2]) == ["device"] * 4 + ["sanitizer"] * 4


def test_results_name_the_machine(machine):
    _, said, report = machine.run("--ncu")
    assert report["gpu"] == "NVIDIA H100 80GB HBM3" and report["driver"] == "580.95.05"
    assert report["torch"] == "2.11.0+cu130" and report["kit"]["commit"] == "abc"
    names = {re.sub(r".*\d{4}-\d\d-\d\d", "", path.name) for path in machine.out.iterdir()}
    assert names == {
        *("-check.json", "-check.md", "-check.log"),
        *("-kernels.txt", "-ncu.txt", ".md"),
    }
    text = next(machine.out.glob("*-check.md")).read_text()
    assert "- driver: 580.95.05" in text and "| C++ tests | 2 of 2 passed | " in text


def test_a_crashing_test_hides_no_other(machine):
    machine.set_tests("Passes", "Crashes", "Fails", "Hangs", "Skips", "AlsoPasses")
    machine.monkeypatch.setattr(machine.check, "TEST_LIMIT", 2)
    code, said, report = machine.run()
    assert code == 1
    tests, _, comparison = report["phases"][:3]
    assert tests["result"] == "3 of 6 passed, 1 of them skipped by the test"
    assert comparison["result"].startswith(
        "3 tests, 1 with other results; 4 calls, 8 elements: 100.0%"
    )
    assert "swapped by rounding: 3 emulated, 6 on the device" in comparison["result"]
    assert sorted(report["failed"]) == [
        "C++ tests: Fake.Crashes: killed by SIGSEGV",
        "C++ tests: Fake.Fails: exit code 1: Expected: equal bits",
        "C++ tests: Fake.Hangs: took more than 2 s",
    ]
    assert [phase["phase"] for phase in report["phases"]] == PHASES


def test_errors_of_sanitizers_are_named(machine):
    machine.set_tests("Passes", "Fails", sanitized=("Passes", "Fails"))
    _, _, report = machine.run()
    result = next(phase for phase in report["phases"] if phase["phase"] == "sanitizers")["result"]
    assert result == "tests without errors: " + ", ".join(
        f"{tool} 1 of 2" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    )
    assert (
        "sanitizers: racecheck: Fake.Fails: exit code 1: Expected: equal bits" in report["failed"]
    )


def test_failing_pytorch_tests_are_named(machine):
    path = machine.kit / "tests" / "python" / "test_cuda.py"
    path.write_text("def test_a(): pass\ndef test_b(): assert False\n")
    code, _, report = machine.run()
    assert code == 1
    assert report["failed"] == ["PyTorch tests: tests/python/test_cuda.py::test_b"]


def test_what_is_left_out_is_said(machine):
    machine.monkeypatch.setattr(machine.check, "nvidia_tool", lambda name: (name, False))
    code, said, report = machine.run("--ncu")
    assert code == 0
    left_out = [
        "sanitizers: expected compute-sanitizer on the PATH, got none",
        "benchmark: million: takes up to 50 s, 9 s were left",
        "ncu: expected ncu on the PATH, got none",
    ]
    assert report["left out"] == left_out
    for line in left_out:
        assert f"gpu-check: left out: {line}" in said.out
        assert f"- {line}" in next(machine.out.glob("*-check.md")).read_text()
    assert "3 left out" in said.out.splitlines()[-1]


def test_the_end_of_a_phase_is_no_failure_of_its_tests(machine):
    machine.set_tests("Passes", "Hangs")
    machine.monkeypatch.setitem(machine.check.LIMITS, "C++ tests", 3)
    code, said, report = machine.run()
    assert code == 0 and report["phases"][0]["result"] == "1 of 2 passed"
    assert report["left out"][0] == "C++ tests: 1 for lack of time: Fake.Hangs"


def test_phases_without_time_are_left_out(machine):
    code, said, report = machine.run("--seconds", "4")
    assert code == 0
    left_out = "\n".join(report["left out"])
    for phase in ("PyTorch tests", "sanitizers", "benchmark", "kernels by time"):
        assert re.search(rf"^{phase}: \d+ s were left$", left_out, flags=re.MULTILINE), left_out


def test_a_kit_that_cannot_run_here_is_one_line(machine):
    def refused(expected):
        code, said, report = machine.run()
        assert code == 1 and said.out == "" and report is None
        assert said.err == f"gpu-check: {expected}\n"

    kit, python = machine.kit, sys.executable
    machine.torch("2.9.1+cu128", "12.8")
    refused(f"torch: expected 2.10 or newer with CUDA in {python}, got 2.9.1+cu128")
    machine.torch("2.11.0+cpu", None)
    refused(f"torch: expected 2.10 or newer with CUDA in {python}, got 2.11.0+cpu without CUDA")
    machine.torch(None, None)
    refused(f"torch: expected 2.10 or newer with CUDA in {python}, got none")
    machine.gpu("NVIDIA H100", "9.0", "550.54.15")
    refused("driver: expected 580 or newer (CUDA 13.0), got 550.54.15")
    machine.manifest["machine"] = "riscv64"
    refused(f"--kit: expected a kit for {platform.machine()}, got {kit} for riscv64")
    machine.gpu("NVIDIA A100", "8.0", "580.1")
    refused(
        "--kit: expected a kit for compute capability 8.0 (NVIDIA A100; make gpu-kit ARCH=80), "
        f"got {kit} for 9.0"
    )
    program(machine.bin / "nvidia-smi", "raise SystemExit(9)")
    refused("expected an NVIDIA GPU, got none that nvidia-smi lists")


def test_a_folder_that_is_no_kit_is_one_line(tmp_path):
    done = run("tools/gpu_check.py", "--kit", tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"gpu-check: --kit: expected a folder of `make gpu-kit`, got {tmp_path} without kit.json\n"
    )


@pytest.mark.parametrize(
    "architecture, capability, runs",
    ((90, 90, True), (90, 100, False), (80, 86, True), (86, 80, False), (80, 90, False)),
)
def test_machine_code_runs_on_its_major_version(architecture, capability, runs):
    assert load("tools/gpu_check.py").runs_on(architecture, capability) == runs
