"""Signals, forked processes and threads around calls on the CPU."""

import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import moba
import pytest
import torch

PROGRAM = """
import signal, sys
import moba, torch

tokens, phase, handler = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def raising(*_):
    raise ArithmeticError

handlers = {"default": signal.default_int_handler, "raising": raising, "quiet": lambda *_: print("seen", flush=True)}
signal.signal(signal.SIGINT, handlers[handler])  # background processes of a shell begin with SIGINT ignored
q, k, v = (torch.randn(1, tokens, 2, 64, requires_grad=phase == "backward") for _ in range(3))
call = lambda: moba.attention(q, k, v, block_size=64, top_k=tokens)
if phase == "backward":
    out = call()
    call = lambda: out.backward(out.detach())
print("ready", flush=True)
try:
    call()
    print("finished")
except (KeyboardInterrupt, ArithmeticError) as error:
    print(type(error).__name__)
x = torch.ones(1, 4, 1, 8)
print(bool((moba.attention(x, x, x, block_size=2, top_k=1) == x).all()))
"""


def interrupted(tokens, phase, handler="default"):
    """Send SIGINT to a process of its own during a call, and return what it prints afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tokens), phase, handler],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    return printed.split()


@pytest.mark.parametrize(("tokens", "phase"), [(1 << 19, "forward"), (1 << 16, "backward")])
def test_ctrl_c_ends_a_call_of_minutes(tokens, phase):
    assert interrupted(tokens, phase) == ["KeyboardInterrupt", "True"]


def test_an_own_handler_raises_its_own_exception():
    assert interrupted(1 << 19, "forward", "raising") == ["ArithmeticError", "True"]


def test_a_handler_that_returns_lets_the_call_finish():
    assert interrupted(1 << 16, "forward", "quiet") == ["seen", "finished", "True"]


def inputs(seed):
    torch.manual_seed(seed)
    return [torch.randn(1, 512, 2, 32) for _ in range(3)]


def output(seed):
    return moba.attention(*inputs(seed), block_size=32, top_k=3)


def put_output(seed, queue):
    torch.set_num_threads(1)  # as torch's DataLoader does in its workers
    queue.put(output(seed).numpy())


def test_a_forked_worker_computes_the_same():
    expected = output(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=put_output, args=(0, queue))
    worker.start()
    try:
        found = torch.from_numpy(queue.get(timeout=60))
    finally:
        worker.kill()
    assert torch.equal(found, expected)


def test_threads_compute_the_same():
    expected = [output(seed) for seed in range(4)]
    tensors = [inputs(seed) for seed in range(4)]  # torch's generator is not for several threads
    found = [None] * 8

    def call(index):
        found[index] = moba.attention(*tensors[index % 4], block_size=32, top_k=3)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index % 4]) for index in range(8))
