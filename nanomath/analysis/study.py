"""A study: a question, a chain of stages, arms that differ by named keys, and seeds.

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

`axes = { "grpo.optim.lr" = [1e-4, 2e-4] }` makes an arm of every combination; an axis of several
keys is a table of its levels, written like `arms`. `leave_one_out` is written like `arms`, beside a
first arm "all" that changes nothing. nanomath/analysis/event.py says what an `event` is. A stage
whose `run` is no program of the table below is any other command of nanomath, with `arguments` and
the `keys` as its words; {here} is its own directory. nanomath/analysis/cells.py says what is run.

`like = "FILE.toml"` names a study beside this one, from which everything is taken that is not said
here: of the stages single keys, all else whole.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanomath import settings
from nanomath.analysis.measures import LESS, PER_PROBLEM, WHOLE, terms
from nanomath.analysis.runs import flat
from nanomath.config import convert, did_you_mean
from nanomath.training.alarms import RULES


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
    "prm label": Program(
        (*NANOMATH, "prm", "label"), settings.LabelConfig, "label.seed"
    ),
    "eval": Program((*NANOMATH, "eval"), settings.EvalConfig, "evaluation.seed"),
}
KNOWN = ("updates", "samples")  # what can be held equal before anything runs
MEASURED = ("tokens", "seconds")  # and what only once the baseline has run
BUDGETS = (*KNOWN, *MEASURED)
NEEDED = {
    "question": str,
    "baseline": str,
    "seeds": list[int],
    "measures": list[str],
    "stages": dict[str, dict],
}
KEYS = {
    **NEEDED,
    "arms": dict[str, dict],
    "axes": dict,
    "leave_one_out": dict[str, dict],
    "budget": str,
    "last": int,
    "cluster": str,
    "tasks": str,
    "best": dict,
    "event": dict,
    "doses": dict[str, float],
    "against": str,
}
STAGE_KEYS = {
    "run": str,
    "config": str,
    "keys": dict,
    "seeded": bool,
    "minutes": float,
    "arguments": list[str],
    "checkpoint": dict,
}
FORMS = ("arms", "axes", "leave_one_out")
BEST_KEYS = {"key": str, "values": list, "measure": str, "seeds": list[int]}
EVENT_KEYS = {"alarm": str, "announce": list[str], "ahead": int}
EVENT = {"announce": [], "ahead": 20}  # where the file does not say
# Not first a _: matplotlib's legends leave out what begins so.
NAME = re.compile(r"[^\W_][\w.=+-]*")


@dataclass(frozen=True)
class Stage:
    """One kind of run. `minutes`: how long its author saw one cell take, for plans. `checkpoint`:
    which of its checkpoints later stages start from, where that is not the last one.
    """

    name: str
    run: str
    config: str
    keys: dict[str, Any] = field(default_factory=dict)
    seeded: bool = True
    minutes: float = 0.0
    arguments: list[str] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study as its file says it; `arms` maps each arm's name to its changes, STAGE.KEY: value;
    `best` is a key that every arm has at its own best of some values; `levels` says of an arm where
    it stands on each axis, and `event` what may happen in its runs; `doses` says of arms how much
    of something each has, from the least on; `against` is a measure of a training over whose values
    the others are drawn, at the same steps.
    """

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
    best: dict[str, Any] = field(default_factory=dict)
    event: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, dict[str, str]] = field(default_factory=dict)
    doses: dict[str, float] = field(default_factory=dict)
    against: str = ""

    def __post_init__(self) -> None:
        if min(self.seeds) < 0:
            raise ValueError(f"seeds = {[*self.seeds]}: expected none below 0")
        if shared := set(self.seeds) & set(self.best.get("seeds", ())):
            raise ValueError(
                f"best: seed {min(shared)} is one of the study's: what chooses must not be what "
                "is reported"
            )

    @property
    def stage(self) -> str:
        """The stage of the headline."""
        return self.measures[0].split(".")[0]

    @property
    def looked_at(self) -> list[str]:
        """The stages that are measured, or watched for the event."""
        watched = filter(None, [self.event.get("alarm")])
        found = [
            stage for name in (*self.measures, *watched) for stage, _ in terms(name)
        ]
        return list(dict.fromkeys(found))


def read_study(path: str | Path) -> Study:
    """ValueError of one line for anything in the file that does not fit."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"study file not found: {path}")
    try:
        return study_of(path.stem, _whole(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _whole(path: Path) -> dict[str, Any]:
    """The table of a study, with what it takes from the one that it is `like`."""
    table = tomllib.loads(path.read_text("utf-8"))
    if "like" not in table:
        return table
    name = table.pop("like")
    if not isinstance(name, str) or not (path.parent / name).is_file():
        raise ValueError(f"like = {name!r}: expected a study file in {path.parent}")
    other = tomllib.loads((path.parent / name).read_text("utf-8"))
    if "like" in other:
        raise ValueError(
            f"like = {name!r}: expected a whole study, and that is like another"
        )
    if any(form in table for form in FORMS):
        other = {key: value for key, value in other.items() if key not in FORMS}
    stages = dict(other.get("stages", {}))
    for stage, part in table.get("stages", {}).items():
        base = stages.get(stage, {})
        stages[stage] = {
            **base,
            **part,
            "keys": {**base.get("keys", {}), **part.get("keys", {})},
        }
    return {**other, **table, "stages": stages}


def study_of(name: str, table: Mapping[str, Any]) -> Study:
    """The study that a table describes, checked but for its configs."""
    _known(table, KEYS, "key")
    for key in NEEDED:
        if not table.get(key):
            raise ValueError(f"{key} is missing")
    seeds = table["seeds"]
    if table.get("last", 1) < 1:
        raise ValueError("expected last of at least 1")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds = {seeds}: one is there twice")
    stages = {stage: _stage(stage, part) for stage, part in table["stages"].items()}
    arms, levels = _arms(table)
    for arm, changes in arms.items():
        _check_name("arm", arm)
        for key in changes:
            if not _is_key(key, stages):
                raise ValueError(
                    f"arm {arm!r}: {key}: expected STAGE.KEY, with a stage of {list(stages)}"
                )
    if table["baseline"] not in arms:
        raise ValueError(
            f"baseline = {table['baseline']!r}: expected one of {', '.join(arms)}"
        )
    for measure in table["measures"]:
        _check_difference(measure, stages)
    for stage in stages.values():
        _check_checkpoint(stage, stages)
    if table.get("budget", BUDGETS[0]) not in BUDGETS:
        raise ValueError(
            f"budget = {table['budget']!r}: expected one of {', '.join(BUDGETS)}"
        )
    if "best" in table:
        _check_best(table, stages, arms)
    if "event" in table:
        _check_event(table["event"], stages)
    if "doses" in table:
        _check_doses(table["doses"], arms)
    if against := table.get("against"):
        _check_measure(against, stages)
        if not stages[against.split(".")[0]].run.startswith("train_"):
            raise ValueError(f"against = {against!r}: expected a measure of a training")
    said = {key: value for key, value in table.items() if key not in FORMS}
    if "event" in table:
        said["event"] = EVENT | table["event"]
    said |= {"seeds": tuple(seeds), "measures": tuple(table["measures"])}
    return Study(name, **{**said, "stages": stages, "arms": arms, "levels": levels})


def _stage(name: str, part: Mapping[str, Any]) -> Stage:
    _known(part, STAGE_KEYS, f"key of the stage {name!r}")
    run = part.get("run")
    if not run or (run in RUNS) == ("arguments" in part):
        raise ValueError(
            f"stage {name!r}: run = {run!r}: expected one of {', '.join(RUNS)}, or another command "
            "of python -m nanomath and its arguments = [...]"
        )
    _check_name("stage", name)
    if "." in name:
        raise ValueError(f"stage {name!r}: a dot ends the name of a stage")
    return Stage(name, **{"config": "", **part})


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r}: expected letters, digits and .=+-_ in its name, and first a letter "
            "or digit"
        )


def _check_measure(measure: str, stages: Mapping[str, Stage]) -> None:
    stage, _, metric = measure.partition(".")
    if stage not in stages or not metric:
        raise ValueError(
            f"measure {measure!r}: expected STAGE.METRIC, with a stage of {list(stages)}"
        )
    if stages[stage].run == "prm label":
        raise ValueError(f"measure {measure!r}: `prm label` measures nothing")
    by_problem = PER_PROBLEM.fullmatch(metric)
    trained = stages[stage].run.startswith("train_")
    if by_problem and trained and not metric.startswith("heldout/"):
        raise ValueError(
            f"measure {measure!r}: which answers? {stage}.heldout/{metric} is of the held-out "
            f"problems, {stage}.{metric}:area of the training ones"
        )
    if not (by_problem or WHOLE.fullmatch(metric)):
        raise ValueError(
            f"measure {measure!r}: expected NAME, NAME:area or NAME:to=NUMBER"
        )


def _check_difference(measure: str, stages: Mapping[str, Stage]) -> None:
    """A measure, or a difference of two of the same kind."""
    parts = measure.split(LESS)
    for part in parts:
        _check_measure(part, stages)
    kinds = {bool(PER_PROBLEM.fullmatch(metric)) for _, metric in terms(measure)}
    if len(parts) > 2 or len(kinds) > 1:
        raise ValueError(
            f"measure {measure!r}: expected a difference of two, both of answers or both numbers"
        )


def _check_doses(doses: Mapping[str, float], arms: Container[str]) -> None:
    for arm in doses:
        if arm not in arms:
            raise ValueError(f"doses: {arm!r} is no arm")
    amounts = list(doses.values())
    rising = all(a < b < math.inf for a, b in itertools.pairwise(amounts))
    if len(amounts) < 2 or amounts[0] < 0 or not rising:
        raise ValueError(
            f"doses = {amounts}: expected two amounts or more, from the least on, none below 0"
        )


def _check_checkpoint(stage: Stage, stages: Mapping[str, Stage]) -> None:
    rule = stage.checkpoint
    if not rule:
        return
    upto = list(stages)[: list(stages).index(stage.name) + 1]
    known = [name for name in upto if stages[name].run.startswith("train_")]
    near = set(rule) == {"measure", "near"} and rule["near"] in known
    reach = set(rule) == {"measure", "reach"} and isinstance(rule["reach"], int | float)
    if not (near or reach) or stage.name not in known:
        raise ValueError(
            f"stage {stage.name!r}: checkpoint = {rule}: expected {{ measure = METRIC, reach = "
            f"NUMBER }} or {{ measure = METRIC, near = STAGE }}, with a training of {known}"
        )


def _check_best(
    table: Mapping[str, Any], stages: Mapping[str, Stage], arms: Any
) -> None:
    best = table["best"]
    _known(best, BEST_KEYS, "key of best")
    for key in BEST_KEYS:
        if not best.get(key):
            raise ValueError(f"best: {key} is missing")
    _check_measure(best["measure"], stages)
    if LESS in best["measure"]:
        raise ValueError(
            f"best: a difference, {best['measure']!r}, is no score to choose by"
        )
    upto = best["measure"].split(".")[0]
    known = list(stages)[: list(stages).index(upto) + 1]
    if not _is_key(best["key"], known):
        raise ValueError(
            f"best: key = {best['key']!r}: expected STAGE.KEY, with a stage of {known}, which "
            f"{best['measure']} can depend on"
        )
    if taken := [arm for arm, changes in arms.items() if best["key"] in changes]:
        raise ValueError(
            f"best chooses {best['key']}, but the arm {taken[0]!r} sets it"
        )
    if best["measure"] == table["measures"][0]:
        raise ValueError(
            f"best chooses by the headline {best['measure']!r}: choose by other problems"
        )
    if table.get("budget") in MEASURED:
        raise ValueError(
            f"budget = {table['budget']!r} and best: the baseline's budget would depend on its "
            "best; choose first, in a study of its own"
        )


def _check_event(event: Mapping[str, Any], stages: Mapping[str, Stage]) -> None:
    _known(event, EVENT_KEYS, "key of event")
    stage, _, alarm = event.get("alarm", "").partition(".")
    curves = [name for name in stages if stages[name].run.startswith("train_")]
    if stage not in curves or alarm not in RULES:
        raise ValueError(
            f"event: alarm = {event.get('alarm')!r}: expected STAGE.ALARM, with a training of "
            f"{curves} and an alarm of {', '.join(RULES)}"
        )
    if event.get("ahead", 1) < 1:
        raise ValueError(f"event: ahead = {event['ahead']}: expected at least 1 step")
    for name in event.get("announce", ()):
        if name.startswith("alarm/") and name.removeprefix("alarm/") not in RULES:
            raise ValueError(
                f"event: announce {name!r}: expected an alarm of {', '.join(RULES)}"
            )


Arms = dict[str, dict[str, Any]]


def _arms(table: Mapping[str, Any]) -> tuple[Arms, dict[str, dict[str, str]]]:
    """The arms that the file names, or a recipe and its parts, or the product of its axes, with the
    level of each arm on each of these.
    """
    given = [key for key in FORMS if key in table]
    if len(given) != 1:
        raise ValueError(
            f"expected one of {', '.join(FORMS)}; there are {given or 'none'}"
        )
    if given == ["axes"]:
        axes = {axis: _levels(axis, values) for axis, values in table["axes"].items()}
        arms = {}
        levels = {}
        for names in itertools.product(*axes.values()):
            arm = "_".join(names)
            if arm in arms:
                raise ValueError(f"axes: two arms would have the name {arm!r}")
            parts = [axes[axis][name] for axis, name in zip(axes, names, strict=True)]
            arms[arm] = {key: value for part in parts for key, value in part.items()}
            levels[arm] = dict(zip(axes, names, strict=True))
        return arms, levels
    arms = {name: flat(changes) for name, changes in table[given[0]].items()}
    return {"all": {}, **arms} if given == ["leave_one_out"] else arms, {}


def _levels(axis: str, values: Any) -> Arms:
    """The changes that each level of an axis makes."""
    _check_name("axis", axis)
    if axis == "arm":
        raise ValueError(
            "axis 'arm': that is what the arms are called; expected another name"
        )
    if isinstance(values, list):
        levels = {f"{axis.split('.')[-1]}={value}": {axis: value} for value in values}
        if len(levels) < len(values):
            raise ValueError(f"axis {axis!r}: {values}: one is there twice")
        return levels
    if isinstance(values, dict) and all(isinstance(v, dict) for v in values.values()):
        for level in values:
            _check_name("level", level)
        return {level: flat(changes) for level, changes in values.items()}
    raise ValueError(
        f"axis {axis!r}: expected a list of values of this key, or a table of levels, each with "
        "its keys"
    )


def _is_key(key: str, stages: Container[str]) -> bool:
    """Whether it is STAGE.KEY, with one of these stages."""
    stage, _, inside = key.partition(".")
    return stage in stages and bool(inside)


def _known(table: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
    """ValueError for a key that is not known, or a value of another type."""
    for key, value in table.items():
        if key not in known:
            hint = did_you_mean(key, known) or f"expected one of {', '.join(known)}"
            raise ValueError(f"unknown {what}: {key!r}; {hint}")
        try:
            convert(value, known[key])
        except ValueError as error:
            raise ValueError(f"{what} {key!r}: {error}") from None
