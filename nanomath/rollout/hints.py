"""Hints: the beginning of a worked solution, given where a problem is too hard, and the rules
that choose how much of it.

    ladder      no hint; a group without a right sample is sampled again with each level in
                turn, until one is right                              GHPO, arXiv 2507.10628
    schedule    one level for all, which falls during the run         QuestA, arXiv 2507.13266
    controller  h <- clamp(h + gain (1/2 - rate), 0, most) for each problem, so that half of its
                samples are right; withdrawn linearly in the last third of the run
                                                                      AdaPrefix-GRPO, 2607.07674
    learned     pi(level | p) = softmax(theta (1, p)), p the pass rate predicted without a hint

The learned rule is the upper of two policies (arXiv 2508.01604 has two; its internals are not
published, and this is ours). It follows REINFORCE,

    theta <- theta + rate / n sum_i A_i grad log pi(level_i | p_i),   A_i = R_i - mean_{j != i} R_j
    R = 4 r (1 - r) exp(-transfer max(0, reliance))

over the n problems of a step: r is the pass rate that followed, and 4 r (1 - r) the spread that
the lower policy can learn from, 1 where half of the samples are right. Of it counts what does not
depend on the hint, by how unlikely the right samples are without it (HiLL's signal times
transfer). The baseline leaves the own group out, so the gradient is unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WITHDRAWN = 1 / 3  # the share of the run, at its end, in which the controller withdraws


@dataclass(frozen=True)
class Hint:
    """What samples were told of the worked solution of their problem.

    `level` is the share of the steps that was asked for, `text` the steps. `bare` is the prompt
    without them, in tokens; `prefix` are their tokens where they begin the assistant's turn.
    """

    level: float
    text: str
    bare: list[int]
    prefix: list[int]


def beginning(text: str, ends: Sequence[int], level: float) -> str:
    """Return the share `level` of a text's steps, which end at `ends`: the nearest number of
    them, and only for level 1 the last one.

    ValueError for a level outside [0, 1].
    """
    if not 0 <= level <= 1:
        raise ValueError(f"the level of a hint is {level}: it must be from 0 to 1")
    most = len(ends) if level == 1 else len(ends) - 1
    count = min(int(level * len(ends) + 0.5), most)
    return text[: ends[count - 1]] if count > 0 else ""


class Chooser:
    """Chooses levels, and learns what came of them. This one gives no hint.

    again: the levels at which a group without a right sample is sampled again. most: the
    highest level that there can be. All it knows is in `tensors`.
    """

    def __init__(self, most: float = 0.0, again: Sequence[float] = ()) -> None:
        self.most = most
        self.again = again
        self.tensors: dict[str, Tensor] = {}

    def choose(
        self,
        problems: Tensor,
        estimates: Tensor,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the levels [n] for the problems at places [n], whose pass rates without a
        hint are estimated; `progress` is the share of the run that is done.
        """
        return torch.zeros_like(estimates)

    def learn(
        self,
        problems: Tensor,
        estimates: Tensor,
        levels: Tensor,
        rates: Tensor,
        rewards: Tensor,
        progress: float,
    ) -> dict[str, float]:
        """Take in the pass rates and the rewards R [n] of what was chosen; return metrics."""
        return {}


class Ladder(Chooser):
    """Samples again at each of `levels` while all samples are wrong."""

    def __init__(self, levels: Sequence[float]) -> None:
        super().__init__(max(levels), levels)


class Schedule(Chooser):
    """Goes through `levels` in equal parts of the run."""

    def __init__(self, levels: Sequence[float]) -> None:
        super().__init__(max(levels))
        self.levels = levels

    def choose(self, problems, estimates, progress, generator):
        place = min(int(progress * len(self.levels)), len(self.levels) - 1)
        return torch.full_like(estimates, self.levels[place])


class Controller(Chooser):
    """Holds the pass rate of each of `problems` problems at one half, then withdraws.

    A problem that was not tried yet counts as tried without a hint, at the estimated rate.
    """

    def __init__(self, problems: int, gain: float, most: float) -> None:
        super().__init__(most)
        self.gain = gain
        self.tensors["level"] = torch.full((problems,), torch.nan, dtype=torch.float64)

    def choose(self, problems, estimates, progress, generator):
        known = self.tensors["level"][problems]
        levels = torch.where(known.isnan(), self.moved(0.0, estimates), known)
        return levels * min(1.0, (1 - progress) / WITHDRAWN)

    def learn(self, problems, estimates, levels, rates, rewards, progress):
        if progress <= 1 - WITHDRAWN:  # else the loop would fight the withdrawal
            self.tensors["level"][problems] = self.moved(levels, rates)
        return {}

    def moved(self, levels: Tensor | float, rates: Tensor) -> Tensor:
        """Return the next levels after these pass rates."""
        return (levels + self.gain * (0.5 - rates)).clamp(0, self.most)


class Learned(Chooser):
    """The upper policy over `levels`."""

    def __init__(self, levels: Sequence[float], rate: float) -> None:
        super().__init__(max(levels))
        self.levels = torch.tensor(levels, dtype=torch.float64)
        self.rate = rate
        self.tensors["theta"] = torch.zeros(len(levels), 2, dtype=torch.float64)

    def choose(self, problems, estimates, progress, generator):
        chances = upper_logprobs(self.tensors["theta"], estimates).exp()
        return self.levels[chances.multinomial(1, generator=generator)[:, 0]]

    def learn(self, problems, estimates, levels, rates, rewards, progress):
        chosen = (levels[:, None] - self.levels).abs().argmin(dim=1)
        theta = self.tensors["theta"]
        logprobs = upper_logprobs(theta, estimates)
        theta += self.rate * upper_gradient(theta, estimates, chosen, rewards)
        entropy = -(logprobs.exp() * logprobs).sum(dim=1).mean()
        return {
            "hints/upper_entropy": float(entropy),
            "hints/upper_reward": float(rewards.mean()),
        }


def upper_logprobs(theta: Tensor, estimates: Tensor) -> Tensor:
    """Return log pi(level | p) [n, L] of parameters [L, 2] and estimates p [n]."""
    seen = torch.stack([torch.ones_like(estimates), estimates], dim=1)
    return (seen @ theta.T).log_softmax(dim=1)


def upper_gradient(
    theta: Tensor, estimates: Tensor, chosen: Tensor, rewards: Tensor
) -> Tensor:
    """Return REINFORCE's gradient [L, 2] of the mean reward, given the levels that were
    chosen [n] and their rewards [n]; 0 where there is nothing to compare with.
    """
    n = len(rewards)
    if n < 2:
        return torch.zeros_like(theta)
    advantages = rewards - (rewards.sum() - rewards) / (n - 1)
    theta = theta.detach().requires_grad_(True)
    with torch.enable_grad():
        logprobs = upper_logprobs(theta, estimates)
        gain = (advantages * logprobs.gather(1, chosen[:, None])[:, 0]).mean()
    return torch.autograd.grad(gain, theta)[0]


def upper_reward(rates: Tensor, reliance: Tensor, transfer: float) -> Tensor:
    """Return R: the spread of the group, less where it depends on the hint."""
    return 4 * rates * (1 - rates) * (-transfer * reliance.clamp(min=0)).exp()
