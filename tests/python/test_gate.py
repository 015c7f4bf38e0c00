"""Selecting with the caller's gate, and the features of blocks, against torch."""

import moba
import pytest
import torch
from packed import batch

ops = moba.ops


def best(scores, top_k):
    """Return rows of the `top_k` blocks of highest score, ascending, padded with -1; of equal scores the later."""
    order = scores.double().flip(-1).sort(dim=-1, descending=True, stable=True).indices
    chosen = (scores.shape[-1] - 1 - order)[..., :top_k]
    seen = scores.gather(-1, chosen) > -torch.inf
    rows = torch.where(seen, chosen, 2**31 - 1).sort(-1).values
    return torch.where(rows == 2**31 - 1, -1, rows).int()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gate_dim", (32, 64, 128))
def test_the_highest_scores_are_selected(gate_dim, dtype):
    torch.manual_seed(gate_dim)
    tokens, block_size, top_k = 100, 8, 4
    blocks = (tokens + block_size - 1) // block_size
    gate_q = torch.randint(-3, 4, (2, tokens, 6, gate_dim)).to(dtype)
    gate_k = torch.randint(-3, 4, (2, blocks, 2, gate_dim)).float()
    found = moba.select(gate_q, gate_k, block_size=block_size, top_k=top_k)
    scores = torch.einsum(
        "bqhd,bkhd->bhqk", gate_q.double(), gate_k.double().repeat_interleave(3, 2)
    )
    own = torch.arange(tokens)[:, None] // block_size
    block = torch.arange(blocks)
    scores = scores.masked_fill(block == own, torch.inf).masked_fill(block > own, -torch.inf)
    assert torch.equal(found, best(scores, top_k))


@pytest.mark.parametrize("causal", (True, False))
def test_the_means_of_keys_are_moba(causal):
    q, k, v = torch.randn(2, 90, 4, 16), torch.randn(2, 120, 2, 16), torch.randn(2, 120, 2, 16)
    routing = dict(block_size=16, top_k=3, causal=causal)
    _, wanted = moba.attention(q, k, v, return_selection=True, **routing)
    mean, _, _ = moba.block_features(k, 16)
    assert torch.equal(moba.select(q, mean, keys=120, **routing), wanted[..., :3])
    packed = batch([30, 0, 41], key_lengths=[50, 3, 41])
    features = [moba.block_features(t[None], 16)[0][0] for t in packed[1].split([50, 3, 41])]
    arguments = (*packed[3:], 16, 3, 0, causal)
    assert torch.equal(
        ops.select_by_gate(packed[0], torch.cat(features), *arguments),
        ops.select(packed[0], packed[1], *arguments),
    )


def test_padding_is_not_counted():
    gate_q, gate_k = torch.randn(2, 20, 4, 32), torch.randn(2, 5, 2, 32)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0, :20], mask[1, 30:] = False, False  # 17 and 30 tokens
    routing = dict(block_size=8, top_k=2)
    found = moba.select(gate_q, gate_k, keys=37, padding_mask=mask, **routing)
    left = moba.select(gate_q[:1, 3:], gate_k[:1, :3], keys=17, **routing)
    right = moba.select(gate_q[1:, :13], gate_k[1:, :4], keys=30, **routing)
    assert torch.equal(found[:1, :, 3:], left) and torch.equal(found[1:, :, :13], right)
    assert (found[0, :, :3] == -1).all() and (found[1, :, 13:] == -1).all()
    k = torch.randn(2, 37, 2, 32)
    moba.attention(gate_q, k, k, padding_mask=mask, selection=found, block_size=8)


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str
)
def test_features_match_torch(dtype):
    k = torch.randn(3, 2, 50, 20).to(dtype).transpose(1, 2)
    mean, high, low = moba.block_features(k, 16)
    for row in range(4):
        block = k[:, 16 * row : 16 * row + 16]
        assert torch.equal(high[:, row], block.amax(1)) and torch.equal(low[:, row], block.amin(1))
        wanted = block.float().mean(1).to(dtype)
        torch.testing.assert_close(mean[:, row], wanted, atol=1e-6, rtol=1e-2)


def test_the_bound_by_extremes_is_a_gate_with_twice_the_dimensions():
    """Quest's score, the largest product that any key of the block may have, is a sum over both extremes."""
    torch.manual_seed(1)
    q, k = torch.randn(1, 64, 4, 16), torch.randn(1, 64, 2, 16)
    _, high, low = moba.block_features(k, 8)
    found = moba.select(
        torch.cat([q.clamp(min=0), q.clamp(max=0)], -1),
        torch.cat([high, low], -1),
        block_size=8,
        top_k=3,
    )
    high, low = (t.repeat_interleave(2, 2) for t in (high, low))
    bound = torch.maximum(q[:, :, None] * high[:, None], q[:, :, None] * low[:, None]).sum(-1)
    scores = bound.permute(0, 3, 1, 2)  # [B, H, Sq, blocks]
    own = torch.arange(64)[:, None] // 8
    scores = scores.masked_fill(torch.arange(8) == own, torch.inf)
    scores = scores.masked_fill(torch.arange(8) > own, -torch.inf)
    assert torch.equal(found, best(scores, 3))


def test_compiled_calls_give_the_same_blocks():
    gate_q, gate_k = torch.randn(1, 40, 4, 32), torch.randn(1, 5, 2, 32)

    def call(gate_q, gate_k):
        return moba.select(gate_q, gate_k, block_size=8, top_k=2)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(gate_q, gate_k), call(gate_q, gate_k))


WRONG = {
    "blocks": ({"gate_k": torch.randn(1, 4, 2, 32)}, r"gate_k: expected \[1, 5, heads, head_dim\]"),
    "batch": ({"gate_k": torch.randn(2, 5, 2, 32)}, r"gate_k: expected \[1, 5, heads, head_dim\]"),
    "rank": ({"gate_q": torch.randn(40, 4, 32)}, r"gate_q: expected \[batch, tokens or blocks"),
    "heads": ({"gate_k": torch.randn(1, 5, 3, 32)}, "k: expected a number of heads that divides 4"),
    "head_dim": ({"gate_k": torch.randn(1, 5, 2, 16)}, "k: expected head_dim 32"),
    "top_k": ({"top_k": 0}, "top_k: expected at least 1, got 0"),
    "sinks": ({"sink_blocks": 2}, "sink_blocks: expected 0 to 1"),
    "own block": ({"own_block": True}, "own_block: expected false for causal"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_arguments_are_named(name):
    change, message = WRONG[name]
    call = {
        "gate_q": torch.randn(1, 40, 4, 32),
        "gate_k": torch.randn(1, 5, 2, 32),
        "block_size": 8,
        "top_k": 2,
    }
    moba.select(**call)
    with pytest.raises(ValueError, match=f"^select(_by_gate)?: {message}"):
        moba.select(**call | change)


def test_wrong_dtypes_raise_type_error():
    gate_q, gate_k = torch.randn(1, 40, 4, 32), torch.randn(1, 5, 2, 32)
    with pytest.raises(TypeError, match="^select_by_gate: k: expected torch.float32"):
        moba.select(gate_q, gate_k.half(), block_size=8, top_k=2)
    with pytest.raises(TypeError, match="^select_by_gate: q: expected one of"):
        moba.select(gate_q.long(), gate_k, block_size=8, top_k=2)
    with pytest.raises(TypeError, match="^select: gate_k: expected a tensor"):
        moba.select(gate_q, None, block_size=8, top_k=2)
    with pytest.raises(TypeError, match="^block_features: k: expected one of"):
        moba.block_features(gate_q.long(), 8)
    with pytest.raises(ValueError, match="^block_features: block_size: expected at least 1, got 0"):
        moba.block_features(gate_q, 0)
