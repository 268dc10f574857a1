"""What every family of problems supplies, and the two things all families share: the split and
the closing sentence.

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
SPLITS = ("train", "validation", "test")
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
    # what of a step is checked against the worked one; by default all of it
    essence: Callable[[str], object] = str


# In another language or wording, with another name or object, it is still the same problem:
# these never decide a split.
SURFACE = {"group", "difficulty", "language", "name", "object", "wording"}


def split_of(metadata: Metadata) -> str:
    """Return the split a problem belongs to: 80 % train, 10 % validation, 10 % test, by a
    hash of its canonical content.
    """
    canonical = {key: value for key, value in metadata.items() if key not in SURFACE}
    digest = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).digest()
    share = int.from_bytes(digest[:8], "big") % 10
    return "train" if share < 8 else SPLITS[share - 7]


CLOSING = {"en": "The answer is \\boxed{%s}.", "ja": "答えは\\boxed{%s}です。"}
