"""Reading run directories: what a run was asked for, what it logged, and what its tokens say.

Nothing here needs the run to be finished, or to be of this version: what an older run did not log
is empty, and a last line that was cut short is passed over (nanomath/training/runlog.py).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nanomath import settings
from nanomath.config import to_toml
from nanomath.models.directory import complete_steps
from nanomath.models.tokenizer import load_tokenizer
from nanomath.training.runlog import read_jsonl

KINDS = {
    "grpo": settings.GRPOConfig,
    "sft": settings.SFTConfig,
    "prm": settings.PRMConfig,
}
Record = dict[str, Any]
Curve = tuple[list[int], list[float]]  # the steps and values of a metric


@dataclass(frozen=True)
class Run:
    """One run directory. `config` is its resolved config, one key a setting ("optim.lr");
    `kind` the section that says what it trains ("grpo", "sft", "prm").
    """

    directory: Path
    kind: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.config.get("run.name") or self.directory.name)

    @cached_property
    def lines(self) -> list[Record]:
        """The lines of metrics.jsonl."""
        return self.read("metrics.jsonl")

    @cached_property
    def rollouts(self) -> list[Record]:
        """The episodes of rollouts.jsonl, each with the numbers of its prompt and sample."""
        return list(_placed(self.read("rollouts.jsonl")))

    @cached_property
    def heldout(self) -> list[Record]:
        """The answers to held-out problems, of every measurement; those of `eval` are step 0."""
        return [{"step": 0, **record} for record in self.read("heldout.jsonl")]

    @cached_property
    def sittings(self) -> list[Record]:
        """The objects of run.json."""
        path = self.directory / "run.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return []

    @cached_property
    def series(self) -> dict[str, Curve]:
        """The steps and values of every metric."""
        found: dict[str, Curve] = {}
        for line in self.lines:
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(line["step"])
                    values.append(value)
        return found

    def curve(self, name: str) -> Curve:
        """The steps and values of a metric, none where it was not logged."""
        return self.series.get(name, ([], []))

    def read(self, name: str) -> list[Record]:
        """The records of one of its JSONL files; none where there is no such file."""
        path = self.directory / name
        return list(read_jsonl(path)) if path.exists() else []

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The keys that differ from their defaults, with default and value."""
        defaults = flat(tomllib.loads(to_toml(KINDS[self.kind]())))
        return {
            key: (defaults.get(key), value)
            for key, value in self.config.items()
            if value != defaults.get(key)
        }

    def pieces(self, ids: Iterable[int]) -> dict[int, str] | None:
        """The text of each token; None where the run's tokenizer is not to be found."""
        steps = complete_steps(self.directory / "checkpoints", "tokenizer.json")
        newest = [steps[max(steps)]] if steps else []
        for place in [*newest, Path(self.config.get("model.path", ""))]:
            if (place / "tokenizer.json").is_file():
                backend = load_tokenizer(place).backend
                return {i: piece(backend, i) for i in set(ids)}
        return None


def read_run(directory: str | Path) -> Run:
    """ValueError for what is no run directory, or a run of another kind of config."""
    path = Path(directory)
    config = path / "config.toml"
    if not config.is_file():
        raise ValueError(f"{path} is no run: it holds no config.toml")
    try:
        values = tomllib.loads(config.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{config} cannot be read: {error}") from error
    kind = next((kind for kind in KINDS if kind in values), "")
    if not kind:
        raise ValueError(
            f"{config} is no training config: it has none of {', '.join(KINDS)}"
        )
    return Run(path, kind, flat(values))


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in all runs, with the value of each (None: the
    run has no such key).
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = {key: [run.config.get(key) for run in runs] for key in keys}
    return {
        key: values
        for key, values in rows.items()
        if any(value != values[0] for value in values)
    }


# What the seeds of one method may differ in.
IDENTITY = ("run.name", "run.directory", "run.seed")


def arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ by nothing but their seed, together, by a name that tells them from the
    others: what their configs do not share.
    """
    named = [
        (key, values)
        for key, values in config_differences(runs).items()
        if key not in IDENTITY
    ]
    found: dict[tuple[str, ...], list[Run]] = {}
    for number, run in enumerate(runs):
        words = (f"{key.split('.')[-1]}={values[number]}" for key, values in named)
        found.setdefault(tuple(words), []).append(run)
    alone = {
        key: seeds[0].name if len(seeds) == 1 else "" for key, seeds in found.items()
    }
    distinct = len(set(alone.values())) == len(alone)
    return {
        (alone[key] if distinct and alone[key] else ", ".join(key))
        or seeds[0].name: seeds
        for key, seeds in found.items()
    }


def numbers(record: Record, name: str) -> list[float]:
    """What an episode logged of each of its tokens; nothing where it did not."""
    return per_token(record.get(name, []), len(record["tokens"]))


def per_token(value: list[float] | float, length: int) -> list[float]:
    """One number a token, of which one stands for all where they are the same."""
    return value if isinstance(value, list) else [value] * length


def piece(backend: Any, token: int) -> str:
    """The text of one token, with the space before it that a decoder would take away from the
    first token of a text.
    """
    name = backend.id_to_token(token)
    text = backend.decode([token], skip_special_tokens=False)
    return (
        " " + text if name and name.startswith("\u2581") and text[:1] != " " else text
    )


def _placed(records: list[Record]) -> Iterator[Record]:
    """Each episode with the numbers of its prompt and sample; older logs have them by order."""
    step = problem = None
    prompt = sample = -1
    for record in records:
        if record["step"] != step:
            prompt = -1
        if (record["step"], record.get("problem")) != (step, problem):
            prompt += 1
            sample = -1
        sample += 1
        step = record["step"]
        problem = record.get("problem")
        yield {"prompt": prompt, "sample": sample, **record}
