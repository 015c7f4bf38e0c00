"""Operators on the pages of a serving engine, against those on packed tensors."""

import pytest
import torch
from moba import ops
from moba.functional import EVERYTHING

PAGE, BLOCK = 16, 32
LENGTHS = [100, 37, 200]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def paged(dtype=torch.float32, heads=6, kv_heads=2, head_dim=64):
    """Return the packed keys and values of three sequences, and the arguments of paged_decode: one query for each, their pages
    in rows [page, kv head, keys and then values of the page], NaN elsewhere."""
    torch.manual_seed(0)
    pages = 40
    rows = torch.full((pages, kv_heads, 2 * PAGE, head_dim), torch.nan, dtype=dtype)
    k, v = (half.transpose(1, 2) for half in rows.chunk(2, dim=2))
    table = torch.randperm(pages)[:39].view(3, 13).int()
    keys, values = torch.randn(2, sum(LENGTHS), kv_heads, head_dim).to(dtype)
    for row, (key, value) in enumerate(zip(keys.split(LENGTHS), values.split(LENGTHS))):
        token = torch.arange(len(key))
        place = table[row][token // PAGE].long(), token % PAGE
        k[place], v[place] = key, value
    means = torch.full((pages, 1, kv_heads, head_dim), torch.nan)
    lengths = ints(*LENGTHS)
    ops.update_means(k, means, table, lengths, ints(0, 0, 0), BLOCK, max(LENGTHS))
    q = torch.randn(3, heads, head_dim).to(dtype)
    call = dict(zip(("q", "k", "v", "means", "page_table"), (q, k, v, means, table)))
    return keys, values, call | dict(lengths=lengths, block_size=BLOCK, top_k=3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("top_k, sinks", [(3, 0), (3, 1), (1, 0), (EVERYTHING, 0)])
def test_pages_give_the_bits_of_packed_tensors(dtype, top_k, sinks):
    keys, values, call = paged(dtype)
    q = torch.randn(120, 6, 64).to(dtype)
    cu_q, cu_k = ints(0, 20, 21, 120), ints(0, 100, 137, 337)
    call |= dict(q=q, cu_seqlens_q=cu_q, top_k=top_k, sink_blocks=sinks, scale=0.2)
    out, lse = ops.paged_attention(**call)
    expected = ops.attention(q, keys, values, cu_q, cu_k, BLOCK, top_k, sinks, scale=0.2)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])

    last = [19, 20, 119]
    call.pop("cu_seqlens_q")
    out, lse = ops.paged_decode(**(call | dict(q=q[last])))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, expected[0][last], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected[1][:, last], atol=1e-4, rtol=1e-5)


def test_means_are_those_of_the_keys_where_blocks_end():
    keys, _, call = paged(torch.bfloat16)
    for row, key in enumerate(keys.split(LENGTHS)):
        for block in range(len(key) // BLOCK):
            page = call["page_table"][row, (block + 1) * BLOCK // PAGE - 1]
            mean = key[block * BLOCK : (block + 1) * BLOCK].mean(0, dtype=torch.float32)
            found = call["means"][page, 0]
            assert torch.equal(found, found.bfloat16().float())
            torch.testing.assert_close(found, mean, atol=1e-3, rtol=2**-8)
    complete = sum(length // BLOCK for length in LENGTHS)
    assert call["means"].isfinite().all(-1).sum() == complete * 2  # heads


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"page_table": ints(1, 2)},
            ValueError,
            r"page_table: expected int32 \[3 .*\], got .*\[2\]",
        ),
        (
            {"page_table": torch.full((3, 13), 40, dtype=torch.int32)},
            ValueError,
            r"page_table: expected 0 to 39 \(the pages of k\), got 40 at page 0 of sequence 0",
        ),
        ({"page_table": torch.zeros(3, 13)}, TypeError, "page_table: expected torch.int32, got .*"),
        ({"lengths": ints(100, 37, 300)}, ValueError, "lengths: expected 0 to 208 .*, got 300 .*"),
        (
            {"lengths": ints(100, -1, 200)},
            ValueError,
            "lengths: expected 0 .*, got -1 in sequence 1",
        ),
        ({"means": torch.zeros(40, 1, 3, 64)}, ValueError, "means: expected .*got"),
        ({"block_size": 24}, ValueError, "block_size: expected a multiple or a divisor of 16.*24"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"q": torch.zeros(2, 6, 64)}, ValueError, "q: expected 3 tokens .*, got 2"),
        ({"q": torch.zeros(3, 6, 64).half()}, TypeError, "k: expected torch.float16.*float32"),
    ],
)
def test_invalid_arguments_are_named(change, error, message):
    *_, call = paged()
    with pytest.raises(error, match=f"^paged_decode: {message}"):
        ops.paged_decode(**(call | change))


def test_invalid_offsets_and_former_lengths_are_named():
    *_, call = paged()
    with pytest.raises(
        ValueError, match="^paged_attention: cu_seqlens_q: expected 4 entries .*, got 3"
    ):
        ops.paged_attention(**call, cu_seqlens_q=ints(0, 1, 3))
    k, means, table, lengths = (call[name] for name in ("k", "means", "page_table", "lengths"))
    with pytest.raises(ValueError, match="^update_means: before: expected 3 entries .*, got 2"):
        ops.update_means(k, means, table, lengths, ints(0, 0), BLOCK, 200)
    with pytest.raises(
        ValueError, match="^update_means: before: expected 190 or more .*, got 0 in sequence 2"
    ):
        ops.update_means(k, means, table, lengths, ints(90, 30, 0), BLOCK, 10)


def test_gradients_are_refused():
    *_, call = paged()
    out, _ = ops.paged_decode(**(call | {"q": call["q"].requires_grad_()}))
    with pytest.raises(NotImplementedError, match="paged_decode has no derivative"):
        out.sum().backward()
