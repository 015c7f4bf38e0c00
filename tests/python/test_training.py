"""Training: the same bits again, and the same losses as the naive implementation."""

import moba
import torch
from random_models import build, random_ids

STEPS = 200


def losses(implementation, steps=STEPS, full_from=None):
    model = build(
        "llama", num_hidden_layers=2, hidden_size=32, intermediate_size=48, initializer_range=0.02
    ).train()
    model.set_attn_implementation(implementation)
    # SGD, because the first steps of Adam turn the rounding of a vanishing gradient into a whole step.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        ids = random_ids(2, 48, seed=step) % 8 + 3  # eight tokens of 99
        with moba.mode("full" if full_from is not None and step >= full_from else "moba"):
            loss = model(ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_training_is_bit_identical_and_matches_naive():
    moba.register_moba(moba.MoBAConfig(8, 2))
    first, again, naive = losses("moba"), losses("moba"), losses("moba_naive")
    assert first == again
    assert max(abs(a - b) for a, b in zip(first, naive)) < 1e-3
    assert first[-1] < first[0] - 1


def test_training_may_switch_to_full_attention():
    moba.register_moba(moba.MoBAConfig(8, 2))
    switched, sparse = losses("moba", 60, full_from=40), losses("moba", 60)
    assert switched[:40] == sparse[:40] and switched[40:] != sparse[40:]
    assert switched[-1] < switched[0]
