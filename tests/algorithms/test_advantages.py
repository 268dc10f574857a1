"""Advantages against loops over the definitions, and at the edges: equal rewards, lone steps, absent steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.algorithms import group_advantages, process_advantages

quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10**6)
sizes = st.integers(1, 5)


def mean_and_std(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


@quick
@given(seeds, sizes, st.integers(2, 6), st.sampled_from(["group", "batch", "none"]))
def test_group_advantages_are_their_definition(seed, prompts, group, std):
    rewards = torch.randn(prompts, group, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = rewards.clone()
    advantages = group_advantages(rewards, std, eps=1e-3)
    _, whole = mean_and_std(rewards.flatten().tolist())
    for row, found in zip(rewards.tolist(), advantages.tolist(), strict=True):
        mean, own = mean_and_std(row)
        scale = {"group": own + 1e-3, "batch": whole + 1e-3, "none": 1.0}[std]
        assert found == pytest.approx([(r - mean) / scale for r in row], abs=1e-10)
    assert torch.equal(rewards, before)


@quick
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4),
    st.integers(2, 17),
    st.sampled_from(["group", "none"]),
)
def test_equal_rewards_teach_exactly_nothing(values, group, std):
    rewards = torch.tensor(values)[:, None].expand(-1, group)
    assert torch.equal(group_advantages(rewards, std), torch.zeros(len(values), group))


def test_equal_rewards_of_a_whole_batch_teach_exactly_nothing():
    assert torch.equal(group_advantages(torch.full((3, 6), 0.1), "batch"), torch.zeros(3, 6))


def test_one_right_answer_has_the_published_advantage():
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.0)
    assert advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2, 2)])
def test_a_group_needs_company(shape):
    with pytest.raises(ValueError, match="G of at least 2"):
        group_advantages(torch.zeros(shape))


def test_unknown_std_names_the_choices():
    with pytest.raises(ValueError, match="group, batch, none"):
        group_advantages(torch.zeros(2, 2), "rows")


@quick
@given(seeds, sizes, st.integers(1, 5), st.integers(1, 8))
def test_process_advantages_are_their_definition(seed, group, steps, width):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(group, steps, generator=generator, dtype=torch.float64)
    ends = torch.randint(-1, width, (group, steps), generator=generator)
    kept = rewards.clone(), ends.clone()
    found = process_advantages(rewards, ends, width, eps=1e-3)
    present = [(i, j) for i in range(group) for j in range(steps) if ends[i, j] >= 0]
    expected = torch.zeros(group, width, dtype=torch.float64)
    if len(present) >= 2:
        mean, std = mean_and_std([float(rewards[i, j]) for i, j in present])
        for i, j in present:
            for t in range(int(ends[i, j]) + 1):
                expected[i, t] += (float(rewards[i, j]) - mean) / (std + 1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.equal(rewards, kept[0]) and torch.equal(ends, kept[1])


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_absent_steps_never_count(junk):
    ends = torch.tensor([[1, 3], [2, -1]])
    clean, dirty = torch.tensor([[1.0, 0.0], [0.5, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, junk]])
    assert torch.equal(process_advantages(dirty, ends, 5), process_advantages(clean, ends, 5))


def test_equal_step_rewards_teach_nothing():
    found = process_advantages(torch.full((3, 3), 0.1), torch.tensor([[0, 1, 2]] * 3), 4)
    assert torch.equal(found, torch.zeros(3, 4))
