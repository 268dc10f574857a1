"""The page on adding an algorithm: its example works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomath import algorithms
from nanomath.training.runlog import read_jsonl

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "nanomath" / "algorithms" / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHAPE = (
    "model.new.hidden_size=32",
    "model.new.layers=1",
    "model.new.heads=2",
    "model.new.kv_heads=1",
    "model.new.intermediate_size=64",
)
QUICK = (
    "train.limit=16",
    "heldout.limit=2",
    "sampling.max_new_tokens=8",
    "evaluation.samples=1",
    "run.steps=2",
)


@pytest.fixture
def example(monkeypatch) -> dict:
    """What the example defines, taken back afterwards."""
    for table in (algorithms.CLIPS, algorithms.PRESETS):
        for name, value in list(table.items()):
            monkeypatch.setitem(table, name, value)
    names: dict = {"__name__": "my_sapo"}
    exec(compile(EXAMPLE, "my_sapo.py", "exec"), names)
    yield names
    del algorithms.CLIPS["sapo"], algorithms.PRESETS["sapo"]


def test_the_gate_is_the_papers(example):
    ratio = torch.tensor(
        [[0.2, 1.0, 1.7, 5.0]], dtype=torch.float64, requires_grad=True
    )
    for advantage, tau in ((2.0, 1.0), (-2.0, 1.05)):
        gain = example["sapo_gain"](
            ratio, None, torch.full_like(ratio, advantage), 0.2, 0.2, 3.0
        )
        expected = [
            4 / tau * advantage / (1 + torch.tensor(-tau * (r - 1)).exp().item())
            for r in (0.2, 1.0, 1.7, 5.0)
        ]
        assert gain[0].tolist() == pytest.approx(expected, rel=1e-6)
        (slope,) = torch.autograd.grad(gain.sum(), ratio)
        # PPO's at ratio 1
        assert slope[0, 1].item() == pytest.approx(advantage, rel=1e-6)
        assert abs(slope[0, 3]) < abs(slope[0, 2]) < abs(slope[0, 1])


@pytest.mark.slow
def test_the_example_trains(tmp_path):
    (tmp_path / "my_sapo.py").write_text(EXAMPLE, encoding="utf-8")
    start = [
        sys.executable,
        str(ROOT / "train_sft.py"),
        *SHAPE,
        *QUICK,
        "run.name=base",
        "sft.batch_size=4",
    ]
    run = [
        sys.executable,
        "my_sapo.py",
        *QUICK,
        "run.name=sapo",
        "model.path=runs/base",
        "grpo.prompts=2",
    ]
    run += [
        "grpo.group_size=4",
        "reward.weights.random=1",
        "algorithm.method=sapo",
        "optim.lr=0.01",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in (start, run):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert 'clip = "sapo"' in (tmp_path / "runs" / "sapo" / "config.toml").read_text(
        encoding="utf-8"
    )
    steps = [
        line
        for line in read_jsonl(tmp_path / "runs" / "sapo" / "metrics.jsonl")
        if "reward" in line
    ]
    assert len(steps) == 2 and all(line["grad_norm"] > 0 for line in steps)


def test_every_key_and_table_of_the_page_exists():
    from nanomath.settings import Algorithm

    for name in re.findall(r"`([A-Z_]{4,})`", PAGE):
        assert hasattr(algorithms, name) or name == "LIMIT"
    table = PAGE.split("|---|---|---|---|\n")[1].split("\n\n")[0]
    for row in table.splitlines():
        for key in re.findall(r"`(\w+)`", row.split("|")[2]):
            assert hasattr(Algorithm(), key), key
