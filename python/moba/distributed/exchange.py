"""Collectives of packed rows within a group of ranks, and the bytes that they move."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh
# torch 2.13 renamed the first.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks and received from them, and the collectives that it took part in."""

    sent: int = 0
    received: int = 0
    collectives: int = 0


_counters: tuple[Traffic, ...] = ()


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes that `moba.distributed` moves within the context, forward and backward passes alike. An all-gather of
    n bytes from each of R ranks counts as (R - 1) n sent and received."""
    global _counters
    traffic = Traffic()
    before, _counters = _counters, (*_counters, traffic)
    try:
        yield traffic
    finally:
        _counters = before


def _count(sent: int, received: int) -> None:
    for counter in _counters:
        counter.sent += sent
        counter.received += received
        counter.collectives += 1


def process_group(function: str, group: Group) -> dist.ProcessGroup:
    """Return the process group of a group or of a mesh with one dimension."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{function}: group: expected a mesh with one dimension, got {group.ndim}; mesh[name] is one"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{function}: group: expected a ProcessGroup or a DeviceMesh, got {type(group).__name__}"
        )
    return group


@contextmanager
def _named_failure() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "moba.distributed: group: expected every rank to answer within the group's timeout, got "
            + str(error).strip().splitlines()[0]
        ) from error


def all_gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensors of all ranks, of equal sizes: [ranks, *t.shape]."""
    ranks = group.size()
    gathered = t.new_empty(ranks, *t.shape)
    with _named_failure():
        _all_gather(
            gathered.view(-1).view(torch.uint8), t.contiguous().view(-1).view(torch.uint8), group
        )
    moved = (ranks - 1) * t.nbytes
    _count(moved, moved)
    return gathered


def exchange(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `sent[r]` rows to each rank r, in rank order, and return the `received[r]` rows from each."""
    result = rows.new_empty(sum(received), *rows.shape[1:])
    row_bytes = rows[:1].nbytes if len(rows) else result[:1].nbytes
    with _named_failure():
        dist.all_to_all_single(
            result.view(-1).view(torch.uint8),
            rows.contiguous().view(-1).view(torch.uint8),
            [row_bytes * count for count in received],
            [row_bytes * count for count in sent],
            group,
        )
    here = group.rank()
    _count(row_bytes * (sum(sent) - sent[here]), row_bytes * (sum(received) - received[here]))
    return result


def pack(*columns: tuple[Tensor, Any]) -> Tensor:
    """Pack rows `t[index]` [rows, size] of tensors of any dtypes to bytes [rows, bytes], one column after the other."""
    widths = [t.shape[-1] * t.element_size() for t, _ in columns]
    packed = None
    begin = 0
    for (t, index), width in zip(columns, widths):
        rows = t[index].contiguous()
        if packed is None:
            packed = rows.new_empty(len(rows), sum(widths), dtype=torch.uint8)
        packed[:, begin : begin + width] = rows.view(torch.uint8)
        begin += width
    return packed


def unpack(rows: Tensor, *columns: tuple[torch.dtype, int]) -> list[Tensor]:
    """Unpack bytes [rows, bytes] to tensors [rows, size] of the dtypes and sizes given."""
    widths = [size * dtype.itemsize for dtype, size in columns]
    results = []
    for part, (dtype, size) in zip(rows.split(widths, dim=1), columns):
        results.append(rows.new_empty(len(rows), size, dtype=dtype))
        results[-1].view(torch.uint8).copy_(part)
    return results
