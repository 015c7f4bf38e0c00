"""Fixtures: the programs and files that the tests of the program and of the model runner use."""

import json
import subprocess

import pytest
from builds import BUILD, SMOLLM2, existing


@pytest.fixture(scope="session")
def build_folder():
    """Return the build whose programs are tested."""
    return existing(BUILD, "`make build` makes it, MOBA_BUILD_DIR names another")


@pytest.fixture(scope="session")
def smollm2():
    """Return SmolLM2-135M-Instruct as GGUF Q4_1."""
    return existing(SMOLLM2, "`make setup` fetches it, MOBA_SMOLLM2 names another place")


@pytest.fixture(scope="session")
def moba(build_folder):
    """Run the program: moba("generate", "-m", ...) returns a CompletedProcess with bytes in stdout and stderr."""
    program = existing(build_folder / "moba", "`make build` makes it")

    def run(*arguments, stdin=b"", timeout=300):
        return subprocess.run(
            [program, *map(str, arguments)], input=stdin, capture_output=True, timeout=timeout
        )

    return run


@pytest.fixture
def info(moba):
    """info(model, "--tensors") returns the JSON of `moba info`."""

    def run(path, *flags):
        done = moba("info", "-m", path, "--json", *flags)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    return run


@pytest.fixture
def logits_of(build_folder, tmp_path):
    """logits_of(model, ids, attn="moba", top_k=3) returns the runner's logits [tokens, vocab] in f32."""
    import numpy as np  # here, because make gpu-check runs tests/python on machines without numpy

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


@pytest.fixture
def one_thread():
    """Run a test on one thread: in small models, PyTorch's threads would mostly wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
