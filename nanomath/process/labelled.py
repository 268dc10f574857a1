"""Solutions whose steps are labelled, from the files that people share, and back to a file.

    trl             {"prompt": .., "completions": [..], "labels": [true, 0.25, null, ..]}
    math_shepherd   {"input": "question Step 1: .. ки ..", "label": the same, + or - at each ки}
    prm800k         {"question": {"problem": ..}, "label": {"steps": [{"completions": [..]}]}}
    processbench    {"problem": .., "steps": [..], "label": the first wrong step, or -1}

`write` writes the first. The others: arXiv 2312.08935, 2305.20050, 2412.06559.

A label is the probability that a step is right: 1, 0, a share of Monte-Carlo samples, or None
where nobody has said. PRM800K's neutral rating is counted as right by Qwen and PURE, as wrong
by trl's script: the choice is `neutral`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanomath.data.files import json_line
from nanomath.data.problem_sets import read_records
from nanomath.models.stored import naming, whole

NEUTRAL = {"right": 1.0, "wrong": 0.0, "skip": None}
SIGNS = {"+": 1.0, "-": 0.0, "true": 1.0, "false": 0.0}  # labels written as text
KINDS = {str: "text", list: "a list", dict: "an object"}
MARKER = "ки"  # what ends a step in Math-Shepherd's texts


@dataclass(frozen=True)
class Labelled:
    """A question, the steps of a solution, and a label for each; `place` is where it was read."""

    question: str
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    place: str = ""

    def __post_init__(self) -> None:
        if not self.steps or not all(step.strip() for step in self.steps):
            raise ValueError(
                f"an empty {'step' if self.steps else 'solution'} cannot be scored"
            )
        if len(self.labels) != len(self.steps):
            raise ValueError(f"{len(self.steps)} steps, but {len(self.labels)} labels")
        for label in self.labels:
            if label is not None and not 0 <= label <= 1:
                raise ValueError(f"the label {label!r} is not between 0 and 1")

    @property
    def first_wrong(self) -> int:
        """Return the index of the first step whose label is below 1/2, -1 if there is none."""
        wrong = [label is not None and label < 0.5 for label in self.labels]
        return wrong.index(True) if True in wrong else -1


def load_labelled(
    path: str | Path, neutral: str = "right", limit: int = 0
) -> list[Labelled]:
    """Read the labelled solutions of a file (.jsonl, .json, .parquet; also .gz).

    The fields tell the format. One row of PRM800K is several solutions. At most `limit` are
    returned, 0: all. FileNotFoundError, or ValueError with the file and the row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of labelled solutions: {path}")
    found: list[Labelled] = []
    for place, row in read_records(path):
        with naming(place):
            solutions = _solutions(row, NEUTRAL[neutral])
            found += [replace(solution, place=place) for solution in solutions]
    if not found:
        raise ValueError(f"{path}: there is no labelled solution in it")
    return found[:limit] if limit else found


def write(path: Path, solutions: Iterable[Labelled]) -> None:
    """Append rows in trl's format."""
    with open(path, "a", encoding="utf-8") as file:
        for s in solutions:
            row = {"prompt": s.question, "completions": s.steps, "labels": s.labels}
            file.write(json_line(row))


def _solutions(row: Any, neutral: float | None) -> Iterable[Labelled]:
    """The solutions of a row, in whatever format its fields are those of."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named fields, got {row!r:.60}")
    if "completions" in row and "labels" in row:
        return [_trl(row)]
    if "input" in row and "label" in row:
        return [_math_shepherd(row)]
    if "problem" in row and "steps" in row:
        return [_processbench(row)]
    if isinstance(row.get("question"), dict):
        return _prm800k(row, neutral)
    names = ", ".join(" ".join(name.split()) for name in row)
    raise ValueError(f"no labelled solution; its fields are: {names or 'none':.300}")


def _field(row: Any, name: str, kind: type) -> Any:
    """row[name], of type `kind`, a key of KINDS."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with the field {name!r}, got {row!r:.60}")
    if not isinstance(row.get(name), kind):
        raise ValueError(
            f"field {name!r}: expected {KINDS[kind]}, got {row.get(name, 'nothing')!r:.60}"
        )
    return row[name]


def _question(row: dict[str, Any], name: str) -> str:
    """The question in that field, which may be a chat in which the user speaks once."""
    value = row.get(name)
    if isinstance(value, list):
        said = [
            message
            for message in value
            if isinstance(message, dict) and message.get("role") == "user"
        ]
        value = said[0].get("content") if len(said) == 1 else value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"field {name!r}: expected a question, as text or a chat, got {row.get(name)!r:.60}"
        )
    return value


def _steps(row: dict[str, Any], name: str) -> tuple[str, ...]:
    steps = _field(row, name, list)
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str):
            raise ValueError(
                f"step {number} of {name!r}: expected text, got {step!r:.60}"
            )
    return tuple(steps)


def _trl(row: dict[str, Any]) -> Labelled:
    labels = tuple(_label(label) for label in _field(row, "labels", list))
    if labels and not any(label is not None for label in labels):
        raise ValueError("no step has a label")
    return Labelled(_question(row, "prompt"), _steps(row, "completions"), labels)


def _label(label: Any) -> float | None:
    """A label as a probability; it may be written as text."""
    value = SIGNS.get(label.strip().lower(), label) if isinstance(label, str) else label
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"the label {label!r:.60} is neither a number from 0 to 1 nor true, false or null"
        ) from None


def _math_shepherd(row: dict[str, Any]) -> Labelled:
    """The labelled text is the same, but for + or - in place of each marker.

    The first step begins where "Step 1:" last stands before its marker: the question may say
    it as well.
    """
    *parts, rest = _field(row, "input", str).split(MARKER)
    labelled = _field(row, "label", str)
    labels = []
    for part in parts:
        sign = labelled[len(part) : len(part) + 1]
        if not labelled.startswith(part) or sign not in ("+", "-"):
            raise ValueError(
                f"step {len(labels) + 1} has neither + nor - where its marker {MARKER} stands"
            )
        labels.append(SIGNS[sign])
        labelled = labelled[len(part) + 1 :]
    first, *others = parts or [""]
    begins = [*re.finditer(r"\bStep 1:", first)] or [*re.finditer(r"\bStep 1\b", first)]
    begin = begins[-1].start() if begins else 0
    question = first[:begin].strip()
    if not question or rest.strip():
        raise ValueError(f'expected a question, then "Step 1: .. {MARKER}" and so on')
    steps = [step.strip() for step in (first[begin:], *others)]
    if any(re.fullmatch(r"(Step \d+:)?", step) for step in steps):
        raise ValueError("an empty step cannot be scored")
    return Labelled(question, tuple(steps), tuple(labels))


def _processbench(row: dict[str, Any]) -> Labelled:
    """What comes after the first wrong step has no label."""
    steps = _steps(row, "steps")
    wrong = whole(row.get("label"), "the first wrong step", -1, len(steps) - 1)
    right = len(steps) if wrong < 0 else wrong
    labels = [*[1.0] * right, 0.0, *[None] * len(steps)][: len(steps)]
    return Labelled(_question(row, "problem"), steps, tuple(labels))


def _prm800k(row: dict[str, Any], neutral: float | None) -> Iterator[Labelled]:
    """The chosen path, and a solution for every other completion, which ends with it and has a
    label there alone.
    """
    question = _question(row["question"], "problem")
    path: list[str] = []
    labels: list[float | None] = []
    for stage in _field(_field(row, "label", dict), "steps", list):
        nothing = isinstance(stage, dict) and stage.get("completions", ...) is None
        completions = [] if nothing else _field(stage, "completions", list)
        chosen = stage.get("chosen_completion")
        if chosen is not None:
            chosen = whole(chosen, "chosen_completion", 0, len(completions) - 1)
        for number, completion in enumerate(completions):
            rated = _rated(completion, neutral)
            if number != chosen and rated is not None:
                text = _field(completion, "text", str)
                yield Labelled(question, (*path, text), (*[None] * len(path), rated))
        step = stage.get("human_completion") if chosen is None else completions[chosen]
        if step is None:  # the labeller found no right step, or gave up
            break
        path.append(_field(step, "text", str))
        labels.append(_rated(step, neutral))
    if any(label is not None for label in labels):
        yield Labelled(question, tuple(path), tuple(labels))


def _rated(completion: Any, neutral: float | None) -> float | None:
    """The label that PRM800K's rating of -1, 0, 1 or null means."""
    if not isinstance(completion, dict):
        raise ValueError(f"expected a completion with a rating, got {completion!r:.60}")
    rating = completion.get("rating")
    if rating is None:
        return None
    return (0.0, neutral, 1.0)[whole(rating, "rating", -1, 1) + 1]
