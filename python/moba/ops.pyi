"""The operators, `torch.ops.moba.*`, on packed tensors.

`q [Tq, Hq, D]`, `k` and `v` `[Tk, Hkv, D]` of one dtype (float32, bfloat16, float16; float64 through the slow reference), any
strides, `Hq % Hkv == 0`. `cu_seqlens_q`, `cu_seqlens_k`: int32 `[sequences + 1]`, from 0, never decreasing, to Tq and Tk;
queries are the last of their keys. `top_k` blocks of `block_size` tokens a query, its own included; as many as there are, or
more, is dense attention. Selections are int32 `[Hq, Tq, min(top_k, ceil(Tk / block_size))]`: block numbers within the
sequence, ascending, padded with -1. Raise TypeError (of a dtype) or ValueError naming the argument, what was expected and what
came. Results are bit-identical on every run and for any number of threads, so torch.use_deterministic_algorithms has
nothing to change.

CUDA tensors go to the CUDA backend, where the package was built with it: bfloat16 and float16, head_dim 64, 96, 128 and 256,
on the current stream and never waiting for it. Offsets stay on the device, so nothing checks what they hold.
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`out [Tq, Hq, D]`, `lse [Hq, Tq]` (float32, natural logarithm, no gradient), and the selection, 0 wide unless asked for.

    Differentiable in q, k and v; the selection counts as a constant. `scale` of the logits: D^-0.5 unless given. `backend`:
    "cpu", "reference" or "cuda"; empty: the best there is for the device.
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
    """`dq, dk, dv` in the shapes of q, k and v. A selection 0 wide is selected again, to the same blocks."""

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
    """The selection alone."""

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
) -> tuple[Tensor, Tensor]:
    """One new token for each of B sequences: `out [B, Hq, D]` and `lse [Hq, B]` for `q [B, Hq, D]`, without a derivative.

    `k`, `v` `[B, tokens, Hkv, D]`, any strides, of which sequence b holds tokens `[begin[b], end[b])`, the query's own last;
    int32. `means` `[B, blocks, Hkv, D]`: of every complete block counted from `begin[b]`, the mean of its keys rounded to their
    dtype; float32 on the CPU, in the dtype of k on CUDA; not read where the routing covers every block. On CUDA nothing checks what
    `begin` and `end` hold.
    """
