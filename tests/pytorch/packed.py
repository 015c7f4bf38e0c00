"""Packed batches for the tests, and dense attention in float64 given a selection."""

import torch


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def batch(lengths, q_heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, seed=0, key_lengths=None):
    """q, k, v and the two cu_seqlens of sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    key_lengths = lengths if key_lengths is None else key_lengths
    shapes = ((sum(lengths), q_heads), (sum(key_lengths), kv_heads), (sum(key_lengths), kv_heads))
    tensors = [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]
    return *tensors, offsets(lengths), offsets(key_lengths)


def seen_keys(selection, position, keys, block_size):
    """bool [H, L, keys]: the keys of the selected blocks [H, L, W] up to each query's position."""
    block = torch.arange(keys) // block_size
    chosen = (selection[..., None, :] == block[:, None]).any(-1)
    return chosen & (torch.arange(keys) <= position[:, None])


def dense_given(q, k, v, selection, cu_q, cu_k, block_size, scale=None):
    """Attention in float64 over the selected blocks, causal; differentiable."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    pieces = []
    for q0, q1, k0, k1 in zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist()):
        position = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)
        mask = seen_keys(selection[:, q0:q1], position, k1 - k0, block_size)
        logits = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * scale
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v[k0:k1]))
    return torch.cat(pieces)
