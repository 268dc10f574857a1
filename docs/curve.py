"""The picture of a run: accuracy, and the length of completions, over the steps.

python docs/curve.py runs/tiny-grpo docs/results/tiny-grpo.svg      needs the extra `study`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(run: Path, picture: Path) -> None:
    lines = [
        json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")
    ]
    steps = [line for line in lines if "reward" in line]
    measured = [line for line in lines if "heldout/pass@1" in line]
    at = [line["step"] for line in measured]
    accuracy = [line["heldout/pass@1"] for line in measured]
    below = [line["heldout/pass@1"] - line["heldout/pass@1_low"] for line in measured]
    above = [line["heldout/pass@1_high"] - line["heldout/pass@1"] for line in measured]
    numbers = [line["step"] for line in steps]

    plt.rcParams.update({"svg.hashsalt": "nanomath", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    left.plot(
        numbers, [line["pass@1"] for line in steps], color="0.6", label="rollouts"
    )
    left.errorbar(
        at,
        accuracy,
        [below, above],
        fmt="o",
        color="black",
        capsize=3,
        label="held-out, 95%",
    )
    left.set(xlabel="step", ylabel="pass@1", ylim=(0, 1), title=f"{run.name}: accuracy")
    left.legend(frameon=False, loc="lower right")
    right.plot(numbers, [line["length"] for line in steps], color="black")
    right.set(xlabel="step", ylabel="tokens", title="length of completions")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
