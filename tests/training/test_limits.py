"""Runs that tokens end: when, at what learning rate, and again after a stop."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_sft
from nanomath import settings
from nanomath.config import load

SMALL = (
    *("train.limit=16", "heldout.limit=1", "evaluation.samples=1", "sft.batch_size=2"),
    *("model.new.hidden_size=32", "model.new.layers=1", "model.new.heads=2"),
    *("model.new.kv_heads=1", "sampling.max_new_tokens=4", "run.save_every=1"),
    *("run.keep_last=0", "optim.lr=1e-3", "optim.schedule=linear", "optim.warmup=1"),
)


@pytest.fixture
def run(tmp_path):
    """run(name, *words): its lines of updates."""

    def run(name, *words):
        words = (*SMALL, f"run.directory={tmp_path}", f"run.name={name}", *words)
        assert train_sft.main(list(words)) == 0
        text = (tmp_path / name / "metrics.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if "lr" in line]

    return run


def test_it_ends_with_its_tokens_and_its_rate_with_it(run):
    plain = run("plain", "run.steps=8")
    tokens = sum(line["tokens"] for line in plain)
    ended = run("ended", "run.steps=80", f"run.tokens={tokens}")
    assert [line["tokens"] for line in ended] == [line["tokens"] for line in plain]
    for one, other in zip(ended, plain, strict=True):  # as its tokens go, not its steps
        assert one["lr"] == pytest.approx(other["lr"], abs=2e-4)
    used = sum(line["tokens"] for line in ended[:5]) / tokens
    assert ended[5]["lr"] == pytest.approx(1e-3 * (1 - (5 - 1) / (5 / used - 1)))


def test_after_a_stop_it_ends_with_the_same_bits(run, tmp_path):
    run("whole", "run.steps=80", "run.tokens=800")
    steps = sorted(
        (tmp_path / "whole/checkpoints").glob("step-*"), key=lambda p: int(p.name[5:])
    )
    last = steps[-1]
    before = load_file(last / "model.safetensors")
    for step in steps[3:]:
        shutil.rmtree(step)
    run("whole", "run.steps=80", "run.tokens=800", "--resume")
    after = load_file(last / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="has done its"):
        run("whole", "run.steps=80", "run.tokens=800", "--resume")


def test_a_prm_counts_no_tokens():
    with pytest.raises(
        ValueError, match="run.tokens = 5, but the training of a PRM counts no"
    ):
        load(settings.PRMConfig, None, ["run.tokens=5"])
