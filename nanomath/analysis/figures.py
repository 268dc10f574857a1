"""Pictures as PNG and SVG. Of a study: the differences to the baseline with their intervals, and
the curves of the arms, every seed thin, their mean thick, with a t band. Of an evaluation: risk by
coverage and accuracy by budget; of two, every problem's way. Lines differ by dashes and marks too,
so that they can be told apart in black and white.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanomath.analysis.budget import Arrow, Budget
from nanomath.analysis.results import Results, is_share
from nanomath.analysis.runs import read_run
from nanomath.analysis.statistics import FEWEST_SEEDS, t_quantile

DASHES = ("-", "--", "-.", ":")
MARKS = "osD^vPX*"


def draw(results: Results, cells: Path, out: Path) -> list[Path]:
    """Draw what there is to draw into the directory `out`."""
    prepare()
    written: list[Path] = []
    for measure in results.study.measures:
        name = measure.replace("/", "-").replace(":", "-").replace("=", "-")
        if results.differences(measure):
            written += save(forest(results, measure), out / f"{name}-differences")
        if found := dict(curves(results, measure, cells)):
            written += save(lines(found, measure), out / f"{name}-curves")
    return written


def prepare() -> Any:
    """Return matplotlib.pyplot, set up to write files, with the same bytes every time.

    ModuleNotFoundError where it is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "nanomath", "axes.spines.top": False}
    matplotlib.rcParams |= {"axes.spines.right": False, "font.size": 9}
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> list[Path]:
    """Write a figure in both forms."""
    import matplotlib.pyplot as plt

    paths = [path.with_name(f"{path.name}.{form}") for form in ("png", "svg")]
    for one in paths:
        metadata = {"Date": None} if one.suffix == ".svg" else {}
        figure.savefig(one, dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return paths


def forest(results: Results, measure: str) -> Any:
    """The differences to the baseline, the headline interval thick, that of these runs on new
    problems thin above it, that of new seeds thin below it; shares in points of percent.
    """
    import matplotlib.pyplot as plt

    found = results.differences(measure)
    share = is_share(measure)
    scale = 100 if share else 1
    figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(found)))
    for row, d in enumerate(found.values()):
        for score, width, above in (
            (d.problems, 1, 0.2),
            (d.seeds, 1, -0.2),
            (d.headline, 3, 0),
        ):
            if score:
                ends = [scale * score.low, scale * score.high]
                axes.plot(ends, [row - above] * 2, color="0.15", linewidth=width)
        axes.plot(scale * d.mean, row, "o", color="0.15", markersize=6)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    seeds = len(results.study.seeds)
    unit = ", points" if share else ""
    axes.set_xlabel(
        f"{measure}{unit}, less {results.study.baseline} (95%, n = {seeds} seeds)"
    )
    return figure


def curves(
    results: Results, measure: str, cells: Path
) -> Iterator[tuple[str, list[tuple[list[int], list[float]]]]]:
    """The arms that have a curve of the measure, with that of each seed."""
    stage, metric = measure.split(".", 1)
    name = metric.split(":")[0]
    for arm in results.study.arms:
        places = [
            cells / chain[stage].name
            for (a, _), chain in results.chains.items()
            if a == arm
        ]
        runs = [read_run(place) for place in places if (place / "config.toml").exists()]
        found = [
            run.series[name] for run in runs if len(run.series.get(name, ([],))[0]) > 1
        ]
        if found:
            yield arm, found


def lines(arms: dict[str, list[tuple[list[int], list[float]]]], measure: str) -> Any:
    """The curves of all arms."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for number, (arm, seeds) in enumerate(arms.items()):
        steps = sorted(set.intersection(*(set(s) for s, _ in seeds)))
        rows = np.array(
            [[v for s, v in zip(*seed, strict=True) if s in steps] for seed in seeds]
        )
        mean = rows.mean(axis=0)
        colour = f"C{number}"
        for row in rows:
            axes.plot(steps, row, color=colour, linewidth=0.5, alpha=0.5)
        axes.plot(
            steps,
            mean,
            DASHES[number % len(DASHES)],
            marker=MARKS[number % len(MARKS)],
            markevery=max(1, len(steps) // 8),
            markersize=4,
            color=colour,
            linewidth=2,
            label=f"{arm} (n = {len(rows)})",
        )
        if len(rows) >= FEWEST_SEEDS:
            half = (
                t_quantile(0.975, len(rows) - 1)
                * rows.std(axis=0, ddof=1)
                / np.sqrt(len(rows))
            )
            axes.fill_between(
                steps, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0
            )
    axes.set_xlabel("step")
    axes.set_ylabel(measure)
    axes.legend(frameon=False, fontsize=8)
    return figure


def risk_coverage(curves: Mapping[str, Sequence[float]]) -> Any:
    """The risk at coverages 1/n ... 1 of every confidence."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for number, (name, risk) in enumerate(curves.items()):
        coverage = np.arange(1, len(risk) + 1) / len(risk)
        style = DASHES[number % len(DASHES)]
        mark = MARKS[number % len(MARKS)]
        axes.plot(
            coverage, risk, style, marker=mark, markevery=0.12, markersize=4, label=name
        )
    axes.set_xlabel("coverage: share of the problems that are answered, the surest first")
    axes.set_ylabel("risk: share of these that are wrong")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def accuracy_by_budget(budget: Budget) -> Any:
    """The accuracy at every budget with its band."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    mean, low, high = (
        [getattr(s, x) for s in budget.curve] for x in ("mean", "low", "high")
    )
    axes.step(budget.tokens, mean, where="post", color="0.15")
    axes.fill_between(budget.tokens, low, high, step="post", color="0.15", alpha=0.15)
    axes.set_xlabel("budget in tokens")
    axes.set_ylabel("right within it (95% over problems)")
    axes.set_ylim(bottom=0)
    return figure


def problem_arrows(arrows: Sequence[Arrow]) -> Any:
    """Every problem's way in accuracy and tokens, and the mean's, thick."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    before, after = (
        np.array([getattr(a, x) for a in arrows]) for x in ("before", "after")
    )
    every = {"angles": "xy", "scale_units": "xy", "scale": 1}
    for old, new, look in (
        (before, after, {"color": "0.4", "alpha": 0.4, "width": 0.002}),
        (before.mean(0)[None], after.mean(0)[None], {"color": "C3", "width": 0.008}),
    ):
        moved = new - old
        axes.quiver(old[:, 1], old[:, 0], moved[:, 1], moved[:, 0], **every, **look)
    axes.plot(*np.concatenate((before, after)).T[::-1], " ")  # the axes see both ends
    axes.set_xlabel("tokens of a completion")
    axes.set_ylabel("share of the samples that are right")
    return figure
