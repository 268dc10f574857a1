"""The numbers of one cell of a study, by the name that its study gives them.

heldout/pass@K            of the answers that a training or `eval` has left, problem by problem;
heldout/maj@K             of `eval` also without `heldout/` (nanomath/analysis/evaluation.py)
pass@1/family=maths       the same over the problems with this label, or these: /a=1,b=2
NAME                      of a training: the metric's last value (the mean of its last LAST)
NAME:area                 the mean of its values over all steps
NAME:to=0.6               the first step at which it was at least 0.6; one more than there are,
                          if never
a.b.0.c                   of anything else: a number in the JSON files of its directory, by the
                          keys and the places in lists that lead to it

A study may measure a difference, STAGE.NAME - STAGE.NAME: of one run before and after, problem by
problem, or of twins in two languages, cluster by cluster.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

from nanomath.analysis.compare import measured_at
from nanomath.analysis.evaluation import maj_at_k, pass_at_k
from nanomath.analysis.runs import Record, Run, read_run

PER_PROBLEM = re.compile(r"(?:heldout/)?(pass|maj)@([1-9]\d*)(?:/(.+=.+))?")
WHOLE = re.compile(r"[^:]+(:area|:to=-?\d*\.?\d+(e-?\d+)?)?")
LESS = " - "  # stands between the two measures of a difference
NEAREST = 3  # names that are shown for a wrong one
# Of each problem; of a number of the whole run, under the name "".
Scores = dict[str, float]
Labels = dict[str, dict[str, Any]]  # of each problem


def terms(measure: str) -> list[tuple[str, str]]:
    """The stage and the name of a study's measure, or those of both measures of a difference."""
    return [tuple(term.split(".", 1)) for term in measure.split(LESS)]


def less(
    one: tuple[Scores, Labels], other: tuple[Scores, Labels], cluster: str
) -> tuple[Scores, Labels]:
    """The first scores less the second: of each problem that both have, or, where they have none
    in common, of each cluster that has problems of both, by their means.

    ValueError where nothing pairs them.
    """
    (a, labels), (b, _) = one, other
    if not a.keys() & b.keys():
        a, b = by_cluster(*one, cluster), by_cluster(*other, cluster)
        labels = {name: {cluster: name} for name in a}
    pairs = {name: a[name] - b[name] for name in a if name in b}
    if a and b and not pairs:
        raise ValueError(
            f"a difference of other problems, with no {cluster or 'cluster'} in common: expected "
            'cluster = "twin", or another label that both have'
        )
    return pairs, {name: labels[name] for name in pairs if name in labels}


def by_cluster(scores: Scores, labels: Labels, cluster: str) -> Scores:
    """The mean score of the problems that share their value of a label."""
    members: dict[str, list[float]] = {}
    for problem, score in scores.items():
        name = str(labels.get(problem, {}).get(cluster, problem))
        members.setdefault(name, []).append(score)
    return {name: fmean(values) for name, values in members.items()}


def run_of(place: Path) -> Run:
    """The run of a cell; of any command but a training what it has left in its directory."""
    trained = (place / "config.toml").exists()
    return read_run(place) if trained else Run(place, "eval", {})


def measured(run: Run, metric: str, last: int = 1) -> tuple[Scores, Labels]:
    """The score of each problem, and its labels; or the number of the whole run, of which nothing
    is there where it is not defined, such as the confidence in right answers if none is right.

    ValueError for what the cell does not measure.
    """
    # What eval leaves has answers only.
    if PER_PROBLEM.fullmatch(metric) and run.heldout:
        return per_problem(run, metric, last)
    value = (
        number_of(run.directory, metric)
        if run.kind == "eval"
        else whole_run(run, metric, last)
    )
    return {"": value} if math.isfinite(value) else {}, {}


def per_problem(run: Run, metric: str, last: int) -> tuple[Scores, Labels]:
    """pass@k or maj@k of each problem in the answers of the last measurements, and its labels."""
    kind, size, where = PER_PROBLEM.fullmatch(metric).groups()
    wanted = dict(part.split("=", 1) for part in where.split(",")) if where else {}
    every: dict[str, list[Record]] = {}
    for step in sorted({record["step"] for record in run.heldout})[-last:]:
        for problem, rows in measured_at(run, step).items():
            every.setdefault(problem, []).extend(rows)
    labels = {problem: rows[0].get("labels", {}) for problem, rows in every.items()}
    kept = {
        problem: rows
        for problem, rows in every.items()
        if all(
            str(labels[problem].get(name)) == value for name, value in wanted.items()
        )
    }
    if not kept:
        known = dict.fromkeys(name for found in labels.values() for name in found)
        raise ValueError(
            f"measure {metric!r}: no problem of {run.directory} is such a one; labels are: "
            f"{', '.join(known) or 'none'}"
        )
    if (fewest := min(map(len, kept.values()))) < int(size):
        raise ValueError(
            f"measure {metric!r}: {run.directory} has {fewest} samples of a problem"
        )
    scores = {problem: score(rows, kind, int(size)) for problem, rows in kept.items()}
    return scores, {problem: labels[problem] for problem in kept}


def score(rows: list[Record], kind: str, size: int) -> float:
    """pass@k or maj@k of one problem's answers."""
    right = [bool(row["right"]) for row in rows]
    if kind == "pass":
        return pass_at_k(len(right), sum(right), size)
    return maj_at_k([row["answer"] for row in rows], right, size)


def whole_run(run: Run, metric: str, last: int) -> float:
    """A number of a training: its last values, its mean, or the step at which it was reached."""
    name, _, how = metric.partition(":")
    if name not in run.series:
        raise ValueError(missing(f"metric {name!r}", run.directory, name, run.series))
    steps, values = run.series[name]
    if not how:
        return fmean(values[-last:])
    if how == "area":
        return fmean(values)
    goal = float(how.removeprefix("to="))
    reached = (step for step, value in zip(steps, values, strict=True) if value >= goal)
    return float(next(reached, steps[-1] + 1))


def number_of(place: Path, name: str) -> float:
    """A number in the JSON files that a command has left."""
    found: dict[str, float] = {}
    for path in sorted(place.glob("*.json")):
        if path.name != "cell.json":
            found |= dict(numbers(json.loads(path.read_text("utf-8"))))
    if name not in found:
        raise ValueError(missing(f"number {name!r}", place, name, found))
    return found[name]


def missing(what: str, place: Path, name: str, known: Iterable[str]) -> str:
    """Why a measure cannot be taken; of hundreds of names only the nearest help."""
    near = get_close_matches(name, [*known], NEAREST, cutoff=0.0)
    return f"no {what} in {place}; did you mean {', '.join(near) or 'nothing: it has none'}?"


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in JSON by the keys and places that lead to them, with dots between."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in inside:
            yield from numbers(part, f"{name}.{key}" if name else str(key))
    elif value is None or isinstance(value, int | float):
        yield name, math.nan if value is None else float(value)
