"""A study: a question, a chain of stages, arms that differ by named keys, seeds; and its cells.

    question = "Does the KL penalty matter?"
    baseline = "with"                         # the arm that all others are compared with
    seeds = [0, 1, 2, 3, 4]
    measures = ["grpo.heldout/pass@1"]        # STAGE.METRIC; the first is the headline

    [stages.sft]                              # in the order in which they run
    run = "train_sft.py"
    config = "configs/tiny/sft.toml"
    seeded = false                            # one for all seeds

    [stages.grpo]
    run = "train_grpo.py"
    config = "configs/tiny/grpo.toml"
    keys = { "model.path" = "{sft}" }         # the directory of that stage's cell

    [arms]                                    # STAGE.KEY = value
    with = {}
    without = { "grpo.algorithm.kl_coef" = 0.0 }

`axes = { "grpo.optim.lr" = [1e-4, 2e-4] }` makes an arm of every combination, and `leave_one_out`
is written like `arms`, beside a first arm "all" that changes nothing. A cell is one stage with one
resolved config: an ordinary run directory whose name is the hash of that config, in which the
parents' names stand. So what arms share is run once, and more seeds cost only themselves.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from nanomath import settings
from nanomath.analysis.runs import flat
from nanomath.config import did_you_mean, load, to_toml, to_toml_value


class Program(NamedTuple):
    """What a stage may run: the words of the command, its config, and the key of its seed."""

    words: tuple[str, ...]
    config: type
    seed: str = "run.seed"


NANOMATH = ("-m", "nanomath")
RUNS = {
    "train_sft.py": Program(("train_sft.py",), settings.SFTConfig),
    "train_grpo.py": Program(("train_grpo.py",), settings.GRPOConfig),
    "prm train": Program((*NANOMATH, "prm", "train"), settings.PRMConfig),
    "prm label": Program((*NANOMATH, "prm", "label"), settings.LabelConfig, "label.seed"),
    "eval": Program((*NANOMATH, "eval"), settings.EvalConfig, "evaluation.seed"),
}
BUDGETS = ("updates", "samples")  # what can be held equal before anything runs
NEEDED = ("question", "baseline", "seeds", "measures", "stages")
KEYS = (*NEEDED, "arms", "axes", "leave_one_out", "budget", "last", "cluster", "tasks")
STAGE_KEYS = ("run", "config", "keys", "seeded", "minutes")
NAME = re.compile(r"[\w.=+-]+")


@dataclass(frozen=True)
class Stage:
    """One kind of run. `minutes`: how long its author saw one cell take, for plans."""

    name: str
    run: str
    config: str
    keys: dict[str, Any] = field(default_factory=dict)
    seeded: bool = True
    minutes: float = 0.0


@dataclass(frozen=True)
class Cell:
    """One run: `name` is a function of what it computes, `text` its whole config, `parents` the
    cells that it starts from.
    """

    name: str
    stage: Stage
    text: str
    parents: tuple[Cell, ...]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values of its config by their dotted keys."""
        return flat(tomllib.loads(self.text))


Chain = dict[str, Cell]  # the cells of an arm and a seed, by stage


@dataclass(frozen=True)
class Study:
    """A study as its file says it; `arms` maps each arm's name to its changes, STAGE.KEY: value."""

    name: str
    question: str
    baseline: str
    seeds: tuple[int, ...]
    measures: tuple[str, ...]
    stages: dict[str, Stage]
    arms: dict[str, dict[str, Any]]
    budget: str = ""
    last: int = 1
    cluster: str = ""
    tasks: str = ""

    @property
    def stage(self) -> str:
        """The stage of the headline."""
        return self.measures[0].split(".")[0]

    def cells(self, directory: Path) -> dict[tuple[str, int], Chain]:
        """The cells of each arm and seed, to be kept in `directory`. ValueError for what cannot be
        resolved, and for two arms that are the same.
        """
        found: dict[tuple[str, int], Chain] = {}
        owners: dict[tuple[str, ...], str] = {}
        for seed, arm in itertools.product(self.seeds, self.arms):
            chain: Chain = {}
            for stage in self.stages.values():
                chain[stage.name] = self._cell(stage, arm, seed, directory, chain)
            found[arm, seed] = chain
            owner = owners.setdefault(tuple(cell.name for cell in chain.values()), arm)
            if owner != arm:
                raise ValueError(
                    f"the arms {owner!r} and {arm!r} resolve to the same config"
                )
        return found

    def _cell(
        self, stage: Stage, arm: str, seed: int, directory: Path, before: Chain
    ) -> Cell:
        values = {**stage.keys, **self._changes(stage, arm)}
        parents = [cell for name, cell in before.items() if f"{{{name}}}" in str(values)]
        for parent in parents:
            place = str(directory / parent.name)
            values = {
                key: _replaced(v, parent.stage.name, place) for key, v in values.items()
            }
        if stage.seeded:
            values[RUNS[stage.run].seed] = seed
        config = _load(stage, values)
        if self.budget and isinstance(config, settings.GRPOConfig):
            self._hold_budget(stage, config)
        if hasattr(config, "run"):  # two runs of one thread do more than one of two
            config.run.threads = 1
            config.run.keep_last = 1
        known = f"{stage.run}\n{to_toml(config).replace(str(directory), '')}"
        name = f"{stage.name}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
        _keep(config, directory / name)
        return Cell(name, stage, to_toml(config), tuple(parents))

    def _changes(self, stage: Stage, arm: str) -> dict[str, Any]:
        """What an arm changes in a stage."""
        start = f"{stage.name}."
        changes = self.arms[arm].items()
        return {key.removeprefix(start): v for key, v in changes if key.startswith(start)}

    def _hold_budget(self, stage: Stage, config: settings.GRPOConfig) -> None:
        """Give a run as many steps as make the baseline's number of updates, or of samples."""
        base = _load(stage, {**stage.keys, **self._changes(stage, self.baseline)})
        steps = base.run.steps * cost(base, self.budget) / cost(config, self.budget)
        if steps != int(steps):
            raise ValueError(
                f"budget = {self.budget!r}: an arm would need {steps:g} steps to have as many "
                f"{self.budget} as {self.baseline!r}: change run.steps of the stage {stage.name!r}"
            )
        config.run.steps = int(steps)


def _replaced(value: Any, stage: str, place: str) -> Any:
    return value.replace(f"{{{stage}}}", place) if isinstance(value, str) else value


def _load(stage: Stage, values: Mapping[str, Any]) -> Any:
    """The stage's config with some keys changed. ValueError names the stage."""
    words = [
        f"{key}={value if isinstance(value, str) else to_toml_value(value)}"
        for key, value in values.items()
    ]
    try:
        return load(RUNS[stage.run].config, stage.config or None, words)
    except ValueError as error:
        raise ValueError(f"stage {stage.name!r}: {error}") from None


def _keep(config: Any, place: Path) -> None:
    """Let a run write into the directory `place`."""
    if isinstance(config, settings.EvalConfig):
        config.save = str(place / "heldout.jsonl")
    elif isinstance(config, settings.LabelConfig):
        config.label.save = str(place / "labelled.jsonl")
    else:
        config.run.directory = str(place.parent)
        config.run.name = place.name


def cost(config: settings.GRPOConfig, budget: str) -> int:
    """Updates, or samples, of one step."""
    if budget == "updates":
        return config.algorithm.epochs * config.algorithm.minibatches
    return config.grpo.prompts * config.grpo.group_size * (1 + config.algorithm.refills)


def read_study(path: str | Path) -> Study:
    """ValueError of one line for anything in the file that does not fit."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"study file not found: {path}")
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        return study_of(path.stem, table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def study_of(name: str, table: Mapping[str, Any]) -> Study:
    """The study that a table describes, checked but for its configs."""
    _known(table, KEYS, "key")
    for key in NEEDED:
        if not table.get(key):
            raise ValueError(f"{key} is missing")
    seeds = table["seeds"]
    if not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds = {seeds}: expected a list of numbers from 0")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds = {seeds}: one is there twice")
    stages = {stage: _stage(stage, part) for stage, part in table["stages"].items()}
    arms = _arms(table)
    for arm, changes in arms.items():
        if not NAME.fullmatch(arm):
            raise ValueError(
                f"arm {arm!r}: expected letters, digits and .=+-_ in its name"
            )
        for key in changes:
            if key.split(".")[0] not in stages:
                raise ValueError(
                    f"arm {arm!r}: {key}: expected STAGE.KEY, with a stage of {list(stages)}"
                )
    if table["baseline"] not in arms:
        raise ValueError(
            f"baseline = {table['baseline']!r}: expected one of {', '.join(arms)}"
        )
    for measure in table["measures"]:
        stage, _, metric = measure.partition(".")
        if stage not in stages or not metric:
            raise ValueError(
                f"measure {measure!r}: expected STAGE.METRIC, with a stage of {list(stages)}"
            )
        if stages[stage].run == "prm label":
            raise ValueError(f"measure {measure!r}: `prm label` measures nothing")
    if table.get("budget", BUDGETS[0]) not in BUDGETS:
        raise ValueError(
            f"budget = {table['budget']!r}: expected one of {', '.join(BUDGETS)}"
        )
    return Study(
        name,
        table["question"],
        table["baseline"],
        tuple(seeds),
        tuple(table["measures"]),
        stages,
        arms,
        table.get("budget", ""),
        table.get("last", 1),
        table.get("cluster", ""),
        table.get("tasks", ""),
    )


def _stage(name: str, part: Mapping[str, Any]) -> Stage:
    _known(part, STAGE_KEYS, f"key of the stage {name!r}")
    if part.get("run") not in RUNS:
        raise ValueError(
            f"stage {name!r}: run = {part.get('run')!r}: expected one of {', '.join(RUNS)}"
        )
    if not NAME.fullmatch(name) or "." in name:
        raise ValueError(f"stage {name!r}: expected letters, digits and =+-_ in its name")
    return Stage(name, **{"config": "", **part})


def _arms(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms that the file names, or the product of its axes, or a recipe and its parts."""
    given = [key for key in ("arms", "axes", "leave_one_out") if key in table]
    if len(given) != 1:
        raise ValueError(
            f"expected one of arms, axes, leave_one_out; there are {given or 'none'}"
        )
    if given == ["axes"]:
        keys = list(table["axes"])
        return {
            "_".join(
                f"{key.split('.')[-1]}={value}"
                for key, value in zip(keys, values, strict=True)
            ): dict(zip(keys, values, strict=True))
            for values in itertools.product(*table["axes"].values())
        }
    arms = {name: flat(changes) for name, changes in table[given[0]].items()}
    return {"all": {}, **arms} if given == ["leave_one_out"] else arms


def _known(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known) or f"expected one of {', '.join(known)}"
            raise ValueError(f"unknown {what}: {key!r}; {hint}")


def in_order(cells: Mapping[tuple[str, int], Chain]) -> dict[str, Cell]:
    """All cells by name, each once, parents first."""
    return {cell.name: cell for chain in cells.values() for cell in chain.values()}
