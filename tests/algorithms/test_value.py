"""GAE against its double sum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.algorithms import gae, response_mask

factor = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 6), min_size=1, max_size=4), factor, factor)
def test_gae_is_its_definition(seed, lengths, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    mask = response_mask(torch.tensor(lengths), max(lengths) + 1)
    rewards, values = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = rewards.clone(), values.clone(), mask.clone()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        value = [float(v) for v in values[i, :n]] + [0.0]
        delta = [float(rewards[i, t]) + gamma * value[t + 1] - value[t] for t in range(n)]
        for t in range(mask.shape[1]):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-10)
            assert float(returns[i, t]) == pytest.approx(expected + value[t] if t < n else 0.0, abs=1e-10)
    assert all(torch.equal(a, b) for a, b in zip((rewards, values, mask), kept, strict=True))


def test_lambda_one_is_the_return_less_the_value():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.9]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert returns[0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert advantages[0].tolist() == pytest.approx([0.8, 0.6, 0.1])


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_what_lies_past_the_end_never_counts(junk):
    mask = response_mask(torch.tensor([2, 4]))
    rewards, values = torch.ones(2, 4), torch.full((2, 4), 0.5)
    clean = gae(rewards, values, mask)
    rewards[~mask], values[~mask] = junk, junk
    for a, b in zip(gae(rewards, values, mask), clean, strict=True):
        assert torch.equal(a, b)
