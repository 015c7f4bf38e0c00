"""MoBA as dense attention with a mask, the shortest implementation: every query is scored against every key and all but the
selected blocks are masked, so time and memory grow with the square of the length."""

import torch


def select_blocks(q, k, block_size, top_k):
    """Return the blocks that each query attends to, bool [tokens, blocks]; q and k are [tokens, head_dim], of one head."""
    tokens = q.shape[0]
    blocks = -(-tokens // block_size)
    own = torch.arange(tokens) // block_size
    complete = tokens // block_size
    means = (
        k[: complete * block_size].float().unflatten(0, (complete, block_size)).mean(1).to(k.dtype)
    )
    scores = q.new_full((tokens, blocks), -torch.inf, dtype=torch.float32)
    scores[:, :complete] = q.float() @ means.float().T
    scores[torch.arange(blocks) >= own[:, None]] = -torch.inf
    scores[torch.arange(tokens), own] = torch.inf  # the own block counts among top_k
    # A stable sort of the reversed columns puts the more recent of two blocks with equal scores first.
    order = scores.flip(1).sort(dim=1, descending=True, stable=True)
    best = blocks - 1 - order.indices[:, :top_k]
    selected = torch.zeros(tokens, blocks, dtype=torch.bool)
    return selected.scatter_(1, best, order.values[:, :top_k] > -torch.inf)


def attention(q, k, v, block_size, top_k):
    """Return the attention of one head, [tokens, head_dim] each, over each query's own block and the top_k - 1 best before it."""
    tokens, head_dim = q.shape
    mask = (
        select_blocks(q, k, block_size, top_k).repeat_interleave(block_size, 1)[:, :tokens].tril_()
    )
    scores = (q @ k.T).mul_(head_dim**-0.5)
    return scores.masked_fill_(~mask, -torch.inf).softmax(1) @ v
