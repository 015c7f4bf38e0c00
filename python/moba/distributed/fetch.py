"""Strategy "fetch": keys and values of the selected blocks come to the queries.

One kv head at a time, so that at most one head's keys and values of other ranks are in memory. The backward pass fetches
them again and sends their gradients home.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import exchange
from .plan import BlockPlan, Run, ranges
from .selection import Routing, offsets, with_own


def _earlier(selected: Tensor | None, plan: BlockPlan, run: Run) -> Tensor:
    """Return the blocks before a run that some of its rows select, ascending; all of its sequence without a selection."""
    if selected is None:
        return torch.arange(run.first, run.block0)
    is_selected = torch.zeros(plan.blocks + 1, dtype=torch.bool, device=selected.device)
    is_selected[selected[:, run.begin : run.end].long()] = True  # -1 marks the last entry
    return is_selected[: run.block0].nonzero()[:, 0].cpu()


def remote_blocks(selected: Tensor | None, plan: BlockPlan) -> Tensor:
    """Return the blocks of other ranks that the queries of a kv head need, by home, then ascending. `selected` [heads, tokens,
    width]; None: full attention."""
    needed = torch.cat([_earlier(selected, plan, run) for run in plan.runs]).unique()
    remote = needed[plan.home[needed] != plan.rank]
    return remote[plan.home[remote].argsort(stable=True)]


def block_bytes(k: Tensor, block_size: int, gradient: bool) -> int:
    """Return the bytes that move for a block of one kv head: its number, keys and values; with `gradient` again in the backward
    pass, and back as gradients."""
    return 4 + 2 * block_size * k.shape[2] * k.element_size() * (3 if gradient else 1)


class _Compact(NamedTuple):
    """Keys of one kv head that the runs of a rank attend to, as a packed batch: each run's earlier blocks, then its own tokens.
    `rows` [keys] are tokens of this rank or, beyond these, of fetched blocks; `selection` counts blocks within the batch's
    sequences."""

    rows: Tensor
    cu_q: Tensor
    cu_k: Tensor
    selection: Tensor | None


def _compact(selected: Tensor | None, fetched: Tensor, plan: BlockPlan) -> _Compact:
    at = plan.at.clone()
    at[fetched] = plan.tokens + plan.block_size * torch.arange(len(fetched))
    rows, lengths, selections = [], [], []
    for run in plan.runs:
        earlier = _earlier(selected, plan, run)
        rows += [ranges(at[earlier], plan.length[earlier]), torch.arange(run.begin, run.end)]
        lengths.append(len(rows[-2]) + len(rows[-1]))
        if selected is not None:
            blocks = torch.cat([earlier, torch.arange(run.block0, run.block1)])
            number = torch.full((plan.blocks + 1,), -1, dtype=torch.int32)
            number[blocks] = torch.arange(len(blocks), dtype=torch.int32)
            own = number[plan.block_of_token[run.begin : run.end]]
            of_rows = number.to(selected.device)[selected[:, run.begin : run.end].long()]
            selections.append(with_own(of_rows, own.to(selected.device)))
    return _Compact(
        torch.cat(rows),
        offsets([run.end - run.begin for run in plan.runs]),
        offsets(lengths),
        torch.cat(selections, 1).contiguous() if selections else None,
    )


def begin(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Return memory for out [tokens, Hq, D] and lse [Hq, tokens]."""
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


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
    """Return memory for dq, and for dk and dv [2, tokens, Hkv, D] in float32 (float64 for float64)."""
    wide = torch.promote_types(k.dtype, torch.float32)
    return torch.empty_like(q), k.new_empty(2, *k.shape, dtype=wide)


class Exchange:
    """The exchange of one kv head: which blocks come, and which go to other ranks.

    `wanted[r]`: blocks that this rank needs of rank r, `remote`; `asked[r]`: blocks that rank r needs of this one."""

    def __init__(
        self,
        selected: Tensor | None,
        remote: Tensor,
        wanted: list[int],
        asked: list[int],
        plan: BlockPlan,
        routing: Routing,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.plan, self.routing, self.group = plan, routing, group
        self.wanted, self.asked = wanted, asked
        requests = remote.to(device, torch.int32)
        blocks = exchange(requests, wanted, asked, group).long().cpu()
        self.sent = ranges(plan.at[blocks], plan.length[blocks]).to(device)
        keys = _compact(selected, remote, plan)
        self.keys = _Compact(*(None if t is None else t.to(device) for t in keys))

    def _compact_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the compact keys and values [keys, 1, D] of `k`, `v` [tokens, D]."""
        size = self.plan.block_size
        there = torch.stack([k[self.sent], v[self.sent]], 1).unflatten(0, (-1, size))
        fetched = exchange(there, self.asked, self.wanted, self.group).flatten(0, 1)
        rows = self.keys.rows
        is_here = rows < self.plan.tokens
        result = []
        for i, t in enumerate((k, v)):
            keys = t.new_empty(len(rows), 1, t.shape[1])
            keys[is_here, 0] = t[rows[is_here]]
            keys[~is_here, 0] = fetched[rows[~is_here] - self.plan.tokens, i]
            result.append(keys)
        return result[0], result[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Write `out` [tokens, heads, D] and `lse` [heads, tokens] of `q` [tokens, heads, D], `k` and `v` [tokens, D]."""
        keys, values = self._compact_keys(k, v)
        _, cu_q, cu_k, selection = self.keys
        out[:], lse[:] = self.routing.attend(q, keys, values, cu_q, cu_k, selection)

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
        """Write `dq` [tokens, heads, D] and `d_keys` [2, tokens, D], the sums of dk and dv."""
        keys, values = self._compact_keys(k, v)
        _, cu_q, cu_k, selection = self.keys
        dq[:], *found = self.routing.attend_backward(
            d_out, q, keys, values, out, lse, cu_q, cu_k, selection
        )
        del keys, values
        plan, wide = self.plan, d_keys.dtype
        fetched = sum(self.wanted) * plan.block_size
        sums = q.new_zeros(2, plan.tokens + fetched, k.shape[1], dtype=wide)
        for begin, end in pairwise(cu_k.tolist()):
            rows = self.keys.rows[begin:end]  # none twice, so the order of sums is fixed
            for total, gradient in zip(sums, found):
                total.index_add_(0, rows, gradient[begin:end, 0].to(wide))
        del found
        d_keys[:] = sums[:, : plan.tokens]
        there = sums[:, plan.tokens :].to(k.dtype).transpose(0, 1)
        there = there.unflatten(0, (-1, plan.block_size))
        back = exchange(there, self.wanted, self.asked, self.group).flatten(0, 1)
        begin = 0
        for count in self.asked:  # in rank order
            end = begin + count * plan.block_size
            part = back[begin:end].transpose(0, 1).to(wide)
            d_keys.index_add_(1, self.sent[begin:end], part)
            begin = end
