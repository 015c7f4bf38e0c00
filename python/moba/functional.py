"""Attention on padded batches [B, S, H, D], and on packed ones under the names of the published package."""

import torch
from torch import Tensor

from . import ops
from .config import MoBAConfig
from .padding import cu_seqlens_of, spans_of_mask

EVERYTHING = 2**63 - 1
"""Value of top_k for dense attention."""


def check_tensors(function: str, q: Tensor, k: Tensor, v: Tensor, dims: str) -> None:
    """Raise TypeError or ValueError unless q, k and v are tensors of shape `dims`, of one floating dtype and device."""
    rank = dims.count(",") + 1
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{function}: {name}: expected a tensor {dims}, got {type(t).__name__}")
        if t.dim() != rank:
            raise ValueError(f"{function}: {name}: expected {dims}, got sizes {list(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"{function}: {name}: expected a floating dtype, got {t.dtype}")
        if t.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise TypeError(
                f"{function}: {name}: expected {q.dtype} (the dtype of q), got {t.dtype}"
            )
        if t.device != q.device:
            raise ValueError(
                f"{function}: {name}: expected device {q.device} (that of q), got {t.device}"
            )
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"{function}: q: expected a CPU or CUDA tensor, got one on {q.device}"
        )


def check_int(function: str, name: str, value: int | None) -> int:
    if isinstance(value, (bool, float, str)) or value is None:
        raise TypeError(f"{function}: {name}: expected an int, got {value!r}")
    return value


def flatten(t: Tensor) -> Tensor:
    """Pack [B, S, H, D] to tokens [B * S, H, D], without a copy where the strides allow it."""
    return t.flatten(0, 1)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    return_selection: bool = False,
    backend: str = "",
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call `ops.attention`, keeping the selection for the backward pass if selecting again would be costly."""
    if selection is not None:
        return ops.attention(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            block_size,
            0,
            0,
            causal,
            scale,
            False,
            backend,
            selection.contiguous(),
        )
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    keep = gradient and top_k < EVERYTHING and _costs_to_select(k.shape[0], block_size, top_k)
    return ops.attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        block_size,
        top_k,
        sink_blocks,
        causal,
        scale,
        return_selection or keep,
        backend,
    )


def _costs_to_select(keys: int, block_size: int, top_k: int) -> bool:
    """Return whether scoring a row (D operations for each of `keys / block_size` blocks on average) costs over a hundredth
    of its backward pass (10 D for each of `top_k * block_size` keys). A compiled graph, whose lengths are symbols, keeps
    the selection."""
    return torch.compiler.is_compiling() or 10 * keys > top_k * block_size * block_size


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig | None = None,
    *,
    block_size: int | None = None,
    top_k: int | None = None,
    sink_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    selection: Tensor | None = None,
    return_lse: bool = False,
    return_selection: bool = False,
    backend: str = "",
) -> Tensor | tuple[Tensor, ...]:
    """Compute Mixture of Block Attention of a batch.

    `q` [B, Sq, Hq, D], `k` and `v` [B, Sk, Hkv, D], of one dtype and any strides; `Hq % Hkv == 0`; causal queries are the last
    of the keys. Every query attends to `top_k` blocks of `block_size` tokens, its own included; `config` gives both instead (its
    `full_layers`, `full_tail` and `decode` have no effect here). `padding_mask` [B, Sk]: true at tokens, false at padding on either side; queries that are
    padding get 0. `scale` of the logits, D^-0.5 unless given.

    With a `selection`, int32 [B, Hs, Sq, W], the blocks are the caller's and no gate runs: of the routing only `block_size` is
    read. Query head h attends to the blocks of row `h // (Hq // Hs)`, `Hq % Hs == 0`: numbered from the row's first token,
    ascending, padded with -1 at the end, the query's own the last of them. With `causal=False` a query attends to the listed
    blocks alone, any or none of them; where there is none, `out` is 0 and the logarithm -inf. Rows of padding are ignored. On
    CUDA entries are not checked; those that are no blocks of their query are ignored.

    Returns `out` [B, Sq, Hq, D]; with `return_lse` also the natural logarithm of each softmax denominator [B, Hq, Sq]; with
    `return_selection` also block numbers, ascending, padded with -1, counted from the row's first token [B, Hq, Sq,
    min(top_k, ceil(B * Sk / block_size))]. Differentiable in q, k and v. Raises TypeError or ValueError naming the argument.
    """
    check_tensors("attention", q, k, v, "[batch, tokens, heads, head_dim]")
    if config is not None:
        if not isinstance(config, MoBAConfig):
            raise TypeError(
                f"attention: config: expected a MoBAConfig, got {type(config).__name__}"
            )
        if block_size is not None or top_k is not None:
            raise TypeError(
                "attention: config: expected either a config or block_size and top_k, got both"
            )
        if config.is_by_layer:
            raise TypeError(
                "attention: config: expected that of one layer (config.of_layer(layer, layers)), got lists of layers"
            )
        block_size, top_k, sink_blocks = (
            config.moba_chunk_size,
            config.moba_topk,
            config.sink_blocks or sink_blocks,
        )
    block_size = check_int("attention", "block_size", block_size)
    if selection is None:
        top_k = check_int("attention", "top_k", top_k)
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"attention: scale: expected a number, got {scale!r}")
    if not isinstance(backend, str):
        raise TypeError(
            f'attention: backend: expected "cpu", "reference", "cuda" or "", got {backend!r}'
        )
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    for name, t in (("k", k), ("v", v)):
        if t.shape[0] != batch:
            raise ValueError(
                f"attention: {name}: expected a batch of {batch} (that of q), got {t.shape[0]}"
            )
    if v.shape[1] != keys:
        raise ValueError(f"attention: v: expected {keys} tokens (those of k), got {v.shape[1]}")
    if padding_mask is None:
        steps = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        cu_seqlens_q, cu_seqlens_k = steps * queries, steps * keys
    else:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_of(
            _spans("attention", padding_mask, batch, queries, keys), queries, keys
        )
    rows = None if selection is None else _selection_rows(selection, q, padding_mask)
    out, lse, selected = varlen(
        flatten(q),
        flatten(k),
        flatten(v),
        cu_seqlens_q,
        cu_seqlens_k,
        block_size,
        top_k,
        sink_blocks,
        causal,
        scale,
        return_selection,
        backend,
        rows,
    )
    results = [out.unflatten(0, (batch, queries))]
    if return_lse:
        results.append(lse.unflatten(1, (batch, queries)).transpose(0, 1))
    if return_selection:
        results.append(
            selected.unflatten(1, (batch, queries)).transpose(0, 1)
            if selection is None
            else selection
        )
    return results[0] if len(results) == 1 else tuple(results)


def _selection_rows(selection: Tensor, q: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Check the caller's selection [B, Hs, Sq, W] and pack it to [Hs, B * Sq, W], without blocks for padding."""
    if not isinstance(selection, Tensor):
        raise TypeError(
            f"attention: selection: expected an int32 tensor, got {type(selection).__name__}"
        )
    if selection.dtype != torch.int32:
        raise TypeError(f"attention: selection: expected torch.int32, got {selection.dtype}")
    batch, queries, heads = q.shape[:3]
    if (
        selection.dim() != 4
        or selection.shape[0] != batch
        or selection.shape[1] < 1
        or heads % selection.shape[1]
        or selection.shape[2] != queries
    ):
        raise ValueError(
            f"attention: selection: expected [{batch}, a divisor of {heads}, {queries}, width], got sizes {list(selection.shape)}"
        )
    if padding_mask is not None:
        is_padding = ~padding_mask[:, padding_mask.shape[1] - queries :].bool()
        selection = selection.masked_fill(is_padding[:, None, :, None], -1)
    return selection.transpose(0, 1).flatten(1, 2)


def _spans(function: str, padding_mask: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    if not isinstance(padding_mask, Tensor) or padding_mask.is_floating_point():
        raise TypeError(
            f"{function}: padding_mask: expected bool, got {getattr(padding_mask, 'dtype', padding_mask)!r}"
        )
    if padding_mask.shape != (batch, keys):
        raise ValueError(
            f"{function}: padding_mask: expected [{batch}, {keys}], got sizes {list(padding_mask.shape)}"
        )
    if queries > keys:
        raise ValueError(
            f"{function}: {'gate_q' if function == 'select' else 'q'}: expected at most {keys} tokens (those of k) with a padding_mask, got {queries}"
        )
    return spans_of_mask(padding_mask, queries, keys - queries)


def block_features(
    k: Tensor, block_size: int, *, backend: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute features of the blocks of keys `k` [B, S, Hkv, D], any strides, in one pass.

    Returns the mean, the largest and the smallest value of every channel [B, ceil(S / block_size), Hkv, D], in the dtype of k,
    NaN where a key is; the mean is that of MoBA's gate, a float32 sum rounded once. Constants: they have no gradient. Raises
    TypeError or ValueError naming the argument.
    """
    if not isinstance(k, Tensor):
        raise TypeError(f"block_features: k: expected a tensor, got {type(k).__name__}")
    if k.dim() != 4:
        raise ValueError(
            f"block_features: k: expected [batch, tokens, heads, head_dim], got sizes {list(k.shape)}"
        )
    block_size = check_int("block_features", "block_size", block_size)
    batch, tokens = k.shape[:2]
    if batch == 0 or tokens == 0:
        raise ValueError(
            f"block_features: k: expected at least one token, got sizes {list(k.shape)}"
        )
    features = ops.block_features(flatten(k.detach()), tokens, block_size, backend)
    return tuple(t.unflatten(0, (batch, t.shape[0] // batch)) for t in features)


def select(
    gate_q: Tensor,
    gate_k: Tensor,
    *,
    block_size: int,
    top_k: int,
    keys: int | None = None,
    sink_blocks: int = 0,
    causal: bool = True,
    own_block: bool = False,
    padding_mask: Tensor | None = None,
    backend: str = "",
) -> Tensor:
    """Select blocks by a gate: the `top_k` of highest `<gate_q, gate_k>`, by the rules of MoBA's own.

    `gate_q` [B, Sq, Hg, Dg]; `gate_k` [B, ceil(Sk / block_size), Hk, Dg], a key for every block, in the dtype of `gate_q` or
    float32, `Hg % Hk == 0`. `keys` is Sk, Sq unless given; the queries are the last of the keys. With `padding_mask` [B, Sk] the
    blocks of a row are counted from its first token, and so are its rows of `gate_k`, of which those after its last block are
    not read. A causal query's own block counts in `top_k` and is always selected, so its key has no effect; with
    `causal=False` it is forced by `own_block`. Equal scores: the later block; NaN: the lowest score.

    Returns int32 [B, Hg, Sq, min(top_k, ceil(Sk / block_size))], as `attention` takes it: `gate_q = q` and `gate_k =
    block_features(k)[0]` is MoBA bit for bit. Has no gradient. On CUDA, Dg is at most 256. Raises TypeError or ValueError
    naming the argument.
    """
    for name, t in (("gate_q", gate_q), ("gate_k", gate_k)):
        if not isinstance(t, Tensor):
            raise TypeError(f"select: {name}: expected a tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise ValueError(
                f"select: {name}: expected [batch, tokens or blocks, heads, head_dim], got sizes {list(t.shape)}"
            )
    block_size = check_int("select", "block_size", block_size)
    top_k = check_int("select", "top_k", top_k)
    batch, queries = gate_q.shape[:2]
    keys = queries if keys is None else check_int("select", "keys", keys)
    blocks = (keys + block_size - 1) // block_size if block_size > 0 else 0
    if gate_k.shape[:2] != (batch, blocks):
        raise ValueError(
            f"select: gate_k: expected [{batch}, {blocks}, heads, head_dim] ({keys} keys in blocks of {block_size}), got sizes {list(gate_k.shape)}"
        )
    if padding_mask is None:
        steps = torch.arange(batch + 1, dtype=torch.int32, device=gate_q.device)
        cu_seqlens_q, cu_seqlens_k = steps * queries, steps * keys
        gate_keys = flatten(gate_k)
    else:
        spans = _spans("select", padding_mask, batch, queries, keys)
        q_begin, q_end, k_begin, k_end = spans.unbind(-1)
        rows = torch.stack([q_begin, q_end, torch.zeros_like(k_begin), k_end - k_begin], dim=-1)
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_of(rows, queries, k_end - k_begin)
        of_row = (k_end - k_begin + block_size - 1) // block_size
        gate_keys = gate_k[torch.arange(blocks, device=gate_k.device) < of_row[:, None]]
    gate_queries = flatten(gate_q.detach())
    if gate_q.is_cuda:  # whose kernels know a few sizes: zeros change no score
        missing = next((n - gate_q.shape[3] for n in (64, 96, 128, 256) if n >= gate_q.shape[3]), 0)
        gate_queries = torch.nn.functional.pad(gate_queries, (0, missing))
        gate_keys = torch.nn.functional.pad(gate_keys, (0, missing)).to(gate_q.dtype)
    selection = ops.select_by_gate(
        gate_queries,
        gate_keys.detach(),
        cu_seqlens_q,
        cu_seqlens_k,
        block_size,
        top_k,
        sink_blocks,
        causal,
        own_block,
        backend,
    )
    width = min(top_k, blocks)
    selection = torch.nn.functional.pad(selection, (0, width - selection.shape[2]), value=-1)
    return selection.unflatten(1, (batch, queries)).transpose(0, 1)


def check_varlen(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    moba_chunk_size: int,
    moba_topk: int,
) -> Tensor:
    """Check the arguments of `moba_attn_varlen` and `moba_attn_varlen_naive`; return the offsets as int32."""
    check_tensors(function, q, k, v, "[tokens, heads, head_dim]")
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"{function}: cu_seqlens: expected an int32 tensor, got {type(cu_seqlens).__name__}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{function}: cu_seqlens: expected torch.int32 or torch.int64, got {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"{function}: cu_seqlens: expected device {q.device} (that of q), got {cu_seqlens.device}"
        )
    check_int(function, "moba_chunk_size", moba_chunk_size)
    check_int(function, "moba_topk", moba_topk)
    if cu_seqlens.is_cpu and cu_seqlens.dtype == torch.int64 and not torch.compiler.is_compiling():
        beyond = cu_seqlens[(cu_seqlens < 0) | (cu_seqlens > q.shape[0])]
        if beyond.numel() > 0:
            raise ValueError(
                f"{function}: cu_seqlens: expected 0 to {q.shape[0]} (the tokens of q), got {beyond[0].item()}"
            )
    return cu_seqlens.to(torch.int32)
