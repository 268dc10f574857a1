r"""When something happens that need not happen: survival curves, the log-rank test, and warnings.

A run i is watched for t_i steps; d_i = 1 if they ended with the event, 0 if with the run. Of the
n(t) runs still watched at t, d(t) have it:

    Kaplan-Meier     S(t) = Π_{u <= t} (1 - d(u) / n(u))                (JASA 53, 1958)
    restricted mean  the mean of min(t_i, τ), where no run was given up before τ
    log-rank         U = Σ_{i of A} (d_i - Σ_{u <= t_i} d(u) / n(u)): what A has, less what it
                     would have if its runs were as the others; summed over strata

The p of U is that of all ways to call n_A of a stratum's runs A (Peto and Peto, J. R. Stat. Soc. A
135, 1972), counted where they are few and drawn where they are many. The usual normal
approximation is too liberal for so few runs: of 4000 studies without any effect, of 5 against 5
runs, it calls 6.8, 6.0, 6.5% apart at 0.05 where the event comes in all, in 63% and in 39% of the
runs, and this 4.4, 4.8, 3.2%. 5 against 5 can reach 2 / 252 = 0.0079, 3 against 3 only 0.1.

A warning is a measure, smoothed backwards, that crosses a threshold. All that a threshold decides
is what lies below a run's peak: the most extreme value until so many steps before the event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, compress
from math import comb

import numpy as np
from numpy.typing import NDArray

from nanomath.analysis.evaluation import Score
from nanomath.training.alarms import WINDOW

DRAWS = 9999  # so that the smallest p is 1e-4
FEWEST = 5  # with fewer runs of a kind, a share of 100% goes down to 51% (Wilson)
Vector = NDArray[np.float64]
Series = tuple[
    Sequence[int], Sequence[float]
]  # steps and values of a measure in one run


@dataclass(frozen=True)
class Runs:
    """Some runs: the step of the event, or else the last one, and which of the two it is [n]."""

    steps: NDArray[np.int64]
    happened: NDArray[np.bool_]

    @classmethod
    def of(cls, events: Sequence[int | None], last: Sequence[int]) -> Runs:
        """Of the event's step in each run, None where it did not come, and the last step."""
        steps = [at if e is None else e for e, at in zip(events, last, strict=True)]
        happened = [e is not None for e in events]
        return cls(np.array(steps, np.int64), np.array(happened, np.bool_))


def kaplan_meier(runs: Runs) -> tuple[list[int], list[float]]:
    """The steps at which the share without the event falls, and the share from each on."""
    from scipy import stats  # an extra: only studies need it

    censored = stats.CensoredData.right_censored(runs.steps, ~runs.happened)
    curve = stats.ecdf(censored).sf
    falls = np.isin(curve.quantiles, runs.steps[runs.happened])
    steps = curve.quantiles[falls].astype(int)
    return steps.tolist(), curve.probabilities[falls].tolist()


def horizon(runs: Runs) -> int:
    """The last step up to which all runs were watched that had no event."""
    ends = runs.steps[~runs.happened]
    return int(ends.min() if len(ends) else runs.steps.max())


def log_rank_scores(runs: Runs) -> Vector:
    """d_i less the cumulative hazard of all runs together at t_i: [n], with the sum 0."""
    at = np.unique(runs.steps[runs.happened])
    events = (runs.steps[runs.happened] == at[:, None]).sum(axis=1)
    watched = (runs.steps >= at[:, None]).sum(axis=1)
    reached = runs.steps[:, None] >= at
    return runs.happened - reached @ (events / watched)


def log_rank(strata: Sequence[tuple[Runs, Runs]]) -> float:
    """The two-sided p that A and B of every stratum are alike, exact if there is one stratum with
    no more than DRAWS ways to part its runs.
    """
    parts = [(log_rank_scores(together(a, b)), len(a.steps)) for a, b in strata]
    observed = sum(float(scores[:n].sum()) for scores, n in parts)
    exact = len(parts) == 1 and comb(len(parts[0][0]), parts[0][1]) <= DRAWS
    drawn = every_way(*parts[0]) if exact else some_ways(parts)
    beyond = int((np.abs(drawn) >= abs(observed) - 1e-9).sum())
    return beyond / len(drawn) if exact else (1 + beyond) / (1 + DRAWS)


def every_way(scores: Vector, n: int) -> Vector:
    """The sum of every n of the scores."""
    return np.array(
        [scores[list(chosen)].sum() for chosen in combinations(range(len(scores)), n)]
    )


def some_ways(parts: Sequence[tuple[Vector, int]]) -> Vector:
    """DRAWS sums of n scores of each stratum, drawn at random."""
    generator = np.random.default_rng(0)
    return sum(
        generator.permuted(np.tile(scores, (DRAWS, 1)), axis=1)[:, :n].sum(axis=1)
        for scores, n in parts
    )


def together(a: Runs, b: Runs) -> Runs:
    return Runs(np.append(a.steps, b.steps), np.append(a.happened, b.happened))


def smallest_p(n: int) -> float:
    """The least p that a log-rank test of n against n runs can have: all of one arm come first."""
    return 2 / comb(2 * n, n)


def wilson(hits: int, of: int) -> Score:
    """A share with its 95% interval (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, of).proportion_ci(method="wilson")
    return Score(hits / of, float(interval.low), float(interval.high))


# --- warnings --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """A rule: the smoothed measure (less its first value, if `change`) is above `value`, or
    below it if `sign` is -1.
    """

    sign: int
    change: bool
    value: float

    def first(self, series: Series) -> int | None:
        """The step at which it is first so."""
        steps, values = seen(series, self.sign, self.change)
        above = np.flatnonzero(values > self.sign * self.value)
        return int(steps[above[0]]) if len(above) else None

    def __str__(self) -> str:
        side = "above" if self.sign > 0 else "below"
        value = f"{self.value:{'+' if self.change else ''}.3g}"
        return f"{side} {'start ' if self.change else ''}{value}"


def seen(series: Series, sign: int, change: bool) -> tuple[NDArray[np.int64], Vector]:
    """A measure as a warning looks at it: the mean of the last WINDOW values, from the first such
    mean on.
    """
    steps = np.asarray(series[0], np.int64)[WINDOW - 1 :]
    if not len(steps):
        return steps, np.zeros(0)
    values = np.convolve(series[1], np.full(WINDOW, 1 / WINDOW), mode="valid")
    return steps, sign * (values - change * values[0])


def choose(
    series: Sequence[Series], events: Sequence[int | None], ahead: int
) -> Threshold:
    """The warning with the most hits less false alarms, as shares, in these runs; of equal ones
    the first of: above, below; the value, its change.
    """
    happened = np.array([event is not None for event in events])
    best = (-1.0, Threshold(1, False, np.inf))
    for sign, change in ((1, False), (-1, False), (1, True), (-1, True)):
        looks = [seen(one, sign, change) for one in series]
        peaks = np.array(
            [peak(*look, e, ahead) for look, e in zip(looks, events, strict=True)]
        )
        for threshold in between(peaks):
            warned = peaks > threshold
            gain = warned[happened].mean() - warned[~happened].mean()
            if gain > best[0] + 1e-9:
                best = (gain, Threshold(sign, change, sign * float(threshold)))
    return best[1]


def peak(
    steps: NDArray[np.int64], values: Vector, event: int | None, ahead: int
) -> float:
    """The highest value until `ahead` steps before the event, or in the whole run."""
    early = values if event is None else values[steps <= event - ahead]
    return float(early.max(initial=-np.inf))


def between(peaks: Vector) -> Iterator[float]:
    """The middles between neighbouring peaks."""
    known = np.unique(peaks[np.isfinite(peaks)])
    yield from (known[1:] + known[:-1]) / 2


def announcements(
    measures: Mapping[str, Sequence[Series]],
    events: Sequence[int | None],
    choosing: Sequence[bool],
    ahead: int,
) -> dict[str, dict]:
    """What each measure's warning, chosen on some of the runs, is worth on the others.

    `measures` has the series of each run, `events` the event's step in each, None if there was
    none. A hit is a run whose first warning is at least `ahead` steps before the event, a false
    alarm one without event that is warned of. Nothing where either half has fewer than FEWEST runs
    with the event, or without it.
    """
    judging = [not chooses for chooses in choosing]
    ends, others = (list(compress(events, half)) for half in (choosing, judging))
    for half in ends, others:
        if min(half.count(None), len(half) - half.count(None)) < FEWEST:
            return {}
    found = {}
    for name, series in measures.items():
        warning = choose(list(compress(series, choosing)), ends, ahead)
        found[name] = judged(warning, list(compress(series, judging)), others, ahead)
    return found


def judged(
    warning: Threshold,
    series: Sequence[Series],
    events: Sequence[int | None],
    ahead: int,
) -> dict:
    """A warning with its hits, false alarms and leads in some runs."""
    runs = list(zip(map(warning.first, series), events, strict=True))
    leads = [None if at is None else e - at for at, e in runs if e is not None]
    hits = [lead for lead in leads if lead is not None and lead >= ahead]
    false = [at is not None for at, e in runs if e is None]
    return {
        "warning": str(warning),
        "hits": wilson(len(hits), len(leads)),
        "false_alarms": wilson(sum(false), len(false)),
        "lead": float(np.median(hits)) if hits else None,
        "leads": leads,  # of every run with the event, in their order
    }
