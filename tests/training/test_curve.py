"""The learning curve in small: a new model is fine-tuned, then reinforced, and both must
learn.

The two scripts as a user runs them, in a smaller world: numbers up to 9, two or three steps.
Half of the solutions shown in fine-tuning state the answer alone, which the model is bad at;
reinforcement has to find out that working it out pays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import train_grpo
import train_sft
from nanomath.data.world import maths, world_tokenizer

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
SMALL_WORLD = [
    "train.world.difficulty=[2,3]",
    "heldout.world.difficulty=[2,3]",
    "train.limit=4000",
    "heldout.limit=128",
]
SMALL_MODEL = [
    "model.new.layers=2",
    "model.new.hidden_size=64",
    "model.new.heads=2",
    "model.new.intermediate_size=176",
]


def heldout(run: Path) -> list[dict[str, float]]:
    """What was measured on held-out problems before and after a run."""
    lines = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return [line for line in lines if "heldout/pass@1" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    world_tokenizer()  # of the whole world, before it shrinks
    directory = tmp_path_factory.mktemp("runs")
    common = [
        *SMALL_WORLD,
        f"run.directory={directory}",
        "run.eval_every=0",
        "sampling.max_new_tokens=64",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maths, "LARGEST", 9)
        patch.setattr(maths, "LARGEST_START", 9)
        sft = [*common, *SMALL_MODEL, "train.world.direct=0.5", "run.steps=500"]
        assert train_sft.main([str(CONFIGS / "sft.toml"), *sft]) == 0
        grpo = [
            *common,
            f"model.path={directory / 'tiny-sft'}",
            "run.steps=18",
            "grpo.prompts=24",
            "optim.lr=2e-4",
        ]
        assert train_grpo.main([str(CONFIGS / "grpo.toml"), *grpo]) == 0
    yield directory


def test_fine_tuning_teaches_to_solve_problems(runs: Path) -> None:
    before, after = heldout(runs / "tiny-sft")
    assert before["heldout/pass@1"] < 0.02
    assert after["heldout/pass@1"] > 0.4
    assert after["heldout/loss"] < 0.05 * before["heldout/loss"]


def test_reinforcement_improves_it_by_working_problems_out(runs: Path) -> None:
    before, after = heldout(runs / "tiny-grpo")
    assert (
        before["heldout/pass@1"] == heldout(runs / "tiny-sft")[-1]["heldout/pass@1"]
    )  # same model, same noise
    assert after["heldout/pass@1"] > before["heldout/pass@1"] + 0.08
    assert after["heldout/length"] > 1.2 * before["heldout/length"]
