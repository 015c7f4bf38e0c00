"""`moba_attn_varlen`, in the module in which the published package (MoonshotAI/MoBA) has it."""

from torch import Tensor

from .functional import check_varlen, varlen


def moba_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    moba_chunk_size: int,
    moba_topk: int,
) -> Tensor:
    """Compute causal MoBA of a packed batch.

    `q` [T, Hq, D], `k` and `v` [T, Hkv, D], `Hq % Hkv == 0`; `cu_seqlens` int32 or int64 [sequences + 1]. `max_seqlen` is part
    of the published signature and ignored. A query attends to `moba_topk` blocks of `moba_chunk_size` tokens, its own
    included. Returns [T, Hq, D]. Raises TypeError or ValueError naming the argument.
    """
    offsets = check_varlen("moba_attn_varlen", q, k, v, cu_seqlens, moba_chunk_size, moba_topk)
    return varlen(q, k, v, offsets, offsets, moba_chunk_size, moba_topk)[0]
