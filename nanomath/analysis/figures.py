"""Pictures as PNG and SVG. Of a study: the differences to the baseline with their intervals, the
curves of the arms, every seed thin, their mean thick, with a t band, and the share of the runs in
which its event has not come. Of an evaluation: risk by coverage and accuracy by budget; of two,
every problem's way. Of a drift: the tokens that moved most, and the layers. Lines differ by dashes
and marks, bars by their filling, so that they can be told apart in black and white. More lines than
there are marks have no bands, and their names stand beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanomath.analysis.budget import Arrow, Budget
from nanomath.analysis.cells import Key
from nanomath.analysis.event import Event
from nanomath.analysis.results import Results, is_share
from nanomath.analysis.runs import Curve, read_run
from nanomath.analysis.statistics import FEWEST_SEEDS, Matrix, t_quantile
from nanomath.data.files import check_file

FORMS = ("png", "svg")
DASHES = ("-", "--", "-.", ":")
MARKS = "osD^vPX*"
JAPANESE = (
    "Noto Sans CJK JP",
    "IPAexGothic",
    "IPAGothic",
    "Hiragino Sans",
    "Yu Gothic",
)


def draw(results: Results, cells: Path, out: Path) -> list[Path]:
    """Draw what there is to draw into the directory `out`."""
    prepare()
    written: list[Path] = []
    for measure in results.study.measures:
        name = re.sub("[-/:= ]+", "-", measure)
        if results.differences(measure):
            written += save(forest(results, measure), out / f"{name}-differences")
        if found := dict(curves(results, measure, cells)):
            written += save(lines(found, measure), out / f"{name}-curves")
        if paths := results.paths.get(measure):
            figure = trajectories(paths, results.study.against, measure)
            written += save(figure, out / f"{name}-paths")
    if results.event and results.event.found:
        name = f"{results.study.event['alarm']}-survival"
        written += save(survival_curves(results.event), out / name)
    if over := results.over_doses():
        doses = [*results.study.doses.values()]
        headline = results.study.measures[0]
        figure = lines({"mean": [(doses, values) for values in over]}, headline, "dose")
        figure.axes[0].set_xscale("symlog", linthresh=1)
        written += save(figure, out / "doses")
    return written


def prepare() -> Any:
    """Return matplotlib.pyplot, set up to write files, with the same bytes every time; Japanese
    needs a font of its own.

    ModuleNotFoundError where it is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.font_manager import fontManager

    japanese = [font for font in JAPANESE if font in fontManager.get_font_names()]
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *japanese]
    matplotlib.rcParams |= {"svg.hashsalt": "nanomath", "axes.spines.top": False}
    matplotlib.rcParams |= {"axes.spines.right": False, "font.size": 9}
    return plt


def check_picture(key: str, path: str) -> None:
    """OSError or ModuleNotFoundError for a picture, named by the setting `key`, that `save`
    could not write.
    """
    for form in FORMS:
        check_file(key, f"{path}.{form}")
    prepare()


def panels(height: float, count: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of that height in inches, and its panels, one below the other."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(count, figsize=(6.4, height), squeeze=False, **options)
    return figure, list(axes[:, 0])


def look(number: int) -> dict[str, Any]:
    """How the line of that number is drawn."""
    return {
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKS[number % len(MARKS)],
        "markersize": 4,
    }


def save(figure: Any, path: Path) -> list[Path]:
    """Write a figure in both forms."""
    import matplotlib.pyplot as plt

    paths = [path.with_name(f"{path.name}.{form}") for form in FORMS]
    for one in paths:
        metadata = {"Date": None} if one.suffix == ".svg" else {}
        figure.savefig(one, dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return paths


def forest(results: Results, measure: str) -> Any:
    """The differences to the baseline, the headline interval thick, that of these runs on new
    problems thin above it, that of new seeds thin below it; shares in points of percent.
    """
    found = results.differences(measure)
    share = is_share(measure)
    scale = 100 if share else 1
    figure, (axes,) = panels(0.9 + 0.42 * len(found))
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
) -> Iterator[tuple[str, list[Curve]]]:
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
        found = [curve for run in runs if len((curve := run.curve(name))[0]) > 1]
        if found:
            yield arm, found


def lines(
    arms: dict[str, list[tuple[list[float], list[float]]]],
    measure: str,
    over: str = "step",
) -> Any:
    """The curves of all arms, over steps or over something else."""
    figure, (axes,) = panels(3.8)
    for number, (arm, seeds) in enumerate(arms.items()):
        steps = sorted(set.intersection(*(set(s) for s, _ in seeds)))
        rows = np.array(
            [[v for s, v in zip(*seed, strict=True) if s in steps] for seed in seeds]
        )
        mean = rows.mean(axis=0)
        colour = f"C{number}"
        for own in seeds:  # whole, where others ended early
            axes.plot(*own, color=colour, linewidth=0.5, alpha=0.5)
        axes.plot(
            steps,
            mean,
            **look(number),
            markevery=max(1, len(steps) // 8),
            color=colour,
            linewidth=2,
            label=f"{arm} (n = {len(rows)})",
        )
        if len(rows) >= FEWEST_SEEDS and len(arms) <= len(MARKS):
            spread = rows.std(axis=0, ddof=1)
            half = t_quantile(0.975, len(rows) - 1) * spread / np.sqrt(len(rows))
            axes.fill_between(
                steps, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0
            )
    axes.set_xlabel(over)
    axes.set_ylabel(measure)
    legend(axes)
    return figure


def trajectories(paths: Mapping[Key, Matrix], over: str, measure: str) -> Any:
    """The ways of all arms [2, steps] in two measures: every seed's thin, their mean thick."""
    figure, (axes,) = panels(3.8)
    for number, arm in enumerate(dict.fromkeys(arm for arm, _ in paths)):
        own = [path for (a, _), path in paths.items() if a == arm]
        for path in own:
            axes.plot(*path, color=f"C{number}", linewidth=0.5, alpha=0.5)
        steps = min(path.shape[1] for path in own)
        mean = np.mean([path[:, :steps] for path in own], axis=0)
        label = f"{arm} (n = {len(own)})"
        axes.plot(*mean, **look(number), color=f"C{number}", linewidth=2, label=label)
    axes.set_xlabel(over)
    axes.set_ylabel(measure)
    legend(axes)
    return figure


def legend(axes: Any) -> None:
    """Name the lines: where they are many, beside the picture, in columns."""
    count = len(axes.get_legend_handles_labels()[0])
    where = {"loc": "upper left", "bbox_to_anchor": (1, 1), "ncols": -(-count // 14)}
    many = count > len(MARKS)
    axes.legend(frameon=False, fontsize=8, **(where if many else {}))


def survival_curves(event: Event) -> Any:
    """A panel for each axis, or one of all arms: the share of the runs without the event."""
    shown = dict(event.table["axes"])
    if len(shown) > 1:
        del shown["arm"]
    end = max(last for _, last in event.found.values())
    figure, several = panels(3.2 * len(shown), len(shown), gridspec_kw={"hspace": 0.3})
    for axes, (axis, levels) in zip(several, shown.items(), strict=True):
        for number, (level, found) in enumerate(levels.items()):
            axes.step(
                [0, *found["steps"], end],
                [*(shares := [1.0, *found["without"]]), shares[-1]],
                **look(number),
                where="post",
                label=f"{level} ({found['had_it']} of {found['runs']})",
            )
        axes.set_ylim(0, 1.05)
        axes.set_title(axis, loc="left", fontsize=9)
        axes.set_ylabel("share of the runs without it")
        legend(axes)
    axes.set_xlabel(f"step ({event.table['alarm']})")
    return figure


def risk_coverage(curves: Mapping[str, Sequence[float]]) -> Any:
    """The risk at coverages 1/n ... 1 of every confidence."""
    figure, (axes,) = panels(3.8)
    for number, (name, risk) in enumerate(curves.items()):
        coverage = np.arange(1, len(risk) + 1) / len(risk)
        axes.plot(coverage, risk, **look(number), markevery=0.12, label=name)
    axes.set_xlabel(
        "coverage: share of the problems that are answered, the surest first"
    )
    axes.set_ylabel("risk: share of these that are wrong")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def accuracy_by_budget(budget: Budget) -> Any:
    """The accuracy at every budget with its band."""
    figure, (axes,) = panels(3.8)
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
    figure, (axes,) = panels(4.4)
    before, after = (
        np.array([getattr(a, x) for a in arrows]) for x in ("before", "after")
    )
    every = {"angles": "xy", "scale_units": "xy", "scale": 1}
    for old, new, style in (
        (before, after, {"color": "0.4", "alpha": 0.4, "width": 0.002}),
        (before.mean(0)[None], after.mean(0)[None], {"color": "C3", "width": 0.008}),
    ):
        moved = new - old
        axes.quiver(old[:, 1], old[:, 0], moved[:, 1], moved[:, 0], **every, **style)
    axes.plot(*np.concatenate((before, after)).T[::-1], " ")  # the axes see both ends
    axes.set_xlabel("tokens of a completion")
    axes.set_ylabel("share of the samples that are right")
    return figure


# How the bars of each kind of token are filled.
FILLINGS = {
    "logical": {"color": "0.2"},
    "content": {"color": "0.7"},
    "number": {"color": "white", "edgecolor": "0.2", "hatch": "////"},
    "mark": {"color": "white", "edgecolor": "0.2"},
}


def draw_drift(found: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw a drift.json into the directory `out`, where older pictures of it are removed."""
    prepare()
    for name in ("tokens", "layers"):
        for form in FORMS:
            (out / f"drift-{name}.{form}").unlink(missing_ok=True)
    written: list[Path] = []
    if found.get("moved", {}).get("tokens"):
        written += save(token_bars(found["moved"]["tokens"]), out / "drift-tokens")
    if layers := dict(drift_panels(found)):
        written += save(layer_bars(layers), out / "drift-layers")
    return written


def token_bars(tokens: Sequence[Mapping[str, Any]]) -> Any:
    """The tokens that moved most: how often each was drawn times its mean shift of rank."""
    import matplotlib

    figure, (axes,) = panels(0.9 + 0.17 * len(tokens))
    for kind, filling in FILLINGS.items():
        rows = [n for n, token in enumerate(tokens) if token["kind"] == kind]
        if rows:
            scores = [tokens[n]["score"] for n in rows]
            axes.barh(rows, scores, label=kind, **filling)
    shown = repr if len(matplotlib.rcParams["font.family"]) > 1 else ascii
    names = [f"{shown(token['text'])} x {token['count']}" for token in tokens]
    names = [name.replace("$", r"\$") for name in names]  # no mathematics
    axes.set_yticks(range(len(tokens)), names, fontsize=7)
    axes.set_ylim(len(tokens) - 0.4, -0.6)
    axes.set_xlabel("times drawn x mean shift of rank")
    axes.legend(frameon=False, loc="lower right")
    return figure


def drift_panels(
    found: Mapping[str, Any],
) -> Iterator[tuple[str, tuple[list[str], list[float]]]]:
    """What is known of each layer: a title, the layers' names and values."""
    layers = found["groups"]["all"].get("layers", [])
    names = [layer["layer"] for layer in layers]
    if layers and "distance" in layers[0]:
        distances = [layer["relative_distance"] for layer in layers]
        yield "distance of the centres / the base's spread", (names, distances)
    if layers:
        yield "1 - linear CKA", (names, [1 - layer["cka"] for layer in layers])
    if weights := found.get("weights", {}).get("layers"):
        changes = [weight["change"] for weight in weights.values()]
        yield "change of the weights", (list(weights), changes)


def layer_bars(measures: Mapping[str, tuple[list[str], list[float]]]) -> Any:
    """One panel of bars for each measure, from the embedding up."""
    count = len(measures)
    figure, several = panels(1.9 * count, count, layout="constrained")
    for axes, (title, (names, values)) in zip(several, measures.items(), strict=True):
        axes.bar(range(len(names)), values, color="0.45")
        shown = range(0, len(names), -(-len(names) // 20))
        axes.set_xticks(shown, [names[i].replace("embedding", "emb") for i in shown])
        axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("layer")
    return figure
