#!/usr/bin/env python3
"""Count the bytes that context-parallel attention moves, and its memory, beside ring attention: a simulation, without timings.

One layer's attention, forward and backward, of one causal sequence in contiguous shares. Selections are drawn (seeded): with
"scattered" routing a row selects any earlier blocks, and every earlier block is selected by some row; with "clustered"
routing the rows of a block and kv head select from four times as many blocks as one of them selects. Bytes are those that the
busiest rank sends and receives, an all-gather counted as its other ranks' shares. Memory is the rank's tensors at the peak of
the backward pass, inputs and gradients included. tests/python/test_distributed_bytes.py checks both against real runs.

    .venv/bin/python benchmarks/context_parallel.py          # writes benchmarks/results/context-parallel.md
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "context-parallel.md"
HEADER = 15 * 8  # bytes that each rank says about its call
SAMPLES = 8  # rows of a block and kv head whose ranks are counted


@dataclass(frozen=True)
class Shape:
    """Heads of a layer, and the bytes of an element. The default is Llama 3 8B in bf16."""

    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    element: int = 2

    @property
    def q_row(self) -> int:
        return self.q_heads * self.head_dim * self.element

    @property
    def kv_row(self) -> int:
        return self.kv_heads * self.head_dim * self.element

    @property
    def row(self) -> int:
        return self.head_dim * self.element


@dataclass(frozen=True)
class Counts:
    """What ranks need of each other, [from, to]: blocks of a kv head to fetch, and rows of a query head to send."""

    blocks: np.ndarray
    rows: np.ndarray

    def of_rank(self, matrix):
        """Return what each rank sends and receives."""
        remote = matrix * (1 - np.eye(len(matrix)))
        return remote.sum(0), remote.sum(1)


def blocks_needed(head, rank, block, home):
    """Count the different blocks that each rank needs of each other, of one (kv head, rank, block) a selection."""
    ranks = int(home.max()) + 1
    _, rank, block = np.unique(np.stack([head, rank, block]), axis=1)
    counts = np.zeros((ranks, ranks))
    np.add.at(counts, (rank, home[block]), 1)
    return counts


def rows_needed(rank, blocks, weight, home):
    """Count the pairs of a row and a rank with blocks that it selects: `rank` [rows], `blocks` [rows, width], -1: none."""
    ranks = int(home.max()) + 1
    owner = np.sort(np.where(blocks < 0, -1, home[blocks]), axis=1)
    is_new = owner >= 0
    is_new[:, 1:] &= owner[:, 1:] != owner[:, :-1]
    row, column = np.nonzero(is_new)
    counts = np.zeros((ranks, ranks))
    np.add.at(counts, (rank[row], owner[row, column]), np.broadcast_to(weight, rank.shape)[row])
    return counts


def drawn_counts(tokens, ranks, block_size, top_k, shape, clustered, seed=0):
    """Count for drawn selections."""
    random = np.random.default_rng(seed)
    blocks, width = tokens // block_size, top_k - 1
    home = np.arange(blocks) * block_size // (tokens // ranks)
    pool = 4 * width
    wanted, sent = np.zeros((ranks, ranks)), np.zeros((ranks, ranks))
    weight = block_size * shape.q_heads / (shape.kv_heads * SAMPLES)
    for head in range(shape.kv_heads):
        candidates = np.arange(blocks)
        few = np.minimum(candidates, pool if clustered else width)
        if clustered:
            drawn = random.integers(0, np.maximum(candidates, 1)[:, None], (blocks, pool))
            drawn = np.where(candidates[:, None] <= pool, np.arange(pool), drawn)
            order = random.random((blocks, SAMPLES, pool))
            order[
                np.broadcast_to(np.arange(pool) >= few[:, None], (blocks, pool))[:, None].repeat(
                    SAMPLES, 1
                )
            ] = 2
            chosen = np.argsort(order, axis=2)[:, :, :width]
            rows = np.take_along_axis(drawn[:, None].repeat(SAMPLES, 1), chosen, 2)
            valid = np.arange(pool) < few[:, None]
            at, column = np.nonzero(valid)
            wanted += blocks_needed(np.full(len(at), head), home[at], drawn[at, column], home)
        else:
            rows = random.integers(
                0, np.maximum(candidates, 1)[:, None, None], (blocks, SAMPLES, width)
            )
            rows = np.where(candidates[:, None, None] <= width, np.arange(width), rows)
            counts = np.bincount(home, minlength=ranks)
            wanted += np.tril(np.broadcast_to(counts, (ranks, ranks)))
        rows = np.where(np.arange(width) < np.minimum(candidates, width)[:, None, None], rows, -1)
        sent += rows_needed(home.repeat(SAMPLES), rows.reshape(-1, width), weight, home)
    return Counts(wanted, sent)


def moved(counts, strategy, tokens, ranks, block_size, top_k, shape):
    """Return the bytes that each rank sends and receives, forward and backward: [ranks]."""
    others, share = ranks - 1, tokens // ranks
    if strategy == "ring":  # keys and values go round twice, their gradients once more and home
        return np.full(ranks, 2 * (2 * others + ranks) * 2 * share * shape.kv_row)
    if strategy == "heads":
        copies = max(1, ranks // shape.kv_heads)
        of_rank = share * (2 * shape.q_row + 2 * copies * shape.kv_row) * others // ranks
        lse = share * shape.q_heads * 4 * others // ranks
        return np.full(ranks, 2 * (2 * of_rank + lse + HEADER * others))
    means = tokens // block_size // ranks * shape.kv_row * others
    strategies = 1 if strategy == "fetch" else 2
    sizes = strategies * shape.kv_heads * 8 * others
    agreed = 16 * others if strategy == "auto" else 0
    fixed = 2 * (HEADER * others + means + sizes + agreed)
    width = min(top_k, tokens // block_size) - 1
    fetch = sum(counts.of_rank(counts.blocks)) * (4 + 6 * block_size * shape.row)
    queries = sum(counts.of_rank(counts.rows)) * (6 * shape.row + 4 * width + 8)
    best = fetch if fetch.max() <= queries.max() else queries
    return fixed + {"fetch": fetch, "queries": queries, "auto": best}[strategy]


def chosen(counts, *case):
    """Return the strategy that "auto" takes."""
    fetch, queries = (moved(counts, s, *case).max() for s in ("fetch", "queries"))
    return "fetch" if fetch <= queries else "queries"


def memory(counts, strategy, tokens, ranks, block_size, top_k, shape):
    """Return the bytes of tensors at the peak of the backward pass on each rank: [ranks]."""
    share = tokens // ranks
    layer = share * (4 * shape.q_row + 4 * shape.kv_row + 4 * shape.q_heads)  # in, out, gradients
    kv, group = share * shape.kv_row, shape.q_heads // shape.kv_heads
    if strategy == "ring":  # two pairs of keys and values, and of their gradients in float32
        return np.full(
            ranks, layer + 2 * 2 * kv + 2 * 2 * 4 * share * shape.kv_heads * shape.head_dim
        )
    wide = 2 * 4 * share * shape.kv_heads * shape.head_dim - 2 * kv  # beyond dk and dv
    if strategy == "heads":
        copies = max(1, ranks // shape.kv_heads)
        return np.full(ranks, layer + share * (4 * shape.q_row + 4 * copies * shape.kv_row))
    if strategy == "auto":
        return memory(
            counts,
            chosen(counts, tokens, ranks, block_size, top_k, shape),
            tokens,
            ranks,
            block_size,
            top_k,
            shape,
        )
    if strategy == "fetch":
        there, here = (c * block_size / shape.kv_heads for c in counts.of_rank(counts.blocks))
        keys = share + here
        indices = shape.kv_heads * (8 * (keys + there) + 4 * group * share * top_k)
        sums = 2 * keys * (4 * shape.head_dim + shape.row)
        return (
            layer
            + wide
            + indices
            + share * group * shape.row
            + sums
            + 2 * (here + there) * shape.row
        )
    width = top_k - 1
    here, there = (c / shape.kv_heads for c in counts.of_rank(counts.rows))
    stays = np.diag(counts.rows) / shape.kv_heads
    here, there = here + stays, there + stays
    indices = shape.kv_heads * (16 * there + 4 * width * here + 8 * share)
    row = 3 * shape.row + 4
    stages = [
        there * (row + shape.row),  # packing
        there * row + here * row,  # exchanged
        2 * here * row,  # unpacking
        here * (row + shape.row) + 4 * share * shape.row,  # gradients there
    ]
    return layer + wide + indices + np.max(stages, 0)


TOKENS = (1 << 15, 1 << 17, 1 << 19, 1 << 20, 10 << 20)
RANKS = (2, 8, 32, 128, 1024)
ROUTINGS = ((512, 3), (4096, 12))


def amount(count):
    """Return bytes in the largest unit that leaves at least 1."""
    power = min(max(int(np.log2(count)) // 10, 2), 3)
    value = count / 1024**power
    return f"{value:.3g}" + f" {['MiB', 'GiB'][power - 2]}" if value < 1000 else f"{value:.0f} MiB"


def line(tokens, ranks, block_size, top_k, shape=Shape()):
    """Return a row of the table."""
    name = f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K"
    case = tokens, ranks, block_size, top_k, shape
    cells = [name, ranks]
    ring = moved(None, "ring", *case)
    cells.append(amount(ring.max()))
    fits = ranks <= shape.q_heads
    cells.append(amount(moved(None, "heads", *case).max()) if fits else "-")
    if tokens // block_size < ranks:
        return (
            "| "
            + " | ".join(
                map(str, [*cells, *["-"] * 4, amount(memory(None, "ring", *case).max()), "-", "-"])
            )
            + " |"
        )
    of = [drawn_counts(*case, clustered) for clustered in (False, True)]
    for counts in of:
        auto = moved(counts, "auto", *case)
        cells += [
            f"{amount(auto.max())} ({chosen(counts, *case)})",
            f"{ring.max() / auto.max():.3g}",
        ]
    cells.append(amount(memory(None, "ring", *case).max()))
    cells += [amount(memory(counts, "auto", *case).max()) for counts in of]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(block_size, top_k):
    rows = [line(tokens, ranks, block_size, top_k) for tokens in TOKENS for ranks in RANKS]
    return "\n".join(
        [
            "| tokens | ranks | ring | heads | scattered | ring / it | clustered | ring / it | memory: ring | scattered | clustered |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def report():
    parts = ["# Bytes and memory of context-parallel attention", "", *__doc__.splitlines()[2:7], ""]
    parts += [
        "Llama 3 8B's heads (32 query, 8 kv, head_dim 128) in bf16. `-`: refused (more ranks than blocks, or than query heads).",
        "",
    ]
    for block_size, top_k in ROUTINGS:
        parts += [f"## Blocks of {block_size}, top-k {top_k}", "", table(block_size, top_k), ""]
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    arguments.out.write_text(report())


if __name__ == "__main__":
    main()
