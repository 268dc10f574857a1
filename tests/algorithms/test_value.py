"""GAE against its double sum, the clipped value loss against its formula, explained variance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LENGTHS, clip, mean, new_batch, std, sum_and_slopes, weight_of

from nanomath.algorithms import (
    explained_variance,
    gae,
    loss_weights,
    response_mask,
    value_loss,
)

factor = st.sampled_from([0.0, 0.5, 0.95, 1.0])
some_lengths = st.lists(st.integers(0, 6), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), some_lengths, factor, factor)
def test_gae_is_its_definition(seed, lengths, gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t, V after
    the end being 0.
    """
    b = new_batch(seed, lengths)
    advantages, returns = gae(b.rewards, b.values, b.mask, gamma, lam)
    for i, n in enumerate(lengths):
        value = [float(v) for v in b.values[i, :n]] + [0.0]
        delta = [
            float(b.rewards[i, t]) + gamma * value[t + 1] - value[t] for t in range(n)
        ]
        for t in range(b.mask.shape[1]):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-10)
            assert float(returns[i, t]) == pytest.approx(
                expected + value[t] if t < n else 0.0, abs=1e-10
            )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), some_lengths, factor)
def test_lambda_one_is_the_discounted_return_less_the_value(seed, lengths, gamma):
    b = new_batch(seed, lengths)
    advantages, returns = gae(b.rewards, b.values, b.mask, gamma, lam=1.0)
    to_go, _ = gae(b.rewards, torch.zeros_like(b.values), b.mask, gamma, lam=1.0)
    for i, n in enumerate(lengths):
        for t in range(n):
            total = sum(gamma ** (k - t) * float(b.rewards[i, k]) for k in range(t, n))
            assert float(to_go[i, t]) == pytest.approx(total, abs=1e-10)
            assert float(returns[i, t]) == pytest.approx(total, abs=1e-10)
            assert float(advantages[i, t]) == pytest.approx(
                total - float(b.values[i, t]), abs=1e-10
            )


def test_gae_by_default_does_not_discount_and_looks_95_percent_ahead():
    b = new_batch(0)
    for found, expected in zip(
        gae(b.rewards, b.values, b.mask),
        gae(b.rewards, b.values, b.mask, 1.0, 0.95),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("bound", [0.2, 0.7, math.inf])
def test_value_loss_is_its_formula(bound, how):
    """1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2)."""
    b = new_batch(seed=8)

    def term(i: int, t: int, v: float) -> float:
        old, target = float(b.old_values[i, t]), float(b.rewards[i, t])
        near = old + clip(v - old, -bound, bound)
        return (
            weight_of(how, LENGTHS, i, 9)
            * max((v - target) ** 2, (near - target) ** 2)
            / 2
        )

    value, slopes = sum_and_slopes(term, b.values, LENGTHS)
    values = b.values.clone().requires_grad_()
    loss = value_loss(
        values, b.old_values, b.rewards, loss_weights(b.mask, how, 9), bound
    )
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(values.grad, slopes, rtol=0, atol=1e-10)


def test_value_loss_by_default_clips_at_a_fifth():
    b = new_batch(0)
    arguments = (b.values, b.old_values, b.rewards, b.weights)
    assert torch.equal(value_loss(*arguments), value_loss(*arguments, 0.2))


def test_a_value_already_moved_too_far_towards_its_return_rests():
    values = torch.tensor([[0.5]], requires_grad=True)
    value_loss(
        values, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), 0.2
    ).backward()
    assert values.grad.item() == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), some_lengths)
def test_explained_variance_is_its_definition(seed, lengths):
    b = new_batch(seed, lengths)
    returns, values = b.rewards[b.mask].tolist(), b.values[b.mask].tolist()
    expected = 0.0
    if len(returns) > 1:
        expected = (
            1
            - std([r - v for r, v in zip(returns, values, strict=True)]) ** 2
            / std(returns) ** 2
        )
    assert explained_variance(b.values, b.rewards, b.mask) == pytest.approx(
        expected, rel=1e-9, abs=1e-9
    )


def test_explained_variance_at_its_landmarks():
    b = new_batch(0)
    constant = torch.full_like(b.values, mean(b.rewards[b.mask].tolist()))
    assert explained_variance(b.rewards, b.rewards, b.mask) == 1.0
    assert explained_variance(constant, b.rewards, b.mask) == pytest.approx(
        0.0, abs=1e-12
    )
    assert (
        explained_variance(
            b.rewards[:, :2],
            b.rewards[:, :2],
            response_mask(torch.tensor([2, 0, 0, 0])),
        )
        == 1.0
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("lengths", [[7, 0], [1, 0], [0, 0]])
def test_returns_that_do_not_vary_explain_nothing(value, lengths):
    """The mean of seven times 0.1 is not 0.1: their variance is 2e-34, by which nothing must
    be divided.
    """
    b = new_batch(0, lengths)
    assert explained_variance(b.values, torch.full_like(b.values, value), b.mask) == 0.0
