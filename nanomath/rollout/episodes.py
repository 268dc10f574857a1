"""Episodes: the completions of a group of samples, with their rewards and advantages.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) keeps the groups that teach something
and samples others in place of the rest, here at most so many times: a model that solves
everything, or nothing, must not sample for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
    `Rollout.measurements`). `prompt` is what the policy is scored with; `hint` is what the
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

    def record(self) -> dict[str, Any]:
        """Return the dictionary that is written to rollouts.jsonl.

        Numbers that are the same for all tokens are written as one. The sampler's logprobs
        have six decimals, by which two runs can be told apart.
        """
        steps = {
            name: [round(x, 6) for x in getattr(self, name)]
            for name in ("step_scores", "step_rewards")
        }
        hint = {"level": self.hint.level, "hint": self.hint.text} if self.hint else {}
        return {
            "problem": self.problem.id,
            "question": self.problem.question,
            "answer": self.problem.answer,
            "sample": self.completion.sample_index,
            "text": self.completion.text,
            "finish_reason": self.completion.finish_reason,
            "rewards": self.rewards,
            "prompt_tokens": self.prompt,
            "tokens": self.completion.tokens,
            "advantages": _rounded(self.advantages),
            "logprobs": [round(x, 6) for x in self.completion.logprobs],
            **{name: _rounded(values) for name, values in self.measured.items()},
            **({"step_ends": self.step_ends, **steps} if self.step_ends else {}),
            **hint,
        }


def _rounded(values: Sequence[float]) -> list[float] | float:
    """Round to three decimals; values that are all equal become one number."""
    rounded = [round(value, 3) + 0.0 for value in values]  # + 0.0: no -0.0
    return rounded[0] if len(set(rounded)) == 1 else rounded


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


def is_mixed(group: Sequence[Episode]) -> bool:
    """Return whether the group has right answers and wrong ones."""
    return len({bool(e.rewards["accuracy"]) for e in group}) > 1


def is_uneven(group: Sequence[Episode]) -> bool:
    """Return whether the group's rewards, or those of its steps, differ: otherwise all of
    its advantages are zero.
    """
    return len({(e.rewards["total"], *e.step_rewards) for e in group}) > 1


KEEP_GROUPS: dict[str, Callable[[Sequence[Episode]], bool]] = {
    "all": lambda group: True,
    "mixed": is_mixed,
    "uneven": is_uneven,
}


def collect_groups(
    sample: Callable[[int], list[list[Episode]]], wanted: int, keep: str, refills: int
) -> tuple[list[list[Episode]], list[list[Episode]]]:
    """Return up to `wanted` groups worth keeping, and all groups that were sampled to find
    them.

    sample(k) draws the groups of refill k: refill 0 always, then refills 1 to `refills`
    while groups are missing. keep: a key of KEEP_GROUPS. When no group is worth keeping,
    those of the last refill are returned: the step then measures them, and has no gradient.
    """
    kept: list[list[Episode]] = []
    sampled: list[list[Episode]] = []
    for refill in range(refills + 1):
        groups = sample(refill)
        sampled += groups
        kept += [group for group in groups if KEEP_GROUPS[keep](group)]
        if len(kept) >= wanted:
            break
    return kept[:wanted] or groups, sampled


def episode_metrics(groups: Groups) -> dict[str, float]:
    """Return the means over a rollout's episodes: each reward, pass@1, flat groups,
    lengths.

    A group is flat when its rewards are all equal, so that its advantages are zero. Lengths
    are in tokens; the mean length of right, of wrong and of truncated completions is left
    out where there are none.
    """
    episodes = [episode for group in groups for episode in group]
    right = [[bool(e.rewards["accuracy"]) for e in group] for group in groups]
    lengths = {
        "length": [e.completion.length for e in episodes],
        "length/right": [e.completion.length for e in episodes if e.rewards["accuracy"]],
        "length/wrong": [
            e.completion.length for e in episodes if not e.rewards["accuracy"]
        ],
        "length/truncated": [
            e.completion.length for e in episodes if not e.completion.finished
        ],
    }
    components = [name for name in episodes[0].rewards if name != "total"]
    return {
        "reward": _mean(e.rewards["total"] for e in episodes),
        "pass@1": _mean(ok for group in right for ok in group),
        **{
            f"reward/{name}": _mean(e.rewards[name] for e in episodes)
            for name in components
        },
        "flat_groups": _mean(not is_uneven(group) for group in groups),
        "all_right": _mean(all(group) for group in right),
        "all_wrong": _mean(not any(group) for group in right),
        **{name: _mean(values) for name, values in lengths.items() if values},
        "truncated": _mean(not e.completion.finished for e in episodes),
        "repetition": _mean(repeated_share(e.completion.tokens) for e in episodes),
    }


def in_groups(samples: Sequence[T], group_size: int) -> list[list[T]]:
    """Cut completions or episodes in prompt-major order into one list for each problem."""
    return [list(samples[i : i + group_size]) for i in range(0, len(samples), group_size)]


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of the n-grams of tokens that occurred earlier in the list.

    It is near 1 when a completion goes in circles.
    """
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
