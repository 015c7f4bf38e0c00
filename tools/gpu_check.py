#!/usr/bin/env python3
"""Build the CUDA backend for the GPU of this machine, test it, and measure it; needs no network.

Prints first what it skips and why. Requires nvcc, cmake, a C++20 compiler and this Python's torch with CUDA. MOBA_DEPS names
a prefix with Highway and GoogleTest if the system has none (docs/cuda.md). The exit code is 0 if everything passed; results
are in build/gpu-check and benchmarks/results.

    python3 tools/gpu_check.py              # make gpu-check; takes less than 8 minutes
    python3 tools/gpu_check.py --dry-run    # prints the commands; needs no GPU
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu-check"
DEVICE_TESTS = BUILD / "tests" / "cuda" / "moba_cuda_device_tests"
EMULATED_TESTS = BUILD / "tests" / "cuda" / "moba_cuda_tests"
# Small tests that together run every kernel.
SANITIZED = ":".join(
    (
        "CudaAttend.AnyOrderOfBlocksAndWarpsGivesTheSameBits",
        "CudaAttend.SelectBlocksMatchesAttention",
        "CudaAttend.ManyShortSequencesMatchTheOracle",
        "CudaAttend.BlocksAbove64KeysMatchTheOracle",
        "CudaAttendBackward.AnyOrderOfBlocksAndWarpsGivesTheSameBits",
        "CudaAttendBackward.RecomputedSelectionGivesTheSameBits",
        "CudaDecode.AnyOrderAndWorkspaceGiveTheSameBits",
        "CudaSm90Backward.AnyOrderAndAnyWorkspaceGiveTheSameBits",
    )
)
# Tests of calls that use other kernels on sm90.
CHOOSING = "CudaAttend*:All/*"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Maximum seconds of each phase, and of all together.
LIMITS = {
    "build": 170,
    "C++ tests": 60,
    "C++ tests with sm80": 40,
    "PyTorch tests": 75,
    **dict.fromkeys(SANITIZERS, 25),
}
TOTAL, MIN_BENCHMARK = 470, 30


def nvcc():
    beside = [
        Path(os.environ[name]) / "bin"
        for name in ("CUDA_PATH", "CUDA_HOME")
        if os.environ.get(name)
    ]
    return shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.pathsep.join(map(str, [*beside, "/usr/local/cuda/bin"]))
    )


def torch_with_cuda():
    """Return torch, and the reason why it cannot be used or None."""
    try:
        import torch
    except ImportError:
        return None, f"torch, which {sys.executable} cannot import"
    if torch.version.cuda is None:
        return torch, f"a torch with CUDA (this one is {torch.__version__})"
    if not torch.cuda.is_available():
        return torch, "a GPU that torch can use"
    return torch, None


def missing():
    found = [] if nvcc() else ["nvcc (on the PATH, or in CUDA_PATH)"]
    found += [name for name in ("cmake", "ninja") if not shutil.which(name)]
    return found + [why for why in (torch_with_cuda()[1],) if why]


def skipped():
    """Return lines about what this machine lacks for single phases."""
    lines = []
    if not sanitizer():
        lines.append("compute-sanitizer: expected on the PATH or beside nvcc, got none")
    for module, of in (
        ("pytest", "PyTorch tests"),
        ("transformers", "PyTorch tests: the model of transformers"),
    ):
        if not find_spec(module):
            lines.append(f"{of}: {sys.executable} has no {module}")
    return lines


def sanitizer():
    beside = Path(nvcc()).resolve().parent if nvcc() else None
    return shutil.which("compute-sanitizer") or (
        beside and shutil.which("compute-sanitizer", path=str(beside))
    )


def environment():
    """Return the environment of all commands: the built package and the libraries of MOBA_DEPS."""
    deps = os.environ.get("MOBA_DEPS")
    libraries = (
        [str(path.parent.resolve()) for path in Path(deps).glob("**/libhwy.so*")] if deps else []
    )
    paths = [*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return os.environ | {
        "PYTHONPATH": str(BUILD / "package"),
        "LD_LIBRARY_PATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
    }


def configure(torch_folder, architecture):
    command = [
        "cmake",
        "--preset",
        "cuda",
        "-B",
        BUILD,
        "-DMOBA_BUILD_PYTORCH=ON",
        "-DMOBA_WARNINGS_AS_ERRORS=OFF",
        f"-DMOBA_TORCH_DIR={torch_folder}",
        f"-DMOBA_CUDA_ARCHITECTURES={architecture}",
        f"-DCMAKE_CUDA_COMPILER={nvcc() or 'nvcc'}",
        "--log-level=ERROR",
    ]
    deps = os.environ.get("MOBA_DEPS")
    if deps:
        command.append(f"-DCMAKE_PREFIX_PATH={Path(deps).resolve()};{Path(deps).resolve() / 'usr'}")
    return command


def build_commands(torch_folder, architecture):
    targets = ["moba_torch", "moba_cuda_device_tests", "moba_cuda_tests"]
    return [
        configure(torch_folder, architecture),
        ["cmake", "--build", BUILD, "-j", str(os.cpu_count()), "--target", *targets],
    ]


def pytest_command():
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "tests/python/test_cuda.py",
    ]


def device_command(results=None, only=None):
    options = [f"--gtest_output=json:{results}"] if results else []
    return [
        DEVICE_TESTS,
        "--gtest_brief=1",
        *options,
        *([f"--gtest_filter={only}"] if only else []),
    ]


def sanitizer_command(tool):
    return [
        sanitizer() or "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        *device_command(only=SANITIZED),
    ]


def benchmark_command(seconds):
    return [sys.executable, "benchmarks/cuda.py", "--seconds", f"{seconds:.0f}"]


def shown(command):
    return " ".join(str(word).replace(str(ROOT) + "/", "") for word in command)


def outputs(path):
    """Read MOBA_TEST_RESULTS: for each test, seed and call the output in float64, and the unit roundoff of its dtype."""
    import torch

    calls, found = Counter(), {}
    for line in path.read_text().splitlines():
        test, seed, dtype, digits = line.split(" ")
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


class Check:
    def __init__(self):
        self.begin = time.monotonic()
        self.failed = []

    def left(self):
        return TOTAL - (time.monotonic() - self.begin)

    def run(self, phase, command, limit=None, **variables):
        """Run a command within its time limit; return its output, or None if it failed. The output is kept in build/gpu-check,
        and printed on failure."""
        limit = min(limit or LIMITS[phase], self.left())
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment() | variables,
                timeout=max(limit, 1),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output, why = (
                done.stdout,
                None if done.returncode == 0 else f"ended with {done.returncode}",
            )
        except subprocess.TimeoutExpired as late:
            output, why = (
                (late.stdout or b"").decode(errors="replace"),
                f"took more than its {limit:.0f} s",
            )
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / f"{phase.replace(' ', '-')}.log").write_text(output)
        print(
            f"gpu-check: {phase}: {why or 'passed'}, {time.monotonic() - begin:.0f} s", flush=True
        )
        if why:
            print(output[-4000:], flush=True)
            self.failed.append(f"{phase} {why}")
        return output if not why else None

    def compare(self, emulated, real):
        """Compare the tests' results and outputs on the emulation and on the device."""
        if not (emulated.exists() and real.exists()):
            print(
                "gpu-check: skipped: the comparison with the emulation, because one side has no results"
            )
            return
        results = [
            {
                f"{suite['name']}.{test['name']}": test
                for suite in json.loads(path.read_text())["testsuites"]
                for test in suite["testsuite"]
            }
            for path in (emulated, real)
        ]
        both = sorted(results[0].keys() & results[1].keys())
        other = [
            name
            for name in both
            if ("failures" in results[0][name]) != ("failures" in results[1][name])
        ]
        swaps = [sum(int(tests[name].get("swaps", 0)) for name in both) for tests in results]
        print(
            f"gpu-check: {len(both)} tests on the emulation and on the device, {len(other)} with different results"
            f"{': ' + ', '.join(other) if other else ''}; blocks swapped by rounding: {swaps[0]} and {swaps[1]}"
        )
        calls, numbers, equal, far = differences(
            emulated.with_suffix(".txt"), real.with_suffix(".txt")
        )
        print(
            f"gpu-check: outputs of {calls} calls, {numbers} elements: {100 * equal:.1f}% are bit-identical, {100 * far:.3f}% differ by more "
            "than 16 units of the largest"
        )
        if other or calls == 0 or far > 0.01:
            self.failed.append("the emulation and the device disagree")


def package():
    folder = BUILD / "package" / "moba"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "moba", folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(BUILD / "python" / "csrc" / "libmoba_torch.so", folder)


def plan(torch_folder, architecture):
    lines = [shown(command) for command in build_commands(torch_folder, architecture)]
    lines += [
        shown(device_command()),
        f"MOBA_CUDA_ARCH=sm80 {shown(device_command(only=CHOOSING))} (on Hopper)",
        f"{shown([EMULATED_TESTS])} (concurrently; its results are compared)",
    ]
    return lines + [
        shown(pytest_command()),
        *map(shown, map(sanitizer_command, SANITIZERS)),
        shown(benchmark_command(0)) + f" (what is left of {TOTAL} s)",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    options = parser.parse_args()
    lacking = missing()
    if lacking and not options.dry_run:
        print(f"gpu-check: this machine lacks {'; '.join(lacking)}", file=sys.stderr)
        return 1
    torch, _ = torch_with_cuda()
    torch_folder = Path(torch.__file__).parent if torch else "(torch)"
    architecture, capability = "(the GPU's)", None
    if not lacking:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
        architecture = {90: "90a-real"}.get(capability, f"{capability}-real")
        print(
            f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}, {TOTAL} s in total"
        )
    for line in [f"lacking: {what}" for what in lacking] + [
        f"skipped: {what}" for what in skipped()
    ]:
        print(f"gpu-check: {line}", flush=True)
    if options.dry_run:
        print("\n".join(plan(torch_folder, architecture)))
        return 0

    check = Check()
    for command in build_commands(torch_folder, architecture):
        if check.run("build", command) is None:
            return 1
    package()
    real, emulated = BUILD / "device.json", BUILD / "emulated.json"
    for path in (real, emulated):
        path.unlink(missing_ok=True)
        path.with_suffix(".txt").unlink(missing_ok=True)
    with subprocess.Popen(
        [EMULATED_TESTS, "--gtest_brief=1", f"--gtest_output=json:{emulated}"],
        cwd=ROOT,
        env=environment() | {"MOBA_TEST_RESULTS": str(emulated.with_suffix(".txt"))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as emulation:
        check.run(
            "C++ tests", device_command(real), MOBA_TEST_RESULTS=str(real.with_suffix(".txt"))
        )
        if capability == 90:
            check.run("C++ tests with sm80", device_command(only=CHOOSING), MOBA_CUDA_ARCH="sm80")
        if find_spec("pytest"):
            check.run("PyTorch tests", pytest_command())
        if sanitizer():
            for tool in SANITIZERS:
                check.run(tool, sanitizer_command(tool))
        try:  # must end before anything is timed
            emulation.wait(timeout=60)
        except subprocess.TimeoutExpired:
            emulation.kill()
    check.compare(emulated, real)
    seconds = check.left() - 20
    if seconds < MIN_BENCHMARK:
        print(f"gpu-check: skipped: the benchmark, {seconds:.0f} s were left")
    elif output := check.run("benchmark", benchmark_command(seconds), limit=check.left()):
        print(output)
    print(f"gpu-check: {'failed: ' + '; '.join(check.failed) if check.failed else 'all passed'}")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
