"""One problem: the record that every other room passes around."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GRADES = ("difficulty", "level")  # other numbers are what a problem was made of


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer.

    `id` is unique within its problem set; `answer` is the gold answer as text, never empty;
    `solution` is a worked solution where one is known (the world's have a blank line between
    steps); `metadata` is JSON-serialisable and holds every other field of the record
    (difficulty, subject, language, what an oracle needs).
    """

    id: str
    question: str
    answer: str
    solution: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, str | int | float]:
        """The metadata that sorts problems into kinds: short words, and the numbers in GRADES."""
        return {
            key: value
            for key, value in self.metadata.items()
            if (isinstance(value, str) and len(value) <= 40)
            or (key in GRADES and isinstance(value, int | float))
        }
