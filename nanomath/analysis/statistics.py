"""What may be said of a difference between two methods, and how small a one could have been seen.

d[s, i] is what A scored on problem i with seed s, less what B did with the same seed on the same
problem (each the mean of K samples). With problems in clusters (a template, twins in two languages)
and the model  d[s, i] = mu + a_s + b_i + e_si,  three 95% intervals of mu are named apart:

    problems  these S trained pairs on new problems:  V_p = var over clusters of their mean
    seeds     the method on new seeds, these problems: V_s = var(seed means) / S, t with S - 1
    both      new seeds and new problems: V = V_s + V_p - V_e, V_e = var(e) / (S C), what both count
              (two-way random effects; degrees of freedom by Satterthwaite, Biometrics 2, 1946)

The clustered variance is that of Miller (arXiv 2411.00640) with the factor C / (C - 1). Comparisons
with one baseline are corrected by Holm (Scand. J. Stat. 6, 1979). IQM and P(A > B) are rliable's
(arXiv 2108.13264), for three tasks and five seeds or more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nanomath.analysis.evaluation import RESAMPLES, Score, with_percentiles

LEVEL = 0.95
POWER = 0.8
FEWEST_SEEDS = 3  # with two, the interval over seeds is nine standard deviations wide
Matrix = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """The mean of A - B with its intervals; `seeds` and `both` are None where there are fewer than
    FEWEST_SEEDS. `p` is of the headline: the two-sided test of no difference.
    """

    mean: float
    problems: Score
    seeds: Score | None
    both: Score | None
    p: float

    @property
    def headline(self) -> Score:
        """The interval that speaks of the method, or else that of these models."""
        return self.both or self.problems


def compare(d: Matrix, clusters: Sequence[Hashable] | None = None) -> Difference:
    """The difference of paired scores d [S seeds, n problems]; `clusters` names each problem's."""
    seeds, n = d.shape
    mean = float(d.mean())
    labels = numbered(range(n) if clusters is None else clusters)
    count = int(labels.max()) + 1
    if count < 2:
        raise ValueError(
            "all problems are one cluster: no interval can be made of them"
        )
    of_problems = clustered_variance(d.mean(axis=0), labels)
    problems = t_score(mean, of_problems, count - 1)
    if seeds < FEWEST_SEEDS:
        return Difference(
            mean, problems, None, None, p_value(mean, of_problems, count - 1)
        )
    of_seeds = float(d.mean(axis=1).var(ddof=1)) / seeds
    residual = d - d.mean(axis=0) - d.mean(axis=1)[:, None] + mean
    shared = (
        sum(clustered_variance(row, labels) for row in residual) / seeds / (seeds - 1)
    )
    total = max(
        of_seeds + of_problems - shared, of_seeds, of_problems * (1 - 1 / seeds)
    )
    freedom = (
        total**2 / (of_seeds**2 / (seeds - 1) + of_problems**2 / (count - 1))
        if total
        else 1
    )
    return Difference(
        mean,
        problems,
        t_score(mean, of_seeds, seeds - 1),
        t_score(mean, total, freedom),
        p_value(mean, total, freedom),
    )


def numbered(clusters: Iterable[Hashable]) -> NDArray[np.int64]:
    """The clusters of some problems as numbers from 0."""
    return np.unique([str(name) for name in clusters], return_inverse=True)[1]


def clustered_variance(values: Matrix, labels: NDArray[np.int64]) -> float:
    """The variance of the mean of values [n] in clusters 0 .. C-1, which are what is drawn."""
    deviations = np.bincount(labels, weights=values - values.mean())
    count = len(deviations)
    return float((deviations**2).sum()) / len(values) ** 2 * count / (count - 1)


def t_score(mean: float, variance: float, freedom: float) -> Score:
    """The t interval of a mean."""
    half = t_quantile((1 + LEVEL) / 2, freedom) * math.sqrt(variance)
    return Score(mean, mean - half, mean + half)


def t_quantile(share: float, freedom: float) -> float:
    """The value below which a share of Student's t lies."""
    from scipy.stats import t  # an extra: only studies need it

    return float(t.ppf(share, freedom))


def p_value(mean: float, variance: float, freedom: float) -> float:
    """The two-sided p of a mean that would be 0."""
    from scipy.stats import t

    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / math.sqrt(variance), freedom))


def holm(p: Mapping[Name, float]) -> dict[Name, float]:
    """The p of each of several tests, corrected so that the chance of any false alarm among all is
    that of one.
    """
    corrected: dict[Name, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return corrected


def detectable(
    problems: int,
    samples: int,
    seeds: int,
    spread: float = 0.0,
    correlation: float = 0.5,
) -> float:
    """The smallest true difference that a study would find in POWER of the cases.

    Before anything is run: pass rates uniform in [0, 1] (variance 1/12 between problems, 1/6 / K of
    a mean of K samples), of the two arms with this correlation over problems; `spread` is the
    standard deviation of the paired difference over seeds that problems do not explain.
    """
    from scipy.stats import norm, t

    between = 2 * (1 - correlation) / 12
    within = 2 / 6 / samples / seeds
    variance = (between + within) / problems + spread**2 / seeds
    law = t(seeds - 1) if spread and seeds > 1 else norm
    return float((law.ppf((1 + LEVEL) / 2) + law.ppf(POWER)) * math.sqrt(variance))


def bands(
    scores: Mapping[str, float], apart: Mapping[tuple[str, str], bool]
) -> list[list[str]]:
    """Arms from the best down, in bands of which each arm is not told apart from the band's first.

    `apart` says of every pair whether their difference was told from 0.
    """
    found: list[list[str]] = []
    for name in sorted(scores, key=lambda n: -scores[n]):
        if found and not apart.get(
            (found[-1][0], name), apart.get((name, found[-1][0]), True)
        ):
            found[-1].append(name)
        else:
            found.append([name])
    return found


def iqm(scores: Matrix) -> float:
    """The mean of the middle half of scores [seeds, tasks], all together."""
    from scipy.stats import trim_mean

    return float(trim_mean(scores, 0.25, axis=None))


def improvement(a: Matrix, b: Matrix) -> float:
    """The chance that a run of A scores above one of B, ties shared: scores [seeds, tasks], the
    mean over tasks.
    """
    above = (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])
    return float(above.mean())


def stratified_bootstrap(
    scores: Sequence[Matrix],
    statistic: Callable[..., float],
    resamples: int = RESAMPLES,
) -> Score:
    """The number statistic(*scores) with a 95% percentile interval, the seeds of each task and
    each of `scores` drawn anew.
    """
    generator = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        drawn = [
            np.take_along_axis(m, generator.integers(len(m), size=m.shape), axis=0)
            for m in scores
        ]
        found.append(statistic(*drawn))
    return with_percentiles(statistic(*scores), found)


def halved(doses: Sequence[float], curve: Sequence[float]) -> float:
    """The dose at which a curve over doses, from the least on, has first come down to half of its
    first value, between two of them by log(1 + dose); inf where it never does, NaN where there was
    nothing above 0.
    """
    goal = curve[0] / 2
    at = np.log1p(doses)
    for i in range(1, len(curve)):
        if goal > 0 and curve[i] <= goal:
            share = (curve[i - 1] - goal) / (curve[i - 1] - curve[i])
            return float(np.expm1(at[i - 1] + share * (at[i] - at[i - 1])))
    return math.inf if goal > 0 else math.nan


def halving_dose(doses: Sequence[float], curves: Matrix) -> Score:
    """`halved` of the mean of curves [S seeds, doses], with a 95% percentile interval over draws
    of the seeds. Of few seeds it is too narrow; a bound that is not known is inf or NaN.
    """
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(curves), size=(RESAMPLES, len(curves)))
    found = [halved(doses, curves[rows].mean(axis=0)) for rows in drawn]
    low, high = np.percentile(found, [2.5, 97.5], method="inverted_cdf")
    return Score(halved(doses, curves.mean(axis=0)), float(low), float(high))


def cluster_bootstrap(
    statistic: Callable[[NDArray[np.int64]], ArrayLike],
    labels: NDArray[np.int64],
    seed: int = 0,
) -> list[Score]:
    """The numbers statistic(indices of problems) with 95% percentile intervals, whole clusters
    (labels [n], numbers from 0) drawn anew. A number that a draw does not have is NaN there.
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(members), size=(RESAMPLES, len(members)))
    found = [statistic(np.concatenate([members[i] for i in row])) for row in drawn]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all of them NaN
        low, high = np.nanpercentile(found, [2.5, 97.5], axis=0)
    values = np.asarray(statistic(np.arange(len(labels))), np.float64)
    return [Score(*map(float, row)) for row in zip(values, low, high, strict=True)]
