"""Stop strings: where in a completion's tokens the first one is complete."""

from __future__ import annotations

from collections.abc import Sequence

from nanomath.models.tokenizer import Tokenizer


def text_before_stop(
    tokenizer: Tokenizer, stops: Sequence[str], tokens: list[int]
) -> str | None:
    """Return the text up to the first stop string, None where there is none.

    Stop strings are looked for in the text as it is shown, and in the text with special
    tokens. Only the tail is decoded, if it shows no stop string and has no special
    token.
    """
    decode = tokenizer.decode
    # A character has at most four bytes, a token at least one.
    tail = tokens[-(4 * max(map(len, stops)) + 4) :]
    shown = decode(tail)
    written = decode(tail, skip_special=False)
    if shown == written and not any(stop in shown for stop in stops):
        return None
    shown = decode(tokens)
    written = decode(tokens, skip_special=False)
    ends = [shown.find(stop) for stop in stops if stop in shown]
    if places := [written.find(stop) for stop in stops if stop in written]:
        ends.append(shown_before(tokenizer, tokens, written, min(places)))
    return shown[: min(ends)] if ends else None


def shown_before(
    tokenizer: Tokenizer, tokens: list[int], written: str, end: int
) -> int:
    """Return how many characters of the shown text come from written[:end], where
    `written` is the text with special tokens.
    """
    decode = tokenizer.decode
    for whole in reversed(range(len(tokens))):  # tokens that end before there
        before = decode(tokens[:whole], skip_special=False)
        if len(before) <= end and written.startswith(before):
            break
    return min(
        len(decode(tokens[:whole])) + end - len(before),
        len(decode(tokens[: whole + 1])),
    )
