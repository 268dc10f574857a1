"""Episodes: groups stay together, and the means of their metrics."""

from __future__ import annotations

import json

import pytest

from nanomath.data.problem import Problem
from nanomath.rollout import Completion, Episode, Sampler, episode_metrics, sample_episodes

PROBLEMS = [Problem(f"p{i}", f"question {i}", str(i)) for i in range(3)]


def test_every_group_is_rewarded_with_its_problem(new_model, tokenizer):
    prompts = [[4, 5], [6], [7, 8, 9]]

    def reward(problem, completions):
        return [{"accuracy": 0.0, "total": 10 * int(problem.answer) + c.sample_index} for c in completions]

    sampler = Sampler(new_model(), tokenizer)
    episodes = sample_episodes(sampler, PROBLEMS, prompts, reward, 2, max_new_tokens=5, seed=3, top_k=9)
    assert [e.rewards["total"] for e in episodes] == [0, 1, 10, 11, 20, 21]
    assert [e.prompt for e in episodes] == [p for p in prompts for _ in range(2)]
    assert [e.completion for e in episodes] == sampler.generate(prompts, 2, max_new_tokens=5, seed=3, top_k=9)
    record = json.loads(json.dumps(episodes[3].record()))
    assert record["problem"] == "p1" and record["tokens"] == episodes[3].completion.tokens
    assert record["logprobs"] == pytest.approx(episodes[3].completion.logprobs, abs=1e-6)


def episode(accuracy: float, total: float, length: int, reason: str = "eos") -> Episode:
    completion = Completion(0, 0, [1] * length, [0.0] * length, [0.0] * length, "", reason)
    return Episode(PROBLEMS[0], [1], completion, {"accuracy": accuracy, "form": 0.5, "total": total})


def test_metrics_are_means():
    episodes = [episode(1, 1, 2), episode(1, 1, 4), episode(1, 1, 6), episode(0, 0, 9, "length")]
    assert episode_metrics(episodes, 2) == pytest.approx(
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
            "truncated": 0.25,
        }
    )
    assert "length/wrong" not in episode_metrics(episodes[:2], 2)
