"""The operators, `torch.ops.moba.*`, on packed tensors.

`q [Tq, Hq, D]`, `k` and `v` `[Tk, Hkv, D]` of one dtype (float32, bfloat16, float16; float64 through the slow reference), any
strides, `Hq % Hkv == 0`. `cu_seqlens_q`, `cu_seqlens_k`: int32 `[sequences + 1]`, from 0, never decreasing, to Tq and Tk;
queries are the last of their keys. `top_k` blocks of `block_size` tokens a query, its own included; as many as there are, or
more, is dense attention. Selections are int32 `[Hq, Tq, min(top_k, ceil(Tk / block_size))]`: block numbers within the
sequence, ascending, padded with -1. Errors are TypeError (dtypes) or ValueError, "function: argument: expected X, got Y".
Results are bit-identical on every run and for any number of threads, also without torch.use_deterministic_algorithms.

CUDA tensors use the CUDA backend, if the package was built with it: bfloat16 and float16, head_dim 64, 96, 128 and 256, on
the current stream and without synchronising. Offsets stay on the device, so their values are not checked.
"""

from torch import Tensor

def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    return_selection: bool = False,
    backend: str = "",
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `out [Tq, Hq, D]`, `lse [Hq, Tq]` (float32, natural logarithm, no gradient) and the selection, of width 0 unless
    `return_selection`.

    Differentiable in q, k and v; the selection is a constant. `scale`: softmax scale; D^-0.5 if None. `backend`: "cpu",
    "reference" or "cuda"; empty: the best for the device.

    `selection`, int32 `[Hs, Tq, W]` with `Hq % Hs == 0`: the caller's blocks, in place of the gate. Query head h attends to the
    blocks of row `h // (Hq // Hs)`: numbered within the sequence, ascending, padded with -1 at the end; causal: up to the
    query's own, which is the last; not causal: any, or none (`out` 0, `lse` -inf). `top_k` and `sink_blocks` are not read then,
    and the returned selection has width 0.
    """

def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `dq, dk, dv` in the shapes of q, k and v. Without a selection (width 0) the same blocks are selected again.

    With `top_k` 0 the selection is the caller's, as in `attention`. `out` and `lse` may then be those of one softmax over the
    keys of several calls: with `lse = logsumexp(lse_i)` and `out = sum of exp(lse_i - lse) out_i` of calls i, each call's
    gradients are its part of that softmax's.
    """

def select(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    causal: bool = True,
    backend: str = "",
) -> Tensor:
    """Return the selection alone."""

def select_by_gate(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    causal: bool = True,
    own_block: bool = False,
    backend: str = "",
) -> Tensor:
    """Return the selection of a gate with other inputs, int32 `[Hg, Tq, min(top_k, blocks + 1 if causal)]`, by `select`'s rules.

    `q [Tq, Hg, Dg]`, `k [blocks, Hk, Dg]` in the dtype of q or float32, `Hg % Hk == 0`: a key for every block of every sequence,
    in their order; causal calls may leave out the incomplete last blocks of all sequences on the CPU. The offsets count tokens.
    Scores are `<q, k>`; NaN counts as -inf. `own_block`, not causal: a query's own block is selected first.
    """

def block_features(
    k: Tensor, tokens: int, block_size: int, backend: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the largest and the smallest value of every channel of every block, `[blocks, Hkv, D]` in the dtype of k,
    an incomplete last block included, of sequences of `tokens` keys each, `k [sequences * tokens, Hkv, D]`, without a
    derivative."""

def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    begin: Tensor,
    end: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    scale: float | None = None,
    backend: str = "",
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `out [B, Hq, D]` and `lse [Hq, B]` for one new token of each of B sequences, `q [B, Hq, D]`, without a derivative.

    `k`, `v` `[B, tokens, Hkv, D]`, any strides; sequence b is tokens `[begin[b], end[b])` (int32), the last of which is the
    query's own. `means` `[B, blocks, Hkv, D]`: the mean key of every complete block counted from `begin[b]`, rounded to the
    dtype of k; float32 on the CPU, the dtype of k on CUDA; not read where the routing covers every block or `selection` is given.
    On CUDA the values of `begin` and `end` are not checked.

    `selection`, int32 `[Hs, B, W]`: the caller's blocks, counted from `begin[b]`, as in `attention`; `top_k` is not read then.
    """

def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    scale: float | None = None,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    """Return `out [Tq, Hq, D]` and `lse [Hq, Tq]` of new queries over the pages of a serving engine, which already hold their
    keys, on the CPU and without a derivative. Queries `[cu_seqlens_q[s], cu_seqlens_q[s + 1])` are the last of the
    `lengths[s]` tokens of sequence s.

    `k`, `v` `[pages, page_tokens, Hkv, D]`, any strides; `page_table` int32 `[sequences, pages of a sequence]`: page i of a
    sequence holds its tokens from `i * page_tokens` on. `means` as `update_means` keeps them; not read where nothing is
    selected, else `page_tokens` divides `block_size` or is a multiple of it.
    """

def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    block_size: int,
    top_k: int,
    sink_blocks: int = 0,
    scale: float | None = None,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    """Return `out [B, Hq, D]` and `lse [Hq, B]` for one new token of each of B sequences, whose pages already hold its key, as
    `paged_attention` describes them. On CUDA the values of `page_table` and `lengths` are not checked."""

def update_means(
    k: Tensor,
    means: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    before: Tensor,
    block_size: int,
    max_added: int,
    backend: str = "",
) -> None:
    """Write the means of the blocks that tokens have completed since sequences held `before` (int32 `[sequences]`) of them, at
    most `max_added` each.

    `means` `[pages, max(1, page_tokens // block_size), Hkv, D]`: the mean key of a complete block, rounded to the dtype of k,
    at the page where the block ends; float32 on the CPU, the dtype of k on CUDA.
    """
