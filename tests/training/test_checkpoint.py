"""Checkpoints: bit-equal continuation through files, and never a half-written one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from nanomath.data.files import remove_scratch
from nanomath.models import load_model, load_tokenizer
from nanomath.models.batches import Example
from nanomath.training import checkpoint
from nanomath.training.checkpoint import (
    checkpoint_steps,
    link_best,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from nanomath.training.optimizer import Optimizer
from nanomath.training.sft_step import SFTStep

EXAMPLES = [Example([5, 6, 7], [8, 9, 0]), Example([11], [12, 0])]


def new_optimizer(model) -> Optimizer:
    return Optimizer(model, 0.1, (0.9, 0.95), 1e-8, 1.0)


def train(model, optimizer, steps: range) -> None:
    for number in steps:
        SFTStep(model, optimizer, neftune_alpha=2.0, seed=5).step(
            EXAMPLES, number, 1e-3
        )


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


def test_a_checkpoint_before_the_first_update_can_be_resumed(
    new_model, tokenizer, tmp_path
):
    model = new_model()
    saved = save_checkpoint(tmp_path, 0, model, tokenizer, new_optimizer(model))
    load_checkpoint(saved, new_optimizer(load_model(saved)))


FULL = OSError(errno.ENOSPC, "No space left on device")
FULLER = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("error", [FULL, FULLER])
def test_a_save_that_fails_leaves_what_was_there(
    new_model, tokenizer, tmp_path, monkeypatch, step, error
):
    model = new_model()
    optimizer = new_optimizer(model)
    train(model, optimizer, range(1))
    saved = save_checkpoint(tmp_path, 1, model, tokenizer, optimizer)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full_disk(*args: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, step, model, tokenizer, optimizer)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_all_is_on_the_disk_before_it_has_its_name(
    new_model, tokenizer, tmp_path, monkeypatch
):
    events = []

    def fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    rename = Path.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(
        Path,
        "rename",
        lambda path, target: (events.append(target), rename(path, target))[1],
    )
    model = new_model()
    saved = save_checkpoint(tmp_path, 1, model, tokenizer, new_optimizer(model))
    at = len(events) - 1 - events[::-1].index(saved)
    synced = {
        Path(event).name
        for event in events[:at]
        if isinstance(event, str) and "step-1" in event
    }
    assert {path.name for path in saved.iterdir()} <= synced
    assert events[at + 1 :] == [str(tmp_path)]  # the name itself


def make(directory, name: str, complete: bool = True) -> None:
    (directory / name).mkdir()
    if complete:
        (directory / name / "trainer.json").write_text("{}")


def test_only_complete_checkpoints_count_in_the_order_of_their_steps(tmp_path):
    for name in (
        "step-10",
        "step-9",
        "step-100",
        "step-x",
        ".step-11.77.new",
        "step-12.tmp",
    ):
        make(tmp_path, name)
    make(tmp_path, "step-200", complete=False)
    assert list(checkpoint_steps(tmp_path)) == [9, 10, 100]
    assert checkpoint_steps(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [1, 2, 3, 20]), (1, [20]), (2, [3, 20]), (9, [1, 2, 3, 20])]
)
def test_pruning_keeps_the_newest(tmp_path, keep, left):
    for step in (20, 1, 3, 2):
        make(tmp_path, f"step-{step}")
    prune_checkpoints(tmp_path, keep)
    assert list(checkpoint_steps(tmp_path)) == left


@pytest.mark.parametrize(
    ("best", "left"), [(None, [3, 20]), (1, [1, 3, 20]), (20, [3, 20])]
)
def test_pruning_keeps_the_best(tmp_path, best, left):
    for step in (20, 1, 3, 2):
        make(tmp_path, f"step-{step}")
    prune_checkpoints(tmp_path, 2, best)
    assert list(checkpoint_steps(tmp_path)) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"step-{step}" for step in left
    )


def test_a_deletion_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        make(tmp_path, f"step-{step}")

    def killed(path: Path, ignore_errors: bool) -> None:
        (path / "trainer.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, 2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-3"]
    remove_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]


def test_the_link_to_the_best_moves(tmp_path):
    for step in (4, 8):
        make(tmp_path, f"step-{step}")
        link_best(tmp_path, step)
        assert (
            os.readlink(tmp_path / "best") == f"step-{step}"
            and (tmp_path / "best" / "trainer.json").is_file()
        )
    assert list(checkpoint_steps(tmp_path)) == [4, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "step-4",
        "step-8",
    ]


def test_scratch_of_the_dead_is_removed(tmp_path):
    for name in (
        ".step-3.77.new",
        "..step-3.77.new.77.new",
        ".step-1.77.old",
        "step-2",
        "step-4.new",
    ):
        make(tmp_path, name)
    remove_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4.new"]
    remove_scratch(tmp_path / "absent")


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
