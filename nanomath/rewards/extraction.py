r"""Find the final answer in a completion.

Looked for in this order, the last occurrence of each: `\boxed{...}` or `\fbox{...}` (the convention of MATH; several
that follow each other are one answer), `#### x` (GSM8K), "the answer is ..." and its relatives, and the Japanese and
Chinese forms (MGSM). Nothing else counts unless `lenient`: a guess at "the last number anywhere" rewards a completion
for mentioning numbers, which a policy soon learns.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Full-width ASCII and the ideographic space, as Japanese text writes digits and colons.
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?P<open>\{)?|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"(?!\\(?:boxed|fbox))(?=\\?[^\s${}\\]{0,59}[^\W_])\\?[^\s${}\\]{1,60}")  # not the "." after it
_GSM8K = re.compile(r"^.*####[ \t]*(?!Step\b|Part\b|\d+\.\s)(\S.*)$", re.MULTILINE)
_ENGLISH = re.compile(
    r"\banswers?\b(?:\s+(?:to|for|of)\s[^.:\n]{1,60}?)?[\s*_]*(?:\bis\b|\bare\b|\bequals\b|:|=)[\s*_]*:?[\s*_]*",
    re.IGNORECASE,
)
_JAPANESE = re.compile(r"(?:答え?|解答|正解|答案)[\s*]*(?:は|是|:|=|】|[ \t]|\n)[\s*:、]*")
_ENGLISH_END = re.compile(r"\n|\.(?=\s|\*|$)|<\||\s(?:because|since|where|which)\b")
_JAPANESE_END = re.compile(r"\n|。|<\||(?:です|である|となる|となります|になる|になります|だ)(?=$|[\s.!。])")
_DISPLAY = re.compile(r"(\$\$|\$|\\\[|\\\()(.+?)(\$\$|\$|\\\]|\\\))(?=[\s.,。*]*(?:\n|$)|\.\s)", re.DOTALL)
_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")


class Box(NamedTuple):
    """A box in a text: where `\\boxed` starts, where the box ends, what it holds."""

    start: int
    end: int
    content: str


def find_boxes(text: str) -> tuple[list[Box], bool]:
    r"""All outermost boxes of `text` in order, and whether the text ends inside one (a cut completion). Linear time."""
    boxes: list[Box] = []
    depth = start = inside = 0
    for token in _BOX_TOKEN.finditer(text):
        if depth:
            depth += (token["open"] or token[0]) == "{"
            depth -= token[0] == "}"
            if not depth:
                boxes.append(Box(start, token.end(), text[inside : token.start()].strip()))
        elif token["open"]:
            depth, start, inside = 1, token.start(), token.end()
        elif len(token[0]) > 2 and (bare := _BARE_BOX.match(text, token.end())):
            boxes.append(Box(token.start(), bare.end(), bare[0].rstrip(".,")))
    return boxes, depth > 0


def last_run(text: str, boxes: list[Box]) -> str:
    r"""`\boxed{1} and \boxed{2}` is one answer, "1, 2"; boxes with a sentence between them are not."""
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if re.search(r"\d|[.。]\s|\n\s*\n", text[box.end : run[0].start]) or run[0].start - box.end > 60:
            break
        run.insert(0, box)
    return ", ".join(box.content for box in run)


def extract_answer(text: str, *, lenient: bool = False) -> str | None:
    r"""The final answer of a completion as written, or None where it gives none.

    Text up to a `</think>` is reasoning and does not count. A completion that was cut inside its last `\boxed{` has no
    answer, and an empty box is none. `lenient` falls back to the last number of the text: meant for weak base models
    that follow no format yet.
    """
    text = text.rpartition("</think>")[2].translate(HALF_WIDTH)
    boxes, cut = find_boxes(text)
    if cut:  # an early box may have lost its brace: what counts is whether the *last* one is closed
        text = text[max(text.rfind(r"\boxed"), text.rfind(r"\fbox")) :]
        boxes, cut = find_boxes(text)
    if cut:
        return None
    if boxes:
        return last_run(text, boxes) or None
    return answer_phrase(text) or (_last_number(text) if lenient else None)


def answer_phrase(text: str) -> str | None:
    """The answer after `####`, "the answer is" or 答えは."""
    if gsm8k := _last_match(_GSM8K, text):
        return _tidy(gsm8k[1])
    for phrase, end in ((_ENGLISH, _ENGLISH_END), (_JAPANESE, _JAPANESE_END)):
        if match := _last_match(phrase, text):
            return _until(end, text[match.end() :].lstrip())
    return None


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    match = None
    for match in pattern.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    return match


def _until(end: re.Pattern[str], text: str) -> str | None:
    """The start of `text` up to `end`; a displayed formula is taken whole, over line ends."""
    if formula := _DISPLAY.match(text):
        return _tidy(formula[2])
    match = end.search(text)
    return _tidy(text[: match.start()] if match else text)


def _tidy(answer: str) -> str | None:
    """Without markdown bold, code ticks, enclosing `$` and the full stop; None if nothing is left."""
    answer = answer.strip().strip("*`_").rstrip(" .,。*")
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$")
    return answer.strip() or None


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
