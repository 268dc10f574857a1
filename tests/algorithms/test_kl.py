"""KL estimators and the KL loss against their formulas, in value and by finite differences,
and far off.

What their expected gradients are is shown in test_enumeration.py.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import (
    LENGTHS,
    each_token,
    kl_of,
    new_batch,
    randoms,
    sum_and_slopes,
    weight_of,
)

from nanomath.algorithms import KL_CORRECTIONS, kl_estimate, kl_loss, loss_weights

ESTIMATORS, CORRECTIONS = ("k1", "k2", "k3", "k3+"), ("off", "weight", "ratio")


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_values(kind):
    b = new_batch(0)
    found = kl_estimate(b.new, b.ref, kind)
    for i, t in each_token(LENGTHS):
        assert float(found[i, t]) == pytest.approx(
            kl_of(kind, float(b.new[i, t] - b.ref[i, t])), abs=1e-12
        )


def test_the_default_is_k3_without_correction():
    b = new_batch(0)
    assert torch.equal(kl_estimate(b.new, b.ref), kl_estimate(b.new, b.ref, "k3"))
    assert torch.equal(
        kl_loss(b.new, b.ref, b.old, b.weights),
        kl_loss(b.new, b.ref, b.old, b.weights, "k3", "off"),
    )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_gradient_is_the_derivative(kind):
    new, ref = (x.requires_grad_() for x in randoms(0, (3, 4), (3, 4)))
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, kind), (new, ref))


@pytest.mark.parametrize(
    ("kind", "correction"), list(itertools.product(ESTIMATORS, CORRECTIONS))
)
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_kl_loss_is_its_formula(kind, correction, aggregation):
    """k3+ is k3 in value, k2 in slope; "weight" freezes the ratio, "ratio" does not."""
    b = new_batch(seed=1)

    def value(i: int, t: int, x: float, slope: bool) -> float:
        at = float(b.new[i, t])
        rho = {
            "off": 1.0,
            "weight": math.exp(at - float(b.old[i, t])),
            "ratio": math.exp(x - float(b.old[i, t])),
        }
        gap = x - float(b.ref[i, t])
        kl = kl_of(kind, gap)
        if slope and kind == "k3+":
            kl = (
                kl_of("k2", gap)
                + kl_of("k3", at - float(b.ref[i, t]))
                - kl_of("k2", at - float(b.ref[i, t]))
            )
        return weight_of(aggregation, LENGTHS, i, 9) * rho[correction] * kl

    total, _ = sum_and_slopes(
        lambda i, t, x: value(i, t, x, slope=False), b.new, LENGTHS
    )
    _, slopes = sum_and_slopes(
        lambda i, t, x: value(i, t, x, slope=True), b.new, LENGTHS
    )
    new = b.new.clone().requires_grad_()
    loss = kl_loss(
        new, b.ref, b.old, loss_weights(b.mask, aggregation, 9), kind, correction
    )
    loss.backward()
    assert loss.item() == pytest.approx(total, abs=1e-10)
    torch.testing.assert_close(new.grad, slopes, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_same_policy_has_no_divergence(kind):
    same = torch.tensor([-1e-8, -3.0, -700.0])
    assert torch.equal(kl_estimate(same, same, kind), torch.zeros(3))


@pytest.mark.parametrize("kind", ["k3", "k3+"])
def test_k3_keeps_its_digits_near_zero(kind):
    """exp(-x) - 1 + x cancels all digits of float32 at x = 1e-4; the true value is x^2/2 to
    one part in 3e4.
    """
    x = torch.tensor([1e-3, 1e-2])
    assert kl_estimate(x, torch.zeros(2), kind).tolist() == pytest.approx(
        (x.double() ** 2 / 2).tolist(), rel=0.01
    )


@pytest.mark.parametrize("kind", ["k2", "k3", "k3+"])
@pytest.mark.parametrize("gap", [-1000.0, -89.0, -30.0, -21.0, 21.0, 89.0, 1000.0])
def test_far_from_the_reference_the_gradient_still_pulls_back(kind, gap):
    """Float32's exp overflows at 88: a token the reference likes and the policy has dropped
    must be brought back.
    """
    x = torch.tensor([gap], requires_grad=True)
    loss = kl_estimate(x, torch.zeros(1), kind)
    loss.backward()
    assert loss.isfinite() and loss > 0 and x.grad.isfinite()
    assert x.grad * gap > 0


def test_k3_goes_on_as_a_straight_line_where_exp_would_overflow():
    x = torch.tensor([-20.0, -20.5, -1000.0], dtype=torch.float64, requires_grad=True)
    found = kl_estimate(x, torch.zeros(3), "k3")
    slope = 1 - math.exp(20)
    at_20 = math.exp(20) - 1 - 20
    assert found.tolist() == pytest.approx(
        [at_20, at_20 - 0.5 * slope, at_20 - 980 * slope], rel=1e-12
    )
    found.sum().backward()
    assert x.grad.tolist() == pytest.approx([slope] * 3, rel=1e-12)


def test_up_to_the_line_k3_is_exact():
    x = torch.tensor([-19.9], dtype=torch.float64, requires_grad=True)
    kl_estimate(x, torch.zeros(1), "k3").backward()
    assert x.grad.item() == pytest.approx(1 - math.exp(19.9), rel=1e-12)


@pytest.mark.parametrize("correction", ["weight", "ratio"])
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_a_huge_ratio_leaves_the_kl_finite(correction, gap):
    new = torch.tensor([[gap]], requires_grad=True)
    loss = kl_loss(
        new, torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "k3", correction
    )
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all()


def test_unknown_names_tell_the_choices():
    one = torch.zeros(1, 1)
    with pytest.raises(
        ValueError, match=r"unknown KL estimator 'k4': choose one of k1, k2, k3, k3\+"
    ):
        kl_estimate(one, one, "k4")
    with pytest.raises(
        ValueError, match="unknown KL correction 'on': choose one of off, weight, ratio"
    ):
        kl_loss(one, one, one, one, "k3", "on")
    assert KL_CORRECTIONS == CORRECTIONS
