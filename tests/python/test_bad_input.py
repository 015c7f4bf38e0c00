"""Invalid arguments raise an exception that names the argument before anything is computed, and never crash."""

import math
import random

import moba
import pytest
import torch
from moba import _operator
from packed import batch

ops = moba.ops


def good():
    q, k, v, cu, _ = batch([10, 6])
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "block_size": 4,
        "top_k": 2,
    }


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


WRONG = {
    "heads that do not divide": (
        {"k": torch.randn(16, 3, 16), "v": torch.randn(16, 3, 16)},
        "^attention: k: .*divides 4.*, got 3",
    ),
    "no heads": (
        {"k": torch.randn(16, 0, 16), "v": torch.randn(16, 0, 16)},
        "k: expected at least one head",
    ),
    "another head_dim": ({"k": torch.randn(16, 2, 8)}, "k: expected head_dim 16 .*, got 8"),
    "v of another length": ({"v": torch.randn(15, 2, 16)}, "v: expected the sizes of k"),
    "a batch dimension": ({"q": torch.randn(1, 16, 4, 16)}, "q: expected .*, got sizes"),
    "offsets that fall": ({"cu_seqlens_q": ints(0, 10, 6, 16)}, "cu_seqlens_k|decrease|entries"),
    "both offsets that fall": (
        {"cu_seqlens_q": ints(0, 10, 6, 16), "cu_seqlens_k": ints(0, 10, 12, 16)},
        "cu_seqlens_q: expected never to decrease, got 6 after 10",
    ),
    "offsets from 1": (
        {"cu_seqlens_q": ints(1, 10, 16)},
        "^attention: cu_seqlens_q: expected to start at 0, got 1",
    ),
    "offsets past the end": (
        {"cu_seqlens_k": ints(0, 10, 17)},
        "^attention: cu_seqlens_k: expected to end at 16 .*, got 17",
    ),
    "offsets short of the end": (
        {"cu_seqlens_k": ints(0, 10, 15)},
        "cu_seqlens_k: expected to end at 16 .*, got 15",
    ),
    "no offsets": ({"cu_seqlens_q": ints(), "cu_seqlens_k": ints()}, "empty"),
    "offsets in a square": ({"cu_seqlens_q": torch.zeros(2, 2, dtype=torch.int32)}, "cu_seqlens_q"),
    "block size 0": ({"block_size": 0}, "block_size: expected at least 1, got 0"),
    "block size -1": ({"block_size": -1}, "block_size: expected at least 1, got -1"),
    "top-k 0": ({"top_k": 0}, "top_k: expected at least 1, got 0"),
    "too many sinks": ({"sink_blocks": 2}, "sink_blocks: expected 0 to 1 .*, got 2"),
    "a scale that is no number": ({"scale": math.nan}, "scale: expected a finite number, got"),
    "an unknown backend": ({"backend": "gpu"}, 'backend: expected .*, got "gpu"'),
}


WRONG_TYPES = {
    "k of another dtype": (
        {"k": torch.randn(16, 2, 16).bfloat16()},
        r"k: expected torch.float32 \(the dtype of q\), got torch.bfloat16",
    ),
    "v of another dtype": (
        {"v": torch.randn(16, 2, 16).double()},
        r"v: expected torch.float32 \(the dtype of q\), got torch.float64",
    ),
    "integers": (
        {"q": torch.ones(16, 4, 16, dtype=torch.long)},
        "q: expected one of torch.float32.*, got torch.int64",
    ),
    "integers everywhere": (
        {name: torch.ones(16, 2, 16, dtype=torch.int8) for name in "qkv"},
        "q: expected one of .*, got torch.int8",
    ),
    "complex numbers": (
        {"q": torch.ones(16, 4, 16, dtype=torch.complex64)},
        "q: expected one of .*, got torch.complex64",
    ),
    "offsets of int64": (
        {"cu_seqlens_q": ints(0, 10, 16, dtype=torch.int64)},
        "cu_seqlens_q: expected torch.int32, got torch.int64",
    ),
    "offsets of floats": (
        {"cu_seqlens_k": torch.tensor([0.0, 10, 16])},
        "cu_seqlens_k: expected torch.int32, got torch.float32",
    ),
}


def modes_of_calling():
    """Return the ways to call the operator: for a gradient, without one, and traced with fake and meta tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return {
        "gradient": lambda call: ops.attention(
            **call | {"q": call["q"].requires_grad_(call["q"].is_floating_point())}
        ),
        "inference": torch.inference_mode()(lambda call: ops.attention(**call)),
        "fake": lambda call: fake(FakeTensorMode(), call),
        "meta": lambda call: ops.attention(
            **{k: v.to("meta") if torch.is_tensor(v) else v for k, v in call.items()}
        ),
    }


def fake(mode, call):
    with mode:
        return ops.attention(
            **{k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in call.items()}
        )


@pytest.mark.parametrize("name", WRONG)
def test_invalid_arguments_are_named(name):
    change, message = WRONG[name]
    for mode in ("gradient", "inference"):
        with pytest.raises(ValueError, match=message):
            modes_of_calling()[mode](good() | change)


@pytest.mark.parametrize("mode", modes_of_calling())
@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_dtypes_raise_type_error_in_every_mode(name, mode):
    change, message = WRONG_TYPES[name]
    with pytest.raises(TypeError, match=f"^attention: {message}"):
        modes_of_calling()[mode](good() | change)
    modes_of_calling()[mode](good())


def test_wrong_dtypes_of_backward_and_select_raise_type_error():
    q, k, v, cu, _ = batch([16])
    out, lse, selection = ops.attention(q, k, v, cu, cu, 4, 2, return_selection=True)
    backward = dict(
        d_out=out,
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        selection=selection,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
    )
    ops.attention_backward(**backward, block_size=4, top_k=2)
    for name, given in backward.items():
        wrong = given.half() if given.is_floating_point() else given.long()
        with pytest.raises(
            TypeError,
            match=f"^attention_backward: {'d_out' if name == 'q' else name}: expected torch",
        ):
            ops.attention_backward(**(backward | {name: wrong}), block_size=4, top_k=2)
    with pytest.raises(
        TypeError, match="^select: cu_seqlens_k: expected torch.int32, got torch.int64"
    ):
        ops.select(q, k, cu, cu.long(), 4, 2)


def test_argument_errors_that_torch_raises_as_runtime_error_become_value_error():
    q, _, _, cu, _ = batch([16])
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises((ValueError, RuntimeError), match="^select: block_size: ") as refused:
        ops.select.redispatch(keys, q, q, cu, cu, 0, 2)
    message = str(refused.value)
    converted = _operator._operator_error(RuntimeError(f"{message}\nC++ stack trace"))
    assert type(converted) is ValueError and str(converted) == message
    other = RuntimeError("attention: CUDA: out of memory")
    assert _operator._operator_error(other) is other


def test_integers_have_no_gradient():
    with pytest.raises(RuntimeError, match="floating point"):
        torch.ones(16, 4, 16, dtype=torch.long).requires_grad_()


def test_tensors_on_another_device_are_refused():
    call = good()
    for name in ("q", "k", "cu_seqlens_q"):
        with pytest.raises(ValueError, match="expected device"):
            ops.attention(**(call | {name: call[name].to("meta")}))


@pytest.mark.parametrize("lengths", ([], [0], [0, 0], [3, 0, 5, 0]))
def test_empty_batches_and_sequences_are_legal(lengths):
    q, k, v, cu, _ = batch(lengths)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse, selection = ops.attention(*leaves, cu, cu, 4, 2, return_selection=True)
    assert out.shape == q.shape and lse.shape == (4, q.shape[0])
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in leaves)
    assert moba.attention(q[None], k[None], v[None], block_size=4, top_k=2).shape == (1, *q.shape)
    nothing = torch.zeros(0, 5, 4, 16)
    assert moba.attention(nothing, nothing, nothing, block_size=4, top_k=2).shape == nothing.shape


def test_queries_before_the_first_key_get_zeros():
    q, k, v, cu_q, cu_k = batch([5], key_lengths=[2])
    out, lse, selection = ops.attention(q, k, v, cu_q, cu_k, 4, 2, return_selection=True)
    assert (
        (out[:3] == 0).all() and (lse[:, :3] == -torch.inf).all() and (selection[:, :3] == -1).all()
    )


def test_nan_does_not_reach_queries_that_do_not_select_it():
    q, k, v, cu, _ = batch([64])
    clean, _, selection = ops.attention(q, k, v, cu, cu, 8, 2, return_selection=True)
    k[3, 0, 0] = math.nan
    out = ops.attention(q, k, v, cu, cu, 8, 2)[0]
    untouched = ~(selection == 0).any(-1).T
    assert untouched.any() and torch.isfinite(out[untouched]).all()


BATCHED = {
    "not a tensor": (lambda c: c | {"q": [1.0]}, TypeError, "q: expected a tensor .*, got list"),
    "integers": (
        lambda c: c | {"k": c["k"].long()},
        TypeError,
        "k: expected a floating dtype, got torch.int64",
    ),
    "another dtype": (
        lambda c: c | {"v": c["v"].half()},
        TypeError,
        "v: expected torch.float32 .*, got torch.float16",
    ),
    "another device": (
        lambda c: c | {"v": c["v"].to("meta")},
        ValueError,
        "v: expected device cpu .*, got meta",
    ),
    "three dimensions": (lambda c: c | {"q": c["q"][0]}, ValueError, "q: expected .*, got sizes"),
    "another batch": (
        lambda c: c | {"k": c["k"][:1]},
        ValueError,
        "k: expected a batch of 2 .*, got 1",
    ),
    "v of another length": (
        lambda c: c | {"v": c["v"][:, :5]},
        ValueError,
        "v: expected 9 tokens .*, got 5",
    ),
    "no routing": (
        lambda c: c | {"block_size": None},
        TypeError,
        "block_size: expected an int, got None",
    ),
    "two routings": (
        lambda c: c | {"config": moba.MoBAConfig(4, 2)},
        TypeError,
        "config: expected either a config or block_size and top_k, got both",
    ),
    "a config of another kind": (
        lambda c: c | {"config": {"top_k": 2}},
        TypeError,
        "config: expected a MoBAConfig, got dict",
    ),
    "a scale that is text": (
        lambda c: c | {"scale": "1"},
        TypeError,
        "scale: expected a number, got '1'",
    ),
    "a backend that is a number": (
        lambda c: c | {"backend": 3},
        TypeError,
        "backend: expected .*, got 3",
    ),
    "top-k of 1.5": (lambda c: c | {"top_k": 1.5}, TypeError, "top_k: expected an int, got 1.5"),
    "top-k of 0": (lambda c: c | {"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
    "a float mask": (
        lambda c: c | {"padding_mask": torch.ones(2, 9)},
        TypeError,
        "padding_mask: expected bool, got torch.float32",
    ),
    "a mask of another size": (
        lambda c: c | {"padding_mask": torch.ones(2, 8, dtype=torch.bool)},
        ValueError,
        "padding_mask: expected .*, got sizes",
    ),
    "a mask with holes": (
        lambda c: c | {"padding_mask": torch.arange(9).remainder(3).bool().expand(2, 9)},
        ValueError,
        "got padding between tokens",
    ),
}


@pytest.mark.parametrize("name", BATCHED)
def test_invalid_arguments_of_batched_attention_are_named(name):
    change, kind, message = BATCHED[name]
    call = {
        "q": torch.randn(2, 9, 4, 8),
        "k": torch.randn(2, 9, 2, 8),
        "v": torch.randn(2, 9, 2, 8),
    }
    with pytest.raises(kind, match=message):
        moba.attention(**change(call | {"block_size": 4, "top_k": 2}))


@pytest.mark.parametrize("attend", (moba.moba_attn_varlen, moba.moba_attn_varlen_naive))
def test_offsets_of_int64_are_converted(attend):
    q, k, v, cu, _ = batch([10, 6])
    assert torch.equal(attend(q, k, v, cu.long(), 10, 4, 2), attend(q, k, v, cu, 10, 4, 2))


@pytest.mark.parametrize("attend", (moba.moba_attn_varlen, moba.moba_attn_varlen_naive))
def test_invalid_arguments_of_varlen_functions_are_refused(attend):
    q, k, v, cu, _ = batch([10, 6])
    for wrong, kind in (
        ((q, k, v, cu.float(), 10, 4, 2), TypeError),
        ((q, k, v, ints(0, 2**32, 16, dtype=torch.int64), 10, 4, 2), ValueError),
        ((q, k, v, ints(0, -1, 16, dtype=torch.int64), 10, 4, 2), ValueError),
        ((q, k, v, [0, 16], 10, 4, 2), TypeError),
        ((q, k, v, cu.to("meta"), 10, 4, 2), ValueError),
        ((q, k.half(), v, cu, 10, 4, 2), TypeError),
        ((q, k[:, :, :8], v, cu, 10, 4, 2), ValueError),
        ((q, torch.randn(16, 3, 16), torch.randn(16, 3, 16), cu, 10, 4, 2), ValueError),
        ((q, k, v, ints(0, 12, 10, 16), 10, 4, 2), ValueError),
        ((q, k, v, ints(0, 10), 10, 4, 2), ValueError),
        ((q, k, v, cu, 10, 0, 2), ValueError),
        ((q, k, v, cu, 10, 4, 0), ValueError),
        ((q, k, v, cu, 10, 4.0, 2), TypeError),
    ):
        with pytest.raises(kind):
            attend(*wrong)


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"moba_chunk_size": 0}, ValueError),
        ({"moba_topk": 0}, ValueError),
        ({"moba_topk": "3"}, TypeError),
        ({"moba_chunk_size": True}, TypeError),
        ({"sink_blocks": 3}, ValueError),
        ({"full_tail": -1}, ValueError),
        ({"full_layers": ["last"]}, TypeError),
        ({"full_layers": -1}, TypeError),
        ({"decode": "sparse"}, ValueError),
    ],
)
def test_invalid_configurations_are_refused(options, kind):
    with pytest.raises(kind, match=next(iter(options))):
        moba.MoBAConfig(**({"moba_chunk_size": 4, "moba_topk": 3} | options))


def fuzzed(rng):
    """Return a random argument set, often valid, mostly invalid in one or several arguments."""
    head_dim = rng.choice([1, 3, 8, 16, 33])
    kv_heads = rng.randint(1, 3)
    lengths = [rng.choice([0, 1, 5, 16]) for _ in range(rng.randint(0, 4))]
    q, k, v, cu_q, cu_k = batch(lengths, kv_heads * rng.randint(1, 3), kv_heads, head_dim)
    call = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "block_size": rng.choice([1, 2, 7, 64]),
        "top_k": rng.randint(1, 5),
    }
    numbers = [-(2**63), -1, 0, 1, 3, 2**31, 2**62, 2**63 - 1]
    tensors = {
        "dtype": lambda t: t.to(
            rng.choice([torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
        ),
        "device": lambda t: t.to("meta"),
        "rank": lambda t: rng.choice([t[None], t.flatten(), t.sum()]),
        "shorter": lambda t: t[:-1],
        "heads": lambda t: t.repeat_interleave(2, 1) if t.dim() > 1 else t,
        "head_dim": lambda t: t[..., :-1] if t.dim() > 1 else t,
        "transposed": lambda t: t.transpose(0, -1),
        "expanded": lambda t: t[:1].expand(t.shape),
        "complex": lambda t: t.to(torch.complex64),
        "sparse": lambda t: t.to_sparse(),
        "not finite": lambda t: t * math.inf if t.is_floating_point() else t,
    }
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        name = rng.choice([*call, "sink_blocks", "causal", "scale", "return_selection", "backend"])
        value = call.get(name)
        try:
            if isinstance(value, torch.Tensor):
                if name.startswith("cu") and rng.random() < 0.7:
                    known = [-(2**31), -1, 0, 3, 16, 2**31 - 1, q.shape[0]]
                    values = [rng.choice(known) for _ in range(rng.randint(0, 4))]
                    call[name] = torch.tensor(values, dtype=torch.int32)
                else:
                    call[name] = rng.choice(list(tensors.values()))(value)
            elif name in ("block_size", "top_k", "sink_blocks"):
                call[name] = rng.choice([*numbers, 2.5, None, "3"])
            elif name == "scale":
                call[name] = rng.choice([None, 0.0, -1.0, 1e300, math.inf, math.nan, "x"])
            elif name == "backend":
                call[name] = rng.choice(["", "cpu", "reference", "cuda", "\0", "x" * 1000, 3])
            else:
                call[name] = rng.choice([True, False, None])
        except (RuntimeError, IndexError, NotImplementedError):
            pass  # no such tensor
    return call


def outcome(call):
    """Return the type of the exception, or the shapes and dtypes of the results."""
    try:
        return [(t.shape, t.dtype) for t in ops.attention(**call)]
    except Exception as error:
        return type(error)


def check_traced(call, real):
    """Check that a traced call, which does not see values, raises as the real one and has the shapes of its results."""
    traced = outcome({name: t.to("meta") if torch.is_tensor(t) else t for name, t in call.items()})
    if traced is TypeError or real is TypeError or isinstance(real, list):
        assert traced == real, (call, traced, real)
    else:
        assert isinstance(traced, list) or issubclass(
            traced, (ValueError, NotImplementedError, RuntimeError)
        ), traced


def test_random_argument_sets_raise_or_compute():
    rng = random.Random(5)
    computed = refused = 0
    for i in range(20_000):
        call = fuzzed(rng)
        if i % 8 == 0 and not any(torch.is_tensor(t) and t.is_meta for t in call.values()):
            check_traced(call, outcome(call))
        try:
            out, lse, _ = ops.attention(**call)
        except (ValueError, TypeError, NotImplementedError) as error:
            refused += 1
            assert str(error)
            continue
        except (
            RuntimeError
        ) as error:  # of torch: an int out of range, an unsupported device or layout
            refused += 1
            text = str(error)
            assert "moba" in text or "Tensor" in text or "tensor" in text, (call, text)
            assert "INTERNAL ASSERT" not in text, (call, text)
            continue
        computed += 1
        q = call["q"]
        assert (
            out.shape == q.shape and out.dtype == q.dtype and lse.shape == (q.shape[1], q.shape[0])
        )
        right = all(
            torch.isfinite(call[name]).all() for name in "qkv" if call[name].device.type == "cpu"
        )
        if out.device.type == "cpu" and right and abs(call.get("scale") or 0) < 1e3:
            assert torch.isfinite(out).all(), call
            if computed % 20 == 0 and call.get("causal", True):
                check_result(call, out)
    assert computed > 4_000 and refused > 4_000, (computed, refused)


def check_result(call, out):
    options = {name: call[name] for name in ("sink_blocks", "scale") if name in call}
    arguments = [
        call[name]
        for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "block_size", "top_k")
    ]
    expected = ops.attention(*arguments, backend="reference", **options)[0]
    tolerance = 1e-4 if out.dtype in (torch.float32, torch.float64) else 5e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def cached():
    span = ints(0, 2), ints(9, 7)
    keys, values = torch.randn(2, 2, 9, 2, 16).unbind(0)
    names = ("q", "k", "v", "means", "begin", "end", "block_size", "top_k")
    return dict(
        zip(names, (torch.randn(2, 4, 16), keys, values, torch.randn(2, 2, 2, 16), *span, 4, 2))
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"begin": ints(0, 8)}, "begin, end: expected .* in sequence 1, got 8 and 7"),
        ({"end": ints(10, 7)}, "begin, end: expected .* in sequence 0, got 0 and 10"),
        ({"begin": ints(-1, 2)}, "-1 and 9"),
        ({"begin": ints(0)}, "begin, end: expected 2 entries .*, got 1 and 2"),
        ({"means": torch.randn(2, 1, 2, 16)}, "means: expected"),
        ({"k": torch.randn(3, 9, 2, 16)}, "k: expected .*, got sizes"),
        ({"v": torch.randn(2, 9, 2, 8)}, "v: expected"),
        ({"k": torch.randn(2, 9, 3, 16), "v": torch.randn(2, 9, 3, 16)}, "k: .*divides 4.*, got 3"),
        ({"q": torch.randn(1, 4, 16)}, "k: expected .*, got sizes"),
        ({"q": torch.randn(4, 16)}, "q: expected .*, got sizes"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"backend": "gpu"}, 'backend: expected .*, got "gpu"'),
    ],
)
def test_invalid_arguments_of_decode_are_named(change, message):
    ops.decode(**cached())
    with pytest.raises(ValueError, match=message):
        ops.decode(**(cached() | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"end": ints(9, 7, dtype=torch.int64)}, "end: expected torch.int32, got torch.int64"),
        (
            {"means": torch.randn(2, 2, 2, 16).half()},
            "means: expected torch.float32, got torch.float16",
        ),
        (
            {"q": torch.randn(2, 4, 16).bfloat16()},
            r"k: expected torch.bfloat16 \(the dtype of q\), got torch.float32",
        ),
    ],
)
def test_wrong_dtypes_of_decode_raise_type_error(change, message):
    with pytest.raises(TypeError, match=f"^decode: {message}"):
        ops.decode(**(cached() | change))


def test_decoding_empty_batches_is_legal():
    nothing = torch.zeros(0, 9, 2, 16)
    out, lse = ops.decode(torch.zeros(0, 4, 16), nothing, nothing, nothing, ints(), ints(), 4, 2)
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)
    call = cached() | {"end": ints(0, 7)}
    out, lse = ops.decode(**call)
    assert (out[0] == 0).all() and (lse[:, 0] == -torch.inf).all()
