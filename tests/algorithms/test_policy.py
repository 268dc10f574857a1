"""Every policy loss against a loop over tokens of its paper's formula, in value and gradient,
and at its limits.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    LENGTHS,
    clip,
    each_token,
    gain_of,
    mean,
    new_batch,
    ratio_of,
    sum_and_slopes,
    weight_of,
)
from torch import Tensor

from nanomath.algorithms import loss_weights, policy_loss, sampler_correction

RATIOS, CLIPS = ("token", "sequence", "off"), ("ppo", "dual", "cispo", "off")
AGGREGATIONS = ("token", "sequence", "constant", "sum")
CORRECTIONS = ("off", "truncate", "mask")
LOW, HIGH, DUAL, LONGEST = 0.2, 0.28, 1.4, 9


def correction_of(how: str, weight: float) -> float:
    """TIS: min(w, 1.3); MIS: w within [0.7, 1.3], else 0."""
    return {
        "off": 1.0,
        "truncate": min(weight, 1.3),
        "mask": weight if 0.7 <= weight <= 1.3 else 0.0,
    }[how]


def paper_loss(b, advantages, ratio, how_clip, aggregation, correction):
    """(i, t, x) -> what token (i, t) with logprob x adds to the loss; x stands for pi, b.new
    for what is frozen.
    """

    def term(i: int, t: int, x: float) -> float:
        frozen, old = b.new[i, : LENGTHS[i]].tolist(), b.old[i, : LENGTHS[i]].tolist()
        rho, frozen_rho = (
            ratio_of(ratio, value, frozen, old, t) for value in (x, frozen[t])
        )
        a = float(advantages[i] if advantages.dim() == 1 else advantages[i, t])
        weight = weight_of(aggregation, LENGTHS, i, LONGEST)
        weight *= correction_of(correction, math.exp(old[t] - float(b.sampled[i, t])))
        return -weight * gain_of(how_clip, rho, frozen_rho, x, a, LOW, HIGH, DUAL)

    return term


@pytest.mark.parametrize("advantage", ["of a completion", "of a token"])
@pytest.mark.parametrize(
    "combination",
    [*itertools.product(RATIOS, CLIPS, AGGREGATIONS, CORRECTIONS)],
    ids="-".join,
)
def test_value_and_gradient(combination, advantage):
    ratio, how_clip, aggregation, correction = combination
    b = new_batch(seed=11)
    advantages = b.advantages if advantage == "of a token" else b.advantages[:, 1]
    weights = loss_weights(b.mask, aggregation, LONGEST)
    weights = weights * sampler_correction(
        b.old, b.sampled, b.mask, correction, 0.7, 1.3
    )
    value, slopes = sum_and_slopes(
        paper_loss(b, advantages, *combination), b.new, LENGTHS
    )
    new = b.new.clone().requires_grad_()
    options = {"ratio": ratio, "clip": how_clip, "dual_clip": DUAL, "mask": b.mask}
    loss, _ = policy_loss(new, b.old, advantages, weights, LOW, HIGH, **options)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(new.grad, slopes, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("low_high", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 4.0)])
def test_what_counts_as_clipped(ratio, low_high):
    low, high = low_high
    b = new_batch(seed=3, lengths=[6, 0, 2, 5])
    _, stats = policy_loss(
        b.new, b.old, b.advantages, b.weights, low, high, ratio=ratio
    )
    assert stats.keys() == {"clipped_low", "clipped_high"}
    expected = {name: torch.zeros_like(b.mask) for name in stats}
    for i, t in each_token([6, 0, 2, 5]):
        n = int(b.mask[i].sum())
        new, old = b.new[i, :n].tolist(), b.old[i, :n].tolist()
        rho, a = ratio_of(ratio, new[t], new, old, t), float(b.advantages[i, t])
        expected["clipped_low"][i, t] = rho < 1 - low and a < 0
        expected["clipped_high"][i, t] = rho > 1 + high and a > 0
    assert all(torch.equal(stats[name], expected[name]) for name in stats)


def test_the_clip_range_includes_its_ends():
    """At exactly 1 - low or 1 + high nothing is clipped yet; no advantage is no push in either
    direction.
    """
    new, one = torch.tensor([[0.5, 1.5, 0.25, 2.0]]).double().log(), torch.ones(1, 4)
    _, stats = policy_loss(
        new, torch.zeros(1, 4), torch.tensor([[-1.0, 1.0, 0.0, 0.0]]), one, 0.5, 0.5
    )
    assert not stats["clipped_low"].any() and not stats["clipped_high"].any()


def test_tokens_that_are_not_taught_are_never_counted_as_clipped():
    far, one = torch.tensor([[-2.0, 2.0]]), torch.ones(1, 2)
    options = {"weights": 0 * one, "mask": one.bool()}
    for advantage in (-1.0, 1.0):
        _, stats = policy_loss(far, 0 * one, advantage * one, **options)
        assert not stats["clipped_low"].any() and not stats["clipped_high"].any()


def test_defaults_are_grpo_as_published():
    b = new_batch(seed=4)
    plain, _ = policy_loss(b.new, b.old, b.advantages, b.weights)
    named, _ = policy_loss(
        b.new, b.old, b.advantages, b.weights, 0.2, 0.2, ratio="token", clip="ppo"
    )
    assert torch.equal(plain, named)
    default = policy_loss(b.new, b.old - 2, b.advantages, b.weights, clip="dual")[0]
    assert torch.equal(
        default,
        policy_loss(
            b.new, b.old - 2, b.advantages, b.weights, clip="dual", dual_clip=3.0
        )[0],
    )


@pytest.mark.parametrize("how_clip", ["off", "ppo"])
def test_gspo_is_the_gradient_of_its_own_objective(how_clip):
    """1/B sum_i min(s_i A_i, clip(s_i) A_i) with s_i = exp(1/|o_i| sum_t log rho_t),
    differentiated as it stands.
    """
    b = new_batch(seed=5)
    low, high, a = 0.05, 0.07, b.advantages[:, 0]
    x = b.new.clone().requires_grad_()
    objective = torch.zeros((), dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        if n:
            s = ((x[i, :n] - b.old[i, :n]).sum() / n).exp()
            clipped = s.clamp(1 - low, 1 + high) if how_clip == "ppo" else s
            objective = objective + min(
                s * a[i], clipped * a[i], key=Tensor.item
            ) / len(LENGTHS)
    objective.backward()
    new = b.new.clone().requires_grad_()
    weights = loss_weights(b.mask, "sequence")
    loss, _ = policy_loss(
        new, b.old, a, weights, low, high, ratio="sequence", clip=how_clip
    )
    loss.backward()
    assert loss.item() == pytest.approx(-objective.item(), abs=1e-12)
    torch.testing.assert_close(new.grad, -x.grad, rtol=0, atol=1e-12)


def test_the_ratio_of_a_sequence_means_over_tokens_that_are_not_taught_too():
    b = new_batch(seed=6)
    taught = b.weights.clone()
    taught[3, 1] = taught[0, 0] = 0.0
    loss, _ = policy_loss(
        b.new, b.old, b.advantages, taught, ratio="sequence", clip="off", mask=b.mask
    )
    total = 0.0
    for i, t in each_token(LENGTHS):
        new, old = b.new[i, : LENGTHS[i]].tolist(), b.old[i, : LENGTHS[i]].tolist()
        total -= (
            float(taught[i, t])
            * math.exp(mean([x - y for x, y in zip(new, old, strict=True)]))
            * float(b.advantages[i, t])
        )
    assert loss.item() == pytest.approx(total, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_dual_clip_bounds_the_loss_of_bad_tokens(seed, lengths):
    """min(rho A, clip(rho) A) >= c A once dual; far-off tokens with A < 0 have no gradient any
    more.
    """
    b = new_batch(seed, lengths)
    new = (b.new + 2).requires_grad_()
    bad = -b.advantages.abs() - 0.1
    loss, _ = policy_loss(new, b.old, bad, b.weights, clip="dual", dual_clip=3.0)
    loss.backward()
    rho = (new.detach() - b.old).exp()
    expected = torch.where(
        b.mask, -b.weights * bad * torch.where(rho > 3, 0.0, rho.clamp(min=0.8)), 0.0
    )
    inside = (rho >= 0.8) & (rho <= 3)
    torch.testing.assert_close(
        new.grad, torch.where(inside, expected, 0.0), rtol=0, atol=1e-12
    )
    assert loss.item() <= float((b.weights * 3 * bad.abs()).sum()) + 1e-12


@pytest.mark.parametrize("how_clip", CLIPS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("log_ratio", [-1000.0, -89.0, -30.0, 30.0, 89.0, 1000.0])
def test_a_huge_ratio_leaves_a_finite_gradient_that_points_the_right_way(
    log_ratio, advantage, ratio, how_clip
):
    """Descending must never make a good token rarer or a bad one likelier."""
    new = torch.tensor([[log_ratio - 1000, -1.0]], requires_grad=True)
    old = torch.tensor([[-1000.0, -1.0]])
    loss, _ = policy_loss(
        new,
        old,
        torch.tensor([advantage]),
        torch.ones(1, 2),
        ratio=ratio,
        clip=how_clip,
    )
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all()
    assert (new.grad * advantage <= 0).all()


@pytest.mark.parametrize(
    ("log_ratio", "expected"),
    [(19.0, math.exp(19)), (21.0, 0.0), (-21.0, 0.0), (1000.0, 0.0)],
)
def test_the_unclipped_ratio_is_held_beyond_exp_20(log_ratio, expected):
    new = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, _ = policy_loss(new, 0 * one, one, one, clip="off")
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(clip(log_ratio, -20, 20)))
    assert new.grad.item() == pytest.approx(-expected)


@pytest.mark.parametrize(
    ("log_ratio", "held"), [(19.0, 19), (1000.0, 20), (-1000.0, -20)]
)
def test_the_ratio_of_a_sequence_is_held_at_exp_20_and_keeps_its_gradient(
    log_ratio, held
):
    new = torch.tensor(
        [[log_ratio, log_ratio]], dtype=torch.float64, requires_grad=True
    )
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    loss, _ = policy_loss(
        new, 0 * half, torch.ones(1), half, ratio="sequence", clip="off"
    )
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(held))
    assert new.grad.tolist() == [pytest.approx([-0.5 * math.exp(held)] * 2)]


def test_the_ratio_of_a_sequence_keeps_its_digits_beside_large_logprobs():
    """GSPO clips at 3e-4, and float32 holds -20 to 2e-6: the mean must not be rounded as a
    logprob is.
    """
    mean_log_ratio = 157.5 * 2**-19
    old = torch.tensor([[-20.0, -0.5, -3.0, 0.0]])
    new = old + torch.tensor([[0.0, 0.0, 0.0, 4 * mean_log_ratio]])
    for t in range(4):
        only = torch.eye(4)[t : t + 1]
        loss, _ = policy_loss(
            new,
            old,
            torch.ones(1),
            only,
            ratio="sequence",
            clip="off",
            mask=torch.ones(1, 4).bool(),
        )
        assert loss.item() == pytest.approx(-math.exp(mean_log_ratio), abs=1.5e-7)


def test_without_old_logprobs_apart_the_ratio_is_one_with_a_gradient():
    b = new_batch(seed=9)
    new = b.new.clone().requires_grad_()
    for ratio, how_clip in itertools.product(RATIOS, ("ppo", "dual", "cispo", "off")):
        new.grad = None
        policy_loss(
            new, new.detach(), b.advantages, b.weights, ratio=ratio, clip=how_clip
        )[0].backward()
        torch.testing.assert_close(
            new.grad, -b.weights * b.advantages, rtol=0, atol=1e-15
        )


@pytest.mark.parametrize(("axis", "choices"), [("ratio", RATIOS), ("clip", CLIPS)])
def test_unknown_names_tell_the_choices(axis, choices):
    one = torch.ones(1, 1)
    with pytest.raises(
        ValueError, match=f"unknown {axis} 'best': choose one of {', '.join(choices)}"
    ):
        policy_loss(one, one, one, one, **{axis: "best"})
