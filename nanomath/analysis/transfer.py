r"""The transferability index: how much of what training gained in maths came with gains elsewhere.

Scores R_b in percent on benchmarks b in groups g, of a base model and of one that was tuned
(Huan et al., arXiv 2507.00432):

    Delta_b = R_b(tuned) - R_b(base)             w_b = (100 - R_b(base)) / sum of these in g
    s_b = sign(Delta_b) sqrt(|Delta_b| / sigma_g)     gain_g = sum_b w_b s_b
    TI_g = 100 gain_g / gain_maths

sigma_g is the standard deviation of Delta_b in the group over all models compared (the paper's
table needs it pooled so, with the ratios in PAPER_SIGMA), and 1 beside it. Intervals are
percentile bootstraps over problems, the same problems drawn for the base and all that are
compared with it. The index is undefined where the gain in maths is within noise: the 95%
interval of gain_maths must lie above 0. It hides the size of both gains, so the plain
differences of the groups' means stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from nanomath.analysis.evaluation import RESAMPLES, interval, with_percentiles
from nanomath.data.benchmarks import BENCHMARKS, GROUPS
from nanomath.data.files import read_json
from nanomath.data.world import FAMILIES
from nanomath.training.runlog import read_jsonl

MATHS, *OTHERS = GROUPS
PAPER_SIGMA = {"maths": 1.0, "other_reasoning": 1.137, "non_reasoning": 1.275}
Matrix = NDArray[np.float64]
Sigma = Mapping[str, float | Matrix]


@dataclass(frozen=True)
class Task:
    """One task as a model did it: its group, how it was asked, and the score of each problem
    in percent. `problems` name the problems; equal names are equal problems.
    """

    group: str
    protocol: str
    problems: list[str]
    values: Matrix  # [n]


# --- reading ---------------------------------------------------------------------------------


def read_evaluation(path: str | Path) -> dict[str, Task]:
    """Return the tasks of what `eval MODEL general` wrote, or the families of the world of the
    completions that `eval MODEL world save=FILE.jsonl` wrote.

    FileNotFoundError where there is no such file; ValueError for a file that is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no evaluation here: {path}")
    try:
        if path.suffix == ".jsonl":
            tasks = read_families(path)
        else:
            stored = read_json(path)["tasks"]
            tasks = {name: read_task(task) for name, task in stored.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no evaluation ({type(error).__name__}: {error}): expected the JSON of eval "
            "MODEL general, or the .jsonl of eval MODEL world save=FILE.jsonl"
        ) from None
    for name, task in tasks.items():
        if task.group not in GROUPS:
            raise ValueError(
                f"{path}: {name}: group: expected one of {', '.join(GROUPS)}, got {task.group!r}"
            )
        if not task.problems or not ((task.values >= 0) & (task.values <= 100)).all():
            raise ValueError(
                f"{path}: {name}: expected problems with scores from 0 to 1 each"
            )
    return tasks


def read_task(task: dict[str, Any]) -> Task:
    """Return a task of general.json by the metric for comparisons."""
    metric = task["metric"]
    return Task(
        task["group"],
        f"{metric}; {task['protocol']}",
        [f"{task['digest']} {record['problem']}" for record in task["records"]],
        np.array([100.0 * record[metric] for record in task["records"]]),
    )


def read_families(path: Path) -> dict[str, Task]:
    """Return the families of the world in a file of completions."""
    found: dict[str, dict[str, list[bool]]] = {}
    for record in read_jsonl(path):
        problems = found.setdefault(record["labels"]["family"], {})
        problems.setdefault(record["problem"], []).append(record["right"])
    if not found:
        raise ValueError(f"{path} holds no completions")
    return {
        family: Task(
            FAMILIES[family],
            f"{max(map(len, problems.values()))} samples a problem",
            list(problems),
            np.array([100.0 * np.mean(right) for right in problems.values()]),
        )
        for family, problems in found.items()
    }


def check_comparable(files: Mapping[str, Mapping[str, Task]]) -> None:
    """ValueError where evaluations differ in tasks, in how they were asked, or in problems."""
    (first, base), *rest = files.items()
    for name, tasks in rest:
        if apart := sorted(base.keys() ^ tasks.keys()):
            raise ValueError(
                f"{first} and {name} are not of the same tasks: only one has {', '.join(apart)}"
            )
        for task, mine in tasks.items():
            theirs = base[task]
            if mine.protocol != theirs.protocol:
                raise ValueError(
                    f"{task} was asked in different ways: {theirs.protocol!r} in {first}, "
                    f"{mine.protocol!r} in {name}"
                )
            if mine.problems != theirs.problems:
                raise ValueError(
                    f"{task} has other problems in {name} ({len(mine.problems)}) than in {first} "
                    f"({len(theirs.problems)}), or in another order: evaluate both on the same"
                )


def grouped(
    tasks: Mapping[str, Task], given: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return the tasks of each group, `given` ones in place of their own ("none": in none).

    ValueError for a group without a task, and for a task that is not there.
    """
    if unknown := sorted(given.keys() - tasks.keys()):
        raise ValueError(
            f"groups.{unknown[0]}: no such task in the files; there are: {', '.join(tasks)}"
        )
    group_of = {name: given.get(name, task.group) for name, task in tasks.items()}
    groups = {g: [name for name in tasks if group_of[name] == g] for g in GROUPS}
    if empty := [group for group, names in groups.items() if not names]:
        of_benchmarks = {
            name: benchmark.group for name, benchmark in BENCHMARKS.items()
        }
        known = [n for n, g in {**FAMILIES, **of_benchmarks}.items() if g == empty[0]]
        raise ValueError(
            f"the group {empty[0]} is empty: evaluate on one of {', '.join(known)}, or put a task "
            f"into it by groups.TASK={empty[0]}"
        )
    return groups


# --- the index -------------------------------------------------------------------------------


def gains(base: Matrix, tuned: Matrix, sigma: float | Matrix) -> Matrix:
    """Return gain_g [..., M] of scores of one group, base [..., B] and tuned [..., M, B]."""
    change = tuned - base[..., None, :]
    signed = np.sign(change) * np.sqrt(np.abs(change))
    missing = 100 - base
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = missing / missing.sum(axis=-1, keepdims=True)
        total = (weights[..., None, :] * signed).sum(axis=-1)
        return total / np.sqrt(np.asarray(sigma))[..., None]


def pooled_sigma(base: Matrix, tuned: Matrix) -> Matrix:
    """Return sigma_g [...]: the standard deviation of all changes of the group's scores."""
    return (tuned - base[..., None, :]).std(axis=(-2, -1))


def transfer_index(
    base: Mapping[str, Matrix], tuned: Mapping[str, Matrix], sigma: Sigma
) -> dict[str, Matrix]:
    """Return TI [..., M] of the groups but maths; scores by group are as those of `gains`."""
    found = {group: gains(base[group], tuned[group], sigma[group]) for group in base}
    with np.errstate(invalid="ignore", divide="ignore"):
        return {g: 100 * found[g] / found[MATHS] for g in found if g != MATHS}


def compare_transfer(
    files: Mapping[str, Mapping[str, Task]],
    given: Mapping[str, str],
    sigma: str = "pooled",
    seed: int = 0,
) -> dict[str, Any]:
    """Compare evaluations with the first of them; return groups, and for each other one the
    differences of every task and group in points, and the index with each sigma, None where it
    is undefined, and then why. Everything that is estimated is {mean, low, high}.

    ValueError for fewer than two evaluations and for those that cannot be compared.
    """
    if len(files) < 2:
        raise ValueError(
            f"transfer compares tuned models with a base: got {len(files)} evaluations, expected "
            "the base's and at least one more"
        )
    check_comparable(files)
    first, *others = files
    groups = grouped(files[first], given)
    # Seeds by name, so that tasks of as many problems are not drawn alike.
    drawn = {
        name: resampled(
            [tasks[name].values for tasks in files.values()],
            [seed, crc32(name.encode())],
        )
        for names in groups.values()
        for name in names
    }
    # [1 + RESAMPLES, 1 + M, B]: the first row is what was measured
    scores = {
        g: np.stack([drawn[name] for name in names], -1) for g, names in groups.items()
    }
    base = {g: rows[:, 0] for g, rows in scores.items()}
    tuned = {g: rows[:, 1:] for g, rows in scores.items()}
    pooled = {g: pooled_sigma(base[g], tuned[g]) for g in groups}
    sigmas = {sigma: pooled if sigma == "pooled" else PAPER_SIGMA}
    sigmas["one"] = dict.fromkeys(GROUPS, 1.0)
    index = {kind: transfer_index(base, tuned, by) for kind, by in sigmas.items()}
    in_maths = gains(base[MATHS], tuned[MATHS], 1.0)
    change = {g: (tuned[g] - base[g][:, None]).mean(axis=-1) for g in groups}
    models = {}
    for m, name in enumerate(others):
        why = undefined(in_maths[:, m])
        models[name] = {
            "tasks": {
                task: estimate(rows[:, m + 1] - rows[:, 0])
                for task, rows in drawn.items()
            },
            "groups": {g: estimate(rows[:, m]) for g, rows in change.items()},
            "index": {
                kind: {
                    g: None if why else estimate(rows[:, m]) for g, rows in by.items()
                }
                for kind, by in index.items()
            },
            "undefined": why,
        }
    return {
        "base": first,
        "groups": groups,
        "base_scores": {name: float(rows[0, 0]) for name, rows in drawn.items()},
        "sigma": {
            kind: {g: float(np.ravel(by[g])[0]) for g in groups}
            for kind, by in sigmas.items()
        },
        "models": models,
    }


def resampled(values: Sequence[Matrix], seed: Sequence[int]) -> Matrix:
    """Return the mean scores [1 + RESAMPLES, models] of one task: as they are, then on problems
    drawn anew, the same for all models.
    """
    rows = np.stack(values)  # [models, n]
    generator = np.random.default_rng(seed)
    n = rows.shape[1]
    counts = generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([rows.mean(axis=1)[None], counts @ rows.T / n])


def estimate(rows: Matrix) -> dict[str, float] | None:
    """Return the first of the values with the interval of the others, those left out that are
    no number; None where the first is none.
    """
    if not np.isfinite(rows[0]):
        return None
    return vars(with_percentiles(rows[0], rows[np.isfinite(rows)]))


def undefined(gain: Matrix) -> str:
    """Say why there is no index for gain_maths, "" where there is one."""
    found = estimate(gain)
    if found is None:
        return "the base solves all of maths: there is nothing to gain"
    # Then no draw says how far it is from 0.
    alike = math.isclose(found["low"], found["high"])
    if found["low"] > 0 and not alike:
        return ""
    how = "a loss" if found["high"] < 0 and not alike else "within noise"
    bounds = interval(found["low"], found["high"], "+.2f")
    return (
        f"the weighted gain in maths, {found['mean']:+.2f} ({bounds}), is {how}: the index would "
        "divide by it"
    )


# --- showing ---------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """Return the comparison as text."""
    lines = [
        f"changes against {report['base']} in points, and the transferability index"
    ]
    for group, names in report["groups"].items():
        lines.append(f"  {group}: {', '.join(names)}")
    for model, found in report["models"].items():
        lines.append(f"{model}")
        for group in GROUPS:
            lines.append(f"  {group:16}{shown(found['groups'][group], '+.1f')}")
        if found["undefined"]:
            lines.append(f"  index undefined: {found['undefined']}")
            continue
        for kind, by in found["index"].items():
            for group, value in by.items():
                lines.append(f"  TI {group:16} sigma {kind:7}{shown(value, '.1f')}")
    return "\n".join(lines)


def shown(value: Mapping[str, float] | None, form: str) -> str:
    """Return an estimate with its interval."""
    if value is None:
        return "undefined: nothing varies, or there is nothing to gain, in this group"
    return f"{format(value['mean'], form):>7}  ({interval(value['low'], value['high'], form)})"


def draw(report: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw the changes of the groups with their intervals and the index beside them; return
    the files that are written.
    """
    from nanomath.analysis import figures

    plt = figures.prepare()
    models = report["models"]
    kind = next(iter(report["sigma"]))
    rows = [(model, group) for model in models for group in GROUPS]
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(9, 1 + 0.28 * len(rows)), width_ratios=(3, 2)
    )
    for row, (model, group) in enumerate(rows):
        found = models[model]
        index = found["index"][kind].get(group)
        for axes, value in (left, found["groups"][group]), (right, index):
            if value:
                axes.plot([value["low"], value["high"]], [row, row], color="0.15")
                mark = figures.MARKS[GROUPS.index(group)]
                axes.plot(value["mean"], row, mark, color=f"C{GROUPS.index(group)}")
    for axes, label in (
        (left, f"change against {Path(report['base']).name}, points (95%)"),
        (right, f"transferability index, sigma {kind}"),
    ):
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_xlabel(label)
    left.set_yticks(range(len(rows)), [f"{Path(m).name}  {g}" for m, g in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    return figures.save(figure, path)
