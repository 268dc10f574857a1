"""Rewards of sampled solutions: by functions of the whole (a verifier), and by scores of their
steps.

A policy finds out what a scorer pays for, whether that is right or not: steps without content,
as many of them as fit, or none (arXiv 2410.15115, 2504.15275). So a solution without any text
is one step of score 0, and beside its rewards every rollout reports how the scorer fares
against the verifier, how long steps are, and what it gives for nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from nanomath.data.problem import Problem
from nanomath.models.tokenizer import Tokenizer
from nanomath.process.measures import auc
from nanomath.process.prm import StepScorer
from nanomath.process.steps import empty_steps, steps_of, texts_of
from nanomath.rollout.episodes import Groups
from nanomath.rollout.sampler import Completion

# A solution's score from those of its steps.
AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "last": lambda scores: scores[-1],
    "product": math.prod,
    "mean": fmean,
}
# A PRM that has been hacked paid for such steps.
PROBES = ("So,", "Thanks.", "Let us think step by step.")


@dataclass
class VerifiedReward:
    """`verified_reward(groups)` sets the episodes' rewards to what functions of problem and
    completion give: `reward` as `nanomath.rewards.RewardSet`.
    """

    reward: Callable[[Problem, Sequence[Completion]], list[dict[str, float]]]

    def __call__(self, groups: Groups) -> None:
        for group in groups:
            completions = [episode.solution for episode in group]
            rewards = self.reward(group[0].problem, completions)
            for episode, found in zip(group, rewards, strict=True):
                episode.rewards = found

    def metrics(self, groups: Groups) -> dict[str, float]:
        """Return nothing: `episode_metrics` has them."""
        return {}


@dataclass
class ProcessReward:
    """`process_reward(groups)` sets the episodes' step_ends, step_scores, step_rewards, and
    their reward "prm": the least of a solution's scores.

    credit: makes rewards of scores, as `algorithms.credit`; None where steps are only watched.
    The rest are the arguments of `steps_of`.
    """

    scorer: StepScorer
    tokenizer: Tokenizer
    credit: Callable[[Tensor, Tensor], Tensor] | None = None
    by: str = "blank_line"
    least_tokens: int = 1
    most_steps: int = 0
    drop_repeats: bool = False

    def __call__(self, groups: Groups) -> None:
        episodes = [episode for group in groups for episode in group]
        found = self.score([(e.problem.question, e.solution.tokens) for e in episodes])
        for episode, (ends, scores) in zip(episodes, found, strict=True):
            given = episode.solution.length - episode.completion.length
            ends = [end - given for end in ends if end >= given]  # not steps of a hint
            scores = scores[-len(ends) :]
            episode.step_ends = ends
            episode.step_scores = scores
            episode.rewards["prm"] = min(scores)
            if self.credit:
                rewards = self.credit(
                    torch.tensor([scores]).double(), torch.tensor([ends])
                )
                episode.step_rewards = rewards[0].tolist()

    def score(
        self, completions: Sequence[tuple[str, Sequence[int]]]
    ) -> list[tuple[list[int], list[float]]]:
        """Return for each question and completion's tokens the tokens that its steps end on,
        and their scores.
        """
        split = self.by, self.least_tokens, self.most_steps, self.drop_repeats
        solutions = []
        found = []
        for question, tokens in completions:
            steps = steps_of(self.tokenizer, tokens, *split)
            if steps:
                solutions.append((question, texts_of(self.tokenizer, tokens, steps)))
            found.append([step.token for step in steps])
        scores = iter(self.scorer(solutions))
        return [
            (ends, next(scores)) if ends else ([len(tokens) - 1], [0.0])
            for ends, (_, tokens) in zip(found, completions, strict=True)
        ]

    def metrics(self, groups: Groups) -> dict[str, float]:
        """Return of a rollout: the mean score of a step, what the steps of a completion earn in
        all, their number, tokens of a step, the share of those without content (none is merged
        for that), the mean score of PROBES as first steps, and how well the lowest score tells
        right from wrong answers (left out where all are alike).
        """
        episodes = [episode for group in groups for episode in group]
        steps = [len(e.step_scores) for e in episodes]
        empty = [
            each for e in episodes for each in empty_steps(e.completion.text, self.by)
        ]
        probes = self.scorer(
            [(episodes[0].problem.question, [probe]) for probe in PROBES]
        )
        scores = [e.rewards["prm"] for e in episodes]
        right = [bool(e.rewards["accuracy"]) for e in episodes]
        found = {
            "prm/step": fmean(score for e in episodes for score in e.step_scores),
            "prm/probes": fmean(score for (score,) in probes),
            "steps": fmean(steps),
            "step_length": sum(e.completion.length for e in episodes) / sum(steps),
            "empty_steps": fmean(empty or [0.0]),
        }
        if self.credit:
            found["prm/return"] = fmean(sum(e.step_rewards) for e in episodes)
        if len(set(right)) == 2:
            found["prm/auc"] = auc(scores, right)
        return found
