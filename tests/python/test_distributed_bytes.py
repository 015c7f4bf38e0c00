"""The simulation of benchmarks/context_parallel.py against bytes and memory of real runs."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from moba.distributed import context_parallel_attention, count_traffic, unshard
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
TOKENS, BLOCK, TOP_K = 2048, 32, 3
HEADS = {"q_heads": 8, "kv_heads": 2, "head_dim": 32, "element": 4}


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators return, while they live, and the highest sum."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self._add(t.untyped_storage())
        return result

    def _add(self, storage):
        key = storage._cdata
        if key not in self.live and storage.nbytes():
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.now -= self.live.pop(key)


def measured():
    """Return the global selection, and sent plus received bytes and peak memory of each strategy on this rank."""
    ranks, group = dist.get_world_size(), dist.group.WORLD
    heads, kv_heads, head_dim, _ = HEADS.values()
    torch.manual_seed(dist.get_rank())
    shapes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(1, TOKENS // ranks, h, head_dim).requires_grad_() for h in shapes)
    found = {}
    for strategy in ("fetch", "queries", "auto", "heads"):
        options = {"block_size": BLOCK, "top_k": TOP_K, "strategy": strategy}
        with PeakMemory() as memory, count_traffic() as traffic:
            out = context_parallel_attention(q, k, v, **options)
            gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        del out, gradients
        found[strategy] = traffic.sent + traffic.received, memory.peak
    _, selection = context_parallel_attention(
        q, k, v, block_size=BLOCK, top_k=TOP_K, return_selection=True
    )
    return unshard(selection, group, 2)[0].numpy(), found


@pytest.mark.parametrize("ranks", (2, 4))
def test_simulated_bytes_and_memory_are_those_of_real_runs(ranks, tmp_path):
    import context_parallel as simulation
    import numpy as np

    results = on_ranks(ranks, measured, folder=tmp_path)
    selection = results[0][0]  # [heads, tokens, width]
    home = np.arange(TOKENS // BLOCK) * BLOCK // (TOKENS // ranks)
    own = np.arange(TOKENS) // BLOCK
    earlier = np.where(selection == own[:, None], -1, selection)
    head, token, column = np.nonzero(earlier >= 0)
    group = HEADS["q_heads"] // HEADS["kv_heads"]
    rank = np.arange(TOKENS) * ranks // TOKENS
    counts = simulation.Counts(
        simulation.blocks_needed(head // group, rank[token], earlier[head, token, column], home),
        simulation.rows_needed(np.tile(rank, len(earlier)), earlier.reshape(-1, TOP_K), 1, home),
    )
    case = TOKENS, ranks, BLOCK, TOP_K, simulation.Shape(**HEADS)
    for strategy in ("fetch", "queries", "auto", "heads"):
        expected = simulation.moved(counts, strategy, *case)
        assert [found[strategy][0] for _, found in results] == expected.tolist(), strategy
        for (_, found), memory in zip(results, simulation.memory(counts, strategy, *case)):
            assert abs(found[strategy][1] / memory - 1) < 0.15, strategy


def test_report_is_that_of_the_simulation():
    import context_parallel as simulation

    report = simulation.RESULT.read_text()
    for case in ((1 << 15, 8, 512, 3), (1 << 17, 32, 4096, 12), (1 << 17, 1024, 512, 3)):
        assert simulation.line(*case) in report
