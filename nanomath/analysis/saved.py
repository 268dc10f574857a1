"""Completions and measurements on disk: what `eval` writes, read again.

save=FILE       a line a completion, with its tokens' ids: `saved=FILE` measures it again
solutions=FILE  the shortest right completion of each problem, a problem set to fine-tune on
eval.json       every number, and of each problem which samples are right and their tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanomath.analysis.evaluation import Graded
from nanomath.data.files import json_line
from nanomath.data.problem import Problem
from nanomath.data.problem_sets import read_records
from nanomath.models.tokenizer import Tokenizer
from nanomath.rollout.known import encode_response, spells
from nanomath.rollout.sampler import Completion

TEXTS = ("problem", "question", "text", "finish_reason")


@dataclass(frozen=True)
class Saved:
    """Stands in for a sampler: `generate` gives the completions that were in a file, `samples` of
    each problem in turn. known: the ids of their tokens were there; without, they are the text's.
    """

    completions: list[Completion]
    samples: int
    known: bool

    def generate(
        self, prompts: Sequence[list[int]], **options: Any
    ) -> list[Completion]:
        return self.completions


def read_completions(
    path: str, problems: Sequence[Problem], tokenizer: Tokenizer
) -> Saved:
    """Read the completions of `problems`.

    ValueError for a file that save=FILE did not write, of other problems, with more completions
    of one problem than of another, or whose ids are of another tokenizer.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"saved: there is no file {path}")
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for place, record in read_records(Path(path)):
        if not isinstance(record, dict) or not all(
            isinstance(record.get(name), str) for name in TEXTS
        ):
            raise ValueError(
                f"{place}: expected what save=FILE writes: {', '.join(TEXTS)}"
            )
        rows.setdefault(record["problem"], []).append((place, record))
    found = []
    most = max(map(len, rows.values()), default=0)
    for prompt, problem in enumerate(problems):
        own = rows.get(problem.id, [])
        if not own or own[0][1]["question"] != problem.question:
            what = "asks something else there" if own else "has no completion"
            raise ValueError(
                f"{path}: completions of other problems: {problem.id!r:.60} {what}"
            )
        if len(own) != most:
            raise ValueError(
                f"{path}: problem {problem.id!r:.60} has {len(own)} completions, another has "
                f"{most}: all must have as many"
            )
        for sample, (place, record) in enumerate(own):
            tokens = _tokens(record, place, tokenizer)
            texts = record["text"], record["finish_reason"]
            found.append(Completion(prompt, sample, tokens, [], [], *texts))
    known = all("ids" in record for own in rows.values() for _, record in own)
    return Saved(found, most, known)


def _tokens(record: dict[str, Any], place: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a completion, its eos included; where the file has none, those of its text."""
    text = record["text"]
    if "ids" not in record:
        ended = record["finish_reason"] == "eos"
        return [*encode_response(tokenizer, text), *[tokenizer.eos_id] * ended] or [
            tokenizer.eos_id
        ]
    ids = record["ids"]
    if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
        raise ValueError(f"{place}: ids: expected the numbers of tokens, at least one")
    if not spells(tokenizer, ids, text, record["finish_reason"]):
        raise ValueError(
            f"{place}: the ids are not the text's: they are of another tokenizer"
        )
    return ids


def shortest_right(graded: Iterable[Graded]) -> Iterator[dict[str, Any]]:
    """The problems that have a right completion which ended by itself, each with the text of the
    shortest as its solution.
    """
    for item in graded:
        pairs = zip(item.completions, item.right, strict=True)
        right = [c for c, ok in pairs if ok and c.finished]
        if right:
            problem = item.problem
            yield {
                **problem.metadata,
                "id": problem.id,
                "question": problem.question,
                "answer": problem.answer,
                "solution": min(right, key=lambda c: c.length).text,
            }


def cluster_of(problem: Problem, by: str) -> object:
    """The value of the label `by`: a problem without it is a cluster by itself."""
    return problem.metadata.get(by, problem.id)


def problems_json(graded: Iterable[Graded], by: str) -> dict[str, Any]:
    """What eval.json says of each problem; `by` is the label that makes clusters."""
    return {
        item.problem.id: {
            "question": item.problem.question,
            "cluster": str(cluster_of(item.problem, by)),
            "right": [int(ok) for ok in item.right],
            "tokens": [c.length for c in item.completions],
        }
        for item in graded
    }


def as_lines(records: Iterable[dict[str, Any]]) -> str:
    """JSONL."""
    return "".join(map(json_line, records))
