r"""Read an answer into a value whose type says how it may be compared.

A number or expression with its unit, a choice, a tuple or interval, an unordered list, set or
union, a relation, a congruence, a text: every character of the answer belongs to the value, and
what fits no other type is a text. Few answers have two readings (`1,000` is a number, and may
be a list of two); `read` returns them all.
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
mm millimetre millimeter, cm centimetre centimeter, dm, m metre meter, km kilometre kilometer,
in inch inches, ft foot feet, yd yard, mi mile, mg milligram milligramme, g gram gramme,
kg kilogram kilogramme kilo, lb lbs pound \pound, oz ounce, t ton tonne,
ml milliliter millilitre, L l liter litre, gal gallon, s sec second, min minute, h hr hour,
d day, wk week, mo month, yr year, deg degree \degree, rad radian, celsius, fahrenheit,
K kelvin, N newton, J joule, W watt, V volt, Hz hertz, dollar \dollar usd buck, cent \cent,
euro \euro eur, yen \yen jpy 円, unit
"""
_KNOWN = {
    name: words.split()[0] for words in _SPELLINGS.split(",") for name in words.split()
}
_MONEY = {_KNOWN[word] for word in (r"\dollar", r"\cent", r"\euro", r"\pound", r"\yen")}
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
    """alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho
    sigma tau phi varphi chi psi omega Delta Sigma Phi Psi Omega ell""",
)
# After a value these are no unit: what changes it, other numbers, and functions.
_NO_UNITS = CHANGING.union(
    re.findall(r"\w+", "a above an below cos cot csc exp ln log pi pm sec sin sqrt tan")
)
_POWER = r"(?:\s?\^\s?(?:\{-?[123]\}|[123])|[23](?!\d))"
_NAME = (
    r"\\unit\{[a-zA-Z]+\}|\\degree(?:\s?[CF](?![a-zA-Z]))?|\\(?:dollar|cent|euro|pound|yen)"
    r"|[kcdm]?m(?=\s?/)|(?<=/)[smhL]\b|[a-zA-Z][a-zA-Z'-]+\.?"
)
_PHRASE = rf"(?:{_NAME}){_POWER}?(?:(?:\s?/\s?|\s?\*\s?|\s)(?:{_NAME}){_POWER}?)*"
# A counter as Japanese and Chinese write one, but for what changes a value.
_CJK = r"\u3040-\u30ff\u4e00-\u9fff"
_COUNTER = (
    "分|(?:(?![以未超不非约約万億兆千百十割倍でなは分点點亿萬半成折余多左右か的の减減加乘錯错違违よ])"
    rf"[{_CJK}])+"
)
_WITH_UNIT = re.compile(
    rf"(?P<value>.*?[\d)}}%|a-z\].])(?:\s|(?<=[\d)}}.])|(?=\\))"
    rf"(?P<unit>{_PHRASE}|(?:(?<=\d)|(?<=\d ))(?:{_COUNTER}))\s?",
    re.DOTALL,
)
_UNIT_TOKEN = re.compile(
    rf"(?P<slash>/)?\s?(?P<name>\\?[a-zA-Z][a-zA-Z'-]*\.?|[{_CJK}]+)(?P<power>{_POWER})?"
)
_LETTER = re.compile(rf"[a-zA-Z\\{_CJK}]")
_CURRENCY = re.compile(
    r"(?P<sign>-?)\s?(?P<unit>\\(?:dollar|euro|pound|yen))\s?(?P<value>.*)", re.DOTALL
)


class Unit(NamedTuple):
    """Powers of the known units, and the words that are none: {m: 1, s: -2} and {} of `m/s^2`,
    {} and {apple}.
    """

    powers: frozenset[tuple[str, int]] = frozenset()
    words: frozenset[str] = frozenset()

    def fits(self, other: Unit) -> bool:
        """Return whether both may be one: a missing unit fits any; more words may say more of
        what is counted.
        """
        return (
            not any(self)
            or not any(other)
            or self.powers == other.powers
            and (self.words <= other.words or other.words <= self.words)
        )


def split_unit(text: str) -> tuple[str, Unit]:
    r"""Return the value and its unit: of `64 square feet`, `5個`, `\dollar 5`; no unit where
    the words after it are none.
    """
    if match := _CURRENCY.fullmatch(text):
        value, unit = split_unit(match["value"])
        # `\dollar 5 per hour`, `\dollar 5 million`
        if not _MONEY & dict(unit.powers).keys():
            unit = Unit(unit.powers | _read_unit(match["unit"]).powers, unit.words)
        return match["sign"] + value, unit
    match = _WITH_UNIT.fullmatch(text)
    if match and (unit := _read_unit(match["unit"])):
        return match["value"].strip(), unit
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
        spellings = [name, lower, lower.removesuffix("s")]
        if known := next(filter(None, map(_KNOWN.get, spellings)), None):
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
    parts = {word, *re.split("[-']", word)}
    if parts & _NO_UNITS or (before < 3 and parts & NUMBER_WORDS) or word in _GREEK:
        return True
    return (
        len(word) < 3 and word.isascii() and word not in ("of", "in", "by", "at", "on")
    )


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
    r"(?:\\overline\s?(?:\{(?P<run>\d+)\}|(?P<digit>\d))|(?<=\.)\((?P<period>\d+)\)"
    r"|(?P<seen>\d{1,9}?)(?P=seen){2,}\s?\\ldots)"
)
_EUROPEAN = re.compile(r"(\d+),(\d{2}|\d{4,})|(\d{1,3}(?:\.\d{3})+),(\d+)")
_BASED = re.compile(
    r"\(?(?P<digits>[\dA-Fa-f]*\d[\dA-Fa-f]*)\)?_\{?(?P<base>\d{1,2})\}?"
)


class Quantity(NamedTuple):
    """A number or an expression with its unit.

    `latex` is as written, without the unit. `value` is exact, None of an expression. `places`
    counts the decimals after the point, None of a fraction or integer.
    """

    latex: str
    unit: Unit = Unit()
    value: Fraction | None = None
    places: int | None = None
    percent: bool = False

    @property
    def tolerance(self) -> Fraction:
        """Return what a decimal may be off by.

        Of four significant digits it may be a rounding: half a unit in the last place. Of
        sixteen it is a binary float as JSON writes one: 2^-50 of it.
        """
        if self.places is None or self.places <= 0:
            return Fraction(0)
        last = Fraction(1, 10**self.places)
        if abs(self.value) < 1000 * last:
            return Fraction(0)
        return max(last / 2, abs(self.value) / 2**50 if self.is_float else 0)

    @property
    def is_float(self) -> bool:
        """Return whether it has the sixteen digits or more of a binary float that arithmetic has
        rounded.
        """
        if self.places is None or len(self.latex) < 16:
            return False
        return abs(self.value) * Fraction(10) ** self.places >= 10**15


def read_number(text: str, european: bool = False) -> Quantity | None:
    """Return the number that a text is, None if it is anything else. `european`: the comma is
    the decimal point.
    """
    if len(text) > MAX_NUMBER or not any(map(str.isdigit, text)):
        return None
    text, unit = split_unit(text) if _LETTER.search(text) else (text, Unit())
    factor = math.prod(_MULTIPLIERS[word] for word in unit.words & _MULTIPLIERS.keys())
    unit = unit._replace(words=unit.words.difference(_MULTIPLIERS))
    latex = text.removesuffix("%").strip()
    digits = latex[1:].strip() if latex.startswith(("+", "-")) else latex
    if european and (match := _EUROPEAN.fullmatch(digits)):
        digits = f"{(match[1] or match[3]).replace('.', '')}.{match[2] or match[4]}"
    found = _unsigned(digits)
    if found is None:
        return None
    value, places = found
    if latex.startswith("-"):
        value = -value
    if factor != 1:
        value *= factor
        places = None
        latex = f"{factor}*({latex})"
    return Quantity(latex, unit, value, places, text.endswith("%"))


def _unsigned(text: str) -> tuple[Fraction, int | None] | None:
    """The value, and the decimals after the point."""
    if match := _DECIMAL.fullmatch(text):
        digits = _bare(match["digits"])
        exponent = int(match["exponent"] or 0)
        places = len(digits.partition(".")[2]) - exponent if "." in digits else None
        value = Fraction(digits)
        return value * Fraction(10) ** exponent if exponent else value, places
    if match := _REPEATING.fullmatch(text):
        run = match["run"] or match["digit"] or match["period"] or match["seen"]
        fixed = int(match["whole"] + match["fixed"] or 0)
        value = fixed + Fraction(int(run), 10 ** len(run) - 1)
        return value / 10 ** len(match["fixed"]), None
    if match := _FRACTION.fullmatch(text):
        whole, top, bottom = (
            Fraction(_bare(match[name] or match[name + "_"] or "0"))
            for name in ("whole", "top", "bottom")
        )
        if bottom:
            return whole + top / bottom, None
    return None


def _bare(digits: str) -> str:
    return digits.replace(",", "").replace(" ", "").rstrip(".")


# The other types.

BRACKETS = ("()", "(]", "[)", "[]")


class Choice(NamedTuple):
    """The letter of a multiple choice and what it says there: `(B)`, `B. Paris`."""

    letter: str
    label: str


class Items(NamedTuple):
    r"""Parts of an answer.

    `kind` is one of BRACKETS for a tuple or interval, in which the order matters; `name` is the
    variable of `0 <= x < 1`. Parts without an order have the kind "" of a list, "{" of a set
    (which holds nothing twice), "U" of a union, "&" of inequalities that hold together. A list
    of kind ">" has an order: `1, 3, \ldots`, and 1,000 taken for two numbers.
    """

    items: tuple[str, ...]
    kind: str = ""
    name: str = ""


class Relation(NamedTuple):
    """An equality or inequality, turned so that `operator` is =, !=, < or <=.

    `difference` is its left side minus its right one, "" where it has more sides: it tells the
    relation, up to a (positive) factor. An equation also gives values: the name x and the
    values 2 + 3 and 5 of `x = 2 + 3 = 5`, no name of `2 + 2 = 4`, no values of `x + y = 3`;
    and what the last value is said to round to.
    """

    operator: str
    difference: str
    name: str = ""
    values: tuple[str, ...] = ()
    rounded: str = ""


class Congruence(NamedTuple):
    r"""left \equiv residue \pmod modulus; left may be missing."""

    left: str
    residue: str
    modulus: str


class Text(NamedTuple):
    """Anything else; words have no case. Digits in a base, as in 2516_8, and a ratio are texts
    as well: their value is another answer.
    """

    text: str


Value = Quantity | Choice | Items | Relation | Congruence | Text

# Patterns for `split`.
_SEPARATOR = (
    r",|;|(?<![a-zA-Z\\])(?:and|or)(?![a-z])"
    r"|または|および|(?<=[\d}\s])[或和と](?=[\d\\\s-])"
)
_UNION = r"\\cup(?![a-zA-Z])"
_APPROX = r"\\approx(?![a-zA-Z])"
_EQUALS = r"(?<![<>!])=|\\in(?![a-zA-Z])"
_INEQUALITY = r"<=|>=|!=|<|>"
_PLUS = re.compile(r"\\pm(?![a-zA-Z])")
_MINUS = re.compile(r"\\mp(?![a-zA-Z])")
# Other ways to write an interval: ]0,1[, and x > 1 and x < 3.
_INTERVALS = [
    (re.compile(pattern), plain)
    for pattern, plain in [
        (r"^\](?=[^()\[\]]+,[^()\[\]]+[\[\]]$)", "("),
        (r"^([(\[][^()\[\]]+,[^()\[\]]+)\[$", r"\1)"),
        (r"^([a-zA-Z]) ?>(=?)([^<>=,;]+) and \1 ?(<=?[^<>=,;]+)$", r"\3 <\2 \1 \4"),
        (r"^([a-zA-Z]) ?(<=?[^<>=,;]+) and \1 ?>(=?)([^<>=,;]+)$", r"\4 <\3 \1 \2"),
    ]
]
_VARIABLE = re.compile(r"(?:[a-zA-Z]|\\[a-z]+)(?:_\w|_\{\w+\})?")
# Not e, i, a command.
_FREE_LETTER = re.compile(
    r"(?<![a-zA-Z\\])(?!sin|cos|tan|log|ln|exp|sqrt|pi)[a-df-hj-zA-Z]"
)
_LETTER_NAME = rf"(?:[a-zA-Z]|\\(?:{'|'.join(_GREEK)}))'*(?:_(?:\{{[^{{}}]*\}}|\w))?'*"
_POINTS = (
    r"(?:\\(?:angle|triangle|overline|m\\angle))?\{?[A-Z]{1,4}\}?(?:_(?:\{\w*\}|\w))?"
)
_CALLED = re.compile(rf"(?P<name>{_LETTER_NAME})\([a-z]\)")
_NAMED = re.compile(
    rf"{_LETTER_NAME}(?:\(.*\))?|\({_LETTER_NAME}(?:,{_LETTER_NAME})*\)"
    rf"|{_POINTS}(?::{_POINTS})?|\\frac\{{[A-Z]{{2,}}\}}\{{[A-Z]{{2,}}\}}"
)
_MODULO = r"(?:\\pmod\s?\{?|\(\s?\\?mod\s|\s\\?(?:mod|bmod)\s)"
_CONGRUENCE = re.compile(
    r"(?:(?P<left>[^=<>,;]*?)\s?\\equiv\s?|(?P<name>[a-zA-Z])\s?=\s?)?"
    rf"(?P<residue>(?:(?!mod|\\equiv).)+?)\s?(?P<mod>{_MODULO})(?P<modulus>[^{{}}()=,;]+?)[)}}]?"
)
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice) )?\(?(?P<letter>[A-J])(?:\)|[.:]|(?:\)|[.:] | - "
    r"(?=[a-z]{2})|: ?)(?P<label>.*))?",
    re.DOTALL,
)
_NO_LABEL = re.compile(
    r"(?<![a-zA-Z])[A-J](?![a-zA-Z])|^\W*(?:and|or|is|are|isn't)\b|^\s*[,=]"
    r"|\b(?:not|no|wrong|incorrect|false)\b"
)
_SHORT_WORDS = frozenset(
    {"no", "on", "up", "so", "ok", "go", "us", "he", "it", "me", "we"}
)
_CALL = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc|ln|log|exp)h? [a-zA-Z]$")
_FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc")
_WORDS = re.compile(
    r"[a-zA-Z' -]*[a-zA-Z]{3}[a-zA-Z' -]*|[a-zA-Z]{2,}(?:[' -][a-zA-Z]{2,})+"
)
_NO_SYMBOLS = re.compile(
    r"(?<![\\a-zA-Z])(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)|sqrt|exp|log|[pv]matrix)[a-zA-Z]{4,}"
    r"|[^\x00-\x7f]|[:?@#$\"]|\d{4}-\d\d-\d\d"
)


@lru_cache(maxsize=1 << 12)
def read(text: str) -> tuple[Value, ...]:
    """Return the values that a cleaned answer may be; a text if it is nothing else."""
    return tuple(_readings(text)) or (Text(text),)


def _readings(text: str) -> Iterator[Value]:
    number = _based(text) or read_number(text) or _ratio(text)
    if number:
        yield number
    if number and "," not in text:  # 1,000 may be a list as well
        return
    if match := _CHOICE.fullmatch(text):
        label = (match["label"] or "").strip()
        if not _NO_LABEL.search(label):
            yield Choice(match["letter"], label)
    if number and (any(number.unit) or ",0" in text):
        return
    for pattern, plain in _INTERVALS:
        text = pattern.sub(plain, text)
    if structure := _congruence(text) or _items(text):
        yield structure._replace(kind=">") if number else structure
    elif len(split(text, _INEQUALITY)) > 1:
        yield from _inequality(text)
    elif len(split(text, rf"{_EQUALS}|{_APPROX}")) > 1:
        yield from _equation(text)
    elif not number:
        yield _expression(text)
    if not number and (european := read_number(text, european=True)):
        yield european


def _based(text: str) -> Text | None:
    match = _BASED.fullmatch(text)
    if not match or not 2 <= int(match["base"]) <= 36:
        return None
    return Text(f"{match['digits'].lstrip('0')}_{int(match['base'])}")


def _ratio(text: str) -> Text | None:
    """2:4 as 1:2. What ends in two digits may be a time of day, and stays as it is."""
    match = re.fullmatch(r"(\d+) ?: ?(\d|\d{3,})", text)
    if not match or not int(match[2]):
        return None
    return Text(
        ":".join(map(str, Fraction(int(match[1]), int(match[2])).as_integer_ratio()))
    )


def _congruence(text: str) -> Congruence | None:
    match = _CONGRUENCE.fullmatch(text)
    if not match:
        return None
    left = match["left"] or match["name"] or ""
    if match["left"] is None and not left and "bmod" in match["mod"]:
        return None  # 17 \bmod 5 computes a number
    return Congruence(left, match["residue"], match["modulus"].strip())


def _items(text: str) -> Items | None:
    r"""The parts of a tuple, list, set or union; p ± q is two of them. Parts of `p=5,q=2;p=7,q=2`
    are tuples.
    """
    is_set = text.startswith(r"\{") and text.endswith(r"\}")
    if is_set and enclosed(text[1:-2] + "}", "{}"):
        kind = "{"
        text = text[2:-2].strip()
    elif len(parts := split(text, _UNION)) > 1:
        return Items(tuple(parts), "U")
    elif enclosed(text, *BRACKETS):
        parts = split(text[1:-1], "[,;]")
        return Items(tuple(parts), text[0] + text[-1]) if len(parts) > 1 else None
    else:
        kind = ""
    groups = split(text, ";")
    if len(groups) > 1 and any(len(split(group, ",")) > 1 for group in groups):
        parts = [
            group if len(split(group, ",")) == 1 else f"({group})" for group in groups
        ]
    else:
        parts = [item for part in split(text, _SEPARATOR) for item in _plus_minus(part)]
    parts = [part for part in parts if part]
    if not kind and r"\ldots" in parts:
        kind = ">"
    elif not kind and re.search(_INEQUALITY, text) and re.search(r"\band\b", text):
        kind = "&"
    return Items(tuple(parts), kind) if kind == "{" or len(parts) > 1 else None


def _plus_minus(text: str) -> list[str]:
    signs = _PLUS.search(text) or _MINUS.search(text)
    if not signs or enclosed(text, *BRACKETS) or text.count(r"\pm") > 1:
        return [text]
    return [_PLUS.sub(a, _MINUS.sub(b, text)) for a, b in ("+-", "-+")]


def _inequality(text: str) -> Iterator[Items | Relation]:
    """The interval of `a <= x < b` or `x < b`, and what a relation of two sides says."""
    parts = split(text, _INEQUALITY)
    signs = re.findall(_INEQUALITY, text)
    if len(parts) != len(signs) + 1 or len({sign[0] for sign in signs}) > 1:
        return
    if signs[0][0] == ">":
        parts.reverse()
        signs = [sign.replace(">", "<") for sign in reversed(signs)]
    chain = parts
    ends = signs
    if len(parts) == 2 and _VARIABLE.fullmatch(parts[0]):
        chain = [r"-\infty", *parts]
        ends = ["<", *signs]
    elif len(parts) == 2:
        chain = [*parts, r"\infty"]
        ends = [*signs, "<"]
    if len(chain) == 3 and "!=" not in ends and _VARIABLE.fullmatch(chain[1]):
        low, name, high = chain
        kind = ("[" if ends[0] == "<=" else "(") + ("]" if ends[1] == "<=" else ")")
        yield Items((low, high), kind, name)
    if len(parts) == 2:
        yield Relation(signs[0], "({})-({})".format(*parts))


def _equation(text: str) -> Iterator[Relation]:
    """What an equality gives; nothing where a side is missing."""
    exact, *rounded = split(text, _APPROX)
    parts = split(exact, _EQUALS)
    if len(rounded) > 1 or not all((*parts, *rounded)):
        return
    name = _name(parts[0], parts[-1])
    if not name and len(parts) == 2 and "\\in" not in exact:
        name = _name(parts[1], parts[0])
        parts = parts[::-1] if name else parts
    values = parts[1:] if name else parts
    if not name:
        bare = re.sub(r"\\(?:begin|end)\{\w+\}", "", "\n".join(parts))
        if "\\in" in exact or _FREE_LETTER.search(bare):
            values = rounded = []
        elif len(parts) == 2 and read_number(parts[0]) and not read_number(parts[1]):
            values = parts[::-1]  # 72 = 8 * 9 gives the number
    sides = text.split("=")
    difference = "({})-({})".format(*sides) if len(sides) == 2 else ""
    yield Relation("=", difference, name, tuple(values), *rounded)


def _name(text: str, value: str) -> str:
    """The name a value is given to: x_1, W of `W(n)`, P(A), (x,y), AB, AB : CD, area; "" of
    anything that computes.
    """
    bare = text.replace(" ", "")
    if call := _CALLED.fullmatch(bare):
        return call["name"]
    if _NAMED.fullmatch(bare):
        return bare
    words = re.findall(r"[a-z']+", text.casefold())
    of_words = re.fullmatch(r"[a-zA-Z]{3,}(?: [a-zA-Z]+)*", text)
    computes = (CHANGING | NUMBER_WORDS).intersection(words)
    return text if of_words and re.search(r"[\d\\]", value) and not computes else ""


def _expression(text: str) -> Quantity | Text:
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
    return Quantity(value, unit)
