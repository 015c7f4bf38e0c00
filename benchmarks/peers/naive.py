"""MoBA with a mask: the shortest way to say it, and what it costs. Every query is scored against every key, and all but
the selected blocks are then struck out, so time and memory grow with the square of the length."""

import torch


def select_blocks(q, k, block_size, top_k):
    """Which blocks each query attends to, [tokens, blocks] of bool. q and k are [tokens, head_dim], of one head."""
    tokens = q.shape[0]
    blocks = -(-tokens // block_size)
    own = torch.arange(tokens) // block_size
    whole = tokens // block_size
    means = k[: whole * block_size].float().unflatten(0, (whole, block_size)).mean(1).to(k.dtype)
    scores = q.new_full((tokens, blocks), -torch.inf, dtype=torch.float32)
    scores[:, :whole] = q.float() @ means.float().T
    scores[torch.arange(blocks) >= own[:, None]] = -torch.inf
    scores[torch.arange(tokens), own] = torch.inf  # one's own block counts among top_k
    # Of equal scores the more recent block is taken: a stable sort of the reversed columns puts it first.
    order = scores.flip(1).sort(dim=1, descending=True, stable=True)
    best = blocks - 1 - order.indices[:, :top_k]
    selected = torch.zeros(tokens, blocks, dtype=torch.bool)
    return selected.scatter_(1, best, order.values[:, :top_k] > -torch.inf)


def attention(q, k, v, block_size, top_k):
    """Attention of one head, [tokens, head_dim] each, over each query's own block and its best top_k - 1 before it."""
    tokens, head_dim = q.shape
    mask = (
        select_blocks(q, k, block_size, top_k).repeat_interleave(block_size, 1)[:, :tokens].tril_()
    )
    scores = (q @ k.T).mul_(head_dim**-0.5)
    return scores.masked_fill_(~mask, -torch.inf).softmax(1) @ v
