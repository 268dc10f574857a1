r"""Symbolic equality, as a program of its own: a question per line on stdin, `1` or `0` per
line on stdout.

`nanomath.rewards.worker` runs this file by its path, in a process that can be killed, because
no time limit inside a process stops sympy for certain (SIGALRM only reaches the main thread
and waits for C code). The file therefore imports nothing of nanomath, so that the process
starts without torch.

No text is ever evaluated as Python: a recursive-descent parser reads LaTeX and plain
arithmetic and builds the sympy expression itself. Two expressions are equal when they agree to
30 digits at random points: by the argument of Schwartz (1980) and Zippel (1979) chance
agreement is negligible, and it costs milliseconds where `simplify` can hang. What the grammar
does not cover (sums, integrals, ...) is left to math-verify where the question allows it and
its reader has read the whole: a reading that stays the same when a token is taken out has
passed over that token.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
from collections.abc import Iterator

import sympy

MEMORY_LIMIT = 2 * 1024**3  # bytes of address space
ORPHAN_LIMIT = 60  # seconds; the parent kills far earlier, this ends a worker whose parent died in mid-question
MAX_BITS = 20_000  # of an integer power: 9^9^9^9 is refused before it is computed
MAX_FACTORIAL = 1_000
MAX_LATEX = 300  # characters that math-verify is given; its reader takes seconds for more
DIGITS = 30
SCALES = (1, 10, 1, 100, 10, 1000, 100, 1)
BENDS = (sympy.Abs, sympy.floor, sympy.ceiling, sympy.Mod)
TINY = sympy.Float("1e-350")

FUNCTIONS = {
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "cot": sympy.cot,
    "sec": sympy.sec,
    "csc": sympy.csc,
    "arcsin": sympy.asin,
    "arccos": sympy.acos,
    "arctan": sympy.atan,
    "sinh": sympy.sinh,
    "cosh": sympy.cosh,
    "tanh": sympy.tanh,
    "exp": sympy.exp,
    "ln": sympy.log,
}
INVERSES = {"sin": sympy.asin, "cos": sympy.acos, "tan": sympy.atan}
CONSTANTS = {"pi": sympy.pi, "infty": sympy.oo, "e": sympy.E, "i": sympy.I}
GREEK = re.findall(
    r"\w+",
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu "
    "nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell",
)
OPERATORS = re.findall(
    r"\w+", "frac sqrt binom log lg div bmod mod begin end degree lfloor rfloor lceil rceil"
)
COMMANDS = frozenset([*FUNCTIONS, *CONSTANTS, *GREEK, *OPERATORS])
ROUNDED = {"lfloor": sympy.floor, "lceil": sympy.ceiling}
CLOSING = {"(": ")", "[": "]", "{": "}"}
# Function names are read without a backslash as well; the longest first, so that "sinh" is not
# "sin" times h.
WORDS = "|".join(sorted({*FUNCTIONS, "log", "lg", "sqrt", "pi"}, key=len, reverse=True))
TOKEN = re.compile(
    r"\\(?:begin|end)\{[a-zA-Z]*\}|\\\\|\\[a-zA-Z]+|\d+(?:\.\d*)?|\.\d+|"
    + WORDS
    + r"|[a-zA-Z]|[-+*/^(){}\[\]|!_&]"
)
# Tokens; products and groups say nothing by their signs.
MEANINGFUL = re.compile(r"\\(?:[a-zA-Z]+|.)|[^\s{}()\[\]*]")


class BeyondGrammar(ValueError):
    """A LaTeX command that the parser does not know."""


class Parser:
    """Recursive descent over the tokens of one expression. Each method reads one phrase and
    returns its value.
    """

    def __init__(self, text: str):
        unknown = [
            command
            for command in re.findall(r"\\([a-zA-Z]+)", text)
            if command not in COMMANDS
        ]
        rest = TOKEN.sub("", text).strip()
        if unknown:
            raise BeyondGrammar(unknown[0])
        if rest:
            raise ValueError(f"not in the grammar: {rest[:20]!r}")
        self.tokens = [
            token if token == r"\\" else token.lstrip("\\") for token in TOKEN.findall(text)
        ]
        self.position = 0
        self.bars = 0  # open |...|: inside, a bar closes

    def parse(self) -> sympy.Basic | sympy.Matrix:
        value = self.sum()
        if self.peek():
            raise ValueError(f"unexpected {self.peek()!r}")
        return value

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise ValueError(f"expected {expected or 'more'}, found {token!r}")
        self.position += 1
        return token

    def accept(self, *tokens: str) -> str:
        return self.take() if self.peek() in tokens else ""

    def sum(self):
        value = self.product()
        while sign := self.accept("+", "-"):
            term = self.product()
            value = value + term if sign == "+" else value - term
        return value

    def product(self):
        value = self.signed()
        while True:
            if operator := self.accept("*", "/", "div", "bmod", "mod"):
                value = combine(value, operator, self.signed())
            elif self.at_mixed_number():
                value += self.power()
            elif self.at_factor():
                value = value * self.power()
            else:
                return value

    def at_mixed_number(self) -> bool:
        r"""`1\frac{2}{3}` is 1 + 2/3, as school books write it; with letters inside it is a
        product.
        """
        window = self.tokens[max(self.position - 1, 0) : self.position + 7]
        return re.fullmatch(r"\d+ frac \{ \d+ \} \{ \d+ \}", " ".join(window)) is not None

    def at_factor(self) -> bool:
        """Whether a factor follows without a sign. Never a number: "1 2" is not 2."""
        token = self.peek()
        if token == "|":
            return not self.bars
        return bool(re.match(r"[a-zA-Z(\[{]", token)) and not token.startswith(
            ("end", "rfloor", "rceil", "degree")
        )

    def signed(self):
        if self.accept("-"):
            return -self.signed()
        self.accept("+")
        return self.power()

    def power(self):
        base = self.atom()
        while postfix := self.accept("!", "degree"):
            if postfix == "!" and self.peek() == "!":
                raise ValueError("a double factorial")
            base = factorial(base) if postfix == "!" else base * sympy.pi / 180
        return raise_to(base, self.signed()) if self.accept("^") else base

    def atom(self):
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return sympy.Rational(token.rstrip("."))
        if token in CLOSING:
            return self.enclosed(CLOSING[token])
        if token == "|":
            return self.absolute()
        if token.startswith("begin{"):
            return self.matrix()
        if token in ROUNDED:
            return ROUNDED[token](self.enclosed(f"r{token[1:]}"))
        if token in FUNCTIONS:
            return self.function(token)
        return self.named(token)

    def named(self, name: str):
        if name == "frac":
            return combine(self.atom(), "/", self.atom())
        if name == "binom":
            return binomial(self.atom(), self.atom())
        if name == "sqrt":
            degree = self.enclosed("]") if self.accept("[") else sympy.Integer(2)
            return raise_to(self.atom(), 1 / degree)
        if name in ("log", "lg"):
            return self.logarithm(name)
        if not name.isalpha():
            raise ValueError(f"unexpected {name!r}")
        if name == "f" and self.peek() == "(":
            return sympy.Function("f")(self.atom())
        if self.accept("_"):
            start = self.position
            self.atom()
            return sympy.Symbol(
                f"{name}_{' '.join(self.tokens[start : self.position]).strip('{ }')}"
            )
        return CONSTANTS[name] if name in CONSTANTS else sympy.Symbol(name)

    def enclosed(self, closing: str):
        bars = self.bars
        self.bars = 0
        value = self.sum()
        self.take(closing)
        self.bars = bars
        return value

    def absolute(self):
        self.bars += 1
        value = self.sum()
        self.take("|")
        self.bars -= 1
        return sympy.Abs(value)

    def matrix(self) -> sympy.Matrix | sympy.Expr:
        kind = self.tokens[self.position - 1]
        rows = [[]]
        while not self.peek().startswith("end{"):
            if self.accept(r"\\"):
                rows.append([])
            else:
                rows[-1].append(self.sum())
                if (
                    not self.accept("&")
                    and self.peek() != r"\\"
                    and not self.peek().startswith("end{")
                ):
                    raise ValueError("an entry without &")
        self.take()
        matrix = sympy.Matrix([row for row in rows if row])
        return matrix.det() if kind == "begin{vmatrix}" else matrix

    def function(self, name: str):
        exponent = self.signed() if self.accept("^") else 1
        if exponent == -1 and name in INVERSES:
            return INVERSES[name](self.argument())
        return FUNCTIONS[name](self.argument()) ** exponent

    def logarithm(self, name: str):
        """`log` without a base is the natural one, as in university maths; `lg` has base 10."""
        base = (
            self.atom()
            if self.accept("_")
            else sympy.Integer(10)
            if name == "lg"
            else sympy.E
        )
        return sympy.log(self.argument()) / sympy.log(base)

    def argument(self):
        """Of a function: what the brackets hold, or all factors that follow (`sin 2x`) up to
        the next function.
        """
        if self.peek() in CLOSING:
            return self.atom()
        value = self.power()
        while self.at_factor() and self.peek() not in FUNCTIONS:
            value = value * self.power()
        return value


def combine(left, operator: str, right):
    if operator == "*":
        return left * right
    return sympy.Mod(left, right) if "mod" in operator else left / right


def raise_to(base, exponent):
    if isinstance(base, sympy.Rational) and isinstance(exponent, sympy.Rational):
        bits = max(base.p.bit_length(), base.q.bit_length()) * abs(exponent)
        if abs(base) != 1 and bits > MAX_BITS:
            raise ValueError(f"a power of more than {MAX_BITS} bits")
    return base**exponent


def factorial(value):
    if value.is_number and abs(value) > MAX_FACTORIAL:
        raise ValueError(f"{value}!")
    return sympy.factorial(value)


def binomial(n, k):
    if any(value.is_number and abs(value) > MAX_FACTORIAL for value in (n, k)):
        raise ValueError(f"binomial({n}, {k})")
    return sympy.binomial(n, k)


def sample(*expressions: sympy.Basic, digits: int = 100) -> Iterator[list[sympy.Expr]]:
    """The expressions at random points of several scales (one is enough for constants), to
    DIGITS digits; where terms cancel, the computation has up to `digits`.
    """
    symbols = sorted(
        set().union(*(expression.free_symbols for expression in expressions)), key=str
    )
    rng = random.Random(0)
    bends = any(
        expression.has(*BENDS) or fractional_power(expression) for expression in expressions
    )
    for scale in (SCALES if bends else SCALES[::2]) if symbols else (1,):
        point = {
            symbol: sympy.Rational(scale * rng.randrange(-30_000, 30_000), 10_007)
            for symbol in symbols
        }
        yield [
            expression.evalf(DIGITS, subs=point, maxn=digits) for expression in expressions
        ]


def fractional_power(expression: sympy.Basic) -> bool:
    return any(not power.exp.is_integer for power in expression.atoms(sympy.Pow))


def close(
    left: sympy.Expr, right: sympy.Expr, tolerance: float = 0.0, zero: float = 0.0
) -> bool:
    """Within the tolerance or the last digits; what is below `zero` in size is 0."""
    if not (left.is_finite and right.is_finite):
        return bool(left == right and not left.has(sympy.nan, sympy.zoo))
    bound = max(tolerance, 10.0 ** (5 - DIGITS) * max(abs(left), abs(right)), zero)
    return bool(abs(left - right) <= bound)


def equal(gold: sympy.Basic, prediction: sympy.Basic, tolerance: float) -> bool:
    if isinstance(gold, sympy.MatrixBase) or isinstance(prediction, sympy.MatrixBase):
        same_shape = getattr(gold, "shape", None) == getattr(prediction, "shape", None)
        return same_shape and all(
            equal(a, b, tolerance) for a, b in zip(gold, prediction, strict=True)
        )
    if any(value.has(sympy.nan, sympy.zoo) for value in (gold, prediction)):
        return False
    if gold == prediction:
        return True
    if any(value.free_symbols and value.has(sympy.oo) for value in (gold, prediction)):
        return False
    if gold.is_Rational and prediction.is_Rational:
        return bool(abs(gold - prediction) <= sympy.Rational(tolerance))
    doubtful = False
    for pair in sample(prediction, gold):
        if not close(*pair, tolerance, 1e-60):
            return False
        doubtful = doubtful or not close(*pair, tolerance)
    # Terms that cancel leave a number that shrinks as more digits are computed; a small number
    # stays what it is.
    return not doubtful or all(
        close(*pair, tolerance, TINY) for pair in sample(prediction, gold, digits=1000)
    )


def multiple(gold: sympy.Basic, prediction: sympy.Basic, positive: bool) -> bool:
    """Whether gold = c * prediction for a constant c != 0 (c > 0 if `positive`): the same
    equation (inequality).
    """
    ratios = [a / b for a, b in sample(gold, prediction)]
    first = ratios[0]
    usable = first.is_finite and first != 0 and (first.is_positive or not positive)
    return bool(usable) and all(close(first, ratio) for ratio in ratios[1:])


def math_verify_equal(gold: str, prediction: str) -> bool:
    """math-verify's verdict; its own time limits use SIGALRM and are off, since the parent
    keeps the time.
    """
    from math_verify import verify

    return verify(
        read_whole(gold), read_whole(prediction), float_rounding=12, timeout_seconds=None
    )


def read_whole(text: str) -> sympy.Basic:
    """math-verify's reading of `text`. ValueError if it is the same without one of the tokens,
    or with another.
    """
    if len(text) > MAX_LATEX:
        raise ValueError(f"{len(text)} characters")
    whole = read_latex(text)
    names = {str(symbol) for symbol in whole.free_symbols}
    if any(re.fullmatch("[a-zA-Z]{2,}", name) and name not in GREEK for name in names):
        raise ValueError(f"a command is taken for a name in {text!r}")
    if any(
        limit.args[1] not in limit.args[0].free_symbols
        for limit in whole.atoms(sympy.Limit)
    ) or any(derivative.doit() == 0 for derivative in whole.atoms(sympy.Derivative)):
        raise ValueError(f"a derivative or a limit of what depends on nothing in {text!r}")
    printed = re.sub(r"[a-zA-Z]{2,}(?=\()|dir='.'|oo", "", str(whole))
    for token in MEANINGFUL.finditer(text):
        shown = token[0].isalnum() and printed.count(token[0]) >= text.count(token[0])
        if not shown and reads_as(
            text[: token.start()] + other(token[0]) + text[token.end() :], whole
        ):
            raise ValueError(f"{token[0]!r} is passed over in {text!r}")
    return whole


def read_latex(text: str) -> sympy.Basic:
    """math-verify's reading, nothing of the text left out beforehand. Any exception where it
    has none.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    plain = NormalizationConfig(basic_latex=False, boxed="none")
    exact = ConversionConfig(lowercase_symbols=False)
    return latex2sympy(text, normalization_config=plain, conversion_config=exact)


def reads_as(text: str, value: sympy.Basic) -> bool:
    try:
        return bool(read_latex(text) == value)
    except Exception:  # whatever the library raises on text that it cannot read
        return False


def other(token: str) -> str:
    """A digit or letter in place of one; nothing in place of anything else."""
    if token.isdigit():
        return str((int(token) + 1) % 10)
    return ("q" if token.islower() else "Q") if len(token) == 1 and token.isalpha() else " "


def answer(question: dict) -> bool:
    """`question`: gold, prediction, relation ("", "=" or "<"), tolerance, math_verify."""
    gold = question["gold"]
    prediction = question["prediction"]
    relation = question["relation"]
    try:
        expected = Parser(gold).parse()
        found = Parser(prediction).parse()
    except BeyondGrammar:
        return (
            question["math_verify"] and not relation and math_verify_equal(gold, prediction)
        )
    return (
        multiple(expected, found, relation == "<")
        if relation
        else equal(expected, found, question["tolerance"])
    )


def main() -> None:
    # No such limit on this system.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with contextlib.suppress(ImportError):  # before the clock of a question runs
        import math_verify  # noqa: F401
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    # Nothing that a library prints may be taken for a verdict.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print("ready", file=replies)
    for line in sys.stdin:
        signal.alarm(ORPHAN_LIMIT)
        try:
            verdict = answer(json.loads(line))
        except Exception:  # whatever a library raises on hostile text (MemoryError included): not shown equal
            verdict = False
        signal.alarm(0)
        print(int(verdict), file=replies)


if __name__ == "__main__":
    main()
