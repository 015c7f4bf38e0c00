"""Tokens and blocks of a batch, and the ranks that hold them, as plain numbers that every rank computes alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import exchange

LAYOUTS = ("contiguous", "zigzag")


def check_layout(function: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f'{function}: layout: expected "contiguous" or "zigzag", got {layout!r}')


def chunks_of(rank: int, ranks: int, layout: str) -> list[int]:
    """Return the chunks of a row that a rank holds, ascending: of `ranks` chunks its own, or, in zigzag, of `2 * ranks` chunks
    one from the beginning and one from the end, so that causal attention costs every rank the same."""
    return [rank] if layout == "contiguous" else [rank, 2 * ranks - 1 - rank]


def owners(ranks: int, layout: str) -> list[int]:
    """Return the rank that holds each chunk of a row."""
    holders = {chunk: rank for rank in range(ranks) for chunk in chunks_of(rank, ranks, layout)}
    return [holders[chunk] for chunk in range(len(holders))]


class Run(NamedTuple):
    """Consecutive blocks of one sequence on one rank: tokens [begin, end) there, blocks [block0, block1) of all, and the first
    block of the sequence."""

    begin: int
    end: int
    block0: int
    block1: int
    first: int


@dataclass
class Move:
    """A permutation of the tokens of all ranks, from this rank's point of view: rows to send, in rank order, and where the
    rows here and those received go."""

    sent: list[int]
    received: list[int]
    send_rows: Tensor
    gather_rows: Tensor
    anywhere: bool

    def __call__(self, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Move the rows of `t` [tokens, ...]."""
        if not self.anywhere:
            return t
        moved = exchange(t[self.send_rows.to(t.device)], self.sent, self.received, group)
        return torch.cat([t, moved])[self.gather_rows.to(t.device)]


def ranges(begin: Tensor, length: Tensor) -> Tensor:
    """Concatenate the ranges [begin, begin + length)."""
    first = length.cumsum(0) - length
    return torch.arange(int(length.sum())) + (begin - first).repeat_interleave(length)


def _move(length: Tensor, source: Tensor, target: Tensor, rank: int, ranks: int) -> Move:
    """Plan the move of pieces of `length` tokens from rank `source` to `target`, kept in global order on both."""

    def positions(mine: Tensor) -> Tensor:
        here = torch.where(mine, length, 0)
        return here.cumsum(0) - here

    leaving = (source == rank) & (target != rank)
    coming = (target == rank) & (source != rank)
    by_target = leaving.nonzero()[:, 0][target[leaving].argsort(stable=True)]
    by_source = coming.nonzero()[:, 0][source[coming].argsort(stable=True)]
    held = int(length[source == rank].sum())
    begin = positions(source == rank)
    arrived = length[by_source].cumsum(0) - length[by_source]
    begin[by_source] = held + arrived
    staying = target == rank

    def counts(pieces: Tensor, peer: Tensor) -> list[int]:
        return torch.bincount(peer[pieces], length[pieces].double(), ranks).long().tolist()

    return Move(
        counts(by_target, target),
        counts(by_source, source),
        ranges(begin[by_target], length[by_target]),
        ranges(begin[staying], length[staying]),
        bool((source != target).any()),
    )


class BlockPlan:
    """The blocks of a batch and where they are.

    Blocks are numbered over all sequences in the order of the batch. The rank that holds the first token of a block is its
    home: there the block is whole. `to_homes` moves tokens [tokens, ...] to the homes of their blocks, in ascending order, and
    `to_shares` moves them back; neither sends anything where the shares consist of whole blocks.
    """

    def __init__(
        self,
        function: str,
        rows: int,
        share: int,
        rank: int,
        ranks: int,
        layout: str,
        offsets: Sequence[int],
        block_size: int,
    ) -> None:
        holders = owners(ranks, layout)
        chunk = share * ranks // len(holders)
        total = rows * share * ranks
        sequences = [(begin, end) for begin, end in pairwise(offsets) if end > begin]
        starts = torch.cat([torch.arange(a, b, block_size) for a, b in sequences])
        counts = torch.tensor([-(-(b - a) // block_size) for a, b in sequences])
        edges = torch.cat([torch.arange(0, total, chunk), starts, torch.tensor([total])]).unique()
        begin, length = edges[:-1], edges.diff()
        holder = torch.tensor(holders)[begin // chunk % len(holders)]
        block = torch.searchsorted(starts, begin, right=True) - 1

        self.rank, self.ranks, self.block_size = rank, ranks, block_size
        self.blocks = len(starts)
        self.max_blocks = int(counts.max())
        self.length = torch.cat([starts, torch.tensor([total])]).diff()
        self.first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        self.home = holder[torch.searchsorted(begin, starts)]
        if min(self.homes()) == 0:
            raise ValueError(
                f"{function}: block_size: expected a block that begins on each of {ranks} ranks, got {self.blocks} of "
                f"{block_size} tokens"
            )
        self.to_homes = _move(length, holder, self.home[block], rank, ranks)
        self.to_shares = _move(length, self.home[block], holder, rank, ranks)

        self.at = torch.empty_like(starts)  # of each block: its first token at its home
        for other in range(ranks):
            lengths = self.length[self.home == other]
            self.at[self.home == other] = lengths.cumsum(0) - lengths
        self.here = (self.home == rank).nonzero()[:, 0]
        self.tokens = int(self.length[self.here].sum())
        self.block_of_token = self.here.repeat_interleave(self.length[self.here])
        self.runs = self._runs()

    def _runs(self) -> list[Run]:
        """Cut this rank's blocks into runs."""
        follows = (self.here.diff() == 1) & (self.first[self.here].diff() == 0)
        cuts = [0, *((~follows).nonzero()[:, 0] + 1).tolist(), len(self.here)]
        runs = []
        for a, b in pairwise(cuts):
            first, last = int(self.here[a]), int(self.here[b - 1])
            end = int(self.at[last] + self.length[last])
            runs.append(Run(int(self.at[first]), end, first, last + 1, int(self.first[first])))
        return runs

    def homes(self) -> list[int]:
        """Return the number of blocks at home on each rank."""
        return torch.bincount(self.home, minlength=self.ranks).tolist()


@lru_cache(maxsize=16)
def block_plan(
    function: str,
    rows: int,
    share: int,
    rank: int,
    ranks: int,
    layout: str,
    offsets: tuple[int, ...],
    block_size: int,
) -> BlockPlan:
    """Return the plan of a batch, which the layers of a step share. Raises ValueError if a rank has no block."""
    return BlockPlan(function, rows, share, rank, ranks, layout, offsets, block_size)
