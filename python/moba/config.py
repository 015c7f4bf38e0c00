"""Routing of a model's attention layers, as plain data."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
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

    `moba_chunk_size`, `moba_topk` and `sink_blocks` are numbers, or lists with one for each layer, full layers included.
    Raises TypeError or ValueError naming the field.
    """

    moba_chunk_size: int | tuple[int, ...]
    moba_topk: int | tuple[int, ...]
    full_layers: tuple[int, ...] = ()
    full_tail: int = 0
    sink_blocks: int | tuple[int, ...] = 0
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
            if name in _BY_LAYER and isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))
                for layer, of_layer in enumerate(value):
                    _check_number(f"{name}[{layer}]", of_layer, low)
            else:
                _check_number(name, value, low)
        lists = self._lists
        first = next(iter(lists), "")
        layers = len(lists.get(first, (0,)))
        for name, value in lists.items():
            if len(value) != layers:
                raise ValueError(
                    f"MoBAConfig: {name}: expected {layers} layers (as {first}), got {len(value)}"
                )
        for layer in range(layers):
            top_k, sinks = self._at("moba_topk", layer), self._at("sink_blocks", layer)
            if sinks >= top_k:
                place = f" in layer {layer}" if lists else ""
                raise ValueError(
                    f"MoBAConfig: sink_blocks: expected 0 to {top_k - 1} for moba_topk {top_k}{place}, got {sinks}"
                )
        for layer in self.full_layers:
            if not isinstance(layer, int) or isinstance(layer, bool):
                raise TypeError(f"MoBAConfig: full_layers: expected layer numbers, got {layer!r}")
        if self.decode not in ("full", "moba"):
            raise ValueError(f'MoBAConfig: decode: expected "full" or "moba", got {self.decode!r}')

    @property
    def _lists(self) -> dict[str, tuple[int, ...]]:
        """The fields that are lists."""
        values = {name: getattr(self, name) for name in _BY_LAYER}
        return {name: value for name, value in values.items() if isinstance(value, tuple)}

    @property
    def is_by_layer(self) -> bool:
        """Whether a field is a list with one number for each layer."""
        return bool(self._lists)

    def is_full_layer(self, layer: int, layers: int) -> bool:
        """Return whether a layer of `layers` is one of `full_layers`."""
        return layer in self.full_layers or layer - layers in self.full_layers

    def _at(self, name: str, layer: int) -> int:
        value = getattr(self, name)
        return value[layer] if isinstance(value, tuple) else value

    def of_layer(self, layer: int, layers: int) -> "MoBAConfig":
        """Return the configuration of one layer of `layers`, whose fields are numbers. Raises ValueError for lists of another
        length."""
        lists = self._lists
        for name, value in lists.items():
            if len(value) != layers:
                raise ValueError(f"moba_layer: {name}: expected {layers} layers, got {len(value)}")
        return (
            replace(self, **{name: value[layer] for name, value in lists.items()})
            if lists
            else self
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "MoBAConfig":
        """Read the calibration that `moba calibrate` wrote (model.moba.json). A file for a model of another number of layers is
        refused by the first layer that runs; the weights are not compared. Raises ValueError for a file that is damaged, of a
        newer version, or with a trained gate."""
        try:
            document = json.loads(Path(path).read_text())
        except ValueError:
            raise ValueError(f"from_file: {path}: expected JSON, got something else") from None
        try:
            return cls(**_fields_of(document))
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"from_file: {path}: expected a calibration, got an invalid {error}"
            ) from None
        except ValueError as error:
            raise ValueError(f"from_file: {path}: {error}") from None


_BY_LAYER = ("moba_chunk_size", "moba_topk", "sink_blocks")


def _check_number(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"MoBAConfig: {name}: expected an int, got {value!r}")
    if value < low:
        raise ValueError(f"MoBAConfig: {name}: expected at least {low}, got {value}")


def _fields_of(document: Any) -> dict[str, Any]:
    """Return the fields of MoBAConfig in a calibration. Full layers get the blocks of the first sparse one."""
    if not isinstance(document, dict) or document.get("format") != "moba calibration":
        raise ValueError('format: expected "moba calibration", got another file')
    if document["version"] != 1:
        raise ValueError(f"version: expected 1, got {document['version']!r}")
    if document.get("gate") is not None:
        raise ValueError("gate: expected none (trained gates run in the program), got one")
    layers = document["layers"]
    for number, layer in enumerate(layers):
        if layer["attention"] not in ("full", "moba"):
            raise ValueError(
                f"layers[{number}].attention: expected full or moba, got {layer['attention']!r}"
            )
    sparse = [layer for layer in layers if layer["attention"] == "moba"]
    default = sparse[0] if sparse else {"block_size": 256, "top_k": 1, "sink": 0}
    blocks = [layer if layer["attention"] == "moba" else default for layer in layers]
    return {
        "moba_chunk_size": [layer["block_size"] for layer in blocks],
        "moba_topk": [layer["top_k"] for layer in blocks],
        "sink_blocks": [layer["sink"] for layer in blocks],
        "full_layers": [i for i, layer in enumerate(layers) if layer["attention"] == "full"],
        "full_tail": document["full_tail"],
    }


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
        _, place, wrong = str(error).split(": ", 2)
        field, bracket, layer = place.partition("[")
        raise type(error)(f"{name}.{_IN_MODEL[field]}{bracket}{layer}: {wrong}") from None
