"""The clipped policy loss against a double loop, its gradient, and what must never reach it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.algorithms import loss_weights, policy_loss, response_mask

clips = st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.1, 5.0), (0.0, 0.0)])


def case(seed: int, lengths: list[int], spread: float = 0.5) -> list[torch.Tensor]:
    """Random logprobs, old logprobs, advantages [B, T] and weights."""
    generator = torch.Generator().manual_seed(seed)
    mask = response_mask(torch.tensor(lengths), max(lengths) + 1)
    new, old, advantages = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [new * spread - 2, old * spread - 2, advantages, loss_weights(mask, "sequence").double()]


def double_loop(new, old, advantages, weights, low, high) -> float:
    total = 0.0
    for i in range(new.shape[0]):
        for t in range(new.shape[1]):
            if weights[i, t]:
                ratio = math.exp(float(new[i, t]) - float(old[i, t]))
                clipped = min(max(ratio, 1 - low), 1 + high)
                advantage = float(advantages[i, t])
                total -= float(weights[i, t]) * min(ratio * advantage, clipped * advantage)
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 6), min_size=1, max_size=4), clips)
def test_value_and_clip_masks(seed, lengths, clip):
    inputs = case(seed, lengths)
    before = [value.clone() for value in inputs]
    loss, stats = policy_loss(*inputs, *clip)
    assert float(loss) == pytest.approx(double_loop(*inputs, *clip), abs=1e-10)
    new, old, advantages, weights = inputs
    ratio = (new - old).exp()
    assert torch.equal(stats["clipped_low"], (weights > 0) & (ratio < 1 - clip[0]) & (advantages < 0))
    assert torch.equal(stats["clipped_high"], (weights > 0) & (ratio > 1 + clip[1]) & (advantages > 0))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 6), min_size=1, max_size=4), clips)
def test_gradient_is_the_clipped_ratio_or_zero(seed, lengths, clip):
    new, old, advantages, weights = case(seed, lengths)
    new.requires_grad_()
    loss, stats = policy_loss(new, old, advantages, weights, *clip)
    loss.backward()
    clipped = stats["clipped_low"] | stats["clipped_high"]
    expected = torch.where(clipped, 0.0, -weights * advantages * (new.detach() - old).exp())
    torch.testing.assert_close(new.grad, expected, rtol=0, atol=1e-10)


def test_gradient_is_the_derivative():
    new, old, advantages, weights = case(3, [4, 0, 1])
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, weights)[0], new.requires_grad_())


def test_one_advantage_a_sequence_is_the_same_at_every_token():
    new, old, _, weights = case(1, [3, 5])
    per_sequence = torch.tensor([0.7, -1.3], dtype=torch.float64)
    spread = per_sequence[:, None].expand_as(new)
    assert torch.equal(policy_loss(new, old, per_sequence, weights)[0], policy_loss(new, old, spread, weights)[0])


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("place", ["new", "old", "both"])
def test_tokens_without_weight_never_count(junk, place):
    new, old, advantages, weights = case(5, [2, 4, 0])
    clean = new.clone().requires_grad_()
    policy_loss(clean, old, advantages, weights)[0].backward()
    for value, name in ((new, "new"), (old, "old")):
        if place in (name, "both"):
            value[weights == 0] = junk
    new.requires_grad_()
    loss, stats = policy_loss(new, old, advantages, weights)
    loss.backward()
    assert torch.equal(new.grad, clean.grad) and loss.isfinite()
    assert not (stats["clipped_low"] | stats["clipped_high"])[weights == 0].any()


@pytest.mark.parametrize("advantage", [1.0, 0.0])
@pytest.mark.parametrize("log_ratio", [-200.0, -50.0, 50.0, 80.0])
def test_a_huge_ratio_that_is_clipped_leaves_a_finite_gradient(advantage, log_ratio):
    new = torch.tensor([[log_ratio]], requires_grad=True)
    loss, _ = policy_loss(new, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1))
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all()


def test_on_policy_the_expected_gradient_is_that_of_the_expected_advantage():
    theta = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    logprobs = theta.log_softmax(-1)
    objective = torch.autograd.grad((logprobs.exp() * advantage).sum(), theta, retain_graph=True)[0]
    p = logprobs.detach().exp()
    loss, _ = policy_loss(logprobs[None], logprobs.detach()[None], advantage[None], p[None])
    torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], -objective, rtol=0, atol=1e-12)
