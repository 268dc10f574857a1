"""The cut of a hint and the rules that choose its level, each against its formula by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanomath.process.steps import SEPARATORS, split_text
from nanomath.rollout.hints import (
    Chooser,
    Controller,
    Ladder,
    Learned,
    Schedule,
    beginning,
    upper_gradient,
    upper_logprobs,
    upper_reward,
)

LEVELS = st.floats(0, 1)
STEPS = st.lists(
    st.from_regex(r"[a-c0-9.,= ]{0,6}[0-9]{1,4}\.?", fullmatch=True), max_size=9
)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ends_of(text: str, by: str = "blank_line") -> list[int]:
    return [end for _, end in split_text(text, by)]


@given(STEPS, LEVELS, st.sampled_from(sorted(SEPARATORS)))
def test_a_hint_is_a_whole_number_of_steps(steps, level, by):
    between = {"blank_line": "\n\n", "line": "\n", "step_k": "\nStep 1: "}[by]
    text = between.join(steps)
    ends = ends_of(text, by)
    hint = beginning(text, ends, level)
    rest = text[len(hint) :]
    assert hint + rest == text
    assert len(hint) in (0, *ends)  # so no number is cut in two
    assert level == 1 or not ends or rest.strip()  # the last step is the policy's
    if level == 1:
        assert hint == text[: ends[-1]] if ends else hint == ""


@pytest.mark.parametrize(
    ("steps", "level", "expected"),
    [
        *((1, 0.25, 0), (1, 0.75, 0), (1, 1.0, 1)),
        *((2, 0.25, 1), (2, 0.24, 0), (2, 0.5, 1), (2, 0.75, 1), (2, 1.0, 2)),
        *(
            (4, 0.0, 0),
            (4, 0.12, 0),
            (4, 0.125, 1),
            (4, 0.5, 2),
            (4, 0.75, 3),
            (4, 0.99, 3),
        ),
        *((5, 0.25, 1), (5, 0.3, 2), (5, 0.5, 3), (5, 0.75, 4), (0, 1.0, 0)),
    ],
)
def test_it_is_the_nearest_number_of_steps(steps, level, expected):
    text = "\n\n".join(f"{i}+1={i + 1}." for i in range(steps))
    assert len(ends_of(beginning(text, ends_of(text), level))) == expected


@pytest.mark.parametrize("level", [-0.1, 1.1, math.nan])
def test_a_level_is_a_share(level):
    with pytest.raises(ValueError, match="it must be from 0 to 1"):
        beginning("a\n\nb", [3, 4], level)


def choose(chooser, estimates, progress=0.0, seed=0, problems=None):
    places = (
        torch.arange(len(estimates)) if problems is None else torch.tensor(problems)
    )
    generator = torch.Generator().manual_seed(seed)
    return chooser.choose(places, doubles(*estimates), progress, generator).tolist()


def learn(chooser, levels, rates, progress=0.0, problems=None):
    places = torch.arange(len(levels)) if problems is None else torch.tensor(problems)
    zeros = torch.zeros(len(levels)).double()
    return chooser.learn(
        places, zeros, doubles(*levels), doubles(*rates), zeros, progress
    )


def test_no_hint_and_the_ladder_begin_without_one():
    ladder = Ladder([0.25, 0.5, 0.75])
    assert choose(Chooser(), [0.1, 0.9]) == choose(ladder, [0.1, 0.9]) == [0, 0]
    assert (ladder.again, ladder.most) == ([0.25, 0.5, 0.75], 0.75)


def test_the_schedule_has_equal_parts():
    schedule = Schedule([0.5, 0.25, 0.0])
    found = [choose(schedule, [0.3], step / 9)[0] for step in range(10)]
    assert found == [*[0.5] * 3, *[0.25] * 3, *[0.0] * 4]
    assert schedule.most == 0.5


def test_the_controller_follows_its_formula():
    controller = Controller(3, gain=0.5, most=0.4)
    # Never tried: as if without a hint, at the estimate. 0.5 (0.5 - 0.1), bounded by 0 and 0.4.
    assert choose(controller, [0.1, 0.9, 0.5]) == pytest.approx([0.2, 0, 0])
    learn(controller, [0.2, 0.0], [0.25, 0.75], problems=[0, 2])
    # 0.2 + 0.5 (0.5 - 0.25); max(0, 0 + 0.5 (0.5 - 0.75)); and problem 1 is still unknown.
    assert choose(controller, [0.0, 0.0, 0.0]) == pytest.approx([0.325, 0.25, 0])
    learn(controller, [0.325], [0.0], problems=[0])
    # 0.575 is too much
    assert choose(controller, [0.0], problems=[0]) == pytest.approx([0.4])


def test_the_controller_withdraws_and_does_not_fight_it():
    controller = Controller(1, gain=0.5, most=0.8)
    learn(controller, [0.6], [0.5], progress=0.5)
    found = [
        choose(controller, [0.0], progress)[0] for progress in (0.5, 2 / 3, 5 / 6, 1.0)
    ]
    assert found == pytest.approx([0.6, 0.6, 0.3, 0])
    learn(controller, [0.3], [0.0], progress=5 / 6)
    assert choose(controller, [0.0], 0.5) == pytest.approx([0.6])


def test_the_controller_comes_to_one_half():
    """Of a problem whose pass rate rises linearly with the level, 0.1 + h."""
    controller = Controller(1, gain=0.5, most=0.75)
    for _ in range(20):
        (level,) = choose(controller, [0.1])
        learn(controller, [level], [0.1 + level])
    assert choose(controller, [0.1]) == pytest.approx([0.4], abs=1e-4)


def test_the_reward_of_the_upper_policy():
    rates, reliance = doubles(0, 0.5, 0.5, 0.25, 1), doubles(0, 0, 2, -1, 0)
    expected = [0, 1, math.exp(-3), 0.75, 0]
    assert upper_reward(rates, reliance, 1.5).tolist() == pytest.approx(expected)
    assert upper_reward(rates, reliance, 0.0).tolist() == pytest.approx(
        [0, 1, 1, 0.75, 0]
    )


def test_the_upper_gradient_is_that_of_the_expected_reward():
    """Over all ways to choose 3 levels for 3 problems: unbiased, its baseline included."""
    generator = torch.Generator().manual_seed(3)
    theta, table = (
        torch.randn(3, size, generator=generator).double() for size in (2, 3)
    )
    estimates = doubles(0.05, 0.4, 0.9)
    theta.requires_grad_(True)
    chances = upper_logprobs(theta, estimates).exp()
    (expected,) = torch.autograd.grad((chances * table).sum(1).mean(), theta)
    found = torch.zeros_like(theta)
    for chosen in product(range(3), repeat=3):
        picked = torch.tensor(chosen)
        rewards = table[torch.arange(3), picked]
        chance = chances[torch.arange(3), picked].prod().detach()
        found = found + chance * upper_gradient(theta, estimates, picked, rewards)
    assert (
        torch.allclose(found, expected, rtol=0, atol=1e-12)
        and expected.abs().max() > 0.01
    )


def test_one_problem_has_nothing_to_be_compared_with():
    gradient = upper_gradient(
        torch.zeros(2, 2), doubles(0.5), torch.tensor([1]), doubles(1)
    )
    assert not gradient.any()


def test_the_upper_policy_learns_whom_to_help():
    """The spread of a problem that is solved at rate p + h is largest where that is 1/2."""
    upper = Learned([0.0, 0.4], rate=2.0)
    estimates = torch.tensor([0.1, 0.5] * 16, dtype=torch.float64)
    places = torch.arange(32)
    for seed in range(300):
        levels = upper.choose(
            places, estimates, 0.0, torch.Generator().manual_seed(seed)
        )
        rates = estimates + levels
        rewards = upper_reward(rates, torch.zeros(32).double(), 1.0)
        metrics = upper.learn(places, estimates, levels, rates, rewards, 0.0)
    hard, easy = (
        upper_logprobs(upper.tensors["theta"], doubles(0.1, 0.5)).exp().tolist()
    )
    assert hard[1] > 0.9 and easy[0] > 0.9
    assert (
        metrics["hints/upper_reward"] > 0.9 and 0 < metrics["hints/upper_entropy"] < 0.4
    )


def test_the_upper_policy_draws_by_its_probabilities():
    upper = Learned([0.0, 0.25, 0.5], rate=1.0)
    upper.tensors["theta"][1] = doubles(2.0, -1.0)
    drawn = torch.tensor(choose(upper, [0.3] * 20000))
    expected = upper_logprobs(upper.tensors["theta"], doubles(0.3)).exp()[0]
    found = torch.stack([(drawn == level).double().mean() for level in upper.levels])
    assert torch.allclose(found, expected, rtol=0, atol=0.015)
    assert choose(upper, [0.3] * 50, seed=1) == choose(upper, [0.3] * 50, seed=1)
    assert choose(upper, [0.3] * 50, seed=1) != choose(upper, [0.3] * 50, seed=2)
