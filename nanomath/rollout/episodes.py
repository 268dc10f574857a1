"""Episodes: the completions of a group of samples, with their rewards and advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nanomath.rollout.sampler import Completion, Progress, Sampler

# The rewards of one prompt's group: (problem, completions) -> for each the named components and their "total".
RewardFunction = Callable[[Any, Sequence[Completion]], list[dict[str, float]]]


@dataclass
class Episode:
    """One rewarded sample. `rewards` has every component and "total"; `advantage` is set by the policy step."""

    problem: Any
    prompt: list[int]
    completion: Completion
    rewards: dict[str, float]
    advantage: float = 0.0

    def record(self) -> dict[str, Any]:
        """What rollouts.jsonl keeps of it."""
        return {
            "problem": self.problem.id,
            "question": self.problem.question,
            "answer": self.problem.answer,
            "text": self.completion.text,
            "finish_reason": self.completion.finish_reason,
            "rewards": self.rewards,
            "advantage": self.advantage,
            "prompt_tokens": self.prompt,
            "tokens": self.completion.tokens,
            "logprobs": [round(logprob, 6) for logprob in self.completion.logprobs],
        }


def sample_episodes(
    sampler: Sampler,
    problems: Sequence[Any],
    prompts: Sequence[list[int]],
    reward: RewardFunction,
    group_size: int,
    progress: Progress | None = None,
    **sampling: Any,
) -> list[Episode]:
    """`group_size` rewarded episodes of every problem, in prompt-major order; `sampling` as in `Sampler.generate`."""
    completions = sampler.generate(prompts, n=group_size, progress=progress, **sampling)
    episodes = []
    for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        group = completions[index * group_size : (index + 1) * group_size]
        rewards = reward(problem, group)
        episodes += [Episode(problem, prompt, c, r) for c, r in zip(group, rewards, strict=True)]
    return episodes


def episode_metrics(episodes: Sequence[Episode], group_size: int) -> dict[str, float]:
    """Means over the episodes of a rollout: rewards by component, pass@1, groups that teach nothing, lengths.

    A group is flat when its total rewards are all equal: its advantages are zero. Lengths are in tokens; those of
    right, wrong and truncated completions are left out where there are none.
    """
    groups = [episodes[i : i + group_size] for i in range(0, len(episodes), group_size)]
    right = [[bool(e.rewards["accuracy"]) for e in group] for group in groups]
    totals = [{e.rewards["total"] for e in group} for group in groups]
    lengths = {
        "length": [e.completion.length for e in episodes],
        "length/right": [e.completion.length for e in episodes if e.rewards["accuracy"]],
        "length/wrong": [e.completion.length for e in episodes if not e.rewards["accuracy"]],
    }
    components = [name for name in episodes[0].rewards if name != "total"]
    return {
        "reward": _mean(e.rewards["total"] for e in episodes),
        "pass@1": _mean(ok for group in right for ok in group),
        **{f"reward/{name}": _mean(e.rewards[name] for e in episodes) for name in components},
        "flat_groups": _mean(len(total) == 1 for total in totals),
        "all_right": _mean(all(group) for group in right),
        "all_wrong": _mean(not any(group) for group in right),
        **{name: _mean(values) for name, values in lengths.items() if values},
        "truncated": _mean(not e.completion.finished for e in episodes),
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
