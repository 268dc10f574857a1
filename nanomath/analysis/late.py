"""What a cell takes from other cells once these are done (nanomath/analysis/cells.py).

    budget      run.tokens or run.seconds is what the baseline's run of the same seed used
    best        the key has the value whose runs have the largest mean of a measure
    checkpoint  a stage starts from the first checkpoint of its parent that reached a score, or from
                the one nearest to the last score of a stage of the baseline

What does best is chosen by runs with seeds of their own, on problems of their own: otherwise luck
would be chosen, and reported as found.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from nanomath.analysis.cells import Cell, Late, words_of
from nanomath.analysis.measures import measured, run_of, whole_run
from nanomath.analysis.runs import read_run
from nanomath.rollout.episodes import in_groups
from nanomath.training.checkpoint import checkpoint_steps


def settle(cell: Cell, directory: Path) -> tuple[str, list[str]]:
    """The text of a cell's config, and key=value for what it leaves open. ValueError where the
    others have not what it waits for.
    """
    text = cell.text
    words = []
    for late in cell.late:
        value, _ = found(late, directory)
        if late.rule == "checkpoint":
            place = str(directory / late.cells[0].name)
            text = text.replace(place, f"{place}/checkpoints/step-{value}")
        else:
            words += words_of({late.key: value})
    return text, words


def found(late: Late, directory: Path) -> tuple[Any, str]:
    """The value, and a sentence that says why."""
    return {"budget": budget, "best": best, "checkpoint": checkpoint}[late.rule](
        late, directory
    )


def budget(late: Late, directory: Path) -> tuple[float, str]:
    name = late.key.removeprefix("run.")
    (base,) = late.cells
    series = read_run(directory / base.name).series
    if name not in series:
        raise ValueError(f"{base.name} counts no {name}")
    used = sum(series[name][1])
    used = int(used) if name == "tokens" else round(used, 3)
    return used, f"{late.key} = {used}, as {base.name}"


def best(late: Late, directory: Path) -> tuple[Any, str]:
    """Of equal values the first."""
    metric = late.options["measure"].split(".", 1)[1]
    values = late.options["values"]
    scores = [
        fmean(measured(run_of(directory / cell.name), metric)[0].values())
        for cell in late.cells
    ]
    means = [fmean(seeds) for seeds in in_groups(scores, len(late.options["seeds"]))]
    at = means.index(max(means))
    tried = ", ".join(f"{v}: {mean:.4g}" for v, mean in zip(values, means, strict=True))
    edge = at in (0, len(values) - 1)
    why = f"{late.key} = {values[at]} of {tried} ({late.options['measure']})"
    return values[at], why + "; the last one tried, others may be better" * edge


def checkpoint(late: Late, directory: Path) -> tuple[int, str]:
    """Of equally near ones the last, so that the baseline starts from its end."""
    metric = late.options["measure"]
    run, *other = (read_run(directory / cell.name) for cell in late.cells)
    saved = checkpoint_steps(run.directory / "checkpoints")
    scores = {
        step: value
        for step, value in zip(*run.curve(metric), strict=True)
        if step in saved
    }
    if not scores:
        raise ValueError(f"{run.directory} has no checkpoint with a {metric}")
    if other:
        goal = whole_run(other[0], metric, last=1)
        step = min(reversed(scores), key=lambda s: abs(scores[s] - goal))
    else:
        goal = late.options["reach"]
        step = next((s for s, value in scores.items() if value >= goal), 0)
    if not step:
        top = max(scores, key=scores.__getitem__)
        raise ValueError(
            f"{metric} of {run.directory} never reached {goal:g}: its best was "
            f"{scores[top]:.4g}, after step {top}"
        )
    return (
        step,
        f"step {step} of {run.name}, {metric} {scores[step]:.4g} for {goal:.4g}",
    )
