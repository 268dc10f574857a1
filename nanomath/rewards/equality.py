r"""Is a predicted answer equal to the gold one?

A chain of rules, the cheap ones first; the first rule that knows the shape of both answers decides: texts, numbers,
lists and sets, unions, tuples and intervals, relations. What is left are two expressions: `symbolic.py` compares them
in its own process, with math-verify where the `math` extra is installed and the expression is beyond its grammar. Plain
numbers never start that process.

Conventions, the graders' usual ones: 50% equals 0.5 and 50; units are ignored, unless both answers carry one and they
begin differently; a bare list and a set have no order; `x = 5` equals `5`; a decimal of four or more significant digits
equals a fraction or root that rounds to it.
"""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache

from nanomath.rewards.extraction import answer_phrase, find_boxes, last_run
from nanomath.rewards.normalise import Number, clean, enclosed, read_number, same_unit, split, split_unit, unescape
from nanomath.rewards.worker import WORKER

HAVE_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
MAX_TEXT = 8_000  # characters from the end of a text that may hold its answer
MAX_ANSWER = 1_000  # characters of one answer; longer ones are compared as strings only
MAX_ITEMS = 32  # of an unordered list

_DIGITS = re.compile(r"[-+\d.,/%]+")
_SEPARATOR = re.compile(r",|;|\band\b|\bor\b|または|および")
_LOOSE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_APPROX = re.compile(r"\\approx(?![a-zA-Z])")
_EQUALS = re.compile(r"(?<![<>!])=")
_INEQUALITY = re.compile(r"<=|>=|!=|<|>")
_FLIPPED = {">": "<", ">=": "<=", "<": "<", "<=": "<=", "!=": "!="}
_VARIABLE = re.compile(r"(?:[a-zA-Z]|\\[a-z]+)(?:_\w|_\{\w+\})?")
_FREE_LETTER = re.compile(r"(?<![a-zA-Z\\])(?!sin|cos|tan|log|ln|exp|sqrt|pi)[a-df-hj-zA-Z]")  # not e, i, a command
_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)")
_SEGMENT = r"(?<!\\)\$\$?(?:\\\$|[^$])+?(?<!\\)\$\$?|\\\([^)]+?\\\)|\\\[.+?\\\]"
_LINKED = re.compile(
    rf"\b(?:is|are|equals)\s+({_SEGMENT}|[$€£¥]?-?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?![\w^*/+(\\]))", re.DOTALL
)
_WORD = re.compile(r"(?<![\\a-zA-Z])(?!and\b|or\b)[a-zA-Z]{2,}")
_WORDS = re.compile(r"[a-zA-Z' -]+")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:]|\).*|[.:] .*)?")
# Commands that math-verify skips in silence, with what they say: these are compared as texts.
_FRAGMENTS = re.compile(
    r"\\(?:n?mid|equiv|pmod|[cl]?dots|aleph|partial|triangle|angle|perp|parallel|sim|cong|forall|exists|nexists"
    r"|not|[lr](?:floor|ceil))(?![a-zA-Z])"
)
_NOT_SYMBOLIC = re.compile(
    r"(?<![\\a-zA-Z])(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)|sqrt|exp|log|[pv]matrix)[a-zA-Z]{4,}|[^\x00-\x7f]"
)


def answers_equal(gold: str, prediction: str) -> bool:
    """Whether `prediction` is the same answer as `gold`. Either may be a bare answer or a text that ends in one.

    Never hangs and never evaluates its input; callable from any thread. ValueError if `gold` is blank.
    """
    if not gold.strip():
        raise ValueError("a missing gold answer is an error, never a reward")
    gold, prediction = gold.strip(), prediction.strip()
    return gold == prediction or bool(prediction) and _equal_texts(gold[-MAX_TEXT:], prediction[-MAX_TEXT:])


@lru_cache(maxsize=1 << 12)
def _equal_texts(gold: str, prediction: str) -> bool:
    if _DIGITS.fullmatch(gold) and _DIGITS.fullmatch(prediction):  # most answers: not worth the cleaning
        verdict = _numbers(gold, prediction)
        if verdict is not None:
            return verdict
    gold, prediction = isolate(gold), isolate(prediction)
    if max(len(gold), len(prediction)) > MAX_ANSWER:
        return gold == prediction
    try:
        return same(clean(gold), clean(prediction))
    except RecursionError:  # brackets nested hundreds deep are no answer
        return False


def isolate(text: str) -> str:
    r"""The answer in a text: its last run of boxes, what "the answer is" announces, or the value of a sentence.

    A sentence gives its value by a link ("... is 5") or by the only formula it holds; a text without
    sentences is the answer itself.
    """
    text = unescape(text)
    if boxes := find_boxes(text)[0]:
        return last_run(text, boxes)
    text = answer_phrase(text) or text
    prose = re.sub(_SEGMENT, " ", text, flags=re.DOTALL)
    if not _WORD.search(prose):
        return text
    if links := _LINKED.findall(text):
        return links[-1]
    formulas = re.findall(_SEGMENT, text, flags=re.DOTALL)
    return formulas[0] if len(formulas) == 1 and not re.search(r"\d", prose) else text


def same(gold: str, prediction: str) -> bool:
    """Equality of two cleaned answers, or of two parts of them: the verdict of the first rule that has one."""
    for rule in (_texts, _numbers, _lists, _unions, _sequences, _inequalities, _equations):
        verdict = rule(gold, prediction)
        if verdict is not None:
            return verdict
    return _expressions(gold, prediction)


def _texts(gold: str, prediction: str) -> bool | None:
    """Identical but for spaces; words but for case; the letters of a multiple choice."""
    if re.sub(_LOOSE_SPACE, "", gold) == re.sub(_LOOSE_SPACE, "", prediction):
        return gold != ""
    choices = _CHOICE.fullmatch(gold), _CHOICE.fullmatch(prediction)
    if all(choices) and min(len(gold), len(prediction)) <= 3:
        return choices[0][1] == choices[1][1]
    if not (_WORDS.fullmatch(gold) and _WORDS.fullmatch(prediction)):
        return None
    if gold.casefold() == prediction.casefold():
        return True
    return None if min(len(gold), len(prediction)) < 3 else False  # xy may still be yx, but dog is not god


def _numbers(gold: str, prediction: str) -> bool | None:
    left, right = read_number(gold), read_number(prediction)
    if left is None or right is None or left.places is None or right.places is None:
        # 1000,99 is a decimal only beside another decimal: else it may be a list
        left = left or (right and right.places and read_number(gold, european=True))
        right = right or (left and left.places and read_number(prediction, european=True))
    if not (left and right):
        return None
    if _same_number(left, right):
        return True
    return None if "," in gold + prediction else False  # 1,000 may be a list as well


def _same_number(gold: Number, prediction: Number) -> bool:
    if gold.unit and prediction.unit and not same_unit(gold.unit, prediction.unit):
        return False
    tolerance = gold.tolerance if prediction.places is None else prediction.tolerance if gold.places is None else 0
    scales = [1, 100] if gold.percent != prediction.percent else [1]
    low, high = (gold, prediction) if prediction.percent else (prediction, gold)
    return any(abs(low.value * scale - high.value) <= tolerance * scale for scale in scales)


def _items(text: str) -> list[str]:
    r"""The parts of a list or set; p ± q is two of them. Parts of `p=5,q=2;p=7,q=2` are tuples."""
    if text.startswith(r"\{") and text.endswith(r"\}") and enclosed(text[1:-2] + "}", "{", "}"):
        text = text[2:-2]
    groups = [part for part in split(text, ";") if part]
    if len(groups) > 1 and any(len(split(group, ",")) > 1 for group in groups):
        return [group if len(split(group, ",")) == 1 else f"({group})" for group in groups]
    parts = [part for part in split(text, _SEPARATOR) if part]
    return [item for part in parts for item in _plus_minus(part)]


def _plus_minus(text: str) -> list[str]:
    if not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text) or enclosed(text):
        return [text]
    return [re.sub(r"\\pm(?![a-zA-Z])", plus, re.sub(r"\\mp(?![a-zA-Z])", minus, text)) for plus, minus in ("+-", "-+")]


def _lists(gold: str, prediction: str) -> bool | None:
    """Lists and sets in any order; `x = 1, y = 2` is the pair (1, 2) whose order the names give."""
    left, right = _items(gold), _items(prediction)
    if left == [gold] and right == [prediction]:
        return None
    if _is_system(left) == _is_system(right):
        return _match_in_any_order(left, right)
    left, right = ((_sequence(text) or ["", *items, ""])[1:-1] for text, items in ((gold, left), (prediction, right)))
    return _match_in_order(left, right)


def _is_system(items: list[str]) -> bool:
    """Whether every part has a name of its own: `x = 1, y = 2` but not `x = 1, x = 2`."""
    values = [_named_value(item) for item in items]
    return len(items) > 1 and all(values) and len({name for name, _ in values if name}) == len(items)


def _unions(gold: str, prediction: str) -> bool | None:
    left, right = split(gold, _UNION), split(prediction, _UNION)
    return None if len(left) == len(right) == 1 else _match_in_any_order(left, right)


def _match_in_order(gold: list[str], prediction: list[str]) -> bool:
    return len(gold) == len(prediction) and all(map(same, gold, prediction))


def _match_in_any_order(gold: list[str], prediction: list[str]) -> bool:
    if len(gold) != len(prediction) or len(gold) > MAX_ITEMS:
        return False
    rest = list(prediction)
    for item in gold:
        found = next((other for other in rest if same(item, other)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _sequences(gold: str, prediction: str) -> bool | None:
    """Tuples and intervals: the brackets matter, and so does the order."""
    left, right = _sequence(gold), _sequence(prediction)
    if left and right:
        return (left[0], left[-1]) == (right[0], right[-1]) and _match_in_order(left[1:-1], right[1:-1])
    other = prediction if left else gold
    return False if (left or right) and not re.search(r"[=<>]", other) else None


def _sequence(text: str) -> list[str] | None:
    """[opening bracket, parts..., closing bracket] of a tuple or interval, None of anything else."""
    if not enclosed(text):
        return _solution_interval(text)
    parts = split(text[1:-1], ",;")
    return [text[0], *parts, text[-1]] if len(parts) > 1 else None


def _solution_interval(text: str) -> list[str] | None:
    """The interval of `a <= x < b` or `x < b`."""
    parts, operators = split(text, _INEQUALITY), _INEQUALITY.findall(text)
    if "!=" in operators or len({operator[0] for operator in operators}) != 1 or len(parts) != len(operators) + 1:
        return None
    if operators[0][0] == ">":
        parts, operators = parts[::-1], [_FLIPPED[operator] for operator in reversed(operators)]
    if len(parts) == 2 and _VARIABLE.fullmatch(parts[0]):
        parts, operators = [r"-\infty", *parts], ["<", *operators]
    elif len(parts) == 2:
        parts, operators = [*parts, r"\infty"], [*operators, "<"]
    if len(parts) != 3 or not _VARIABLE.fullmatch(parts[1]):
        return None
    return ["[" if operators[0] == "<=" else "(", parts[0], parts[2], "]" if operators[1] == "<=" else ")"]


def _inequalities(gold: str, prediction: str) -> bool | None:
    """-x > -1 and x < 1: one side minus the other, in the same direction, up to a positive factor."""
    if not (_INEQUALITY.search(gold) or _INEQUALITY.search(prediction)):
        return None
    sides = []
    for text in (gold, prediction):
        parts, operators = split(text, _INEQUALITY), _INEQUALITY.findall(text)
        if len(parts) != 2 or len(operators) != 1:
            return False
        low, high = reversed(parts) if operators[0][0] == ">" else parts
        sides.append((_FLIPPED[operators[0]], f"({low})-({high})"))
    (operator, left), (other, right) = sides
    return operator == other and _ask(left, right, relation="=" if operator == "!=" else "<")


def _equations(gold: str, prediction: str) -> bool | None:
    """Values where both sides give one (`x = 5`, `5`), else two equations that are multiples of one another."""
    if all(len(split(text, pattern)) == 1 for pattern in (_EQUALS, _APPROX) for text in (gold, prediction)):
        return None
    left, right = _named_value(gold), _named_value(prediction)
    if left and right and (left[0] == right[0] or not (left[0] and right[0])):
        return same(left[1], right[1])
    sides = [split(text, _EQUALS) for text in (gold, prediction)]
    if any(len(parts) != 2 for parts in sides):
        return False
    left, right = (f"({low})-({high})" for low, high in sides)
    return _ask(left, right, relation="=")


def _named_value(text: str) -> tuple[str, str] | None:
    """(name, value) of `x = 5`, `f(x) = 1`, `5 = x`, `2 + 2 = 4`; name "" where there is none; None of an equation."""
    exact, *rounded = split(text, _APPROX)
    parts = split(exact, _EQUALS)
    if len(parts) == 1:
        return (_name(exact), rounded[0]) if rounded and _name(exact) else ("", exact)
    if len(parts) > 2:
        return _name(parts[0]), parts[-1]
    for name, value in (parts, reversed(parts)):
        if _name(name):
            return _name(name), value
    return None if any(map(_FREE_LETTER.search, parts)) else ("", parts[1])


def _name(text: str) -> str:
    """The name a value is given to, in short: x of `x_1`, W of `W(n)`, (x,y); "" of anything that computes."""
    bare = _SUBSCRIPT.sub("", text).replace(" ", "")
    if not re.search(r"[a-zA-Z]", bare) or re.search(r"[\d+*^<>=-]", bare):
        return ""
    return re.sub(r"(?<=[a-zA-Z])\(.*\)$", "", bare)


def _expressions(gold: str, prediction: str) -> bool:
    left, right = split_unit(gold)[0], split_unit(prediction)[0]
    units = split_unit(gold)[1], split_unit(prediction)[1]
    if any(units):
        return (not all(units) or same_unit(*units)) and same(left, right)
    if _FRAGMENTS.search(left) or _FRAGMENTS.search(right) or _NOT_SYMBOLIC.search(left) or _NOT_SYMBOLIC.search(right):
        return False
    numbers = [number for number in (read_number(left), read_number(right)) if number]
    return _ask(left, right, tolerance=float(max((number.tolerance for number in numbers), default=0)))


def _ask(gold: str, prediction: str, relation: str = "", tolerance: float = 0.0) -> bool:
    """Put the question to the worker; its fields are those of `symbolic.answer`."""
    question = {"gold": gold, "prediction": prediction, "relation": relation, "tolerance": tolerance}
    return WORKER.ask(question | {"math_verify": HAVE_MATH_VERIFY})
