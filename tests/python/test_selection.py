"""Attention over blocks that the caller selects, against torch's attention with a mask in float64."""

import moba
import pytest
import torch
from packed import batch, cached

ops = moba.ops


def random_selection(lengths, key_lengths, heads, block_size, width, causal, seed=0):
    """Return random rows [heads, tokens, width] of blocks that each query may see, its own the last if causal."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((heads, sum(lengths), width), -1, dtype=torch.int32)
    token = 0
    for queries, keys in zip(lengths, key_lengths):
        for query in range(queries):
            position = query + keys - queries
            own = position // block_size if position >= 0 else -1
            blocks = own if causal else (keys + block_size - 1) // block_size
            for head in range(heads):
                room = width - 1 if causal else width
                count = int(torch.randint(0, room + 1, (), generator=generator))
                chosen = torch.randperm(max(blocks, 0), generator=generator)[:count].sort().values
                chosen = chosen.tolist() + ([own] if causal and own >= 0 else [])
                rows[head, token, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            token += 1
    return rows


def masked(q, k, v, selection, lengths, key_lengths, block_size, causal):
    """Return out [Tq, Hq, D] of torch's attention in float64, one mask per query head, and lse [Hq, Tq]."""
    q, k, v = q.double(), k.double(), v.double()
    rows = selection.repeat_interleave(q.shape[1] // selection.shape[0], 0)
    outs, lses = [], []
    for s, (queries, keys) in enumerate(zip(lengths, key_lengths)):
        q0, k0 = sum(lengths[:s]), sum(key_lengths[:s])
        of_sequence = [
            t[a : a + n].transpose(0, 1).repeat_interleave(q.shape[1] // t.shape[1], 0)
            for t, a, n in ((q, q0, queries), (k, k0, keys), (v, k0, keys))
        ]
        block = torch.arange(keys) // block_size
        mask = (rows[:, q0 : q0 + queries, None, :] == block[:, None]).any(-1)
        if causal:
            position = torch.arange(queries) + keys - queries
            mask &= torch.arange(keys) <= position[:, None]
        logits = of_sequence[0] @ of_sequence[1].transpose(1, 2) * q.shape[2] ** -0.5
        lses.append(logits.masked_fill(~mask, -torch.inf).logsumexp(-1))
        out = torch.nn.functional.scaled_dot_product_attention(*of_sequence, attn_mask=mask)
        outs.append(out.nan_to_num(0.0).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "not causal"))
@pytest.mark.parametrize("selection_heads", (4, 2, 1))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_packed_sequences_match_masked_attention(dtype, selection_heads, causal):
    lengths, key_lengths = [20, 0, 33, 7], [20, 5, 33, 50]
    q, k, v, cu_q, cu_k = batch(lengths, dtype=dtype, key_lengths=key_lengths)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    selection = random_selection(lengths, key_lengths, selection_heads, 8, 4, causal)
    out, lse, selected = ops.attention(
        *leaves, cu_q, cu_k, 8, 0, causal=causal, selection=selection
    )
    expected, expected_lse = masked(*leaves, selection, lengths, key_lengths, 8, causal)
    assert selected.shape[2] == 0
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, weight)
    wanted = torch.autograd.grad(expected, leaves, weight.double())
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_padded_batches_match_each_row_alone():
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((30, 4), (40, 2), (40, 2)))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :15], mask[1, 36:] = False, False
    selection = torch.full((2, 2, 30, 3), -1, dtype=torch.int32)
    whole = random_selection([26], [36], 2, 8, 3, True)
    part = random_selection([25], [25], 2, 8, 3, True)
    selection[0, :, 5:], selection[1, :, :26] = part, whole
    selection[0, :, :5] = 999  # padding
    out, lse, returned = moba.attention(
        q,
        k,
        v,
        block_size=8,
        padding_mask=mask,
        selection=selection,
        return_lse=True,
        return_selection=True,
    )
    assert returned is selection
    left, left_lse = masked(q[0, 5:], k[0, 15:], v[0, 15:], part, [25], [25], 8, True)
    right, right_lse = masked(q[1, :26], k[1, :36], v[1, :36], whole, [26], [36], 8, True)
    torch.testing.assert_close(out[0, 5:].double(), left, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[1, :26].double(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[0, :, 5:].double(), left_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[1, :, :26].double(), right_lse, rtol=1e-5, atol=1e-5)
    assert not out[0, :5].any() and not out[1, 26:].any()


def test_the_gates_own_selection_gives_the_same_bits():
    q, k, v = torch.randn(2, 90, 4, 16), torch.randn(2, 90, 2, 16), torch.randn(2, 90, 2, 16)
    out, blocks = moba.attention(q, k, v, block_size=16, top_k=3, return_selection=True)
    given = moba.attention(q, k, v, block_size=16, selection=blocks)
    assert torch.equal(out, given)


def test_parts_merge_to_the_whole_and_its_gradient():
    q, k, v, cu, _ = batch([96], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    blocks = random_selection([96], [96], 2, 8, 5, True)
    expected, _ = masked(*leaves, blocks, [96], [96], 8, True)
    own = (torch.arange(96) // 8).int()[:, None]
    past = torch.where(blocks < own, blocks, -1)
    here = own.expand(2, 96, 1).contiguous()
    out_past, lse_past, _ = ops.attention(q, k, v, cu, cu, 8, 0, causal=False, selection=past)
    out_here, lse_here, _ = ops.attention(q, k, v, cu, cu, 8, 0, selection=here)
    lse = torch.logaddexp(lse_past, lse_here)
    merged = sum(
        (part_lse - lse).exp().T[..., None] * part
        for part, part_lse in ((out_past, lse_past), (out_here, lse_here))
    ).detach()
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)

    d_out = torch.randn_like(q)
    parts = [
        ops.attention_backward(d_out, q, k, v, merged, lse, selection, cu, cu, 8, 0, causal=causal)
        for selection, causal in ((past, False), (here, True))
    ]
    for a, b, wanted in zip(*parts, torch.autograd.grad(expected, leaves, d_out)):
        torch.testing.assert_close(a + b, wanted, rtol=1e-5, atol=1e-5)


def test_compile_and_vmap_give_the_same_bits():
    q, k, v, cu, _ = batch([40])
    selection = random_selection([40], [40], 2, 8, 3, True)

    def call(q, k, v, selection):
        return ops.attention(q, k, v, cu, cu, 8, 0, selection=selection)[0]

    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = call(*leaves, selection)
    gradients = torch.autograd.grad(out.sum(), leaves)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves, selection)
    assert torch.equal(compiled, out)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), gradients):
        assert torch.equal(a, b)
    two = [torch.stack([t, t.flip(0)]) for t in (q, k, v)]
    other = random_selection([40], [40], 2, 8, 3, True, seed=1)
    mapped = torch.func.vmap(call)(*two, torch.stack([selection, other]))
    assert torch.equal(mapped[0], out)
    assert torch.equal(mapped[1], call(*(t[1] for t in two), other))


def test_rows_may_be_cut_from_wider_ones():
    q, k, v, cu, _ = batch([40])
    selection = random_selection([40], [40], 4, 8, 3, True)
    wide = torch.cat([selection, torch.full((4, 40, 2), 7, dtype=torch.int32)], -1)
    a = ops.attention(q, k, v, cu, cu, 8, 0, selection=selection)[0]
    assert torch.equal(a, ops.attention(q, k, v, cu, cu, 8, 0, selection=wide[..., :3])[0])


def test_decode_attends_to_the_selection():
    q, keys, values, means, begin, end = cached(torch.float32)
    lengths = (end - begin).tolist()
    selection = random_selection([1] * 3, lengths, 2, 8, 3, True)
    out, lse = ops.decode(q, keys, values, means[:, :0], begin, end, 8, 0, selection=selection)
    packed = [
        torch.cat([t[b, begin[b] : end[b]] for b in range(3)]).double() for t in (keys, values)
    ]
    expected, expected_lse = masked(q, *packed, selection, [1] * 3, lengths, 8, True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="^decode: selection: .* for head 1, token 2, got block"):
        selection[1, 2, 0] = 100
        ops.decode(q, keys, values, means, begin, end, 8, 0, selection=selection)
    with pytest.raises(TypeError, match="^decode: selection: expected torch.int32"):
        ops.decode(q, keys, values, means, begin, end, 8, 0, selection=selection.long())


def bad(row, head=1, token=21, **change):
    def make(selection):
        selection = selection.clone()
        selection[head, token] = torch.tensor(row, dtype=torch.int32)
        return selection

    return {"make": make} | change


WRONG = {
    "beyond the end": (
        bad([0, 1, 9], causal=False),
        "blocks below 5 .* head 1, token 21, got block 9",
    ),
    "in the future": (bad([0, 3, -1]), "blocks below 3 .* head 1, token 21, got block 3"),
    "unsorted": (
        bad([1, 0, 2]),
        "ascending blocks for head 1, token 21, got block 0 after block 1",
    ),
    "doubled": (
        bad([2, 2, -1]),
        "ascending blocks for head 1, token 21, got block 2 after block 2",
    ),
    "without the own block": (bad([0, 1, -1]), "block 2 .* for head 1, token 21, got block 1"),
    "after the padding": (bad([2, -1, 0]), "-1 alone after a -1 for head 1, token 21, got block 0"),
    "heads that do not divide": (
        {"make": lambda s: s[:1].expand(3, 40, 3).contiguous()},
        "divides 4",
    ),
    "no heads": ({"make": lambda s: s[:0]}, "divides 4"),
    "other tokens": ({"make": lambda s: s[:, :39].contiguous()}, r"\[selection heads, 40, width\]"),
    "no rows": ({"make": lambda s: s.transpose(1, 2)}, r"\[selection heads, 40, width\]"),
    "strides": (
        {"make": lambda s: s.flip(2).transpose(1, 2).contiguous().transpose(1, 2)},
        "strides",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_selections_are_named(name):
    change, message = WRONG[name]
    change = dict(change)
    q, k, v, cu, _ = batch([40])
    selection = change.pop("make")(random_selection([40], [40], 2, 8, 3, True))
    out, lse, _ = ops.attention(q, k, v, cu, cu, 8, 2)
    with pytest.raises(ValueError, match=f"^attention: selection: expected .*{message}"):
        ops.attention(q, k, v, cu, cu, 8, 0, selection=selection, **change)
    with pytest.raises(ValueError, match=f"^attention_backward: selection: expected .*{message}"):
        ops.attention_backward(out, q, k, v, out, lse, selection, cu, cu, 8, 0, **change)


def test_invalid_arguments_beside_a_selection_are_named():
    q, k, v = torch.randn(1, 40, 4, 16), torch.randn(1, 40, 2, 16), torch.randn(1, 40, 2, 16)
    selection = random_selection([40], [40], 2, 8, 3, True)[None]
    moba.attention(q, k, v, block_size=8, selection=selection)
    for wrong in (selection.long(), selection.float(), selection.tolist()):
        with pytest.raises(TypeError, match="^attention: selection: expected .*int32"):
            moba.attention(q, k, v, block_size=8, selection=wrong)
    for wrong in (selection[0], selection[:, :, 1:], selection.expand(3, -1, -1, -1)):
        with pytest.raises(
            ValueError, match=r"^attention: selection: expected \[1, a divisor of 4, 40"
        ):
            moba.attention(q, k, v, block_size=8, selection=wrong)
    with pytest.raises(TypeError, match="^attention: block_size: expected an int"):
        moba.attention(q, k, v, selection=selection)
    cu = torch.tensor([0, 40], dtype=torch.int32)
    with pytest.raises(ValueError, match="^attention: return_selection: expected false"):
        ops.attention(q[0], k[0], v[0], cu, cu, 8, 0, return_selection=True, selection=selection[0])
    with pytest.raises(
        TypeError, match="^attention: selection: expected torch.int32, got torch.int64"
    ):
        ops.attention(q[0], k[0], v[0], cu, cu, 8, 0, selection=selection[0].long())
