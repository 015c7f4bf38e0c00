#!/usr/bin/env python3
"""Test and measure the CUDA backend on a machine with an NVIDIA GPU, from a kit that holds everything compiled.

A kit is the folder that `make gpu-kit` builds on a machine with nvcc; without --kit it is built here first, for the GPU at
hand. The kit's phases take less than 4 minutes, each with a time limit: C++ tests, one process each; the PyTorch tests; the
comparison with the emulation; sanitizers on small calls; the benchmark; kernels by time. What is left out is said. Needs a
torch with CUDA in this Python, and no network. The exit code is 0 if everything passed.

    python3 tools/gpu_check.py --kit build/gpu-kit --out results
    python3 tools/gpu_check.py              # make gpu-check: builds the kit first, within 8 minutes
    python3 tools/gpu_check.py --dry-run    # prints the commands; needs no GPU
"""

import argparse
import contextlib
import datetime
import gzip
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "build" / "gpu-kit"  # the default of `make gpu-kit`
# Paths in a kit.
MANIFEST, DEVICE_TESTS = "kit.json", "bin/moba_cuda_device_tests"
EMULATED, EMULATED_OUTPUTS = "emulated/results.json", "emulated/outputs.txt.gz"

# Small tests that together run every kernel.
SANITIZED = (
    "CudaAttend.AnyOrderOfBlocksAndWarpsGivesTheSameBits",
    "CudaAttend.SelectBlocksMatchesAttention",
    "CudaAttend.ManyShortSequencesMatchTheOracle",
    "CudaAttend.BlocksAbove64KeysMatchTheOracle",
    "CudaAttendBackward.AnyOrderOfBlocksAndWarpsGivesTheSameBits",
    "CudaAttendBackward.RecomputedSelectionGivesTheSameBits",
    "CudaDecode.AnyOrderAndWorkspaceGiveTheSameBits",
    "CudaSm90Backward.AnyOrderAndAnyWorkspaceGiveTheSameBits",
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Tests of calls that use other kernels on sm90: they run again with MOBA_CUDA_ARCH=sm80.
CHOOSING = re.compile("CudaAttend|All/")

# Maximum seconds of the phases and of all together. The benchmark has what the others leave.
LIMITS = {
    "C++ tests": 55,
    "PyTorch tests": 65,
    "sanitizers": 40,
    "benchmark": None,
    "kernels by time": 25,
    "ncu": 25,
}
TOTAL, MIN_BENCHMARK, TEST_LIMIT, CONCURRENT = 235, 20, 30, 8
BUILD_LIMIT = 230
SANITIZER_ERROR = 9
LONGEST_REASON = 200


# ---- machine ----


class Gpu(NamedTuple):
    name: str
    capability: int  # 10 major + minor
    driver: str

    @property
    def capability_text(self):
        return f"{self.capability // 10}.{self.capability % 10}"


def gpu_here():
    """Return the first GPU that nvidia-smi lists, or None."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = [word.strip() for word in listed.stdout.partition("\n")[0].split(",")]
    if listed.returncode != 0 or len(words) != 3:
        return None
    major, _, minor = words[1].partition(".")
    return Gpu(words[0], 10 * int(major) + int(minor), words[2])


def torch_here():
    """Return the version of this Python's torch and that of its CUDA; None is what is missing."""
    try:
        import torch
    except ImportError:
        return None, None
    return torch.__version__, torch.version.cuda


def version_of(text):
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def runs_on(architecture, capability):
    """Return whether machine code for `architecture` runs on a device; that of 90 is for sm_90a, which alone runs it."""
    if architecture == 90:
        return capability == 90
    return capability // 10 == architecture // 10 and capability >= architecture


def refusal(kit, manifest, gpu):
    """Return the reason why this machine cannot run the kit, or None."""
    architecture = manifest["architecture"]
    if not runs_on(architecture, gpu.capability):
        return (
            f"--kit: expected a kit for compute capability {gpu.capability_text} ({gpu.name}; make gpu-kit "
            f"ARCH={gpu.capability}), got {kit} for {architecture // 10}.{architecture % 10}"
        )
    if platform.machine() != manifest["machine"]:
        return (
            f"--kit: expected a kit for {platform.machine()}, got {kit} for {manifest['machine']}"
        )
    if version_of(gpu.driver) < version_of(manifest["driver"]):
        return f"driver: expected {manifest['driver']} or newer (CUDA {manifest['cuda']}), got {gpu.driver}"
    return torch_refusal(manifest["torch"])


def torch_refusal(oldest):
    """Return the reason why this Python's torch cannot run a kit for `oldest` and newer ones, or None."""
    torch, cuda = torch_here()
    if torch and cuda and version_of(torch) >= version_of(oldest):
        return None
    found = torch + ("" if cuda else " without CUDA") if torch else "none"
    return f"torch: expected {oldest} or newer with CUDA in {sys.executable}, got {found}"


# ---- commands ----


def list_command(tests):
    return [tests, "--gtest_list_tests"]


def test_command(tests, name, results=None):
    options = [f"--gtest_output=json:{results}"] if results else []
    return [tests, "--gtest_brief=1", f"--gtest_filter={name}", *options]


def names_of(listing):
    """Return the names of the tests in the output of --gtest_list_tests."""
    names, suite = [], ""
    for line in listing.splitlines():
        word = line.partition("#")[0].strip()
        if line.startswith(" ") and not re.search(r"\bDISABLED_", suite + word):
            names.append(suite + word)
        elif word.endswith("."):
            suite = word
    return names


def pytest_command():
    options = ["-q", "-rfEs", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, "tests/python/test_cuda.py"]


def nvidia_tool(tool):
    """Return the path of a tool of the CUDA toolkit or its name, and whether it was found."""
    beside = [
        Path(os.environ[name]) / "bin"
        for name in ("CUDA_PATH", "CUDA_HOME")
        if os.environ.get(name)
    ]
    if nvcc := shutil.which("nvcc"):
        beside.append(Path(nvcc).resolve().parent)
    folders = os.pathsep.join(map(str, [*beside, "/usr/local/cuda/bin"]))
    found = shutil.which(tool) or shutil.which(tool, path=folders)
    return found or tool, bool(found)


def sanitizer_command(tool, tests, name):
    program = nvidia_tool("compute-sanitizer")[0]
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
    return [program, *options, *test_command(tests, name)]


def benchmark_command(seconds, out):
    return [sys.executable, "benchmarks/cuda.py", f"--seconds={seconds:.0f}", f"--results={out}"]


def kernels_command(seconds):
    return [sys.executable, "benchmarks/cuda_kernels.py", f"--seconds={seconds:.0f}"]


def ncu_command():
    sections = (
        "SpeedOfLight",
        "MemoryWorkloadAnalysis",
        "WarpStateStats",
        "LaunchStats",
        "Occupancy",
    )
    return [
        nvidia_tool("ncu")[0],
        *("--profile-from-start", "off", "--clock-control", "none"),
        *(word for section in sections for word in ("--section", section)),
        *(sys.executable, "benchmarks/cuda_kernels.py", "--once", "forward 32K (128, 8)"),
    ]


def environment(kit):
    """Return the environment of all commands: this one with the kit's package and libraries."""

    def before(folder, others):
        return os.pathsep.join([str(kit / folder), *([others] if others else [])])

    return os.environ | {
        "PYTHONPATH": before("package", os.environ.get("PYTHONPATH")),
        "LD_LIBRARY_PATH": before("lib", os.environ.get("LD_LIBRARY_PATH")),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def shown(command):
    return " ".join(str(word).replace(str(ROOT) + "/", "") for word in command)


# ---- processes ----


class Done(NamedTuple):
    why: str | None  # it failed; None: it passed
    output: str
    seconds: float
    ending: str = "exit"  # or "signal", or "late": its time limit

    def reason(self):
        """Return why it failed, with the first failure that GoogleTest reports, else the last line of the output."""
        found = re.search(r"Failure\n(.+)", self.output)
        lines = [found[1]] if found else self.output.strip().splitlines()[-1:]
        return ": ".join([self.why, *(line.strip()[:LONGEST_REASON] for line in lines)])


def execute(command, limit, cwd, env):
    """Run a command in a process group of its own, and kill the group after `limit` seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:

        def done(why, ending="exit"):
            output.seek(0)
            return Done(why, output.read(), time.monotonic() - begin, ending)

        try:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=cwd,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return done(f"cannot be started: {error.strerror}")
        try:
            code = process.wait(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                pass  # it waits for the driver
            return done(f"took more than {limit:.0f} s", "late")
        if code < 0:
            return done(f"killed by {signal.Signals(-code).name}", "signal")
        return done(f"exit code {code}" if code else None)


def execute_each(tasks, seconds, cwd, concurrent, limit):
    """Run the commands of `tasks`, {key: (command, env)}, some at a time and each for `limit` seconds at most; return
    {key: Done} of those that began within `seconds`."""
    deadline = time.monotonic() + seconds

    def one(task):
        key, (command, env) = task
        left = deadline - time.monotonic()
        return (key, execute(command, min(left, limit), cwd, env)) if left >= 1 else None

    with ThreadPoolExecutor(concurrent) as pool:
        return dict(filter(None, pool.map(one, tasks.items())))


# ---- results of tests ----


def test_result(path):
    """Return the result of one test, read from the JSON that its process wrote: passed, skipped and the blocks swapped by rounding."""
    suites = json.loads(path.read_text())["testsuites"]
    tests = [test for suite in suites for test in suite["testsuite"]]
    return {
        "passed": all("failures" not in test for test in tests),
        "skipped": all(test["result"] == "SKIPPED" for test in tests),
        "swaps": sum(int(test.get("swaps", 0)) for test in tests),
    }


def outputs(path):
    """Read MOBA_TEST_RESULTS: for each test, seed and call the output in float64, and the unit roundoff of its dtype."""
    import torch

    calls, found = Counter(), {}
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
        for line in lines:
            test, seed, dtype, digits = line.rstrip("\n").split(" ")
            calls[test, seed] += 1
            bits = (
                torch.frombuffer(bytearray.fromhex(digits), dtype=torch.int16)
                if digits
                else torch.empty(0, dtype=torch.int16)
            )
            kind, unit = (torch.bfloat16, 2**-8) if dtype == "bf16" else (torch.float16, 2**-11)
            found[test, seed, calls[test, seed]] = bits.view(kind).double(), unit
    return found


def differences(emulated, real):
    """Compare the calls in both files: return their number, their elements, the share of bit-identical ones, and the share
    that differs by more than 16 units of the call's largest element (another block after a tie in rounding, or an error)."""
    a, b = outputs(emulated), outputs(real)
    calls = sorted(a.keys() & b.keys())
    numbers = equal = far = 0
    for call in calls:
        (x, unit), (y, _) = a[call], b[call]
        if x.shape != y.shape:
            far += max(x.numel(), y.numel())
            numbers += max(x.numel(), y.numel())
            continue
        same = (x == y) | (x.isnan() & y.isnan())
        largest = x.nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0
        far += (~same & ~((x - y).abs() <= 16 * unit * largest)).sum().item()
        equal += same.sum().item()
        numbers += x.numel()
    return len(calls), numbers, equal / max(numbers, 1), far / max(numbers, 1)


# ---- check ----


class Check:
    """The phases of a kit on this machine, and their report."""

    def __init__(self, kit, manifest, gpu, out, begin, seconds):
        self.kit, self.manifest, self.gpu = kit, manifest, gpu
        self.tests = kit / DEVICE_TESTS
        with contextlib.suppress(OSError):
            self.tests.chmod(0o755)  # which some ways of copying lose
        self.date = datetime.date.today().isoformat()
        name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        self.out, self.prefix = out, f"{name}-{self.date}"
        self.work = Path(tempfile.mkdtemp(prefix="moba-gpu-check-"))
        self.env = environment(kit)
        # So that the threads of tests that run at the same time do not wait for each other.
        self.test_env = self.env | {"OMP_NUM_THREADS": str(max(os.cpu_count() // CONCURRENT, 1))}
        self.begin, self.end = begin, begin + seconds
        self.phases, self.failed, self.left_out = [], [], []
        self.results = {}  # of the C++ tests that ended
        out.mkdir(parents=True, exist_ok=True)
        self.file("check.log").write_text("")

    def file(self, name):
        return self.out / f"{self.prefix}-{name}"

    def left(self):
        return self.end - time.monotonic()

    def limit(self, phase, later=()):
        """Return the seconds of a phase, which leaves those of `later` phases."""
        left = self.left() - sum(LIMITS[other] for other in later)
        return min(LIMITS[phase] or left, left)

    def omit(self, what):
        print(f"gpu-check: left out: {what}", flush=True)
        self.left_out.append(what)

    def has_time(self, phase):
        if self.left() < 5:
            self.omit(f"{phase}: {max(self.left(), 0):.0f} s were left")
        return self.left() >= 5

    def log(self, title, done):
        with self.file("check.log").open("a") as log:
            log.write(
                f"== {title}: {done.why or 'passed'}, {done.seconds:.1f} s\n{done.output.rstrip()}\n"
            )

    def finish(self, phase, begin, result, failures=()):
        """Record a phase: its result in words, and what failed."""
        seconds = time.monotonic() - begin
        print(f"gpu-check: {phase}: {result}, {seconds:.0f} s", flush=True)
        self.phases.append({"phase": phase, "result": result, "seconds": round(seconds, 1)})
        for failure in failures:
            print(f"gpu-check: failed: {phase}: {failure}", flush=True)
            self.failed.append(f"{phase}: {failure}")
        self.report()

    def report(self):
        report = {
            "gpu": self.gpu.name,
            "compute capability": self.gpu.capability_text,
            "driver": self.gpu.driver,
            "torch": torch_here()[0],
            "CUDA of torch": torch_here()[1],
            "date": self.date,
            "kit": self.manifest,
            "phases": self.phases,
            "failed": self.failed,
            "left out": self.left_out,
        }
        self.file("check.json").write_text(json.dumps(report, indent=1) + "\n")
        machine = [f"- {name}: {value}" for name, value in list(report.items())[:5]]
        kit = self.manifest
        lines = [
            f"# Check of the CUDA backend: {self.gpu.name}, {self.date}",
            "",
            *machine,
            f"- kit: commit {kit['commit']} for sm_{kit['architecture']}, nvcc {kit['cuda']}",
            "",
            "| phase | result | seconds |",
            "|---|---|---|",
            *(f"| {p['phase']} | {p['result']} | {p['seconds']:.0f} |" for p in self.phases),
        ]
        for title, entries in (("Failed", self.failed), ("Left out", self.left_out)):
            if entries:
                lines += ["", f"## {title}", *(f"- {entry}" for entry in entries)]
        self.file("check.md").write_text("\n".join(lines) + "\n")

    # ---- phases, in their order ----

    def cpp_tests(self):
        """Run every test in a process of its own, so that one fault hides no other."""
        phase, begin = "C++ tests", time.monotonic()
        listing = execute(list_command(self.tests), 20, self.kit, self.env)
        names = names_of(listing.output)
        if listing.why or not names:
            self.log("list of tests", listing)
            reason = f"{DEVICE_TESTS} lists no tests: {listing.why or 'no output'}"
            return self.finish(phase, begin, "none", [reason])

        tasks = {}
        for number, name in enumerate(names):
            own = self.work / str(number)
            env = self.test_env | {"MOBA_TEST_RESULTS": f"{own}.txt"}
            tasks[name] = test_command(self.tests, name, f"{own}.json"), env
        if self.gpu.capability == 90:
            sm80 = self.test_env | {"MOBA_CUDA_ARCH": "sm80"}
            for name in filter(CHOOSING.match, names):
                tasks[f"{name} with sm80"] = test_command(self.tests, name), sm80
        done = execute_each(tasks, self.limit(phase), self.kit, CONCURRENT, TEST_LIMIT)

        for name, result in done.items():
            self.log(name, result)
        # The end of the phase is no failure of the tests that it interrupts.
        for name, result in [*done.items()]:
            if result.ending == "late" and result.seconds < TEST_LIMIT:
                del done[name]
        if late := tasks.keys() - done.keys():
            self.omit(f"{phase}: {len(late)} for lack of time: {', '.join(sorted(late))}")
        with (self.work / "outputs.txt").open("w") as merged:
            for number, name in enumerate(names):
                report, outputs = (self.work / f"{number}{end}" for end in (".json", ".txt"))
                if name in done and done[name].ending == "exit" and report.exists():
                    self.results[name] = test_result(report)
                    if outputs.exists():
                        merged.write(outputs.read_text())
        skipped = sum(result["skipped"] for result in self.results.values())
        failures = [f"{name}: {result.reason()}" for name, result in done.items() if result.why]
        self.finish(
            phase,
            begin,
            f"{len(done) - len(failures)} of {len(tasks)} passed"
            + (f", {skipped} of them skipped by the test" if skipped else ""),
            failures,
        )

    def pytorch_tests(self):
        phase, begin = "PyTorch tests", time.monotonic()
        if not find_spec("pytest"):
            return self.omit(f"{phase}: expected pytest in {sys.executable}, got none")
        if not find_spec("transformers"):
            self.omit(f"{phase} of transformers' models: expected transformers, got none")
        if not self.has_time(phase):
            return
        done = execute(pytest_command(), self.limit(phase), self.kit, self.env)
        self.log(phase, done)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.output, flags=re.MULTILINE)
        last = done.output.strip().splitlines()[-1:] or ["no output"]
        failures = (failed or [done.reason()]) if done.why else []
        self.finish(phase, begin, last[0].strip("= "), failures)

    def comparison(self):
        """Compare results and outputs of the C++ tests with those of the emulated device, which are in the kit."""
        phase, begin = "comparison with the emulation", time.monotonic()
        if not any(not result["skipped"] for result in self.results.values()):
            return self.omit(f"{phase}: no C++ test ended")
        emulated = json.loads((self.kit / EMULATED).read_text())
        both = sorted(
            name
            for name in emulated.keys() & self.results.keys()
            if not self.results[name]["skipped"]
        )
        other = [name for name in both if emulated[name]["passed"] != self.results[name]["passed"]]
        swaps = [sum(tests[name]["swaps"] for name in both) for tests in (emulated, self.results)]
        calls, elements, equal, far = differences(
            self.kit / EMULATED_OUTPUTS, self.work / "outputs.txt"
        )
        failures = []  # tests that failed on the device are named by their phase
        if calls == 0:
            failures.append("expected outputs of the same calls on both sides, got none")
        elif far > 0.01:
            failures.append(
                f"{100 * far:.2f}% of the elements differ by more than 16 units of the largest"
            )
        self.finish(
            phase,
            begin,
            f"{len(both)} tests, {len(other)} with other results; {calls} calls, {elements} elements: {100 * equal:.1f}% are "
            f"bit-identical, {100 * far:.3f}% differ by more than 16 units of the largest; blocks swapped by rounding: {swaps[0]} "
            f"emulated, {swaps[1]} on the device",
            failures,
        )

    def sanitizers(self):
        phase, begin = "sanitizers", time.monotonic()
        if not nvidia_tool("compute-sanitizer")[1]:
            return self.omit(f"{phase}: expected compute-sanitizer on the PATH, got none")
        if not self.has_time(phase):
            return
        tasks = {
            (tool, name): (sanitizer_command(tool, self.tests, name), self.test_env)
            for tool in SANITIZERS
            for name in SANITIZED
        }
        done = execute_each(tasks, self.limit(phase), self.kit, CONCURRENT, LIMITS[phase])
        results, failures = [], []
        for tool in SANITIZERS:
            own = {name: done[tool, name] for name in SANITIZED if (tool, name) in done}
            for name, result in own.items():
                self.log(f"{tool}: {name}", result)
            if any("Device not supported" in result.output for result in own.values()):
                self.omit(f"{tool}: compute-sanitizer does not support this device")
                continue
            late = [name for name in SANITIZED if name not in own or own[name].ending == "late"]
            if late:
                self.omit(f"{tool}: {len(late)} for lack of time: {', '.join(late)}")
            failed = [name for name, result in own.items() if result.why and name not in late]
            failures += [f"{tool}: {name}: {own[name].reason()}" for name in failed]
            results.append(
                f"{tool} {len(own.keys() - set(late)) - len(failed)} of {len(SANITIZED)}"
            )
        self.finish(phase, begin, f"tests without errors: {', '.join(results) or 'none'}", failures)

    def benchmark(self, later):
        phase, begin = "benchmark", time.monotonic()
        limit = self.limit(phase, later)
        if limit < MIN_BENCHMARK:
            return self.omit(f"{phase}: {max(limit, 0):.0f} s were left")
        command = benchmark_command(limit - 10, self.out.resolve())
        done = execute(command, limit, self.kit, self.env)
        self.log(phase, done)
        print(done.output, flush=True)
        for line in re.findall(r"^skipped (.*)", done.output, flags=re.MULTILINE):
            self.omit(f"{phase}: {line}")
        failed = re.findall(r"^FAILED (.*)", done.output, flags=re.MULTILINE)
        result = f"{self.prefix}.md" if (self.out / f"{self.prefix}.md").exists() else "no results"
        self.finish(phase, begin, result, (failed or [done.reason()]) if done.why else [])

    def written(self, phase, command, later, name):
        """Run a phase whose output is a result."""
        begin = time.monotonic()
        if not self.has_time(phase):
            return
        done = execute(command, self.limit(phase, later), self.kit, self.env)
        self.log(phase, done)
        self.file(name).write_text(done.output)
        for line in re.findall(r"^skipped (.*)", done.output, flags=re.MULTILINE):
            self.omit(f"{phase}: {line}")
        self.finish(phase, begin, self.file(name).name, [done.reason()] if done.why else [])

    def run(self, with_ncu):
        ncu = ("ncu",) if with_ncu else ()
        self.cpp_tests()
        self.pytorch_tests()
        self.comparison()
        self.sanitizers()
        # Nothing else runs on the GPU while the benchmark measures.
        self.benchmark(later=("kernels by time", *ncu))
        limit = self.limit("kernels by time", ncu)
        self.written("kernels by time", kernels_command(limit - 8), ncu, "kernels.txt")
        if not with_ncu:
            self.omit("ncu: --ncu was not given")
        elif not nvidia_tool("ncu")[1]:
            self.omit("ncu: expected ncu on the PATH, got none")
        else:
            self.written("ncu", ncu_command(), (), "ncu.txt")
        shutil.rmtree(self.work, ignore_errors=True)
        self.report()
        seconds = time.monotonic() - self.begin
        print(f"gpu-check: results: {self.out}/{self.prefix}*", flush=True)
        what = f"{len(self.failed)} failed" if self.failed else "all passed"
        print(f"gpu-check: {what}; {len(self.left_out)} left out; {seconds:.0f} s")
        return 1 if self.failed else 0


def dry_run(kit, out):
    """Return the commands of all phases, with TEST for the name of a test."""
    lines = []
    if kit is None:
        import gpu_kit

        kit = KIT
        lines += [shown(command) for command in gpu_kit.build_commands("(the GPU's)")]
    tests = kit / DEVICE_TESTS
    return [
        *lines,
        f"{shown(test_command(tests, 'TEST'))} (each, {CONCURRENT} at a time; those of attention also with MOBA_CUDA_ARCH=sm80)",
        shown(pytest_command()),
        *(f"{shown(sanitizer_command(tool, tests, 'TEST'))} (small ones)" for tool in SANITIZERS),
        f"{shown(benchmark_command(0, out))} (what is left of {TOTAL} s)",
        shown(kernels_command(LIMITS["kernels by time"] - 8)),
        f"{shown(ncu_command())} (with --ncu)",
    ]


def built_kit(gpu):
    """Build a kit for the GPU at hand; return its folder, or None."""
    command = [sys.executable, ROOT / "tools" / "gpu_kit.py", f"--arch={gpu.capability}"]
    command += [f"--out={KIT}", f"--jobs={os.cpu_count()}"]
    done = execute(command, BUILD_LIMIT, ROOT, dict(os.environ))
    print(f"gpu-check: build: {done.why or 'passed'}, {done.seconds:.0f} s", flush=True)
    if done.why:
        print(done.output[-4000:], flush=True)
    return None if done.why else KIT


def refuse(message):
    print(f"gpu-check: {message}", file=sys.stderr)
    return 1


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kit", type=Path, help="folder of `make gpu-kit`; default: built here")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder of the results, default benchmarks/results",
    )
    parser.add_argument("--seconds", type=float, default=TOTAL, help="time limit of the phases")
    parser.add_argument("--ncu", action="store_true", help="add metrics of Nsight Compute")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    options = parser.parse_args(arguments)
    if options.dry_run:
        print("\n".join(dry_run(options.kit, options.out)))
        return 0
    if options.kit and not (options.kit / MANIFEST).exists():
        return refuse(
            f"--kit: expected a folder of `make gpu-kit`, got {options.kit} without {MANIFEST}"
        )
    gpu = gpu_here()
    if gpu is None:
        return refuse("expected an NVIDIA GPU, got none that nvidia-smi lists")
    kit = options.kit
    if kit is None:
        import gpu_kit

        if reason := torch_refusal(gpu_kit.TORCH):
            return refuse(reason)
        kit = built_kit(gpu)
        if kit is None:
            return 1
    begin = time.monotonic()
    kit = kit.resolve()
    manifest = json.loads((kit / MANIFEST).read_text())
    if reason := refusal(options.kit or kit, manifest, gpu):
        return refuse(reason)
    print(
        f"gpu-check: {gpu.name}, driver {gpu.driver}, torch {torch_here()[0]}, kit of commit {manifest['commit']} for "
        f"sm_{manifest['architecture']}, {options.seconds:.0f} s",
        flush=True,
    )
    return Check(kit, manifest, gpu, options.out, begin, options.seconds).run(options.ncu)


if __name__ == "__main__":
    sys.exit(main())
