"""The cells of a study: each is one stage with one resolved config, an ordinary run directory.

A cell's name is the hash of that config, in which the names of the cells that it starts from stand.
So what arms share is run once, also by several studies, and more seeds cost only themselves.

A config may wait for other cells (`Late`): for what the baseline used, for the checkpoint that
reached a score, for the value of a key that did best. Then the hash is of the rule and of the names
of the cells that it looks at; nanomath/analysis/late.py looks once these are done.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nanomath import settings
from nanomath.analysis.runs import flat
from nanomath.analysis.study import KNOWN, MEASURED, RUNS, Stage, Study
from nanomath.config import load, to_toml, to_toml_value

PLACE = re.compile(r"\{([\w=+-]+)\}")
# Keys whose values have braces of their own.
TEXTS = ("template", "response", "system", "ask")
LONGER = 10  # times as many steps at most, where tokens or seconds end a run
Chain = dict[str, "Cell"]  # the cells of an arm and a seed, by stage
Key = tuple[str, int]  # arm and seed


@dataclass(frozen=True)
class Late:
    """What a config takes from other cells, by a rule of nanomath/analysis/late.py: the value of
    `key`, or a checkpoint in place of the directory of the first cell.
    """

    rule: str
    key: str
    cells: tuple[Cell, ...]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        names = [cell.name for cell in self.cells]
        return f"{self.rule} {self.key} {names} {self.options}"


@dataclass(frozen=True)
class Cell:
    """One run: `name` is a function of what it computes, `text` its config, `parents` the cells
    that it starts from, `late` what else it waits for.
    """

    name: str
    stage: Stage
    text: str
    parents: tuple[Cell, ...]
    late: tuple[Late, ...] = ()

    @property
    def waits_for(self) -> tuple[Cell, ...]:
        return (*self.parents, *(cell for late in self.late for cell in late.cells))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values of its config by their dotted keys; of a bare command, its "words"."""
        return flat(tomllib.loads(self.text))


def make_cells(study: Study, directory: Path) -> dict[Key, Chain]:
    """The cells of each arm and seed that lead to a measure, to be kept in `directory`.

    ValueError for what cannot be resolved, and for two arms that are the same.
    """
    maker = Maker(study, directory)
    found: dict[Key, Chain] = {}
    owners: dict[tuple[str, ...], str] = {}
    for seed, arm in itertools.product(study.seeds, study.arms):
        chain = found[arm, seed] = maker.chain(arm, seed)
        owner = owners.setdefault(tuple(cell.name for cell in chain.values()), arm)
        if owner != arm:
            raise ValueError(
                f"the arms {owner!r} and {arm!r} resolve to the same config"
            )
    check_choice(study, in_order(found))
    check_watched(study, found)
    return found


def check_watched(study: Study, chains: Mapping[Key, Chain]) -> None:
    """ValueError where one run would be asked twice for the event, and count as two."""
    stage = study.event.get("alarm", "").split(".")[0]
    if stage and len({chain[stage].name for chain in chains.values()}) < len(chains):
        raise ValueError(
            f"event: arms or seeds share runs of the stage {stage!r}, which would count more than "
            "once: expected a run of its own for each"
        )


def check_choice(study: Study, cells: Mapping[str, Cell]) -> None:
    """ValueError where what is chosen by is asked on the headline's own problems."""
    headline, *_ = (cell for cell in cells.values() if cell.stage.name == study.stage)
    for late in (late for cell in cells.values() for late in cell.late):
        if late.rule == "best" and problems_of(late.cells[0]) == problems_of(headline):
            raise ValueError(
                f"best chooses by {study.best['measure']!r}, on the problems of the headline "
                f"{study.measures[0]!r}: choose by other ones"
            )


def problems_of(cell: Cell) -> list[Any]:
    """Which problems a cell is measured on; nothing in common where it names none."""
    section = "heldout" if "heldout.source" in cell.config else "problems"
    keys = [f"{section}.{key}" for key in ("source", "split", "file.skip")]
    return [cell.config.get(key, cell.name) for key in keys]


def in_order(chains: Mapping[Key, Chain]) -> dict[str, Cell]:
    """All cells by name, each once, those that others wait for first."""

    def before(cell: Cell) -> Iterator[Cell]:
        for other in cell.waits_for:
            yield from before(other)
        yield cell

    every = [cell for chain in chains.values() for cell in chain.values()]
    return {one.name: one for cell in every for one in before(cell)}


@dataclass
class Maker:
    """Makes the cells of a study, each once."""

    study: Study
    directory: Path
    made: dict[tuple[Any, ...], Cell] = field(default_factory=dict)

    def chain(self, arm: str, seed: int) -> Chain:
        """The cells of the measured stages and all that these start from, in order."""
        found: Chain = {}
        left = [self.cell(stage, arm, seed) for stage in self.study.looked_at]
        while left:
            cell = left.pop()
            found[cell.stage.name] = cell
            left += cell.parents
        return {name: found[name] for name in self.study.stages if name in found}

    def cell(
        self, stage: str, arm: str, seed: int, tried: tuple[Any, ...] = ()
    ) -> Cell:
        """The cell of a stage, an arm and a seed; `tried`: with ((STAGE.KEY, value),) as well."""
        key = (stage, arm, seed, str(tried))
        if key not in self.made:
            self.made[key] = self._make(self.study.stages[stage], arm, seed, tried)
        return self.made[key]

    def _make(self, stage: Stage, arm: str, seed: int, tried: tuple[Any, ...]) -> Cell:
        changes = {**self.study.arms[arm], **dict(tried)}
        values = {**stage.keys, **of_stage(changes, stage)}
        text = f"{values} {stage.arguments}"
        earlier = itertools.takewhile(
            lambda name: name != stage.name, self.study.stages
        )
        named = [name for name in earlier if f"{{{name}}}" in text]
        parents = tuple(self.cell(name, arm, seed, tried) for name in named)
        places = {cell.stage.name: str(self.directory / cell.name) for cell in parents}
        values = {key: filled(stage, key, v, places) for key, v in values.items()}
        late = [
            *self._checkpoints(parents, seed, tried),
            *self._best(stage, arm, tried),
        ]
        if stage.run not in RUNS:
            words = [
                filled(stage, "arguments", word, places) for word in stage.arguments
            ]
            return self._named(stage, [*words, *words_of(values)], parents, late)
        if stage.seeded:
            values[RUNS[stage.run].seed] = seed
        config = load_config(stage, values)
        needs_one = isinstance(config, settings.GRPOConfig | settings.EvalConfig)
        if needs_one and not config.model.path:
            raise ValueError(
                f"stage {stage.name!r}: model.path is empty: name an earlier stage, as in "
                'keys = { "model.path" = "{sft}" }'
            )
        if not hasattr(config, "run"):
            return self._named(stage, config, parents, late)
        self._settle_run(stage, config)
        cell = self._named(stage, config, parents, late)
        if self.study.budget not in MEASURED or arm == self.study.baseline:
            return cell
        base = self.cell(stage.name, self.study.baseline, seed)
        if base.name == cell.name:
            return cell
        config.run.steps *= LONGER
        late.append(Late("budget", f"run.{self.study.budget}", (base,), {}))
        return self._named(stage, config, parents, late)

    def _named(
        self, stage: Stage, config: Any, parents: tuple[Cell, ...], late: list[Late]
    ) -> Cell:
        """The cell of a config, or of a command's words, named by what it computes."""
        known = f"{stage.run}\n{text_of(config)}"
        for cell in parents:  # wherever they are kept
            known = known.replace(str(self.directory / cell.name), f"/{cell.name}")
        known += "".join(map(str, late))
        name = f"{stage.name}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
        return Cell(
            name, stage, kept(config, self.directory / name), parents, tuple(late)
        )

    def _settle_run(self, stage: Stage, config: Any) -> None:
        """What the study says of a run's length, threads and checkpoints."""
        if self.study.budget in KNOWN:
            config.run.steps = self._equal_steps(stage, config)
        if config.run.on_collapse == "stop":
            raise ValueError(
                f"stage {stage.name!r}: run.on_collapse = stop leaves a run that is not done: a "
                "study can have warn or end"
            )
        config.run.threads = 1  # whatever else runs, the same sums
        if "run.keep_last" not in stage.keys:
            config.run.keep_last = 1
        if stage.checkpoint:
            if not config.run.eval_every:
                raise ValueError(
                    f"stage {stage.name!r}: checkpoint chooses among measurements, but "
                    "run.eval_every is 0"
                )
            config.run.save_every = config.run.eval_every
            config.run.keep_last = 0

    def _equal_steps(self, stage: Stage, config: Any) -> int:
        """As many steps as make the baseline's number of updates, or of samples."""
        study = self.study
        base = {**stage.keys, **of_stage(study.arms[study.baseline], stage)}
        wanted = load_config(stage, base)
        per_step = cost(config, study.budget)
        steps = wanted.run.steps * cost(wanted, study.budget) / per_step
        if steps != int(steps):
            raise ValueError(
                f"budget = {study.budget!r}: an arm would need {steps:g} steps to have as many "
                f"{study.budget} as {study.baseline!r}: change run.steps of the stage "
                f"{stage.name!r}"
            )
        return int(steps)

    def _checkpoints(
        self, parents: tuple[Cell, ...], seed: int, tried: tuple[Any, ...]
    ) -> Iterator[Late]:
        """What must be known of parents that are started from at a checkpoint of theirs."""
        for parent in parents:
            if rule := parent.stage.checkpoint:
                near = [rule["near"]] if "near" in rule else []
                base = self.study.baseline
                other = [self.cell(stage, base, seed, tried) for stage in near]
                yield Late("checkpoint", "", (parent, *other), rule)

    def _best(self, stage: Stage, arm: str, tried: tuple[Any, ...]) -> Iterator[Late]:
        """The key of this stage that every arm has at its own best."""
        best = self.study.best
        if tried or not best or best["key"].split(".")[0] != stage.name:
            return
        judge = best["measure"].split(".")[0]
        runs = itertools.product(best["values"], best["seeds"])
        cells = [self.cell(judge, arm, s, ((best["key"], value),)) for value, s in runs]
        yield Late("best", best["key"].split(".", 1)[1], tuple(cells), best)


def of_stage(changes: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Those of an arm's changes that are of this stage."""
    start = f"{stage.name}."
    return {k.removeprefix(start): v for k, v in changes.items() if k.startswith(start)}


def filled(stage: Stage, key: str, value: Any, places: Mapping[str, str]) -> Any:
    """A value with the directories of earlier stages in it. ValueError for one that is none."""
    if not isinstance(value, str) or key.split(".")[-1] in TEXTS:
        return value
    for name in PLACE.findall(value):
        if name not in places and name != "here":
            raise ValueError(
                f"stage {stage.name!r}: {key}: {{{name}}} is no earlier stage"
            )
    return PLACE.sub(lambda found: places.get(found[1], found[0]), value)


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Values as words of a command."""
    return [
        f"{key}={value if isinstance(value, str) else to_toml_value(value)}"
        for key, value in values.items()
    ]


def load_config(stage: Stage, values: Mapping[str, Any]) -> Any:
    """The stage's config with some keys changed. ValueError names the stage."""
    try:
        return load(RUNS[stage.run].config, stage.config or None, words_of(values))
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from None


def text_of(config: Any) -> str:
    """TOML of a config, or of a command's words."""
    if isinstance(config, list):
        return f"words = {to_toml_value(config)}\n"
    return to_toml(config)


def kept(config: Any, place: Path) -> str:
    """The same, written into the directory `place`."""
    if isinstance(config, list):
        config = [word.replace("{here}", str(place)) for word in config]
    elif isinstance(config, settings.EvalConfig):
        config.save = str(place / "heldout.jsonl")
        config.out = str(place / "eval.json")
    elif isinstance(config, settings.LabelConfig):
        config.label.save = str(place / "labelled.jsonl")
    else:
        config = replace(
            config,
            run=replace(config.run, directory=str(place.parent), name=place.name),
        )
    return text_of(config)


def cost(config: Any, budget: str) -> int:
    """Updates, or samples, of one step."""
    if not isinstance(config, settings.GRPOConfig):
        section = getattr(config, "sft", None) or config.prm
        return 1 if budget == "updates" else section.batch_size
    if budget == "updates":
        return config.algorithm.epochs * config.algorithm.minibatches
    return config.grpo.prompts * config.grpo.group_size * (1 + config.algorithm.refills)
