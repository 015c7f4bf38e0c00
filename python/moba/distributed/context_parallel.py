"""Attention over sequences whose tokens are shared out among the ranks of a group."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..functional import flatten
from . import fetch, heads, queries
from .arguments import FUNCTION, agree, cast, check, check_routing
from .exchange import Group, all_gather, exchange, process_group
from .plan import BlockPlan, block_plan
from .selection import Routing, gather_means, select, whole_selection


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
    ranks = process_group(FUNCTION, group)
    routing, cuts, error = None, (), None
    try:
        q, k, v = cast(q, k, v)
        cuts = check(q, k, v, block_size, top_k, cu_seqlens, layout, strategy, ranks.size())
        routing = Routing(block_size, top_k, sink_blocks, scale, backend)
        check_routing(routing)
    except (TypeError, ValueError) as refused:
        error = refused
    gradient = agree(q, k, cuts, routing, layout, strategy, ranks, error)
    if strategy == "heads":
        out, lse, selection = heads.attend(q, k, v, cuts, layout, routing, return_selection, ranks)
    else:
        plan = block_plan(
            FUNCTION, q.shape[0], q.shape[1], ranks.rank(), ranks.size(), layout, cuts, block_size
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
                f"{FUNCTION}: {name}: expected a DTensor with mesh and placements of q, got "
                f"{getattr(t, 'placements', type(t).__name__)}"
            )
    dims = [dim for dim, placement in enumerate(q.placements) if placement == Shard(1)]
    if len(dims) != 1 or not all(p.is_replicate() or isinstance(p, Shard) for p in q.placements):
        raise ValueError(
            f"{FUNCTION}: q: expected Shard(1) (the tokens) on one dimension of the mesh, got {q.placements}"
        )
    own = q.device_mesh.get_group(dims[0])
    if group is not None and process_group(FUNCTION, group) != own:
        raise ValueError(f"{FUNCTION}: group: expected None or that of q's tokens, got another one")
    return q.device_mesh, q.placements, own


class _Sizes(NamedTuple):
    """Rows of a strategy, [kv heads, ranks]: those that go from this rank to each other one, and those that come."""

    there: Tensor
    here: Tensor

    def bytes_moved(self, row_bytes: int, rank: int) -> int:
        """Return the bytes that this rank sends and receives."""
        remote = torch.arange(self.there.shape[1]) != rank
        return row_bytes * int((self.there[:, remote] + self.here[:, remote]).sum())


def _sizes(there: Tensor, group: dist.ProcessGroup, device: torch.device) -> list[_Sizes]:
    """Tell every rank how many rows it gets: `there` [strategies, kv heads, ranks]."""
    ones = [1] * group.size()
    here = exchange(there.movedim(-1, 0).to(device), ones, ones, group).cpu().movedim(0, -1)
    return [_Sizes(*rows) for rows in zip(there, here)]


def _choose(
    strategy: str,
    selected: list[Tensor | None],
    q: Tensor,
    k: Tensor,
    plan: BlockPlan,
    routing: Routing,
    gradient: bool,
    group: dist.ProcessGroup,
) -> tuple[ModuleType, Sequence[Tensor], _Sizes]:
    """Return the strategy, what the kv heads need of other ranks, and its sizes: for "auto" the strategy that moves fewer bytes on
    the busiest rank."""
    remote = [fetch.remote_blocks(of_head, plan) for of_head in selected]
    wanted = torch.stack([torch.bincount(plan.home[r], minlength=plan.ranks) for r in remote])
    if strategy == "fetch":
        (sizes,) = _sizes(wanted[None], group, q.device)
        return fetch, remote, sizes
    pairs, there = zip(*(queries.pairs_of(of_head, plan) for of_head in selected))
    both = torch.stack([wanted, torch.stack(there).cpu()])
    of_fetch, of_queries = _sizes(both, group, q.device)
    if strategy == "auto":
        width = routing.top_k - 1
        block_bytes = fetch.block_bytes(k, routing.block_size, gradient)
        row_bytes = queries.row_bytes(q, width, gradient)
        moved = (
            of_fetch.bytes_moved(block_bytes, plan.rank),
            of_queries.bytes_moved(row_bytes, plan.rank),
        )
        busiest = all_gather(torch.tensor(moved, device=q.device), group).amax(0)
        if busiest[0] <= busiest[1]:
            return fetch, remote, of_fetch
    return queries, pairs, of_queries


def _query_heads(q_heads: int, kv_heads: int) -> list[slice]:
    """Return the query heads of each kv head."""
    group = q_heads // kv_heads
    return [slice(begin, begin + group) for begin in range(0, q_heads, group)]


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
        q_heads, kv_heads = q.shape[1], k.shape[1]
        is_full = routing.top_k >= plan.max_blocks
        selected = None
        if not is_full:
            selected = select(q, gather_means(k, plan, routing.backend, group), plan, routing)
        by_head = [None] * kv_heads if is_full else list(selected.unflatten(0, (kv_heads, -1)))
        strategy_of, needed, sizes = _choose(
            "fetch" if is_full else strategy, by_head, q, k, plan, routing, gradient, group
        )
        out, lse = strategy_of.begin(q, k, v, plan, routing)
        exchanges = []
        for head, part in enumerate(_query_heads(q_heads, kv_heads)):
            rows = sizes.there[head].tolist(), sizes.here[head].tolist()
            of_head = strategy_of.Exchange(
                by_head[head], needed[head], *rows, plan, routing, group, q.device
            )
            of_head.forward(q[:, part], k[:, head], v[:, head], out[:, part], lse[part])
            exchanges.append(of_head)
        shared = plan.to_shares(out, group), plan.to_shares(lse.T, group).T
        selection = torch.empty(
            (q_heads, shared[0].shape[0], 0), dtype=torch.int32, device=q.device
        )
        if return_selection:
            whole = whole_selection(selected, q, plan).transpose(0, 1).contiguous()
            selection = plan.to_shares(whole, group).transpose(0, 1)

        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.routing, ctx.group = plan, routing, group
        ctx.strategy, ctx.exchanges = strategy_of, exchanges
        ctx.mark_non_differentiable(shared[1], selection)
        ctx.set_materialize_grads(False)
        return *shared, selection

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out = gradients[0]
        if d_out is None:
            return (None,) * 9
        q, k, v, out, lse = ctx.saved_tensors
        plan, group = ctx.plan, ctx.group
        d_out = plan.to_homes(d_out, group)
        dq, d_keys = ctx.strategy.begin_backward(d_out, q, k, v, out, lse, plan, ctx.routing)
        for head, part in enumerate(_query_heads(q.shape[1], k.shape[1])):
            ctx.exchanges[head].backward(
                d_out[:, part],
                q[:, part],
                k[:, head],
                v[:, head],
                out[:, part],
                lse[part],
                dq[:, part],
                d_keys[:, :, head],
            )
        shared = (plan.to_shares(t.to(q.dtype), group) for t in (dq, *d_keys))
        return *shared, *(None,) * 6
