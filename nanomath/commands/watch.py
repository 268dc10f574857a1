"""Show a run as it goes on: the last steps of its metrics as a table with a small curve each.

    python -m nanomath watch RUN [every=SECONDS]

    python -m nanomath watch runs/tiny-grpo
    ssh -t HOST 'cd nanomath && python -m nanomath watch runs/tiny-grpo'

It reads the run directory and nothing else, every 2 seconds until Ctrl-C; what is no terminal gets
the table once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from nanomath.analysis.runs import Run, read_run
from nanomath.commands.main import parse_words

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # steps in a small curve
FIRST = """
    heldout/pass@1 heldout/loss heldout/f1 reward pass@1 loss nll kl entropy flat_groups length
    truncated repetition prm/return grad_norm update_ratio gap_mean effective_samples
    tokens_per_second seconds
"""
HOME = "\x1b[H"  # the cursor to the upper left corner
REST = "\x1b[J"  # clear what is below the cursor
LINE = "\x1b[K"  # clear the rest of the line


def main(argv: list[str]) -> int:
    names, text = parse_words(argv, "every", __doc__)
    if len(names) != 1:
        raise ValueError("watch needs one run directory: python -m nanomath watch RUN")
    every = seconds("2" if text is None else text)
    read_run(names[0])
    if not sys.stdout.isatty():
        print("\n".join(table(read_run(names[0]))))
        return 0
    print(HOME + REST, end="")
    try:
        while True:
            lines = table(read_run(names[0]))
            print(
                HOME + "".join(f"{line}{LINE}\n" for line in lines) + REST,
                end="",
                flush=True,
            )
            time.sleep(every)
    except KeyboardInterrupt:
        return 0


def seconds(text: str) -> float:
    """Return the value of every=SECONDS. ValueError if it is no positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86400:
        raise ValueError(
            f"every is {text!r}: expected seconds between two looks, such as 2"
        )
    return value


def table(run: Run) -> list[str]:
    """Return the lines to show: the step the run is at, its metrics, its newest alarms."""
    steps = run.config.get("run.steps", 0)
    done = run.lines[-1]["step"] if run.lines else 0
    lines = [
        f"{run.directory}: step {done} of {steps}{remaining(run, steps - done)}",
        "",
    ]
    for name in FIRST.split():
        if name in run.series:
            values = run.series[name][1][-WIDTH:]
            low, high = min(values), max(values)
            shown = f"{values[-1]:>10.4g}   from {low:.4g} to {high:.4g}"
            lines.append(f"{name:18} {sparkline(values):{WIDTH}} {shown}")
    if not run.lines:
        lines.append("nothing has been logged yet")
    alarms = run.read("alarms.jsonl")[-3:]
    return lines + [f"step {alarm['step']}: {alarm['text']}" for alarm in alarms]


def remaining(run: Run, steps: int) -> str:
    """Say how long the steps that are left will take at the pace of the last ones."""
    pace = run.curve("seconds")[1][-WIDTH:]
    if not pace or steps <= 0:
        return ""
    minutes = steps * sum(pace) / len(pace) / 60
    return (
        f", about {minutes:.0f} minutes left"
        if minutes >= 1
        else ", less than a minute left"
    )


def sparkline(values: Sequence[float]) -> str:
    """Draw a curve with one character for each value."""
    low = min(values)
    spread = max(values) - low or 1.0
    return "".join(
        BLOCKS[int((value - low) / spread * (len(BLOCKS) - 1))] for value in values
    )
