"""What a study found: its cells' numbers, compared as nanomath/analysis/statistics.py says.

results.json is a function of what the cells computed and of nothing else, so a study that was
killed and went on ends with the same bytes; times are kept apart, in the table of costs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from nanomath.analysis import event, late, statistics
from nanomath.analysis.cells import Cell, Chain, Key, in_order
from nanomath.analysis.compare import mcnemar
from nanomath.analysis.evaluation import Score
from nanomath.analysis.event import Event
from nanomath.analysis.measures import (
    LESS,
    PER_PROBLEM,
    Scores,
    less,
    measured,
    run_of,
    terms,
)
from nanomath.analysis.pool import Pool
from nanomath.analysis.runs import Run, read_run
from nanomath.analysis.statistics import Difference, Matrix
from nanomath.analysis.study import Study
from nanomath.data import files

SEEN = 1.43  # (z of 0.975 + z of 0.8) / z of 0.975: from half an interval to what is found in 80%
TASKS = 3  # fewer tasks than these, or seeds, say nothing about tasks in general
TASK_SEEDS = 5
SECONDS = ("seconds", "seconds of steps")  # of a cell with its measuring, and without
UNEQUAL = 1.05  # costs that differ by more than this are said


@dataclass(frozen=True)
class Results:
    """`scores[measure][arm, seed]`; `labels` of each problem; `states` of all cells; what was
    `chosen` for those that waited for others; `paths[measure][arm, seed]` [2, steps]: what the
    study's `against` was, and the measure.
    """

    study: Study
    scores: dict[str, dict[Key, Scores]]
    labels: dict[str, dict[str, Any]]
    states: dict[str, dict[str, Any]]
    costs: dict[str, dict[str, float]]
    chains: dict[Key, Chain]
    chosen: dict[str, list[str]]
    event: Event | None = None
    paths: dict[str, dict[Key, Matrix]] = field(default_factory=dict)

    def mean(self, measure: str, arm: str) -> float | None:
        """The mean over the seeds that ended."""
        found = [
            fmean(s.values()) for (a, _), s in self.scores[measure].items() if a == arm
        ]
        return fmean(found) if found else None

    def differences(self, measure: str) -> dict[str, Difference]:
        """Each arm against the baseline."""
        others = [arm for arm in self.study.arms if arm != self.study.baseline]
        pairs = {
            arm: self.difference(measure, arm, self.study.baseline) for arm in others
        }
        return {arm: found for arm, found in pairs.items() if found}

    def seeds_of(self, measure: str, *arms: str) -> list[int]:
        """The seeds of which all of these arms have the measure."""
        scores = self.scores[measure]
        return [s for s in self.study.seeds if all((arm, s) in scores for arm in arms)]

    def difference(self, measure: str, a: str, b: str = "") -> Difference | None:
        """A - B over the seeds that both have, on the problems that all of these share; without a
        B, A itself, whose measure is a difference. None where that is not two clusters at least.
        """
        scores = self.scores[measure]
        arms = [a, b] if b else [a]
        seeds = self.seeds_of(measure, *arms)
        if not seeds:
            return None
        of_all = [scores[arm, seed] for arm in arms for seed in seeds]
        problems = [p for p in of_all[0] if all(p in one for one in of_all)]
        table = np.array([[one[p] for p in problems] for one in of_all])
        d = table[: len(seeds)] - (table[len(seeds) :] if b else 0.0)
        if problems == [""]:
            return over_seeds(d[:, 0])
        by = self.study.cluster
        clusters = [str(self.labels[p].get(by, p)) for p in problems]
        if len(set(clusters)) < 2:
            return None
        found = statistics.compare(d, clusters)
        one_answer = len(d) == 1 and all(
            set(one.values()) <= {0.0, 1.0} for one in of_all
        )
        if by or LESS in measure or not one_answer:
            return found
        return replace(found, p=mcnemar(int((d > 0).sum()), int((d < 0).sum())))

    def itself(self, measure: str) -> dict[str, Difference]:
        """Of a measure that is a difference, that of each arm with its intervals."""
        arms = self.study.arms if LESS in measure else ()
        pairs = {arm: self.difference(measure, arm) for arm in arms}
        return {arm: found for arm, found in pairs.items() if found}

    def over_doses(self) -> list[list[float]]:
        """The headline at each dose, for every seed of which all doses are there."""
        measure = self.study.measures[0]
        doses = self.study.doses
        return [
            [fmean(self.scores[measure][arm, seed].values()) for arm in doses]
            for seed in (self.seeds_of(measure, *doses) if doses else ())
        ]

    def halving(self) -> Score | None:
        """The dose that halves the headline; None of fewer than FEWEST_SEEDS."""
        curves = self.over_doses()
        if len(curves) < statistics.FEWEST_SEEDS:
            return None
        return statistics.halving_dose([*self.study.doses.values()], np.array(curves))

    def rank_correlation(self, measure: str) -> Difference | None:
        """Spearman's, of the measure and of `against` over all arms and steps: of each seed, the
        mean with its interval.
        """
        from scipy.stats import spearmanr  # an extra: only studies need it

        paths = self.paths.get(measure, {})
        seeds = [
            np.concatenate(
                [path for (_, s), path in paths.items() if s == seed], axis=1
            )
            for seed in dict.fromkeys(seed for _, seed in paths)
        ]
        return over_seeds(np.array([spearmanr(*both).statistic for both in seeds]))

    def by_task(self, measure: str, arm: str) -> Matrix | None:
        """The arm's scores [seeds, tasks], tasks being problems with the same label `tasks`."""
        rows = []
        for seed in self.study.seeds:
            tasks: dict[str, list[float]] = {}
            for problem, score in self.scores[measure].get((arm, seed), {}).items():
                task = self.labels.get(problem, {}).get(self.study.tasks)
                tasks.setdefault(str(task), []).append(score)
            rows.append([fmean(tasks[task]) for task in sorted(tasks)])
        enough = len(rows) >= TASK_SEEDS and len(rows[0]) >= TASKS
        return np.array(rows) if enough and len(set(map(len, rows))) == 1 else None


def over_seeds(d: np.ndarray) -> Difference | None:
    """The difference of a number of whole runs: seeds are all that it can be taken over."""
    if len(d) < statistics.FEWEST_SEEDS:
        return None
    variance = float(d.var(ddof=1)) / len(d)
    score = statistics.t_score(float(d.mean()), variance, len(d) - 1)
    p = statistics.p_value(score.mean, variance, len(d) - 1)
    return Difference(score.mean, score, score, score, p)


def collect(study: Study, chains: dict[Key, Chain], pool: Pool) -> Results:
    """Read what the cells have left. ValueError for a measure that its stage does not make."""
    scores: dict[str, dict[Key, Scores]] = {measure: {} for measure in study.measures}
    labels: dict[str, dict[str, Any]] = {}
    paths: dict[str, dict[Key, Matrix]] = {}
    every = in_order(chains).values()
    for key, chain in chains.items():
        runs = {  # each is read once, for all measures
            stage: run_of(pool.directory / chain[stage].name)
            for stage in study.looked_at
            if pool.is_done(chain[stage])
        }
        for measure in study.measures:
            parts = terms(measure)
            if all(stage in runs for stage, _ in parts):
                one, *other = [
                    measured(runs[stage], metric, study.last) for stage, metric in parts
                ]
                known, found = less(one, *other, study.cluster) if other else one
                scores[measure] |= {key: known} if known else {}
                labels |= found
        for measure, path in paths_of(study, runs).items():
            paths.setdefault(measure, {})[key] = path
    states = {cell.name: pool.state(cell) for cell in every}
    costs = costs_of(study, chains, pool)
    chosen = {
        cell.name: [late.found(one, pool.directory)[1] for one in cell.late]
        for cell in every
        if cell.late and pool.is_done(cell)
    }
    when = event.read(study, chains, pool)
    return Results(study, scores, labels, states, costs, chains, chosen, when, paths)


def paths_of(study: Study, runs: Mapping[str, Run]) -> dict[str, Matrix]:
    """The `paths` of the measures that one of these runs, by stage, logs beside `against`."""
    found: dict[str, Matrix] = {}
    stage, _, against = study.against.partition(".")
    if stage not in runs:
        return found
    run = runs[stage]
    at = dict(zip(*run.curve(against), strict=True))
    for measure in study.measures:
        of, metric = terms(measure)[0]
        curve = zip(*run.curve(metric.split(":")[0]), strict=True)
        both = [(at[step], value) for step, value in curve if step in at]
        if of == stage and both and measure != study.against:
            found[measure] = np.array(both).T
    return found


def costs_of(
    study: Study, chains: Mapping[Key, Chain], pool: Pool
) -> dict[str, dict[str, float]]:
    """What each arm took, the mean over the seeds that are done: its cells but for those that all
    arms of the seed share.
    """
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in study.arms}
    for seed in study.seeds:
        of_arm = {
            arm: {cell.name for cell in chains[arm, seed].values()}
            for arm in study.arms
        }
        shared = set.intersection(*of_arm.values()) if len(of_arm) > 1 else set()
        for arm in study.arms:
            cells = [c for c in chains[arm, seed].values() if c.name not in shared]
            if all(map(pool.is_done, cells)):
                total: Counter[str] = Counter()
                for cell in cells:
                    total.update(costs_of_cell(cell, pool))
                for what, amount in total.items():
                    found[arm].setdefault(what, []).append(amount)
    return {
        arm: {what: fmean(amounts) for what, amounts in costs.items()}
        for arm, costs in found.items()
    }


def costs_of_cell(cell: Cell, pool: Pool) -> dict[str, float]:
    """Seconds of a cell; of a training also its updates, the seconds of its steps alone, and its
    tokens, sampled or trained on.
    """
    place = pool.directory / cell.name
    found = {"seconds": pool.state(cell)["seconds"]}
    if not (place / "config.toml").exists():
        return found
    run = read_run(place)
    steps = len(run.curve("loss")[0])
    passes = run.config.get("algorithm.epochs", 1) * run.config.get(
        "algorithm.minibatches", 1
    )
    found["updates"] = steps * passes
    names = {
        "seconds": SECONDS[1],
        "tokens": "tokens sampled" if run.kind == "grpo" else "tokens trained on",
    }
    return found | {
        what: sum(run.series[name][1])
        for name, what in names.items()
        if name in run.series
    }


def warnings(results: Results) -> Iterator[str]:
    """Yield which arms cost more or less than the baseline, so that the comparison is not only
    of what was asked. Seconds are only spoken of where they were to be equal.
    """
    baseline = results.study.baseline
    unsaid = ("seconds",) if results.study.budget == "seconds" else SECONDS
    for what, base in results.costs[baseline].items():
        uneven = [
            f"{arm} (x {ratio:.2f})"
            for arm, costs in results.costs.items()
            if base
            and costs
            and not 1 / UNEQUAL < (ratio := costs.get(what, 0.0) / base) < UNEQUAL
        ]
        if uneven and what not in unsaid:
            yield f"not the {what} of {baseline}: {', '.join(uneven)}"


# --- results.json ----------------------------------------------------------------------------


def as_json(results: Results) -> str:
    """Every number with its cell."""
    study = results.study
    table = {
        "study": study.name,
        "question": study.question,
        "baseline": study.baseline,
        "seeds": study.seeds,
        "chosen": results.chosen,
        "cells": {
            f"{arm}, seed {seed}": {
                stage: _state(results, cell) for stage, cell in chain.items()
            }
            for (arm, seed), chain in results.chains.items()
        },
        "measures": {
            measure: {
                "values": {
                    f"{arm}, seed {seed}": fmean(s.values())
                    for (arm, seed), s in keyed.items()
                },
                "differences": results.differences(measure),
                **({"itself": itself} if (itself := results.itself(measure)) else {}),
            }
            for measure, keyed in results.scores.items()
        },
    }
    if results.event:
        table["event"] = results.event.table
    if dose := results.halving():
        table["halved at"] = dose
    return files.as_json(table)


def _state(results: Results, cell: Cell) -> dict[str, str]:
    state = results.states[cell.name]
    return {"cell": cell.name, **{k: v for k, v in state.items() if k != "seconds"}}


# --- table.md --------------------------------------------------------------------------------


def as_table(results: Results) -> str:
    """The answer as a page: arms, differences, bands, costs, what failed."""
    study = results.study
    lines = [f"# {study.question}", ""]
    for measure in study.measures:
        lines += [f"## {measure}", "", *_table(results, measure), ""]
        if found := results.rank_correlation(measure):
            lines += [
                f"Its rank correlation with {study.against} over all arms and steps is "
                f"{found.mean:.2f} (95% interval {_interval(found.headline, False)}, over seeds).",
                "",
            ]
        lines += _tasks(results, measure)
    if results.event:
        lines += event.as_lines(results.event)
    if chosen := _chosen(results):
        lines += ["## What was chosen", "", *chosen, ""]
    if dose := results.halving():
        lines += ["## How much halves it", "", _halving(study, dose), ""]
    lines += ["## What it cost", "", *_costs(results), ""]
    lines += [f"- {text}" for text in warnings(results)]
    lines += [
        f"- failed: {name}: {state['reason']}"
        for name, state in results.states.items()
        if state.get("state") == "failed"
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(results: Results, measure: str) -> list[str]:
    study = results.study
    found = results.differences(measure)
    itself = results.itself(measure)
    corrected = statistics.holm({arm: d.p for arm, d in found.items()})
    share = is_share(measure)
    lines = [
        f"| arm | seeds | mean | less {study.baseline} | 95% interval | p (Holm) | |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in study.arms:
        mean = results.mean(measure, arm)
        seeds = sum(a == arm for a, _ in results.scores[measure])
        cells = [arm, str(seeds), number(mean, share, arm in itself)]
        if arm in itself:
            cells[-1] += f" ({_interval(itself[arm].headline, share)})"
        if arm in found:
            d = found[arm]
            interval = _interval(d.headline, share)
            verdict = "told apart" if corrected[arm] < 0.05 else "not told apart"
            cells += [
                number(d.mean, share, True),
                interval,
                f"{corrected[arm]:.3g}",
                verdict,
            ]
        else:
            cells += [
                "",
                "",
                "",
                "baseline" if arm == study.baseline else "no comparison",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_remarks(results, measure, found, share)]


def _tasks(results: Results, measure: str) -> list[str]:
    """Over tasks, where the study names them: IQM, and the chance to beat the baseline."""
    study = results.study
    base = results.by_task(measure, study.baseline) if study.tasks else None
    if base is None:
        return []
    tasks = base.shape[1]
    lines = [
        f"Over {tasks} tasks (label {study.tasks}), 95% intervals by a stratified bootstrap:",
        "",
        f"| arm | IQM | P(arm > {study.baseline}) |",
        "|---|---|---|",
    ]
    for arm in study.arms:
        scores = results.by_task(measure, arm)
        if scores is None:
            continue
        cells = [arm, _bootstrapped(".3f", statistics.iqm, scores), ""]
        if arm != study.baseline:
            cells[2] = _bootstrapped(".2f", statistics.improvement, scores, base)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _bootstrapped(form: str, statistic: Callable[..., float], *scores: Matrix) -> str:
    found = statistics.stratified_bootstrap(scores, statistic)
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def is_share(measure: str) -> bool:
    """Whether a measure is compared problem by problem, as a share of right answers."""
    return bool(PER_PROBLEM.fullmatch(terms(measure)[0][1]))


def _remarks(
    results: Results, measure: str, found: Mapping[str, Difference], share: bool
) -> list[str]:
    """What the intervals are of, what could have been seen, and the bands."""
    if not found:
        seeds = f"{statistics.FEWEST_SEEDS} seeds"
        need = "two problems, or clusters, that all runs have" if share else seeds
        return [
            f"There is nothing to compare: that takes the baseline, another arm and {need}."
        ]
    if not all(d.both for d in found.values()):
        return [
            f"With fewer than {statistics.FEWEST_SEEDS} seeds an arm says nothing about the "
            "method: its interval is of these models on new problems."
        ]
    seeds = f"new seeds{_from_one(results)}"
    lines = [f"Intervals are of the method on {seeds}, by numbers of whole runs."]
    if share:
        lines = [
            f"Intervals are of the method on new problems and {seeds}. Apart:",
            "",
            *(
                f"- {arm}: these runs on new problems {_interval(d.problems, share)}; "
                f"new seeds on these {_interval(d.seeds, share)}"
                for arm, d in found.items()
            ),
        ]
    widest = max((d.headline.high - d.headline.low) / 2 for d in found.values())
    seen = number(SEEN * widest, share)
    bands = "; ".join(", ".join(band) for band in bands_of(results, measure))
    return [
        *lines,
        "",
        f"Of such studies 4 in 5 would find a difference of {seen}.",
        "",
        f"Bands of arms not told apart, the highest first: {bands}",
    ]


def _from_one(results: Results) -> str:
    """What was trained once for all seeds, in words: of another one the answer may differ."""
    once = {
        f"one {cell.stage.name}": None
        for cell in in_order(results.chains).values()
        if "train" in cell.stage.run and not cell.stage.seeded
    }
    return f" from {' and '.join(once)}" if once else ""


def bands_of(results: Results, measure: str) -> list[list[str]]:
    """The arms in bands, by all pairs, corrected together."""
    means = {arm: results.mean(measure, arm) for arm in results.study.arms}
    known = {arm: mean for arm, mean in means.items() if mean is not None}
    pairs = {
        (a, b): d.p
        for a, b in combinations(known, 2)
        if (d := results.difference(measure, a, b))
    }
    apart = {pair: p < 0.05 for pair, p in statistics.holm(pairs).items()}
    return statistics.bands(known, apart)


def _interval(score: Score, share: bool) -> str:
    return f"{number(score.low, share, True)} to {number(score.high, share, True)}"


def number(value: float | None, share: bool, signed: bool = False) -> str:
    """A share in percent, or any other number with four digits."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    return (
        f"{100 * value:{sign}.1f}{'' if signed else '%'}"
        if share
        else f"{value:{sign}.4g}"
    )


def _halving(study: Study, dose: Score) -> str:
    """The dose that halves the headline, in words."""
    *_, most = study.doses.values()
    bounds = [
        "unknown" if math.isnan(x) else f"{x:.4g}" if x <= most else f"beyond {most:g}"
        for x in (dose.mean, dose.low, dose.high)
    ]
    if math.isnan(dose.mean):
        return f"There is nothing to halve: {study.measures[0]} is not above 0 at the least dose."
    return (
        f"{study.measures[0]} is half of what it is at the least dose at {bounds[0]} (95% interval "
        f"{bounds[1]} to {bounds[2]}, seeds drawn anew: too narrow if they are few), between two "
        "doses by log(1 + dose)."
    )


def _chosen(results: Results) -> list[str]:
    """What each arm took from other cells, with the seeds of which that is so."""
    lines: dict[str, dict[str, None]] = {}
    for (arm, seed), chain in results.chains.items():
        for cell in chain.values():
            for why in results.chosen.get(cell.name, ()):
                lines.setdefault(f"{arm}: {why}", {})[str(seed)] = None
    return [f"- {line} (seed {', '.join(seeds)})" for line, seeds in lines.items()]


def _costs(results: Results) -> list[str]:
    """Costs by arm, with the quotient to the baseline's."""
    base = results.costs[results.study.baseline]
    names = list(
        dict.fromkeys(what for costs in results.costs.values() for what in costs)
    )
    lines = [f"| arm | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for arm, costs in results.costs.items():
        cells = [arm]
        for name in names:
            spent = costs.get(name, 0)
            compared = arm != results.study.baseline and base.get(name)
            said = f" (x {spent / base[name]:.2f})" if compared else ""
            cells.append(f"{spent:,.0f}{said}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
