"""Selection over all ranks: each averages the keys of its blocks, all gather these means, and each selects for its queries."""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..functional import EVERYTHING
from .exchange import all_gather
from .plan import BlockPlan, ranges

_MEANS_BYTES = 64 << 20  # of the packed means of one call of `select`


@dataclass(frozen=True)
class Routing:
    """The routing of one call, and its backend."""

    block_size: int
    top_k: int
    sink_blocks: int
    scale: float | None
    backend: str

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        selection: Tensor | None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the blocks of a selection, or to all: out [tokens, Hq, D] and lse [Hq, tokens]."""
        top_k = EVERYTHING if selection is None else 0
        out, lse, _ = ops.attention(
            q,
            k,
            v,
            cu_q,
            cu_k,
            self.block_size,
            top_k,
            causal=causal,
            scale=self.scale,
            backend=self.backend,
            selection=selection,
        )
        return out, lse

    def attend_backward(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        selection: Tensor | None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the part of dq, dk and dv that comes from these blocks, for the `out` and `lse` of one softmax over all."""
        top_k = EVERYTHING if selection is None else 0
        if selection is None:
            selection = torch.empty((*lse.shape, 0), dtype=torch.int32, device=q.device)
        return ops.attention_backward(
            d_out,
            q,
            k,
            v,
            out,
            lse,
            selection,
            cu_q,
            cu_k,
            self.block_size,
            top_k,
            causal=causal,
            scale=self.scale,
            backend=self.backend,
        )


def block_means(k: Tensor, plan: BlockPlan, backend: str) -> Tensor:
    """Return the mean keys of the whole blocks at home, [blocks here, Hkv, D], in the dtype of k; 0 for a block with fewer
    tokens, which no query of another block selects."""
    whole = plan.length[plan.here] == plan.block_size
    blocks = plan.here[whole]
    means = k.new_zeros(len(plan.here), *k.shape[1:])
    if len(blocks):
        keys = k[ranges(plan.at[blocks], plan.length[blocks]).to(k.device)]
        mean, _, _ = ops.block_features(keys, len(keys), plan.block_size, backend)
        means[whole.to(k.device)] = mean
    return means


def gather_means(k: Tensor, plan: BlockPlan, backend: str, group: dist.ProcessGroup) -> Tensor:
    """Return the mean keys of the blocks of all ranks, [blocks, Hkv, D]."""
    counts = plan.homes()
    padded = k.new_zeros(max(counts), *k.shape[1:])
    padded[: len(plan.here)] = block_means(k, plan, backend)
    gathered = all_gather(padded, group)
    means = k.new_empty(plan.blocks, *k.shape[1:])
    for rank, count in enumerate(counts):
        means[(plan.home == rank).to(k.device)] = gathered[rank, :count]
    return means


def select(q: Tensor, means: Tensor, plan: BlockPlan, routing: Routing) -> Tensor:
    """Select the best blocks before each query's own: int32 [Hq, tokens, width] of block numbers over all sequences, ascending,
    padded with -1. A block with its mean as its only key is scored as the block is."""
    width = min(routing.top_k, plan.max_blocks) - 1
    selected = q.new_full((q.shape[1], q.shape[0], width), -1, dtype=torch.int32)
    if width == 0:
        return selected
    before = plan.here - plan.first[plan.here]
    lengths = plan.length[plan.here]
    limit = max(1, _MEANS_BYTES // (means[:1].nbytes or 1))
    for begin, end in _groups(before.tolist(), limit):
        blocks = plan.here[begin:end]
        candidates = ranges(plan.first[blocks], before[begin:end])
        if len(candidates) == 0:
            continue
        tokens = slice(int(plan.at[blocks[0]]), int(plan.at[blocks[-1]] + plan.length[blocks[-1]]))
        chosen = ops.select(
            q[tokens],
            means[candidates.to(means.device)],
            offsets(lengths[begin:end]).to(q.device),
            offsets(before[begin:end]).to(q.device),
            1,
            width,
            routing.sink_blocks,
            False,
            routing.backend,
        )
        first = plan.first[plan.block_of_token[tokens]].to(q.device, torch.int32)[:, None]
        selected[:, tokens, : chosen.shape[2]] = torch.where(chosen < 0, -1, chosen + first)
    return selected


def _groups(sizes: list[int], limit: int) -> list[tuple[int, int]]:
    """Cut a list into ranges of at most `limit` in sum, or of one element."""
    groups, begin, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > limit:
            groups.append((begin, i))
            begin, total = i, 0
        total += size
    return [*groups, (begin, len(sizes))]


def offsets(lengths: Tensor | list[int]) -> Tensor:
    """Return the int32 offsets of packed sequences of these lengths, on the CPU."""
    return torch.tensor([0, *accumulate(map(int, lengths))], dtype=torch.int32)


def with_own(selected: Tensor, own: Tensor) -> Tensor:
    """Insert each token's own block `own` [tokens] into rows of earlier ones, [heads, tokens, width + 1]."""
    rows = torch.nn.functional.pad(selected, (0, 1), value=-1)
    count = (selected >= 0).sum(-1, keepdim=True)
    return rows.scatter(-1, count, own.to(selected).expand(selected.shape[:2])[..., None])


def whole_selection(selected: Tensor | None, q: Tensor, plan: BlockPlan) -> Tensor:
    """Return the selection as `ops.attention` does: blocks counted within the sequence, the own one included."""
    own = plan.block_of_token.to(q.device, torch.int32)
    first = plan.first[plan.block_of_token].to(q.device, torch.int32)[:, None]
    if selected is None:
        block = torch.arange(plan.max_blocks, dtype=torch.int32, device=q.device)
        return torch.where(block <= own[:, None] - first, block, -1).expand(q.shape[1], -1, -1)
    rows = with_own(selected, own)
    return torch.where(rows < 0, -1, rows - first)
