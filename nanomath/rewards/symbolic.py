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
import operator
import os
import random
import re
import signal
import sys
from collections.abc import Iterator

import sympy

MEMORY_LIMIT = 2 * 1024**3  # bytes of address space
# Seconds. The parent kills far earlier; this ends a worker whose parent died in mid-question.
ORPHAN_LIMIT = 60
MAX_BITS = 20_000  # of an integer power: 9^9^9^9 is refused before it is computed
MAX_FACTORIAL = 1_000
# Characters that math-verify is given; its reader takes seconds for more
MAX_LATEX = 300
DIGITS = 30
MOST_DIGITS = 1000
SCALES = (1, 10, 1, 100, 10, 1000, 100, 1)
BENDS = (sympy.Abs, sympy.floor, sympy.ceiling, sympy.Mod)
TINY = sympy.Float("1e-350")

ALIKE = "sin cos tan cot sec csc sinh cosh tanh exp"  # named so in LaTeX and in sympy
FUNCTIONS = {
    **{name: getattr(sympy, name) for name in ALIKE.split()},
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan")},
    "ln": sympy.log,
}
CONSTANTS = {"pi": sympy.pi, "infty": sympy.oo, "e": sympy.E, "i": sympy.I}
TERMS = {"+": operator.add, "-": operator.sub}
FACTORS = {
    "*": operator.mul,
    "/": operator.truediv,
    "div": operator.truediv,
    "bmod": sympy.Mod,
    "mod": sympy.Mod,
}
GREEK = re.findall(
    r"\w+",
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu
    xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon
    Phi Psi Omega ell""",
)
OTHERS = re.findall(
    r"\w+", "frac sqrt binom log lg begin end degree lfloor rfloor lceil rceil"
)
COMMANDS = frozenset([*FUNCTIONS, *CONSTANTS, *FACTORS, *GREEK, *OTHERS])
CLOSING = {"(": ")", "[": "]", "{": "}"}
# Brackets that change what they hold.
AROUND = {
    "|": ("|", sympy.Abs),
    "lfloor": ("rfloor", sympy.floor),
    "lceil": ("rceil", sympy.ceiling),
}
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
        for command in re.findall(r"\\([a-zA-Z]+)", text):
            if command not in COMMANDS:
                raise BeyondGrammar(command)
        if rest := TOKEN.sub("", text).strip():
            raise ValueError(f"not in the grammar: {rest[:20]!r}")
        self.tokens = [
            token if token == r"\\" else token.lstrip("\\")
            for token in TOKEN.findall(text)
        ]
        self.position = 0
        self.in_bars = False  # within |...| a bar closes

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
        while sign := self.accept(*TERMS):
            value = TERMS[sign](value, self.product())
        return value

    def product(self):
        value = self.signed()
        while True:
            if sign := self.accept(*FACTORS):
                value = FACTORS[sign](value, self.signed())
            elif self.at_mixed_number():
                value += self.power()
            elif self.at_factor():
                value *= self.power()
            else:
                return value

    def at_mixed_number(self) -> bool:
        r"""Return whether `2/3` of `1\frac{2}{3}` follows: 1 + 2/3, as school books write it; with
        letters inside it is a product.
        """
        window = self.tokens[max(self.position - 1, 0) : self.position + 7]
        return (
            re.fullmatch(r"\d+ frac \{ \d+ \} \{ \d+ \}", " ".join(window)) is not None
        )

    def at_factor(self) -> bool:
        """Return whether a factor follows without a sign. Never a number: "1 2" is not 2."""
        if self.peek() == "|":
            return not self.in_bars
        ends = r"end|rfloor|rceil|degree"
        return re.match(rf"(?!{ends})[a-zA-Z(\[{{]", self.peek()) is not None

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
            base = (
                sympy.factorial(small(base))
                if postfix == "!"
                else base * sympy.pi / 180
            )
        return raise_to(base, self.signed()) if self.accept("^") else base

    def atom(self):
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return sympy.Rational(token.rstrip("."))
        if token in CLOSING:
            return self.enclosed(CLOSING[token])
        if token in AROUND:
            closing, function = AROUND[token]
            return function(self.enclosed(closing))
        if token.startswith("begin{"):
            return self.matrix(token)
        if token in FUNCTIONS:
            return self.function(token)
        return self.named(token)

    def named(self, name: str):
        if name == "frac":
            return self.atom() / self.atom()
        if name == "binom":
            return sympy.binomial(small(self.atom()), small(self.atom()))
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
            index = " ".join(self.tokens[start : self.position]).strip("{ }")
            return sympy.Symbol(f"{name}_{index}")
        return CONSTANTS[name] if name in CONSTANTS else sympy.Symbol(name)

    def enclosed(self, closing: str):
        outside = self.in_bars
        self.in_bars = closing == "|"
        value = self.sum()
        self.take(closing)
        self.in_bars = outside
        return value

    def matrix(self, begin: str) -> sympy.Matrix | sympy.Expr:
        rows = [[]]
        while not self.peek().startswith("end{"):
            if self.accept(r"\\"):
                rows.append([])
                continue
            rows[-1].append(self.sum())
            if not self.accept("&") and not self.peek().startswith(("\\", "end{")):
                raise ValueError("an entry without &")
        self.take()
        matrix = sympy.Matrix([row for row in rows if row])
        return matrix.det() if begin == "begin{vmatrix}" else matrix

    def function(self, name: str):
        exponent = self.signed() if self.accept("^") else 1
        if exponent == -1 and f"arc{name}" in FUNCTIONS:
            return FUNCTIONS[f"arc{name}"](self.argument())
        return FUNCTIONS[name](self.argument()) ** exponent

    def logarithm(self, name: str):
        """Read `log`, without a base the natural one, as in university maths; `lg` has base 10."""
        base = sympy.Integer(10) if name == "lg" else sympy.E
        if self.accept("_"):
            base = self.atom()
        return sympy.log(self.argument()) / sympy.log(base)

    def argument(self):
        """Read the argument of a function: what the brackets hold, or all factors that follow
        (`sin 2x`) up to the next function.
        """
        if self.peek() in CLOSING:
            return self.atom()
        value = self.power()
        while self.at_factor() and self.peek() not in FUNCTIONS:
            value *= self.power()
        return value


def raise_to(base, exponent):
    if isinstance(base, sympy.Rational) and isinstance(exponent, sympy.Rational):
        bits = max(base.p.bit_length(), base.q.bit_length()) * abs(exponent)
        if abs(base) != 1 and bits > MAX_BITS:
            raise ValueError(f"a power of more than {MAX_BITS} bits")
    return base**exponent


def small(value):
    if value.is_number and abs(value) > MAX_FACTORIAL:
        raise ValueError(f"the factorial or binomial of {value}")
    return value


def sample(*expressions: sympy.Basic) -> Iterator[list[sympy.Expr]]:
    """Give the values of the expressions at random points of several scales (one is enough for
    constants), to DIGITS digits; where terms cancel, the computation has up to MOST_DIGITS.
    """
    together = sympy.Tuple(*expressions)
    symbols = sorted(together.free_symbols, key=str)
    rng = random.Random(0)
    powers = together.atoms(sympy.Pow)
    bends = together.has(*BENDS) or any(not power.exp.is_integer for power in powers)
    for scale in (SCALES if bends else SCALES[::2]) if symbols else (1,):
        point = {
            symbol: sympy.Rational(scale * rng.randrange(-30_000, 30_000), 10_007)
            for symbol in symbols
        }
        yield [
            expression.evalf(DIGITS, subs=point, maxn=MOST_DIGITS)
            for expression in expressions
        ]


def close(left: sympy.Expr, right: sympy.Expr, tolerance: float = 0.0) -> bool:
    """Return whether two values are equal within the tolerance or the last digits."""
    if not (left.is_finite and right.is_finite):
        return bool(left == right and not left.has(sympy.nan, sympy.zoo))
    bound = max(tolerance, 10.0 ** (5 - DIGITS) * max(abs(left), abs(right)))
    return bool(abs(left - right) <= bound)


def equal(gold: sympy.Basic, prediction: sympy.Basic, tolerance: float) -> bool:
    shapes = {getattr(value, "shape", ()) for value in (gold, prediction)}
    if shapes != {()}:  # of matrices
        return len(shapes) == 1 and all(
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
    # Terms that cancel leave a number that shrinks as more digits are computed; a small number
    # stays what it is.
    return all(close(*pair, max(tolerance, TINY)) for pair in sample(prediction, gold))


def multiple(gold: sympy.Basic, prediction: sympy.Basic, positive: bool) -> bool:
    """Return whether gold = c * prediction for a constant c != 0 (c > 0 if `positive`): the same
    equation (inequality).
    """
    ratios = [a / b for a, b in sample(gold, prediction)]
    first = ratios[0]
    usable = first.is_finite and first != 0 and (first.is_positive or not positive)
    return bool(usable) and all(close(first, ratio) for ratio in ratios[1:])


def math_verify_equal(gold: str, prediction: str) -> bool:
    """Return math-verify's verdict; its own time limits use SIGALRM and are off, since the parent
    keeps the time.
    """
    from math_verify import verify

    return verify(
        read_whole(gold),
        read_whole(prediction),
        float_rounding=12,
        timeout_seconds=None,
    )


def read_whole(text: str) -> sympy.Basic:
    """Return math-verify's reading of `text`. ValueError if it is the same without one of the
    tokens, or with another.
    """
    if len(text) > MAX_LATEX:
        raise ValueError(f"{len(text)} characters")
    whole = read_latex(text)
    names = {str(symbol) for symbol in whole.free_symbols}.difference(GREEK)
    if any(re.fullmatch("[a-zA-Z]{2,}", name) for name in names):
        raise ValueError(f"a command is taken for a name in {text!r}")
    if any(
        limit.args[1] not in limit.args[0].free_symbols
        for limit in whole.atoms(sympy.Limit)
    ) or any(derivative.doit() == 0 for derivative in whole.atoms(sympy.Derivative)):
        raise ValueError(
            f"a derivative or a limit of what depends on nothing in {text!r}"
        )
    printed = re.sub(r"[a-zA-Z]{2,}(?=\()|dir='.'|oo", "", str(whole))
    for token in MEANINGFUL.finditer(text):
        shown = token[0].isalnum() and printed.count(token[0]) >= text.count(token[0])
        if not shown and reads_as(
            text[: token.start()] + other(token[0]) + text[token.end() :], whole
        ):
            raise ValueError(f"{token[0]!r} is passed over in {text!r}")
    return whole


def read_latex(text: str) -> sympy.Basic:
    """Return math-verify's reading, nothing of the text left out beforehand. Any exception where
    it has none.
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
    """Return another digit or letter in place of one; nothing in place of anything else."""
    if token.isdigit():
        return str((int(token) + 1) % 10)
    return (
        ("q" if token.islower() else "Q")
        if len(token) == 1 and token.isalpha()
        else " "
    )


def answer(
    gold: str, prediction: str, relation: str, tolerance: float, math_verify: bool
) -> bool:
    """Return whether the two are equal; for the relation "=" or "<" whether they are multiples,
    for "<" by a positive factor.
    """
    try:
        expected = Parser(gold).parse()
        found = Parser(prediction).parse()
    except BeyondGrammar:
        return math_verify and not relation and math_verify_equal(gold, prediction)
    if relation:
        return multiple(expected, found, relation == "<")
    return equal(expected, found, tolerance)


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
            verdict = answer(**json.loads(line))
        except (
            Exception
        ):  # whatever a library raises on hostile text, MemoryError included
            verdict = False
        signal.alarm(0)
        print(int(verdict), file=replies)


if __name__ == "__main__":
    main()
