"""How good the scores of steps are, against labels.

    AUC                  P(a right step scores above a wrong one)
    accuracy             share of steps on the right side of 1/2
    calibration error    sum over ten bins of scores of share of the steps
                         * |mean score - mean label|, arXiv 1706.04599
    F1                   harmonic mean of two accuracies: of finding the first wrong step of a
                         solution that has one, and of finding none in one that has none
                         (ProcessBench, arXiv 2412.06559)

A solution's first wrong step is predicted as the first whose score is below the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from nanomath.process.labelled import Labelled

BINS = 10


def measure_scores(
    solutions: Sequence[Labelled],
    scores: Sequence[Sequence[float]],
    threshold: float = 0.5,
) -> dict[str, float]:
    """Return the measures above of the scores of all steps; one that there is nothing to take
    from is left out. Soft labels count as right from 1/2 on.
    """
    found = {}
    pairs = [
        (score, label)
        for solution, row in zip(solutions, scores, strict=True)
        for score, label in zip(row, solution.labels, strict=True)
        if label is not None
    ]
    if pairs:
        right = [label >= 0.5 for _, label in pairs]
        found["steps"] = len(pairs)
        found["right"] = fmean(right)
        found["accuracy"] = fmean((s >= 0.5) == (label >= 0.5) for s, label in pairs)
        found["calibration_error"] = calibration_error(*zip(*pairs, strict=True))
        if len(set(right)) == 2:
            found["auc"] = auc([score for score, _ in pairs], right)
    return {**found, **f1(solutions, scores, threshold)}


def auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Return the AUC of n steps by their ranks: 1 is perfect, 1/2 no better than chance, and ties
    count half.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    ok = torch.tensor(right)
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    # The mean of the ranks of those that tie
    ranks = counts.cumsum(0) - (counts - 1) / 2
    n = int(ok.sum())
    total = float(ranks[which[ok]].sum())
    return (total - n * (n + 1) / 2) / (n * (len(ok) - n))


def calibration_error(scores: Sequence[float], labels: Sequence[float]) -> float:
    """Return how far mean scores are from mean labels, over bins of equal width."""
    gaps = [0.0] * BINS
    for score, label in zip(scores, labels, strict=True):
        gaps[min(BINS - 1, int(score * BINS))] += score - label
    return sum(map(abs, gaps)) / len(scores)


def f1(
    solutions: Sequence[Labelled],
    scores: Sequence[Sequence[float]],
    threshold: float = 0.5,
) -> dict[str, float]:
    """Return f1, f1_wrong and f1_right: the harmonic mean and the accuracies it is of; those
    there is no solution for are left out.
    """
    wrong = []
    right = []
    for solution, row in zip(solutions, scores, strict=True):
        predicted = next((k for k, score in enumerate(row) if score < threshold), -1)
        hits = right if solution.first_wrong < 0 else wrong
        hits.append(predicted == solution.first_wrong)
    found = {}
    if wrong:
        found["f1_wrong"] = fmean(wrong)
    if right:
        found["f1_right"] = fmean(right)
    if wrong and right:
        a, b = found.values()
        found["f1"] = 2 * a * b / (a + b) if a + b else 0.0
    return found
