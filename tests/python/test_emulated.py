"""The operators of CUDA tensors on the emulated device (docs/cuda.md), which takes CPU tensors, and decoding of models with
them."""

import moba
import pytest
import torch
from builds import BUILD
from moba import cache, wrapper
from packed import batch, cached, dense_given
from random_models import build, random_ids

ops = moba.ops
DTYPES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def emulated():
    library = BUILD / "tests" / "cuda" / "libmoba_torch_emulated.so"
    if not library.exists():
        pytest.fail(
            f"{library} is missing: `make test-cpp` builds it, MOBA_BUILD_DIR names another folder"
        )
    torch.ops.load_library(str(library))
    return torch.ops.moba_emulated


def close(found, expected, dtype, times=1):
    torch.testing.assert_close(
        found.double(),
        expected.double(),
        atol=times * ROUNDING[dtype],
        rtol=times * ROUNDING[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_backward_and_select_match_float64(emulated, dtype):
    q, k, v, cu, _ = batch([40, 0, 1, 90], 4, 2, 64, dtype)
    arguments = (cu, cu, 16, 3)
    out, lse, selection = emulated.attention(q, k, v, *arguments, return_selection=True)
    assert torch.equal(emulated.select(q, k, *arguments), selection)
    d_out = torch.randn(out.shape).to(dtype)
    gradients = emulated.attention_backward(d_out, q, k, v, out, lse, selection, *arguments)

    wide = [t.double().requires_grad_() for t in (q, k, v)]
    expected, expected_lse = dense_given(*wide, selection, torch.arange(out.shape[0]), cu, cu, 16)
    close(out, expected, dtype)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-4)
    for found, right in zip(gradients, torch.autograd.grad(expected, wide, d_out.double())):
        close(found, right, dtype, 3)


@pytest.mark.parametrize("heads", (4, 2, 1))
def test_the_callers_selection_matches_the_cpu(emulated, heads):
    q, k, v, cu, _ = batch([40, 0, 1, 90], 4, 2, 64, torch.bfloat16)
    selection = ops.select(q, k, cu, cu, 16, 3)[:: 4 // heads].contiguous()
    arguments = (cu, cu, 16, 0)
    out, lse, _ = emulated.attention(q, k, v, *arguments, selection=selection)
    expected, expected_lse, _ = ops.attention(q, k, v, *arguments, selection=selection)
    close(out, expected, torch.bfloat16)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-4)
    saved = (torch.randn_like(out), q, k, v, expected, expected_lse, selection, *arguments)
    for found, wanted in zip(emulated.attention_backward(*saved), ops.attention_backward(*saved)):
        close(found, wanted, torch.bfloat16, 3)


def test_gates_and_features_match_the_cpu(emulated):
    gate_q, k, _, cu, _ = batch([40, 0, 1, 90], 4, 2, 64, torch.bfloat16)
    features = [
        torch.cat(parts)
        for parts in zip(*(emulated.block_features(t, len(t), 16) for t in k.split([40, 1, 90])))
    ]
    expected = [
        torch.cat(parts)
        for parts in zip(*(ops.block_features(t, len(t), 16) for t in k.split([40, 1, 90])))
    ]
    torch.testing.assert_close(features[0], expected[0], atol=1e-2, rtol=1e-2)
    assert torch.equal(features[1], expected[1]) and torch.equal(features[2], expected[2])
    gate_k = torch.randint(-3, 4, (10, 2, 64)).bfloat16()
    gate_q = torch.randint(-3, 4, gate_q.shape).bfloat16()
    arguments = (gate_q, gate_k, cu, cu, 16, 3)
    assert torch.equal(emulated.select_by_gate(*arguments), ops.select_by_gate(*arguments))


def test_decode_over_the_callers_selection_matches_the_cpu(emulated):
    q, keys, values, means, begin, end = cached(torch.bfloat16)
    own = (end - begin - 1) // 8
    selection = torch.stack([torch.zeros_like(own), own], -1).expand(2, 3, 2).contiguous()
    arguments = (q, keys, values, means[:, :0], begin, end, 8, 0)
    out, lse = emulated.decode(*arguments, selection=selection)
    arguments = (q, keys, values, means[:, :0].float(), begin, end, 8, 0)
    expected, expected_lse = ops.decode(*arguments, selection=selection)
    close(out, expected, torch.bfloat16)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-4)


def test_strided_inputs_give_the_same_bits(emulated):
    q, k, v, cu, _ = batch([70], 2, 2, 64, torch.bfloat16)
    expected = emulated.attention(q, k, v, cu, cu, 16, 3)[0]
    wide = torch.cat([q, q], dim=-1)[..., 1:65].copy_(q)  # rows off 16 bytes
    spread = torch.stack([k, k], dim=-1)[..., 0]
    heads_first = v.transpose(0, 1).contiguous().transpose(0, 1)
    apart = cu.repeat_interleave(2)[::2]
    assert torch.equal(
        emulated.attention(wide, spread, heads_first, apart, apart, 16, 3)[0], expected
    )


def check_decode(emulated, call, *routing):
    q, keys, values, means, begin, end = call
    out, lse = emulated.decode(*call, *routing)
    expected, expected_lse = ops.decode(q, keys, values, means.float(), begin, end, *routing)
    close(out, expected, q.dtype)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("routing", ((8, 3), (8, 4, 1), (8, 1), (8, 100), (8, 3, 0, -0.3)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_matches_the_cpu(emulated, dtype, routing):
    check_decode(emulated, cached(dtype), *routing)


def test_decode_takes_strided_caches(emulated):
    call = cached(torch.bfloat16)
    expected = emulated.decode(*call, 8, 3)
    q, keys, values, means, begin, end = call

    def same(*changed):
        assert all(torch.equal(a, b) for a, b in zip(emulated.decode(*changed, 8, 3), expected))

    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (keys, values)]
    same(q, *heads_first, means, begin, end)
    ahead = [
        torch.cat([t, torch.full_like(t, torch.nan)], dim=1)[:, :60] for t in (keys, values)
    ]  # memory of a growing cache
    same(q, *ahead, torch.cat([means, means], dim=1)[:, :7], begin, end)
    off = torch.cat([keys, keys], dim=-1)[..., 1:65].copy_(keys)  # rows off 16 bytes
    same(q, off, values, means, begin.repeat_interleave(2)[::2], end)
    for row in range(3):  # a batch of one, whose stride is arbitrary
        one = torch.as_strided(
            keys[row], (1, *keys.shape[1:]), (3, *keys.stride()[1:]), keys[row].storage_offset()
        )
        out, lse = emulated.decode(
            q[row][None],
            one,
            values[row][None],
            means[row][None],
            begin[row][None],
            end[row][None],
            8,
            3,
        )
        assert torch.equal(out[0], expected[0][row]) and torch.equal(lse[:, 0], expected[1][:, row])


def test_decoding_empty_batches_is_legal(emulated):
    q, keys, values, means, begin, end = cached(torch.float16)
    empty = emulated.decode(q[:0], keys[:0], values[:0], means[:0], begin[:0], end[:0], 8, 3)
    assert empty[0].shape == (0, 4, 64) and empty[1].shape == (4, 0)
    for tokens in (keys, keys[:, :0]):
        out, lse = emulated.decode(q, tokens, tokens, means, begin * 0, end * 0, 8, 3)
        assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {0: torch.zeros(3, 4, 64)},
            "decode: .*k: expected the dtype of q, f32, got bf16|decode: q: expected bf16 or f16",
        ),
        (
            {0: torch.zeros(2, 4, 64, dtype=torch.bfloat16)},
            r"decode: k: expected \[2, tokens or blocks.*got sizes \[3, 60, 2, 64\]",
        ),
        ({1: torch.zeros(3, 60, 3, 64, dtype=torch.bfloat16)}, r"decode: v: expected"),
        ({3: torch.zeros(3, 6, 2, 64, dtype=torch.bfloat16)}, r"decode: means: expected .*7 .*got"),
        ({3: torch.zeros(3, 7, 2, 64)}, r"decode: means: expected the dtype of k, bf16, got f32"),
        (
            {4: torch.zeros(2, dtype=torch.int32)},
            "decode: begin, end: expected 3 entries .*, got 2 and 3",
        ),
        ({5: torch.zeros(3, dtype=torch.int64)}, "decode: end: expected .*, got Long"),
        ({7: 0}, "decode: top_k: expected at least 1, got 0"),
    ],
)
def test_invalid_arguments_of_decode_are_named(emulated, change, message):
    call = dict(enumerate([*cached(torch.bfloat16), 8, 3])) | change
    with pytest.raises((RuntimeError, ValueError), match=message):
        emulated.decode(*call.values())


def decode_on(emulated, monkeypatch):
    """Make the package decode CPU tensors on the emulated device; return the list that collects the calls of decode."""
    calls = []

    def decode(*arguments):
        calls.append(arguments)
        return emulated.decode(*arguments)

    monkeypatch.setattr(wrapper.ops, "decode", decode)
    for module in (wrapper, cache):
        monkeypatch.setattr(module, "means_dtype", lambda keys: keys.dtype)
    return calls


@pytest.mark.parametrize("decode", ("full", "moba"))
def test_model_decodes_on_the_emulated_device(emulated, monkeypatch, decode):
    # One layer, because its rounding could make the next layer select other blocks.
    model = build(
        "llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=64
    ).to(torch.bfloat16)
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    moba.register_moba(moba.MoBAConfig(8, 3, decode=decode))
    model.set_attn_implementation("moba")

    def steps():
        past = moba.MobaCache()
        with torch.no_grad():
            model(ids[:, :25], attention_mask=mask[:, :25], past_key_values=past)
            return [
                model(
                    ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=past
                ).logits
                for i in range(25, 40)
            ]

    expected = steps()
    calls = decode_on(emulated, monkeypatch)
    for found, right in zip(steps(), expected):
        assert (found - right).float().norm() < 0.02 * right.float().norm()
    assert len(calls) == 15
    means = calls[-1][3]
    assert means.dtype == torch.bfloat16 and (means.shape[1] > 0) == (decode == "moba")


def test_decode_is_used_for_supported_cuda_tensors(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    called = []

    def counting(name):
        operator = getattr(ops, name)
        monkeypatch.setattr(
            wrapper.ops, name, lambda *a, **k: called.append(name) or operator(*a, **k)
        )

    counting("decode")
    counting("attention")
    full, sparse = (moba.MoBAConfig(8, 3, decode=name) for name in ("full", "moba"))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for config, dtype, head_dim, expected in (
            (full, torch.bfloat16, 128, "decode"),
            (full, torch.float16, 96, "decode"),
            (full, torch.float32, 128, "attention"),
            (full, torch.bfloat16, 80, "attention"),
            (sparse, torch.bfloat16, 128, "attention"),  # the cache keeps no means
        ):
            q = torch.empty(2, 4, 1, head_dim, dtype=dtype, device="cuda")
            k = torch.empty(2, 2, 50, head_dim, dtype=dtype, device="cuda")
            out, _ = wrapper.moba_layer(config, False, torch.nn.Module(), q, k, k)
            assert out.shape == (2, 1, 4, head_dim) and out.device.type == "cuda"
            assert called.pop() == expected and not called


def test_a_mask_is_read_once_for_all_layers():
    mask = torch.tensor([[0, 1, 3, 9]], dtype=torch.int32)[:, None, None]
    assert wrapper._begins(mask, 1) == [3]
    mask[..., 2] = 0
    assert wrapper._begins(mask, 1) == [3]
    assert wrapper._begins(None, 2) == [0, 0]
