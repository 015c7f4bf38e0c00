"""Failing calls of the C library: `moba train` and `moba generate` name the file, and lose nothing that was there."""

import os
import shutil
import subprocess

import pytest
from builds import ROOT, existing
from test_train import arguments, exact, log_of, place, text, train  # noqa: F401 (fixtures)

CALLS = ["write", "fsync", "rename", "mmap"]
STEPS = 3


@pytest.fixture
def fault(build_folder, tmp_path):
    """fault(call, number, command, folder) runs the program while that call fails for a file under the folder, and returns
    the CompletedProcess and the number of calls."""
    library = existing(build_folder / "tests" / "moba_faults.so", "`make build` makes it")

    def run(call, number, command, folder):
        count = tmp_path / "count"
        count.write_bytes(b"")
        settings = {
            "LD_PRELOAD": str(library),
            "FAULT_CALL": call,
            "FAULT_NUMBER": str(number),
            "FAULT_FOLDER": str(folder),
            "FAULT_COUNT": str(count),
        }
        command = [build_folder / "moba", *map(str, command)]
        done = subprocess.run(command, capture_output=True, timeout=120, env=os.environ | settings)
        return done, count.stat().st_size

    return run


def numbers(calls):
    """Return the calls to fail: all, or as many as MOBA_TEST_FAULTS [5], spread evenly."""
    most = int(os.environ.get("MOBA_TEST_FAULTS", 5))
    return sorted({1 + i * (calls - 1) // max(most - 1, 1) for i in range(min(calls, most))})


def check_error(done, folder):
    """Check that a run ended well or with one sentence that names a file, or memory."""
    errors = done.stderr.decode()
    assert done.returncode in (0, 1), errors
    if done.returncode == 1:
        last = errors.strip().splitlines()[-1]
        assert f"{folder}" in last and ": expected " in last or "out of memory" in last, errors


@pytest.mark.parametrize("call", CALLS)
def test_training_survives_a_failing_call(call, fault, place, train):  # noqa: F811
    flags = dict(save_every=1, lr_schedule="constant", warmup=0, threads=1)
    whole = exact(train("whole", steps=STEPS, **flags))
    train("base", steps=1, **flags)

    def attempt(number):
        shutil.rmtree(place / "run", ignore_errors=True)
        shutil.copytree(place / "base", place / "run", symlinks=True)
        command = arguments(place, steps=STEPS, resume=True, **flags)
        return fault(call, number, command, place)

    done, calls = attempt(0)
    assert done.returncode == 0 and calls > 0
    for number in numbers(calls):
        done, _ = attempt(number)
        check_error(done, place)
        assert exact(train(steps=STEPS, resume=True, **flags)) == whole, (call, number)


@pytest.mark.parametrize("call", [*CALLS, "malloc"])
def test_generation_survives_a_failing_call(call, fault, moba, tmp_path):
    """Let calls fail that write pages of the prompt to --cache-dir, which the answer needs not; or that map the model, or
    allocations afterwards."""
    document, store, model = (
        tmp_path / "document.txt",
        tmp_path / "store",
        ROOT / "models/needle-2m",
    )
    document.write_text(text(20000))
    command = ["generate", "-m", model, "--no-chat", "-f", document, "-n", 4]
    command += ["--temp", 0, "--threads", 1, "--cache-dir", store]
    answer = moba(*command).stdout
    assert answer and list(store.iterdir())
    writes = call not in ("mmap", "malloc")

    def attempt(number):
        if call != "mmap":
            shutil.rmtree(store)
        return fault(call, number, command, store if writes else model)

    done, calls = attempt(0)
    assert done.stdout == answer
    assert calls > 0 or call == "fsync"  # a damaged page is read again, so that none is synced
    for number in numbers(calls):
        done, _ = attempt(number)
        if writes:
            assert (done.returncode, done.stdout) == (0, answer), done.stderr.decode()
        check_error(done, model)
        assert moba(*command).stdout == answer, (call, number)
