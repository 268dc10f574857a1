"""When an alarm began that lasted, in every run of a study; in which arms and at which levels of
axes it came sooner; and what announced it.

    [event]
    alarm = "grpo.collapse"          # STAGE.ALARM of nanomath/training/alarms.py
    announce = ["entropy", "kl"]     # metrics of that stage, and alarm/NAME for other alarms
    ahead = 20                       # steps that a warning must come before it

A run without it is censored at its last step. nanomath/analysis/survival.py has the statistics.
Thresholds of warnings are chosen on every other seed and judged on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanomath.analysis import statistics, survival
from nanomath.analysis.cells import Cell, Chain, Key
from nanomath.analysis.evaluation import Score
from nanomath.analysis.measures import missing
from nanomath.analysis.pool import Pool
from nanomath.analysis.runs import Run, read_run
from nanomath.analysis.study import Study
from nanomath.analysis.survival import Runs, Series
from nanomath.training.alarms import WINDOW, lasting

COLUMNS = [
    "| axis | level | runs | had it | share (95%) | mean step | p (Holm) |  |",
    "|---|---|---|---|---|---|---|---|",
]
WARNINGS = [
    "| measure | warning | hits (95%) | false alarms (95%) | lead | first in |",
    "|---|---|---|---|---|---|",
]


@dataclass(frozen=True)
class Event:
    """`found[arm, seed]` has the event's step, None if it did not come, and the last step;
    `series[measure][arm, seed]` what may have announced it.
    """

    study: Study
    chains: Mapping[Key, Chain]
    found: dict[Key, tuple[int | None, int]]
    series: dict[str, dict[Key, Series]]

    def runs(self, *arms: str) -> Runs:
        """All seeds of these arms that ended."""
        every = [ends for (arm, _), ends in self.found.items() if arm in arms]
        return Runs.of([step for step, _ in every], [last for _, last in every])

    def group(
        self, axis: str, places: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Any]:
        """What became of the runs at each level of an axis, and the test of each against the
        baseline's level all else equal: strata are arms that are alike in the other axes.
        """
        usual = places[self.study.baseline][axis]
        tau = survival.horizon(self.runs(*self.study.arms))
        found: dict[str, Any] = {}
        p = {}
        for level in dict.fromkeys(place[axis] for place in places.values()):
            arms = [arm for arm, place in places.items() if place[axis] == level]
            if not len((runs := self.runs(*arms)).steps):
                continue
            found[level] = summary(runs, tau)
            strata = [
                (self.runs(arm), self.runs(other))
                for arm in arms
                for other, place in places.items()
                if place == {**places[arm], axis: usual}
            ]
            strata = [(a, b) for a, b in strata if len(a.steps) and len(b.steps)]
            if level != usual and strata:
                p[level] = survival.log_rank(strata)
        for level, corrected in statistics.holm(p).items():
            found[level] |= {"p": p[level], "p_holm": corrected}
        return found

    def announced(self) -> dict[str, dict[str, Any]]:
        """What the warnings are worth, the best first."""
        chosen_by = self.study.seeds[::2]
        keys = list(self.found)
        found = survival.announcements(
            {name: [s[key] for key in keys] for name, s in self.series.items()},
            [self.found[key][0] for key in keys],
            [seed in chosen_by for _, seed in keys],
            self.study.event["ahead"],
        )
        loss = {n: w["false_alarms"].mean - w["hits"].mean for n, w in found.items()}
        return {name: found[name] for name in sorted(found, key=loss.__getitem__)}

    @cached_property
    def table(self) -> dict[str, Any]:
        """Every number with its cell, for results.json: "axes" has the arms as the axis "arm"."""
        if not self.found:
            return {}
        arms = self.study.arms
        stage = self.study.event["alarm"].split(".")[0]
        every = [{arm: {"arm": arm} for arm in arms}]
        if self.study.levels:
            every.append({arm: self.study.levels[arm] for arm in arms})
        return {
            "alarm": self.study.event["alarm"],
            "values": {
                f"{arm}, seed {seed}": {
                    "cell": self.chains[arm, seed][stage].name,
                    "step": step,
                    "last": last,
                }
                for (arm, seed), (step, last) in self.found.items()
            },
            "axes": {
                axis: self.group(axis, places)
                for places in every
                for axis in places[self.study.baseline]
            },
            "announced": self.announced(),
        }


def read(study: Study, chains: Mapping[Key, Chain], pool: Pool) -> Event | None:
    """What the cells that are done say of the study's event; None where it asks for none."""
    if not study.event:
        return None
    stage, alarm = study.event["alarm"].split(".")
    found: dict[Key, tuple[int | None, int]] = {}
    series: dict[str, dict[Key, Series]] = {
        name: {} for name in study.event["announce"]
    }
    for key, chain in chains.items():
        if pool.is_done(chain[stage]):
            run = read_run(pool.directory / chain[stage].name)
            found[key] = lasting(run.lines, alarm), run.lines[-1]["step"]
            for name, of_name in series.items():
                of_name[key] = series_of(run, name)
    return Event(study, chains, found, series)


def check(study: Study, cell: Cell, cells: Path) -> None:
    """ValueError where a cell that is done has not what may announce the event."""
    if study.event and study.event["alarm"].split(".")[0] == cell.stage.name:
        run = read_run(cells / cell.name)
        for name in study.event["announce"]:
            series_of(run, name)


def series_of(run: Run, name: str) -> Series:
    """The values of a metric; of alarm/NAME, 1 from the step on at which it was said."""
    if not name.startswith("alarm/"):
        if name not in run.series:
            raise ValueError(
                missing(f"metric {name!r}", run.directory, name, run.series)
            )
        return run.series[name]
    said = [
        a["step"] for a in run.read("alarms.jsonl") if f"alarm/{a['alarm']}" == name
    ]
    steps = run.series["seconds"][0]
    return steps, [float(bool(said) and step >= min(said)) for step in steps]


# --- as numbers and as a page ------------------------------------------------------------------


def summary(runs: Runs, tau: int) -> dict[str, Any]:
    """How many runs had the event, the mean step until `tau`, and the survival curve."""
    steps, share = survival.kaplan_meier(runs)
    had = int(runs.happened.sum())
    return {
        "runs": len(runs.steps),
        "had_it": had,
        "share": survival.wilson(had, len(runs.steps)),
        "mean": float(runs.steps.clip(max=tau).mean()),
        "steps": steps,
        "without": share,
    }


def as_lines(event: Event) -> list[str]:
    """The same as a section of table.md."""
    table = event.table
    if not table:
        return []
    usual = {
        "arm": event.study.baseline,
        **event.study.levels.get(event.study.baseline, {}),
    }
    lines = [f"## When {table['alarm']} began that lasted", "", *COLUMNS]
    for axis, levels in table["axes"].items():
        for level, found in levels.items():
            p = ""
            told = "baseline" if level == usual[axis] else "no comparison"
            if "p_holm" in found:
                p = f"{found['p_holm']:.3g}"
                told = "told apart" if found["p_holm"] < 0.05 else "not told apart"
            lines.append(
                f"| {axis} | {level} | {found['runs']} | {found['had_it']} | "
                f"{_share(found['share'])} | {found['mean']:.0f} | {p} | {told} |"
            )
    return [
        *lines,
        "",
        "p: log-rank, by permutation of the runs, corrected within the axis; of an axis all else "
        "equal. Mean: of a run without it, the last step that all of these were watched to.",
        "",
        reach(event.study),
        "",
        *_announced(event),
    ]


def reach(study: Study) -> str:
    """What a test of one arm against the baseline can say at most."""
    n = len(study.seeds)
    least = survival.smallest_p(n)
    tests = max(1, len(study.arms) - 1)
    told = "can" if least * tests < 0.05 else "cannot"
    return (
        f"{n} against {n} runs have a p of {least:.2g} at least, {tests} such comparisons of "
        f"{min(1.0, least * tests):.2g} by Holm: an arm {told} be told apart from the baseline."
    )


def _share(score: Score) -> str:
    return f"{100 * score.mean:.0f}% ({100 * score.low:.0f} to {100 * score.high:.0f})"


def _announced(event: Event) -> list[str]:
    """The warnings, or why nothing can be said of them."""
    if not event.series:
        return []
    announced = event.table["announced"]
    ahead = event.study.event["ahead"]
    seeds = ", ".join(map(str, event.study.seeds[::2]))
    had = sum(step is not None for step, _ in event.found.values())
    lines = [f"## What announces it at least {ahead} steps before", ""]
    if not announced:
        few = f"{had} of {len(event.found)} runs had it: that says nothing about warnings, for "
        few += f"which {survival.FEWEST} with it and {survival.FEWEST} without are needed among "
        return [*lines, few + f"the seeds {seeds}, and as many among the others.", ""]
    lines += [
        f"The thresholds are those that do best with the seeds {seeds}; the other seeds judge "
        f"them. Measures are means of the last {WINDOW} steps.",
        "",
        *WARNINGS,
    ]
    firsts = first_in(announced)
    for name, found in announced.items():
        lead = "–" if found["lead"] is None else f"{found['lead']:.0f}"
        lines.append(
            f"| {name} | {found['warning']} | {_share(found['hits'])} | "
            f"{_share(found['false_alarms'])} | {lead} | {firsts[name]} |"
        )
    return [
        *lines,
        "",
        "Lead: steps before, the median of the hits. First in: runs without a sooner warning.",
        "",
    ]


def first_in(announced: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """In how many runs with the event each warning came before, or with, all others."""
    leads = np.array([found["leads"] for found in announced.values()], np.float64)
    # Without a warning a lead is NaN, which equals nothing
    soonest = leads == np.fmax.reduce(leads)
    return dict(zip(announced, soonest.sum(axis=1).tolist(), strict=True))
