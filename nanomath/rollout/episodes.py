"""Episodes: the completions of a group of samples, with their rewards and advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from nanomath.data.problem import Problem
from nanomath.rollout.hints import Hint
from nanomath.rollout.sampler import Completion, Progress, Sampler

T = TypeVar("T")


@dataclass
class Episode:
    """One sample with its rewards.

    `rewards` has every component and "total". Where steps are scored, `step_ends` has the
    indices of the tokens that end them; where steps are rewarded, `step_rewards` has their
    rewards, which come on top of "total". The policy step sets `advantages`, one for each
    token, and `measured`: what the models gave for each token, by name (see
    `set_measurements`). `prompt` is what the policy is scored with; `hint` is what the
    sample was told of the worked solution, if anything.
    """

    problem: Problem
    prompt: list[int]
    completion: Completion
    rewards: dict[str, float] = field(default_factory=dict)
    advantages: list[float] = field(default_factory=list)
    step_ends: list[int] = field(default_factory=list)
    step_scores: list[float] = field(default_factory=list)
    step_rewards: list[float] = field(default_factory=list)
    measured: dict[str, list[float]] = field(default_factory=dict)
    hint: Hint | None = None

    @property
    def solution(self) -> Completion:
        """What is judged: the completion, after the beginning of it that was given, if any."""
        if self.hint is None or not self.hint.prefix:
            return self.completion
        return replace(
            self.completion,
            tokens=self.hint.prefix + self.completion.tokens,
            text=self.hint.text + self.completion.text,
        )


Groups = Sequence[Sequence[Episode]]  # the episodes of each problem of a rollout


class Scorer(Protocol):
    """Gives episodes their rewards, or changes those that the scorers before it gave: the
    verifier, a process reward model, a judge.
    """

    def __call__(self, groups: Groups) -> None:
        """Set the rewards of all episodes of a rollout, or those of their steps."""

    def metrics(self, groups: Groups) -> dict[str, float]:
        """Return numbers for the log about a rollout that has been scored."""


def sample_episodes(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    scorers: Sequence[Scorer],
    group_size: int,
    progress: Progress | None = None,
    **sampling: Any,
) -> list[list[Episode]]:
    """Sample a group of `group_size` episodes for each problem, and score them.

    `sampling` has the keyword arguments of `Sampler.generate`. FloatingPointError names the
    problem and the component of a reward that is not finite.
    """
    completions = sampler.generate(prompts, n=group_size, progress=progress, **sampling)
    groups = [
        [Episode(problem, prompt, completion) for completion in group]
        for problem, prompt, group in zip(
            problems, prompts, in_groups(completions, group_size), strict=True
        )
    ]
    for score in scorers:
        score(groups)
    for group in groups:
        for number, episode in enumerate(group):
            _check_finite(episode, number)
    return groups


def _check_finite(episode: Episode, number: int) -> None:
    steps = {f"step {step}": score for step, score in enumerate(episode.step_scores)}
    for name, value in {**episode.rewards, **steps}.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the reward {name!r} of sample {number} of problem {episode.problem.id} is {value}"
            )


def in_groups(samples: Sequence[T], group_size: int) -> list[list[T]]:
    """Cut completions or episodes in prompt-major order into one list for each problem."""
    return [
        list(samples[i : i + group_size]) for i in range(0, len(samples), group_size)
    ]
