"""What a sampler is asked for: prompts and stop strings in any form that can mean one thing
only, and numbers in range.

Everything else is a ValueError of one line that says what was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from nanomath.models.tokenizer import Tokenizer


def checked(
    name: str, value: Any, kind: type, holds: Callable[[Any], bool], expected: str
) -> Any:
    """Return `value` as an int or a float, whichever `kind` is; NumPy's numbers are
    converted.

    ValueError where it is no such number (a bool is none), or where `holds` refuses it.
    """
    known = isinstance(value, Integral if kind is int else Real) and not isinstance(
        value, bool
    )
    try:
        number = kind(value) if known else None
    except OverflowError:  # an integer beyond any float
        number = None
    if number is None or not holds(number):
        raise ValueError(f"{name} is {_shown(value)}: it must be {expected}")
    return number


def stop_strings(stop: Any) -> tuple[str, ...]:
    """Return the stop strings as a tuple: a single string stands for itself, None for no
    string.

    ValueError for anything else, and for an empty string.
    """
    alone = isinstance(stop, str) or not isinstance(stop, Iterable)
    strings = () if stop is None else (stop,) if alone else tuple(stop)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(
            f"stop is {_shown(stop)}: it must be a string or a list of strings, none of them empty"
        )
    return strings


def token_lists(
    prompts: Any, tokenizer: Tokenizer, vocabulary: int, context: int
) -> list[list[int]]:
    """Return the token ids of every prompt.

    A prompt is a text, which `tokenizer.encode` encodes, or its ids in a list, a tuple, a
    tensor or an array; a prompt that is given alone is a list of one. ValueError for a
    prompt that is empty, has an id outside [0, vocabulary), or does not leave room for a
    token in `context`.
    """
    prompts = _plain(prompts)
    if isinstance(prompts, str) or (
        isinstance(prompts, list) and prompts and {int}.issuperset(map(type, prompts))
    ):
        prompts = [prompts]
    if not isinstance(prompts, list):
        raise ValueError(
            f"prompts is {_shown(prompts)}: it must be a list of texts or of lists of token ids"
        )
    return [
        _ids(prompt, index, tokenizer, vocabulary, context)
        for index, prompt in enumerate(prompts)
    ]


def _ids(
    prompt: Any, index: int, tokenizer: Tokenizer, vocabulary: int, context: int
) -> list[int]:
    if isinstance(prompt, str):
        try:
            ids = tokenizer.encode(prompt)
        except (TypeError, ValueError):  # what the library says of half a surrogate pair
            raise ValueError(
                f"prompt {index} is {_shown(prompt)}: it is no valid Unicode text"
            ) from None
    else:
        ids = _plain(prompt)
    if not isinstance(ids, list) or not {int}.issuperset(map(type, ids)):
        raise ValueError(
            f"prompt {index} is {_shown(prompt)}: it must be a text or a list of token ids"
        )
    if not ids:
        raise ValueError(
            f"prompt {index} is empty: the first token needs something to follow"
        )
    if len(ids) >= context:
        raise ValueError(
            f"prompt {index} has {len(ids)} tokens: the model's context holds {context}"
        )
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(
            f"prompt {index} has a token outside the model's vocabulary of {vocabulary}"
        )
    return ids


def _plain(values: Any) -> Any:
    """Turn a tensor, an array, a tuple or an iterator into a list, and its scalars into
    ints.
    """
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        return values
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def _shown(value: Any) -> str:
    """Return the beginning of the value's repr on one line."""
    return " ".join(f"{value!r:.60}".split())
