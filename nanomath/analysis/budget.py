"""Accuracy by budget, and what happened to each problem between two measurements.

A completion counts at a budget of n tokens if it is right and has at most n of them, its eos
included: it came to its end within n. One set of samples thus gives the accuracy at every n,

    a(n) = mean over problems of the share of samples with  right and length <= n
    area = 1/N sum_{n=1..N} a(n),   N the greatest budget

which is what cutting each of them at n would give, but for answers that stood there before the
end. At N itself, where sampling was cut, a completion without an end counts as it was graded.

Problems that were hard before get better by chance alone where the same samples say so: they are
sorted by every second sample of A, and what they did before is measured by the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanomath.analysis.evaluation import Score
from nanomath.analysis.statistics import cluster_bootstrap, numbered

POINTS = 256  # of a curve with a band; between two different lengths it is level
# Hard, middle, easy by the share solved before.
BANDS = ((0.0, 0.1), (0.1, 0.8), (0.8, 1.0))
Problems = Mapping[str, Any]  # those of an eval.json


@dataclass(frozen=True)
class Budget:
    """a(n) at `tokens`, where it changes, and at the budgets asked for; the area up to `limit`."""

    limit: int
    area: Score
    at: dict[str, Score]
    tokens: list[int]
    curve: list[Score]


def by_budget(
    problems: Problems, limit: int, budgets: Sequence[int] = (), seed: int = 0
) -> Budget:
    """Accuracy by budget, with 95% intervals over clusters of problems."""
    lengths = sorted({n for p in problems.values() for n in p["tokens"]} | {1, limit})
    points = [lengths[i] for i in thinned(len(lengths))]
    rows = []
    for problem in problems.values():
        right = np.array(problem["right"])
        tokens = np.array(problem["tokens"])
        left = np.maximum(0, limit + 1 - tokens) / limit
        within = tokens[:, None] <= np.array([*budgets, *points])
        rows.append([(right * left).mean(), *(right[:, None] * within).mean(axis=0)])
    labels = numbered(problem["cluster"] for problem in problems.values())
    matrix = np.array(rows)
    area, *found = cluster_bootstrap(
        lambda drawn: matrix[drawn].mean(axis=0), labels, seed
    )
    at = {str(n): score for n, score in zip(budgets, found, strict=False)}
    return Budget(limit, area, at, points, found[len(budgets) :])


def thinned(count: int) -> list[int]:
    """At most POINTS of the numbers from 0 to count - 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).astype(int)).tolist()


# --- two measurements ------------------------------------------------------------------------


Point = tuple[float, float]  # accuracy, tokens


@dataclass(frozen=True)
class Arrow:
    """One problem before and after; `held` is before by the samples that did not choose its band
    (None: there is one sample only).
    """

    before: Point
    after: Point
    band: int | None
    held: Point
    cluster: str


def arrows(a: Problems, b: Problems) -> list[Arrow]:
    """The problems that both were asked. ValueError where there are none."""
    shared = [p for p in a if p in b and a[p]["question"] == b[p]["question"]]
    if not shared:
        raise ValueError("the two measurements have no problem in common")
    return [arrow(a[p], b[p]) for p in shared]


def arrow(a: Mapping[str, Any], b: Mapping[str, Any]) -> Arrow:
    """One problem of both."""
    before, after = (mean_point(one["right"], one["tokens"]) for one in (a, b))
    if len(a["right"]) < 2:
        return Arrow(before, after, None, before, a["cluster"])
    share = fmean(a["right"][::2])
    band = next(i for i, (_, most) in enumerate(BANDS) if share <= most)
    held = mean_point(a["right"][1::2], a["tokens"][1::2])
    return Arrow(before, after, band, held, a["cluster"])


def mean_point(right: Sequence[int], tokens: Sequence[int]) -> Point:
    """Accuracy and tokens of some samples."""
    return fmean(right), fmean(tokens)


def changes(found: Sequence[Arrow]) -> Iterator[str]:
    """The changes in words, of all problems and of each band."""
    yield f"{len(found)} problems in both, A -> B (95% intervals of these two on new problems)"
    yield f"  all          {change(found, 'before')}"
    for number, (least, most) in enumerate(BANDS):
        own = [arrow for arrow in found if arrow.band == number]
        if own:
            name = f"{100 * least:.0f} to {100 * most:.0f}%"
            yield f"  {name:12} {change(own, 'held')}"
    if any(arrow.band is not None for arrow in found):
        yield "  bands: by half of A's samples; what A did is taken from the other half"
    else:
        yield "  one sample of each problem in A: no bands, chance alone would move them"


def change(found: Sequence[Arrow], start: str) -> str:
    """Accuracy and tokens at the start ("before" or "held") and after, and their difference."""
    labels = numbered(arrow.cluster for arrow in found)
    before, after = (
        np.array([getattr(x, when) for x in found]) for when in (start, "after")
    )
    moved = after - before
    accuracy, tokens = cluster_bootstrap(lambda d: moved[d].mean(axis=0), labels)
    old, new = before.mean(axis=0), after.mean(axis=0)
    return (
        f"{len(found):5} problems  accuracy {100 * old[0]:.1f}% -> {100 * new[0]:.1f}% "
        f"({signed(accuracy, 100, labels)})  "
        f"tokens {old[1]:.1f} -> {new[1]:.1f} ({signed(tokens, 1, labels)})"
    )


def signed(score: Score, scale: float, labels: NDArray[np.int64]) -> str:
    """A difference with its interval, which one cluster does not have."""
    mean, low, high = (scale * x for x in (score.mean, score.low, score.high))
    return f"{mean:+.1f}" + f", {low:+.1f} to {high:+.1f}" * bool(labels.any())
