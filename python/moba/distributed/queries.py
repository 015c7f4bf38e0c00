"""Strategy "queries": queries travel to the homes of their blocks, and partial results come back to be merged.

One kv head at a time. A row of a query head goes once to each rank with blocks that it selects, with the numbers of these
blocks there; its own block is attended to where the row is.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import exchange, pack, unpack
from .plan import BlockPlan, ranges
from .selection import Routing, offsets


def pairs_of(selected: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Return the pairs of a row and a rank with blocks that it selects: rank * rows + row, ascending, of rows [heads * tokens],
    and the number of pairs of each rank. `selected` [heads, tokens, width]."""
    home = torch.cat([plan.home, torch.tensor([plan.ranks])]).to(selected.device)
    homes = home[selected.flatten(0, 1).long()].sort(dim=-1).values
    is_new = homes < plan.ranks
    is_new[:, 1:] &= homes.diff(dim=-1) != 0
    row, column = is_new.nonzero(as_tuple=True)
    pairs = (homes[row, column] * homes.shape[0] + row).sort().values
    return pairs, torch.bincount(pairs // homes.shape[0], minlength=plan.ranks)


def row_bytes(q: Tensor, width: int, gradient: bool) -> int:
    """Return the bytes that move for a row and a rank: the query and its blocks' numbers there, out and lse back; with
    `gradient` the query, out, their gradient and lse there, and the gradient of the query back."""
    row = q.shape[2] * q.element_size()
    return 2 * row + 4 * width + 4 + (4 * row + 4 if gradient else 0)


def _blocks_there(selected: Tensor, rank: Tensor, plan: BlockPlan) -> Tensor:
    """Number the blocks of rows [N, width] that are at home on `rank` [N] among the whole blocks there, ascending, padded with
    -1."""
    whole = plan.length == plan.block_size
    number = torch.full((plan.blocks + 1,), -1, dtype=torch.int32)
    for home in range(plan.ranks):
        here = whole & (plan.home == home)
        number[:-1][here] = torch.arange(int(here.sum()), dtype=torch.int32)
    home = torch.cat([plan.home, torch.tensor([-1])]).to(selected.device)
    there = home[selected.long()] == rank[:, None]
    last = torch.iinfo(torch.int32).max
    blocks = torch.where(there, number.to(selected.device)[selected.long()], last).sort(-1).values
    return torch.where(blocks == last, -1, blocks)


class Exchange:
    """The exchange of one kv head: `there[r]` rows, `pairs`, go to rank r, `here[r]` come from it."""

    def __init__(
        self,
        selected: Tensor,
        pairs: Tensor,
        there: list[int],
        here: list[int],
        plan: BlockPlan,
        routing: Routing,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.routing, self.group = routing, group
        self.there, self.here = there, here
        tokens = selected.shape[1]
        rows = selected.shape[0] * tokens
        row = pairs % rows
        self.token, self.head = row % tokens, row // tokens
        numbers = _blocks_there(selected.flatten(0, 1)[row], pairs // rows, plan)
        self.selection = exchange(numbers, there, here, group)[None].contiguous()
        whole = plan.here[plan.length[plan.here] == plan.block_size]
        self.keys = ranges(plan.at[whole], plan.length[whole]).to(device)
        self.cu_q = offsets([sum(here)]).to(device)
        self.cu_k = offsets([len(self.keys)]).to(device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the results of other blocks into `out` [tokens, heads, D] and `lse` [heads, tokens], in rank order."""
        head_dim, dtype = q.shape[2], q.dtype
        rows = exchange(q[self.token, self.head], self.there, self.here, self.group)
        part, part_lse = self.routing.attend(
            rows[:, None],
            k[self.keys][:, None],
            v[self.keys][:, None],
            self.cu_q,
            self.cu_k,
            self.selection,
            causal=False,
        )
        back = exchange(
            pack((part, (slice(None), 0)), (part_lse[..., None], 0)),
            self.here,
            self.there,
            self.group,
        )
        parts, lses = unpack(back, (dtype, head_dim), (torch.float32, 1))
        merged = out.to(torch.promote_types(dtype, torch.float32), copy=True)
        begin = 0
        for count in self.there:  # a rank has no row twice
            new = slice(begin, begin + count)
            token, head = self.token[new], self.head[new]
            before, here = lse[head, token], lses[new, 0]
            both = torch.logaddexp(before, here)
            merged[token, head] = (
                merged[token, head] * (before - both).exp()[:, None]
                + parts[new] * (here - both).exp()[:, None]
            )
            lse[head, token] = both
            begin += count
        out[:] = merged

    def backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        d_keys: Tensor,
    ) -> None:
        """Add the gradients from other blocks to `dq` [tokens, heads, D] and `d_keys` [2, tokens, D], both wide."""
        head_dim, dtype = q.shape[2], q.dtype
        at = self.token, self.head
        packed = pack((d_out, at), (q, at), (out, at), (lse.T[..., None], at))
        received = exchange(packed, self.there, self.here, self.group)
        del packed
        d_outs, qs, outs, lses = unpack(received, *[(dtype, head_dim)] * 3, (torch.float32, 1))
        del received
        dqs, dk, dv = self.routing.attend_backward(
            d_outs[:, None],
            qs[:, None],
            k[self.keys][:, None],
            v[self.keys][:, None],
            outs[:, None],
            lses.T.contiguous(),
            self.cu_q,
            self.cu_k,
            self.selection,
            causal=False,
        )
        for total, d_key in zip(d_keys, (dk, dv)):
            total.index_add_(0, self.keys, d_key[:, 0].to(total.dtype))
        back = exchange(dqs[:, 0], self.here, self.there, self.group)
        begin = 0
        for count in self.there:  # a rank has no row twice, so the order of sums is fixed
            new = slice(begin, begin + count)
            index = self.token[new], self.head[new]
            dq[index] += back[new].to(dq.dtype)
            begin += count


def _own_selection(plan: BlockPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each token's own block within its run, as a selection [1, tokens, 1], and the offsets of the runs."""
    own = [plan.block_of_token[run.begin : run.end] - run.block0 for run in plan.runs]
    cuts = offsets([len(blocks) for blocks in own])
    return torch.cat(own).to(device, torch.int32)[None, :, None], cuts.to(device)


def begin(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Attend to each query's own block: out [tokens, Hq, D] and lse [Hq, tokens]."""
    own, cuts = _own_selection(plan, q.device)
    return routing.attend(q, k, v, cuts, cuts, own)


def begin_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    routing: Routing,
) -> tuple[Tensor, Tensor]:
    """Return the part of dq, and of dk and dv [2, tokens, Hkv, D], that comes from own blocks, for the merged `out` and `lse`,
    in float32 (float64 for float64)."""
    own, cuts = _own_selection(plan, q.device)
    dq, *d_keys = routing.attend_backward(d_out, q, k, v, out, lse, cuts, cuts, own)
    wide = torch.promote_types(k.dtype, torch.float32)
    return dq.to(wide), torch.stack(d_keys).to(wide)
