"""Draws problems of any family, and the text that a base model is pre-trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from nanomath.data.problem import Problem

from .family import (
    ASIDES,
    CLOSING,
    LANGUAGES,
    MAX_DIFFICULTY,
    SPLITS,
    Family,
    content_hash,
    split_of,
)
from .maths import MATHS
from .non_reasoning import COPYING, FACT, INSTRUCTION, fact_statements
from .reasoning import BOOLEAN, GRID, SORTING

REGISTRY: dict[str, Family] = {
    "maths": MATHS,
    "sorting": SORTING,
    "grid": GRID,
    "boolean": BOOLEAN,
    "instruction": INSTRUCTION,
    "facts": FACT,
    "copying": COPYING,
}
FAMILIES: dict[str, str] = {name: family.group for name, family in REGISTRY.items()}

PATIENCE = 5_000  # repeats in a row before a split counts as exhausted
STATEMENT_SHARE = 8  # one pre-training document in this many states facts
BETWEEN = "\n\n\n"  # stands between two problems of a document: no solution holds it


def generate(
    family: str,
    split: str,
    count: int,
    seed: int = 0,
    difficulty: tuple[int, int] = (1, 4),
    languages: Sequence[str] = ("en",),
    direct: float = 0.0,
    wordy: float = 0.0,
    shots: int = 0,
    fewer: bool = False,
) -> list[Problem]:
    """Draw `count` distinct problems of one family and split, as a pure function of the
    arguments.

    A share `direct` of the solutions states the answer alone, as people do who work in
    their heads, and a share `wordy` says something idle before every step. Difficulty is
    uniform in the closed range (facts have none: always 1); languages take turns. A longer
    list starts with the shorter one, and another language with the same seed words the same
    problems, as "templates" words those of "test". With `shots` the field of that name holds
    so many worked problems of train, to be put before the question. ValueError for an
    unknown family, split or language, numbers of a family that has none, a range outside
    1..8, or a split that holds too few distinct problems, unless `fewer` will do.
    """
    check_request(family, split, count, difficulty, languages)
    random = Random(f"{family}/{'test' if split == 'templates' else split}/{seed}")
    problems: dict[str, Problem] = {}
    repeats = 0
    while len(problems) < count:
        language = languages[len(problems) % len(languages)]
        problem = draw_problem(
            random, family, split, difficulty, language, direct, wordy
        )
        repeats = repeats + 1 if problem.id in problems else 0
        if repeats == PATIENCE:
            if fewer:
                break
            raise ValueError(
                f"{family}/{split} at difficulty {difficulty} has only {len(problems)} "
                f"distinct problems, fewer than count={count}: "
                "ask for fewer or widen the difficulty"
            )
        problems[problem.id] = problem
    if shots:
        return [with_shots(problem, shots, difficulty) for problem in problems.values()]
    return list(problems.values())


def check_request(
    family: str,
    split: str,
    count: int,
    difficulty: tuple[int, int],
    languages: Sequence[str],
) -> None:
    """Raise a ValueError for a family, split, count, difficulty or language that there is
    not.
    """
    if family not in REGISTRY:
        raise ValueError(f"unknown family {family!r}: one of {', '.join(REGISTRY)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if split == "numbers" and not REGISTRY[family].draw_beyond:
        numerate = [name for name in REGISTRY if REGISTRY[name].draw_beyond]
        raise ValueError(
            f"{family} has no numbers: the split 'numbers' is of {', '.join(numerate)}"
        )
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if not 1 <= difficulty[0] <= difficulty[1] <= MAX_DIFFICULTY:
        raise ValueError(
            f"difficulty must be a range (low, high) within 1..{MAX_DIFFICULTY}, got {difficulty}"
        )
    if not languages or not set(languages) <= set(LANGUAGES):
        raise ValueError(
            f"languages must be some of {', '.join(LANGUAGES)}, got {languages!r}"
        )


def draw_problem(
    random: Random,
    family: str,
    split: str,
    difficulty: tuple[int, int],
    language: str,
    direct: float = 0.0,
    wordy: float = 0.0,
) -> Problem:
    """Draw problems until one belongs to the split, and return it."""
    maker = REGISTRY[family]
    draw = maker.draw_beyond if split == "numbers" else maker.draw
    while True:
        level = random.randint(*difficulty)
        metadata = {
            "family": family,
            "group": maker.group,
            "difficulty": level,
            "language": language,
            **draw(random, level),
        }
        by_content = split_of(metadata)
        if split == "numbers" or by_content == (
            "test" if split == "templates" else split
        ):
            break
    if split in ("templates", "numbers"):
        metadata["held_out"] = split
    steps, answer = maker.solve(metadata)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    name = f"{family}-{language}-{digest[:16]}"
    style = Random(name)
    chance = style.random()
    if chance < direct:
        steps = []
    elif chance < direct + wordy:
        steps = [style.choice(ASIDES[language]) + step for step in steps]
    return Problem(
        id=name,
        question=maker.question(metadata),
        answer=answer,
        solution="\n\n".join([*steps, CLOSING[language] % answer]),
        metadata={
            **metadata,
            "template": maker.template(metadata),
            "twin": content_hash(metadata),
        },
    )


def with_shots(problem: Problem, count: int, difficulty: tuple[int, int]) -> Problem:
    """Add the field `shots`: `count` worked problems of the train split, of the same family
    and language, as a document of pre-training has them before another problem.
    """
    random = Random(f"shots/{problem.id}")
    kind = problem.metadata["family"], "train", difficulty, problem.metadata["language"]
    worked = [as_text(draw_problem(random, *kind)) for _ in range(count)]
    shots = "".join(text + BETWEEN for text in worked)
    return replace(problem, metadata={**problem.metadata, "shots": shots})


def as_text(problem: Problem) -> str:
    return f"{problem.question}\n{problem.solution}"


def pretraining_documents(
    count: int,
    seed: int = 0,
    difficulty: tuple[int, int] = (1, 4),
    families: Sequence[str] = tuple(REGISTRY),
    languages: Sequence[str] = LANGUAGES,
    direct: float = 0.0,
    wordy: float = 0.0,
    problems: int = 1,
) -> list[str]:
    """Return `count` plain texts in random order: worked problems of the families' train
    splits, up to `problems` of one kind in a text, and statements of the facts.

    Every fact is stated in each language, whatever split its question is in. ValueError if
    `count` is too small.
    """
    for family in families:
        check_request(family, "train", count, difficulty, languages)
    statements = [
        statement
        for language in languages
        if "facts" in families
        for statement in fact_statements(language)
    ]
    if count < len(statements):
        raise ValueError(
            f"count={count} is too small to state every fact: at least {len(statements)}"
        )
    random = Random(f"pretraining/{seed}")
    documents = statements * max(
        1, count // (STATEMENT_SHARE * max(1, len(statements)))
    )
    while len(documents) < count:
        family = random.choice(families)
        language = random.choice(languages)
        several = random.randint(1, problems) if problems > 1 else 1
        kind = family, "train", difficulty, language, direct, wordy
        texts = [as_text(draw_problem(random, *kind)) for _ in range(several)]
        documents.append(BETWEEN.join(texts))
    random.shuffle(documents)
    return documents
