"""Overrides and records of a step that leave the model untouched."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# State of the process, not of a thread: backward may recompute a checkpointed forward pass on another thread.
_mode: str | None = None
_records: tuple["Routing", ...] = ()


def current_mode() -> str | None:
    return _mode


@contextmanager
def mode(name: str) -> Iterator[None]:
    """Make every layer attend fully ("full") or sparsely ("moba"), overriding its configuration and the decode setting.
    Gradient checkpointing recomputes the forward pass in backward, so the backward pass belongs inside, too."""
    if name not in ("full", "moba"):
        raise ValueError(f'mode: name: expected "full" or "moba", got {name!r}')
    global _mode
    before, _mode = _mode, name
    try:
        yield
    finally:
        _mode = before


class Routing:
    """Selections of layers: `record[layer]` is a list with one tensor for each call of that layer, int32 [B, Hq, S, width]
    of block numbers, ascending, counted from the row's first token, padded with -1. Full attention selects nothing, and a
    full tail's rows are all -1."""

    def __init__(self, model: torch.nn.Module) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"routing: model: expected a torch.nn.Module, got {type(model).__name__}"
            )
        self._modules = set(model.modules())
        self._selections: dict[int, list[Tensor]] = {}

    def __getitem__(self, layer: int) -> list[Tensor]:
        return self._selections[layer]

    def __len__(self) -> int:
        return len(self._selections)

    def layers(self) -> list[int]:
        """Return the layers that have a selection, ascending."""
        return sorted(self._selections)

    def covers(self, module: torch.nn.Module) -> bool:
        return module in self._modules

    def add(self, layer: int, selection: Tensor) -> None:
        self._selections.setdefault(layer, []).append(selection)


@contextmanager
def routing(model: torch.nn.Module) -> Iterator[Routing]:
    """Record the blocks that each sparse layer and head of `model` selects: `with moba.routing(model) as record: ...`."""
    global _records
    record = Routing(model)
    before, _records = _records, (*_records, record)
    try:
        yield record
    finally:
        _records = before


def records_of(module: torch.nn.Module) -> list[Routing]:
    return [record for record in _records if record.covers(module)]
