"""Episodes: groups stay together, the means of their metrics, and which groups are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomath.data.problem import Problem
from nanomath.rollout import (
    KEEP_GROUPS,
    Completion,
    Episode,
    Sampler,
    collect_groups,
    episode_metrics,
    sample_episodes,
)
from nanomath.rollout.groups import repeated_share
from nanomath.training.rollout_log import record_of

PROBLEMS = [Problem(f"p{i}", f"question {i}", str(i)) for i in range(3)]


def test_every_group_is_rewarded_with_its_problem(new_model, tokenizer):
    prompts = [[4, 5], [6], [7, 8, 9]]

    def score(groups):
        for problem, group in zip(PROBLEMS, groups, strict=True):
            for e in group:
                e.rewards = {
                    "accuracy": 0.0,
                    "total": 10 * int(problem.answer) + e.completion.sample_index,
                }

    sampler = Sampler(new_model(), tokenizer)
    groups = sample_episodes(
        sampler, PROBLEMS, prompts, [score], 2, max_new_tokens=5, seed=3, top_k=9
    )
    assert [[e.problem for e in group] for group in groups] == [
        [problem] * 2 for problem in PROBLEMS
    ]
    episodes = [e for group in groups for e in group]
    assert [e.rewards["total"] for e in episodes] == [0, 1, 10, 11, 20, 21]
    assert [e.prompt for e in episodes] == [p for p in prompts for _ in range(2)]
    assert [e.completion for e in episodes] == sampler.generate(
        prompts, 2, max_new_tokens=5, seed=3, top_k=9
    )
    record = json.loads(json.dumps(record_of(episodes[3])))
    assert (
        record["problem"] == "p1" and record["tokens"] == episodes[3].completion.tokens
    )
    assert record["logprobs"] == pytest.approx(
        episodes[3].completion.logprobs, abs=1e-6
    )


def episode(accuracy: float, total: float, length: int, reason: str = "eos") -> Episode:
    completion = Completion(
        0, 0, [1] * length, [0.0] * length, [0.0] * length, "", reason
    )
    return Episode(
        PROBLEMS[0],
        [1],
        completion,
        {"accuracy": accuracy, "form": 0.5, "total": total},
    )


def test_metrics_are_means():
    episodes = [
        episode(1, 1, 2),
        episode(1, 1, 4),
        episode(1, 1, 6),
        episode(0, 0, 9, "length"),
    ]
    assert episode_metrics([episodes[:2], episodes[2:]]) == pytest.approx(
        {
            "reward": 0.75,
            "pass@1": 0.75,
            "reward/accuracy": 0.75,
            "reward/form": 0.5,
            "flat_groups": 0.5,
            "all_right": 0.5,
            "all_wrong": 0.0,
            "length": 5.25,
            "length/right": 4.0,
            "length/wrong": 9.0,
            "length/truncated": 9.0,
            "truncated": 0.25,
            "repetition": (0 + 0 + 2 / 3 + 5 / 6) / 4,  # of its n-grams of four tokens
            **{f"language/{name}": 0.0 for name in ("en", "ja", "mixed")},
        }
    )
    assert (
        not {"length/wrong", "length/truncated"}
        & episode_metrics([episodes[:2]]).keys()
    )


def test_a_truncated_answer_may_be_right():
    metrics = episode_metrics(
        [[episode(1, 1, 3, "length"), episode(0, 0, 5), episode(0, 0, 7, "length")]]
    )
    assert (
        metrics["length/right"],
        metrics["length/truncated"],
        metrics["truncated"],
    ) == (
        3,
        5,
        2 / 3,
    )


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(1, 4))
def test_repetition_is_the_share_of_ngrams_seen_before(tokens, n):
    starts = range(len(tokens) - n + 1)
    again = [
        any(tokens[i : i + n] == tokens[j : j + n] for j in range(i)) for i in starts
    ]
    assert repeated_share(tokens, n) == pytest.approx(
        sum(again) / len(again) if again else 0
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_named(new_model, tokenizer, bad):
    def score(groups):
        for e in (e for group in groups for e in group):
            place = e.problem.id, e.completion.sample_index
            e.rewards = {"accuracy": 0.0, "form": bad if place == ("p1", 1) else 1.0}

    with pytest.raises(
        FloatingPointError,
        match=f"^the reward 'form' of sample 1 of problem p1 is {bad}$",
    ):
        sample_episodes(
            Sampler(new_model(), tokenizer),
            PROBLEMS,
            [[4], [5], [6]],
            [score],
            2,
            max_new_tokens=2,
        )


# --- dynamic sampling ------------------------------------------------------------------------

MIXED = [episode(1, 1, 2), episode(0, 0, 3)]
RIGHT = [
    episode(1, 1, 2),
    episode(1, 0.5, 3),
]  # the same answer, but not the same reward
FLAT = [episode(0, 0.5, 2), episode(0, 0.5, 3)]


def new_sample(*refills: list) -> tuple[Callable, list[int]]:
    """A function that gives the groups of each refill, and the list of those that were asked
    for.
    """
    asked: list[int] = []

    def sample(refill: int) -> list:
        asked.append(refill)
        return refills[refill]

    return sample, asked


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("all", [MIXED, RIGHT, FLAT]), ("mixed", [MIXED]), ("uneven", [MIXED, RIGHT])],
)
def test_what_is_worth_keeping(keep, kept):
    groups = [MIXED, RIGHT, FLAT]
    sample, _ = new_sample(groups)
    assert collect_groups(sample, 3, keep, 0) == (kept, groups)
    assert set(KEEP_GROUPS) == {"all", "mixed", "uneven"}


def test_sampling_ends_with_enough_groups():
    sample, asked = new_sample([FLAT, MIXED], [RIGHT, MIXED], [MIXED, MIXED])
    kept, sampled = collect_groups(sample, 2, "mixed", 5)
    assert kept == [MIXED, MIXED] and asked == [0, 1]
    assert sampled == [
        FLAT,
        MIXED,
        RIGHT,
        MIXED,
    ]  # what was thrown away is counted as well

    sample, asked = new_sample([MIXED, RIGHT, MIXED], [])
    kept, sampled = collect_groups(sample, 2, "uneven", 1)
    # And no more than enough is trained on
    assert kept == [MIXED, RIGHT] and asked == [0] and len(sampled) == 3


@pytest.mark.parametrize("refills", [0, 1, 3])
def test_sampling_ends_with_the_refills(refills):
    """Whatever there is then; the groups of the last refill, as they are, if there is nothing."""
    sample, asked = new_sample(*[[FLAT, MIXED]] + [[FLAT]] * 3)
    assert collect_groups(sample, 2, "mixed", refills)[0] == [MIXED] and asked == list(
        range(refills + 1)
    )
    sample, asked = new_sample([FLAT], *[[RIGHT, FLAT]] * 3)
    kept, sampled = collect_groups(sample, 2, "mixed", refills)
    assert kept == ([FLAT] if refills == 0 else [RIGHT, FLAT]) and asked == list(
        range(refills + 1)
    )
    assert len(sampled) == 1 + 2 * refills
