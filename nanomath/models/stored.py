"""What stands in the JSON files of a model's directory: read as what it says, or refused in
one line.

Someone else's tool wrote the files, or an editor, or half a download. A value is taken where
it can mean one thing only (2048.0 is 2048); text in place of a number, or a key that is there
twice, is refused and never guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_SIZE = 2**24  # two sizes make a matrix, whose bytes 63 bits must count
LARGEST_COUNT = 2**31 - 1
NUMBERS = (1e-30, 1e30)  # what float32 holds, its square roots and reciprocals too


def read_text(file: Path) -> str:
    """The text in a file; ValueError names the file when it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError names the file when it is not one, or holds what
    no text can.
    """
    text = read_text(file).removeprefix(
        "\ufeff"
    )  # some editors of Windows write a byte order mark
    try:
        content = json.loads(text, object_pairs_hook=_object)
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{file} is JSON that is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError(
            f"{file} holds half a surrogate pair, which is no character"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def read_optional(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file."""
    return read_json(file) if file.is_file() else {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """ValueError where one of two values under the same key would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.60} is there twice")
        found[key] = value
    return found


def one_line(reason: object) -> str:
    """What a library says, or a name of somebody's, in one line of a bearable length."""
    return " ".join(str(reason).split())[:300]


@contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """What the block says against the content of `file` begins with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def whole(value: Any, key: str, least: int = 1, most: int = LARGEST_SIZE) -> int:
    """The whole number that is stored under `key`. ValueError when it is none, or not between
    `least` and `most`.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(
            f"{key} = {value!r:.60} must be a whole number from {least} to {most}"
        )
    return value


def number(value: Any, key: str) -> float:
    """The positive number that is stored under `key`. ValueError when it is none, or beyond
    float32.
    """
    least, most = NUMBERS
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= most
    ):
        raise ValueError(f"{key} = {value!r:.60} must be a number from {least:g} to {most:g}")
    return float(value)


def flag(value: Any, key: str) -> bool:
    """The truth value that is stored under `key`. ValueError when it is another kind of value,
    0 and 1 too.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{key} = {value!r:.60} must be true or false")
    return value


def text(value: Any, key: str) -> str:
    """The text that is stored under `key`. ValueError when it is another kind of value."""
    if not isinstance(value, str):
        raise ValueError(f"{key} = {value!r:.60} must be text")
    return value


def table(value: Any, key: str) -> dict[str, Any]:
    """The object that is stored under `key`, empty for null. ValueError when it is another
    kind of value.
    """
    if not isinstance(value, dict | None):
        raise ValueError(f"{key} = {value!r:.60} must be an object")
    return value or {}
