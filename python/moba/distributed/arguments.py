"""Checks of the arguments of `context_parallel_attention`, here and against those of the other ranks."""

import struct
import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import check_int, check_tensors
from .exchange import all_gather
from .heads import check_heads
from .plan import LAYOUTS, check_layout
from .selection import Routing

FUNCTION = "context_parallel_attention"
STRATEGIES = ("auto", "fetch", "queries", "heads")


def cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the tensors and convert them as autocast does for attention."""
    check_tensors(FUNCTION, q, k, v, "[batch, tokens, heads, head_dim]")
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return q, k, v


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int | None,
    top_k: int | None,
    cu_seqlens: Tensor | None,
    layout: str,
    strategy: str,
    ranks: int,
) -> tuple[int, ...]:
    """Check the arguments that need no other rank; return the offsets of the sequences."""
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"{FUNCTION}: k: expected the batch and tokens of q, {list(q.shape[:2])}, got {list(k.shape[:2])}"
        )
    if v.shape != k.shape:
        raise ValueError(
            f"{FUNCTION}: v: expected the sizes of k, {list(k.shape)}, got {list(v.shape)}"
        )
    if q.shape[2] % max(k.shape[2], 1) or k.shape[2] == 0:
        raise ValueError(
            f"{FUNCTION}: k: expected a number of heads that divides {q.shape[2]} (the query heads), got {k.shape[2]}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{FUNCTION}: k: expected head_dim {q.shape[3]} (that of q), got {k.shape[3]}"
        )
    if q.numel() == 0:
        raise ValueError(f"{FUNCTION}: q: expected tokens on every rank, got sizes {list(q.shape)}")
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if check_int(FUNCTION, name, value) < 1:
            raise ValueError(f"{FUNCTION}: {name}: expected at least 1, got {value}")
    check_layout(FUNCTION, layout)
    if strategy not in STRATEGIES:
        raise ValueError(
            f"{FUNCTION}: strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )
    if strategy == "heads":
        check_heads(FUNCTION, q.shape[2], k.shape[2], ranks)
    batch, share = q.shape[:2]
    if layout == "zigzag" and share % 2:
        raise ValueError(
            f"{FUNCTION}: q: expected two chunks of equal length for zigzag, got {share} tokens"
        )
    row = share * ranks
    if cu_seqlens is None:
        return tuple(range(0, batch * row + 1, row))
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{FUNCTION}: cu_seqlens: expected an int32 tensor, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens).__name__)}"
        )
    cuts = tuple(cu_seqlens.tolist())
    if not cuts or cuts[0] != 0 or cuts[-1] != batch * row or list(cuts) != sorted(cuts):
        raise ValueError(
            f"{FUNCTION}: cu_seqlens: expected offsets that rise from 0 to {batch * row} (the tokens of all ranks), got "
            f"{_shortened(cuts)}"
        )
    missing = set(range(0, batch * row, row)) - set(cuts)
    if missing:
        raise ValueError(
            f"{FUNCTION}: cu_seqlens: expected a sequence to begin with each row of {row} tokens, got none at {min(missing)}"
        )
    return cuts


def _shortened(values: tuple[int, ...]) -> str:
    return str(list(values)) if len(values) <= 8 else f"{list(values[:8])[:-1]}, ...]"


def check_routing(routing: Routing) -> None:
    sinks = check_int(FUNCTION, "sink_blocks", routing.sink_blocks)
    if not 0 <= sinks < routing.top_k:
        raise ValueError(
            f"{FUNCTION}: sink_blocks: expected 0 to {routing.top_k - 1} for top_k {routing.top_k}, got {sinks}"
        )
    if routing.scale is not None and not isinstance(routing.scale, (int, float)):
        raise TypeError(f"{FUNCTION}: scale: expected a number, got {routing.scale!r}")
    if not isinstance(routing.backend, str):
        raise TypeError(f"{FUNCTION}: backend: expected a str, got {routing.backend!r}")


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def agree(
    q: Tensor,
    k: Tensor,
    cuts: tuple[int, ...],
    routing: Routing | None,
    layout: str,
    strategy: str,
    group: dist.ProcessGroup,
    error: Exception | None,
) -> bool:
    """Raise on every rank if the arguments of one are invalid or differ; return whether a rank needs gradients."""
    names = (
        ("q", "number of rows"),
        ("q", "number of tokens"),
        ("q", "number of heads"),
        ("k", "number of heads"),
        ("q", "head_dim"),
        ("q", "dtype"),
        ("block_size", "value"),
        ("top_k", "value"),
        ("sink_blocks", "value"),
        ("scale", "value"),
        ("cu_seqlens", "offsets (their checksum)"),
        ("layout", "value"),
        ("strategy", "value"),
    )
    mine = [0] * len(names)
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    gradient = False
    if error is None and routing is not None:
        scale = float("nan") if routing.scale is None else float(routing.scale)
        mine = [
            *q.shape[:3],
            *k.shape[2:],
            _DTYPES.index(q.dtype),
            routing.block_size,
            min(routing.top_k, 2**62),
            routing.sink_blocks,
            struct.unpack("<q", struct.pack("<d", scale))[0],
            zlib.crc32(repr(cuts).encode()),
            LAYOUTS.index(layout),
            STRATEGIES.index(strategy),
        ]
        gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    header = torch.tensor([int(error is not None), int(gradient), *mine], device=device)
    by_rank = all_gather(header, group).tolist()
    if error is not None:
        raise error
    refused = [rank for rank, values in enumerate(by_rank) if values[0]]
    if refused:
        raise ValueError(
            f"{FUNCTION}: group: expected valid arguments on every rank, got invalid ones on rank {refused[0]}, which names them"
        )
    for i, (argument, what) in enumerate(names):
        values = [others[i + 2] for others in by_rank]
        if len(set(values)) > 1:
            decoded = {"dtype": _DTYPES, "layout": LAYOUTS, "strategy": STRATEGIES}.get(
                what if what == "dtype" else argument
            )
            shown = ", ".join(str(decoded[value] if decoded else value) for value in values)
            raise ValueError(
                f"{FUNCTION}: {argument}: expected the same {what} on every rank, got {shown}"
            )
    return any(values[1] for values in by_rank)
