"""Alarms: what an attentive reader would see in the curves of a run, said when it begins.

    collapse  accuracy is far below its best, while the KL to the starting model or the
              repetition of the completions is far above what it was then (the policy no longer
              solves problems: it exploits something)
    flat      hardly any group has spread, so that hardly any teaches: the problems are too
              easy or too hard
    format    no completion matches the format that is rewarded
    kl        the KL to the starting model has jumped
    hacked    a process reward model pays more and more for solutions, while fewer are right

The rules and thresholds are ours: papers show such curves and leave the judgement to the eye.
Everything is a pure function of the lines of metrics.jsonl, so a resumed run says what an
unbroken one says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

History = Sequence[
    Mapping[str, Any]
]  # lines of metrics.jsonl in the order of their steps

# An average is taken over so many steps: sampling noise shrinks to a third, and a collapse lasts
# far longer.
WINDOW = 10
# So many steps pass before an alarm that has ended may begin again: a curve at the edge of a
# threshold crosses it often.
QUIET = 50
# An alarm lasts, and a collapse is no dip, once it has held for so many steps in a row: its first
# and its last window then have no step in common.
LASTS = 2 * WINDOW
# collapse: accuracy is below this share of its best (a plateau wavers less, a collapse goes on
# falling), by so many standard errors (of 400 noisy plateaus of 200 steps one has such a drop).
DROP = 2 / 3
NOISE = 5.0
# collapse: what rises has doubled since the best (in a healthy run it rises while accuracy does
# too), and is above these nats a token and share of n-grams, below which it explains nothing.
RISE = 2.0
FLOORS = {"kl": 0.01, "repetition": 0.05}
FLAT = 0.9  # flat: with nine groups of ten idle, a step costs ten times what it teaches
# hacked: what is paid has risen by so much since accuracy was best, which fell by so much.
HACKED = 0.1
FELL = 0.05
PAID = ("prm/return", "prm/step", "reward/prm")  # in all, a step, the lowest step
# kl: so many times in so many steps (a steady drift needs dozens of steps for that), and above
# these nats a token: the first steps of any run multiply the KL too, but far below this.
JUMP = 8.0
JUMP_STEPS = 5
JUMP_FLOOR = 0.05


def new_alarms(history: History, said: Mapping[str, int]) -> dict[str, str]:
    """Return the texts of the alarms that begin with the newest line, by name.

    `said` has the step at which each alarm was last said.
    """
    if not history:
        return {}
    before = sounding(history[:-1])
    step = history[-1]["step"]
    return {
        name: text
        for name, text in sounding(history).items()
        if name not in before and step - said.get(name, -QUIET) >= QUIET
    }


def sounding(history: History) -> dict[str, str]:
    """Return the alarms that hold at the newest line."""
    return {name: text for name, rule in RULES.items() if (text := rule(history))}


def lasts(history: History, name: str) -> bool:
    """Return whether an alarm has held at each of the last LASTS steps."""
    ends = _ends_of_steps(history)[-LASTS:]
    return len(ends) == LASTS and all(RULES[name](history[:n]) for n in reversed(ends))


def lasting(history: History, name: str) -> int | None:
    """Return the step at which an alarm began that lasted; None if none did."""
    row: list[int] = []
    for end in _ends_of_steps(history):
        row = [*row, end] if RULES[name](history[:end]) else []
        if len(row) == LASTS:
            return history[row[0] - 1]["step"]
    return None


def _ends_of_steps(history: History) -> list[int]:
    """Return the number of lines until the end of each step: what is measured has its own line."""
    return list({line["step"]: n for n, line in enumerate(history, 1)}.values())


def collapse(history: History) -> str:
    """Accuracy is far below its best, while KL or repetition is far above what it was then.

    Returns the alarm's text, "" if all is well.
    """
    then, newest, error = _since_best(history)
    before = _mean(then, "pass@1")
    now = _mean(newest, "pass@1")
    if now >= DROP * before or before - now < NOISE * error:
        return ""
    risen = [
        f"{name} rose from {old:.3f} to {new:.3f}"
        for name, old, new in _changes(FLOORS, then, newest)
        if new > max(FLOORS[name], RISE * old)
    ]
    fall = f"collapse: accuracy fell from {before:.1%} (best, step {then[-1]['step']}) to {now:.1%}"
    return f"{fall} while {' and '.join(risen)}" if risen else ""


def hacked(history: History) -> str:
    """Steps earn or score more than when accuracy was best, and accuracy has fallen since.

    Returns the alarm's text, "" if all is well.
    """
    then, newest, error = _since_best(history)
    before = _mean(then, "pass@1")
    now = _mean(newest, "pass@1")
    if before - now < max(FELL, NOISE * error):
        return ""
    changes = _changes(PAID, then, newest)
    risen = [
        f"{name} from {old:.3f} to {new:.3f}"
        for name, old, new in changes
        if new - old >= HACKED
    ]
    fall = f"accuracy from {before:.1%} to {now:.1%} since step {then[-1]['step']}"
    return (
        f"PRM reward rises while accuracy falls: {' and '.join(risen)}, {fall}"
        if risen
        else ""
    )


def flat_groups(history: History) -> str:
    """Hardly any group of the last steps has rewards that differ.

    Returns the alarm's text, "" if all is well.
    """
    lines = [line for line in history if "flat_groups" in line][-WINDOW:]
    if len(lines) < WINDOW or (flat := _mean(lines, "flat_groups")) < FLAT:
        return ""
    right = _mean(lines, "all_right")
    wrong = _mean(lines, "all_wrong")
    why = (
        f"too easy ({right:.0%} all right)"
        if right > wrong
        else f"too hard ({wrong:.0%} all wrong)"
    )
    return f"{flat:.0%} of the groups of {WINDOW} steps have no spread: {why}"


def no_format(history: History) -> str:
    """No completion of the last steps matched the format that is rewarded.

    Returns the alarm's text, "" if all is well.
    """
    values = [line["reward/format"] for line in history if "reward/format" in line][
        -WINDOW:
    ]
    never = len(values) == WINDOW and not any(values)
    return f"the format matched in no completion of {WINDOW} steps" if never else ""


def kl_jump(history: History) -> str:
    """The KL is many times what it was a few steps ago.

    Returns the alarm's text, "" if all is well. Both are medians of three steps, for the reason
    in `_changes`.
    """
    values = [line["kl"] for line in history if "kl" in line]
    if len(values) < JUMP_STEPS + 3:
        return ""
    now = median(values[-3:])
    then = median(values[-3 - JUMP_STEPS : -JUMP_STEPS])
    if now < JUMP_FLOOR or now < JUMP * then:
        return ""
    times = now / max(then, 1e-6)
    return f"KL jumped {times:.0f}x in {JUMP_STEPS} steps, from {then:.4f} to {now:.4f}"


def _since_best(history: History) -> tuple[History, History, float]:
    """Return the window of best accuracy, the newest window, and the standard error of the
    difference of their means.

    The best is taken of the windows that share no step with the newest. While there are too
    few lines for two windows, both are all lines.
    """
    lines = [line for line in history if "pass@1" in line]
    if len(lines) < 2 * WINDOW:
        return lines, lines, 0.0
    accuracy = np.array([line["pass@1"] for line in lines])
    averages = np.convolve(accuracy, np.full(WINDOW, 1 / WINDOW), mode="valid")
    best = int(averages[:-WINDOW].argmax())
    return (
        lines[best : best + WINDOW],
        lines[-WINDOW:],
        float(np.sqrt((np.diff(accuracy) ** 2).mean() / WINDOW)),
    )


def _changes(
    names: Iterable[str], then: History, newest: History
) -> list[tuple[str, float, float]]:
    """Return the medians of both windows for each number that all of their lines have: a single
    unlikely token can make the k3 estimate of one step arbitrarily large.
    """
    known = [name for name in names if all(name in line for line in (*then, *newest))]
    return [
        (name, *(median(line[name] for line in window) for window in (then, newest)))
        for name in known
    ]


def _mean(lines: History, name: str) -> float:
    return sum(line[name] for line in lines) / max(1, len(lines))


RULES = {
    "collapse": collapse,
    "flat": flat_groups,
    "format": no_format,
    "kl": kl_jump,
    "hacked": hacked,
}
