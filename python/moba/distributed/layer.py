"""A model's attention layer whose tokens are shared out among ranks, for `register_moba`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..config import MoBAConfig
from ..functional import EVERYTHING, check_tensors
from ..modes import records_of
from ..wrapper import documents_of_mask, is_full, of_layer, refuse
from .arguments import STRATEGIES
from .context_parallel import ContextParallel, context_parallel_attention
from .exchange import all_gather, process_group
from .plan import check_layout
from .shards import in_order


def settings_of(value: Any) -> ContextParallel:
    """Return the settings that a group, a mesh or settings stand for. Raises TypeError or ValueError for other values."""
    settings = value if isinstance(value, ContextParallel) else ContextParallel(value)
    process_group("register_moba: context_parallel", settings.group)
    check_layout("register_moba: context_parallel", settings.layout)
    if settings.strategy not in STRATEGIES:
        raise ValueError(
            f"register_moba: context_parallel: strategy: expected one of {', '.join(STRATEGIES)}, got {settings.strategy!r}"
        )
    return settings


def context_parallel_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> None:
    """Refuse what a share of a row cannot do: padding, a cache, and other patterns than causal attention within documents."""
    from transformers.masking_utils import causal_mask_function

    if q_length != kv_length:
        raise NotImplementedError(
            f"moba_mask: past_key_values: expected no cache with context_parallel, got {kv_length - q_length} tokens in it"
        )
    if attention_mask is not None and not attention_mask.all():
        raise NotImplementedError(
            "moba_mask: attention_mask: expected no padding with context_parallel (shard_batch drops it on the right), got padding"
        )
    if mask_function is not None and mask_function is not causal_mask_function:
        documents_of_mask(mask_function, batch_size, q_length, device)


def context_parallel_layer(
    settings: ContextParallel,
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
) -> tuple[Tensor, None]:
    """Compute one layer's attention of this rank's tokens: `query` [B, Hq, S, D], `key` and `value` [B, Hkv, S, D]. Returns
    [B, S, Hq, D]. Documents begin where the positions of all ranks, in order, do not rise by one, or at `cu_seq_lens_q`, offsets
    in the whole batch."""
    check_tensors("moba_layer", query, key, value, "[batch, heads, tokens, head_dim]")
    refuse(module, dropout, is_causal, options)
    if naive or options.get("output_attentions"):
        raise NotImplementedError(
            'moba_layer: context_parallel: expected attn_implementation "moba" without output_attentions, got moba_naive or '
            "output_attentions"
        )
    config = of_layer(config, module)
    batch, _, share, _ = query.shape
    full = is_full(
        config, module, queries=share * process_group("moba_layer", settings.group).size()
    )
    if config.full_tail and not full:
        raise NotImplementedError(
            f"moba_layer: full_tail: expected 0 with context_parallel, got {config.full_tail}"
        )
    records = [] if full else records_of(module)
    results = context_parallel_attention(
        *(t.transpose(1, 2) for t in (query, key, value)),
        settings.group,
        config.moba_chunk_size,
        EVERYTHING if full else config.moba_topk,
        sink_blocks=0 if full else config.sink_blocks,
        scale=scaling,
        cu_seqlens=_sequences(options, batch, share, settings),
        layout=settings.layout,
        strategy=settings.strategy,
        return_selection=bool(records),
    )
    if not records:
        return results, None
    out, selection = results
    for record in records:
        record.add(module.layer_idx, selection)
    return out, None


def _sequences(
    options: dict[str, Any], batch: int, share: int, settings: ContextParallel
) -> Tensor:
    """Return the offsets of the sequences of the whole batch, int32."""
    if options.get("cu_seq_lens_q") is not None:
        return options["cu_seq_lens_q"].to(torch.int32)
    positions = options.get("position_ids")
    if positions is None:
        raise ValueError(
            "moba_layer: position_ids: expected the positions of this rank's tokens (shard_batch), got None"
        )
    group = process_group("moba_layer", settings.group)
    shares = all_gather(positions.to(torch.int32).expand(batch, share), group)
    if len(shares) > 1 and (shares == torch.arange(share, device=shares.device)).all():
        raise ValueError(
            "moba_layer: position_ids: expected positions in the whole row (shard_batch), got 0 to "
            f"{share - 1} on every rank; cu_seq_lens_q describes documents that are as long as a share"
        )
    whole = in_order(shares, 1, settings.layout)
    begins = torch.ones_like(whole, dtype=torch.bool)
    begins[:, 1:] = whole.diff(dim=1) != 1
    starts = begins.flatten().nonzero()[:, 0]
    return torch.nn.functional.pad(starts, (0, 1), value=whole.numel()).to(torch.int32)
