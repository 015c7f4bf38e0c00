"""Load the compiled operators and register shapes, gradients, autocast and vmap for them."""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY_PATH = str(next(Path(__file__).parent.glob("libmoba_torch.*")))
torch.ops.load_library(_LIBRARY_PATH)
_last_argument_error = ctypes.CDLL(_LIBRARY_PATH).moba_last_argument_error
_last_argument_error.restype = ctypes.c_char_p
_raise_interrupt = ctypes.PyDLL(_LIBRARY_PATH).moba_raise_interrupt
_raise_interrupt.restype = None

_attention = torch.ops.moba.attention.default
_attention_backward = torch.ops.moba.attention_backward.default
_select = torch.ops.moba.select.default
_library = torch.library.Library("moba", "IMPL")


_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
_TENSORS = {
    "attention": ("q", "k", "v", *_OFFSETS),
    "attention_backward": ("d_out", "q", "k", "v", "out", "lse", "selection", *_OFFSETS),
    "select": ("q", "k", *_OFFSETS),
    "select_by_gate": ("q", "k", *_OFFSETS),
    "block_features": ("k",),
    "decode": ("q", "k", "v", "means", "begin", "end"),
    "paged_attention": ("q", "k", "v", "means", "page_table", "lengths", "cu_seqlens_q"),
    "paged_decode": ("q", "k", "v", "means", "page_table", "lengths"),
    "update_means": ("k", "means", "page_table", "lengths", "before"),
}
_SELECTION = {"attention": 12, "decode": 11}
"""Positions of the caller's selection among the arguments."""
_DTYPES = {"lse": torch.float32} | dict.fromkeys(
    (*_OFFSETS, "selection", "begin", "end", "page_table", "lengths", "before"), torch.int32
)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def means_dtype(keys: Tensor) -> torch.dtype:
    """Return the dtype that `decode` expects of the means of these keys."""
    return keys.dtype if keys.is_cuda else torch.float32


def _check_tensors(function: str, *tensors: Tensor) -> None:
    """Raise TypeError for a wrong dtype and ValueError for a wrong device; the compiled code cannot raise TypeError."""
    names = _TENSORS[function]
    model_name = "q" if "q" in names else "k"
    model = tensors[names.index(model_name)]
    dtype, device = model.dtype, model.device
    if dtype not in _FLOATING:
        raise TypeError(
            f"{function}: {model_name}: expected one of {', '.join(map(str, _FLOATING))}, got {dtype}"
        )
    for name, t in zip(names, tensors):
        expected = means_dtype(model) if name == "means" else _DTYPES.get(name)
        is_f32_gate = function == "select_by_gate" and name == "k" and t.dtype is torch.float32
        if expected is None and t.dtype is not dtype and not is_f32_gate:
            raise TypeError(
                f"{function}: {name}: expected {dtype} (the dtype of {model_name}), got {t.dtype}"
            )
        if expected is not None and t.dtype is not expected:
            raise TypeError(f"{function}: {name}: expected {expected}, got {t.dtype}")
        if t.device != device:
            raise ValueError(
                f"{function}: {name}: expected device {device} (that of {model_name}), got {t.device}"
            )


def _check_selection(function: str, q: Tensor, selection: Tensor | None) -> None:
    """Raise TypeError or ValueError for a wrong dtype or device of the caller's selection."""
    if selection is None:
        return
    if selection.dtype is not torch.int32:
        raise TypeError(f"{function}: selection: expected torch.int32, got {selection.dtype}")
    if selection.device != q.device:
        raise ValueError(
            f"{function}: selection: expected device {q.device} (that of q), got {selection.device}"
        )


def _operator_error(error: Exception) -> Exception:
    """Return ValueError for an argument that the compiled code refused, which torch raises as RuntimeError since 2.15; any
    other error as it is. Raise what a signal handler has raised during the call instead, such as KeyboardInterrupt."""
    _raise_interrupt()
    message = _last_argument_error().decode()
    return ValueError(message) if message and message in str(error) else error


_checks = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)


def _register_checks(function: str) -> None:
    """Check the arguments of every call of the operator on every backend, unless it is traced."""
    operator = getattr(torch.ops.moba, function).default
    count = len(_TENSORS[function])
    selection = _SELECTION.get(function, math.inf)

    def checked(keyset, *arguments):
        _check_tensors(function, *arguments[:count])
        if len(arguments) > selection:
            _check_selection(function, arguments[0], arguments[selection])
        try:
            return operator.redispatch(keyset - _checks, *arguments)
        except (RuntimeError, ValueError) as error:
            raise _operator_error(error) from None

    _library.impl(function, checked, "BackendSelect", with_keyset=True)


for _function in _TENSORS:
    _register_checks(_function)


def selection_width(keys: int, block_size: int, top_k: int) -> int:
    """Return the width of a row of a selection over `keys` packed keys, from shapes alone, as if they were one sequence."""
    return torch.sym_min(top_k, (keys + block_size - 1) // block_size)


def _check_shapes(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    top_k: int,
    selection: Tensor | None = None,
) -> None:
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        torch._check_value(
            value >= 1 or (name == "top_k" and selection is not None),
            lambda: f"{function}: {name}: expected at least 1, got {value}",
        )
    if selection is not None:
        torch._check_value(
            selection.dim() == 3
            and selection.shape[1] == q.shape[0]
            and selection.shape[0] > 0
            and q.shape[1] % selection.shape[0] == 0,
            lambda: (
                f"{function}: selection: expected [a divisor of {q.shape[1]}, {q.shape[0]}, width], got sizes {list(selection.shape)}"
            ),
        )
    for name, t in (("q", q), ("k", k), ("v", v)):
        torch._check_value(
            t.dim() == 3,
            lambda: (
                f"{function}: {name}: expected [tokens, heads, head_dim], got sizes {list(t.shape)}"
            ),
        )
    torch._check_value(
        k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        lambda: (
            f"{function}: k: expected a number of heads that divides {q.shape[1]} (the query heads), got {k.shape[1]}"
        ),
    )
    torch._check_value(
        k.shape[2] == q.shape[2],
        lambda: f"{function}: k: expected head_dim {q.shape[2]} (that of q), got {k.shape[2]}",
    )
    for dim in range(3):
        torch._check_value(
            v.shape[dim] == k.shape[dim],
            lambda: f"{function}: v: expected the sizes of k, {list(k.shape)}, got {list(v.shape)}",
        )


def _empty_selection(q: Tensor, keys: int, block_size: int, top_k: int) -> Tensor:
    return q.new_empty(
        (q.shape[1], q.shape[0], selection_width(keys, block_size, top_k)), dtype=torch.int32
    )


@torch.library.register_fake("moba::attention")
def _(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    block_size,
    top_k,
    sink_blocks=0,
    causal=True,
    scale=None,
    return_selection=False,
    backend="",
    selection=None,
):
    _check_tensors("attention", q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_selection("attention", q, selection)
    _check_shapes("attention", q, k, v, block_size, top_k, selection)
    tokens, heads = q.shape[:2]
    selected = (
        _empty_selection(q, k.shape[0], block_size, top_k)
        if return_selection
        else q.new_empty((heads, tokens, 0), dtype=torch.int32)
    )
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32), selected


@torch.library.register_fake("moba::attention_backward")
def _(
    d_out,
    q,
    k,
    v,
    out,
    lse,
    selection,
    cu_seqlens_q,
    cu_seqlens_k,
    block_size,
    top_k,
    sink_blocks=0,
    causal=True,
    scale=None,
    backend="",
):
    _check_tensors(
        "attention_backward", d_out, q, k, v, out, lse, selection, cu_seqlens_q, cu_seqlens_k
    )
    _check_shapes(
        "attention_backward", q, k, v, block_size, top_k, selection if top_k == 0 else None
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("moba::select")
def _(q, k, cu_seqlens_q, cu_seqlens_k, block_size, top_k, sink_blocks=0, causal=True, backend=""):
    _check_tensors("select", q, k, cu_seqlens_q, cu_seqlens_k)
    _check_shapes("select", q, k, k, block_size, top_k)
    return _empty_selection(q, k.shape[0], block_size, top_k)


@torch.library.register_fake("moba::select_by_gate")
def _(
    q,
    k,
    cu_seqlens_q,
    cu_seqlens_k,
    block_size,
    top_k,
    sink_blocks=0,
    causal=True,
    own_block=False,
    backend="",
):
    _check_tensors("select_by_gate", q, k, cu_seqlens_q, cu_seqlens_k)
    _check_shapes("select_by_gate", q, k, k, block_size, top_k)
    width = torch.sym_min(top_k, k.shape[0] + (1 if causal else 0))
    return q.new_empty((q.shape[1], q.shape[0], width), dtype=torch.int32)


@torch.library.register_fake("moba::block_features")
def _(k, tokens, block_size, backend=""):
    _check_tensors("block_features", k)
    blocks = k.shape[0] // tokens * ((tokens + block_size - 1) // block_size)
    return tuple(k.new_empty((blocks, *k.shape[1:])) for _ in range(3))


@torch.library.register_fake("moba::decode")
def _(
    q,
    k,
    v,
    means,
    begin,
    end,
    block_size,
    top_k,
    sink_blocks=0,
    scale=None,
    backend="",
    selection=None,
):
    _check_tensors("decode", q, k, v, means, begin, end)
    _check_selection("decode", q, selection)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("moba::paged_attention")
def _(
    q,
    k,
    v,
    means,
    page_table,
    lengths,
    cu_seqlens_q,
    block_size,
    top_k,
    sink_blocks=0,
    scale=None,
    backend="",
):
    _check_tensors("paged_attention", q, k, v, means, page_table, lengths, cu_seqlens_q)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("moba::paged_decode")
def _(
    q, k, v, means, page_table, lengths, block_size, top_k, sink_blocks=0, scale=None, backend=""
):
    _check_tensors("paged_decode", q, k, v, means, page_table, lengths)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("moba::update_means")
def _(k, means, page_table, lengths, before, block_size, max_added, backend=""):
    _check_tensors("update_means", k, means, page_table, lengths, before)


_below_gradient = torch._C._after_autograd_keyset - _checks


class _Attention(torch.autograd.Function):
    """Gradient of `attention`; torch.library.register_autograd would take ten times as long as a small call."""

    @staticmethod
    def forward(
        ctx,
        keyset,
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
        return_selection,
        backend,
        selection,
    ):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, selected = _attention.redispatch(
                keyset,
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
                return_selection,
                backend,
                selection,
            )
        ctx.mark_non_differentiable(lse, selected)
        ctx.set_materialize_grads(False)
        given = selection is not None
        saved = selection if given else selected
        ctx.save_for_backward(q, k, v, out, lse, saved, cu_seqlens_q, cu_seqlens_k)
        ctx.routing = (block_size, 0 if given else top_k, sink_blocks, causal, scale, backend)
        return out, lse, selected

    @staticmethod
    def backward(ctx, d_out, d_lse, d_selected):
        if d_out is None:
            return (None,) * 14
        return None, *_attention_backward(d_out, *ctx.saved_tensors, *ctx.routing), *(None,) * 10


def _with_gradient(
    keyset,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    block_size,
    top_k,
    sink_blocks=0,
    causal=True,
    scale=None,
    return_selection=False,
    backend="",
    selection=None,
):
    # In place of the checks at BackendSelect, which would run twice.
    _check_tensors("attention", q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_selection("attention", q, selection)
    keyset = keyset & _below_gradient
    arguments = (
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
        return_selection,
        backend,
        selection,
    )
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if gradient and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "attention: q, k, v: expected torch.autograd.grad, got torch.func.grad"
        )
    _check_no_tangent("attention", q, k, v)
    try:
        if gradient:
            return _Attention.apply(keyset, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return _attention.redispatch(keyset, *arguments)
    except (RuntimeError, ValueError) as error:
        raise _operator_error(error) from None


def _check_no_tangent(function, *tensors):
    """Raise for forward-mode derivatives, which would silently be 0."""
    if forward_ad._current_level < 0:
        return
    for name, t in zip(_TENSORS[function], tensors):
        if forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"{function}: {name}: expected torch.autograd.grad, got a tangent of a forward-mode derivative (torch.func.jvp)"
            )


_NO_DERIVATIVE = {
    "attention_backward": "d_out: expected a first derivative of attention, got a second one"
} | {
    name: f"q, k, v: expected no backward pass ({name} has no derivative), got one"
    for name in ("decode", "paged_attention", "paged_decode")
}


class _NotDifferentiable(torch.autograd.Function):
    """Operator without a derivative."""

    @staticmethod
    def forward(ctx, function, operator, keyset, *arguments):
        ctx.function = function
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset, *arguments)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(f"{ctx.function}: {_NO_DERIVATIVE[ctx.function]}")


def _register_not_differentiable(function):
    operator = getattr(torch.ops.moba, function).default

    def kernel(keyset, *arguments):
        keyset = keyset & torch._C._after_autograd_keyset
        _check_no_tangent(function, *arguments)
        if torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in arguments
        ):
            return _NotDifferentiable.apply(function, operator, keyset, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset, *arguments)

    _library.impl(function, kernel, "Autograd", with_keyset=True)


_library.impl("attention", _with_gradient, "Autograd", with_keyset=True)
_register_not_differentiable("attention_backward")
for _name in ("decode", "paged_attention", "paged_decode"):
    _register_not_differentiable(_name)


# Autocast converts the inputs to its dtype, as for torch's own attention; float64 stays float64.


def _register_autocast(name, operator, device, key):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(value):
        castable = (
            isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        )
        return value.to(torch.get_autocast_dtype(device)) if castable else value

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(
                *map(cast, args), **{name: cast(value) for name, value in kwargs.items()}
            )

    _library.impl(name, kernel, key)


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _register_autocast("attention", _attention, _device, _key)
    _register_autocast("select", _select, _device, _key)


# vmap runs a batch of packed batches as one longer packed batch.


def _pack(value, dim, batch, tokens_dim):
    """Merge the mapped dimension with the tokens; expand a tensor that is not mapped."""
    value = (
        value.movedim(dim, tokens_dim)
        if dim is not None
        else value.unsqueeze(tokens_dim).expand(
            *value.shape[:tokens_dim], batch, *value.shape[tokens_dim:]
        )
    )
    return value.flatten(tokens_dim, tokens_dim + 1)


def _unpack(value, batch, tokens_dim):
    return value.unflatten(tokens_dim, (batch, value.shape[tokens_dim] // batch))


def _repeat_offsets(offsets, batch, tokens):
    starts = torch.arange(batch, dtype=torch.int32, device=offsets.device) * tokens
    return torch.cat([offsets[:1], (starts[:, None] + offsets[1:]).flatten()])


def _refuse_mapped_offsets(function, dims):
    if any(dim is not None for dim in dims):
        raise NotImplementedError(
            f"{function}: cu_seqlens_q, cu_seqlens_k: expected offsets that vmap does not map, got mapped ones; map over q, k and v alone"
        )


def _vmap_attention(info, in_dims, q, k, v, cu_seqlens_q, cu_seqlens_k, block_size, top_k, *rest):
    batch = info.batch_size
    _refuse_mapped_offsets("attention", in_dims[3:5])
    q, k, v = (_pack(t, dim, batch, 0) for t, dim in zip((q, k, v), in_dims))
    tokens, keys = q.shape[0] // batch, k.shape[0] // batch
    at = _SELECTION["attention"]
    if len(in_dims) > at and rest[-1] is not None:
        rest = *rest[:-1], _pack(rest[-1], in_dims[at], batch, 1).contiguous()
    out, lse, selection = _attention(
        q,
        k,
        v,
        _repeat_offsets(cu_seqlens_q, batch, tokens),
        _repeat_offsets(cu_seqlens_k, batch, keys),
        block_size,
        top_k,
        *rest,
    )
    width = min(selection.shape[2], selection_width(keys, block_size, top_k))
    selection = _unpack(selection, batch, 1)[..., :width]
    return (_unpack(out, batch, 0), _unpack(lse, batch, 1), selection), (0, 1, 1)


def _vmap_backward(
    info,
    in_dims,
    d_out,
    q,
    k,
    v,
    out,
    lse,
    selection,
    cu_seqlens_q,
    cu_seqlens_k,
    block_size,
    top_k,
    *rest,
):
    batch = info.batch_size
    _refuse_mapped_offsets("attention_backward", in_dims[7:9])
    d_out, q, k, v, out = (
        _pack(t, dim, batch, 0) for t, dim in zip((d_out, q, k, v, out), in_dims)
    )
    lse, selection = (
        _pack(t, dim, batch, 1).contiguous() for t, dim in zip((lse, selection), in_dims[5:7])
    )
    tokens, keys = q.shape[0] // batch, k.shape[0] // batch
    if selection.shape[2] and top_k > 0:
        missing = selection_width(k.shape[0], block_size, top_k) - selection.shape[2]
        selection = torch.nn.functional.pad(selection, (0, missing), value=-1)
    gradients = _attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        selection,
        _repeat_offsets(cu_seqlens_q, batch, tokens),
        _repeat_offsets(cu_seqlens_k, batch, keys),
        block_size,
        top_k,
        *rest,
    )
    return tuple(_unpack(t, batch, 0) for t in gradients), (0, 0, 0)


def _vmap_select(info, in_dims, q, k, cu_seqlens_q, cu_seqlens_k, block_size, top_k, *rest):
    batch = info.batch_size
    _refuse_mapped_offsets("select", in_dims[2:4])
    q, k = (_pack(t, dim, batch, 0) for t, dim in zip((q, k), in_dims))
    tokens, keys = q.shape[0] // batch, k.shape[0] // batch
    selection = _select(
        q,
        k,
        _repeat_offsets(cu_seqlens_q, batch, tokens),
        _repeat_offsets(cu_seqlens_k, batch, keys),
        block_size,
        top_k,
        *rest,
    )
    return _unpack(selection, batch, 1)[..., : selection_width(keys, block_size, top_k)], 1


torch.library.register_vmap("moba::attention", _vmap_attention)
torch.library.register_vmap("moba::attention_backward", _vmap_backward)
torch.library.register_vmap("moba::select", _vmap_select)
