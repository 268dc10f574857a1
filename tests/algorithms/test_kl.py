"""KL estimators, in value and in gradient, by exact enumeration of a small softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.algorithms import kl_estimate

logits = st.lists(st.floats(-5, 5), min_size=2, max_size=7)


def distributions(values: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits that ask for a gradient, their logprobs, and other logprobs for a reference."""
    theta = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([math.sin(3 * i + v) for i, v in enumerate(values)], dtype=torch.float64)
    return theta, theta.log_softmax(-1), reference.log_softmax(-1)


def expected_gradient(theta, logprobs, reference, kind) -> torch.Tensor:
    """E over tokens drawn from the policy of the gradient of the estimate as a loss (the draw itself held fixed)."""
    mean = (logprobs.detach().exp() * kl_estimate(logprobs, reference, kind)).sum()
    return torch.autograd.grad(mean, theta, retain_graph=True)[0]


@settings(max_examples=50, deadline=None)
@given(logits)
def test_values(values):
    _, logprobs, reference = distributions(values)
    logprobs = logprobs.detach()
    p, kl = logprobs.exp(), (logprobs.exp() * (logprobs - reference)).sum()
    for kind in ("k1", "k3"):
        assert float((p * kl_estimate(logprobs, reference, kind)).sum()) == pytest.approx(float(kl), abs=1e-10)
    assert (kl_estimate(logprobs, reference, "k3") >= 0).all()
    for a, b, k1, k2, k3 in zip(
        logprobs.tolist(),
        reference.tolist(),
        *(kl_estimate(logprobs, reference, k) for k in ("k1", "k2", "k3")),
        strict=True,
    ):
        x = a - b
        assert [float(k1), float(k2), float(k3)] == pytest.approx([x, x * x / 2, math.exp(-x) - 1 + x], abs=1e-10)


@settings(max_examples=50, deadline=None)
@given(logits)
def test_gradients_as_a_loss(values):
    theta, logprobs, reference = distributions(values)
    reverse = (logprobs.exp() * (logprobs - reference)).sum()
    forward = (reference.exp() * (reference - logprobs)).sum()
    expected = {
        "k1": torch.zeros_like(theta),
        "k2": torch.autograd.grad(reverse, theta, retain_graph=True)[0],
        "k3": torch.autograd.grad(forward, theta, retain_graph=True)[0],
    }
    for kind, gradient in expected.items():
        found = expected_gradient(theta, logprobs, reference, kind)
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradient_is_the_derivative(kind):
    generator = torch.Generator().manual_seed(0)
    new, ref = (torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    before = new.detach().clone(), ref.detach().clone()
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, kind), (new, ref))
    assert torch.equal(new, before[0]) and torch.equal(ref, before[1])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_same_policy_has_no_divergence(kind):
    same = torch.tensor([-1e-8, -3.0, -700.0])
    assert torch.equal(kl_estimate(same, same, kind), torch.zeros(3))


def test_k3_keeps_its_digits_near_zero():
    """exp(-x) - 1 + x cancels all digits of float32 at x = 1e-4; the true value is x^2/2 to one part in 3e4."""
    x = torch.tensor([1e-3, 1e-2])
    assert kl_estimate(x, torch.zeros(2)).tolist() == pytest.approx((x.double() ** 2 / 2).tolist(), rel=0.01)


def test_unknown_estimator_names_the_choices():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
