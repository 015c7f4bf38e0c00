"""The operators on a CUDA device, against float64 and the CPU. Tests that need a device are skipped without one."""

import moba
import pytest
import torch
from packed import batch, cached, dense_given, offsets

ops = moba.ops
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def there(*tensors):
    return [t.cuda() for t in tensors]


def gradients_of(out, leaves, d_out):
    return torch.autograd.grad(out, leaves, d_out)


CASES = [
    ([1, 0, 700, 65], 4, 2, 64, 64, 3),
    ([2048], 4, 1, 128, 128, 4),
    ([1000, 3], 6, 3, 96, 100, 3),
    ([513], 2, 2, 256, 32, 5),
    ([300, 300], 8, 8, 128, 512, 3),
    ([1500], 3, 1, 64, 1, 9),
]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_against_float64(case, dtype):
    lengths, heads, kv_heads, head_dim, block_size, top_k = case
    q, k, v, cu, _ = batch(lengths, heads, kv_heads, head_dim, dtype)
    leaves = [t.requires_grad_() for t in there(q, k, v)]
    out, lse, selection = ops.attention(
        *leaves, *there(cu, cu), block_size, top_k, return_selection=True
    )
    d_out = torch.randn(out.shape).to(dtype)
    gradients = gradients_of(out, leaves, d_out.cuda())

    wide = [t.double().requires_grad_() for t in (q, k, v)]
    rows = torch.arange(out.shape[0])
    expected, expected_lse = dense_given(*wide, selection.cpu(), rows, cu, cu, block_size)
    right = gradients_of(expected, wide, d_out.double())
    for name, found, wanted, times in zip(
        "o q k v".split(), (out, *gradients), (expected, *right), (1, 3, 3, 3)
    ):
        error = (found.double().cpu() - wanted).abs().max()
        assert error <= times * ROUNDING[dtype] * max(1.0, wanted.abs().max().item()), (
            f"{name}: {error}"
        )
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=1e-3, rtol=1e-4)

    chosen = ops.select(q.detach(), k.detach(), cu, cu, block_size, top_k, backend="reference")
    assert (chosen != selection.cpu()).any(
        -1
    ).float().mean() <= 0.02  # scores within rounding of each other
    assert torch.equal(ops.select(*leaves[:2], *there(cu, cu), block_size, top_k), selection)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_attention_is_as_accurate_as_that_of_torch(dtype):
    q, k, v, cu, _ = batch([1500], 4, 4, 128, dtype)
    d_out = torch.randn(q.shape).to(dtype)

    def dense(*tensors):
        heads_first = [t.transpose(0, 1)[None] for t in tensors]
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)[
            0
        ].transpose(0, 1)

    def ours(q, k, v):
        return ops.attention(q, k, v, cu.cuda(), cu.cuda(), 512, 3)[0]

    results = []
    for attend, tensors in (
        (dense, [t.double() for t in (q, k, v)]),
        (dense, there(q, k, v)),
        (ours, there(q, k, v)),
    ):
        leaves = [t.requires_grad_() for t in tensors]
        out = attend(*leaves)
        results.append([t.double().cpu() for t in (out, *gradients_of(out, leaves, d_out.to(out)))])
    right, theirs, found = results
    for times, a, b, c in zip((2, 3, 3, 3), right, theirs, found):
        assert (c - a).abs().max() <= times * (b - a).abs().max()


@on_gpu
def test_strided_inputs_give_the_same_bits():
    q, k, v, cu, _ = batch([300], 2, 2, 64, torch.bfloat16)
    q, k, v, cu = there(q, k, v, cu)
    expected = ops.attention(q, k, v, cu, cu, 32, 3)[0]
    wide = torch.cat([q, q], dim=-1)[..., 1:65].copy_(q)  # rows off 16 bytes
    spread = torch.stack([k, k], dim=-1)[..., 0]
    heads_first = v.transpose(0, 1).contiguous().transpose(0, 1)
    apart = cu.repeat_interleave(2)[::2]
    assert torch.equal(ops.attention(wide, spread, heads_first, apart, apart, 32, 3)[0], expected)
    leaf = q.clone().requires_grad_()
    ops.attention(leaf, k, v, cu, cu, 32, 3)[0].sum().backward()  # a gradient of strides 0
    assert torch.isfinite(leaf.grad).all()


@on_gpu
@pytest.mark.parametrize("lengths", ([], [0], [0, 0], [3, 0, 5, 0]))
def test_empty_batches_are_legal(lengths):
    q, k, v, cu, _ = batch(lengths, 2, 2, 64, torch.float16)
    leaves = [t.requires_grad_() for t in there(q, k, v)]
    out, lse, selection = ops.attention(*leaves, *there(cu, cu), 4, 2, return_selection=True)
    assert selection.shape == ops.select(*leaves[:2], *there(cu, cu), 4, 2).shape
    assert torch.isfinite(out).all() and lse.shape == (2, sum(lengths))
    out.sum().backward()


@on_gpu
def test_a_thousand_repetitions_give_the_same_bits():
    q, k, v, cu, _ = batch([900, 124], 4, 2, 64, torch.bfloat16)
    leaves = [t.requires_grad_() for t in there(q, k, v)]
    cu = cu.cuda()
    first = None
    for _ in range(1000):
        out = ops.attention(*leaves, cu, cu, 32, 4)[0]
        results = (out, *gradients_of(out, leaves, out.detach()))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first))


def capture(step):
    """Return a graph of the step and its output, after checking that the step does not synchronise."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@on_gpu
def test_calls_do_not_synchronise_and_can_be_captured():
    q, k, v, cu, _ = batch([500, 30], 4, 2, 128, torch.bfloat16)
    q, k, v, cu = there(q, k, v, cu)

    def step():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = moba.functional.varlen(*leaves, cu, cu, 64, 3)[0]
        return (out, *gradients_of(out, leaves, out.detach()))

    graph, captured = capture(step)
    for lengths in ([500, 30], [1, 529]):  # other values, and other sequences of as many tokens
        for t in (q, k, v):
            t.normal_()
        cu.copy_(offsets(lengths))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@on_gpu
def test_calls_use_the_current_stream_and_torchs_memory():
    q, k, v, cu, _ = batch([4000], 2, 2, 64, torch.bfloat16)
    q, k, v, cu = there(q, k, v, cu)
    expected = ops.attention(q, k, v, cu, cu, 64, 3)[0]
    held = torch.cuda.memory_allocated()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late = q * 1  # the input of the call is ready only after the pause
        found = ops.attention(late, k, v, cu, cu, 64, 3)[0]
    side.synchronize()
    assert torch.equal(found, expected)
    del late, found
    assert torch.cuda.memory_allocated() == held


@on_gpu
def test_out_of_memory_raises_once():
    q, k, v, cu, _ = batch([100_000], 8, 8, 128, torch.bfloat16)
    q, k, v, cu = there(q, k, v, cu)
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / whole)
    try:
        with pytest.raises(RuntimeError):
            ops.attention(q, k, v, cu, cu, 128, 8)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    few = offsets([100]).cuda()
    assert torch.isfinite(ops.attention(q[:100], k[:100], v[:100], few, few, 16, 3)[0]).all()


@on_gpu
def test_invalid_arguments_are_named():
    q, k, v, cu, _ = batch([20], 2, 2, 64)
    call = dict(
        q=q.half().cuda(),
        k=k.half().cuda(),
        v=v.half().cuda(),
        cu_seqlens_q=cu.cuda(),
        cu_seqlens_k=cu.cuda(),
    )

    def refused(message, error=ValueError, **change):
        with pytest.raises(error, match=message):
            ops.attention(**(call | change), block_size=4, top_k=2)

    refused("q: expected bf16 or f16 .*, got f32", q=q.cuda(), k=k.cuda(), v=v.cuda())
    refused("cu_seqlens_q: expected device", cu_seqlens_q=cu)
    refused("k: expected device", k=k.half())
    refused("backend: expected", backend="cpu")
    narrow = {name: call[name][..., :40].contiguous() for name in "qkv"}
    refused("head_dim 64, 96, 128 or 256 .*, got 40", **narrow)
    refused("empty", cu_seqlens_q=cu[:0].cuda(), cu_seqlens_k=cu[:0].cuda())
    cache = [
        *call["k"][None, None].expand(2, 20, 20, 2, 64),
        torch.zeros(20, 5, 2, 64).half().cuda(),
    ]
    spans = there(cu[:1].expand(20), cu[1:].expand(20))
    ops.decode(call["q"], *cache, *spans, 4, 2)
    with pytest.raises(TypeError, match="decode: means: expected torch.float16, got torch.float32"):
        ops.decode(call["q"], *cache[:2], cache[2].float(), *spans, 4, 2)
    with pytest.raises(ValueError, match=r"decode: means: expected .*, got"):
        ops.decode(call["q"], *cache[:2], cache[2][:, :3], *spans, 4, 2)


@on_gpu
def test_autocast_compile_and_opcheck_pass():
    q, k, v, cu, _ = batch([100], 2, 2, 64)
    q, k, v, cu = there(q, k, v, cu)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert ops.attention(q, k, v, cu, cu, 8, 3)[0].dtype == torch.bfloat16
    half = [t.half().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(ops.attention, (*half, cu, cu, 8, 3))
    compiled = torch.compile(
        lambda *a: ops.attention(*a, cu, cu, 8, 3)[0] * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*half), ops.attention(*half, cu, cu, 8, 3)[0] * 2)


@on_gpu
def test_batches_and_varlen_functions_match():
    q, k, v = (torch.randn(2, 200, heads, 64).bfloat16() for heads in (4, 2, 2))
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, :30] = False
    here = moba.attention(q, k, v, block_size=32, top_k=3, padding_mask=mask)
    found = moba.attention(*there(q, k, v), block_size=32, top_k=3, padding_mask=mask.cuda())
    assert (found.cpu() != here).any(-1).float().mean() < 0.9  # rounding, in most rows
    torch.testing.assert_close(found.cpu(), here, atol=4e-2, rtol=2e-2)
    packed = [t[1] for t in there(q, k, v)]
    cu = offsets([150, 50]).cuda()
    fast, slow = (
        attend(*packed, cu, 150, 32, 3)
        for attend in (moba.moba_attn_varlen, moba.moba_attn_varlen_naive)
    )
    torch.testing.assert_close(fast, slow, atol=4e-2, rtol=2e-2)


DECODED = [
    ((3, 500, 8, 2, 64, 32), (32, 4, 1)),
    ((1, 3000, 32, 8, 128, 128), (128, 3)),
    ((2, 700, 20, 1, 96, 50), (50, 5)),
    ((2, 400, 4, 4, 256, 16), (16, 1)),
    ((2, 900, 4, 2, 128, 64), (64, 1000)),
]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, routing", DECODED, ids=str)
def test_decode_matches_the_cpu(shape, routing, dtype):
    q, keys, values, means, begin, end = cached(dtype, *shape)
    expected, expected_lse = ops.decode(q, keys, values, means.float(), begin, end, *routing)
    call = there(q, keys, values, means, begin, end)
    out, lse = ops.decode(*call, *routing)
    error = (out.double().cpu() - expected.double()).abs().max()
    assert error <= ROUNDING[dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(lse.cpu(), expected_lse, atol=1e-3, rtol=1e-4)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in call[1:3]]
    assert torch.equal(ops.decode(call[0], *heads_first, *call[3:], *routing)[0], out)
    for _ in range(100):
        assert torch.equal(ops.decode(*call, *routing)[0], out)


@on_gpu
def test_captured_decode_follows_the_cache():
    q, keys, values, means, begin, end = there(*cached(torch.bfloat16, 2, 400, 8, 2, 128, 32))

    def step():
        return ops.decode(q, keys, values, means, begin, end, 32, 3)[0]

    graph, captured = capture(step)
    for length in (400, 1, 100, 0):
        end.copy_(begin + length if length < 300 else end)
        q.normal_()
        graph.replay()
        assert torch.equal(captured, step())


@on_gpu
def test_decode_steps_of_a_model_match_its_prefill():
    models = pytest.importorskip("random_models")
    model = models.build("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=64).to(
        "cuda", torch.bfloat16
    )
    moba.register_moba(moba.MoBAConfig(16, 3, decode="moba"))
    model.set_attn_implementation("moba")
    ids = models.random_ids(2, 150).cuda()
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for cache in (None, moba.MobaCache()):
            step = model(
                ids[:, :100], attention_mask=mask[:, :100], past_key_values=cache, use_cache=True
            )
            steps = []
            for i in range(100, 150):
                step = model(
                    ids[:, i : i + 1],
                    attention_mask=mask[:, : i + 1],
                    past_key_values=step.past_key_values,
                )
                steps.append(step.logits[:, 0])
            error = (torch.stack(steps, 1) - whole[:, 100:]).float().norm(dim=-1) / whole[
                :, 100:
            ].float().norm(dim=-1)
            assert (
                error.median() < 0.05 and (error > 0.3).float().mean() <= 0.1
            )  # rounding may select another block


@on_gpu
@pytest.mark.parametrize("decode", ("full", "moba"))
def test_a_model_generates(decode):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    moba.register_moba(moba.MoBAConfig(16, 3, decode=decode))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    model.set_attn_implementation("moba")
    ids = torch.randint(1, 64, (2, 100), device="cuda")
    plain, kept = (
        model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
        for cache in (None, moba.MobaCache())
    )
    assert plain.shape == kept.shape == (2, 106)
    assert decode == "moba" or torch.equal(
        plain, kept
    )  # "moba" without means goes through attention, which rounds otherwise


def test_operators_have_cuda_kernels():
    for name in ("attention", "attention_backward", "select", "decode"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moba::{name}", "CUDA")


def test_build_without_cuda_refuses_cuda():
    q, k, v, cu, _ = batch([20], 2, 2, 64, torch.float16)
    with pytest.raises(ValueError) as refused:
        ops.attention(q, k, v, cu, cu, 4, 2, backend="cuda")
    if "is not in this build" not in str(refused.value):
        pytest.skip("this package was built with CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for call in (
        lambda: ops.attention.redispatch(keys, q, k, v, cu, cu, 4, 2),
        lambda: ops.select.redispatch(keys, q, k, cu, cu, 4, 2),
    ):
        with pytest.raises(
            (ValueError, RuntimeError),
            match="q: expected a CPU tensor, got a CUDA one: this package was built without CUDA",
        ):
            call()


def test_traced_call_on_cuda_needs_no_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = (
            torch.empty(2, 50, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2)
        )
        out, blocks = moba.attention(q, k, k, block_size=8, top_k=3, return_selection=True)
    assert out.device.type == blocks.device.type == "cuda"
    assert out.shape == q.shape and blocks.shape == (2, 4, 50, 3)
