#!/usr/bin/env python3
"""Build a kit: one folder with which a machine with an NVIDIA GPU checks the CUDA backend without compiling.

It holds the device tests, the outputs of the same tests on the emulated device, the PyTorch package, the benchmark and the
scripts. Needs nvcc and a torch of any kind, no GPU. MOBA_DEPS names a prefix with Highway and GoogleTest if the system has
none (docs/cuda.md).

    python3 tools/gpu_kit.py --arch 90                 # make gpu-kit ARCH=90
    python3 tools/gpu_check.py --kit build/gpu-kit     # on the machine with the GPU
"""

import argparse
import gzip
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import gpu_check

ROOT = gpu_check.ROOT
MIB = 1 << 20
# So that a kit and the repository can be sent together where 64 MiB are the limit.
MAX_BYTES = 48 * MIB
TARGETS = ("moba_torch", "moba_cuda_device_tests", "moba_cuda_tests")
# Files of the repository that the kit holds under the same names.
SCRIPTS = (
    "tools/gpu_check.py",
    "benchmarks/cuda.py",
    "benchmarks/cuda_kernels.py",
    "benchmarks/peers/flash_moba.py",
    "tests/python/conftest.py",
    "tests/python/random_models.py",
    "tests/python/packed.py",
    "tests/python/test_cuda.py",
)
# Libraries that the other machine may lack; the others are those of its compiler and its torch.
LIBRARIES = re.compile(r"(libhwy\.so\S*) => (\S+)")
# The oldest torch whose stable ABI the package uses (TORCH_TARGET_VERSION), and the oldest driver of a CUDA version.
TORCH, DRIVERS = "2.10", {12: "525", 13: "580"}


class Failure(Exception):
    """A one-line reason why there is no kit."""


def build_folder(architecture):
    return ROOT / "build" / f"gpu-{architecture}"


def cmake_architecture(architecture):
    return "90a-real" if architecture == 90 else f"{architecture}-real"


def nvcc():
    return gpu_check.nvidia_tool("nvcc")


def torch_folder():
    found = find_spec("torch")
    return Path(found.origin).parent if found else None


def missing():
    found = [] if nvcc()[1] else ["nvcc (on the PATH, or in CUDA_PATH)"]
    found += [name for name in ("cmake", "ninja", "strip") if not shutil.which(name)]
    return found + ([] if torch_folder() else [f"torch, which {sys.executable} cannot import"])


def build_commands(architecture, jobs=None):
    folder = build_folder(architecture)
    configure = [
        *("cmake", "--preset", "cuda", "-B", folder, "--log-level=ERROR"),
        "-DMOBA_BUILD_PYTORCH=ON",
        "-DMOBA_WARNINGS_AS_ERRORS=OFF",
        f"-DMOBA_TORCH_DIR={torch_folder()}",
        f"-DMOBA_CUDA_ARCHITECTURES={cmake_architecture(architecture)}",
        f"-DCMAKE_CUDA_COMPILER={nvcc()[0]}",
    ]
    if deps := os.environ.get("MOBA_DEPS"):
        deps = Path(deps).resolve()
        configure.append(f"-DCMAKE_PREFIX_PATH={deps};{deps / 'usr'}")
    build = ["cmake", "--build", folder, f"-j{jobs or os.cpu_count()}", "--target", *TARGETS]
    return [configure, build]


def environment():
    """Return the environment of the built programs: this one with the libraries of MOBA_DEPS."""
    deps = os.environ.get("MOBA_DEPS")
    found = Path(deps).glob("**/libhwy.so*") if deps else []
    libraries = [str(path.parent.resolve()) for path in found]
    libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(dict.fromkeys(libraries))}


def output_of(command):
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(
            f"{gpu_check.shown(command)}: exit code {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout


def emulate(device_tests, emulated_tests, folder, jobs):
    """Run the device's tests on the emulated device: results.json and outputs.txt.gz, unless they are newer than the tests."""
    results, outputs = folder / "results.json", folder / "outputs.txt.gz"
    if results.exists() and results.stat().st_mtime > emulated_tests.stat().st_mtime:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = gpu_check.names_of(output_of(gpu_check.list_command(device_tests)))
    names = sorted(
        set(names) & set(gpu_check.names_of(output_of(gpu_check.list_command(emulated_tests))))
    )
    tasks = {}
    for number, name in enumerate(names):
        env = environment() | {
            "MOBA_TEST_RESULTS": str(folder / f"{number}.txt"),
            "OMP_NUM_THREADS": "1",
        }
        command = gpu_check.test_command(emulated_tests, name, folder / f"{number}.json")
        tasks[name] = command, env
    done = gpu_check.execute_each(tasks, 3600, ROOT, jobs, 600)
    if failed := [f"{name} {result.why}" for name, result in done.items() if result.why]:
        raise Failure(
            f"tests on the emulated device: expected all to pass, got {'; '.join(failed)}"
        )

    found = {name: gpu_check.test_result(folder / f"{n}.json") for n, name in enumerate(names)}
    with gzip.GzipFile(outputs, "wb", mtime=0) as merged:
        for number in range(len(names)):
            if (folder / f"{number}.txt").exists():
                merged.write((folder / f"{number}.txt").read_bytes())
    for number in range(len(names)):
        for suffix in (".json", ".txt"):
            (folder / f"{number}{suffix}").unlink(missing_ok=True)
    results.write_text(json.dumps(found, indent=0))


def strip(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    output_of(["strip", "--strip-unneeded", "-o", target, source])
    target.chmod(0o755)


def manifest(architecture):
    release = re.search(r"release (\d+)\.(\d+)", output_of([nvcc()[0], "--version"]))
    git = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    has_git = shutil.which("git") and (ROOT / ".git").exists()
    return {
        "architecture": architecture,
        "commit": output_of(git).strip() if has_git else "unknown",
        "machine": platform.machine(),
        "cuda": f"{release[1]}.{release[2]}",
        "driver": DRIVERS.get(int(release[1]), "0"),
        "torch": TORCH,
    }


def assemble(kit, architecture, build, emulated):
    shutil.rmtree(kit, ignore_errors=True)
    device_tests = build / "tests" / "cuda" / "moba_cuda_device_tests"
    strip(device_tests, kit / gpu_check.DEVICE_TESTS)
    (kit / "lib").mkdir()
    for name, path in LIBRARIES.findall(output_of(["ldd", device_tests])):
        shutil.copy(path, kit / "lib" / name)
    package = kit / "package" / "moba"
    shutil.copytree(ROOT / "python" / "moba", package, ignore=shutil.ignore_patterns("__pycache__"))
    strip(build / "python" / "csrc" / "libmoba_torch.so", package / "libmoba_torch.so")
    for target in (gpu_check.EMULATED, gpu_check.EMULATED_OUTPUTS):
        (kit / target).parent.mkdir(exist_ok=True)
        shutil.copy(emulated / Path(target).name, kit / target)
    for script in SCRIPTS:
        (kit / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, kit / script)
    text = json.dumps(manifest(architecture), indent=1) + "\n"
    (kit / gpu_check.MANIFEST).write_text(text)


def check_size(kit):
    """Return the size of the kit in bytes; raise Failure if it is too large for a lent machine."""
    sizes = {path: path.stat().st_size for path in kit.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=sizes.get, reverse=True)[:3]
        parts = ", ".join(
            f"{path.relative_to(kit)} {sizes[path] / MIB:.1f} MiB" for path in largest
        )
        raise Failure(
            f"{kit}: expected at most {MAX_BYTES / MIB:.0f} MiB, got {total / MIB:.1f} MiB ({parts})"
        )
    return total


def build_kit(kit, architecture, jobs):
    if lacking := missing():
        raise Failure(f"this machine lacks {'; '.join(lacking)}")
    build = build_folder(architecture)
    log = build / "gpu-kit.log"
    build.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        for command in build_commands(architecture, jobs):
            print(gpu_check.shown(command), flush=True)
            words = [str(word) for word in command]
            done = subprocess.run(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode != 0:
                output.flush()
                sys.stdout.write(log.read_text()[-4000:])
                raise Failure(f"{command[0]} {command[1]}: exit code {done.returncode}, see {log}")
    print("running the device's tests on the emulated device", flush=True)
    tests = build / "tests" / "cuda"
    emulated = build / "emulated"
    emulate(tests / "moba_cuda_device_tests", tests / "moba_cuda_tests", emulated, jobs)
    assemble(kit, architecture, build, emulated)
    return check_size(kit)


def architecture_of(text):
    if not re.fullmatch(r"[89]\d|1\d\d", text):
        raise argparse.ArgumentTypeError(
            f"expected a compute capability such as 80 or 90, got {text}"
        )
    return int(text)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arch", type=architecture_of, default=90, help="compute capability, default 90"
    )
    parser.add_argument("--out", type=Path, default=gpu_check.KIT, help="the folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        size = build_kit(options.out, options.arch, options.jobs)
    except Failure as failure:
        print(f"gpu-kit: {failure}", file=sys.stderr)
        return 1
    print(
        f"gpu-kit: {options.out} for sm_{options.arch}, {size / MIB:.1f} MiB, {time.monotonic() - begin:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
