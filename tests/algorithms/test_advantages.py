"""Advantages and token rewards against loops over the definitions, and at the edges: equal
rewards, absent steps.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LENGTHS, mean, new_batch, randoms, std

from nanomath.algorithms import (
    BASELINES,
    SCALES,
    decoupled_advantages,
    group_advantages,
    process_advantages,
    token_rewards,
    whiten,
)

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10**6)
sizes = st.integers(1, 5)
EPS = 1e-3


def loop(
    rewards: list[list[float]], baseline: str, scale: str, eps: float = EPS
) -> list[list[float]]:
    """Each reward less that of its group, or of the others of it, over a standard deviation."""
    whole = std([r for row in rewards for r in row])
    found = []
    for row in rewards:
        by = {"group": std(row) + eps, "batch": whole + eps, "off": 1.0}[scale]
        others = [
            mean(row[:i] + row[i + 1 :]) if baseline == "leave_one_out" else mean(row)
            for i in range(len(row))
        ]
        found.append([(r - other) / by for r, other in zip(row, others, strict=True)])
    return found


@pytest.mark.parametrize("scale", ["group", "batch", "off"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@quick
@given(seeds, sizes, st.integers(2, 6))
def test_group_advantages_are_their_definition(baseline, scale, seed, prompts, group):
    rewards = randoms(seed, (prompts, group))[0]
    found = group_advantages(rewards, baseline, scale, EPS)
    expected = torch.tensor(
        loop(rewards.tolist(), baseline, scale), dtype=torch.float64
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_defaults_are_grpo():
    rewards = randoms(0, (3, 4))[0]
    assert torch.equal(
        group_advantages(rewards), group_advantages(rewards, "group", "group", 1e-4)
    )
    both = torch.stack([rewards, rewards * 3])
    weights = torch.tensor([1.0, 2.0]).double()
    default = decoupled_advantages(both, weights)
    assert torch.equal(
        default, decoupled_advantages(both, weights, "group", "group", 1e-4)
    )
    ends = torch.tensor([[0, 1, 2, 3]] * 3)
    assert torch.equal(
        process_advantages(rewards, ends, 4), process_advantages(rewards, ends, 4, 1e-4)
    )
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(whiten(rewards * 1e-8, mask), whiten(rewards * 1e-8, mask, 1e-8))


def test_one_right_answer_has_the_published_advantage():
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.0)
    assert advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("scale", ["group", "batch", "off"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@quick
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4), st.integers(2, 17)
)
def test_equal_rewards_teach_exactly_nothing(baseline, scale, eps, values, group):
    """The mean of seven rewards of 0.1 is not 0.1, and no eps must be needed either."""
    rewards = torch.tensor(values)[:, None].expand(-1, group)
    assert torch.equal(
        group_advantages(rewards, baseline, scale, eps), torch.zeros(len(values), group)
    )


def test_a_flat_group_stays_zero_beside_others():
    rewards = torch.tensor([[0.1] * 7, [0.1] * 6 + [1.0]])
    for scale in ("group", "batch", "off"):
        advantages = group_advantages(rewards, scale=scale)
        assert (advantages[0] == 0).all() and (advantages[1] != 0).all()


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2, 2)])
def test_a_group_needs_company(shape):
    with pytest.raises(ValueError, match="G of at least 2"):
        group_advantages(torch.zeros(shape))


def test_unknown_names_tell_the_choices():
    with pytest.raises(
        ValueError, match="unknown scale 'rows': choose one of group, batch, off$"
    ):
        group_advantages(torch.zeros(2, 2), scale="rows")
    with pytest.raises(
        ValueError, match="unknown baseline 'best': choose one of group, leave_one_out"
    ):
        group_advantages(torch.zeros(2, 2), "best")
    assert set(BASELINES) == {"group", "leave_one_out"} and set(SCALES) == {
        "group",
        "batch",
    }


@pytest.mark.parametrize("scale", ["group", "batch", "off"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_decoupled_advantages_are_the_weighted_sum_of_each_components(baseline, scale):
    components = (
        randoms(1, (3, 2, 4))[0]
        * torch.tensor([1.0, 100.0, 0.01]).double()[:, None, None]
    )
    weights = [1.0, 0.5, -2.0]
    found = decoupled_advantages(
        components, torch.tensor(weights).double(), baseline, scale, EPS
    )
    apart = [loop(rewards.tolist(), baseline, scale) for rewards in components]
    for n in range(2):
        for i in range(4):
            expected = math.fsum(
                w * a[n][i] for w, a in zip(weights, apart, strict=True)
            )
            assert float(found[n, i]) == pytest.approx(expected, abs=1e-10)


@quick
@given(
    seeds,
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.3]),
)
def test_token_rewards_pay_at_the_last_token_and_charge_for_drift(seed, lengths, beta):
    b = new_batch(seed, lengths)
    outcomes, kl = b.values[:, 0], b.rewards
    found, plain = (
        token_rewards(outcomes, b.mask, kl, beta),
        token_rewards(outcomes, b.mask),
    )
    for i, n in enumerate(lengths):
        for t in range(b.mask.shape[1]):
            paid = float(outcomes[i]) if t == n - 1 else 0.0
            charged = beta * float(kl[i, t]) if t < n else 0.0
            assert float(plain[i, t]) == paid
            assert float(found[i, t]) == pytest.approx(paid - charged, abs=1e-12)


def test_without_a_coefficient_the_kl_costs_nothing():
    b = new_batch(0)
    assert torch.equal(
        token_rewards(b.values[:, 0], b.mask, b.rewards),
        token_rewards(b.values[:, 0], b.mask),
    )


@quick
@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_whitened_advantages_are_their_definition(seed, lengths):
    b = new_batch(seed, lengths)
    found, values = whiten(b.advantages, b.mask, EPS), b.advantages[b.mask].tolist()
    for i, n in enumerate(lengths):
        for t in range(b.mask.shape[1]):
            whole = t < n and len(values) > 1
            expected = (
                (float(b.advantages[i, t]) - mean(values)) / (std(values) + EPS)
                if whole
                else 0.0
            )
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_whitening_equal_advantages_or_a_lone_one_gives_zero(eps):
    b = new_batch(0)
    equal, lone = torch.full_like(b.advantages, 0.1), torch.zeros_like(b.mask)
    lone[0, 0] = True
    assert torch.equal(whiten(equal, b.mask, eps), torch.zeros_like(equal))
    assert torch.equal(whiten(b.advantages, lone, eps), torch.zeros_like(equal))


def test_two_tokens_are_enough_to_whiten():
    found = whiten(
        torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool), eps=0.0
    )
    assert found[0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 8))
def test_process_advantages_are_their_definition(seed, group, steps, width):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(group, steps, generator=generator, dtype=torch.float64)
    ends = torch.randint(-1, width, (group, steps), generator=generator)
    found = process_advantages(rewards, ends, width, EPS)
    present = [(i, j) for i in range(group) for j in range(steps) if ends[i, j] >= 0]
    pooled = [float(rewards[i, j]) for i, j in present]
    expected = torch.zeros(group, width, dtype=torch.float64)
    for i, j in present if len(present) > 1 else []:
        for t in range(int(ends[i, j]) + 1):
            expected[i, t] += (float(rewards[i, j]) - mean(pooled)) / (
                std(pooled) + EPS
            )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert found.dtype == rewards.dtype


def test_two_steps_are_enough_for_process_advantages():
    found = process_advantages(
        torch.tensor([[1.0], [3.0]]), torch.tensor([[1], [0]]), 2, eps=0.0
    )
    half = 0.5**0.5
    assert found.flatten().tolist() == pytest.approx([-half, -half, half, 0.0])


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_absent_steps_never_count(junk):
    ends = torch.tensor([[1, 3], [2, -1]])
    clean, dirty = (
        torch.tensor([[1.0, 0.0], [0.5, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.5, junk]]),
    )
    assert torch.equal(
        process_advantages(dirty, ends, 5), process_advantages(clean, ends, 5)
    )


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_equal_step_rewards_or_a_lone_one_teach_nothing(eps):
    found = process_advantages(
        torch.full((3, 3), 0.1), torch.tensor([[0, 1, 2]] * 3), 4, eps
    )
    assert torch.equal(found, torch.zeros(3, 4))
    alone = process_advantages(
        torch.ones(2, 1).double(), torch.tensor([[0], [-1]]), 4, eps
    )
    assert torch.equal(alone, torch.zeros(2, 4).double())


def test_more_steps_give_more_advantage():
    """The property that is to be logged: a completion of more good steps stands higher at its
    first token.
    """
    rewards, ends = (
        torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
        torch.tensor([[0, 1, 2], [2, -1, -1]]),
    )
    rewards[1, 0] = 0.5
    found = process_advantages(rewards, ends, 3)
    assert found[0, 0] > found[0, 1] > found[0, 2] > 0 > found[1, 0]


def test_lengths_of_the_shared_batch_hold_the_edges():
    """The other files count on it: an empty completion, a lone token, and rows of different
    lengths.
    """
    assert {0, 1} < set(LENGTHS) and len(set(LENGTHS)) == len(LENGTHS)
