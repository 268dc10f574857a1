r"""Is a predicted answer equal to the gold one?

Both are read into typed values (`reading.py`), and a rule for each pair of types compares
them; a pair without a rule is unequal. Plain numbers are compared exactly. Two expressions are
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
from collections.abc import Callable
from contextvars import ContextVar
from fractions import Fraction
from functools import lru_cache

from nanomath.rewards.extraction import isolate
from nanomath.rewards.notation import UNIT_LETTERS, clean
from nanomath.rewards.reading import (
    Based,
    Choice,
    Congruence,
    Equation,
    Expression,
    Inequality,
    Items,
    Number,
    Sequence,
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
SECONDS = 3.0  # for all questions of one comparison, but the one that is being asked then

_deadline: ContextVar[float] = ContextVar("deadline")

_DIGITS = re.compile(r"[-+\d.,/%]+")
_LOOSE_SPACE = re.compile(r"(?<!\w) | (?!\w)|(?<=\d) (?=[a-zA-Z])|(?<=[a-zA-Z]) (?=\d)")


def answers_equal(gold: str, prediction: str) -> bool:
    """Whether `prediction` is the same answer as `gold`. Either may be a bare answer or a text
    that ends in one.

    Never hangs and never evaluates its input; callable from any thread. ValueError if `gold`
    is blank.
    """
    if not gold.strip():
        raise ValueError("a missing gold answer is an error, never a reward")
    gold = gold.strip()
    prediction = prediction.strip()
    return (
        gold == prediction
        or bool(prediction)
        and _equal_texts(gold[-MAX_TEXT:], prediction[-MAX_TEXT:])
    )


@lru_cache(maxsize=1 << 12)
def _equal_texts(gold: str, prediction: str) -> bool:
    # Most answers: not worth the cleaning.
    if _DIGITS.fullmatch(gold) and _DIGITS.fullmatch(prediction):
        left = read_number(gold)
        right = read_number(prediction)
        if left and right and "," not in gold + prediction:
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
    """Equality of two cleaned answers, or of two parts of them, in any of their readings."""
    if _plain(gold) == _plain(prediction):
        return gold != ""
    return any(_equal(left, right) for left in read(gold) for right in read(prediction))


def _plain(text: str) -> str:
    return _LOOSE_SPACE.sub("", text)


def _equal(gold: Value, prediction: Value) -> bool:
    if rule := _RULES.get((type(gold), type(prediction))):
        return rule(gold, prediction)
    alone = _only_part(gold)
    if alone is not None and any(_equal(part, prediction) for part in read(alone)):
        return True
    alone = _only_part(prediction)
    return alone is not None and any(_equal(gold, part) for part in read(alone))


def _only_part(value: Value) -> str | None:
    """The value of `x = 5`, the element of a set of one: they may stand beside it."""
    if isinstance(value, Equation):
        return _value(value)
    one = (
        isinstance(value, Items)
        and len(value.items) == 1
        and value.items[0] != r"\emptyset"
    )
    return value.items[0] if one else None


def _value(equation: Equation) -> str | None:
    """What an equation gives, if all that it says is equal is: 4 of `2 + 2 = 4`, and nothing
    of `2 + 2 = 5 = 4`. What it is rounded to only where nothing exact is said.
    """
    *others, last = equation.values or [equation.rounded or None]
    return last if last is not None and all(same(other, last) for other in others) else None


def _numbers(gold: Number, prediction: Number) -> bool:
    if not gold.unit.fits(prediction.unit):
        return False
    if gold.percent != prediction.percent and any((*gold.unit, *prediction.unit)):
        return False
    if gold.percent == prediction.percent:
        return gold.value == prediction.value or abs(
            gold.value - prediction.value
        ) <= _tolerance(gold, prediction)
    share, whole = (prediction, gold) if gold.percent else (gold, prediction)
    tolerance = _tolerance(gold, prediction)
    return any(
        abs(share.value * scale - whole.value) <= tolerance * scale for scale in (1, 100)
    )


def _tolerance(gold: Number, prediction: Number) -> Fraction | int:
    """That of the only decimal, or of the only binary float: two that are alike are compared
    as they are written.
    """
    decimals = [number for number in (gold, prediction) if number.places is not None]
    floats = [number for number in decimals if len(number.latex) > 15 and number.is_float]
    only = floats if len(floats) == 1 else decimals
    return only[0].tolerance if len(only) == 1 else 0


def _texts(gold: Text, prediction: Text) -> bool:
    """Words have no case, letters of a formula do."""
    left = _plain(gold.text)
    right = _plain(prediction.text)
    return left.casefold() == right.casefold() and "\\" not in left + right


def _choices(gold: Choice, prediction: Choice) -> bool:
    return gold.letter == prediction.letter and (not gold.label or not prediction.label)


def _sequences(gold: Sequence, prediction: Sequence) -> bool:
    brackets = (gold.opening, gold.closing) == (prediction.opening, prediction.closing)
    names = {gold.name, prediction.name} - {""}
    return brackets and len(names) < 2 and _in_order(gold.items, prediction.items)


def _items(gold: Items, prediction: Items) -> bool:
    """In any order; but `x = 1, y = 2` is the pair (1, 2) whose order the names give."""
    if "&" in (gold.kind, prediction.kind) and gold.kind != prediction.kind:
        return False
    if "U" in (gold.kind, prediction.kind) and gold.kind != prediction.kind:
        listed = prediction.items if gold.kind == "U" else gold.items
        if not all(
            isinstance(read(item)[0], Sequence) and read(item)[0].name for item in listed
        ):
            return False  # x < 1 or x > 2 is a union as well
    if _is_system(gold) != _is_system(prediction):
        return _in_order(gold.items, prediction.items)
    left = gold.items
    right = prediction.items
    if ">" in (gold.kind, prediction.kind):
        return _in_order(left, right)
    if "{" in (gold.kind, prediction.kind) and max(len(left), len(right)) <= MAX_ITEMS:
        left = _distinct(left)
        right = _distinct(right)
    return _in_any_order(left, right)


def _is_system(value: Items) -> bool:
    """Whether every part has a name of its own: `x = 1, y = 2` but not `x = 1, x = 2`."""
    parts = [read(item)[0] for item in value.items]
    names = {
        part.name
        for part in parts
        if isinstance(part, Equation) and part.values and part.name
    }
    return len(parts) > 1 and len(names) == len(parts)


def _system(gold: Value, prediction: Value) -> bool:
    """`x = 1, y = 2` beside the pair (1, 2)."""
    system, pair = (gold, prediction) if isinstance(gold, Items) else (prediction, gold)
    return (
        _is_system(system)
        and pair.opening + pair.closing == "()"
        and _in_order(gold.items, prediction.items)
    )


def _in_order(gold: tuple[str, ...], prediction: tuple[str, ...]) -> bool:
    return len(gold) == len(prediction) and all(map(same, gold, prediction))


def _distinct(items: tuple[str, ...]) -> tuple[str, ...]:
    kept: list[str] = []
    for item in items:
        if not any(_same_item(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)


def _same_item(gold: str, prediction: str) -> bool:
    r"""Within a list or set {1} is not 1."""
    return gold.startswith(r"\{") == prediction.startswith(r"\{") and same(gold, prediction)


def _in_any_order(gold: tuple[str, ...], prediction: tuple[str, ...]) -> bool:
    if len(gold) != len(prediction) or len(gold) > MAX_ITEMS:
        return False
    rest = list(prediction)
    for item in gold:
        found = next((other for other in rest if _same_item(item, other)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _inequalities(gold: Inequality, prediction: Inequality) -> bool:
    """-x > -1 and x < 1: one side minus the other, in the same direction, up to a positive factor."""
    left, right = (f"({value.left})-({value.right})" for value in (gold, prediction))
    relation = "=" if gold.operator == "!=" else "<"
    return gold.operator == prediction.operator and _ask(left, right, relation=relation)


def _equations(gold: Equation, prediction: Equation) -> bool:
    """Their values where both give one, else two equations that are multiples of one another."""
    names_fit = gold.name == prediction.name or not (gold.name and prediction.name)
    if names_fit and all(value.values or value.rounded for value in (gold, prediction)):
        left = _value(gold)
        right = _value(prediction)
        return left is not None and right is not None and same(left, right)
    sides = [equation.text.split("=") for equation in (gold, prediction)]
    if any(len(parts) != 2 for parts in sides):
        return False
    left, right = (f"({low})-({high})" for low, high in sides)
    return _ask(left, right, relation="=")


def _congruences(gold: Congruence, prediction: Congruence) -> bool:
    """The same residue of the same modulus; what is reduced may be left out."""
    left = gold.left
    right = prediction.left
    if not (
        same(left, right) if left and right else re.fullmatch("[a-zA-Z]?", left + right)
    ):
        return False
    return same(gold.modulus, prediction.modulus) and same(gold.residue, prediction.residue)


def _expressions(gold: Number | Expression, prediction: Number | Expression) -> bool:
    numbers = [value for value in (gold, prediction) if isinstance(value, Number)]
    if len(numbers) == 1 and any(numbers[0].unit):  # beside 5 metres `5 m` is no product
        other = prediction if numbers[0] is gold else gold
        bare = re.fullmatch(rf"(.*\d) ?([{UNIT_LETTERS}])", other.latex)
        if bare and (named := read_number(rf"{bare[1]} \unit{{{bare[2]}}}")):
            return _numbers(numbers[0], named)
    if not gold.unit.fits(prediction.unit) or any(number.percent for number in numbers):
        return False
    tolerance = float(max((number.tolerance for number in numbers), default=0))
    return _plain(gold.latex) == _plain(prediction.latex) or _ask(
        gold.latex, prediction.latex, tolerance=tolerance
    )


def _ask(gold: str, prediction: str, relation: str = "", tolerance: float = 0.0) -> bool:
    """Put the question to the worker; its fields are those of `symbolic.answer`."""
    if time.monotonic() > _deadline.get(math.inf):
        return False
    question = {
        "gold": gold,
        "prediction": prediction,
        "relation": relation,
        "tolerance": tolerance,
    }
    return WORKER.ask(question | {"math_verify": HAVE_MATH_VERIFY})


_RULES: dict[tuple[type, type], Callable[..., bool]] = {
    (Number, Number): _numbers,
    (Based, Based): lambda gold, prediction: gold == prediction,
    (Choice, Choice): _choices,
    (Text, Text): _texts,
    (Sequence, Sequence): _sequences,
    (Items, Items): _items,
    (Items, Sequence): _system,
    (Sequence, Items): _system,
    (Inequality, Inequality): _inequalities,
    (Equation, Equation): _equations,
    (Congruence, Congruence): _congruences,
    (Expression, Expression): _expressions,
    (Expression, Number): _expressions,
    (Number, Expression): _expressions,
}
