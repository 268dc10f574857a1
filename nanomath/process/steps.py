"""The steps of a solution: where they stand in its text, and on which of its tokens each one
ends.

A process reward is one number for a span of text. The spans of a text tile it: each begins
where the one before ends, and what separates two steps belongs to the first. A step ends on
the first token after which the text is there up to the end of its span, so rewards find their
tokens with any tokenizer: one that merges a blank line with what stands around it, one whose
tokens are parts of a character, one that normalises. Nothing but `decode` is asked of it.

Raw process rewards favour many empty steps ("So,", arXiv 2410.15115): `guarded` merges steps
that are short, that repeat an earlier one word for word, or that are too many, into their
neighbours.
"""

from __future__ import annotations

import os.path
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nanomath.models.tokenizer import Tokenizer

SEPARATORS = {  # what ends a step; the text that it matches belongs to the step before
    "blank_line": re.compile(r"\n[^\S\n]*\n\s*"),
    "line": re.compile(r"\n\s*"),
    "step_k": re.compile(r"\s*(?=^[^\S\n]*Step \d+[:.])", re.MULTILINE),
}


@dataclass(frozen=True)
class Step:
    """text[start:end] of a completion, and the index of the token that it ends on."""

    start: int
    end: int
    token: int


def split_text(text: str, by: str = "blank_line") -> list[tuple[int, int]]:
    """Return the spans [start, end) of the steps of a text, which tile it.

    None is white space alone, and a text that is has none. `by` is a key of SEPARATORS;
    ValueError for another.
    """
    if by not in SEPARATORS:
        raise ValueError(
            f"steps are split by {by!r}: one of {', '.join(SEPARATORS)} was expected"
        )
    spans = []
    start = 0
    for end in [*(match.end() for match in SEPARATORS[by].finditer(text)), len(text)]:
        if text[start:end].strip():
            spans.append((start, end))
            start = end
    if spans:
        spans[-1] = (spans[-1][0], len(text))  # white space at the end
    return spans


def empty_steps(text: str, by: str = "blank_line") -> list[bool]:
    """Return of each step of a text whether it says nothing: it has no digit, or repeats an
    earlier one word for word.
    """
    steps = [text[start:end].split() for start, end in split_text(text, by)]
    return [
        step in steps[:i] or not re.search(r"\d", "".join(step))
        for i, step in enumerate(steps)
    ]


def end_tokens(
    tokenizer: Tokenizer, tokens: Sequence[int], text: str, ends: Sequence[int]
) -> list[int]:
    """Return for each of the ascending character positions `ends` of text = decode(tokens) the
    first token after which so much of the text is there.

    It is found by bisection over what the first tokens decode to.
    """

    @cache
    def there(count: int) -> int:
        """Return how many characters of the text its first `count` tokens make. The bytes of a
        character that is not whole decode to U+FFFD, with byte fallback those before it as
        well: they do not take back what was there.
        """
        most = 0
        for first in range(count, 0, -1):
            made = tokenizer.decode(tokens[:first])
            most = max(most, len(os.path.commonprefix((made, text))))
            if text.startswith(made):
                break
        return most

    return [
        bisect_left(range(len(tokens)), end, key=lambda count: there(count + 1))
        for end in ends
    ]


def steps_of(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    by: str = "blank_line",
    least_tokens: int = 1,
    most_steps: int = 0,
    drop_repeats: bool = False,
) -> list[Step]:
    """Return the steps of a completion, `guarded`; none when it has no text.

    The last one ends on the last token, which may be an eos that has no text.
    """
    text = tokenizer.decode(tokens)
    spans = split_text(text, by)
    if not spans:
        return []
    ends = end_tokens(tokenizer, tokens, text, [end for _, end in spans[:-1]])
    steps = [
        Step(*span, token)
        for span, token in zip(spans, [*ends, len(tokens) - 1], strict=True)
    ]
    return guarded(steps, text, least_tokens, most_steps, drop_repeats)


def texts_of(
    tokenizer: Tokenizer, tokens: Sequence[int], steps: Sequence[Step]
) -> list[str]:
    """Return what the steps of a completion say, white space at their ends included."""
    text = tokenizer.decode(tokens)
    return [text[step.start : step.end] for step in steps]


def guarded(
    steps: Sequence[Step],
    text: str,
    least_tokens: int = 1,
    most_steps: int = 0,
    drop_repeats: bool = False,
) -> list[Step]:
    """Return the steps, fewer of them, whose spans still tile the text.

    One of fewer than `least_tokens` tokens is merged into the next (the last one into the one
    before), one that repeats an earlier one into the one before, and what comes after
    `most_steps` (0: any number) into the last of these. No two end on the same token.
    """
    merged: list[Step] = []
    seen: set[str] = set()
    # of what is not yet part of a step: its first character, and the token before it
    start = 0
    before = -1
    for step in steps:
        wording = text[start : step.end].strip()
        full = most_steps and len(merged) == most_steps
        if step.token - before < max(1, least_tokens) and not full:
            continue
        if merged and (full or (drop_repeats and wording in seen)):
            merged[-1] = Step(merged[-1].start, step.end, step.token)
        else:
            merged.append(Step(start, step.end, step.token))
        seen.add(wording)
        start = step.end
        before = step.token
    if steps and start < steps[-1].end:  # a short end
        first = merged.pop().start if merged else 0
        merged.append(Step(first, steps[-1].end, steps[-1].token))
    return merged
