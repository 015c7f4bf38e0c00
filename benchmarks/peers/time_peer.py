#!/usr/bin/env python3
"""Time one peer at one length, in a separate process whose peak memory can be measured; print one JSON object."""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import naive  # noqa: E402
import torch  # noqa: E402
from machine import peak_rss_bytes  # noqa: E402


def sdpa(q, k, v, options):
    def call():
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call, None


def sdpa_backward(q, k, v, options):
    """Return the backward pass alone and the forward pass that prepares it, which is not timed."""
    for tensor in (q, k, v):
        tensor.requires_grad_()
    d_out = torch.randn_like(q)
    state = {}

    def prepare():
        state["out"] = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return lambda: torch.autograd.grad(state["out"], (q, k, v), d_out), prepare


def flex(q, k, v, options):
    """Return compiled FlexAttention with the block mask of MoBA's selection. Neither the selection nor the mask is timed."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    size, rows, tokens = options.chunk_size, 128, options.tokens
    selected = naive.select_blocks(q[0, 0], k[0, 0], size, options.topk)
    query_blocks = -(-tokens // rows)
    padded = torch.nn.functional.pad(selected, (0, 0, 0, query_blocks * rows - tokens))
    visited = padded.unflatten(0, (query_blocks, rows)).any(1)
    counts = visited.sum(1, dtype=torch.int32)
    indices = visited.int().argsort(dim=1, descending=True, stable=True).int()

    def visible(batch, head, query, key):
        return selected[query, key // size] & (key <= query)

    mask = BlockMask.from_kv_blocks(
        counts[None, None],
        indices[None, None],
        BLOCK_SIZE=(rows, size),
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )
    compiled = torch.compile(flex_attention)

    def call():
        with torch.inference_mode():
            return compiled(q, k, v, block_mask=mask)

    if options.check:
        expected = naive.attention(q[0, 0], k[0, 0], v[0, 0], size, options.topk)
        torch.testing.assert_close(call()[0, 0], expected, rtol=1e-3, atol=1e-3)
    return call, None


def moba_naive(q, k, v, options):
    def call():
        with torch.inference_mode():
            return naive.attention(q[0, 0], k[0, 0], v[0, 0], options.chunk_size, options.topk)

    return call, None


PEERS = {"sdpa": sdpa, "sdpa-backward": sdpa_backward, "flex": flex, "moba-naive": moba_naive}


def seconds_of(call, prepare):
    if prepare:
        prepare()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--topk", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--budget",
        type=float,
        default=60,
        help="seconds of all runs together; there is at least one",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the naive implementation first (flex)"
    )
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    q, k, v = torch.randn(
        3, 1, options.heads, options.tokens, options.head_dim, dtype=getattr(torch, options.dtype)
    ).unbind(0)
    call, prepare = PEERS[options.peer](q, k, v, options)
    if options.peer == "flex":
        call()  # compiles
    first = seconds_of(call, prepare)
    seconds = [first] if first > 10 else []  # of a long run, the warm-up is negligible
    runs = min(options.runs, max(1, int(options.budget / first)))
    seconds += [seconds_of(call, prepare) for _ in range(runs - len(seconds))]
    print(json.dumps({"seconds": sorted(seconds), "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
