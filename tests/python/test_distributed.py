"""Attention and models on several ranks, against one process."""

import os
import random
import re
import signal
import time
from pathlib import Path

import moba
import pytest
import torch
import torch.distributed as dist
from moba.distributed import (
    ContextParallel,
    context_parallel_attention,
    count_traffic,
    shard,
    shard_batch,
    unshard,
)
from moba.functional import varlen
from packed import batch, offsets
from random_models import build, random_ids
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

CASES = 14
ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "distributed.md"


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


# Bytes, and the choice between the strategies.


def inputs(tokens, heads=4, kv_heads=2, head_dim=16, seed=0):
    """Return this rank's q, k and v of one row, with gradients."""
    q, k, v, *_ = batch([tokens], heads, kv_heads, head_dim, seed=seed)
    return [shard(t[None], dist.group.WORLD).requires_grad_() for t in (q, k, v)]


def bytes_moved(heads, kv_heads, strategy):
    """Return the bytes that the busiest rank sends and receives, forward and backward."""
    q, k, v = inputs(256, heads, kv_heads)
    with count_traffic() as traffic:
        out = context_parallel_attention(q, k, v, block_size=8, top_k=2, strategy=strategy)
        out.sum().backward()
    moved = torch.tensor([traffic.sent + traffic.received])
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return moved.item()


def check_choice():
    return [
        [bytes_moved(*heads, strategy) for strategy in ("fetch", "queries", "auto")]
        for heads in ((8, 1), (2, 2))
    ]


def test_auto_moves_fewer_bytes(tmp_path):
    for shared_keys, own_keys in on_ranks(4, check_choice, folder=tmp_path):
        fetch, queries, auto = shared_keys
        assert fetch <= auto < 1.01 * fetch < 0.9 * queries
        fetch, queries, auto = own_keys
        assert queries <= auto < 1.01 * queries < 0.9 * fetch


# DTensors and meshes.


def check_dtensors():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    q, k, v, *_ = batch([2 * 32], 4, 2, 8)
    whole = [t.unflatten(0, (2, 32)).requires_grad_() for t in (q, k, v)]
    expected = moba.attention(*whole, block_size=4, top_k=3)
    expected.square().sum().backward()
    placed = [
        distribute_tensor(t.detach(), mesh, [Shard(0), Shard(1)]).requires_grad_() for t in whole
    ]
    out, lse = context_parallel_attention(*placed, block_size=4, top_k=3, return_lse=True)
    assert isinstance(out, DTensor) and out.placements == (Shard(0), Shard(1))
    assert lse.shape == (2, 4, 32)
    torch.testing.assert_close(out.full_tensor(), expected)
    out.square().sum().backward()
    for t, other in zip(placed, whole):
        torch.testing.assert_close(t.grad.full_tensor(), other.grad)
    local = [t.to_local().detach() for t in placed]
    same = context_parallel_attention(*local, mesh["context"], 4, 3)
    assert torch.equal(same, out.to_local())


def test_dtensors_and_meshes(tmp_path):
    on_ranks(4, check_dtensors, folder=tmp_path)


# Models of transformers.


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def check_model(layout, packed):
    group = dist.group.WORLD
    config = moba.MoBAConfig(4, 3, full_layers=(-1,), sink_blocks=1)
    moba.register_moba(config)
    model = build("llama", initializer_range=0.05).train()
    model.set_attn_implementation("moba")
    ids = random_ids(1 if packed else 2, 48)
    whole = {"input_ids": ids, "labels": ids.clone()}
    if packed:
        whole["position_ids"] = torch.cat([torch.arange(n) for n in (17, 1, 30)])[None]
    whole["labels"][:, :5] = -100
    with moba.routing(model) as record:
        expected = model(**whole)
    wanted = gradients(model, expected.loss)

    moba.register_moba(config, context_parallel=ContextParallel(group, layout))
    with moba.routing(model) as mine:
        found = model(**shard_batch(whole, group, layout))
    got = gradients(model, found.loss)
    loss = found.loss.detach().clone()
    for t in (loss, *got):
        dist.all_reduce(t)
    ranks = dist.get_world_size()
    torch.testing.assert_close(loss / ranks, expected.loss.detach())
    torch.testing.assert_close(unshard(found.logits, group, 1, layout), expected.logits)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a / ranks, b, atol=1e-6, rtol=1e-4)
    assert mine.layers() == record.layers() == [0, 1]
    (first,) = record[0]
    if packed:
        first = first.unflatten(2, (-1,))
    selection = unshard(mine[0][0], group, 2, layout)
    assert padded_equal(selection.flatten(0, 1), first.flatten(0, 1))


def check_models():
    for layout, packed in (("contiguous", True), ("zigzag", False), ("zigzag", True)):
        check_model(layout, packed)


def test_models_of_transformers(tmp_path):
    on_ranks(2, check_models, folder=tmp_path)


# Errors.


def message(kind, call, *arguments, **options):
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    return str(caught.value)


def check_errors():
    rank, group = dist.get_rank(), dist.group.WORLD
    q, k, v = inputs(64)
    attend = context_parallel_attention
    fewer = [t[:, : 32 - rank].detach() for t in (q, k, v)]
    odd = [t[:, :31].detach() for t in (q, k, v)]
    narrow = [t[..., :8] for t in (q, k)] if rank == 1 else [q, k]
    ids = torch.zeros(1, 30, dtype=torch.long)
    moba.register_moba(moba.MoBAConfig(4, 2), context_parallel=group)
    model = build("llama")
    model.set_attn_implementation("moba")
    whole = shard_batch({"input_ids": random_ids(1, 16)}, group)
    local = {"input_ids": whole["input_ids"], "use_cache": False}
    padding = torch.ones(1, 8, dtype=torch.bool)
    padding[0, 0] = False
    with_tail = build("llama")
    moba.register_moba(moba.MoBAConfig(4, 2, full_tail=2), "moba-tail", group)
    with_tail.set_attn_implementation("moba-tail")
    try:
        return [
            message(ValueError, attend, *fewer, group, 4, 2),
            message(ValueError, attend, q, k, v, group, 64, 2),
            message(ValueError, attend, q, k, v, group, 4 + rank, 2),
            message(ValueError, attend, *narrow, v, group, 4, 2),
            message(ValueError, attend, *odd, group, 4, 2, layout="zigzag"),
            message(ValueError, attend, q, k, v, group, 4, 2, layout="ring"),
            message(ValueError, attend, q, k, v, group, 4, 2, strategy="ring"),
            message(ValueError, attend, q, k, v, group, 4, 2, sink_blocks=2),
            message(ValueError, attend, q, k, v, group, 4, 2, cu_seqlens=offsets([32])),
            message(TypeError, attend, q, k, v, group, 4, None),
            message(TypeError, attend, q, k, v, "data", 4, 2),
            message(
                ValueError,
                attend,
                q[:, :, :3],
                k[:, :, :1],
                v[:, :, :1],
                group,
                4,
                2,
                strategy="heads",
            ),
            message(ValueError, shard, ids, group, 1, "zigzag"),
            message(ValueError, shard_batch, {"input_ids": ids, "pixels": ids}, group),
            message(
                ValueError,
                shard_batch,
                {"input_ids": ids, "attention_mask": (ids + 1).tril(3).flip(1)},
                group,
            ),
            message(ValueError, model, **local),
            message(NotImplementedError, model, **whole, attention_mask=padding, use_cache=False),
            message(NotImplementedError, with_tail, **whole, use_cache=False),
            message(TypeError, moba.register_moba, moba.MoBAConfig(4, 2), context_parallel=3),
        ]
    finally:
        moba.register_moba(moba.MoBAConfig(4, 2))


EXPECTED = [
    "context_parallel_attention: q: expected the same number of tokens on every rank, got 32, 31",
    "context_parallel_attention: block_size: expected a block that begins on each of 2 ranks, got 1 of 64 tokens",
    "context_parallel_attention: block_size: expected the same value on every rank, got 4, 5",
    "context_parallel_attention: group: expected valid arguments on every rank, got invalid ones on rank 1, which names them",
    "context_parallel_attention: q: expected two chunks of equal length for zigzag, got 31 tokens",
    'context_parallel_attention: layout: expected "contiguous" or "zigzag", got \'ring\'',
    "context_parallel_attention: strategy: expected one of auto, fetch, queries, heads, got 'ring'",
    "context_parallel_attention: sink_blocks: expected 0 to 1 for top_k 2, got 2",
    "context_parallel_attention: cu_seqlens: expected offsets that rise from 0 to 64 (the tokens of all ranks), got [0, 32]",
    "context_parallel_attention: top_k: expected an int, got None",
    "context_parallel_attention: group: expected a ProcessGroup or a DeviceMesh, got str",
    "context_parallel_attention: q: expected a number of heads that 2 ranks divide for strategy heads, got 3",
    "shard: t: expected a number of tokens that 4 (zigzag, 2 ranks) divides, got 30",
    "shard_batch: batch: expected input_ids, labels, position_ids, attention_mask, got pixels",
    "shard_batch: attention_mask: expected [batch, tokens] with padding on the right only, got another mask",
    "moba_layer: position_ids: expected positions in the whole row (shard_batch), got 0 to 7 on every rank; cu_seq_lens_q "
    "describes documents that are as long as a share",
    "moba_mask: attention_mask: expected no padding with context_parallel (shard_batch drops it on the right), got padding",
    "moba_layer: full_tail: expected 0 with context_parallel, got 2",
    "register_moba: context_parallel: group: expected a ProcessGroup or a DeviceMesh, got int",
]
ON_RANK_1 = (
    "context_parallel_attention: v: expected the sizes of k, [1, 32, 2, 8], got [1, 32, 2, 16]"
)


def test_errors_reach_every_rank(tmp_path):
    of_0, of_1 = on_ranks(2, check_errors, folder=tmp_path)
    assert of_0 == EXPECTED
    assert of_1 == [ON_RANK_1 if "which names them" in text else text for text in EXPECTED]


def attend_until_dead(seconds):
    """Let rank 1 die in the middle of a step; return how the others notice, and after how long."""
    q, k, v = inputs(96)
    out = context_parallel_attention(q, k, v, block_size=4, top_k=3)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        out.sum().backward()
        context_parallel_attention(q, k, v, block_size=4, top_k=3)
    return str(caught.value), time.monotonic() - begin < seconds + 5


def test_a_dead_rank_is_an_error_on_all_others(tmp_path):
    for text, in_time in on_ranks(3, attend_until_dead, 5, folder=tmp_path, timeout=5, dies=1):
        assert text.startswith("moba.distributed: group: expected every rank to answer within")
        assert in_time


# docs/distributed.md


def run_recipes(folder):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # the group exists already
    names = {"folder": folder}
    recipes = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    for number, code in enumerate(recipes):
        exec(compile(code, f"recipe {number}", "exec"), names)
    return len(recipes)


def test_every_recipe_runs(tmp_path):
    assert on_ranks(2, run_recipes, tmp_path / "out", folder=tmp_path) == [4, 4]


def test_table_is_that_of_the_simulation():
    rows = (ROOT / "benchmarks" / "results" / "context-parallel.md").read_text().splitlines()
    shown = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    assert len(shown) > 20 and set(shown) <= set(rows)
