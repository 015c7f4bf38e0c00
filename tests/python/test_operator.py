"""The operator against dense attention and the reference, and with torch's transforms: compile, export, vmap, autocast."""

import os
import random
import resource
import subprocess
from pathlib import Path

import moba
import pytest
import torch
from packed import batch, dense_given, offsets
from torch.utils.checkpoint import checkpoint

ops = moba.ops
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = next(Path(moba.__file__).parent.glob("libmoba_torch.*"))


def test_the_library_uses_no_cpp_symbol_of_torch():
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()]
    of_torch = [name for name in names if "torch" in name or "c10" in name or "2at" in name]
    assert len(of_torch) > 10
    assert not [name for name in of_torch if name.startswith("_Z")]
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in of_torch)


CASES = int(os.environ.get("MOBA_TEST_CASES", 60))


def grid(longest, seed):
    """Return random cases in which every value of every dimension is equally frequent."""
    rng = random.Random(seed)

    def spread(values):
        values = list(values) * (CASES // len(values) + 1)
        rng.shuffle(values)
        return values[:CASES]

    heads = [(q, kv) for q in range(1, 9) for kv in range(1, q + 1) if q % kv == 0]
    dimensions = {
        "lengths": [
            [length, *rng.choices((0, 1, 3, 64, 65, 200), k=sequences - 1)]
            for sequences, length in zip(spread(range(1, 8)), spread(longest))
        ],
        "heads": spread(heads),
        "head_dim": spread((1, 8, 16, 40, 64, 80, 128)),
        "dtype": spread(DTYPES),
        "block_size": spread((1, 2, 3, 8, 16, 31, 64, 100, 128, 256, 512, 1000, 1024)),
        "top_k": spread(range(1, 9)),
    }
    return [dict(zip(dimensions, case), seed=i) for i, case in enumerate(zip(*dimensions.values()))]


def name_of(case):
    return f"{case['lengths']} {case['heads']}x{case['head_dim']} {case['dtype']} {case['block_size']},{case['top_k']}"


def of_case(case, **options):
    q, k, v, cu_q, cu_k = batch(
        case["lengths"], *case["heads"], case["head_dim"], case["dtype"], case["seed"], **options
    )
    return [t.requires_grad_() for t in (q, k, v)], (cu_q, cu_k, case["block_size"], case["top_k"])


def some_rows(rng, tokens):
    """Return at most 300 of the rows, with the first and the last."""
    rows = [0, tokens - 1, *(rng.randrange(tokens) for _ in range(300))]
    return torch.tensor(sorted(set(rows)))


@pytest.mark.parametrize(
    "case", grid((1, 2, 17, 63, 64, 200, 500, 1000, 1025, 2048, 3000, 4096), 1), ids=name_of
)
def test_forward_and_backward_against_float64(case):
    leaves, routing = of_case(case)
    out, lse, selection = ops.attention(*leaves, *routing, return_selection=True)
    rows = some_rows(random.Random(case["seed"]), out.shape[0])
    d_out = torch.zeros_like(out)
    d_out[rows] = torch.randn(len(rows), *out.shape[1:]).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, d_out)

    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected, expected_lse = dense_given(*wide, selection, rows, *routing[:3])
    # The backward pass reads the output as it was rounded: delta = sum(d_out out), the gradient through lse, is that of `out`.
    weights = d_out[rows].double()
    rounded = ((expected.detach() - out[rows].double()) * weights).sum(-1).T
    seen = expected_lse.isfinite()
    loss = (expected * weights).sum() + (rounded[seen] * expected_lse[seen]).sum()
    expected_gradients = torch.autograd.grad(loss, wide)
    rounding = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[out.dtype]
    for name, found, right in zip(
        "o q k v".split(), (out[rows], *gradients), (expected, *expected_gradients)
    ):
        error = (found.double() - right).abs().max()
        assert error <= rounding * max(1.0, right.abs().max().item()), f"{name}: {error}"
    torch.testing.assert_close(lse[:, rows].double(), expected_lse.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", grid((1, 5, 64, 100, 150), 2), ids=name_of)
def test_cpu_and_reference_agree(case):
    rng = random.Random(case["seed"])
    leaves, routing = of_case(
        case, key_lengths=[length + rng.choice((0, 3, 64)) for length in case["lengths"]]
    )
    sinks = min(case["seed"] % 2, case["top_k"] - 1)
    fast, slow = (
        ops.attention(*leaves, *routing, sinks, return_selection=True, backend=backend)
        for backend in ("cpu", "reference")
    )
    swapped = (fast[2] != slow[2]).any(-1).any(0)
    assert swapped.float().mean() <= 0.02  # scores within the rounding of a dot product
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[fast[0].dtype]
    torch.testing.assert_close(fast[0][~swapped], slow[0][~swapped], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(fast[1][:, ~swapped], slow[1][:, ~swapped], atol=1e-5, rtol=1e-5)

    d_out = torch.randn(fast[0].shape).to(fast[0].dtype).masked_fill(swapped[:, None, None], 0)
    for found, expected in zip(
        *(torch.autograd.grad(out, leaves, d_out) for out in (fast[0], slow[0]))
    ):
        scale = max(1.0, expected.abs().max().item()) * (4 if case["head_dim"] == 1 else 1)
        torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selecting_every_block_is_dense_attention(dtype):
    q, k, v, cu, _ = batch([300], 8, 2, 64, dtype)
    out, _, _ = ops.attention(q, k, v, cu, cu, 64, 5)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None].double() for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    error = (out.double() - dense[0].transpose(0, 1)).abs().max()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]


def test_select_matches_attention():
    q, k, v, cu, _ = batch([100, 0, 33])
    selection = ops.attention(q, k, v, cu, cu, 8, 3, 1, return_selection=True)[2]
    assert torch.equal(selection, ops.select(q, k, cu, cu, 8, 3, 1))
    assert (selection.diff(dim=-1) > 0).logical_or(selection[..., 1:] < 0).all()
    assert (selection[:, 50, 0] == 0).all()  # the sink
    assert (selection[:, 50] == 50 // 8).any(-1).all()  # its own block


def test_packed_batch_matches_each_sequence_alone():
    lengths = [40, 0, 1, 17, 90]
    q, k, v, cu, _ = batch(lengths)
    together = ops.attention(q, k, v, cu, cu, 8, 3, return_selection=True)
    for first, last in zip(cu.tolist(), cu[1:].tolist()):
        part = slice(first, last)
        one = offsets([last - first])
        alone = ops.attention(q[part], k[part], v[part], one, one, 8, 3, return_selection=True)
        torch.testing.assert_close(alone[0], together[0][part], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone[1], together[1][:, part], atol=1e-5, rtol=1e-5)
        width = alone[2].shape[2]
        assert torch.equal(alone[2], together[2][:, part, :width])
        assert (together[2][:, part, width:] == -1).all()


def strided(t):
    """Return the same values with the heads outermost in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def test_strided_inputs_give_the_same_bits_without_copies():
    q, k, v, cu, _ = batch([120])
    expected = ops.attention(q, k, v, cu, cu, 16, 3)
    views = [strided(t) for t in (q, k, v)]
    assert not any(t.is_contiguous() for t in views)
    with torch.profiler.profile() as profile:
        found = ops.attention(*views, cu, cu, 16, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    copied = [
        e.key
        for e in profile.key_averages()
        if "copy" in e.key or "clone" in e.key or "contiguous" in e.key
    ]
    assert copied == []
    spread = torch.stack([q, q], dim=-1)[..., 0]  # a last dimension of stride 2 is copied
    assert torch.equal(ops.attention(spread, k, v, cu, cu, 16, 3)[0], expected[0])
    one_key = ops.attention(q, k[:1].expand(120, 2, 16), v, cu, cu, 16, 3)[0]  # stride 0
    assert torch.isfinite(one_key).all()


def test_bits_are_the_same_for_any_number_of_threads():
    q, k, v, cu, _ = batch([700, 300], 6, 2, 32)
    before = torch.get_num_threads()
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = ops.attention(*leaves, cu, cu, 32, 3)[0]
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("return_selection", (False, True))
def test_opcheck(dtype, return_selection):
    q, k, v, cu, _ = batch([10, 0, 27], dtype=dtype)
    forward = ops.attention(q, k, v, cu, cu, 4, 3, return_selection=return_selection)
    for t in (q, k, v):
        t.requires_grad_()
    options = {"return_selection": return_selection}
    torch.library.opcheck(ops.attention, (q, k, v, cu, cu, 4, 3), options)
    torch.library.opcheck(ops.select, (q, k, cu, cu, 4, 3))
    inputs = [t.detach() for t in (q, q, k, v)]
    torch.library.opcheck(ops.attention_backward, (*inputs, *forward, cu, cu, 4, 3))
    cache = torch.randn(2, 3, 9, 2, 16).to(dtype)
    means = torch.randn(2, 2, 2, 16)
    span = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([9, 7], dtype=torch.int32)
    torch.library.opcheck(
        ops.decode, (torch.randn(2, 4, 16).to(dtype), *cache[:, :2].unbind(0), means, *span, 4, 2)
    )


def test_gradcheck():
    q, k, v, cu, _ = batch([4, 3], 2, 1, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for top_k in (1, 2, 9):
        assert torch.autograd.gradcheck(
            lambda q, k, v: ops.attention(q, k, v, cu, cu, 2, top_k)[0], leaves
        )


def test_the_gradient_is_the_same_with_and_without_a_saved_selection():
    q, k, v, cu, _ = batch([50, 200])
    gradients = []
    for keep in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = ops.attention(*leaves, cu, cu, 16, 3, return_selection=keep)[0]
        gradients.append(torch.autograd.grad(out.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("tokens, kept", [(64, False), (320, True)])
def test_a_selection_is_kept_for_the_gradient_where_it_is_costly_to_repeat(tokens, kept):
    q, k, v = (torch.randn(1, tokens, 2, 16, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = moba.attention(q, k, v, block_size=16, top_k=3)
    selections = [t for t in saved if t.dtype == torch.int32 and t.dim() == 3]
    assert [t.numel() > 0 for t in selections] == [kept]
    again = moba.attention(q, k, v, block_size=16, top_k=3, backend="reference")
    for ours, wanted in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(again.sum(), (q, k, v))
    ):
        assert torch.allclose(ours, wanted, atol=1e-5)


def test_second_derivatives_are_refused():
    q, k, v, cu, _ = batch([20])
    q.requires_grad_()
    (dq,) = torch.autograd.grad(ops.attention(q, k, v, cu, cu, 4, 2)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        dq.sum().backward()


def doubled(q, k, v, cu):
    return ops.attention(q * 2, k, v, cu, cu, 8, 3)[0].sin()


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ([30, 20], [64], [5, 0, 100]):
        q, k, v, cu, _ = batch(lengths)
        results = []
        for function in (doubled, compiled):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = function(*leaves, cu)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_batched_attention_compiles():
    torch._dynamo.reset()

    def model(q, k, v, mask):
        return moba.attention(q, k, v, block_size=8, top_k=2, padding_mask=mask)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (30, 41):
        q, k, v = (torch.randn(2, tokens, heads, 16) for heads in (4, 2, 2))
        mask = torch.ones(2, tokens, dtype=torch.bool)
        mask[0, :7] = False
        torch.testing.assert_close(compiled(q, k, v, mask), model(q, k, v, mask))


def test_exported_model_matches_eager():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return moba.attention(q, k, v, block_size=8, top_k=2)

    q, k, v = (torch.randn(1, 40, heads, 16) for heads in (4, 2, 2))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(Model(), (q, k, v), dynamic_shapes=[{1: tokens}] * 3)
    longer = tuple(torch.randn(1, 77, heads, 16) for heads in (4, 2, 2))
    torch.testing.assert_close(exported.module()(*longer), Model()(*longer))


def test_autocast_computes_in_its_dtype():
    q, k, v, cu, _ = batch([50])
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _, _ = ops.attention(q, k.bfloat16(), v, cu, cu, 8, 3)
        batched = moba.attention(q[None], k[None].bfloat16(), v[None], block_size=8, top_k=3)
    assert out.dtype == batched.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    expected = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu, cu, 8, 3)[0]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    q, k, v, cu, _ = batch([60])
    results = []
    for wrapped in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = (
            checkpoint(doubled, *leaves, cu, use_reentrant=use_reentrant)
            if wrapped
            else doubled(*leaves, cu)
        )
        results.append(
            torch.autograd.grad(out.sum(), leaves) if not use_reentrant else backward(out, leaves)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


def backward(out, leaves):
    out.sum().backward()
    return [t.grad for t in leaves]


def test_vmap_matches_a_loop():
    q, k, v = (torch.randn(3, 37, heads, 16) for heads in (4, 2, 2))
    cu = offsets([10, 0, 27])

    def attend(q, k, v):
        return ops.attention(q, k, v, cu, cu, 4, 3, return_selection=True)

    mapped = torch.func.vmap(attend, in_dims=(0, 0, None))(q, k, v[0])
    for i in range(3):
        assert all(torch.equal(a[i], b) for a, b in zip(mapped, attend(q[i], k[i], v[0])))
    selected = torch.func.vmap(lambda q, k: ops.select(q, k, cu, cu, 4, 3), in_dims=1)(
        q.transpose(0, 1), k.transpose(0, 1)
    )
    assert torch.equal(selected, mapped[2])
    with pytest.raises(NotImplementedError, match="cu_seqlens"):
        torch.func.vmap(lambda q, cu: ops.attention(q, k[0], v[0], cu, cu, 4, 3))(
            q, cu.repeat(3, 1)
        )


def test_forward_mode_derivatives_are_refused():
    q, k, v, cu, _ = batch([20])
    tangents = {"q": (0,), "k": (1,), "v": (2,), "all": (0, 1, 2)}
    for which in tangents.values():
        primals = tuple((q, k, v)[i] for i in which)

        def attend(*given, which=which):
            arguments = [q, k, v]
            for i, t in zip(which, given):
                arguments[i] = t
            return ops.attention(*arguments, cu, cu, 4, 3)[0]

        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(attend, primals, tuple(torch.ones_like(t) for t in primals))
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in primals]
            with pytest.raises(NotImplementedError, match="forward-mode"):
                attend(*duals)
    with torch.autograd.forward_ad.dual_level():
        attend(*primals)  # without a tangent


def test_torch_func_gradients_are_refused_and_gradients_through_vmap_work():
    q, k, v, cu, _ = batch([20])
    with pytest.raises(NotImplementedError, match="torch.autograd.grad"):
        torch.func.grad(lambda q: ops.attention(q, k, v, cu, cu, 4, 2)[0].sum())(q)
    leaves = [torch.stack([t, t * 2]).requires_grad_() for t in (q, k, v)]
    mapped = torch.func.vmap(lambda q, k, v: ops.attention(q, k, v, cu, cu, 4, 2)[0])(*leaves)
    gradients = torch.autograd.grad(mapped.square().sum(), leaves)
    for i in range(2):
        alone = [t[i].detach().requires_grad_() for t in leaves]
        expected = torch.autograd.grad(ops.attention(*alone, cu, cu, 4, 2)[0].square().sum(), alone)
        for found, right in zip(gradients, expected):
            torch.testing.assert_close(found[i], right, atol=1e-5, rtol=1e-5)


def test_decode_matches_the_last_row_of_attention():
    keys = torch.randn(2, 50, 2, 16)
    values = torch.randn(2, 50, 2, 16)
    begin, end = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([50, 41], dtype=torch.int32)
    q = torch.randn(2, 4, 16)
    means = torch.zeros(2, 6, 2, 16)
    for row in range(2):
        blocks = (
            keys[row, begin[row] :][: (end[row] - begin[row]) // 8 * 8]
            .unflatten(0, (-1, 8))
            .mean(1)
        )
        means[row, : blocks.shape[0]] = blocks
    out, lse = ops.decode(q, keys, values, means, begin, end, 8, 3, 1)
    for row in range(2):
        part = slice(begin[row], end[row])
        cu_k = offsets([int(end[row] - begin[row])])
        expected = ops.attention(
            q[row][None], keys[row, part], values[row, part], offsets([1]), cu_k, 8, 3, 1
        )
        torch.testing.assert_close(out[row], expected[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, row], expected[1][:, 0], atol=1e-5, rtol=1e-5)


def test_padded_batch_of_attention_matches_each_row_alone():
    q, k, v = (torch.randn(3, 60, heads, 16).requires_grad_() for heads in (4, 2, 2))
    mask = torch.ones(3, 60, dtype=torch.bool)
    mask[0, :11] = mask[1, 40:] = mask[2, :5] = mask[2, 50:] = False
    out, lse, blocks = moba.attention(
        q, k, v, block_size=8, top_k=3, padding_mask=mask, return_lse=True, return_selection=True
    )
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (out[~mask] == 0).all()
    assert (lse.transpose(1, 2)[~mask] == -torch.inf).all()
    assert (blocks.transpose(1, 2)[~mask] == -1).all()
    assert all((gradient[~mask] == 0).all() for gradient in gradients)
    for row in range(3):
        alone = [t[row][mask[row]][None] for t in (q, k, v)]
        expected = moba.attention(*alone, moba.MoBAConfig(8, 3))
        torch.testing.assert_close(out[row][mask[row]], expected[0], atol=1e-5, rtol=1e-5)
        for found, right in zip(gradients, torch.autograd.grad(expected.square().sum(), (q, k, v))):
            torch.testing.assert_close(found[row], right[row], atol=1e-5, rtol=1e-4)


def test_noncausal_attention_over_every_block_is_dense():
    q, k, v = (torch.randn(2, 30, 4, 16) for _ in range(3))
    everything = moba.attention(q, k, v, block_size=8, top_k=4, causal=False)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v))
    ).transpose(1, 2)
    torch.testing.assert_close(everything, dense, atol=1e-5, rtol=1e-5)


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def test_many_small_calls_do_not_leak_memory():
    q, cu = torch.randn(1, 1, 16), offsets([1])
    before, kept = resident_megabytes(), []
    # Kept results lie between freed memory, because of which glibc once requested more memory at every call.
    for _ in range(4_000):
        kept.append([ops.attention(q, q, q, cu, cu, 16, 1) for _ in range(3)][0])
    assert resident_megabytes() - before < 60
