"""A judge's feedback on episodes: it ranks right answers, can make no wrong one good, and is
measured.
"""

from __future__ import annotations

import pytest

from nanomath.data.problem import Problem
from nanomath.process.judge import JudgeReward
from nanomath.rollout import Completion, Episode


class Lengths:
    """Marks a solution by its length in characters, and prefers longer ones."""

    def __init__(self) -> None:
        self.masses = [0.9, 0.7]

    def mark(self, solutions):
        return [len(text) / 10 for _, text in solutions]

    def compare(self, pairs):
        return [(float(len(one) > len(other)),) * 2 for _, one, other in pairs]


def episodes(*samples: tuple[str, float]) -> list[Episode]:
    return [
        Episode(
            Problem("p", "q", "a"),
            [5],
            Completion(
                0, i, [1] * len(text), [0.0] * len(text), [0.0] * len(text), text, "eos"
            ),
            {"accuracy": accuracy, "total": accuracy},
        )
        for i, (text, accuracy) in enumerate(samples)
    ]


@pytest.mark.parametrize(
    ("opponents", "scores"), [(0, [0.2, 0.6, 0.4, 0.1]), (1, [0.0, 1.0, 1.0, 0.0])]
)
def test_it_ranks_right_answers(opponents, scores):
    found = episodes(("aa", 1.0), ("aaaaaa", 0.0), ("aaaa", 1.0), ("a", 0.0))
    JudgeReward(Lengths(), 0.3, opponents)([found[:2], found[2:]])
    assert [e.rewards["judge"] for e in found] == pytest.approx(scores)
    expected = [1 + 0.3 * (scores[0] - 0.5), 0.0, 1 + 0.3 * (scores[2] - 0.5), 0.0]
    assert [e.rewards["total"] for e in found] == pytest.approx(expected)


def test_it_is_measured():
    found = episodes(("aa", 1.0), ("aaaaaa", 0.0), ("aaaa", 1.0), ("a", 0.0))
    judge = JudgeReward(Lengths(), 0.3, 3)
    judge([found])
    metrics = judge.metrics([found])
    assert (
        metrics["judge/mass"] == pytest.approx(0.8)
        and metrics["judge/consistency"] == 1
    )
    assert metrics["judge/auc"] == 0.5 and metrics[
        "judge/length_correlation"
    ] == pytest.approx(0.98, abs=0.03)
    assert judge.judge.masses == judge.consistency == []
