"""MoBA as an attention implementation of `transformers` models."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import ops
from ._operator import means_dtype
from .config import MoBAConfig, config_of
from .functional import EVERYTHING, check_tensors, flatten, varlen
from .moba_naive import naive_varlen, naive_weights
from .modes import current_mode, records_of
from .padding import cu_seqlens_of, spans_of_documents, spans_of_mask, split_tail, whole_spans


def register_moba(
    cfg: MoBAConfig | None = None, name: str = "moba", context_parallel: Any = None
) -> None:
    """Register attention implementations of `transformers`, with their masks: "moba" and "moba_naive", for
    `from_pretrained(..., attn_implementation="moba")`, or another `name`, such as "moba-16x3", and that followed by "_naive".

    A model with "moba" has the configuration in its `model.config`, the attributes that `moba train` writes:
    `moba_chunk_size`, `moba_topk` and, with MoBAConfig's defaults, `moba_sink`, `moba_full_tail`, `moba_full_layers` and
    `moba_decode`. Without the first two it has `cfg`, the default of all such models; None is no default. A model with
    another name has the `cfg` of that name. Calling it again replaces `cfg` for existing models, too.

    `context_parallel`: the ranks that share out each row, a process group, a mesh with one dimension, or a
    `moba.distributed.ContextParallel` with layout and strategy. Such a model takes what `moba.distributed.shard_batch` returns,
    has no cache, and no `full_tail`."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    is_default = name == "moba"
    if not (isinstance(cfg, MoBAConfig) or (cfg is None and is_default)):
        raise TypeError(f"register_moba: cfg: expected a MoBAConfig, got {type(cfg).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"register_moba: name: expected a str, got {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            'register_moba: name: expected "moba" followed by letters, digits, ".", "_" or "-", without "_naive", "flash", '
            f'"flex" and "sdpa" (which have a meaning), got {name!r}'
        )
    layer: Callable[..., Any] = moba_layer
    mask: Callable[..., Any] = moba_mask
    if context_parallel is not None:
        from .distributed.layer import context_parallel_layer, context_parallel_mask, settings_of

        layer = partial(context_parallel_layer, settings_of(context_parallel))
        mask = context_parallel_mask
    if is_default:
        layer = partial(_default_layer, layer)
    for suffix, naive in (("", False), ("_naive", True)):
        AttentionInterface.register(name + suffix, partial(layer, cfg, naive))
        AttentionMaskInterface.register(name + suffix, mask)


_NAME = re.compile(r"(?!.*(?:_naive|flash|flex|sdpa))moba[A-Za-z0-9._-]*")


def _default_layer(
    layer: Callable[..., tuple[Tensor, Tensor | None]],
    default: MoBAConfig | None,
    naive: bool,
    module: Module,
    *tensors: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute `layer` with the configuration of the model, or else the default."""
    config = config_of(getattr(module, "config", None)) or default
    if config is None:
        raise ValueError(
            "moba_layer: config: expected moba_chunk_size and moba_topk in model.config, or a default from "
            "register_moba(MoBAConfig(...)), got neither"
        )
    return layer(config, naive, module, *tensors, **options)


def moba_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """Build the mask of `moba_layer`: None without padding and without an unfilled cache; for packed documents the lengths
    of all of them, int32 [documents]; else the spans of the rows' tokens, int32 [B, 1, 1, 4]. Raises NotImplementedError
    for other patterns than causal attention within sequences."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is not None and mask_function is not causal_mask_function:
        if attention_mask is None and q_offset == 0 and q_length == kv_length:
            return documents_of_mask(mask_function, batch_size, q_length, device)
        raise NotImplementedError(_OTHER_MASK)
    if kv_offset != 0:
        raise NotImplementedError(
            f"moba_mask: kv_offset: expected 0 (a full cache), got {kv_offset} (a cache that has dropped its first tokens)"
        )
    in_step = not isinstance(q_offset, Tensor)
    if attention_mask is None:
        if in_step and q_offset + q_length == kv_length:
            return None
        mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        missing = kv_length - attention_mask.shape[1]
        mask = torch.nn.functional.pad(attention_mask.bool()[:, :kv_length], (0, max(missing, 0)))
        if (
            in_step
            and not torch.compiler.is_compiling()
            and q_offset + q_length == kv_length
            and mask.all()
        ):
            return None
    return spans_of_mask(mask, q_length, q_offset)[:, None, None]


_OTHER_MASK = (
    "moba_mask: attention_mask: expected causal attention within each sequence, got another pattern (a sliding window, packed "
    "documents beside padding or in chunks, or a mask of the model's own). When compiling without a cache, pass an "
    "attention_mask: without one, position_ids may stand for packed documents"
)


def documents_of_mask(mask_function: Any, batch: int, tokens: int, device: Any) -> Tensor:
    """Return the lengths of the documents of a mask that is causal within each, int32 [documents], of all rows."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(_OTHER_MASK)
    row = torch.arange(batch, device=device)[:, None]
    token = torch.arange(tokens, device=device)[None]
    begins = ~_evaluate(mask_function, row, token, (token - 1).clamp(min=0))
    begins[:, 0] = True
    lengths = _lengths_between(begins)
    first = torch.where(begins, token, 0).cummax(-1).values
    sees_its_document = _evaluate(mask_function, row, token, first).all()
    sees_another = _evaluate(mask_function, row, token, (first - 1).clamp(min=0)) & (first > 0)
    sees_ahead = _evaluate(mask_function, row, token, (token + 1).clamp(max=tokens - 1))[:, :-1]
    if not sees_its_document or sees_another.any() or sees_ahead.any():
        raise NotImplementedError(_OTHER_MASK)
    return lengths


def _evaluate(mask_function: Any, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    seen = mask_function(row, torch.zeros_like(row), query, key)
    return torch.as_tensor(seen, device=row.device).expand(row.shape[0], query.shape[-1]).clone()


def _lengths_between(begins: Tensor) -> Tensor:
    """Return the lengths of the documents that begin where `begins` [B, tokens] is true, in packed order."""
    starts = begins.flatten().nonzero()[:, 0]
    return starts.diff(append=starts.new_tensor([begins.numel()])).to(torch.int32)


def _documents(
    attention_mask: Tensor | None, options: dict[str, Any], query: Tensor, key: Tensor
) -> Tensor | None:
    """Return the lengths of packed documents, int32 [documents], or None: from the mask, from `cu_seq_lens_q` of
    `transformers`' DataCollatorWithFlattening, or from position_ids of one row that restart."""
    if attention_mask is not None and attention_mask.dim() == 1:
        return attention_mask
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    offsets = options.get("cu_seq_lens_q")
    if offsets is not None:
        other = options.get("cu_seq_lens_k")
        if batch != 1 or queries != keys or attention_mask is not None:
            raise NotImplementedError(
                "moba_layer: cu_seq_lens_q: expected one row of whole packed documents without padding, got "
                f"{batch} rows of {queries} queries and {keys} keys"
                + (" and an attention_mask" if attention_mask is not None else "")
            )
        if other is not None and other is not offsets and other.shape != offsets.shape:
            raise ValueError(
                f"moba_layer: cu_seq_lens_k: expected {list(offsets.shape)} offsets (as cu_seq_lens_q), got {list(other.shape)}"
            )
        return offsets.diff().to(torch.int32)
    positions = options.get("position_ids")
    if positions is None or attention_mask is not None or batch != 1 or queries == 1:
        return None
    return _documents_of_positions(positions, queries, keys)


def _documents_of_positions(positions: Tensor, queries: int, keys: int) -> Tensor | None:
    """Return the lengths of the documents of `positions` [1, queries], which begin where positions do not rise by one; None
    for a single document."""
    if positions.dim() != 2 or positions.shape != (1, queries) or torch.compiler.is_compiling():
        return None
    if positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff() != 1
    lengths = _lengths_between(begins)
    if len(lengths) == 1:
        return None
    if queries != keys:
        raise NotImplementedError(
            f"moba_layer: position_ids: expected positions that rise by one after {keys - queries} tokens in the cache, got packed "
            "documents"
        )
    return lengths


def _spans(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    batch, _, queries, _ = query.shape
    if attention_mask is None:
        return whole_spans(batch, queries, key.shape[2], query.device)
    if attention_mask.dtype != torch.int32 or attention_mask.shape != (batch, 1, 1, 4):
        raise ValueError(
            "moba_layer: attention_mask: expected a padding mask [batch, tokens] (4D masks are not supported), got "
            f"{attention_mask.dtype} {list(attention_mask.shape)}"
        )
    return attention_mask[:, 0, 0]


def refuse(module: Module, dropout: float, is_causal: bool | None, options: dict[str, Any]) -> None:
    """Raise NotImplementedError for a layer that asks for more than causal attention."""
    if dropout:
        raise NotImplementedError(
            f"moba_layer: dropout: expected an attention_dropout of 0, got {dropout}"
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotImplementedError(
            "moba_layer: is_causal: expected a causal layer of a decoder, got one that is not causal"
        )
    for name in ("sliding_window", "softcap", "position_bias", "s_aux", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(
                f"moba_layer: {name}: expected None, got a layer that sets it"
            )


def of_layer(config: MoBAConfig, module: Module) -> MoBAConfig:
    """Return the configuration of a model's attention layer."""
    layers = getattr(getattr(module, "config", None), "num_hidden_layers", 0)
    return config.of_layer(getattr(module, "layer_idx", None) or 0, layers)


def is_full(config: MoBAConfig, module: Module, queries: int) -> bool:
    """Return whether a layer attends fully in a step of `queries` tokens a row."""
    forced = current_mode()
    if forced is not None:
        return forced == "full"
    if queries == 1 and config.decode == "full":
        return True
    layer = getattr(module, "layer_idx", None)
    if layer is None or not config.full_layers:
        return False
    layers = getattr(getattr(module, "config", None), "num_hidden_layers", 0)
    return config.is_full_layer(layer, layers)


def moba_layer(
    config: MoBAConfig,
    naive: bool,
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute one layer's attention: `query` [B, Hq, Sq, D], `key` and `value` [B, Hkv, Sk, D]. Returns [B, Sq, Hq, D] and,
    from the naive implementation with output_attentions, the weights [B, Hq, Sq, Sk]."""
    check_tensors("moba_layer", query, key, value, "[batch, heads, tokens, head_dim]")
    config = of_layer(config, module)
    refuse(module, dropout, is_causal, options)
    weights = bool(options.get("output_attentions"))
    if weights and not naive:
        raise NotImplementedError(
            'moba_layer: output_attentions: expected False, got True; attn_implementation="moba_naive" returns weights'
        )
    queries, rows = query.shape[2], (query.shape[2], key.shape[2])
    documents = _documents(attention_mask, options, query, key)
    if documents is None:
        spans = _spans(attention_mask, query, key)
    else:
        spans, rows, attention_mask = spans_of_documents(documents), (documents, documents), None
    top_k = EVERYTHING if is_full(config, module, queries) else config.moba_topk
    if naive:
        attend = partial(_attend_naive, query, key, value, config, scaling, rows)
    else:
        attend = partial(_attend, module, query, key, value, attention_mask, config, scaling, rows)
    if top_k == EVERYTHING or config.full_tail == 0 or queries == 1:
        parts = [(spans, top_k)]
    else:
        before, tail = split_tail(spans, config.full_tail)
        parts = [(before, top_k), (tail, EVERYTHING)]  # each is 0 where the other attends
    outs = [attend(*part) for part in parts]
    out = outs[0] if len(outs) == 1 else outs[0] + outs[1]
    if not weights:
        return out, None
    return out, sum(_weights_naive(query, key, config, scaling, rows, *part) for part in parts)


def _can_decode(query: Tensor) -> bool:
    """Return whether `ops.decode` has a kernel for such queries."""
    if query.is_cuda:
        return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in (
            64,
            96,
            128,
            256,
        )
    return query.is_cpu


def _packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        flatten(query.transpose(1, 2)),
        flatten(key.transpose(1, 2)),
        flatten(value.transpose(1, 2)),
    )


def _attend(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    config: MoBAConfig,
    scaling: float | None,
    rows: tuple[int | Tensor, int | Tensor],
    spans: Tensor,
    top_k: int,
) -> Tensor:
    batch, _, queries, _ = query.shape
    records = records_of(module) if top_k < EVERYTHING else []
    sinks = config.sink_blocks if top_k < EVERYTHING else 0
    casting = torch.is_autocast_enabled(query.device.type)
    if queries == 1 and _can_decode(query) and not (records or casting or torch.is_grad_enabled()):
        out = _decode(query, key, value, mask, config, scaling, spans, top_k, sinks)
        if out is not None:
            return out
    q, k, v = _packed(query, key, value)
    cu_q, cu_k = cu_seqlens_of(spans, *rows)
    out, _, selection = varlen(
        q,
        k,
        v,
        cu_q,
        cu_k,
        config.moba_chunk_size,
        top_k,
        sinks,
        scale=scaling,
        return_selection=bool(records),
    )
    for record in records:
        record.add(module.layer_idx, selection.unflatten(1, (batch, queries)).transpose(0, 1))
    return out.unflatten(0, (batch, queries))


def _begins(mask: Tensor | None, batch: int) -> list[int]:
    """Read the first token of each row; a device is read once for each mask, which all layers share."""
    if mask is None:
        return [0] * batch
    begins = getattr(mask, "moba_begins", None)
    if begins is None:
        begins = mask.moba_begins = mask[:, 0, 0, 2].tolist()  # type: ignore[attr-defined]
    return begins


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    config: MoBAConfig,
    scaling: float | None,
    spans: Tensor,
    top_k: int,
    sinks: int,
) -> Tensor | None:
    """Decode one token of each row from the cache; None if that needs means of blocks and the cache keeps none."""
    begin, end = spans.unbind(-1)[2:]
    if top_k == EVERYTHING:
        means = query.new_empty(query.shape[0], 0, *key.shape[1::2], dtype=means_dtype(query))
    elif (layer := getattr(key, "moba_layer", None)) is not None:
        means = layer.means(_begins(mask, query.shape[0]), config.moba_chunk_size)
    else:
        return None
    out, _ = ops.decode(
        query.squeeze(2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        means,
        begin,
        end,
        config.moba_chunk_size,
        top_k,
        sinks,
        scaling,
    )
    return out.unsqueeze(1)


def _attend_naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: MoBAConfig,
    scaling: float | None,
    rows: tuple[int | Tensor, int | Tensor],
    spans: Tensor,
    top_k: int,
) -> Tensor:
    batch, _, queries, _ = query.shape
    q, k, v = _packed(query, key, value)
    cu_q, cu_k = cu_seqlens_of(spans, *rows)
    sinks = config.sink_blocks if top_k < EVERYTHING else 0
    out = naive_varlen(q, k, v, cu_q, cu_k, config.moba_chunk_size, top_k, sinks, scaling)
    return out.unflatten(0, (batch, queries))


def _weights_naive(
    query: Tensor,
    key: Tensor,
    config: MoBAConfig,
    scaling: float | None,
    rows: tuple[int | Tensor, int | Tensor],
    spans: Tensor,
    top_k: int,
) -> Tensor:
    """Return the attention weights of `_attend_naive`, [B, Hq, Sq, Sk], in the dtype of `query`."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    q, k, _ = _packed(query, key, key)
    cu_q, cu_k = cu_seqlens_of(spans, *rows)
    sinks = config.sink_blocks if top_k < EVERYTHING else 0
    weights = query.new_zeros(batch, heads, queries, keys)
    found = naive_weights(q, k, cu_q, cu_k, config.moba_chunk_size, top_k, sinks, scaling)
    for of_queries, of_keys, part in found:
        if part.numel() == 0:
            continue
        row = of_queries.start // queries
        q0, k0 = of_queries.start - row * queries, of_keys.start - row * keys
        weights[row, :, q0 : q0 + part.shape[1], k0 : k0 + part.shape[2]] = part.to(weights.dtype)
    return weights
