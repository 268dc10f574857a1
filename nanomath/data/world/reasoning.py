"""Other reasoning: sorting by a rule, following moves on a grid, evaluating a chain of
true/false statements.

Difficulty is the number of items less one, of moves, of clauses. Each worked step states one
item, position or value. The words around items and positions are not checked; boolean steps
are checked to the letter: their words are values.
"""

from __future__ import annotations

import re
from random import Random

from .family import Family, Metadata

# --- sorting: {"items": [31, 7, 18], "rule": "largest"}; each step selects the next item ---

SORTING_RULES = {  # rule -> (key, English, Japanese)
    "smallest": (lambda item: item, "from smallest to largest", "小さい順"),
    "largest": (lambda item: -item, "from largest to smallest", "大きい順"),
    "last_digit": (
        lambda item: item % 10,
        "by last digit, smallest first",
        "一の位が小さい順",
    ),
    "last_digit_down": (
        lambda item: -(item % 10),
        "by last digit, largest first",
        "一の位が大きい順",
    ),
}


def draw_sorting(random: Random, difficulty: int) -> Metadata:
    """Two-digit items with distinct last digits, so that no rule leaves a tie."""
    last_digits = random.sample(range(10), difficulty + 1)
    items = [10 * random.randint(1, 9) + digit for digit in last_digits]
    return {"items": items, "rule": random.choice(list(SORTING_RULES))}


def ask_sorting(metadata: Metadata) -> str:
    items = ", ".join(map(str, metadata["items"]))
    _, english, japanese = SORTING_RULES[metadata["rule"]]
    return (
        f"{items}を{japanese}に並べてください。"
        if metadata["language"] == "ja"
        else f"Sort {items} {english}."
    )


def in_order(metadata: Metadata) -> list[str]:
    key = SORTING_RULES[metadata["rule"]][0]
    return [str(item) for item in sorted(metadata["items"], key=key)]


def sorting_steps(metadata: Metadata) -> list[str]:
    return [
        f"次は{item}。" if metadata["language"] == "ja" else f"Next: {item}."
        for item in in_order(metadata)
    ]


SORTING = Family(
    group="other_reasoning",
    draw=draw_sorting,
    question=ask_sorting,
    steps=sorting_steps,
    answer=lambda metadata: ", ".join(in_order(metadata)),
    essence=lambda step: re.findall(r"[\d+\-*/=]+", step),
)

# --- grid: {"position": [3, 5], "moves": [["up", 2], ["left", 1]]}; each step states the
# position after a move ---

SIDE = 9  # positions are 1..SIDE in both coordinates
LONGEST_MOVE = 4
MOVES = {  # direction -> (x, y, Japanese)
    "right": (1, 0, "右"),
    "left": (-1, 0, "左"),
    "up": (0, 1, "上"),
    "down": (0, -1, "下"),
}


def moved(position: list[int], direction: str, distance: int) -> list[int]:
    x, y, _ = MOVES[direction]
    return [position[0] + x * distance, position[1] + y * distance]


def draw_grid(random: Random, difficulty: int) -> Metadata:
    x, y = start = [random.randint(1, SIDE), random.randint(1, SIDE)]
    moves = []
    for _ in range(difficulty):
        room = {"right": SIDE - x, "left": x - 1, "up": SIDE - y, "down": y - 1}
        direction = random.choice([direction for direction, cells in room.items() if cells])
        distance = random.randint(1, min(LONGEST_MOVE, room[direction]))
        x, y = moved([x, y], direction, distance)
        moves.append([direction, distance])
    return {"position": start, "moves": moves}


def ask_grid(metadata: Metadata) -> str:
    start = pair(metadata["position"])
    if metadata["language"] == "ja":
        told = "".join(
            f"{MOVES[direction][2]}に{distance}進みます。"
            for direction, distance in metadata["moves"]
        )
        return f"ロボットは{start}にいます。{told}今どこにいますか。"
    told = "".join(
        f"It moves {direction} {distance}. " for direction, distance in metadata["moves"]
    )
    return f"A robot is at {start}. {told}Where is it now?"


def pair(position: list[int]) -> str:
    return f"({position[0]},{position[1]})"


def path(metadata: Metadata) -> list[list[int]]:
    """The position after each move."""
    positions = [metadata["position"]]
    for direction, distance in metadata["moves"]:
        positions.append(moved(positions[-1], direction, distance))
    return positions[1:]


def grid_steps(metadata: Metadata) -> list[str]:
    japanese = metadata["language"] == "ja"
    return [
        f"{MOVES[direction][2]}へ{pair(position)}。"
        if japanese
        else f"{direction.capitalize()}: {pair(position)}."
        for (direction, _), position in zip(metadata["moves"], path(metadata), strict=True)
    ]


GRID = Family(
    group="other_reasoning",
    draw=draw_grid,
    question=ask_grid,
    steps=grid_steps,
    answer=lambda metadata: pair(path(metadata)[-1]),
    essence=lambda step: re.findall(r"[\d(),+\-*/=]+", step.replace(", ", ",")),
)

# --- boolean: {"letters": "QKMZ", "given": [true, false], "clauses": [["and", 0, 1], ["not",
# 2]]} --- Statement k+2 is clause k over earlier statements, always including the latest, so
# that the whole chain matters.

LETTERS = "BCDEFGHJKLMNPQRSTUVWXYZ"  # no A and no I: they are English words
JAPANESE_CONNECTIVES = {"and": "かつ", "or": "または"}
TRUTH = {"en": {True: "true", False: "false"}, "ja": {True: "真", False: "偽"}}


def draw_boolean(random: Random, difficulty: int) -> Metadata:
    clauses = []
    for latest in range(1, difficulty + 1):
        connective = random.choice(["not", "and", "or"])
        clauses.append(
            [connective, latest]
            if connective == "not"
            else [connective, latest, random.randrange(latest)]
        )
    letters = "".join(random.sample(LETTERS, difficulty + 2))
    return {
        "letters": letters,
        "given": [random.random() < 0.5, random.random() < 0.5],
        "clauses": clauses,
    }


def ask_boolean(metadata: Metadata) -> str:
    letters = metadata["letters"]
    told = [
        says(metadata, letter, value)
        for letter, value in zip(letters, metadata["given"], strict=False)
    ]
    told += [defines(metadata, index) for index in range(len(metadata["clauses"]))]
    if metadata["language"] == "ja":
        return f"{''.join(told)}{letters[-1]}は真ですか、偽ですか。"
    return f"{' '.join(told)} Is {letters[-1]} true or false?"


def says(metadata: Metadata, letter: str, value: bool) -> str:
    """`B is true.`"""
    truth = TRUTH[metadata["language"]][value]
    return f"{letter}は{truth}。" if metadata["language"] == "ja" else f"{letter} is {truth}."


def defines(metadata: Metadata, index: int) -> str:
    """`D is B and C.`"""
    letters = metadata["letters"]
    connective, *operands = metadata["clauses"][index]
    names = [letters[operand] for operand in operands]
    if metadata["language"] == "ja":
        meaning = (
            f"{names[0]}の否定"
            if connective == "not"
            else JAPANESE_CONNECTIVES[connective].join(names)
        )
        return f"{letters[index + 2]}は{meaning}。"
    meaning = f"not {names[0]}" if connective == "not" else f" {connective} ".join(names)
    return f"{letters[index + 2]} is {meaning}."


def truth_values(metadata: Metadata) -> list[bool]:
    """The value of every statement, the two given ones first."""
    values = list(metadata["given"])
    for connective, *operands in metadata["clauses"]:
        inputs = [values[operand] for operand in operands]
        values.append(
            {"not": not inputs[0], "and": all(inputs), "or": any(inputs)}[connective]
        )
    return values


def boolean_steps(metadata: Metadata) -> list[str]:
    derived = list(zip(metadata["letters"], truth_values(metadata), strict=True))[2:]
    return [says(metadata, letter, value) for letter, value in derived]


BOOLEAN = Family(
    group="other_reasoning",
    draw=draw_boolean,
    question=ask_boolean,
    steps=boolean_steps,
    answer=lambda metadata: TRUTH[metadata["language"]][truth_values(metadata)[-1]],
)
