"""Answer a question by runs: arms x seeds, side by side, into a table that compares them in pairs.

    python -m nanomath study FILE.toml [--plan] [minutes=M] [workers=W] [out=DIR] [cells=DIR]
        [only=ARM,...] [seeds=0,1,...]

    python -m nanomath study configs/studies/kl.toml --plan       what would be run, and seen
    python -m nanomath study configs/studies/kl.toml              run what is missing; the table
    python -m nanomath study configs/studies/kl.toml minutes=30   stop in time, to go on later

It writes studies/NAME/: results.json, table.md, figures and study.html. The run directories are
cells of studies/cells, which all studies share. A cell that fails stays in the table with its
reason and does not stop the others.
nanomath/analysis/study.py says what stands in the file.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

from tqdm import tqdm

from nanomath.analysis import event, figures, statistics
from nanomath.analysis.cells import Cell, Chain, in_order, make_cells
from nanomath.analysis.measures import PER_PROBLEM, less, measured, run_of, terms
from nanomath.analysis.pool import Pool
from nanomath.analysis.report import report
from nanomath.analysis.results import as_json, as_table, collect
from nanomath.analysis.runs import Run, read_run
from nanomath.analysis.study import Study, read_study
from nanomath.training.runlog import write_atomically

WORDS = ("minutes", "workers", "out", "cells", "only", "seeds")


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    check_extras()
    path, words = parse(argv)
    study = narrowed(read_study(path), words)
    out = Path(words.get("out") or Path("studies") / study.name)
    cells = Path(words.get("cells") or Path("studies") / "cells")
    chains = make_cells(study, cells)
    every = in_order(chains)
    workers = max(1, int(number("workers", words, os.cpu_count() or 1)))
    minutes = number("minutes", words, math.inf)
    pool = Pool(
        cells,
        workers,
        lambda text: tqdm.write(text, file=sys.stderr),
        time.monotonic() + 60 * minutes,
        lambda cell: check_measures(study, cell, cells),
    )
    if "--plan" in argv:
        print(plan(study, every, pool))
        return 0
    for place in (out, cells):
        place.mkdir(parents=True, exist_ok=True)
    check_room(every, pool)
    try:
        pool.run(every)
    except KeyboardInterrupt:
        print(
            "stopped, all that ran is saved: the same command goes on", file=sys.stderr
        )
        return 1
    finally:
        write(study, chains, pool, out)
    print(cpu_time(), file=sys.stderr)
    left = [name for name, cell in every.items() if not pool.state(cell)]
    failed = [
        name
        for name, cell in every.items()
        if pool.state(cell).get("state") == "failed"
    ]
    print((out / "table.md").read_text("utf-8"))
    pages = [
        n for n in ("results.json", "table.md", "study.html") if (out / n).exists()
    ]
    print(f"{out}: {', '.join(pages)}", end="")
    print(f"; {len(left)} cells are left, the same command goes on" if left else "")
    return 1 if left or failed else 0


def check_extras() -> None:
    """ModuleNotFoundError, before anything runs, for what the pages will need."""
    for name in ("scipy", "matplotlib", "plotly"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"a study needs {name}: pip install {name}")


def cpu_time() -> str:
    """What running the cells has cost beside the cells themselves."""
    usages = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
    own, cells = (usage.ru_utime + usage.ru_stime for usage in usages)
    return f"CPU time: {own:.1f} s of the runner, with its start and pages; {cells:.0f} s of cells"


def parse(argv: list[str]) -> tuple[str, dict[str, str]]:
    """The study's file, and the words NAME=VALUE. ValueError for others."""
    files = [word for word in argv if "=" not in word and word != "--plan"]
    words = dict(word.split("=", 1) for word in argv if "=" in word)
    if len(files) != 1 or files[0].startswith("-"):
        raise ValueError(
            "study needs one file: python -m nanomath study FILE.toml [--plan]"
        )
    for name in words:
        if name not in WORDS:
            raise ValueError(
                f"unknown word {name}=; expected one of {', '.join(WORDS)}"
            )
    return files[0], words


def number(name: str, words: dict[str, str], default: float) -> float:
    """The value of a word; ValueError for what is no positive number."""
    text = words.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ValueError(f"{name}={text}: expected a number above 0")
    return value


def narrowed(study: Study, words: dict[str, str]) -> Study:
    """The study with some of its arms, beside the baseline, or with other seeds."""
    if "only" in words:
        only = words["only"].split(",")
        if unknown := [arm for arm in only if arm not in study.arms]:
            raise ValueError(
                f"only={unknown[0]}: expected one of {', '.join(study.arms)}"
            )
        kept = {
            a: keys for a, keys in study.arms.items() if a in (*only, study.baseline)
        }
        study = replace(study, arms=kept)
    if "seeds" in words:
        try:
            seeds = tuple(
                dict.fromkeys(int(seed) for seed in words["seeds"].split(","))
            )
        except ValueError:
            raise ValueError(
                f"seeds={words['seeds']}: expected numbers such as 0,1,2"
            ) from None
        study = replace(study, seeds=seeds)
    return study


def plan(study: Study, cells: dict[str, Cell], pool: Pool) -> str:
    """What would be run, how long that takes, and how small a difference it could see."""
    missing = [cell for cell in cells.values() if not pool.is_done(cell)]
    counts = Counter(cell.stage.name for cell in cells.values())
    minutes = pool.minutes_left(cells)
    how_long = (
        f"about {minutes:.0f} minutes"
        if minutes
        else "minutes: unknown until a cell is done"
    )
    size = room(cells, pool) / 1e6
    lines = [
        study.question,
        f"  {len(study.arms)} arms x {len(study.seeds)} seeds: {len(cells)} cells, "
        f"{len(missing)} of them to run, {pool.workers} at a time",
        *(
            f"  {stage}: {counts[stage]} cells"
            f"{'' if counts[stage] else ', for it leads to no measure'}"
            for stage in study.stages
        ),
        f"  {how_long}; disk: about {size:.0f} MB",
    ]
    for measure in study.measures:
        stage, metric = measure.split(".", 1)
        cell = next(cell for cell in cells.values() if cell.stage.name == stage)
        lines.append(f"  {measure}: {sight(study, cell, metric)}")
    if study.event:
        lines.append(f"  {study.event['alarm']}: {event.reach(study)}")
    return "\n".join(lines)


def sight(study: Study, cell: Cell, metric: str) -> str:
    """The smallest difference that could be found, where that can be known before."""
    problems = cell.config.get("heldout.limit") or cell.config.get("problems.limit")
    samples = cell.config.get("evaluation.samples")
    match = PER_PROBLEM.fullmatch(metric)
    if not (match and match.groups() == ("pass", "1", None) and problems):
        return "what can be seen depends on how it varies from seed to seed"
    best = statistics.detectable(problems, samples, len(study.seeds))
    usual = statistics.detectable(problems, samples, len(study.seeds), spread=0.02)
    return (
        f"differences of {100 * best:.1f} points can be seen (4 times of 5) if seeds add nothing, "
        f"of {100 * usual:.1f} if they add 2 points ({problems} problems x {samples} samples)"
    )


def room(cells: dict[str, Cell], pool: Pool) -> float:
    """Bytes that the cells which are to be run will take."""
    left = [cell for cell in cells.values() if not pool.is_done(cell)]
    return sum(disk(cell, pool.directory) for cell in left)


def check_room(cells: dict[str, Cell], pool: Pool) -> None:
    """OSError where they will not fit on the disk."""
    free = shutil.disk_usage(pool.directory).free
    if (needed := room(cells, pool)) > free:
        raise OSError(
            f"the cells need about {needed / 1e6:.0f} MB, {pool.directory} has "
            f"{free / 1e6:.0f} MB left: cells=DIR puts them elsewhere"
        )


def check_measures(study: Study, cell: Cell, cells: Path) -> None:
    """ValueError where a cell that is done has not what the study measures of its stage."""
    run = run_of(cells / cell.name)
    for measure in (*study.measures, *filter(None, [study.best.get("measure")])):
        found = [
            measured(run, metric, study.last)
            for stage, metric in terms(measure)
            if stage == cell.stage.name
        ]
        if len(found) > 1:
            less(*found, study.cluster)
    event.check(study, cell, cells)


def disk(cell: Cell, directory: Path) -> float:
    """Bytes a cell will take: as many as one of its stage that is there, or else the weights and
    Adam's state of the config's new model.
    """
    alike = next(directory.glob(f"{cell.stage.name}-*/cell.json"), None)
    if alike:
        return sum(f.stat().st_size for f in alike.parent.rglob("*") if f.is_file())
    names = ("layers", "hidden_size", "intermediate_size")
    layers, width, inner = (cell.config.get(f"model.new.{name}", 0) for name in names)
    every = cell.config.get("run.save_every") if cell.stage.checkpoint else 0
    kept = cell.config["run.steps"] // every if every else 1
    return kept * 12 * layers * (3 * width * inner + 4 * width * width)


def trained(chain: Chain) -> str:
    """The last training of a chain, which the report is of."""
    names = [cell.name for cell in chain.values() if "train" in cell.stage.run]
    return names[-1] if names else ""


def write(study: Study, chains: dict, pool: Pool, out: Path) -> None:
    """Write what is known by now: results.json, table.md, the figures and study.html."""
    results = collect(study, chains, pool)
    write_atomically(out / "results.json", as_json(results))
    write_atomically(out / "table.md", as_table(results))
    figures.draw(results, pool.directory, out)
    runs: dict[str, list[Run]] = {}
    for (arm, _), chain in chains.items():
        place = pool.directory / trained(chain)
        if (place / "metrics.jsonl").exists():
            runs.setdefault(arm, []).append(read_run(place))
    if runs:
        write_atomically(out / "study.html", report([], runs))
