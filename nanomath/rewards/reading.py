r"""Read an answer into a value whose type says how it may be compared.

A number with its unit, a number in a base, a choice, a tuple or interval, an unordered list,
set or union, a relation, a congruence, an expression, a text: every character of the answer
belongs to the value, and what fits no other type is a text. Few answers have two readings
(`1,000` is a number, and may be a list of two); `read` returns them all.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from nanomath.rewards.notation import CHANGING, NUMBER_WORDS, enclosed, split

MAX_NUMBER = 1_000  # characters

# Units.

# The name, the other spellings; a plural "s" is dropped. Any other words after a plain number
# name what is counted.
_SPELLINGS = r"""
mm millimetre millimeter, cm centimetre centimeter, dm, m metre meter, km kilometre kilometer, in inch inches, ft foot
feet, yd yard, mi mile, mg milligram milligramme, g gram gramme, kg kilogram kilogramme kilo, lb lbs pound \pound, oz
ounce, t ton tonne, ml milliliter millilitre, L l liter litre, gal gallon, s sec second, min minute, h hr hour, d day,
wk week, mo month, yr year, deg degree \degree, rad radian, celsius, fahrenheit, K kelvin, N newton, J joule,
W watt, V volt, Hz hertz, dollar \dollar usd buck, cent \cent, euro \euro eur, yen \yen jpy 円, unit
"""
_KNOWN = {
    name: words.split()[0] for words in _SPELLINGS.split(",") for name in words.split()
}
_REWRITTEN = [
    (re.compile(pattern, re.IGNORECASE), plain)
    for pattern, plain in [
        (r"\\unit\{(\w+)\}", r"\1"),
        (r"(?:\\degree|\bdeg(?:ree)?s?)\s?(?:C|celsius|centigrade)\b", "celsius"),
        (r"(?:\\degree|\bdeg(?:ree)?s?)\s?(?:F|fahrenheit)\b", "fahrenheit"),
        (r"\bmph\b", "mi/h"),
        (r"\b(?:kph|kmh)\b", "km/h"),
        (r"\bcc\b", "cm^3"),
        (r"\bper\s", "/"),
        (r"\bsq(?:uare)?\.?\s([a-z]+)", r"\1^2"),
        (r"\bcu(?:bic)?\.?\s([a-z]+)", r"\1^3"),
        (r"\s+squared\b", "^2"),
        (r"\s+cubed\b", "^3"),
    ]
]
_MULTIPLIERS = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_GREEK = re.findall(
    r"\w+",
    """alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi varphi chi
    psi omega Delta Sigma Phi Psi Omega ell""",
)
# After a value these are no unit: what changes it, other numbers, and functions.
_FUNCTIONS = set(re.findall(r"\w+", "cos cot csc exp ln log pi pm sec sin sqrt tan"))
_NO_UNITS = CHANGING | _FUNCTIONS | {"a", "above", "an", "below"}
_POWER = r"(?:\s?\^\s?(?:\{-?[123]\}|[123])|[23](?!\d))"
_NAME = (
    r"\\unit\{[a-zA-Z]+\}|\\degree(?:\s?[CF](?![a-zA-Z]))?|\\(?:dollar|cent|euro|pound|yen)"
    r"|[kcdm]?m(?=\s?/)|(?<=/)[smhL]\b|[a-zA-Z][a-zA-Z'-]+\.?"
)
_PHRASE = rf"(?:{_NAME}){_POWER}?(?:(?:\s?/\s?|\s?\*\s?|\s)(?:{_NAME}){_POWER}?)*"
_WITH_UNIT = re.compile(
    rf"(?P<value>.*?[\d)}}%|a-z\].])(?:\s|(?<=[\d)}}.])|(?=\\))(?P<unit>{_PHRASE})\s?",
    re.DOTALL,
)
_UNIT_TOKEN = re.compile(
    rf"(?P<slash>/)?\s?(?P<name>\\?[a-zA-Z][a-zA-Z'-]*\.?)(?P<power>{_POWER})?"
)
_WITH_CJK_UNIT = re.compile(r"(?P<value>.*\d) ?(?P<unit>[\u3040-\u30ff\u4e00-\u9fff]+)")
_NO_CJK_UNIT = re.compile(
    "[以未超不非约約万億兆千百十割倍でなは分点點亿萬半成折余多左右か的の减減加乘錯错违違よ]"
)
_LETTER = re.compile(r"[a-zA-Z\\\u3040-\u30ff\u4e00-\u9fff]")
_CURRENCY = re.compile(
    r"(?P<sign>-?)\s?\\(?P<unit>dollar|euro|pound|yen)\s?(?P<value>.*)", re.DOTALL
)


class Unit(NamedTuple):
    """Powers of the known units, and the words that are none: {m: 1, s: -2} and {} of `m/s^2`,
    {} and {apple}.
    """

    powers: frozenset[tuple[str, int]] = frozenset()
    words: frozenset[str] = frozenset()

    def fits(self, other: Unit) -> bool:
        """Whether both may be one: a missing unit fits any; more words may say more of what is
        counted.
        """
        if not any(self) or not any(other):
            return True
        return self.powers == other.powers and (
            self.words <= other.words or other.words <= self.words
        )


def split_unit(text: str) -> tuple[str, Unit]:
    """The value and its unit: `64 square feet`, `5個`, `\\dollar 5`; no unit where the words
    after it are none.
    """
    if match := _CURRENCY.fullmatch(text):
        value, unit = split_unit(match["value"])
        return match["sign"] + value, unit if any(unit) else _read_unit(
            "\\" + match["unit"]
        )
    if match := _WITH_UNIT.fullmatch(text):
        unit = _read_unit(match["unit"])
        return (match["value"].strip(), unit) if unit else (text, Unit())
    match = _WITH_CJK_UNIT.fullmatch(text)
    if match and (match["unit"] == "分" or not _NO_CJK_UNIT.search(match["unit"])):
        name = match["unit"]
        return match["value"], Unit(frozenset([("yen", 1)])) if name == "円" else Unit(
            words=frozenset([name])
        )
    return text, Unit()


def _read_unit(phrase: str) -> Unit | None:
    """The unit of words that follow a value, None where they are none."""
    for pattern, plain in _REWRITTEN:
        phrase = pattern.sub(plain, phrase)
    powers: Counter[str] = Counter()
    words = set()
    sign = 1
    for token in _UNIT_TOKEN.finditer(phrase):
        sign = -1 if token["slash"] else sign
        name = token["name"].rstrip(".")
        lower = name.lower()
        known = next(
            (
                _KNOWN[spelling]
                for spelling in (name, lower, lower.removesuffix("s"))
                if spelling in _KNOWN
            ),
            None,
        )
        if known:
            powers[known] += sign * int(re.sub(r"[^-\d]", "", token["power"] or "1"))
        elif _is_no_unit(lower, len(words)):
            return None
        else:
            words.add(lower.removesuffix("s"))
    return Unit(frozenset(powers.items()), frozenset(words))


def _is_no_unit(word: str, before: int) -> bool:
    """Whether a word says something else; of numbers only near the value: `12 ways to meet the
    three conditions`.
    """
    parts = set(re.split("[-']", word)) | {word}
    if parts & _NO_UNITS or (before < 3 and parts & NUMBER_WORDS) or word in _GREEK:
        return True
    return len(word) < 3 and word not in ("of", "in", "by", "at", "on")


# Numbers.

_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_FRACTION = re.compile(
    rf"(?:(?P<whole>\d+)\s*)?\\frac\{{\s*(?P<top>{_PLAIN})\s*\}}\{{\s*(?P<bottom>{_PLAIN})\s*\}}"
    rf"|(?:(?P<whole_>\d+) )?(?P<top_>{_PLAIN}) ?/ ?(?P<bottom_>{_PLAIN})"
)
_DECIMAL = re.compile(
    rf"(?P<digits>{_PLAIN})(?:(?:[eE]| ?\* ?10 ?\^)\{{?(?P<exponent>[-+]?\d{{1,3}})\}}?)?"
)
_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<fixed>\d*?)"
    r"(?:\\overline\s?(?:\{(?P<run>\d+)\}|(?P<digit>\d))|(?P<seen>\d{1,9}?)(?P=seen){2,}\s?\\ldots)"
)
_EUROPEAN = re.compile(r"(\d+),(\d{2}|\d{4,})|(\d{1,3}(?:\.\d{3})+),(\d+)")
_BASED = re.compile(r"\(?(?P<digits>[\dA-Fa-f]*\d[\dA-Fa-f]*)\)?_\{?(?P<base>\d{1,2})\}?")


class Number(NamedTuple):
    """A number as written: its exact value, decimals after the point (None: a fraction or
    integer), "%", its unit.
    """

    value: Fraction
    places: int | None = None
    percent: bool = False
    unit: Unit = Unit()
    latex: str = ""

    @property
    def significant(self) -> Fraction:
        """The digits of a decimal as an integer; 0 of a fraction or integer, which is exact."""
        return (
            Fraction(0)
            if self.places is None
            else abs(self.value) * Fraction(10) ** self.places
        )

    @property
    def tolerance(self) -> Fraction:
        """What a decimal may be off by. Of four significant digits it may be a rounding: half
        a unit in the last place. Of sixteen it is a binary float as JSON writes one: 2^-50 of
        it.
        """
        if self.significant < 1000 or self.places <= 0:
            return Fraction(0)
        half = Fraction(1, 2) / Fraction(10) ** self.places
        return max(half, abs(self.value) / 2**50) if self.is_float else half

    @property
    def is_float(self) -> bool:
        """Whether it has the sixteen digits or more of a binary float that arithmetic has
        rounded.
        """
        return self.significant >= 10**15


def read_number(text: str, european: bool = False) -> Number | None:
    """The number that a text is, None if it is anything else. `european`: the comma is the
    decimal point.
    """
    if len(text) > MAX_NUMBER or not any(map(str.isdigit, text)):
        return None
    text, unit = split_unit(text) if _LETTER.search(text) else (text, Unit())
    factor = math.prod(_MULTIPLIERS[word] for word in unit.words & _MULTIPLIERS.keys())
    unit = unit._replace(words=unit.words.difference(_MULTIPLIERS))
    percent = text.endswith("%")
    latex = text = text.removesuffix("%").strip()
    sign = -1 if text.startswith("-") else 1
    text = text[1:].strip() if text[:1] in ("+", "-") else text
    if european and (match := _EUROPEAN.fullmatch(text)):
        text = f"{(match[1] or match[3]).replace('.', '')}.{match[2] or match[4]}"
    found = _unsigned(text)
    if found is None:
        return None
    value, places = found
    if factor != 1:
        value = factor * value
        places = None
        latex = f"{factor}*({latex})"
    return Number(-value if sign < 0 else value, places, percent, unit, latex)


def _unsigned(text: str) -> tuple[Fraction, int | None] | None:
    """The value and the decimals after the point."""
    if match := _DECIMAL.fullmatch(text):
        digits = _bare(match["digits"])
        exponent = int(match["exponent"] or 0)
        places = len(digits.partition(".")[2]) - exponent if "." in digits else None
        value = Fraction(digits)
        return value * Fraction(10) ** exponent if exponent else value, places
    if match := _REPEATING.fullmatch(text):
        run = match["run"] or match["digit"] or match["seen"]
        fixed = int(match["whole"] + match["fixed"] or 0)
        value = fixed + Fraction(int(run), 10 ** len(run) - 1)
        return value / 10 ** len(match["fixed"]), None
    if match := _FRACTION.fullmatch(text):
        whole, top, bottom = (
            _bare(match[name] or match[name + "_"] or "0")
            for name in ("whole", "top", "bottom")
        )
        if Fraction(bottom):
            return int(whole) + Fraction(top) / Fraction(bottom), None
    return None


def _bare(digits: str) -> str:
    return digits.replace(",", "").replace(" ", "").rstrip(".")


# The other types.


class Based(NamedTuple):
    """Digits in a base, as in 2516_8: the same digits and base are equal, its value in base
    ten is not.
    """

    digits: str
    base: int


class Choice(NamedTuple):
    """The letter of a multiple choice and what it says there: `(B)`, `B. Paris`."""

    letter: str
    label: str


class Sequence(NamedTuple):
    """A tuple or interval: the brackets matter, and so does the order. `name`: the variable of
    `0 <= x < 1`.
    """

    opening: str
    items: tuple[str, ...]
    closing: str
    name: str = ""


class Items(NamedTuple):
    r"""Parts without an order: kind "" of a list, "{" of a set (which holds nothing twice),
    "U" of a union, "&" of inequalities that hold together. A list of kind ">" has an order:
    `1, 3, \ldots`, and 1,000 taken for two numbers.
    """

    items: tuple[str, ...]
    kind: str = ""


class Inequality(NamedTuple):
    """left < right, also <= and !=: one side minus the other tells it, up to a positive
    factor.
    """

    left: str
    operator: str
    right: str


class Equation(NamedTuple):
    """An equality whole, and what it gives: the name x and the values 2 + 3 and 5 of `x = 2 +
    3 = 5`, no name of `2 + 2 = 4`, no values of `x + y = 3`; and what the last value is said
    to round to.
    """

    text: str
    name: str
    values: tuple[str, ...]
    rounded: str = ""


class Congruence(NamedTuple):
    r"""left \equiv residue \pmod modulus; left may be missing."""

    left: str
    residue: str
    modulus: str


class Expression(NamedTuple):
    """LaTeX for the parser, with a known unit."""

    latex: str
    unit: Unit = Unit()


class Text(NamedTuple):
    """Anything else; words have no case."""

    text: str


Value = (
    Number
    | Based
    | Choice
    | Sequence
    | Items
    | Inequality
    | Equation
    | Congruence
    | Expression
    | Text
)

_SEPARATOR = re.compile(
    r",|;|(?<![a-zA-Z\\])(?:and|or)(?![a-z])|または|および|(?<=[\d}\s])[或和と](?=[\d\\\s-])"
)
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_APPROX = re.compile(r"\\approx(?![a-zA-Z])")
_EQUALS = re.compile(r"(?<![<>!])=|\\in(?![a-zA-Z])")
_INEQUALITY = re.compile(r"<=|>=|!=|<|>")
_FLIPPED = {">": "<", ">=": "<=", "<": "<", "<=": "<=", "!=": "!="}
_VARIABLE = re.compile(r"(?:[a-zA-Z]|\\[a-z]+)(?:_\w|_\{\w+\})?")
# Not e, i, a command.
_FREE_LETTER = re.compile(
    r"(?<![a-zA-Z\\])(?!sin|cos|tan|log|ln|exp|sqrt|pi)[a-df-hj-zA-Z]"
)
_LETTER_NAME = rf"(?:[a-zA-Z]|\\(?:{'|'.join(_GREEK)}))'*(?:_(?:\{{[^{{}}]*\}}|\w))?'*"
_POINTS = r"(?:\\(?:angle|triangle|overline|m\\angle))?\{?[A-Z]{1,4}\}?(?:_(?:\{\w*\}|\w))?"
_MODULO = r"(?:\\pmod\s?\{?|\(\s?\\?mod\s|\s\\?(?:mod|bmod)\s)"
_CONGRUENCE = re.compile(
    rf"(?:(?P<left>[^=<>,;]*?)\s?\\equiv\s?|(?P<name>[a-zA-Z])\s?=\s?)?(?P<residue>(?:(?!mod|\\equiv).)+?)\s?"
    rf"(?P<mod>{_MODULO})(?P<modulus>[^{{}}()=,;]+?)[)}}]?"
)
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice) )?\(?(?P<letter>[A-J])(?:\)|[.:]|(?:\)|[.:] | - "
    r"(?=[a-z]{2})|: ?)(?P<label>.*))?",
    re.DOTALL,
)
_NO_LABEL = re.compile(
    r"(?<![a-zA-Z])[A-J](?![a-zA-Z])|^\W*(?:and|or|is|are|isn't)\b|^\s*[,=]|\b(?:not|no|wrong|incorrect|false)\b"
)
_SHORT_WORDS = frozenset({"no", "on", "up", "so", "ok", "go", "us", "he", "it", "me", "we"})
_CALL = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc|ln|log|exp)h? [a-zA-Z]$")
_FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc")
_WORDS = re.compile(
    r"[a-zA-Z' -]*[a-zA-Z]{3}[a-zA-Z' -]*|[a-zA-Z]{2,}(?:[' -][a-zA-Z]{2,})+"
)
_NO_SYMBOLS = re.compile(
    r"(?<![\\a-zA-Z])(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)|sqrt|exp|log|[pv]matrix)[a-zA-Z]{4,}|[^\x00-\x7f]|[:?@#$\"]|\d{4}-\d\d-\d\d"
)


@lru_cache(maxsize=1 << 12)
def read(text: str) -> tuple[Value, ...]:
    """The values that a cleaned answer may be; a text if it is nothing else."""
    return tuple(_readings(text)) or (Text(text),)


def _readings(text: str) -> Iterator[Value]:
    number = _based(text) or read_number(text)
    if number:
        yield number
    if number and "," not in text:  # 1,000 may be a list as well
        return
    if (match := _CHOICE.fullmatch(text)) and not _NO_LABEL.search(match["label"] or ""):
        yield Choice(match["letter"], (match["label"] or "").strip())
    if number and (any(number.unit) or re.search(r",0", text)):
        return
    if structure := _congruence(text) or _items(text) or _sequence(text):
        yield structure._replace(kind=">") if number else structure
    elif len(split(text, _INEQUALITY)) > 1:
        yield from filter(None, (_solution_interval(text), _inequality(text)))
    elif max(len(split(text, sign)) for sign in (_EQUALS, _APPROX)) > 1:
        if equation := _equation(text):
            yield equation
    elif not number:
        yield _expression(text)
    if not number and (european := read_number(text, european=True)):
        yield european


def _based(text: str) -> Based | None:
    match = _BASED.fullmatch(text)
    if not match or not 2 <= int(match["base"]) <= 36:
        return None
    return Based(match["digits"].upper().lstrip("0"), int(match["base"]))


def _congruence(text: str) -> Congruence | None:
    match = _CONGRUENCE.fullmatch(text)
    if (
        not match
        or match["left"] is None
        and match["name"] is None
        and "bmod" in match["mod"]
    ):
        return None  # 17 \bmod 5 computes a number
    return Congruence(
        match["left"] or match["name"] or "", match["residue"], match["modulus"].strip()
    )


def _items(text: str) -> Items | None:
    r"""The parts of a list, set or union; p ± q is two of them. Parts of `p=5,q=2;p=7,q=2` are
    tuples.
    """
    kind = ""
    if (
        text.startswith(r"\{")
        and text.endswith(r"\}")
        and enclosed(text[1:-2] + "}", "{", "}")
    ):
        text = text[2:-2].strip()
        kind = "{"
    elif len(parts := split(text, _UNION)) > 1:
        return Items(tuple(parts), "U")
    groups = split(text, ";")
    if len(groups) > 1 and any(len(split(group, ",")) > 1 for group in groups):
        parts = [group if len(split(group, ",")) == 1 else f"({group})" for group in groups]
    else:
        parts = [item for part in split(text, _SEPARATOR) for item in _plus_minus(part)]
    parts = [part for part in parts if part]
    if not kind and any(part == r"\ldots" for part in parts):
        kind = ">"
    elif not kind and _INEQUALITY.search(text) and re.search(r"\band\b", text):
        kind = "&"
    return Items(tuple(parts), kind) if kind in ("{", "U") or len(parts) > 1 else None


def _plus_minus(text: str) -> list[str]:
    if (
        not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text)
        or enclosed(text)
        or text.count(r"\pm") > 1
    ):
        return [text]
    return [
        re.sub(r"\\pm(?![a-zA-Z])", plus, re.sub(r"\\mp(?![a-zA-Z])", minus, text))
        for plus, minus in ("+-", "-+")
    ]


def _sequence(text: str) -> Sequence | None:
    if not enclosed(text) or len(parts := split(text[1:-1], ",;")) == 1:
        return None
    return Sequence(text[0], tuple(parts), text[-1])


def _solution_interval(text: str) -> Sequence | None:
    """The interval of `a <= x < b` or `x < b`."""
    parts = split(text, _INEQUALITY)
    operators = _INEQUALITY.findall(text)
    if (
        "!=" in operators
        or len({operator[0] for operator in operators}) != 1
        or len(parts) != len(operators) + 1
    ):
        return None
    if operators[0][0] == ">":
        parts = parts[::-1]
        operators = [_FLIPPED[operator] for operator in reversed(operators)]
    if len(parts) == 2 and _VARIABLE.fullmatch(parts[0]):
        parts = [r"-\infty", *parts]
        operators = ["<", *operators]
    elif len(parts) == 2:
        parts = [*parts, r"\infty"]
        operators = [*operators, "<"]
    if len(parts) != 3 or not _VARIABLE.fullmatch(parts[1]):
        return None
    opening = "[" if operators[0] == "<=" else "("
    closing = "]" if operators[1] == "<=" else ")"
    return Sequence(opening, (parts[0], parts[2]), closing, parts[1])


def _inequality(text: str) -> Inequality | None:
    parts = split(text, _INEQUALITY)
    operators = _INEQUALITY.findall(text)
    if len(parts) != 2 or len(operators) != 1:
        return None
    left, right = reversed(parts) if operators[0][0] == ">" else parts
    return Inequality(left, _FLIPPED[operators[0]], right)


def _equation(text: str) -> Equation | None:
    """What an equality gives; None where a side is missing."""
    exact, *rounded = split(text, _APPROX)
    parts = split(exact, _EQUALS)
    if len(rounded) > 1 or not all((*parts, *rounded)):
        return None
    name = _name(parts[0], parts[-1])
    if (
        not name
        and len(parts) == 2
        and "\\in" not in exact
        and (name := _name(parts[1], parts[0]))
    ):
        parts.reverse()
    values = parts[1:] if name and len(parts) > 1 else [] if name else parts
    bare = [re.sub(r"\\(?:begin|end)\{\w+\}", "", value) for value in values]
    if (not name and any(map(_FREE_LETTER.search, bare))) or ("\\in" in exact and not name):
        return Equation(text, "", (), "")
    if (
        not name
        and len(values) == 2
        and read_number(values[0])
        and not read_number(values[1])
    ):
        values.reverse()  # 72 = 8 * 9 gives the number
    return Equation(text, name, tuple(values), *rounded)


def _name(text: str, value: str) -> str:
    """The name a value is given to: x_1, W of `W(n)`, P(A), (x,y), AB, AB : CD, area; "" of
    anything that computes.
    """
    bare = text.replace(" ", "")
    if match := re.fullmatch(rf"(?P<function>{_LETTER_NAME})\((?P<of>.*)\)", bare):
        return match["function"] if re.fullmatch("[a-z]", match["of"]) else bare
    if re.fullmatch(
        rf"{_LETTER_NAME}|\({_LETTER_NAME}(?:,{_LETTER_NAME})*\)|{_POINTS}(?::{_POINTS})?",
        bare,
    ):
        return bare
    if re.fullmatch(r"\\frac\{[A-Z]{2,}\}\{[A-Z]{2,}\}", bare):
        return bare
    words = re.findall(r"[a-z']+", text.casefold())
    of_words = re.fullmatch(r"[a-zA-Z]{3,}(?: [a-zA-Z]+)*", text) and re.search(
        r"[\d\\]", value
    )
    return text if of_words and not (CHANGING | NUMBER_WORDS) & set(words) else ""


def _expression(text: str) -> Expression | Text:
    value, unit = split_unit(text)
    # \sin 30\degree is no angle.
    if dict(unit.powers).get("deg") and _FUNCTION.search(value):
        value = text
        unit = Unit()
    if (
        unit.words
        or _NO_SYMBOLS.search(value)
        or (_WORDS.fullmatch(value) and not _CALL.match(value))
        or value.casefold() in _SHORT_WORDS
    ):
        return Text(text)
    return Expression(value, unit)
