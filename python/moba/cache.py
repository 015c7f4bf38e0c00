"""A cache of keys and values for `transformers` that also keeps the mean of every block, for sparse decoding."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ._operator import means_dtype

_GROWTH = 1.5
_MIN_CAPACITY = 256
_MAX_STEP = 4096  # tokens: at most this much capacity beyond the tokens held


class MobaLayer(DynamicLayer):
    """One layer's keys and values, [B, capacity, Hkv, D], in memory that grows by a half and at most 4096 tokens ahead of them,
    so that a new token is written once and the others are rarely copied. `keys` and `values` are views [B, Hkv, tokens, D]. The
    key view that `update` returns refers to its layer as `moba_layer`, which holds the means of the blocks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._forget()

    def _forget(self) -> None:
        self._stored: list[Tensor] = []
        self._means = torch.empty(0)
        self._complete: list[int] = []
        self._begins: list[int] = []
        self._block_size = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        length = held + key_states.shape[2]
        if not self._stored or self._stored[0].shape[1] < length:
            capacity = max(length, _MIN_CAPACITY, min(int(held * _GROWTH), held + _MAX_STEP))
            self._stored = [
                self._grown(i, t, held, capacity) for i, t in enumerate((key_states, value_states))
            ]
        for stored, new in zip(self._stored, (key_states, value_states)):
            stored[:, held:length] = new.transpose(1, 2)
        keys, values = self._view(length)
        # The layer keeps no tensor that refers to the layer: no reference cycle.
        keys = keys.view_as(keys)
        keys.moba_layer = self  # type: ignore[attr-defined]
        return keys, values

    def _grown(self, index: int, new: Tensor, held: int, capacity: int) -> Tensor:
        batch, heads, _, head_dim = new.shape
        grown = new.new_empty(batch, capacity, heads, head_dim)
        if held:
            grown[:, :held] = self._stored[index][:, :held]
        return grown

    def _view(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (stored[:, :length].transpose(1, 2) for stored in self._stored)
        self.keys, self.values = keys, values
        return keys, values

    def means(self, begins: list[int], block_size: int) -> Tensor:
        """Return the mean keys of the complete blocks, as `ops.decode` takes them: [B, blocks, Hkv, D], those of row b counted
        from token `begins[b]`. Each is computed once, when its block is complete."""
        if block_size != self._block_size or begins != self._begins:
            self._block_size, self._begins, self._complete = block_size, begins, [0] * len(begins)
        keys = self._stored[0]
        batch, capacity, heads, head_dim = keys.shape
        if self._means.shape[:2] != (batch, capacity // block_size):
            means = keys.new_empty(
                batch, capacity // block_size, heads, head_dim, dtype=means_dtype(keys)
            )
            kept = min(max(self._complete), means.shape[1])
            if kept:
                means[:, :kept] = self._means[:, :kept]
            self._means = means
        length = self.get_seq_length()
        for row, begin in enumerate(begins):
            first, last = self._complete[row], (length - begin) // block_size
            if first < last:
                blocks = keys[row, begin + first * block_size : begin + last * block_size]
                mean = blocks.unflatten(0, (last - first, block_size)).mean(1, dtype=torch.float32)
                self._means[row, first:last] = mean.to(keys.dtype)
                self._complete[row] = last
        return self._means

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self._complete = [
            min(done, max(length - begin, 0) // self._block_size)
            for done, begin in zip(self._complete, self._begins)
        ]

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _take(self, rows: Tensor) -> None:
        if length := self.get_seq_length():
            self._stored = [stored.index_select(0, rows) for stored in self._stored]
            if self._begins:
                self._means = self._means.index_select(0, rows)
                self._complete = [self._complete[row] for row in rows.tolist()]
                self._begins = [self._begins[row] for row in rows.tolist()]
            self._view(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._stored:
            self._take(self._rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._stored:
            self._take(self._rows()[indices])

    def _rows(self) -> Tensor:
        return torch.arange(self._stored[0].shape[0], device=self._stored[0].device)


class MobaCache(Cache):
    """KV cache for `past_key_values` with the means of all blocks: decoding with `MoBAConfig(decode="moba")` reads the means,
    and keys and values of the selected blocks alone. Works with any attention implementation and with beam search."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=MobaLayer)
