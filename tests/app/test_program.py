"""`moba` itself: its version, and what it says about arguments that it does not know."""

import subprocess

import pytest


def lines_of(program, **environment):
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stderr == ""
    return dict(line.split("  ", 1) for line in done.stdout.splitlines()[1:])


@pytest.mark.parametrize("name", ["moba", "moba-llm"])
def test_version_shows_build_instruction_sets_and_gpu_architectures(build_folder, name):
    facts = {key: value.strip() for key, value in lines_of(build_folder / name).items()}
    assert list(facts) == ["build", "instruction sets", "in use", "CUDA architectures"]
    available = facts["instruction sets"].split(", ")
    assert "SCALAR" in available or "NEON" in available
    assert facts["in use"].split(", ")[0] == available[0]
    assert facts["CUDA architectures"] == "none"


def test_version_shows_the_forced_instruction_set(build_folder):
    program = build_folder / "moba"
    for target in lines_of(program)["instruction sets"].strip().split(", "):
        facts = lines_of(program, MOBA_CPU_TARGET=target, MOBA_CPU_BF16="none")
        assert facts["in use"].strip() == target
    assert "MOBA_CPU_TARGET" in lines_of(program, MOBA_CPU_TARGET="ALTIVEC")["in use"]


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["generat", "-m", "x"], "generate"),
        (["ifno"], "info"),
        (["eval", "nedle"], "needle"),
        (["info", "--modle", "x"], "--model"),
        (["info", "--tensor", "-m", "x"], "--tensors"),
        (["generate", "--model=x", "--moba-top-k=3"], "--moba-topk"),
        (["eval", "loss", "--modl", "x"], "--model"),
        (["bench", "--tokns", "4k"], "--tokens"),
        (["--versoin"], "--version"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_mistyped_word_is_answered_with_the_nearest(moba, arguments, near):
    done = moba(*arguments)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode().endswith(f"; did you mean {near}?\n")


@pytest.mark.parametrize("arguments", [["xyz"], ["info", "-m", "x", "--frobnicate"], ["-x"]])
def test_word_that_is_near_to_none_is_named_alone(moba, arguments):
    done = moba(*arguments)
    assert done.returncode == 2 and b"did you mean" not in done.stderr
    assert arguments[-1] in done.stderr.decode()
