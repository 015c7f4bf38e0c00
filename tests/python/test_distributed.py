"""Attention and models on several ranks, against one process."""

import random

import pytest
import torch
import torch.distributed as dist
from moba.distributed import context_parallel_attention, shard, unshard
from moba.functional import varlen
from packed import batch
from ranks import on_ranks

CASES = 14


def generated(seed, ranks):
    """Return a batch of packed sequences and its routing: q, k, v, d_out [B, S, H, D], offsets and the arguments."""
    choose = random.Random(seed)
    rows, share = choose.choice([1, 2, 3]), choose.choice([4, 6, 10, 16, 24])
    kv_heads, group = choose.choice([1, 2, 3, ranks]), choose.choice([1, 2, ranks])
    tokens = share * ranks
    cuts = [row * tokens for row in range(rows + 1)]
    if choose.random() < 0.5:  # ragged, with an empty sequence
        cuts = sorted({*cuts, *(choose.randrange(rows * tokens) for _ in range(3))})
        cuts = sorted([*cuts, cuts[1]])
    top_k = choose.choice([1, 2, 3, 4, 100])
    routing = {
        "block_size": choose.choice([1, 2, 3, 4, 5, 7, 8, 16]),
        "top_k": top_k,
        "sink_blocks": choose.choice([0, 1]) if top_k > 1 else 0,
        "scale": choose.choice([None, 0.3]),
    }
    heads, head_dim = kv_heads * group, choose.choice([8, 16, 20])
    dtype = choose.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    q, k, v, cu_seqlens, _ = batch([rows * tokens], heads, kv_heads, head_dim, dtype, seed)
    d_out = batch([rows * tokens], heads, kv_heads, head_dim, dtype, seed + 1)[0]
    tensors = [t.unflatten(0, (rows, tokens)) for t in (q, k, v, d_out)]
    return tensors, torch.tensor(cuts, dtype=torch.int32), routing


def one_process(tensors, cu_seqlens, routing):
    q, k, v = (t.flatten(0, 1).clone().requires_grad_() for t in tensors[:3])
    out, lse, selection = varlen(q, k, v, cu_seqlens, cu_seqlens, **routing, return_selection=True)
    out.backward(tensors[3].flatten(0, 1))
    return out, lse, selection, q.grad, k.grad, v.grad


def on_this_rank(tensors, cu_seqlens, routing, layout, strategy):
    """Return the results of all ranks in packed order."""
    group = dist.group.WORLD
    q, k, v, d_out = (shard(t, group, layout=layout) for t in tensors)
    for t in (q, k, v):
        t.requires_grad_()
    out, lse, selection = context_parallel_attention(
        q,
        k,
        v,
        group,
        cu_seqlens=cu_seqlens,
        layout=layout,
        strategy=strategy,
        return_lse=True,
        return_selection=True,
        **routing,
    )
    out.backward(d_out)

    def whole(t, dim=1):
        return unshard(t, group, dim, layout)

    by_head = [whole(t, 2).transpose(0, 1).flatten(1, 2) for t in (lse, selection)]
    return whole(out).flatten(0, 1), *by_head, *(whole(t.grad).flatten(0, 1) for t in (q, k, v))


def padded_equal(a, b):
    width = max(a.shape[2], b.shape[2])
    a, b = (torch.nn.functional.pad(t, (0, width - t.shape[2]), value=-1) for t in (a, b))
    return torch.equal(a, b)


def check_generated(seed):
    ranks = dist.get_world_size()
    tensors, cu_seqlens, routing = generated(seed, ranks)
    expected = one_process(tensors, cu_seqlens, routing)
    rounding = {torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 2e-6}[tensors[0].dtype]
    kv_heads, heads = tensors[1].shape[2], tensors[0].shape[2]
    by_heads = heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
    checked = set()
    for strategy in ("fetch", "queries", "auto", *(("heads",) if by_heads else ())):
        layout = random.Random(f"{seed} {strategy}").choice(["contiguous", "zigzag"])
        case = f"seed {seed} {strategy} {layout} {routing} {cu_seqlens.tolist()}"
        try:
            found = on_this_rank(tensors, cu_seqlens, routing, layout, strategy)
        except ValueError as error:
            assert "expected a block that begins on each of" in str(error), case
            continue
        assert padded_equal(found[2], expected[2]), case
        for name, a, b in zip(("out", "lse", "", "dq", "dk", "dv"), found, expected):
            if name:
                difference = ((a - b).abs() / (1 + b.abs())).max().item()
                assert difference < rounding, f"{case}: {name} differs by {difference}"
        again = on_this_rank(tensors, cu_seqlens, routing, layout, strategy)
        assert all(torch.equal(a, b) for a, b in zip(found, again)), case
        checked.add(strategy)
    return checked


def check_many(seeds):
    return set().union(*map(check_generated, seeds))


@pytest.mark.parametrize("ranks", (2, 3, 4))
def test_attention_equals_one_process_and_is_bit_identical(ranks, tmp_path):
    seeds = range(100 * ranks, 100 * ranks + CASES)
    for checked in on_ranks(ranks, check_many, seeds, folder=tmp_path):
        assert checked == {"fetch", "queries", "auto", "heads"}
