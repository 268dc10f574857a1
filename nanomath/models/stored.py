"""The values in the JSON files of a model's directory: read as what they say, or refused in one
line.

A value is taken where it can mean one thing only (2048.0 is 2048); text in place of a number is
refused and never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_SIZE = 2**24  # two sizes make a matrix, whose bytes 63 bits must count
LARGEST_COUNT = 2**31 - 1
NUMBERS = (1e-30, 1e30)  # what float32 holds, its square roots and reciprocals too


def one_line(reason: object) -> str:
    """Return a library's message, or a stored name, in one line of bearable length."""
    return " ".join(str(reason).split())[:300]


@contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Put the name of `file` before the message of a ValueError that the block raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def whole(value: Any, key: str, least: int = 1, most: int = LARGEST_SIZE) -> int:
    """Return the whole number that is stored under `key`.

    ValueError when it is none, or not between `least` and `most`.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not least <= value <= most
    ):
        raise ValueError(
            f"{key} = {value!r:.60} must be a whole number from {least} to {most}"
        )
    return value


def number(value: Any, key: str) -> float:
    """Return the positive number that is stored under `key`.

    ValueError when it is none, or beyond float32.
    """
    least, most = NUMBERS
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= most
    ):
        raise ValueError(
            f"{key} = {value!r:.60} must be a number from {least:g} to {most:g}"
        )
    return float(value)


def flag(value: Any, key: str) -> bool:
    """Return the truth value that is stored under `key`.

    ValueError when it is another kind of value, 0 and 1 too.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{key} = {value!r:.60} must be true or false")
    return value


def text(value: Any, key: str) -> str:
    """Return the text that is stored under `key`. ValueError when it is another kind of
    value.
    """
    if not isinstance(value, str):
        raise ValueError(f"{key} = {value!r:.60} must be text")
    return value


def table(value: Any, key: str) -> dict[str, Any]:
    """Return the object that is stored under `key`, an empty one for null.

    ValueError when it is another kind of value.
    """
    if not isinstance(value, dict | None):
        raise ValueError(f"{key} = {value!r:.60} must be an object")
    return value or {}
