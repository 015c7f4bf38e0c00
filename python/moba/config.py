"""Routing of a model's attention layers, as plain data."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MoBAConfig:
    """The routing of a model's attention layers.

    The first two fields are those of the published package. A query attends to `moba_topk` blocks of `moba_chunk_size` tokens,
    its own block included. The others are for models that were not trained with MoBA, and for hybrids:

    - `full_layers`: layers with full attention; negative numbers count from the last layer.
    - `full_tail`: number of last tokens of every sequence of a prefill that attend fully.
    - `sink_blocks`: the first blocks of a sequence, selected before any other and counted in `moba_topk`.
    - `decode`: attention of a step of a single token, "full" or "moba".

    Raises TypeError or ValueError naming the field.
    """

    moba_chunk_size: int
    moba_topk: int
    full_layers: tuple[int, ...] = ()
    full_tail: int = 0
    sink_blocks: int = 0
    decode: str = "full"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "full_layers", tuple(self.full_layers))
        except TypeError:
            raise TypeError(
                f"MoBAConfig: full_layers: expected layer numbers, got {self.full_layers!r}"
            ) from None
        minimum = {"moba_chunk_size": 1, "moba_topk": 1, "full_tail": 0, "sink_blocks": 0}
        for name, low in minimum.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"MoBAConfig: {name}: expected an int, got {value!r}")
            if value < low:
                raise ValueError(f"MoBAConfig: {name}: expected at least {low}, got {value}")
        if self.sink_blocks >= self.moba_topk:
            raise ValueError(
                f"MoBAConfig: sink_blocks: expected 0 to {self.moba_topk - 1} for moba_topk {self.moba_topk}, "
                f"got {self.sink_blocks}"
            )
        for layer in self.full_layers:
            if not isinstance(layer, int) or isinstance(layer, bool):
                raise TypeError(f"MoBAConfig: full_layers: expected layer numbers, got {layer!r}")
        if self.decode not in ("full", "moba"):
            raise ValueError(f'MoBAConfig: decode: expected "full" or "moba", got {self.decode!r}')


_IN_MODEL = {  # field: attribute of a model's config, as `moba train` writes it to config.json
    "moba_chunk_size": "moba_chunk_size",
    "moba_topk": "moba_topk",
    "full_layers": "moba_full_layers",
    "full_tail": "moba_full_tail",
    "sink_blocks": "moba_sink",
    "decode": "moba_decode",
}


def config_of(model_config: Any, function: str = "moba_layer") -> MoBAConfig | None:
    """Return the configuration in a model's config of `transformers`, or None if it has neither `moba_chunk_size` nor
    `moba_topk`. Raises TypeError or ValueError naming the attribute."""
    attributes = getattr(model_config, "__dict__", {})
    if attributes.get("moba_chunk_size") is None and attributes.get("moba_topk") is None:
        return None
    known = {name: attributes.get(name) for name in _IN_MODEL.values()}
    return config_from(known, f"{function}: config")


def config_from(settings: Any, name: str) -> MoBAConfig:
    """Return the configuration of a mapping with the names of config.json, null where a setting has its default. Raises
    TypeError or ValueError that begins with `name` and names the setting."""
    if not isinstance(settings, dict):
        raise TypeError(f"{name}: expected an object of settings, got {settings!r}")
    for setting in settings:
        if setting not in _IN_MODEL.values():
            raise ValueError(
                f"{name}: expected settings among {', '.join(_IN_MODEL.values())}, got {setting!r}"
            )
    fields: dict[str, Any] = {"moba_chunk_size": None, "moba_topk": None}
    for field, setting in _IN_MODEL.items():
        value = settings.get(setting)
        if value is not None:
            fields[field] = value
    try:
        return MoBAConfig(**fields)
    except (TypeError, ValueError) as error:
        _, field, wrong = str(error).split(": ", 2)
        raise type(error)(f"{name}.{_IN_MODEL[field]}: {wrong}") from None
