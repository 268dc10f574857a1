"""Solutions whose steps are labelled, from the files that people share, and back to a file.

    trl             {"prompt": .., "completions": [..], "labels": [true, 0.25, null, ..]}     what `write` writes
    math_shepherd   {"input": "question Step 1: .. ки ..", "label": the same with + or - at each ки}  arXiv 2312.08935
    prm800k         {"question": {"problem": ..}, "label": {"steps": [{"completions": [..]}]}}        arXiv 2305.20050
    processbench    {"problem": .., "steps": [..], "label": the first wrong step, or -1}              arXiv 2412.06559

A label is the probability that a step is right: 1, 0, a share of Monte-Carlo samples, or None where nobody has said.
PRM800K's neutral rating is counted as right by Qwen and PURE, as wrong by trl's script: the choice is `neutral`.
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


@dataclass(frozen=True)
class Labelled:
    """A question, the steps of a solution, and a label for each; `place` is where it was read."""

    question: str
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    place: str = ""

    def __post_init__(self) -> None:
        if not self.steps or not all(step.strip() for step in self.steps):
            raise ValueError(f"{self.place}: an empty {'step' if self.steps else 'solution'} cannot be scored")
        if len(self.labels) != len(self.steps):
            raise ValueError(f"{self.place}: {len(self.steps)} steps, but {len(self.labels)} labels")
        for label in self.labels:
            if label is not None and not 0 <= label <= 1:
                raise ValueError(f"{self.place}: the label {label!r} is not between 0 and 1")

    @property
    def first_wrong(self) -> int:
        """The index of the first step whose label is below 1/2, -1 if there is none."""
        return next((k for k, label in enumerate(self.labels) if label is not None and label < 0.5), -1)


def load_labelled(path: str | Path, neutral: str = "right", limit: int = 0) -> list[Labelled]:
    """The labelled solutions of a file (.jsonl, .json, .parquet; also .gz); its format is told by its fields. One row
    of PRM800K is several of them. FileNotFoundError, ValueError with the file and the row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of labelled solutions: {path}")
    found = [solution for place, row in read_records(path) for solution in _solutions(row, place, neutral)]
    if not found:
        raise ValueError(f"{path}: there is no labelled solution in it")
    return found[:limit] if limit else found


def write(path: Path, solutions: Iterable[Labelled]) -> None:
    """Append rows in trl's format."""
    with open(path, "a", encoding="utf-8") as file:
        for s in solutions:
            row = {"prompt": s.question, "completions": list(s.steps), "labels": list(s.labels)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _solutions(row: dict[str, Any], place: str, neutral: str) -> Iterator[Labelled]:
    try:
        if "completions" in row and "labels" in row:
            yield Labelled(row["prompt"], tuple(row["completions"]), tuple(map(_label, row["labels"])), place)
        elif isinstance(row.get("input"), str) and "label" in row:
            yield _math_shepherd(row["input"], row["label"], place)
        elif "problem" in row and "steps" in row:
            yield _processbench(row["problem"], row["steps"], row["label"], place)
        elif isinstance(row.get("question"), dict):
            yield from _prm800k(row["question"]["problem"], row["label"]["steps"], place, NEUTRAL[neutral])
        else:
            raise ValueError(f"{place}: no labelled solution; its fields are: {', '.join(row) or 'none'}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: not a labelled solution: {type(error).__name__} {error}") from None


def _label(label: Any) -> float | None:
    return None if label is None else float(label)


def _math_shepherd(text: str, labelled: str, place: str, marker: str = "ки") -> Labelled:
    *parts, rest = text.split(marker)
    labels, at = [], 0
    for part in parts:  # the labelled text is the same, but for one character in place of each marker
        at += len(part)
        labels.append({"+": 1.0, "-": 0.0}.get(labelled[at : at + 1]))
        if labels[-1] is None or not labelled.startswith(part, at - len(part)):
            raise ValueError(f"{place}: step {len(labels)} has neither + nor - where its marker {marker} stands")
        at += 1
    first = re.search(r"Step 1\b", text)
    if not parts or first is None or rest.strip():
        raise ValueError(f'{place}: expected a question, then "Step 1: .. {marker}" and so on')
    steps = [parts[0][first.start() :], *parts[1:]]
    return Labelled(text[: first.start()].strip(), tuple(step.strip() for step in steps), tuple(labels), place)


def _processbench(question: str, steps: Sequence[str], first_wrong: int, place: str) -> Labelled:
    """What comes after the first wrong step has no label."""
    if not -1 <= first_wrong < len(steps):
        raise ValueError(f"{place}: the first wrong step is {first_wrong}, of {len(steps)} steps")
    labels = [1.0 if k < first_wrong or first_wrong < 0 else None for k in range(len(steps))]
    if first_wrong >= 0:
        labels[first_wrong] = 0.0
    return Labelled(question, tuple(steps), tuple(labels), place)


def _prm800k(question: str, stages: Sequence[dict], place: str, neutral: float | None) -> Iterator[Labelled]:
    """The chosen path, and a solution for every other completion, which ends with it and has a label there alone."""
    value = {1: 1.0, 0: neutral, -1: 0.0, None: None}
    path: list[str] = []
    labels: list[float | None] = []
    for stage in stages:
        chosen, others = stage["chosen_completion"], stage["completions"] or []
        for number, completion in enumerate(others):
            if number != chosen and (rated := value[completion["rating"]]) is not None:
                yield Labelled(question, (*path, completion["text"]), (*[None] * len(path), rated), place)
        step = others[chosen] if chosen is not None else stage.get("human_completion")
        if step is None:  # the labeller found no right step, or gave up
            break
        path.append(step["text"])
        labels.append(value[step["rating"]])
    if any(label is not None for label in labels):
        yield Labelled(question, tuple(path), tuple(labels), place)
