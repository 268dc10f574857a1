"""`python -m nanomath COMMAND ...`: every entry point that is not a training script."""

from __future__ import annotations

import sys
from importlib import import_module

from nanomath.commands.main import run_main

COMMANDS = {
    "eval": "measure a model on a problem set",
    "sample": "ask a model a question",
    "study": "answer a question by runs: arms x seeds into a table of paired differences",
    "report": "explain a run, or compare several, in one HTML file",
    "diff": "say where two runs part",
    "drift": "say how far training has moved a model, and where",
    "transfer": "say whether gains in maths came with gains elsewhere",
    "watch": "show the last steps of a run as it goes on",
    "prm": "label solutions, train a process reward model on them, measure it",
    "merge": "write a model with its adapter merged into it",
    "bench": "measure time and memory on this machine",
    "config": "print what every config key means, as a Markdown page",
}
USAGE = "usage: python -m nanomath COMMAND ...\n\n" + "\n".join(
    f"  {name:10}{what}" for name, what in COMMANDS.items()
)


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(
            USAGE
            + "\n\nEach command has its own --help. Training: train_sft.py and train_grpo.py."
        )
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise ValueError(
            f"unknown command {argv[0]!r}: expected one of {', '.join(COMMANDS)}"
        )
    return import_module(f"nanomath.commands.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
