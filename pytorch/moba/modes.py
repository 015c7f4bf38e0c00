"""What a step may override or record, without touching a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_mode: ContextVar[str | None] = ContextVar("moba_mode", default=None)
_records: ContextVar[tuple["Routing", ...]] = ContextVar("moba_records", default=())


def current_mode() -> str | None:
    return _mode.get()


@contextmanager
def mode(name: str) -> Iterator[None]:
    """Within it every layer attends fully ("full") or sparsely ("moba"), whatever its configuration says of its layer
    or of decoding. Gradient checkpointing computes the forward again in backward, which then belongs inside too."""
    if name not in ("full", "moba"):
        raise ValueError(f'mode: name is {name!r}; "full" or "moba" is expected')
    token = _mode.set(name)
    try:
        yield
    finally:
        _mode.reset(token)


class Routing:
    """What layers selected: `record[layer]` is a list with one tensor for each call of that layer, int32 [B, Hq, S, width]
    of block numbers, ascending, counted from the row's first token, padded with -1. Full attention selects nothing, and a
    full tail's rows are all -1."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = set(model.modules())
        self._selections: dict[int, list[Tensor]] = {}

    def __getitem__(self, layer: int) -> list[Tensor]:
        return self._selections[layer]

    def __len__(self) -> int:
        return len(self._selections)

    def layers(self) -> list[int]:
        """Layers that have selected something, ascending."""
        return sorted(self._selections)

    def wants(self, module: torch.nn.Module) -> bool:
        return module in self._modules

    def add(self, layer: int, selection: Tensor) -> None:
        self._selections.setdefault(layer, []).append(selection)


@contextmanager
def routing(model: torch.nn.Module) -> Iterator[Routing]:
    """Records which blocks each sparse layer and head of `model` selects: `with moba.routing(model) as record: ...`."""
    record = Routing(model)
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)


def records_of(module: torch.nn.Module) -> list[Routing]:
    return [record for record in _records.get() if record.wants(module)]
