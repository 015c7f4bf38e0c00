"""`make gpu-kit` without nvcc: the kit's files, its size limit and its errors."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_kit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    spec = importlib.util.spec_from_file_location("gpu_kit", ROOT / "tools" / "gpu_kit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def assembled(gpu_kit, tmp_path, monkeypatch):
    """Return a kit of programs that stand for those of a build."""
    build, emulated, kit = tmp_path / "build", tmp_path / "emulated", tmp_path / "kit"
    for path in ("tests/cuda/moba_cuda_device_tests", "python/csrc/libmoba_torch.so"):
        (build / path).parent.mkdir(parents=True)
        shutil.copy("/bin/true", build / path)
    emulated.mkdir()
    for name in ("results.json", "outputs.txt.gz"):
        (emulated / name).write_text("")
    monkeypatch.setattr(gpu_kit, "manifest", lambda architecture: {"architecture": architecture})
    gpu_kit.assemble(kit, 90, build, emulated)
    return kit


def test_kit_holds_what_a_check_reads(assembled):
    for path in (
        "kit.json",
        "bin/moba_cuda_device_tests",
        "package/moba/__init__.py",
        "package/moba/libmoba_torch.so",
        "emulated/results.json",
        "emulated/outputs.txt.gz",
        "tests/python/test_cuda.py",
        "benchmarks/cuda.py",
        "benchmarks/cuda_kernels.py",
        "benchmarks/peers/flash_moba.py",
    ):
        assert (assembled / path).exists(), path
    done = subprocess.run(
        [sys.executable, assembled / "tools" / "gpu_check.py", "--kit", assembled, "--dry-run"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cmake" not in done.stdout and "moba_cuda_device_tests" in done.stdout


def test_modules_of_the_tests_are_in_the_kit(assembled):
    tests = assembled / "tests" / "python"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", tests],
        cwd=assembled,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_a_kit_that_is_too_large_is_refused(gpu_kit, tmp_path, monkeypatch):
    for name, size in (("small", 100), ("large", 3 << 20)):
        (tmp_path / name).write_bytes(bytes(size))
    assert gpu_kit.check_size(tmp_path) == (3 << 20) + 100
    monkeypatch.setattr(gpu_kit, "MAX_BYTES", 2 << 20)
    with pytest.raises(gpu_kit.Failure) as refused:
        gpu_kit.check_size(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: expected at most 2 MiB, got 3.0 MiB (large 3.0 MiB, small 0.0 MiB)"
    )


def test_failing_emulated_tests_are_named(gpu_kit, tmp_path):
    def program(name, code):
        path = tmp_path / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"if '--gtest_list_tests' in sys.argv: print('Suite.\\n  Fails')\nelse: sys.exit({code})\n"
        )
        path.chmod(0o755)
        return path

    with pytest.raises(gpu_kit.Failure, match="expected all to pass, got Suite.Fails exit code 3"):
        gpu_kit.emulate(program("device", 0), program("emulated", 3), tmp_path / "out", 2)


def test_missing_requirements_are_one_line(gpu_kit, monkeypatch, capsys):
    monkeypatch.setattr(gpu_kit, "missing", lambda: ["nvcc (on the PATH, or in CUDA_PATH)"])
    assert gpu_kit.main([]) == 1
    assert capsys.readouterr().err == (
        "gpu-kit: this machine lacks nvcc (on the PATH, or in CUDA_PATH)\n"
    )


@pytest.mark.parametrize("arch", ("hopper", "70", "9"))
def test_unknown_architectures_are_refused(gpu_kit, arch, capsys):
    with pytest.raises(SystemExit):
        gpu_kit.main(["--arch", arch])
    assert f"expected a compute capability such as 80 or 90, got {arch}" in capsys.readouterr().err


def test_architectures_are_named_as_in_the_build(gpu_kit):
    for architecture, name in ((80, "80-real"), (90, "90a-real"), (120, "120-real")):
        configure, build = gpu_kit.build_commands(architecture, 2)
        assert f"-DMOBA_CUDA_ARCHITECTURES={name}" in configure
        assert "moba_cuda_device_tests" in build and "-j2" in build
