"""Batches of sequences without copies: padding becomes sequences without keys or without queries, and packed documents
become rows of a batch."""

import torch
from torch import Tensor


def spans_of_mask(mask: Tensor, queries: int, offset: int | Tensor = 0) -> Tensor:
    """Find the tokens of each row: int32 [B, 4] of q_begin, q_end, k_begin, k_end.

    `mask` [B, Sk] is true at tokens and false at padding, which may be to the left, to the right, or both. The queries
    are columns [offset, offset + queries) of it; later columns are ignored. Raises ValueError, or RuntimeError
    from within a compiled graph, when padding lies between tokens.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    mask = mask.bool() & (columns < offset + queries)
    count = mask.sum(-1)
    begin = mask.to(torch.uint8).argmax(-1)
    end = begin + count
    together = (mask == ((columns >= begin[:, None]) & (columns < end[:, None]))).all()
    if torch.compiler.is_compiling():
        torch._assert_async(
            together,
            "attention: padding_mask: expected each row's tokens together, got padding between tokens",
        )
    elif not together:
        raise ValueError(
            "attention: padding_mask: expected each row's tokens together, got padding between tokens"
        )
    spans = [(begin - offset).clamp(0, queries), (end - offset).clamp(0, queries), begin, end]
    return torch.stack(spans, dim=-1).to(torch.int32)


def whole_spans(batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the spans of a batch without padding."""
    spans = torch.tensor([[0, queries, 0, keys]], dtype=torch.int32)
    return spans.to(device, non_blocking=True).expand(batch, 4)


def spans_of_documents(lengths: Tensor) -> Tensor:
    """Return the spans of packed documents, one row each, of int32 `lengths` [documents]."""
    nothing = torch.zeros_like(lengths)
    return torch.stack([nothing, lengths, nothing, lengths], dim=-1)


def cu_seqlens_of(
    spans: Tensor, queries: int | Tensor, keys: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the offsets of packed tokens: each row becomes its sequence, and padding around it sequences of queries
    without keys and of keys without queries. `queries` and `keys`: tokens of every row, or of each, [B]."""
    q_begin, q_end, k_begin, k_end = spans.unbind(-1)
    nothing = torch.zeros_like(q_begin)
    q_lengths = torch.stack([q_begin, nothing, q_end - q_begin, queries - q_end, nothing], dim=-1)
    k_lengths = torch.stack([nothing, k_begin, k_end - k_begin, nothing, keys - k_end], dim=-1)
    return _offsets(q_lengths), _offsets(k_lengths)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.flatten().cumsum(0, dtype=torch.int32), (1, 0))


def split_tail(spans: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """Split each row before its last `tail` queries into a sparse part and a tail with full attention."""
    q_begin, q_end, k_begin, k_end = spans.unbind(-1)
    cut = torch.minimum(q_end - q_begin, torch.full_like(q_end, tail))
    return (
        torch.stack([q_begin, q_end - cut, k_begin, k_end - cut], dim=-1),
        torch.stack([q_end - cut, q_end, k_begin, k_end], dim=-1),
    )
