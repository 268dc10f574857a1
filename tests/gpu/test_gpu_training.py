"""Whole training runs on a GPU: the metrics of the same runs on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

import train_grpo
import train_sft
from nanomath.training.runlog import read_jsonl

pytestmark = pytest.mark.slow

SHAPE = (
    "model.new.hidden_size=16",
    "model.new.layers=1",
    "model.new.heads=1",
    "model.new.kv_heads=1",
    "model.new.intermediate_size=16",
)
DATA = (
    "train.limit=64",
    "heldout.limit=1",
    "train.world.difficulty=1,1",
    "heldout.world.difficulty=1,1",
    "evaluation.samples=2",
)
QUICK = (
    "run.steps=2",
    "run.eval_every=0",
    "sampling.max_new_tokens=4",
    "optim.lr=0.003",
    "optim.schedule=constant",
)
SFT = (*SHAPE, *DATA, *QUICK, "sft.batch_size=4")
# A model this small is never right; chance is rewarded in its stead.
GRPO = (*DATA, *QUICK, "grpo.prompts=2", "grpo.group_size=2", "reward.weights.random=1")
TIMES = {"seconds", "tokens_per_second", "sampling_seconds"}


def metrics(script: ModuleType, directory: Path, *words: str) -> list[dict[str, float]]:
    """What a run logged, but for times."""
    assert (
        script.main(
            [*words, f"run.directory={directory.parent}", f"run.name={directory.name}"]
        )
        == 0
    )
    return [
        {k: v for k, v in line.items() if k not in TIMES}
        for line in read_jsonl(directory / "metrics.jsonl")
    ]


def compare(script: ModuleType, place: Path, *words: str) -> list[dict[str, float]]:
    """The metrics of a run on the GPU, which must be those of a CPU."""
    cpu, gpu = (
        metrics(script, place / device, f"model.device={device}", *words)
        for device in ("cpu", "cuda")
    )
    assert len(cpu) == len(gpu) and any("grad_norm" in line for line in gpu)
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    return gpu


def test_supervised(gpu, tmp_path):
    compare(train_sft, tmp_path, *SFT)


@pytest.fixture
def base(gpu, tmp_path) -> str:
    """A model of random weights."""
    metrics(train_sft, tmp_path / "base", *SFT, "run.steps=1", "model.device=cpu")
    return f"model.path={tmp_path / 'base'}"


@pytest.mark.parametrize(
    "words",
    [
        (
            "run.steps=1",
            "sampling.exact=true",
            "model.gradient_checkpointing=true",
            "optim.device=cpu",
        ),
        (
            "algorithm.method=ppo",
            "algorithm.kl_coef=0.1",
            "grpo.reference_device=cpu",
            "sampling.top_k=50",
        ),
    ],
    ids=" ".join,
)
def test_policies(base, tmp_path, words):
    logged = compare(train_grpo, tmp_path, base, *GRPO, *words)
    if "sampling.exact=true" in words:
        assert {line["gap_max"] for line in logged if "gap_max" in line} == {0}
