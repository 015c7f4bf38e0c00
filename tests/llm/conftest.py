"""The programs and files that the tests of the model runner use."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("MOBA_BUILD_DIR", ROOT / "build" / "release"))
SMOLLM2 = Path(
    os.environ.get("MOBA_SMOLLM2", ROOT / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
)


def existing(path, how):
    if not path.exists():
        pytest.fail(f"{path} is missing: {how}")
    return path


@pytest.fixture(scope="session")
def build_folder():
    """The build whose programs are tested."""
    return existing(BUILD, "`make build` makes it, MOBA_BUILD_DIR names another")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as GGUF Q4_1."""
    return existing(SMOLLM2, "`make setup` fetches it, MOBA_SMOLLM2 names another place")


@pytest.fixture(scope="session")
def moba(build_folder):
    """Runs the program: moba("generate", "-m", ...) gives a CompletedProcess with bytes in stdout and stderr."""
    program = existing(build_folder / "moba", "`make build` makes it")

    def run(*arguments, stdin=b"", timeout=300):
        return subprocess.run(
            [program, *map(str, arguments)], input=stdin, capture_output=True, timeout=timeout
        )

    return run


@pytest.fixture
def logits_of(build_folder, tmp_path):
    """logits_of(model, ids, attn="moba", top_k=3) gives our logits [tokens, vocab] in f32."""
    tool = existing(build_folder / "tests" / "logits", "`make build` makes it")

    def run(model, ids, **flags):
        ids_file, out_file = tmp_path / "ids.i32", tmp_path / "logits.f32"
        np.asarray(ids, dtype=np.int32).tofile(ids_file)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        command = [tool, f"--model={model}", f"--ids={ids_file}", f"--out={out_file}", *options]
        done = subprocess.run(command, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        return np.fromfile(out_file, dtype=np.float32).reshape(len(ids), -1)

    return run
