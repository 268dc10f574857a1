"""Advantages without rewards, and which samples have a loss: against loops and against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import choices, new_batch

from nanomath.algorithms import (
    PRESETS,
    SAMPLES,
    Rewards,
    Tokens,
    compute_advantages,
    compute_weights,
    has_gradient,
    policy_objective,
    preference_advantages,
    select_samples,
)

quick = settings(max_examples=60, deadline=None)
LENGTHS = [3, 5, 1, 4, 2, 6, 2, 2, 3]
RIGHT = [
    False,
    True,
    True,
    False,
    False,
    False,
    True,
    False,
    False,
]  # three groups of three
TOTAL = [0.5, 1.0, 1.2, 0.3, 0.3, 0.1, 2.0, 0.0, 2.0]
PAIRS = [(1, 0), (6, 7)]


def rewards() -> Rewards:
    total = torch.tensor(TOTAL).double()
    return Rewards(total, total[None], torch.ones(1), 3, 1.0, right=torch.tensor(RIGHT))


def tokens_at(b, a, new: torch.Tensor) -> Tokens:
    """What the step knows before its first update: the policy is the old one."""
    tokens = Tokens(b.mask, b.mask, b.sampled, b.sampled)
    tokens.old_logprobs = new.detach()
    tokens.ref_logprobs, tokens.teacher_logprobs = b.ref, b.old
    if a.samples != "all":
        tokens.loss_mask = select_samples(a, rewards(), tokens.mask)
    tokens.advantages, returns = compute_advantages(a, rewards(), tokens)
    assert returns is None
    for name, matrix in compute_weights(a, tokens, 9).items():
        setattr(tokens, name, matrix)
    return tokens


def gradient(method: str, **changes) -> tuple[torch.Tensor, torch.Tensor, object]:
    b = new_batch(3, LENGTHS)
    a = choices(**{**PRESETS[method], **changes})
    new = b.new.clone().requires_grad_()
    tokens = tokens_at(b, a, new)
    policy_objective(a, new, tokens).backward()
    taught = new.grad.abs().sum(dim=1) > 0
    assert torch.equal(has_gradient(a, tokens), taught)
    return new.grad, b.new.clone().requires_grad_(), b


def logprob(matrix: torch.Tensor, i: int) -> torch.Tensor:
    return matrix[i, : LENGTHS[i]].sum()


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_has_the_gradient_of_its_loss(beta):
    found, new, b = gradient("dpo", preference_beta=beta)
    loss = torch.zeros(()).double()
    for y, n in PAIRS:
        margin = (logprob(new, y) - logprob(b.ref, y)) - (
            logprob(new, n) - logprob(b.ref, n)
        )
        loss = loss - torch.log(1 / (1 + torch.exp(-beta * margin))) / len(PAIRS)
    loss.backward()
    torch.testing.assert_close(found, new.grad, rtol=1e-10, atol=1e-14)


def test_sft_is_the_cross_entropy_of_the_right_samples():
    found, new, _ = gradient("sft")
    right = [i for i, ok in enumerate(RIGHT) if ok]
    loss = -sum(logprob(new, i) for i in right) / sum(LENGTHS[i] for i in right)
    loss.backward()
    torch.testing.assert_close(found, new.grad, rtol=1e-12, atol=1e-15)


def test_distillation_follows_the_reverse_kl():
    """At the policy that sampled, -A grad log pi with A = log pi_T - log pi, frozen."""
    found, new, b = gradient("opd")
    loss = torch.zeros(()).double()
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            advantage = float(b.old[i, t] - b.new[i, t])
            loss = loss - advantage * new[i, t] / sum(LENGTHS)
    loss.backward()
    torch.testing.assert_close(found, new.grad, rtol=1e-12, atol=1e-15)


def test_a_teacher_like_the_policy_teaches_nothing():
    b = new_batch(3, LENGTHS)
    a = choices(**PRESETS["opd"])
    tokens = tokens_at(b, a, b.old)
    assert not tokens.advantages.any() and not has_gradient(a, tokens).any()


def test_the_whole_distribution_counts_wherever_there_is_a_weight():
    b = new_batch(3, LENGTHS)
    a = choices(**{**PRESETS["opd"], "advantage": "teacher_full", "samples": "right"})
    tokens = tokens_at(b, a, b.new)
    assert not tokens.advantages.any() and has_gradient(a, tokens).tolist() == RIGHT


@quick
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.booleans()),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_samples_against_loops(groups):
    total, right, present = (
        torch.tensor([[sample[k] for sample in group] for group in groups])
        for k in range(3)
    )
    for name, choose in SAMPLES.items():
        for group, row in zip(
            groups, choose(total, right, present).tolist(), strict=True
        ):
            there = [i for i, (_, _, present) in enumerate(group) if present]
            good = [i for i in there if group[i][1]]
            bad = [i for i in there if not group[i][1]]
            best = sorted(there, key=lambda i: -group[i][0])[:1]  # the first of equals
            pair = [good[0], bad[0]] if good and bad else []
            expected = {"right": good, "best": best, "pair": pair}[name]
            assert [i for i, chosen in enumerate(row) if chosen] == sorted(expected)


def test_margins_are_those_of_the_pairs():
    ratios = torch.tensor([[1.0, 3.0, 7.0], [2.0, 2.0, 2.0]]).double()
    right = torch.tensor([[False, True, True], [True, True, True]])
    chosen = torch.tensor([[True, True, False], [False, False, False]])
    advantages, margins = preference_advantages(ratios, right, chosen, 0.5)
    assert margins.tolist() == [1.0, 0.0]
    weight = 1 / (1 + math.exp(1.0))
    assert advantages[0].tolist() == pytest.approx([-weight, weight, 0.0])
    assert not advantages[1].any()
