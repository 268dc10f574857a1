r"""Find the final answer in a completion.

Looked for in this order, the last occurrence of each: `\boxed{...}` or `\fbox{...}` (the
convention of MATH; several that follow each other are one answer), `<answer>...</answer>`
(DeepSeek-R1), `#### x` (GSM8K), "the answer is ..." and its relatives, and the Japanese and
Chinese forms (MGSM). Nothing else counts unless `lenient`: a guess at "the last number
anywhere" rewards a completion for mentioning numbers, which a policy soon learns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from nanomath.rewards.notation import CHANGING, FONTS, unescape

# Where the reasoning of the usual families of models ends and what counts begins.
REASONING_ENDS = (
    "</think>",
    "</thinking>",
    "</thought>",
    "</reasoning>",
    "</seed:think>",
    "[/THINK]",
    "◁/think▷",
    "<|channel|>final<|message|>",
)

# Full-width ASCII and the ideographic space, as Japanese text writes digits and colons.
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}

_BOX = r"\\(?:boxed|f(?:rame)?box)"
_BOX_START = re.compile(_BOX)
_BOX_TOKEN = re.compile(rf"{_BOX}(?![a-zA-Z])\s*(?P<open>\{{)?|\\.|[{{}}]", re.DOTALL)
# Not a "." after it.
_BARE_BOX = re.compile(
    rf"(?!{_BOX})(?=\\?[^\s${{}}\\]{{0,59}}[^\W_])\\?[^\s${{}}\\]{{1,60}}"
)
_GSM8K = re.compile(r"^.*####[ \t]*(?!Step\b|Part\b|\d+\.\s)(\S.*)$", re.MULTILINE)
# Marks within a box find nothing more.
_NESTED = re.compile(rf"{_BOX}(?![a-zA-Z])\s*|####|</?answer>")
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|$)", re.DOTALL)
_ENGLISH = re.compile(
    r"(?<!wrong )(?<!incorrect )\banswers?\b(?:\s+(?:to|for|of)\s[^.:\n]{1,60}?|, \w+,)?[\s*_]*"
    r"(?:\bis\b|\bare\b|\bequals\b|\b(?:would|must|should) be\b|\bturns out to be\b|:|="
    r"|(?<=\*\*)[ \t]*\n|(?<=[Aa]nswer)[ \t]*\n)"
    r"[\s*_]*:?[\s*_]*"
    r"(?:\b(?:about|approximately|around|roughly|exactly|precisely|simply|just|clearly|indeed"
    r"|only|so|then|thus|hence|therefore|equal to|given by)\b[\s,:*_]*)*",
    re.IGNORECASE,
)
_JAPANESE = re.compile(
    r"(?:答え?|解答|正解|答案)[\s*]*(?:は|是|为|為|:|=|】|[ \t]|\n)[\s*:、]*"
)
_ENGLISH_END = re.compile(
    r"\n|\.(?=\s|\*|$)|<\||</|\s(?:because|since|where|which(?! (?:is|was|seems) (?:\w+ )?"
    r"(?:incorrect|wrong|false|not (?:right|correct|the answer))\b)|(?<!or )so)\b"
)
# What follows a value without a digit or formula: "72, in total", "72 (see above)". A word
# that takes it back does not.
_REMARK = re.compile(
    r"(?<=[\w}$%)]),\s+(?!(?:pi|sqrt)\b)(?=[a-z]{2}|i\.e|e\.g)[^\d$\\=]*$"
    r"|(?<=[\d}$%])\s+\((?!mod\b|(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)(?=[^()]*[a-z]{2})"
    r"[^()\d$\\=]*\)$"
    r"|(?<=\d)!+$"
)
_JAPANESE_END = re.compile(
    r"\n|。|<\||(?:です|である|となる|となります|になる|になります|だ)(?=$|[\s.!。])"
)
_DISPLAY = re.compile(
    r"(\$\$|\$|\\\[|\\\()(.+?)(\$\$|\$|\\\]|\\\))(?=[\s.,。*]*(?:\n|$)|\.\s)", re.DOTALL
)
_SEGMENT = re.compile(
    r"(?<!\\)\$\$?(?:\\\$|[^$])+?(?<!\\)\$\$?|\\\([^)]+?\\\)|\\\[.+?\\\]", re.DOTALL
)
_LINKED = re.compile(
    rf"\b(?:is|are|equals)\s+(?:({_SEGMENT.pattern})(?=\s*(?:[.!<]|$))"
    r"|([$€£¥]?-?\d(?:(?!\bis\b|\bare\b)[^.,;!?<\n]|[.,]\d)*))",
    re.DOTALL,
)
_SENTENCE_START = re.compile(r"[.!?]\s|\n|\b(?:So|Then|Thus|Hence|Therefore)\b")
_BOX_NAME = re.compile(r"(?<![\w\\])[a-zA-Z](?:_\w)? ?= ?$")
_WORD = re.compile(r"(?<![\\a-zA-Z])(?!and\b|or\b)[a-zA-Z]{2,}")
_NOTHING_MORE = re.compile(r"(?: is (?:the|our) (?:final )?answer)?\W*")
# A number, or a word that denies: beside it a formula need not be the value.
_SAYS_MORE = re.compile(
    r"\d|\b(?:not|no|never|neither|nor|except|without|half|twice|double|minus|wrong|false|doubt"
    r"|unless)\b|n't\b"
)
_NUMBER = re.compile(
    r"-?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?:[十百千万億兆][\d,十百千万億兆]*)?"
)


class Box(NamedTuple):
    r"""A box in a text: where `\boxed` starts, where the box ends, what it holds."""

    start: int
    end: int
    content: str


def find_boxes(text: str) -> tuple[list[Box], bool]:
    """Return all outermost boxes of `text` in order, and whether the text ends inside one (a
    cut completion). The time is linear.
    """
    boxes: list[Box] = []
    depth = start = inside = 0
    for token in _BOX_TOKEN.finditer(text):
        if depth:
            depth += (token["open"] or token[0]) == "{"
            depth -= token[0] == "}"
            if not depth:
                boxes.append(
                    Box(start, token.end(), text[inside : token.start()].strip())
                )
        elif token["open"]:
            depth = 1
            start, inside = token.span()
        elif len(token[0]) > 2 and (bare := _BARE_BOX.match(text, token.end())):
            boxes.append(Box(token.start(), bare.end(), bare[0].rstrip(".,")))
    return boxes, depth > 0


def last_run(text: str, boxes: list[Box]) -> str:
    r"""Return what the last of the boxes hold, those without a sentence between them.

    `\boxed{1} and \boxed{2}` is one answer, "1, 2", with the names of `x = \boxed{1}, y =
    \boxed{2}`.
    """
    boxes = [box for box in boxes if box.content] or boxes[-1:]
    *others, last = boxes
    run = [last]
    for box in reversed(others):
        between = text[box.end : run[0].start]
        if len(between) > 60 or re.search(r"\d|[.。]\s|\n\s*\n", between):
            break
        run.insert(0, box)
    if len({box.content for box in run}) == 1:
        return last.content
    if text[run[-2].end : last.start].strip(" $") == "=":
        return last.content
    names = [_BOX_NAME.search(text[max(0, box.start - 20) : box.start]) for box in run]
    return ", ".join(
        (name[0] if name else "") + box.content
        for name, box in zip(names, run, strict=True)
    )


def isolate(text: str) -> str:
    r"""Return the answer in a text that may be one itself: its last run of boxes, what "the
    answer is" announces, or the value of a sentence.

    A sentence gives its value by a link at its end ("... is 5") or by the only formula it
    holds, at its end.
    """
    text = after_reasoning(unescape(text))
    boxes, cut = find_boxes(text)
    if boxes:
        text = last_run(text, boxes)
        words = re.fullmatch(rf"\\(?:{FONTS})\{{([^{{}}]*)\}}", text)
        return (words and answer_phrase(words[1])) or text
    if cut:
        text = re.sub(rf".*{_BOX}\s*\{{", "", text, flags=re.DOTALL)
    text = answer_phrase(text) or text
    prose = _SEGMENT.sub(" ", text)
    if not _WORD.search(prose):
        return text
    if link := _last_match(_LINKED, text):
        before = _SENTENCE_START.split(text[: link.start()])[-1]
        return text if _SAYS_MORE.search(before) else link[1] or link[2]
    formulas = list(_SEGMENT.finditer(text))
    if len(formulas) != 1 or _SAYS_MORE.search(prose):
        return text
    (formula,) = formulas
    return formula[0] if _NOTHING_MORE.fullmatch(text[formula.end() :]) else text


def after_reasoning(text: str, ends: Sequence[str] = REASONING_ENDS) -> str:
    """Return what follows the last mark that ends the reasoning; the whole text where there is
    none.
    """
    starts = [text.rfind(end) + len(end) for end in ends if end and end in text]
    return text[max(starts, default=0) :]


def extract_answer(
    text: str, *, lenient: bool = False, reasoning_ends: Sequence[str] = REASONING_ENDS
) -> str | None:
    r"""Return the final answer of a completion as written, or None where it gives none.

    Text up to a mark of `reasoning_ends` does not count. A completion that was cut inside its
    last `\boxed{` has no answer, and an empty box is none. `lenient` falls back to the last
    number of the text, also where what the answer is said to be holds none: meant for weak
    base models that follow no format yet.
    """
    text = after_reasoning(text, reasoning_ends).translate(HALF_WIDTH)
    boxes, cut = find_boxes(text)
    if cut:  # an early box may have lost its brace: what counts is whether the last is closed
        text = text[_last_match(_BOX_START, text).start() :]
        boxes, cut = find_boxes(text)
    if cut:
        return None
    if boxes:
        return _NESTED.sub(" ", last_run(text, boxes)).strip() or None
    answer = answer_phrase(text)
    if answer is not None and (
        re.search(r"\d", answer) or not re.search("[a-zA-Z]{2}", answer)
    ):
        return answer
    number = _last_match(_NUMBER, text) if lenient else None
    return number[0] if number else answer


def answer_phrase(text: str) -> str | None:
    """Return the answer in `<answer>`, after `####`, "the answer is" or 答えは."""
    if tag := _last_match(_ANSWER_TAG, text):
        return answer_phrase(tag[1]) or _tidy(tag[1])
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
    text = end.split(text, maxsplit=1)[0].rstrip()
    if remark := _REMARK.search(text):
        value = text[: remark.start()]
        changes = CHANGING.intersection(re.findall(r"[\w']+", remark[0].casefold()))
        text = value if re.search(r"\d|\\[a-z]", value) and not changes else text
    return _tidy(text)


def _tidy(answer: str) -> str | None:
    """Without markdown bold, code ticks, quotes, enclosing `$` and the full stop; None if
    nothing is left.
    """
    answer = answer.strip().strip('*`_"“”').rstrip(' .,。*"“”')
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$")
    return answer.strip() or None
