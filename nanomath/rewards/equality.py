r"""Is a predicted answer equal to the gold one?

Both are read into typed values (`reading.py`), and a rule for each type compares them; two
values of different types are unequal. Plain numbers are compared exactly. Two expressions are
compared by `symbolic.py` in a process of its own, with math-verify's reader where the `math`
extra is installed and an expression is beyond the grammar there.

Conventions, the graders' usual ones: 50% equals 0.5 and 50; a unit on one side only is
ignored; a bare list and a set have no order; `x = 5` equals `5`; a decimal of four or more
significant digits equals a fraction or root that rounds to it, one of sixteen or more digits
(a binary float) what it stands for.
"""

from __future__ import annotations

import importlib.util
import math
import re
import time
from contextvars import ContextVar
from fractions import Fraction
from functools import lru_cache

from nanomath.rewards.extraction import isolate
from nanomath.rewards.notation import UNIT_LETTERS, clean
from nanomath.rewards.reading import (
    BRACKETS,
    Choice,
    Congruence,
    Items,
    Quantity,
    Relation,
    Text,
    Value,
    read,
    read_number,
)
from nanomath.rewards.worker import WORKER

HAVE_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
MAX_TEXT = 8_000  # characters from the end of a text that may hold its answer
MAX_ANSWER = 1_000  # characters of one answer; longer ones are compared as strings only
MAX_ITEMS = 32  # of an unordered list
# For all questions of one comparison, but the one that is being asked then
SECONDS = 3.0

_deadline: ContextVar[float] = ContextVar("deadline")

_DIGITS = re.compile(r"[-+\d./%]+")
_LOOSE_SPACE = re.compile(r"(?<!\w) | (?!\w)|(?<=\d) (?=[a-zA-Z])|(?<=[a-zA-Z]) (?=\d)")


def answers_equal(gold: str, prediction: str) -> bool:
    """Return whether `prediction` is the same answer as `gold`.

    Either may be a bare answer or a text that ends in one. The function never hangs, never
    evaluates its input, and may be called from any thread. A blank `gold` is a ValueError.
    """
    gold = gold.strip()
    prediction = prediction.strip()
    if not gold:
        raise ValueError("a missing gold answer is an error, never a reward")
    if not prediction or gold == prediction:
        return gold == prediction
    return _equal_texts(gold[-MAX_TEXT:], prediction[-MAX_TEXT:])


@lru_cache(maxsize=1 << 12)
def _equal_texts(gold: str, prediction: str) -> bool:
    # Most answers: not worth the cleaning.
    if _DIGITS.fullmatch(gold) and _DIGITS.fullmatch(prediction):
        left = read_number(gold)
        right = read_number(prediction)
        if left and right:
            return _numbers(left, right)
    gold = isolate(gold)
    prediction = isolate(prediction)
    if max(len(gold), len(prediction)) > MAX_ANSWER:
        return gold == prediction
    _deadline.set(time.monotonic() + SECONDS)
    try:
        return same(clean(gold), clean(prediction))
    except RecursionError:  # brackets nested hundreds deep are no answer
        return False


def same(gold: str, prediction: str) -> bool:
    """Return whether two cleaned answers, or parts of them, are equal in any of their readings."""
    if _plain(gold) == _plain(prediction):
        return gold != ""
    return any(_equal(left, right) for left in read(gold) for right in read(prediction))


def _plain(text: str) -> str:
    return _LOOSE_SPACE.sub("", text)


def _equal(gold: Value, prediction: Value) -> bool:
    if type(gold) is type(prediction):
        return _RULES[type(gold)](gold, prediction)
    return any(_equal(part, prediction) for part in _alone(gold)) or any(
        _equal(gold, part) for part in _alone(prediction)
    )


def _alone(value: Value) -> tuple[Value, ...]:
    """The value of `x = 5`, the element of a set of one: they may stand for the whole."""
    text = _value(value) if isinstance(value, Relation) else ""
    if isinstance(value, Items) and len(value.items) == 1:
        text = value.items[0] if value.items[0] != r"\emptyset" else ""
    return read(text) if text else ()


def _value(relation: Relation) -> str:
    r"""What an equation gives, if all that it says is equal is: 4 of `2 + 2 = 4`, and nothing
    of `2 + 2 = 5 = 4`. What it is rounded to only where nothing exact is said. Nothing of
    `5 \approx 6`, which no rounding makes of it; after a name the exact value counts.
    """
    *others, last = relation.values or [relation.rounded]
    rounded = read_number(relation.rounded)
    if rounded and not relation.name and (exact := read_number(last)):
        unit = Fraction(1, 10 ** max(rounded.places or 0, 0))
        if abs(exact.value - rounded.value) >= max(unit, abs(exact.value) / 10):
            return ""
    return last if all(same(other, last) for other in others) else ""


def _quantities(gold: Quantity, prediction: Quantity) -> bool:
    if gold.value is None or prediction.value is None:
        return _expressions(gold, prediction)
    return _numbers(gold, prediction)


def _numbers(gold: Quantity, prediction: Quantity) -> bool:
    if not gold.unit.fits(prediction.unit):
        return False
    if gold.percent != prediction.percent and any((*gold.unit, *prediction.unit)):
        return False
    same_scale = gold.percent == prediction.percent
    if same_scale and gold.value == prediction.value:
        return True
    tolerance = _tolerance(gold, prediction)
    if same_scale:
        return abs(gold.value - prediction.value) <= tolerance
    share, whole = (prediction, gold) if gold.percent else (gold, prediction)
    return any(
        abs(share.value * scale - whole.value) <= tolerance * scale
        for scale in (1, 100)
    )


def _tolerance(gold: Quantity, prediction: Quantity) -> Fraction:
    """That of the only decimal, or of the only binary float: two that are alike are compared
    as they are written.
    """
    decimals = [number for number in (gold, prediction) if number.places is not None]
    floats = [number for number in decimals if number.is_float]
    only = floats if len(floats) == 1 else decimals
    return only[0].tolerance if len(only) == 1 else Fraction(0)


def _expressions(gold: Quantity, prediction: Quantity) -> bool:
    for number, other in ((gold, prediction), (prediction, gold)):
        if number.value is not None and any(number.unit):
            # Beside 5 metres `5 m` is no product.
            bare = re.fullmatch(rf"(.*\d) ?([{UNIT_LETTERS}])", other.latex)
            if bare and (named := read_number(rf"{bare[1]} \unit{{{bare[2]}}}")):
                return _numbers(number, named)
    if not gold.unit.fits(prediction.unit) or gold.percent or prediction.percent:
        return False
    tolerance = max(gold.tolerance, prediction.tolerance)
    return _plain(gold.latex) == _plain(prediction.latex) or _ask(
        gold.latex, prediction.latex, tolerance=float(tolerance)
    )


def _texts(gold: Text, prediction: Text) -> bool:
    """Words have no case, letters of a formula do."""
    left = _plain(gold.text)
    right = _plain(prediction.text)
    return left.casefold() == right.casefold() and "\\" not in left + right


def _choices(gold: Choice, prediction: Choice) -> bool:
    return gold.letter == prediction.letter and not (gold.label and prediction.label)


def _items(gold: Items, prediction: Items) -> bool:
    """Tuples and intervals are equal in order, others in any; but `x = 1, y = 2` is the pair
    (1, 2) whose order the names give.
    """
    kinds = {gold.kind, prediction.kind}
    listed = [value for value in (gold, prediction) if value.kind not in BRACKETS]
    if not listed:
        names = {gold.name, prediction.name} - {""}
        return len(kinds) == 1 and len(names) < 2 and _in_order(gold, prediction)
    if len(listed) == 1:
        return "()" in kinds and _is_system(listed[0]) and _in_order(gold, prediction)
    if len(kinds) == 2 and "&" in kinds:
        return False
    if len(kinds) == 2 and "U" in kinds:
        (others,) = (value.items for value in listed if value.kind != "U")
        parts = [read(item)[0] for item in others]
        if not all(isinstance(part, Items) and part.name for part in parts):
            return False  # x < 1 or x > 2 is a union as well
    if ">" in kinds or _is_system(gold) != _is_system(prediction):
        return _in_order(gold, prediction)
    if max(len(gold.items), len(prediction.items)) > MAX_ITEMS:
        return False
    once = _distinct if "{" in kinds else list
    return _in_any_order(once(gold.items), once(prediction.items))


def _is_system(value: Items) -> bool:
    """Whether every part has a name of its own: `x = 1, y = 2` but not `x = 1, x = 2`."""
    parts = [read(item)[0] for item in value.items]
    names = {part.name for part in parts if isinstance(part, Relation) and part.values}
    return len(parts) > 1 and len(names - {""}) == len(parts)


def _in_order(gold: Items, prediction: Items) -> bool:
    same_length = len(gold.items) == len(prediction.items)
    return same_length and all(map(same, gold.items, prediction.items))


def _in_any_order(gold: list[str], prediction: list[str]) -> bool:
    if len(gold) != len(prediction):
        return False
    for item in gold:
        found = next((other for other in prediction if _same_item(item, other)), None)
        if found is None:
            return False
        prediction.remove(found)
    return True


def _distinct(items: tuple[str, ...]) -> list[str]:
    kept: list[str] = []
    for item in items:
        if not any(_same_item(item, other) for other in kept):
            kept.append(item)
    return kept


def _same_item(gold: str, prediction: str) -> bool:
    r"""Within a list or set {1} is not 1."""
    return gold.startswith(r"\{") == prediction.startswith(r"\{") and same(
        gold, prediction
    )


def _relations(gold: Relation, prediction: Relation) -> bool:
    """The values of equations where both give one, else whether their differences are
    multiples of one another: 2x - y = 1 and y = 2x - 1, -x > -1 and x < 1.
    """
    if gold.operator != prediction.operator:
        return False
    names_fit = gold.name == prediction.name or not (gold.name and prediction.name)
    if names_fit and all(value.values or value.rounded for value in (gold, prediction)):
        left = _value(gold)
        right = _value(prediction)
        return bool(left and right) and same(left, right)
    return bool(gold.difference and prediction.difference) and _ask(
        gold.difference,
        prediction.difference,
        relation="<" if "<" in gold.operator else "=",
    )


def _congruences(gold: Congruence, prediction: Congruence) -> bool:
    """The same residue of the same modulus; what is reduced may be left out."""
    left = gold.left
    right = prediction.left
    return bool(
        (
            same(left, right)
            if left and right
            else re.fullmatch("[a-zA-Z]?", left + right)
        )
        and same(gold.modulus, prediction.modulus)
        and same(gold.residue, prediction.residue)
    )


def _ask(
    gold: str, prediction: str, relation: str = "", tolerance: float = 0.0
) -> bool:
    """Put the question to the worker; its fields are the arguments of `symbolic.answer`."""
    if time.monotonic() > _deadline.get(math.inf):
        return False
    return WORKER.ask(
        {
            "gold": gold,
            "prediction": prediction,
            "relation": relation,
            "tolerance": tolerance,
            "math_verify": HAVE_MATH_VERIFY,
        }
    )


_RULES = {
    Quantity: _quantities,
    Choice: _choices,
    Text: _texts,
    Items: _items,
    Relation: _relations,
    Congruence: _congruences,
}
