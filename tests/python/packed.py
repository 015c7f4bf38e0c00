"""Packed batches for the tests, and dense attention in float64 given a selection."""

import torch


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def batch(
    lengths, q_heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, seed=0, key_lengths=None
):
    """Return q, k, v and the two cu_seqlens of sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    key_lengths = lengths if key_lengths is None else key_lengths
    shapes = ((sum(lengths), q_heads), (sum(key_lengths), kv_heads), (sum(key_lengths), kv_heads))
    tensors = [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]
    return *tensors, offsets(lengths), offsets(key_lengths)


def seen_keys(selection, position, keys, block_size):
    """Return the mask of the keys of the selected blocks [H, L, W] up to each query's position, bool [H, L, keys]."""
    block = torch.arange(keys) // block_size
    selected = (selection[..., None, :] == block[:, None]).any(-1)
    return selected & (torch.arange(keys) <= position[:, None])


def dense_given(q, k, v, selection, rows, cu_q, cu_k, block_size):
    """Return causal attention in float64 of these packed rows of q over the selected blocks: out [rows, H, D],
    differentiable, and lse [H, rows]."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    outs, lses = [], []
    for q0, q1, k0, k1 in zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist()):
        here = rows[(rows >= q0) & (rows < q1)]
        mask = seen_keys(selection[:, here], here - q1 + (k1 - k0), k1 - k0, block_size)
        logits = torch.einsum("qhd,khd->hqk", q[here], k[k0:k1]) * q.shape[2] ** -0.5
        logits = logits.masked_fill(~mask, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1).nan_to_num(0.0), v[k0:k1]))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def cached(dtype, batch_size=3, tokens=60, heads=4, kv_heads=2, head_dim=64, block_size=8):
    """Return q, k, v, means, begin and end for decode: sequences at any offset in their rows, means in their dtype, NaN where
    there is no block."""
    q = torch.randn(batch_size, heads, head_dim).to(dtype)
    keys, values = torch.randn(2, batch_size, tokens, kv_heads, head_dim).to(dtype)
    begin = torch.arange(batch_size, dtype=torch.int32) * 5 % 11
    end = tokens - torch.arange(batch_size, dtype=torch.int32) * 7
    means = torch.full(
        (batch_size, tokens // block_size, kv_heads, head_dim), torch.nan, dtype=dtype
    )
    for row in range(batch_size):
        blocks = keys[row, begin[row] : end[row]]
        blocks = blocks[: blocks.shape[0] // block_size * block_size].unflatten(0, (-1, block_size))
        means[row, : blocks.shape[0]] = blocks.mean(1, dtype=torch.float32).to(dtype)
    return q, keys, values, means, begin, end
