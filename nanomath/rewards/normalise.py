r"""Bring an answer into one plain notation, and read numbers.

LaTeX allows many spellings of one answer (`\dfrac12`, `\frac{1}{2}`, `$\tfrac 1 2$`); the rules below map them to one,
in the spirit of the normalisers of MATH (Hendrycks et al., arXiv 2103.03874) and Minerva (arXiv 2206.14858). Splitting
respects brackets, so that "(0, 1), 2" has two parts.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from nanomath.rewards.extraction import HALF_WIDTH

_VULGAR = ["12", "13", "23", "14", "34", "15", "25", "35", "45", "16", "56", "18", "38", "58", "78"]
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_LEVEL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
_UNICODE = str.maketrans(
    {code: chr(half) if isinstance(half, int) else half for code, half in HALF_WIDTH.items()}
    | {ord(char): "-" for char in "−–—‐‑‒―﹣"}
    | {ord(char): "*" for char in "×·⋅"}
    | {ord(char): " " for char in "\u00a0\u2007\u2009\u200a\u202f"}
    | {ord(char): "" for char in "\ufeff\u2060\u200b\u200c\u200d\u200e\u200f\u00ad"}  # they cannot be seen
    | {ord(char): "" for char in "€£¥°"}
    | {ord("÷"): "/", ord("π"): r"\pi ", ord("∞"): r"\infty ", ord("√"): r"\sqrt ", ord("±"): r"\pm "}
    | {ord("≤"): "<=", ord("≥"): ">=", ord("≠"): "!=", ord("≈"): r"\approx ", ord("∪"): r"\cup ", ord("∈"): r"\in "}
    | {ord("θ"): r"\theta ", ord("α"): r"\alpha ", ord("β"): r"\beta ", ord("∅"): r"\emptyset ", ord("⁄"): "/"}
    | {
        ord(char): rf"\frac{{{top}}}{{{bottom}}}"
        for char, (top, bottom) in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", _VULGAR, strict=True)
    }
    | {ord("⩽"): "<=", ord("⩾"): ">=", ord("ℝ"): " R "}
    | {ord("、"): ",", ord("。"): "."}
)

_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_END = r"(?![a-zA-Z])"  # of a LaTeX command
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits){_END}", ""),
        (r",\\!\s*|\s*\{\s*,\s*\}\s*", ","),  # 11,\! 111 and 11{,}111
        (rf"(?<!\\)\\[!,;:> ]|~|(?<!\\)\\q?quad{_END}", " "),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # maths delimiters and dollars
        # A unit of one letter with its power, as in 5\text{ m}^2: any other letter is a factor
        (r"(?<=\d)(?:\s|~)*\\(?:text|mathrm)\s*\{\s*[mgshLlVWJNAK]\s*\}(?:\s*\^\s*(?:[23]|\{\s*[23]\s*\}))?", ""),
        (
            r"\\(?:text(?:bf|it|rm|tt|sf|sc|normal)?|math(?:rm|bf|it|bb|sf|tt|normal)|mbox|operatorname\*?)\s*\{([^{}]*)\}",
            r" \1 ",
        ),
        (
            rf"\\(?:text(?:bf|it|rm|tt|sf)|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|underline|textcolor\s*\{{\w*\}}){_END}",
            "",
        ),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\\frac{\1\2}{\3\4}"),
        (rf"\\(?:cdot|times|ast){_END}", "*"),
        (rf"\\(?:leq?q?|leqslant){_END}", "<="),
        (rf"\\(?:geq?q?|geqslant){_END}", ">="),
        (rf"\\neq?{_END}|\\not\s*=", "!="),
        (rf"\\lt{_END}", "<"),
        (rf"\\gt{_END}", ">"),
        (rf"\\(?:langle|lparen){_END}", "("),
        (rf"\\(?:rangle|rparen){_END}", ")"),
        (rf"\\[lr]?vert{_END}", "|"),
        (rf"\\varnothing{_END}|\\\{{\s*\\\}}", r"\\emptyset"),
        (rf"\^\s*\{{?\s*\\circ{_END}\s*\}}?|\\degree{_END}|\bdegrees?\b", ""),
        (r"\\%|\b(?:percent|pct)\b", "%"),
        (r"\[?\s*\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{pmatrix}"),
        (r"\\end\{array\}\s*\]?", r"\\end{pmatrix}"),
        (r"\\(begin|end)\{(?:[bpB]|small)matrix\}", r"\\\1{pmatrix}"),
        (r"^[a-zA-Z]\w*\s*\\in(?![a-zA-Z])", ""),  # x \in [0, 1]
        (rf"\\(pi|infty|theta|alpha|beta){_END}\s+", r"\\\1 "),
        (r"\*\*", "^"),
        (r"(\d)\s*(cm|mm|km|kg|mg|ml|ft|mph|hrs?|mins?)\b", r"\1 \2"),
        (r"\s+", " "),
    ]
]
# Commands escaped twice, by JSON or a careless prompt. Never a row break, since none of the names begins a cell.
_TWICE_ESCAPED = re.compile(
    r"\\\\(?=(?:[dtc]?frac|left|right|sqrt|text|boxed|cdot|times|pi|leq?|geq?|infty)(?![a-zA-Z]))"
)
_METRES = re.compile(r"(?<=\d)\s*[kcm]?m[²³]")  # a unit, where m^2 would be algebra

_FRACTION = re.compile(
    rf"(?:(?P<whole>\d+)\s*)?\\frac\{{\s*(?P<top>{_PLAIN})\s*\}}\{{\s*(?P<bottom>{_PLAIN})\s*\}}"
    rf"|(?:(?P<whole_>\d+) )?(?P<top_>{_PLAIN}) ?/ ?(?P<bottom_>{_PLAIN})"
)
_DECIMAL = re.compile(rf"(?P<digits>{_PLAIN})(?:(?:[eE]| ?\* ?10 ?\^)\{{?(?P<exponent>[-+]?\d{{1,3}})\}}?)?")
_EUROPEAN = re.compile(r"(\d+),(\d{2}|\d{4,})|(\d{1,3}(?:\.\d{3})+),(\d+)")
_UNIT = re.compile(r"(?P<value>.*[\d)}%|a-z]) (?P<unit>(?:[a-zA-Z]{2,}\.?(?: |(?=\^|$)))+)(?:\^\{?[23]\}?)?")
_CJK_UNIT = re.compile(r"(?P<value>.*\d) ?(?P<unit>[\u3040-\u30ff\u4e00-\u9fff]+)")
_NOT_UNITS = re.compile(
    r"\b(?:and|or|not|to|sin|cos|tan|sec|csc|cot|log|ln|exp|pi|sqrt|hundred|thousand|million|billion|dozen)\b", re.I
)
MAX_NUMBER = 1_000  # characters


class Number(NamedTuple):
    """A number as written: its exact value, decimals after the point (None: a fraction or integer), "%", its unit."""

    value: Fraction
    places: int | None = None
    percent: bool = False
    unit: str = ""

    @property
    def tolerance(self) -> Fraction:
        """Half a unit in the last place of a decimal of four significant digits or more, which may be a rounding."""
        if self.places is None or abs(self.value) * 10**self.places < 1000:
            return Fraction(0)
        return Fraction(1, 2 * 10**self.places)


def unescape(text: str) -> str:
    """Repair what would hide the structure of a text: twice escaped commands, metres with a raised 2."""
    return _METRES.sub("", _TWICE_ESCAPED.sub(r"\\", text))


def clean(text: str) -> str:
    """One answer in plain notation."""
    text = _RAISED.sub(lambda run: f"^{{{run[0].translate(_LEVEL)}}}", unescape(text))
    text = _LOWERED.sub(lambda run: f"_{{{run[0].translate(_LEVEL)}}}", text).translate(_UNICODE)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.strip(" *").rstrip(" .,;:")
    while enclosed(text, "{", "}") or (enclosed(text, "(", ")") and len(split(text[1:-1], ",;")) == 1):
        text = text[1:-1].strip()
    return text


def enclosed(text: str, opening: str = "([", closing: str = ")]") -> bool:
    """Whether the first character is a bracket whose partner is the last one: "(0, 1]" but not "(a)(b)"."""
    if len(text) < 2 or text[0] not in opening or text[-1] not in closing:
        return False
    depth = 0
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if not depth:
            return position == len(text) - 1
    return False


def split(text: str, separators: str | re.Pattern[str]) -> list[str]:
    """Parts of `text` between separators (characters, or a pattern) that stand outside all brackets."""
    pattern = separators if isinstance(separators, re.Pattern) else re.compile(f"[{re.escape(separators)}]")
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"(?P<open>[(\[{{])|(?P<close>[)\]}}])|(?P<separator>{pattern.pattern})", text):
        depth += (token["open"] is not None) - (token["close"] is not None)
        if token["separator"] and depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def split_unit(text: str) -> tuple[str, str]:
    """The value and its unit in words ("" if none): "64 square feet", "5個"."""
    match = _UNIT.fullmatch(text) or _CJK_UNIT.fullmatch(text)
    if not match or _NOT_UNITS.search(match["unit"]):
        return text, ""
    return match["value"].strip(), match["unit"].strip()


def same_unit(one: str, other: str) -> bool:
    """Whether two units may be one: the same words, or the letters of the shorter in order in the longer (ft, feet)."""
    short, long = sorted((re.sub(r"[\s.]", "", unit).casefold() for unit in (one, other)), key=len)
    letters = iter(long)
    return short[:1] == long[:1] and all(letter in letters for letter in short)


def read_number(text: str, european: bool = False) -> Number | None:
    """The number that a text is, None if it is anything else. `european`: the comma is the decimal point."""
    if len(text) > MAX_NUMBER:
        return None
    text, unit = split_unit(text)
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    sign = -1 if text.startswith("-") else 1
    text = text[1:].strip() if text[:1] in ("+", "-") else text
    if european and (match := _EUROPEAN.fullmatch(text)):
        text = f"{(match[1] or match[3]).replace('.', '')}.{match[2] or match[4]}"
    if match := _DECIMAL.fullmatch(text):
        digits = _bare(match["digits"])
        value = Fraction(digits) * Fraction(10) ** int(match["exponent"] or 0)
        places = len(digits.partition(".")[2]) if "." in digits and not match["exponent"] else None
        return Number(sign * value, places, percent, unit)
    if match := _FRACTION.fullmatch(text):
        whole, top, bottom = (_bare(match[name] or match[name + "_"] or "0") for name in ("whole", "top", "bottom"))
        if Fraction(bottom):
            return Number(sign * (int(whole) + Fraction(top) / Fraction(bottom)), None, percent, unit)
    return None


def _bare(digits: str) -> str:
    return digits.replace(",", "").replace(" ", "").rstrip(".")
