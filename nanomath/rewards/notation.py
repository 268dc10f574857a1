r"""Bring an answer into one plain notation; find its brackets and separators.

LaTeX and Unicode allow many spellings of one answer (`\dfrac12`, `\frac{1}{2}`, `$\tfrac 1 2$`,
`½`); the rules below map them to one, in the spirit of the normalisers of MATH (Hendrycks et
al., arXiv 2103.03874) and Minerva (arXiv 2206.14858). Only what says nothing is taken away:
fonts, sizes, colours, spacing, maths delimiters. A unit is marked, a command that is not known
here stays as it is.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

FONTS = (
    r"text(?:bf|it|rm|tt|sf|sc|normal)?|math(?:rm|bf|it|bb|sf|tt|normal|cal|frak|scr)|[mh]box"
    r"|operatorname\*?"
)
# Words that say something else of a value than what it counts: they make another answer of it.
CHANGING = frozenset(
    re.findall(
        r"[\w']+",
        """actually alternatively am and are base be but can cannot could cubed differ divided do
        does doubled doubt either else even except factorial false from greater half halved halves
        has have if impossible incorrect infinite infinity is isn't least less lose loses minus mod
        more most negated negative neither never no non none nope nor not odd only or other
        otherwise plus point quarter quarters recurring repeating squared than third thirds through
        times to too tripled twice undefined unknown unless until up was wasn't when where while win
        wins without wrong""",
    )
)
NUMBER_WORDS = frozenset(
    re.findall(
        r"\w+",
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
        fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty
        ninety""",
    )
)
UNIT_LETTERS = "mgshLlVWJNAK"  # of one letter, where \text says that it is no variable

_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
# A unit, where m^2 would be algebra
_METRES = re.compile(r"(?<=\d)\s*([kcdm]?m)([²³])")


# Characters, each with the text that it stands for.
_TABLE = r"""
× * · * ⋅ * ∗ * ∙ * ✕ * ✖ * ÷ / ⁄ / ∕ / − - ≤ <= ⩽ <= ≦ <= ≥ >= ⩾ >= ≧ >= ≠ != 、 , 。 . ⟨ ( ⟩ )
′ ' ’ ' ∶ : √ \sqrt ∛ \sqrt[3] ∞ \infty ± \pm ∓ \mp ≈ \approx ∪ \cup ∩ \cap ∈ \in ∉ \notin
⊂ \subset ⊆ \subseteq ∅ \emptyset ∖ \setminus ⌊ \lfloor ⌋ \rfloor ⌈ \lceil ⌉ \rceil ∠ \angle
△ \triangle ∆ \triangle ≡ \equiv ∣ \mid ∤ \nmid ∥ \parallel ⊥ \perp ≅ \cong ∼ \sim ∑ \sum
∏ \prod ∫ \int ∂ \partial → \to ∀ \forall ∃ \exists ° \degree º \degree ˚ \degree € \euro
£ \pound ¥ \yen ¢ \cent λ \lambda Λ \Lambda
"""
_SYMBOLS = {
    char: plain + " " if plain.startswith("\\") else plain
    for char, plain in re.findall(r"(\S)\s+(\S+)", _TABLE)
}
_KINDS = {"Pd": "-", "Zs": " ", "Cf": ""}  # by category; what is of Cf cannot be seen
_GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER (\w+)")
_QUOTES = "\"'`“”„«»‘’「」『』"

_NAMES = {
    "*": "cdot times ast",
    "<=": "le leq leqq leqslant",
    ">=": "ge geq geqq geqslant",
    "!=": "ne neq",
    "<": "lt",
    ">": "gt",
    "(": "langle lparen",
    ")": "rangle rparen",
    "|": "vert lvert rvert",
    r"\{": "lbrace",
    r"\}": "rbrace",
    r"\frac": "dfrac tfrac cfrac",
    r"\binom": "dbinom tbinom",
    r"\emptyset ": "varnothing",
    r"\nmid ": "notmid",
    r"\ldots ": "dots cdots dotsc dotsb dotso",
    " ": "enspace thinspace",
    "": "left right middle big Big bigg Bigg bigl Bigl biggl Biggl bigr Bigr biggr Biggr "
    "displaystyle textstyle limits nolimits tiny small normalsize large Large LARGE huge Huge "
    "bf rm it sf tt boldsymbol bm pmb scriptstyle emph",
}
_COMMANDS = {name: plain for plain, names in _NAMES.items() for name in names.split()}
_END = r"(?![a-zA-Z])"  # of a LaTeX command
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r",\\!\s*", ","),  # 11,\! 111
        (
            r"\\(?:begin|end)\{(?:aligned|align\*?|equation\*?|gather\*?|split)\}"
            r"|\\(?:left|right)\s*\.",
            " ",
        ),
        (r"(?<=\\\\)\[[\d.]+\w+\]", ""),  # room between rows
        (r"&\s*=", "="),
        (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![a-zA-Z]))", "'"),
        (rf"\\not\s*\\(in|mid){_END}", r"\\not\1 "),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\(?:text)?color(?:box)?\s*(?:\[\w*\])?\s*\{[\w!.,#]*\}", " "),
        (r"\\(?:[hv](?:space|phantom)|phantom|tag|label)\*?\s*\{[^{}]*\}", " "),
        (r"(?<!\\)\\[!,;:> ]|\\q?quad", " "),
        (r"\\\$", r"\\dollar "),
        (r"^\s*\\underline\s*(?=\{)", ""),
        (r"(?<!\\)\\[()\[\]]", ""),  # maths delimiters
        (rf"\s*\\(?:{FONTS})\s*\{{([^{{}}]*)\}}", lambda match: _words(match)),
        (rf"\\(?:{FONTS}){_END}", ""),
        (r"\\([a-zA-Z]+)", lambda match: _COMMANDS.get(match[1], match[0])),
        (r"\\not\s*=", "!="),
        (
            r"\\(frac|binom)\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))",
            r"\\\1{\2\3}{\4\5}",
        ),
        (r"\\\{\s*\\\}", r"\\emptyset "),
        (rf"\^\s*(?:\{{\s*\\(?:circ|degree)\s*\}}|\\circ{_END})", r"\\degree "),
        (r"\\%", "%"),
        (r"\[?\s*\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{pmatrix}"),
        (r"\\end\{array\}\s*\]?", r"\\end{pmatrix}"),
        (r"\\(begin|end)\{(?:[bpB]|small)?matrix\}", r"\\\1{pmatrix}"),
        (
            r"\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?",
            r"\\overline{\1\2\3}",
        ),  # a repeating decimal
        (r"\\(angle|triangle)\s*\{\s*(\w+)\s*\}", r"\\\1 \2"),
    ]
]
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[\s~]+", " "),
        (r" ?\{ ?, ?\} ?", ","),  # 11{,}111
        (r"\$", ""),
        (r"\b(?:percent|pct)\b", "%"),
        (r"\.{3,}", r"\\ldots "),
        (r"\*\*", "^"),
        (r"(?<![a-zA-Z\\])(?:oo|inf|infinity)(?![a-zA-Z])", r"\\infty "),
        (r"(?<=[\])}])\s*U\s*(?=[(\[\\{])", r"\\cup "),
        (r"\b([ap])\.\s?m\.", r"\1m"),
        (r"([_^])\{\s*(\w)\s*\}", r"\1\2"),
        (r"(?<=\{)\s+|\s+(?=\})", ""),
        (r" +", " "),
    ]
]
# A number that is written in kanji, all of it or with digits, and nothing but what it counts:
# "一次", "三角形", "二三百" (two or three hundred) and "三個と五個" are none.
_KANJI_UNITS = dict(
    zip("兆億万千百十", (10**12, 10**8, 10**4, 1000, 100, 10), strict=True)
)
_DIGIT = "〇一二三四五六七八九"
_KANJI_DIGITS = str.maketrans(_DIGIT, "0123456789", ",")
_KANJI = _DIGIT + "".join(_KANJI_UNITS)
_KANJI_NUMBER = re.compile(
    rf"^(-?)([\d.,{_KANJI}]*[{_KANJI}][\d,]*)"
    r"(?=$|[\s個本枚人円回つ冊匹羽頭台回歳才年日時秒度%\\.]|通り|ドル|ユーロ|メートル|[kcm]?[mg]$)"
    rf"(?=[^{_KANJI}]*$)"
)
_COUNT = re.compile(rf"[{_DIGIT}]〇*|(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?")
# Commands escaped twice, by JSON or a careless prompt. Never a row break, since none of the
# names begins a cell.
_TWICE_ESCAPED = re.compile(
    r"\\\\(?=(?:[dtc]?frac|left|right|sqrt|text|boxed|cdot|times|pi|leq?|geq?|infty|circ|pm|cup|cap"
    r"|mbox|mathrm)(?![a-zA-Z]))"
)


def unescape(text: str) -> str:
    """Return the text with its twice escaped commands repaired, which would hide its structure."""
    return _TWICE_ESCAPED.sub(r"\\", text)


def clean(text: str) -> str:
    """Return one answer in plain notation; what is plain already comes back as it is."""
    text = _METRES.sub(
        lambda unit: rf" \unit{{{unit[1]}}}^{_compatible(unit[2])}", unescape(text)
    )
    if re.search(r"\\(?:nabla|vec)", text):
        text = text.replace(r"\times", r"\cross ")  # not the same as \cdot
    text = re.sub(r"^\s*\*\*(.*)\*\*\s*$", r"\1", text, flags=re.DOTALL)  # markdown
    if text.count("$") == 1:  # no maths delimiter
        text = re.sub(r"(?<!\\)\$(?=\s*[\d.])", r"\\dollar ", text)
    if not text.isascii():
        text = _KANJI_NUMBER.sub(_in_digits, _ascii(text))
    for pattern, replacement in (_LATEX + _RULES) if "\\" in text else _RULES:
        text = pattern.sub(replacement, text)
    while (bare := _without_frame(text)) != text:
        text = bare
    return text


def _in_digits(match: re.Match[str]) -> str:
    """A number in kanji in digits: 20000 of 2万, 120 of 百二十, 2024 of 二〇二四. What is none of
    these is left as it is.
    """
    text = match[2]
    value = _digits(text) if set(text) <= set(_DIGIT) else _kanji_value(text)
    return match[0] if value is None or value.denominator > 1 else f"{match[1]}{value}"


def _kanji_value(text: str) -> Fraction | None:
    """What counts the greatest unit, times that unit, and a rest that is less than it."""
    for unit, size in _KANJI_UNITS.items():
        if unit in text:
            head, tail = text.split(unit, 1)
            count = _kanji_value(head or "一" * (size < 10**4))
            rest = _kanji_value(tail or "〇")
            most = 10**4 if size >= 10**4 else 10
            unclear = None in (count, rest) or count >= most or rest >= size
            return None if unclear or ("." in head and tail) else count * size + rest
    return _digits(text) if _COUNT.fullmatch(text) else None


def _digits(text: str) -> Fraction:
    return Fraction(text.translate(_KANJI_DIGITS))


def _without_frame(text: str) -> str:
    """Without stops at the end, and without one pair of quotes, braces or parentheses around
    the whole.
    """
    text = text.strip().rstrip(" .,;:")
    if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1]
    inner = text[1:-1]
    grouped = enclosed(text, "()") and len(split(inner, "[,;]")) == 1
    return inner if grouped or enclosed(text, "{}") else text


def _words(match: re.Match[str]) -> str:
    r"""What \text holds, as words; the letter of a unit after a value is marked, as in
    `5\text{ m}`, `9\text{ m/s}`.
    """
    words = match[1].strip(" ~")
    before = match.string[: match.start()]
    letters = re.fullmatch(rf"[{UNIT_LETTERS}](?:/[{UNIT_LETTERS}])*", words)
    if letters and re.search(r"[\d)}%a-z]$|\}\s*(?:/|\\cdot)$", before):
        words = re.sub("[a-zA-Z]", r"\\unit{\g<0>}", words)
    return f" {words} "


def _ascii(text: str) -> str:
    """LaTeX and ASCII for the characters that stand for it; what is left is Unicode's
    compatible form (NFKC).
    """
    text = _VULGAR.sub(
        lambda char: r"\frac{{{}}}{{{}}}".format(*_compatible(char[0]).split("⁄")), text
    )
    text = _RAISED.sub(lambda run: f"^{{{_compatible(run[0])}}}", text)
    text = _LOWERED.sub(lambda run: f"_{{{_compatible(run[0])}}}", text)
    return re.sub(r"[^\x00-\x7f]", lambda char: _plain(char[0]), text)


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


@lru_cache(maxsize=1 << 10)
def _plain(char: str) -> str:
    """One character that is not ASCII: symbols and Greek as commands, any hyphen, space and
    digit as the usual one.
    """
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    kind = unicodedata.category(char)
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if greek := _GREEK.fullmatch(unicodedata.name(char, "")):
        name = greek[2].lower() if greek[1] == "SMALL" else greek[2].title()
        return f"\\{name} "
    other = _compatible(char)
    # ① is no digit.
    return char if other == char or kind == "No" else _ascii(other)


def enclosed(text: str, *brackets: str) -> bool:
    """Return whether one of the pairs of brackets stands around the whole text: around
    "(0, 1]" but not around "(a)(b)".
    """
    if text[:1] + text[-1:] not in brackets:
        return False
    *inside, end = accumulate((char in "([{") - (char in ")]}") for char in text)
    return end == 0 and 0 not in inside


def split(text: str, separator: str) -> list[str]:
    """Return the parts of `text` between what the pattern `separator` matches outside all
    brackets.
    """
    parts = []
    depth = start = 0
    for token in re.finditer(rf"[(\[{{]|[)\]}}]|(?P<separator>{separator})", text):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if token["separator"] and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]
