"""The learning curve in small: a new model is fine-tuned, then reinforced, and both must learn.

The two scripts as a user runs them, on problems of one and two steps. Two fifths of the solutions shown in fine-tuning
state the answer alone, which the model is bad at; reinforcement has to find out that working it out pays.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_grpo
import train_sft

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
SMALL = ["train.difficulty=[1,2]", "heldout.difficulty=[1,2]", "heldout.limit=128", "run.eval_every=0"]


def heldout(run: Path) -> list[dict[str, float]]:
    """What was measured on held-out problems before and after a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "heldout/pass@1" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    common = [*SMALL, f"run.directory={directory}"]
    assert train_sft.main([str(CONFIGS / "sft.toml"), *common, "run.steps=600"]) == 0
    grpo = [*common, f"model.path={directory / 'tiny-sft'}", "run.steps=12", "grpo.prompts=24", "optim.lr=2e-4"]
    assert train_grpo.main([str(CONFIGS / "grpo.toml"), *grpo]) == 0
    return directory


def test_fine_tuning_teaches_to_solve_problems(runs: Path) -> None:
    before, after = heldout(runs / "tiny-sft")
    assert before["heldout/pass@1"] < 0.02
    assert after["heldout/pass@1"] > 0.25
    assert after["heldout/loss"] < 0.1 * before["heldout/loss"]


def test_reinforcement_improves_it_by_working_problems_out(runs: Path) -> None:
    before, after = heldout(runs / "tiny-grpo")
    assert before["heldout/pass@1"] == heldout(runs / "tiny-sft")[-1]["heldout/pass@1"]  # same model, same noise
    assert after["heldout/pass@1"] > before["heldout/pass@1"] + 0.08
    assert after["heldout/pass@1_low"] > before["heldout/pass@1_high"]
    assert after["heldout/length"] > 1.15 * before["heldout/length"]
