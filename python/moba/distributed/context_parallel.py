"""Attention over sequences whose tokens are shared out among the ranks of a group."""

import struct
import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..functional import check_int, check_tensors, flatten
from . import fetch, heads, queries
from .exchange import Group, all_gather, process_group
from .plan import LAYOUTS, BlockPlan, block_plan, check_layout
from .selection import Routing, gather_means, select, whole_selection

STRATEGIES = ("auto", "fetch", "queries", "heads")
_FUNCTION = "context_parallel_attention"


class ContextParallel(NamedTuple):
    """How attention is shared out: a group or a mesh of one dimension, and `layout` and `strategy` of
    `context_parallel_attention`."""

    group: Group
    layout: str = "contiguous"
    strategy: str = "auto"


@torch.compiler.disable
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group | None = None,
    block_size: int | None = None,
    top_k: int | None = None,
    *,
    sink_blocks: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str = "contiguous",
    strategy: str = "auto",
    return_lse: bool = False,
    return_selection: bool = False,
    backend: str = "",
) -> Tensor | tuple[Tensor, ...]:
    """Compute causal Mixture of Block Attention of a batch whose sequences are shared out among ranks.

    `q` [B, S, Hq, D], `k` and `v` [B, S, Hkv, D]: this rank's S tokens of each row, as many on every rank. `group`: a process
    group or a mesh with one dimension, by default all ranks; DTensors, sharded on dimension 1, bring their own. `layout`:
    "contiguous", shares in rank order, or "zigzag", two chunks a rank, one from the beginning of the row and one from its end,
    as `shard` makes them. `cu_seqlens` int32 [sequences + 1]: offsets of packed sequences in the whole batch [B * S * ranks],
    the same on every rank, none across rows; without it a row is one sequence. Blocks are counted from the start of a sequence;
    `top_k` of at least their number is full attention.

    `strategy`: "fetch" brings keys and values of selected blocks to the queries, "queries" sends queries to their blocks and
    merges partial results in rank order, "auto" takes the one that moves fewer bytes on the busiest rank; full attention
    always fetches. "heads" (Ulysses) exchanges tokens for heads, whose numbers must be divisible.

    Returns `out` [B, S, Hq, D]; with `return_lse` also lse [B, Hq, S]; with `return_selection` also the selected blocks, those
    of one process, int32 [B, Hq, S, width], counted within the sequence, ascending, padded with -1. Differentiable in q, k and
    v; bit-identical on every run. Every rank of the group must call it, and its backward pass. Raises TypeError or ValueError on every rank for an
    argument that is invalid on one, and RuntimeError if a rank does not answer within the group's timeout.
    """
    mesh, placements = None, ()
    if isinstance(q, DTensor):
        mesh, placements, group = _placed(q, k, v, group)
        q, k, v = (t.to_local() for t in (q, k, v))
    if group is None:
        group = dist.group.WORLD
    ranks = process_group(_FUNCTION, group)
    routing, cuts, error = None, (), None
    try:
        q, k, v = _cast(q, k, v)
        cuts = _check(q, k, v, block_size, top_k, cu_seqlens, layout, strategy, ranks.size())
        routing = Routing(block_size, top_k, sink_blocks, scale, backend)
        _check_routing(routing)
    except (TypeError, ValueError) as refused:
        error = refused
    gradient = _agree(q, k, cuts, routing, layout, strategy, ranks, error)
    if strategy == "heads":
        out, lse, selection = heads.attend(q, k, v, cuts, layout, routing, return_selection, ranks)
    else:
        plan = block_plan(
            _FUNCTION, q.shape[0], q.shape[1], ranks.rank(), ranks.size(), layout, cuts, block_size
        )
        out, lse, selection = _Attention.apply(
            flatten(q),
            flatten(k),
            flatten(v),
            plan,
            routing,
            strategy,
            gradient,
            return_selection,
            ranks,
        )
        rows = q.shape[:2]
        out, lse = out.unflatten(0, rows), lse.unflatten(1, rows).transpose(0, 1)
        selection = selection.unflatten(1, rows).transpose(0, 1)
    if mesh is not None:
        by_head = [Shard({1: 2, 2: 1}.get(p.dim, p.dim)) if p.is_shard() else p for p in placements]
        out = DTensor.from_local(out, mesh, placements)
        lse = DTensor.from_local(lse, mesh, by_head)
        selection = DTensor.from_local(selection, mesh, by_head)
    results = [out, *([lse] if return_lse else []), *([selection] if return_selection else [])]
    return results[0] if len(results) == 1 else tuple(results)


def _placed(
    q: DTensor, k: Any, v: Any, group: Group | None
) -> tuple[DeviceMesh, tuple, dist.ProcessGroup]:
    """Return mesh and placements of q, k and v, and the group along which their tokens are sharded."""
    for name, t in (("k", k), ("v", v)):
        if (
            not isinstance(t, DTensor)
            or t.placements != q.placements
            or t.device_mesh != q.device_mesh
        ):
            raise TypeError(
                f"{_FUNCTION}: {name}: expected a DTensor with mesh and placements of q, got "
                f"{getattr(t, 'placements', type(t).__name__)}"
            )
    dims = [dim for dim, placement in enumerate(q.placements) if placement == Shard(1)]
    if len(dims) != 1 or not all(p.is_replicate() or isinstance(p, Shard) for p in q.placements):
        raise ValueError(
            f"{_FUNCTION}: q: expected Shard(1) (the tokens) on one dimension of the mesh, got {q.placements}"
        )
    own = q.device_mesh.get_group(dims[0])
    if group is not None and process_group(_FUNCTION, group) != own:
        raise ValueError(
            f"{_FUNCTION}: group: expected None or that of q's tokens, got another one"
        )
    return q.device_mesh, q.placements, own


def _cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the tensors and convert them as autocast does for attention."""
    check_tensors(_FUNCTION, q, k, v, "[batch, tokens, heads, head_dim]")
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return q, k, v


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int | None,
    top_k: int | None,
    cu_seqlens: Tensor | None,
    layout: str,
    strategy: str,
    ranks: int,
) -> tuple[int, ...]:
    """Check the arguments that need no other rank; return the offsets of the sequences."""
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"{_FUNCTION}: k: expected the batch and tokens of q, {list(q.shape[:2])}, got {list(k.shape[:2])}"
        )
    if v.shape != k.shape:
        raise ValueError(
            f"{_FUNCTION}: v: expected the sizes of k, {list(k.shape)}, got {list(v.shape)}"
        )
    if q.shape[2] % max(k.shape[2], 1) or k.shape[2] == 0:
        raise ValueError(
            f"{_FUNCTION}: k: expected a number of heads that divides {q.shape[2]} (the query heads), got {k.shape[2]}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{_FUNCTION}: k: expected head_dim {q.shape[3]} (that of q), got {k.shape[3]}"
        )
    if q.numel() == 0:
        raise ValueError(
            f"{_FUNCTION}: q: expected tokens on every rank, got sizes {list(q.shape)}"
        )
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if check_int(_FUNCTION, name, value) < 1:
            raise ValueError(f"{_FUNCTION}: {name}: expected at least 1, got {value}")
    check_layout(_FUNCTION, layout)
    if strategy not in STRATEGIES:
        raise ValueError(
            f"{_FUNCTION}: strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )
    if strategy == "heads":
        heads.check_heads(_FUNCTION, q.shape[2], k.shape[2], ranks)
    batch, share = q.shape[:2]
    if layout == "zigzag" and share % 2:
        raise ValueError(
            f"{_FUNCTION}: q: expected two chunks of equal length for zigzag, got {share} tokens"
        )
    row = share * ranks
    if cu_seqlens is None:
        return tuple(range(0, batch * row + 1, row))
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{_FUNCTION}: cu_seqlens: expected an int32 tensor, got {getattr(cu_seqlens, 'dtype', type(cu_seqlens).__name__)}"
        )
    cuts = tuple(cu_seqlens.tolist())
    if not cuts or cuts[0] != 0 or cuts[-1] != batch * row or list(cuts) != sorted(cuts):
        raise ValueError(
            f"{_FUNCTION}: cu_seqlens: expected offsets that rise from 0 to {batch * row} (the tokens of all ranks), got "
            f"{_shortened(cuts)}"
        )
    missing = set(range(0, batch * row, row)) - set(cuts)
    if missing:
        raise ValueError(
            f"{_FUNCTION}: cu_seqlens: expected a sequence to begin with each row of {row} tokens, got none at {min(missing)}"
        )
    return cuts


def _shortened(values: tuple[int, ...]) -> str:
    return str(list(values)) if len(values) <= 8 else f"{list(values[:8])[:-1]}, ...]"


def _check_routing(routing: Routing) -> None:
    sinks = check_int(_FUNCTION, "sink_blocks", routing.sink_blocks)
    if not 0 <= sinks < routing.top_k:
        raise ValueError(
            f"{_FUNCTION}: sink_blocks: expected 0 to {routing.top_k - 1} for top_k {routing.top_k}, got {sinks}"
        )
    if routing.scale is not None and not isinstance(routing.scale, (int, float)):
        raise TypeError(f"{_FUNCTION}: scale: expected a number, got {routing.scale!r}")
    if not isinstance(routing.backend, str):
        raise TypeError(f"{_FUNCTION}: backend: expected a str, got {routing.backend!r}")


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _agree(
    q: Tensor,
    k: Tensor,
    cuts: tuple[int, ...],
    routing: Routing | None,
    layout: str,
    strategy: str,
    group: dist.ProcessGroup,
    error: Exception | None,
) -> bool:
    """Raise on every rank if the arguments of one are invalid or differ; return whether a rank needs gradients."""
    names = (
        ("q", "number of rows"),
        ("q", "number of tokens"),
        ("q", "number of heads"),
        ("k", "number of heads"),
        ("q", "head_dim"),
        ("q", "dtype"),
        ("block_size", "value"),
        ("top_k", "value"),
        ("sink_blocks", "value"),
        ("scale", "value"),
        ("cu_seqlens", "offsets (their checksum)"),
        ("layout", "value"),
        ("strategy", "value"),
    )
    mine = [0] * len(names)
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    gradient = False
    if error is None and routing is not None:
        scale = float("nan") if routing.scale is None else float(routing.scale)
        mine = [
            *q.shape[:3],
            *k.shape[2:],
            _DTYPES.index(q.dtype),
            routing.block_size,
            min(routing.top_k, 2**62),
            routing.sink_blocks,
            struct.unpack("<q", struct.pack("<d", scale))[0],
            zlib.crc32(repr(cuts).encode()),
            LAYOUTS.index(layout),
            STRATEGIES.index(strategy),
        ]
        gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    header = torch.tensor([int(error is not None), int(gradient), *mine], device=device)
    by_rank = all_gather(header, group).tolist()
    if error is not None:
        raise error
    refused = [rank for rank, values in enumerate(by_rank) if values[0]]
    if refused:
        raise ValueError(
            f"{_FUNCTION}: group: expected valid arguments on every rank, got invalid ones on rank {refused[0]}, which names them"
        )
    for i, (argument, what) in enumerate(names):
        values = [others[i + 2] for others in by_rank]
        if len(set(values)) > 1:
            decoded = {"dtype": _DTYPES, "layout": LAYOUTS, "strategy": STRATEGIES}.get(
                what if what == "dtype" else argument
            )
            shown = ", ".join(str(decoded[value] if decoded else value) for value in values)
            raise ValueError(
                f"{_FUNCTION}: {argument}: expected the same {what} on every rank, got {shown}"
            )
    return any(values[1] for values in by_rank)


def _busiest(counts: Tensor, row_bytes: int) -> int:
    """Return the bytes that the busiest rank sends and receives of `counts` [from, to] rows."""
    moved = counts.clone().fill_diagonal_(0)
    return int((moved.sum(0) + moved.sum(1)).max()) * row_bytes


class _Attention(torch.autograd.Function):
    """Attention at the homes of the blocks, by fetching or by sending queries."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        routing: Routing,
        strategy: str,
        gradient: bool,
        return_selection: bool,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (plan.to_homes(t, group) for t in (q, k, v))
        tokens, q_heads, head_dim = q.shape
        kv_heads = k.shape[1]
        is_full = routing.top_k >= plan.max_blocks
        selected = None if is_full else select(q, gather_means(k, plan, group), plan, routing)
        by_head: list[Tensor | None] = [None] * kv_heads
        if selected is not None:
            by_head = list(selected.unflatten(0, (kv_heads, -1)))
        remote = [fetch.remote_blocks(of_head, plan) for of_head in by_head]
        wanted = torch.stack([torch.bincount(plan.home[r], minlength=plan.ranks) for r in remote])
        if is_full or strategy == "fetch":
            pairs, strategy = [], "fetch"
            counts = all_gather(wanted.to(q.device), group).cpu()[:, None]
        else:
            pairs, there = zip(*(queries.pairs_of(of_head, plan) for of_head in by_head))
            counts = all_gather(
                torch.stack([wanted, torch.stack(there).cpu()]).to(q.device), group
            ).cpu()  # [from, fetch or queries, kv head, to]
        if strategy == "auto":
            width = selected.shape[2]
            of_fetch = _busiest(
                counts[:, 0].sum(1), fetch.block_bytes(k, routing.block_size, gradient)
            )
            of_queries = _busiest(counts[:, 1].sum(1), queries.row_bytes(q, width, gradient))
            strategy = "fetch" if of_fetch <= of_queries else "queries"

        exchanges: list[Any] = []
        rank = plan.rank
        heads_per_kv = q_heads // kv_heads
        if strategy == "fetch":
            out, lse = torch.empty_like(q), q.new_empty(q_heads, tokens, dtype=torch.float32)
        else:
            out, lse = queries.own_blocks(q, k, v, plan, routing)
        for head in range(kv_heads):
            part = slice(head * heads_per_kv, (head + 1) * heads_per_kv)
            if strategy == "fetch":
                sizes = counts[rank, 0, head].tolist(), counts[:, 0, head, rank].tolist()
                e = fetch.Fetch(by_head[head], remote[head], *sizes, plan, routing, group, q.device)
                out[:, part], lse[part] = e.forward(q[:, part], k[:, head], v[:, head])
            else:
                sizes = counts[rank, 1, head].tolist(), counts[:, 1, head, rank].tolist()
                e = queries.Queries(by_head[head], pairs[head], *sizes, plan, routing, group)
                out[:, part], lse[part] = e.forward(
                    q[:, part], k[:, head], v[:, head], out[:, part], lse[part]
                )
            exchanges.append(e)
        shared = plan.to_shares(out, group), plan.to_shares(lse.T, group).T
        selection = torch.empty(
            (q_heads, shared[0].shape[0], 0), dtype=torch.int32, device=q.device
        )
        if return_selection:
            whole = whole_selection(selected, q, plan).transpose(0, 1).contiguous()
            selection = plan.to_shares(whole, group).transpose(0, 1)

        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.routing, ctx.group = plan, routing, group
        ctx.exchanges = exchanges
        ctx.mark_non_differentiable(shared[1], selection)
        ctx.set_materialize_grads(False)
        return *shared, selection

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out = gradients[0]
        if d_out is None:
            return (None,) * 9
        q, k, v, out, lse = ctx.saved_tensors
        plan, group = ctx.plan, ctx.group
        d_out = plan.to_homes(d_out, group)
        wide = torch.promote_types(q.dtype, torch.float32)
        by_query = isinstance(ctx.exchanges[0], queries.Queries)
        if by_query:
            dq, *d_keys = (
                t.to(wide)
                for t in queries.own_blocks_backward(d_out, q, k, v, out, lse, plan, ctx.routing)
            )
            d_keys = torch.stack(d_keys)
        else:
            dq, d_keys = torch.empty_like(q), q.new_empty(2, *k.shape, dtype=wide)
        heads_per_kv = q.shape[1] // k.shape[1]
        for head, e in enumerate(ctx.exchanges):
            part = slice(head * heads_per_kv, (head + 1) * heads_per_kv)
            inputs = d_out[:, part], q[:, part], k[:, head], v[:, head], out[:, part], lse[part]
            if by_query:
                e.backward(*inputs, dq[:, part], d_keys[:, :, head])
            else:
                dq[:, part], d_keys[:, :, head] = e.backward(*inputs)
        shared = (plan.to_shares(t.to(q.dtype), group) for t in (dq, *d_keys))
        return *shared, *(None,) * 6
