"""Shares of a batch: the tokens of each rank, their positions and their labels."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .exchange import Group, all_gather, process_group
from .plan import check_layout, chunks_of

IGNORED = -100  # a label that counts nowhere, as in torch's cross_entropy


def shard(t: Tensor, group: Group, dim: int = 1, layout: str = "contiguous") -> Tensor:
    """Return this rank's share of the tokens of `t`, which lie along `dim` and are the same on every rank. Raises ValueError
    unless the shares are even."""
    return _shard("shard", t, group, dim, layout)


def _shard(function: str, t: Tensor, group: Group, dim: int, layout: str) -> Tensor:
    check_layout(function, layout)
    ranks = process_group(function, group)
    mine = chunks_of(ranks.rank(), ranks.size(), layout)
    chunks = ranks.size() * len(mine)
    if t.shape[dim] == 0 or t.shape[dim] % chunks:
        raise ValueError(
            f"{function}: t: expected a number of tokens that {chunks} ({layout}, {ranks.size()} ranks) divides, got {t.shape[dim]}"
        )
    parts = t.chunk(chunks, dim)
    return torch.cat([parts[chunk] for chunk in mine], dim)


def unshard(t: Tensor, group: Group, dim: int = 1, layout: str = "contiguous") -> Tensor:
    """Return the tokens of all ranks, of the shares `t` along `dim`: the inverse of `shard`, without a gradient."""
    check_layout("unshard", layout)
    return in_order(all_gather(t.detach(), process_group("unshard", group)), dim, layout)


def in_order(shares: Tensor, dim: int, layout: str) -> Tensor:
    """Return the tokens of the shares [ranks, ...] of all ranks, which lie along `dim` of each, in order."""
    ranks = shares.shape[0]
    order = [chunk for rank in range(ranks) for chunk in chunks_of(rank, ranks, layout)]
    chunks = [chunk for share in shares for chunk in share.chunk(len(order) // ranks, dim)]
    return torch.cat([chunks[order.index(i)] for i in range(len(order))], dim)


def shard_batch(
    batch: Mapping[str, Tensor], group: Group, layout: str = "contiguous"
) -> dict[str, Tensor]:
    """Return this rank's share of a batch of a causal language model, as keyword arguments of a model of `transformers`.

    `batch`, the same on every rank, has `input_ids` [B, tokens] and may have `labels` (not shifted, -100 where they do not
    count), `position_ids` (that begin again with each packed document; by default a row is one document) and
    `attention_mask` (padding on the right only, which causal attention does not see). Returns `input_ids`, `position_ids` in the whole row
    and, with labels, `labels`, `shift_labels`, of which each is the next token's, and `num_items_in_batch`, which makes the mean
    over ranks of the model's loss the mean over the tokens of the batch. Raises ValueError unless the shares are even.
    """
    function = "shard_batch"
    known = ("input_ids", "labels", "position_ids", "attention_mask")
    for name in batch:
        if name not in known:
            raise ValueError(f"{function}: batch: expected {', '.join(known)}, got {name}")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or (mask.diff(dim=-1) > 0).any()):
        raise ValueError(
            f"{function}: attention_mask: expected [batch, tokens] with padding on the right only, got another mask"
        )
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    whole = {"input_ids": ids, "position_ids": positions.expand_as(ids)}
    labels = batch.get("labels")
    if labels is not None:
        whole["labels"] = labels
        whole["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    shares = {name: _shard(function, t, group, 1, layout) for name, t in whole.items()}
    if labels is not None:
        counted = (whole["shift_labels"] != IGNORED).sum()
        shares["num_items_in_batch"] = counted / process_group(function, group).size()
    return shares
