"""Solutions whose steps are labelled, from the files that people share, and back to a file.

    trl             {"prompt": .., "completions": [..], "labels": [true, 0.25, null, ..]}     what `write` writes
    math_shepherd   {"input": "question Step 1: .. ки ..", "label": the same with + or - at each ки}  arXiv 2312.08935
    prm800k         {"question": {"problem": ..}, "label": {"steps": [{"completions": [..]}]}}        arXiv 2305.20050
    processbench    {"problem": .., "steps": [..], "label": the first wrong step, or -1}              arXiv 2412.06559

A label is the probability that a step is right: 1, 0, a share of Monte-Carlo samples, or None
where nobody has said. PRM800K's neutral rating is counted as right by Qwen and PURE, as wrong
by trl's script: the choice is `neutral`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanomath.data.problem_sets import read_records

NEUTRAL = {"right": 1.0, "wrong": 0.0, "skip": None}
SIGNS = {"+": 1.0, "-": 0.0, "true": 1.0, "false": 0.0}  # labels written as text
KINDS = {str: "text", list: "a list", dict: "an object"}


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
                f"{self.place}: an empty {'step' if self.steps else 'solution'} cannot be scored"
            )
        if len(self.labels) != len(self.steps):
            raise ValueError(
                f"{self.place}: {len(self.steps)} steps, but {len(self.labels)} labels"
            )
        for label in self.labels:
            if label is not None and not 0 <= label <= 1:
                raise ValueError(f"{self.place}: the label {label!r} is not between 0 and 1")

    @property
    def first_wrong(self) -> int:
        """The index of the first step whose label is below 1/2, -1 if there is none."""
        return next(
            (k for k, label in enumerate(self.labels) if label is not None and label < 0.5), -1
        )


def load_labelled(path: str | Path, neutral: str = "right", limit: int = 0) -> list[Labelled]:
    """The labelled solutions of a file (.jsonl, .json, .parquet; also .gz); its format is told
    by its fields. One row of PRM800K is several of them. FileNotFoundError, ValueError with
    the file and the row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of labelled solutions: {path}")
    found = [
        solution
        for place, row in read_records(path)
        for solution in _solutions(row, place, neutral)
    ]
    if not found:
        raise ValueError(f"{path}: there is no labelled solution in it")
    return found[:limit] if limit else found


def write(path: Path, solutions: Iterable[Labelled]) -> None:
    """Append rows in trl's format."""
    with open(path, "a", encoding="utf-8") as file:
        for s in solutions:
            row = {
                "prompt": s.question,
                "completions": list(s.steps),
                "labels": list(s.labels),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _solutions(row: Any, place: str, neutral: str) -> Iterator[Labelled]:
    """The solutions of a row, in whatever format its fields are those of."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with named fields, got {row!r:.60}")
    if "completions" in row and "labels" in row:
        yield _trl(row, place)
    elif "input" in row and "label" in row:
        yield _math_shepherd(
            _field(row, "input", str, place), _field(row, "label", str, place), place
        )
    elif "problem" in row and "steps" in row:
        yield _processbench(row, place)
    elif isinstance(row.get("question"), dict):
        stages = _field(_field(row, "label", dict, place), "steps", list, place)
        yield from _prm800k(
            _question(row["question"], "problem", place), stages, place, NEUTRAL[neutral]
        )
    else:
        names = ", ".join(" ".join(name.split()) for name in row)
        raise ValueError(
            f"{place}: no labelled solution; its fields are: {names or 'none':.300}"
        )


def _field(row: Any, name: str, kind: type, place: str) -> Any:
    """row[name], of type `kind`, a key of KINDS."""
    if not isinstance(row, dict):
        raise ValueError(
            f"{place}: expected an object with the field {name!r}, got {row!r:.60}"
        )
    if not isinstance(row.get(name), kind):
        raise ValueError(
            f"{place}: field {name!r}: expected {KINDS[kind]}, got {row.get(name, 'nothing')!r:.60}"
        )
    return row[name]


def _question(row: dict[str, Any], name: str, place: str) -> str:
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
            f"{place}: field {name!r}: expected a question, as text or a chat, got {row.get(name)!r:.60}"
        )
    return value


def _steps(row: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    steps = _field(row, name, list, place)
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str):
            raise ValueError(
                f"{place}: step {number} of {name!r}: expected text, got {step!r:.60}"
            )
    return tuple(steps)


def _index(
    value: Any, least: int, entries: Sequence[Any], what: str, of: str, place: str
) -> int:
    """An index of the entries, from `least` on; tables make floats of integers."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value not in range(least, len(entries))
    ):
        raise ValueError(f"{place}: {what} is {value!r:.60}, of {len(entries)} {of}")
    return int(value)


def _trl(row: dict[str, Any], place: str) -> Labelled:
    labels = tuple(_label(label, place) for label in _field(row, "labels", list, place))
    if labels and not any(label is not None for label in labels):
        raise ValueError(f"{place}: no step has a label")
    return Labelled(
        _question(row, "prompt", place), _steps(row, "completions", place), labels, place
    )


def _label(label: Any, place: str) -> float | None:
    """A label as a probability; it may be written as text."""
    value = SIGNS.get(label.strip().lower(), label) if isinstance(label, str) else label
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{place}: the label {label!r:.60} is neither a number from 0 to 1 nor true, false or null"
        ) from None


def _math_shepherd(text: str, labelled: str, place: str, marker: str = "ки") -> Labelled:
    """The first step begins where "Step 1:" last stands before its marker: the question may
    say it as well.
    """
    *parts, rest = text.split(marker)
    labels = []
    at = 0
    for (
        part
    ) in parts:  # the labelled text is the same, but for one character in place of each marker
        at += len(part)
        labels.append({"+": 1.0, "-": 0.0}.get(labelled[at : at + 1]))
        if labels[-1] is None or not labelled.startswith(part, at - len(part)):
            raise ValueError(
                f"{place}: step {len(labels)} has neither + nor - where its marker {marker} stands"
            )
        at += 1
    begins = (
        [list(re.finditer(pattern, parts[0])) for pattern in (r"\bStep 1:", r"\bStep 1\b")]
        if parts
        else [[], []]
    )
    first = next((found[-1].start() for found in begins if found), 0)
    question = text[:first].strip()
    if not question or rest.strip():
        raise ValueError(f'{place}: expected a question, then "Step 1: .. {marker}" and so on')
    steps = [step.strip() for step in (parts[0][first:], *parts[1:])]
    if any(re.fullmatch(r"(Step \d+:)?", step) for step in steps):
        raise ValueError(f"{place}: an empty step cannot be scored")
    return Labelled(question, tuple(steps), tuple(labels), place)


def _processbench(row: dict[str, Any], place: str) -> Labelled:
    """What comes after the first wrong step has no label."""
    steps = _steps(row, "steps", place)
    first_wrong = _index(row.get("label"), -1, steps, "the first wrong step", "steps", place)
    labels = [1.0 if k < first_wrong or first_wrong < 0 else None for k in range(len(steps))]
    if first_wrong >= 0:
        labels[first_wrong] = 0.0
    return Labelled(_question(row, "problem", place), steps, tuple(labels), place)


def _prm800k(
    question: str, stages: Sequence[Any], place: str, neutral: float | None
) -> Iterator[Labelled]:
    """The chosen path, and a solution for every other completion, which ends with it and has a
    label there alone.
    """
    path: list[str] = []
    labels: list[float | None] = []
    for stage in stages:
        nothing = isinstance(stage, dict) and stage.get("completions", ...) is None
        others = [] if nothing else _field(stage, "completions", list, place)
        chosen = stage.get("chosen_completion")
        if chosen is not None:
            chosen = _index(chosen, 0, others, "chosen_completion", "completions", place)
        for number, completion in enumerate(others):
            rated = _rated(completion, neutral, place)
            if number != chosen and rated is not None:
                text = _field(completion, "text", str, place)
                yield Labelled(question, (*path, text), (*[None] * len(path), rated), place)
        step = others[chosen] if chosen is not None else stage.get("human_completion")
        if step is None:  # the labeller found no right step, or gave up
            break
        path.append(_field(step, "text", str, place))
        labels.append(_rated(step, neutral, place))
    if any(label is not None for label in labels):
        yield Labelled(question, tuple(path), tuple(labels), place)


def _rated(completion: Any, neutral: float | None, place: str) -> float | None:
    """The label that PRM800K's rating means."""
    rating = completion.get("rating") if isinstance(completion, dict) else ""
    if rating is None:
        return None
    if (
        isinstance(rating, bool)
        or not isinstance(rating, int | float)
        or rating not in (-1, 0, 1)
    ):
        raise ValueError(
            f"{place}: expected a completion with a rating of -1, 0, 1 or null, got {completion!r:.60}"
        )
    return {1: 1.0, 0: neutral, -1: 0.0}[rating]
