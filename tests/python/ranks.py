"""Runs functions on several ranks of a Gloo group, in processes forked from a server that has imported torch."""

import multiprocessing
import os
import signal
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["moba.distributed", "transformers.models.llama.modeling_llama"])


def _work(function, rank, ranks, store, timeout, results, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
        results.put((rank, function(*arguments), None))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)


def on_ranks(ranks, function, *arguments, folder, timeout=60, dies=None):
    """Call `function` on every rank and return the results in rank order; the error of a rank is raised here. A rank named
    `dies` is expected to kill itself."""
    results = _context.Queue()
    store = folder / f"store-{len(list(folder.iterdir()))}"
    workers = [
        _context.Process(
            target=_work,
            args=(function, rank, ranks, store, timeout, results, arguments),
            daemon=True,
        )
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    found = {}
    try:
        while len(found) < ranks - (dies is not None):
            rank, result, error = results.get(timeout=2 * timeout)
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = result
    finally:
        for worker in workers:
            worker.join(5)
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGKILL)
    return [found[rank] for rank in sorted(found)]
