"""The dtype that a machine is fast in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import train_sft
from nanomath import settings
from nanomath.config import load
from nanomath.models import ModelConfig
from nanomath.training import arithmetic
from nanomath.training.arithmetic import settle

CPU = torch.device("cpu")
TINY = ModelConfig(99, 16, 1, 2, 1, 8, 32, 64)
LARGE = replace(TINY, hidden_size=576, intermediate_size=1536, num_layers=30)


@pytest.fixture
def machine(monkeypatch):
    """machine(float32=seconds, bfloat16=seconds): what a trial takes on it."""

    def make(**seconds: float) -> None:
        def trial(config, device, dtype, rows):
            return seconds[str(dtype).removeprefix("torch.")]

        monkeypatch.setattr(arithmetic, "trial", trial)

    return make


@pytest.mark.parametrize(
    ("short", "best"), [(0.4, "bfloat16"), (0.7, "float32"), (20.0, "float32")]
)
def test_auto_is_what_is_fast(machine, short, best):
    machine(float32=1.0, bfloat16=short)
    found, said = settle("auto", "model.dtype", LARGE, CPU, 512)
    assert found == best and said.startswith(
        f"model.dtype: {best} (bfloat16 takes {short:.2f}"
    )


@pytest.mark.parametrize(
    ("name", "short", "slow"),
    [
        ("bfloat16", 20.0, True),
        ("bfloat16", 0.4, False),
        ("float32", 0.4, True),
        ("float32", 0.8, False),
    ],
)
def test_what_is_asked_for_is_kept_and_said_to_be_slow(machine, name, short, slow):
    machine(float32=1.0, bfloat16=short)
    found, said = settle(name, "sampling.dtype", LARGE, CPU, 512)
    assert found == name and ("is slow on this machine" in said) == slow
    assert settle("float16", "model.dtype", LARGE, CPU, 512) == ("float16", "")


def test_a_small_model_is_not_tried(machine):
    machine()
    assert settle("auto", "model.dtype", TINY, CPU, 512) == ("float32", "")
    assert settle("bfloat16", "model.dtype", TINY, CPU, 512) == ("bfloat16", "")


def test_a_trial_takes_its_time():
    seconds = arithmetic.trial(TINY, CPU, torch.float32, 8)
    assert 0 < seconds < arithmetic.TRIAL


def test_a_run_keeps_what_was_settled(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(arithmetic, "SMALL", 0)
    machine(float32=1.0, bfloat16=0.1)
    small = [
        *("train.limit=4", "heldout.limit=1", "evaluation.samples=1", "run.steps=1"),
        *("model.new.hidden_size=32", "model.new.layers=1", "model.new.heads=2"),
        *("model.new.kv_heads=1", "sampling.max_new_tokens=4", "model.dtype=auto"),
        *(f"run.directory={tmp_path}", "sampling.dtype=auto"),
    ]
    train_sft.main(small)
    stored = load(settings.SFTConfig, tmp_path / "run" / "config.toml")
    assert stored.model.dtype == stored.sampling.dtype == "bfloat16"
    assert "model.dtype: bfloat16" in capsys.readouterr().err
    machine(float32=0.1, bfloat16=1.0)  # it goes on elsewhere
    train_sft.main([*small[:3], "run.steps=2", *small[4:], "--resume"])
    assert (
        load(settings.SFTConfig, tmp_path / "run" / "config.toml").model.dtype
        == "bfloat16"
    )
