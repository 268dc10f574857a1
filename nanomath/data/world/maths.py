"""Maths: chained word problems in one running quantity; difficulty is the number of events,
one step each.

    value_0 = start,   value_k = value_{k-1} (+ - * /) operand_k,   1 <= value_k <= 50 and whole

Content: {"start": 12, "events": [["+", 7], ["/", 2]], "name": 0, "object": 3, "wording": [2,
0]}. A step is right if the only equation in it applies event k to the running value; both
orders of + and * are right. Its words are not checked, but any further number or operator
makes the step wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from .family import Family, Metadata, in_japanese, rows, unseen

LARGEST = 50
LARGEST_START = 30
LARGEST_TERM = 9  # what is added or taken away has one digit
# Starts of the split "numbers", whose terms have two digits
BEYOND = range(LARGEST + 1, 100)


class Wording(NamedTuple):
    """How an event is told and how its step begins; {n} is the operand, {c} the counter."""

    en: str
    en_step: str
    ja: str
    ja_step: str


# English, Japanese, pronoun.
NAMES = rows("""
Mia | ミア | She
Tom | トム | He
Anna | アンナ | She
Ken | ケン | He
Yuki | ユキ | She
Leo | レオ | He
Emma | エマ | She
Sora | ソラ | He
""")
# English, Japanese, the Japanese counter.
OBJECTS = rows("""
apples | りんご | 個
pens | ペン | 本
books | 本 | 冊
coins | コイン | 枚
cards | カード | 枚
shells | 貝がら | 個
eggs | 卵 | 個
stickers | シール | 枚
""")
# Three wordings of each operation, then three in the same words that only the split "templates"
# has; doubling and halving have words of their own.
WORDINGS: dict[str, list[Wording]] = {}
for event, *cells in rows("""
+ | buys {n} more | Buying | {n}{c}買います | 買うと
+ | finds {n} more | Finding | {n}{c}見つけます | 見つけると
+ | gets {n} from a friend | Getting | 友達から{n}{c}もらいます | もらうと
+ | buys {n} from a friend | Buying | 友達から{n}{c}買います | 買うと
+ | soon finds {n} more | Finding | やがて{n}{c}見つけます | 見つけると
+ | gets {n} more | Getting | {n}{c}もらいます | もらうと
- | sells {n} | Selling | {n}{c}売ります | 売ると
- | loses {n} | Losing | {n}{c}なくします | なくすと
- | gives {n} to a friend | Giving | 友達に{n}{c}あげます | あげると
- | sells {n} to a friend | Selling | 友達に{n}{c}売ります | 売ると
- | soon loses {n} | Losing | やがて{n}{c}なくします | なくすと
- | gives {n} away | Giving | {n}{c}あげます | あげると
* | now has {n} times as many | Growing | 数が{n}倍になります | 増えると
* | soon has {n} times as many | Growing | やがて{n}倍になります | 増えると
* | ends up with {n} times as many | Growing | {n}倍に増やします | 増やすと
* | has {n} times as many now | Growing | 今数が{n}倍になります | 増えると
* | soon ends up with {n} times as many | Growing | 数がやがて{n}倍になります | 増えると
* | now ends up with {n} times as many | Growing | 数を{n}倍に増やします | 増やすと
/ | makes {n} equal parts and keeps one | Sharing | {n}等分して、一つだけ残します | 分けると
/ | keeps only one of {n} equal parts | Sharing | {n}等分した一つだけを取ります | 分けると
/ | shares equally among {n}, keeping one share | Sharing | {n}等分し、一人分を取ります | 分けると
/ | makes {n} equal parts, keeping one | Sharing | {n}等分して、一つだけを取ります | 分けると
/ | keeps only one share of {n} equal parts | Sharing | {n}等分した一人分を取ります | 分けると
/ | shares equally among {n} and keeps one | Sharing | {n}等分し、一つだけ残します | 分けると
*2 | now has twice as many | Doubling | 数が倍になります | 倍にすると
*2 | soon has twice as many | Doubling | やがて倍になります | 倍にすると
*2 | ends up with twice as many | Doubling | 倍に増やします | 倍にすると
*2 | has twice as many now | Doubling | 今数が倍になります | 倍にすると
*2 | soon ends up with twice as many | Doubling | 数がやがて倍になります | 倍にすると
*2 | now ends up with twice as many | Doubling | 数を倍に増やします | 倍にすると
/2 | gives away half | Halving | 半分をあげます | 半分にすると
/2 | sells half | Halving | 半分を売ります | 半分にすると
/2 | loses half | Halving | 半分をなくします | 半分にすると
/2 | gives half to a friend | Halving | 友達に半分をあげます | 半分にすると
/2 | sells half to a friend | Halving | 友達に半分を売ります | 半分にすると
/2 | soon loses half | Halving | やがて半分をなくします | 半分にすると
"""):
    WORDINGS.setdefault(event, []).append(Wording(*cells))
WORDINGS_PER_EVENT = 3


def apply(value: int, operator: str, operand: int) -> int:
    """Return the running value after one event; division is exact by construction."""
    return {
        "+": value + operand,
        "-": value - operand,
        "*": value * operand,
        "/": value // operand,
    }[operator]


def sensible_events(
    value: int, largest: int, terms: range
) -> list[tuple[str, Sequence[int]]]:
    """Return, for each operator, the operands that change `value` and keep it whole and in
    1..largest.
    """
    operands = {
        "+": terms[: max(0, largest - value - terms[0] + 1)],
        "-": terms[: max(0, value - terms[0])],
        "*": range(2, min(5, largest // value) + 1),
        "/": [n for n in range(2, 6) if value % n == 0],
    }
    return [(operator, choices) for operator, choices in operands.items() if choices]


def draw(random: Random, difficulty: int) -> Metadata:
    starts = range(2, LARGEST_START + 1)
    return draw_within(random, difficulty, starts, LARGEST, range(1, LARGEST_TERM + 1))


def draw_beyond(random: Random, difficulty: int) -> Metadata:
    return draw_within(random, difficulty, BEYOND, BEYOND[-1], range(10, 20))


def draw_within(
    random: Random, difficulty: int, starts: range, largest: int, terms: range
) -> Metadata:
    start = value = random.choice(starts)
    events = []
    for _ in range(difficulty):
        operator, operands = random.choice(sensible_events(value, largest, terms))
        operand = random.choice(operands)
        value = apply(value, operator, operand)
        events.append([operator, operand])
    wording = [random.randrange(WORDINGS_PER_EVENT) for _ in events]
    return {
        "start": start,
        "events": events,
        "wording": wording,
        "name": random.randrange(len(NAMES)),
        "object": random.randrange(len(OBJECTS)),
    }


def worded_events(metadata: Metadata) -> list[tuple[str, int, Wording]]:
    """Return (operator, operand, wording) of each event."""
    events = zip(metadata["events"], metadata["wording"], strict=True)
    first = WORDINGS_PER_EVENT if unseen(metadata) else 0
    return [
        (
            operator,
            operand,
            WORDINGS.get(f"{operator}{operand}", WORDINGS[operator])[first + choice],
        )
        for (operator, operand), choice in events
    ]


def question(metadata: Metadata) -> str:
    start = metadata["start"]
    name, kana, pronoun = NAMES[metadata["name"]]
    thing, mono, counter = OBJECTS[metadata["object"]]
    events = worded_events(metadata)
    if in_japanese(metadata):
        told = [f"{wording.ja.format(n=n, c=counter)}。" for _, n, wording in events]
        has = f"{kana}は{mono}を{start}{counter}持っています。"
        return f"{has}{''.join(told)}今{mono}は何{counter}ですか。"
    told = [f"{pronoun} {wording.en.format(n=n)}. " for _, n, wording in events]
    has = f"{name} has {start} {thing}. "
    return f"{has}{''.join(told)}How many {thing} does {name} have now?"


def solve(metadata: Metadata) -> tuple[list[str], str]:
    value = metadata["start"]
    steps = []
    for operator, operand, wording in worded_events(metadata):
        result = apply(value, operator, operand)
        equation = f"{value}{operator}{operand}={result}"
        if in_japanese(metadata):
            steps.append(f"{wording.ja_step}{equation}。")
        else:
            steps.append(f"{wording.en_step}: {equation}.")
        value = result
    return steps, str(value)


def essence(step: str) -> list[str]:
    """Return the runs of digits and operators in `step`, operands of + and * in sorted
    order.

    It is one run if the step is an equation.
    """
    compact = re.sub(r" ?([+\-*/=]) ?", r"\1", step)
    return [in_one_order(run) for run in re.findall(r"[\d+\-*/=]+", compact)]


def in_one_order(equation: str) -> str:
    """Write `7+12=19` and `12+7=19` alike, and return any text that is no sum or product as
    it is.
    """
    commutes = re.fullmatch(r"(\d+)([+*])(\d+)(=\d+)", equation)
    if not commutes:
        return equation
    left, operator, right, result = commutes.groups()
    return f"{min(left, right)}{operator}{max(left, right)}{result}"


def operators(metadata: Metadata) -> str:
    return "".join(operator for operator, _ in metadata["events"])


MATHS = Family(
    "maths",
    draw,
    question,
    solve,
    operators,
    essence,
    draw_beyond,
)
