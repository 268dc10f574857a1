"""A judge's feedback on the episodes of a rollout: it ranks right answers, and is itself watched.

total_i += weight * correct_i * (s_i - 1/2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from nanomath.process.measures import auc
from nanomath.rewards.judge import Feedback, Judge, judge_pairwise, judge_pointwise
from nanomath.rollout.episodes import Episode, in_groups


@dataclass
class JudgeReward:
    """`judge_reward(episodes)` adds to their rewards "judge" and "total". opponents: of each sample, 0 for marks."""

    judge: Judge
    group_size: int
    weight: float = 0.3
    opponents: int = 4
    consistency: list[float] = field(default_factory=list)  # since the metrics were last asked for

    def __call__(self, episodes: Sequence[Episode]) -> None:
        groups = [
            (group[0].problem.question, [e.completion.text for e in group])
            for group in in_groups(episodes, self.group_size)
        ]
        found = self._ask(groups)
        self.consistency += [] if found.consistency is None else [found.consistency]
        for episode, score in zip(episodes, found.scores, strict=True):
            episode.rewards["judge"] = score
            episode.rewards["total"] += self.weight * bool(episode.rewards["accuracy"]) * (score - 0.5)

    def _ask(self, groups: Sequence[tuple[str, Sequence[str]]]) -> Feedback:
        if self.opponents:
            return judge_pairwise(self.judge, groups, self.opponents)
        return judge_pointwise(self.judge, groups)

    def metrics(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Of a rollout: agreement with the verifier (AUC), correlation with length, consistency of both orders, and the
        probability of the possible answers; what there is nothing to take from is left out.
        """
        scores = torch.tensor([e.rewards["judge"] for e in episodes], dtype=torch.float64)
        lengths = torch.tensor([e.completion.length for e in episodes], dtype=torch.float64)
        right = [bool(e.rewards["accuracy"]) for e in episodes]
        found = {"judge/mass": fmean(self.judge.masses)} if self.judge.masses else {}
        if self.consistency:
            found["judge/consistency"] = fmean(self.consistency)
        if len(set(right)) == 2:
            found["judge/auc"] = auc(scores.tolist(), right)
        if len(episodes) > 1 and scores.std() > 0 and lengths.std() > 0:
            found["judge/length_correlation"] = float(torch.corrcoef(torch.stack([scores, lengths]))[0, 1])
        self.judge.masses.clear(), self.consistency.clear()
        return found
