"""MoBA as a mask over dense attention in plain PyTorch: the baseline of tests and benchmarks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .functional import check_varlen


def selection_mask(
    q: Tensor, k: Tensor, block_size: int, top_k: int, sink_blocks: int = 0
) -> Tensor:
    """Compute the mask of the keys that each query sees: bool [H, Lq, Lk], for one sequence `q` [Lq, H, D], `k` [Lk, H, D].

    A query sees its own block up to itself, and of the complete blocks before it the `top_k - 1` whose mean key scores
    highest: sink blocks first, and of equal scores the more recent block.
    """
    queries, keys = q.shape[0], k.shape[0]
    blocks = keys // block_size
    position = torch.arange(keys - queries, keys, device=q.device)
    own = position // block_size
    key = torch.arange(keys, device=q.device)
    selected = torch.zeros(q.shape[1], queries, blocks + 1, dtype=torch.bool, device=q.device)
    if blocks > 0 and top_k > 1:
        means = (
            k[: blocks * block_size]
            .unflatten(0, (blocks, block_size))
            .float()
            .mean(1)
            .to(k.dtype)
            .float()
        )
        scores = torch.einsum("qhd,nhd->hqn", q.float(), means).nan_to_num(
            nan=-torch.inf, posinf=torch.inf
        )
        block = torch.arange(blocks, device=q.device)
        scores[:, :, block < sink_blocks] = torch.inf
        candidate = block < own[:, None]
        order = (
            scores.masked_fill(~candidate, -torch.inf)
            .flip(-1)
            .argsort(dim=-1, descending=True, stable=True)
        )
        best = blocks - 1 - order[..., : top_k - 1]
        selected.scatter_(2, best, True)
        selected[..., :blocks] &= candidate
    selected.scatter_(2, own.clamp(0, blocks).expand(q.shape[1], -1)[..., None], True)
    return selected[..., (key // block_size).clamp(max=blocks)] & (key <= position[:, None])


def naive_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Compute causal MoBA of a packed batch, with a mask of all queries and keys in memory."""
    v = v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    outs = [
        torch.einsum("hqk,khd->qhd", weights, v[keys].float()).to(q.dtype)
        for _, keys, weights in naive_weights(
            q, k, cu_seqlens_q, cu_seqlens_k, block_size, top_k, sink_blocks, scale
        )
    ]
    return torch.cat(outs) if outs else torch.zeros_like(q)


def naive_weights(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    scale: float | None = None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the queries, the keys and the attention weights [Hq, Lq, Lk] (float32) of each sequence."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    q_offsets, k_offsets = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(q_offsets, q_offsets[1:], k_offsets, k_offsets[1:]):
        queries, keys = slice(q0, q1), slice(k0, k1)
        mask = selection_mask(q[queries], k[keys], block_size, top_k, sink_blocks)
        logits = torch.einsum("qhd,khd->hqk", q[queries].float(), k[keys].float()) * scale
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)
        yield queries, keys, weights


def moba_attn_varlen_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    moba_chunk_size: int,
    moba_topk: int,
) -> Tensor:
    """Compute `moba_attn_varlen` in plain PyTorch at quadratic cost; same arguments, result and errors."""
    function = "moba_attn_varlen_naive"
    cu_seqlens = check_varlen(function, q, k, v, cu_seqlens, moba_chunk_size, moba_topk)
    offsets = cu_seqlens.tolist()
    if not offsets or offsets[0] != 0 or offsets[-1] != q.shape[0] or offsets != sorted(offsets):
        raise ValueError(
            f"{function}: cu_seqlens: expected offsets that rise from 0 to {q.shape[0]} (the tokens of q), got {offsets}"
        )
    for name, value in (("moba_chunk_size", moba_chunk_size), ("moba_topk", moba_topk)):
        if value < 1:
            raise ValueError(f"{function}: {name}: expected at least 1, got {value}")
    if (
        k.shape != v.shape
        or k.shape[0] != q.shape[0]
        or k.shape[2] != q.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"{function}: k, v: expected equal sizes that fit q, {list(q.shape)}, got {list(k.shape)} and {list(v.shape)}"
        )
    return naive_varlen(q, k, v, cu_seqlens, cu_seqlens, moba_chunk_size, moba_topk)
