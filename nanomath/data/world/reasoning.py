"""Other reasoning: sorting by a rule, following moves on a grid, evaluating a chain of
true/false statements.

Difficulty is the number of items less one, of moves, of clauses. Each worked step states one
item, position or value. The words around items and positions are not checked; boolean steps
are checked to the letter: their words are values.
"""

from __future__ import annotations

import re
from functools import partial
from random import Random

from .family import Family, Metadata, in_japanese, unseen, worded

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


def draw_items(random: Random, difficulty: int, low: int, high: int) -> Metadata:
    """Draw items whose last digits differ, so that no rule leaves a tie; what stands before the
    last digit is from low to high.
    """
    last_digits = random.sample(range(10), difficulty + 1)
    items = [10 * random.randint(low, high) + digit for digit in last_digits]
    return {"items": items, "rule": random.choice(list(SORTING_RULES))}


def ask_sorting(metadata: Metadata) -> str:
    items = ", ".join(map(str, metadata["items"]))
    _, english, japanese = SORTING_RULES[metadata["rule"]]
    return worded(
        metadata,
        f"Sort {items} {english}.",
        f"{items}を{japanese}に並べてください。",
        f"{english[0].upper()}{english[1:]}, sort {items}.",
        f"{japanese}に{items}を並べてください。",
    )


def sort_items(metadata: Metadata) -> tuple[list[str], str]:
    key, _, _ = SORTING_RULES[metadata["rule"]]
    items = [str(item) for item in sorted(metadata["items"], key=key)]
    step = "次は{}。" if in_japanese(metadata) else "Next: {}."
    return [step.format(item) for item in items], ", ".join(items)


def numbers_and_operators(step: str) -> list[str]:
    return re.findall(r"[\d+\-*/=]+", step)


SORTING = Family(
    "other_reasoning",
    partial(draw_items, low=1, high=9),
    ask_sorting,
    sort_items,
    lambda metadata: metadata["rule"],
    numbers_and_operators,
    partial(draw_items, low=10, high=99),  # three digits, where training has two
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
    position = start = [random.randint(1, SIDE), random.randint(1, SIDE)]
    moves = []
    for _ in range(difficulty):
        x, y = position
        room = {"right": SIDE - x, "left": x - 1, "up": SIDE - y, "down": y - 1}
        direction = random.choice(
            [direction for direction, cells in room.items() if cells]
        )
        distance = random.randint(1, min(LONGEST_MOVE, room[direction]))
        position = moved(position, direction, distance)
        moves.append([direction, distance])
    return {"position": start, "moves": moves}


def draw_far_grid(random: Random, difficulty: int) -> Metadata:
    """Draw as `draw_grid` does, with every coordinate beyond the grid of training."""
    content = draw_grid(random, difficulty)
    return {**content, "position": [x + SIDE + 1 for x in content["position"]]}


def ask_grid(metadata: Metadata) -> str:
    start = pair(metadata["position"])
    moves = metadata["moves"]
    english = [f"{direction} {n}" for direction, n in moves]
    japanese = [f"{MOVES[direction][2]}に{n}" for direction, n in moves]
    told = "".join(f"It moves {move}. " for move in english)
    told_in_japanese = "".join(f"{move}進みます。" for move in japanese)
    return worded(
        metadata,
        f"A robot is at {start}. {told}Where is it now?",
        f"ロボットは{start}にいます。{told_in_japanese}今どこにいますか。",
        f"A robot at {start} moves {', '.join(english)}. Where is it now?",
        f"{start}のロボットは{'、'.join(japanese)}進みます。今どこにいますか。",
    )


def pair(position: list[int]) -> str:
    return f"({position[0]},{position[1]})"


def follow_moves(metadata: Metadata) -> tuple[list[str], str]:
    position = metadata["position"]
    steps = []
    for direction, distance in metadata["moves"]:
        position = moved(position, direction, distance)
        if in_japanese(metadata):
            steps.append(f"{MOVES[direction][2]}へ{pair(position)}。")
        else:
            steps.append(f"{direction.capitalize()}: {pair(position)}.")
    return steps, pair(position)


def positions_and_operators(step: str) -> list[str]:
    return re.findall(r"[\d(),+\-*/=]+", step.replace(", ", ","))


def directions(metadata: Metadata) -> str:
    return "".join(direction[0] for direction, _ in metadata["moves"])


GRID = Family(
    "other_reasoning",
    draw_grid,
    ask_grid,
    follow_moves,
    directions,
    positions_and_operators,
    draw_far_grid,
)

# --- boolean: {"letters": "QKMZ", "given": [true, false], "clauses": [["and", 0, 1], ["not",
# 2]]} --- Statement k+2 is clause k over earlier statements, always including the latest, so
# that the whole chain matters.

LETTERS = "BCDEFGHJKLMNPQRSTUVWXYZ"  # no A and no I: they are English words
CONNECTIVES = {  # connective -> what stands between its operands
    "en": {"and": " and ", "or": " or "},
    "ja": {"and": "かつ", "or": "または"},
}
TRUTH = {"en": {True: "true", False: "false"}, "ja": {True: "真", False: "偽"}}


def draw_boolean(random: Random, difficulty: int) -> Metadata:
    clauses = []
    for latest in range(1, difficulty + 1):
        connective = random.choice(["not", "and", "or"])
        others = [] if connective == "not" else [random.randrange(latest)]
        clauses.append([connective, latest, *others])
    return {
        "letters": "".join(random.sample(LETTERS, difficulty + 2)),
        "given": [random.random() < 0.5, random.random() < 0.5],
        "clauses": clauses,
    }


def ask_boolean(metadata: Metadata) -> str:
    letters = metadata["letters"]
    told = says(metadata, letters, metadata["given"])
    told += [defines(metadata, index) for index in range(len(metadata["clauses"]))]
    japanese = in_japanese(metadata)
    told = ("" if japanese else " ").join(told)
    asked = (
        f"{letters[-1]}は真ですか、偽ですか。"
        if japanese
        else f"Is {letters[-1]} true or false?"
    )
    parts = [asked, told] if unseen(metadata) else [told, asked]
    return ("" if japanese else " ").join(parts)


def says(metadata: Metadata, letters: str, values: list[bool]) -> list[str]:
    """Return `B is true.` for each letter and its value, as far as there are values."""
    truth = TRUTH[metadata["language"]]
    sentence = "{}は{}。" if in_japanese(metadata) else "{} is {}."
    return [
        sentence.format(letter, truth[value])
        for letter, value in zip(letters, values, strict=False)
    ]


def defines(metadata: Metadata, index: int) -> str:
    """Return a clause such as `D is B and C.`"""
    letters = metadata["letters"]
    connective, *operands = metadata["clauses"][index]
    names = [letters[operand] for operand in operands]
    japanese = in_japanese(metadata)
    if connective == "not":
        meaning = f"{names[0]}の否定" if japanese else f"not {names[0]}"
    else:
        meaning = CONNECTIVES[metadata["language"]][connective].join(names)
    letter = letters[index + 2]
    return f"{letter}は{meaning}。" if japanese else f"{letter} is {meaning}."


def evaluate(metadata: Metadata) -> tuple[list[str], str]:
    values = list(metadata["given"])
    for connective, *operands in metadata["clauses"]:
        inputs = [values[operand] for operand in operands]
        results = {"not": not inputs[0], "and": all(inputs), "or": any(inputs)}
        values.append(results[connective])
    steps = says(metadata, metadata["letters"][2:], values[2:])
    return steps, TRUTH[metadata["language"]][values[-1]]


def connectives(metadata: Metadata) -> str:
    return "".join(connective[0] for connective, *_ in metadata["clauses"])


BOOLEAN = Family("other_reasoning", draw_boolean, ask_boolean, evaluate, connectives)
