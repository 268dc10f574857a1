"""Checkpoints: bit-equal continuation through files, and never a half-written one."""

from __future__ import annotations

import json

import pytest
import torch

from nanomath.data.packing import Example
from nanomath.models import load_model, load_tokenizer
from nanomath.training import state
from nanomath.training.optimizer import Optimizer
from nanomath.training.sft_step import SFTStep
from nanomath.training.state import checkpoint_steps, load_checkpoint, prune_checkpoints, save_checkpoint

EXAMPLES = [Example([5, 6, 7], [8, 9, 0]), Example([11], [12, 0])]


def new_optimizer(model) -> Optimizer:
    return Optimizer(model, 0.1, (0.9, 0.95), 1e-8, 1.0)


def train(model, optimizer, steps: range) -> None:
    for number in steps:
        SFTStep(model, optimizer, neftune_alpha=2.0, seed=5).step(EXAMPLES, number, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_and_three_steps_are_six(new_model, tokenizer, tmp_path, dtype):
    whole, first = new_model(dtype=dtype), new_model(dtype=dtype)
    whole_optimizer, first_optimizer = new_optimizer(whole), new_optimizer(first)
    train(whole, whole_optimizer, range(6))
    train(first, first_optimizer, range(3))
    saved = save_checkpoint(tmp_path, 3, first, tokenizer, first_optimizer, note="kept")
    assert saved == tmp_path / "step-3"
    second = load_model(saved, dtype=dtype)
    second_optimizer = new_optimizer(second)
    assert load_checkpoint(saved, second_optimizer) == {"step": 3, "note": "kept"}
    train(second, second_optimizer, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    for name, value in whole_optimizer.state().items():
        assert torch.equal(value, second_optimizer.state()[name]), name
    assert load_tokenizer(saved).encode("1+1") == tokenizer.encode("1+1")


def test_a_checkpoint_before_the_first_update_can_be_resumed(new_model, tokenizer, tmp_path):
    model = new_model()
    saved = save_checkpoint(tmp_path, 0, model, tokenizer, new_optimizer(model))
    load_checkpoint(saved, new_optimizer(load_model(saved)))


@pytest.mark.parametrize("step", [1, 2])
def test_a_save_that_fails_leaves_what_was_there(new_model, tokenizer, tmp_path, monkeypatch, step):
    model = new_model()
    optimizer = new_optimizer(model)
    train(model, optimizer, range(1))
    saved = save_checkpoint(tmp_path, 1, model, tokenizer, optimizer)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full_disk(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(state, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, step, model, tokenizer, optimizer)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def make(directory, name: str, complete: bool = True) -> None:
    (directory / name).mkdir()
    if complete:
        (directory / name / "trainer.json").write_text("{}")


def test_only_complete_checkpoints_count_in_the_order_of_their_steps(tmp_path):
    for name in ("step-10", "step-9", "step-100", "step-x", ".step-11.77.new", "step-12.tmp"):
        make(tmp_path, name)
    make(tmp_path, "step-200", complete=False)
    assert list(checkpoint_steps(tmp_path)) == [9, 10, 100]
    assert checkpoint_steps(tmp_path / "absent") == {}


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 20]), (1, [20]), (2, [3, 20]), (9, [1, 2, 3, 20])])
def test_pruning_keeps_the_newest(tmp_path, keep, left):
    for step in (20, 1, 3, 2):
        make(tmp_path, f"step-{step}")
    prune_checkpoints(tmp_path, keep)
    assert list(checkpoint_steps(tmp_path)) == left


def test_damage_is_named(new_model, tokenizer, tmp_path):
    model = new_model()
    optimizer = new_optimizer(model)
    train(model, optimizer, range(1))
    saved = save_checkpoint(tmp_path, 1, model, tokenizer, optimizer)
    assert json.loads((saved / "trainer.json").read_text()) == {"step": 1}
    weights = (saved / "trainer.safetensors").read_bytes()
    (saved / "trainer.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="step-1: damaged trainer state"):
        load_checkpoint(saved, optimizer)
    (saved / "trainer.safetensors").write_bytes(weights)
    (saved / "trainer.json").write_text('{"step"')
    with pytest.raises(ValueError, match="step-1: damaged trainer state"):
        load_checkpoint(saved, optimizer)
