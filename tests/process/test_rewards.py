"""Process rewards of episodes: what steps are worth and where, and what is reported of the
scorer.
"""

from __future__ import annotations

from functools import partial

import pytest

from nanomath import algorithms
from nanomath.data.problem import Problem
from nanomath.data.world import generate
from nanomath.process.prm import length_scores, oracle_scores
from nanomath.process.rewards import PROBES, ProcessReward, VerifiedReward
from nanomath.process.steps import SEPARATORS
from nanomath.rollout import Completion, Episode, Sampler, sample_episodes
from nanomath.settings import Process
from nanomath.training.rollout_log import record_of


@pytest.fixture
def episode(tokenizer):
    """episode(text, accuracy): as if it had been sampled, with its eos."""

    def make(text: str, accuracy: float = 0.0) -> Episode:
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        completion = Completion(
            0, 0, tokens, [0.0] * len(tokens), [0.0] * len(tokens), text, "eos"
        )
        return Episode(
            Problem("p", "1 + 1?", "2"),
            [5],
            completion,
            {"accuracy": accuracy, "total": accuracy},
        )

    return make


def test_scores_and_rewards_stand_on_the_ends_of_steps(tokenizer, episode):
    episodes = [episode("ab\n\nabcd"), episode("abcdefgh"), episode(" \n")]
    credit = partial(algorithms.credit, form="delta")
    ProcessReward(partial(length_scores, longest=8), tokenizer, credit)([episodes])
    assert [e.step_scores for e in episodes] == [[0.25, 0.5], [1.0], [0.0]]
    assert [e.step_rewards for e in episodes] == [[0.25, 0.0], [0.0], [0.0]]
    assert [e.rewards["prm"] for e in episodes] == [0.25, 1.0, 0.0]
    assert [e.rewards["total"] for e in episodes] == [0.0] * 3
    for e in episodes:
        assert e.step_ends[-1] == e.completion.length - 1
        assert (
            record_of(e)["step_ends"] == e.step_ends
            and record_of(e)["step_rewards"] == e.step_rewards
        )
    assert (
        tokenizer.decode([episodes[0].completion.tokens[episodes[0].step_ends[0]]])
        == "\n\n"
    )


def test_without_credit_steps_are_only_watched(tokenizer, episode):
    episodes = [episode("ab\n\nabcd")]
    ProcessReward(partial(length_scores, longest=8), tokenizer)([episodes])
    assert episodes[0].step_scores == [0.25, 0.5] and episodes[0].step_rewards == []


def test_the_guards_are_passed_on(tokenizer, episode):
    episodes = [episode("a\nb\nb\nc")]
    ProcessReward(
        partial(length_scores, longest=8), tokenizer, None, "line", 1, 2, True
    )([episodes])
    assert len(episodes[0].step_ends) == 2


def test_every_split_can_be_asked_for():
    for by in SEPARATORS:
        Process(steps=by)
    assert Process().steps in SEPARATORS


def test_metrics(tokenizer, episode):
    episodes = [
        episode("ab\n\nabcd", 1.0),
        episode("abcdefgh"),
        episode("abcd", 1.0),
        episode(""),
    ]
    process = ProcessReward(partial(length_scores, longest=8), tokenizer)
    process([episodes])
    found = process.metrics([episodes])
    lengths = sum(e.completion.length for e in episodes)
    probes = sum(min(1, len(probe) / 8) for probe in PROBES) / len(PROBES)
    expected = {
        "prm/step": (0.25 + 0.5 + 1 + 0.5) / 5,
        "prm/probes": probes,
        "steps": 5 / 4,
        "step_length": lengths / 5,
        "empty_steps": 1,
    }
    assert found == pytest.approx({**expected, "prm/auc": 0.5})
    assert "prm/auc" not in process.metrics([episodes[1:2]])


def test_steps_without_content_are_counted_even_if_they_are_merged(tokenizer, episode):
    episodes = [
        episode("So,\n\n1+1=2\n\nSo, \n\n1+1=2\n\n2+2=4"),
        episode("3\n\n4\n\n5"),
    ]
    process = ProcessReward(
        partial(length_scores, longest=8), tokenizer, drop_repeats=True
    )
    process([episodes])
    assert len(episodes[0].step_ends) < 5
    assert process.metrics([episodes])["empty_steps"] == 3 / 8


@pytest.mark.parametrize(
    ("form", "paid"),
    [("sum", [0.75, 1.0]), ("clip", [-0.25, 0.0]), ("last", [0.5, 1.0])],
)
def test_what_solutions_earn_in_all_is_reported(tokenizer, episode, form, paid):
    episodes = [episode("ab\n\nabcd"), episode("abcdefgh")]
    process = ProcessReward(
        partial(length_scores, longest=8),
        tokenizer,
        partial(algorithms.credit, form=form),
    )
    process([episodes])
    assert [sum(e.step_rewards) for e in episodes] == paid
    assert process.metrics([episodes])["prm/return"] == sum(paid) / 2


def test_sampled_with_the_oracle(new_model, tokenizer):
    """From the sampler to rewards on steps, all of a rollout in one call of the scorer."""
    problems = list(generate("maths", "train", 3))
    calls = []

    def counted(solutions):
        calls.append(len(solutions))
        return oracle_scores(problems, solutions)

    process = ProcessReward(counted, tokenizer, partial(algorithms.credit, form="sum"))
    prompts = [tokenizer.encode(problem.question) for problem in problems]
    verifier = VerifiedReward(
        lambda problem, group: [{"accuracy": 0.0, "total": 0.0} for _ in group]
    )
    sampler = Sampler(new_model(0), tokenizer, slots=4)
    groups = sample_episodes(
        sampler, problems, prompts, [verifier, process], 2, max_new_tokens=12
    )
    episodes = [e for group in groups for e in group]
    assert len(calls) == 1 and calls[0] <= 6
    assert all(e.step_ends[-1] == e.completion.length - 1 for e in episodes)
    assert all(
        len(e.step_rewards) == len(e.step_scores) == len(e.step_ends) > 0
        for e in episodes
    )


def test_a_score_that_is_no_number_is_named(new_model, tokenizer):
    def broken(solutions):
        return [[float("nan")] * len(steps) for _, steps in solutions]

    problem = Problem("p7", "1 + 1?", "2")
    verifier = VerifiedReward(
        lambda problem, group: [{"accuracy": 0.0, "total": 0.0} for _ in group]
    )
    sampler = Sampler(new_model(0), tokenizer, slots=4)
    with pytest.raises(
        FloatingPointError, match="the reward 'prm' of sample 0 of problem p7 is nan"
    ):
        process = ProcessReward(broken, tokenizer)
        sample_episodes(
            sampler, [problem], [[5]], [verifier, process], 2, max_new_tokens=12
        )
