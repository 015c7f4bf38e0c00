"""The queries of a step of vLLM, cut and joined by the attention that they have."""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..config import MoBAConfig


@dataclass
class Part:
    """Queries [first, last) of a batch that end at token `length` of a request and attend in one way."""

    request: int
    first: int  # query of the batch
    last: int
    length: int
    is_full: bool


@dataclass
class Run:
    """Adjacent parts of a batch that attend in one way, its queries [first, last)."""

    first: int
    last: int
    is_full: bool
    page_table: Tensor  # int32 [parts, pages]
    lengths: Tensor  # int32 [parts]
    cu_seqlens_q: Tensor  # int32 [parts + 1]

    @property
    def decodes(self) -> bool:
        """Whether every part is a single query."""
        return self.last - self.first == len(self.lengths)


def parts_of(
    config: MoBAConfig, starts: list[int], lengths: list[int], prompts: list[int]
) -> list[Part]:
    """Cut the queries of every request, [starts[i], starts[i + 1]) of the batch and the last of `lengths[i]` tokens, where
    their attention changes: a prompt is read with MoBA but for its full tail, tokens after it as config.decode says. The
    position of a token alone decides, however a prompt is cut into chunks or read again."""
    parts = []
    for request, length in enumerate(lengths):
        query, end = starts[request], starts[request + 1]
        position, prompt = length - (end - query), prompts[request]
        tail = max(prompt - config.full_tail, 0)
        for limit, is_full in ((tail, False), (prompt, True), (length, config.decode == "full")):
            last = min(limit, length)
            if last <= position:
                continue
            parts.append(Part(request, query, query + last - position, last, is_full))
            query += last - position
            position = last
    return parts


def runs_of(parts: list[Part], block_table: Tensor) -> list[Run]:
    """Join adjacent parts with the same attention; those of one query, which are decoded, apart from longer ones."""
    groups = [
        list(group)
        for _, group in groupby(parts, lambda part: (part.is_full, part.last - part.first == 1))
    ]
    return [
        Run(
            first=group[0].first,
            last=group[-1].last,
            is_full=group[0].is_full,
            page_table=block_table[[part.request for part in group]],
            lengths=torch.tensor([part.length for part in group], dtype=torch.int32),
            cu_seqlens_q=torch.tensor(
                [part.first - group[0].first for part in group] + [group[-1].last - group[0].first],
                dtype=torch.int32,
            ),
        )
        for group in groups
    ]
