"""Programs written for the published package, and the points where published implementations differ."""

import moba
import pytest
import torch
from packed import batch, offsets

NAMES = ("moba_attn_varlen", "moba_attn_varlen_naive")


def test_published_names_are_importable():
    from moba import MoBAConfig, register_moba  # noqa: F401
    from moba.moba_efficient import moba_attn_varlen
    from moba.moba_naive import moba_attn_varlen_naive

    assert (
        moba_attn_varlen is moba.moba_attn_varlen
        and moba_attn_varlen_naive is moba.moba_attn_varlen_naive
    )
    assert MoBAConfig(4096, 12) == MoBAConfig(moba_chunk_size=4096, moba_topk=12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "lengths, block_size, top_k",
    [
        ([512, 256], 64, 3),
        ([1], 4, 1),
        ([0, 33, 0], 8, 2),
        ([100], 1, 4),
        ([100], 200, 3),
        ([129, 1, 64], 64, 9),
    ],
)
def test_efficient_matches_naive(lengths, block_size, top_k, dtype):
    q, k, v, cu, _ = batch(lengths, 4, 2, 32, dtype)
    results = []
    for attend in (moba.moba_attn_varlen, moba.moba_attn_varlen_naive):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attend(*leaves, cu, max(lengths), block_size, top_k)
        assert out.shape == q.shape and out.dtype == dtype
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_top_k_of_one_is_the_current_block(name):
    q, k, v, cu, _ = batch([40])
    out = getattr(moba, name)(q, k, v, cu, 40, 8, 1)
    blocks = offsets([8] * 5)
    expected = getattr(moba, name)(q, k, v, blocks, 8, 8, 5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_more_recent_block_wins_among_equal_scores(name):
    q, _, v, cu, _ = batch([40], 1, 1)
    out = getattr(moba, name)(q, torch.ones_like(v), v, cu, 40, 8, 2)
    torch.testing.assert_close(out[39], v[24:].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_offsets_edited_in_place_take_effect(name):
    q, k, v, cu, _ = batch([20, 20])
    attend = getattr(moba, name)
    attend(q, k, v, cu, 20, 4, 2)
    cu[1] = 7
    assert torch.equal(attend(q, k, v, cu, 33, 4, 2), attend(q, k, v, offsets([7, 33]), 33, 4, 2))


def test_keys_and_values_keep_their_heads_in_the_gradient():
    q, k, v, cu, _ = batch([64], 8, 2)
    k.requires_grad_()
    moba.moba_attn_varlen(q, k, v, cu, 64, 8, 3).sum().backward()
    assert k.grad.shape == (64, 2, 16)
