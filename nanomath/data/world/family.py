"""What every family of problems supplies, and what all families share: the splits and the
closing sentence.

Train, validation and test differ in content. Two more splits differ from train in kind:
"templates" has the content of test in wordings that no other split has, so a gap between the
two is a gap in reading; "numbers" has the wordings of train with numbers outside its range,
so a gap is one in computing.

A family is a few small functions over `metadata`, a JSON-serialisable dictionary that
determines the problem. The oracle needs nothing else, so sampled solutions on disk can be
checked long after they were sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

LANGUAGES = ("en", "ja")
SPLITS = ("train", "validation", "test", "templates", "numbers")
MAX_DIFFICULTY = 8

Metadata = dict[str, Any]


class Family(NamedTuple):
    """The functions of one family of problems."""

    group: str  # "maths", "other_reasoning" or "non_reasoning"
    # (random, difficulty) -> language-neutral content.
    draw: Callable[[Random, int], Metadata]
    question: Callable[[Metadata], str]
    # the worked steps without the closing one, and the answer
    solve: Callable[[Metadata], tuple[list[str], str]]
    # what problems have in common that differ in numbers and names alone
    template: Callable[[Metadata], str]
    # what of a step is checked against the worked one; by default all of it
    essence: Callable[[str], object] = str
    # draw for the split "numbers"; None where a family has no numbers
    draw_beyond: Callable[[Random, int], Metadata] | None = None


# In another language or wording, with another name or object, it is still the same problem:
# these never decide a split.
SURFACE = {
    *("group", "difficulty", "language", "name", "object", "wording"),
    *("held_out", "template", "twin"),
}


def content_hash(metadata: Metadata) -> str:
    """Return 16 hexadecimal digits that the wordings of one problem share."""
    canonical = {key: value for key, value in metadata.items() if key not in SURFACE}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[
        :16
    ]


def split_of(metadata: Metadata) -> str:
    """Return the split a problem belongs to: what it is held out for, or else 80 % train,
    10 % validation, 10 % test, by a hash of its canonical content.
    """
    share = int(content_hash(metadata), 16) % 10
    by_content = "train" if share < 8 else SPLITS[share - 7]
    return metadata.get("held_out", by_content)


def in_japanese(metadata: Metadata) -> bool:
    """Return whether the problem is told in Japanese, not in English."""
    return metadata["language"] == "ja"


def unseen(metadata: Metadata) -> bool:
    """Return whether the problem is told in a wording that training never shows."""
    return metadata.get("held_out") == "templates"


def worded(metadata: Metadata, *wordings: str) -> str:
    """Return the wording of a problem: of English and Japanese, then of the two that training
    never shows.
    """
    return wordings[2 * unseen(metadata) + in_japanese(metadata)]


def rows(table: str) -> list[list[str]]:
    """Return the cells of a table: a row on each line, a bar between two cells."""
    lines = table.strip().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


CLOSING = {"en": "The answer is \\boxed{%s}.", "ja": "答えは\\boxed{%s}です。"}
# What a wordy solution says before a step: it tells nothing, so the oracle does not hear it.
ASIDES = {
    "en": (
        "Let us take the next one. ",
        "And then what happens? ",
        "We go on from here. ",
    ),
    "ja": ("では、次を見ます。", "そして、どうなりますか。", "ここから続けます。"),
}
