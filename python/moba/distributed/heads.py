"""Strategy "heads" (DeepSpeed-Ulysses, arXiv 2309.14509): tokens are exchanged for heads, so that each rank attends with some
heads over whole sequences, in one process's order of sums."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import flatten, varlen
from .exchange import exchange
from .plan import chunks_of, owners
from .selection import Routing


class _AllToAll(torch.autograd.Function):
    """Exchange of equal parts `t` [ranks, ...], part r of rank s for part s of rank r; its gradient is the same exchange."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ones = [1] * group.size()
        return exchange(t, ones, ones, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradients[0], ctx.group), None


def _to_heads(t: Tensor, group: dist.ProcessGroup, layout: str) -> Tensor:
    """Exchange [B, S, H, ...] for [B, S * ranks, H / ranks, ...]."""
    ranks = group.size()
    parts = _AllToAll.apply(t.unflatten(2, (ranks, -1)).movedim(2, 0), group)
    chunks = len(chunks_of(0, ranks, layout))
    order = [rank * chunks + i for rank, i in _places(ranks, layout)]
    parts = (
        parts.unflatten(2, (chunks, -1)).transpose(1, 2).flatten(0, 1)
    )  # [chunk of ranks, B, ...]
    return parts[order].transpose(0, 1).flatten(1, 2)


def _to_tokens(t: Tensor, group: dist.ProcessGroup, layout: str) -> Tensor:
    """Exchange [B, S * ranks, H / ranks, ...] for [B, S, H, ...]."""
    ranks = group.size()
    order = [chunk for rank in range(ranks) for chunk in chunks_of(rank, ranks, layout)]
    chunks = t.unflatten(1, (len(order), -1)).transpose(0, 1)[order]
    parts = chunks.unflatten(0, (ranks, -1)).transpose(1, 2).flatten(2, 3)
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)


def _places(ranks: int, layout: str) -> list[tuple[int, int]]:
    """Return the rank of each chunk of a row, and the chunk's place among those of the rank."""
    holders = owners(ranks, layout)
    return [(rank, chunks_of(rank, ranks, layout).index(c)) for c, rank in enumerate(holders)]


def check_heads(function: str, heads: int, kv_heads: int, ranks: int) -> None:
    if heads % ranks:
        raise ValueError(
            f"{function}: q: expected a number of heads that {ranks} ranks divide for strategy heads, got {heads}"
        )
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"{function}: k: expected a number of heads that divides {ranks} ranks, or is divided by it, for strategy heads, "
            f"got {kv_heads}"
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cuts: tuple[int, ...],
    layout: str,
    routing: Routing,
    return_selection: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [B, S, Hq, D], lse [B, Hq, S] and the selection [B, Hq, S, width] of this rank's tokens."""
    copies = max(1, group.size() // k.shape[2])
    if copies > 1:  # ranks that share a kv head get a copy each
        k, v = (t[:, :, :, None].expand(-1, -1, -1, copies, -1).flatten(2, 3) for t in (k, v))
    q, k, v = (_to_heads(t, group, layout) for t in (q, k, v))
    offsets = torch.tensor(cuts, dtype=torch.int32, device=q.device)
    out, lse, selection = varlen(
        flatten(q),
        flatten(k),
        flatten(v),
        offsets,
        offsets,
        routing.block_size,
        routing.top_k,
        routing.sink_blocks,
        scale=routing.scale,
        return_selection=return_selection,
        backend=routing.backend,
    )
    rows = q.shape[:2]
    out = _to_tokens(out.unflatten(0, rows), group, layout)
    lse = _to_tokens(lse.T.unflatten(0, rows), group, layout).transpose(1, 2)
    if return_selection:
        selection = _to_tokens(selection.transpose(0, 1).unflatten(0, rows), group, layout)
        selection = selection.transpose(1, 2)
    return out, lse, selection
