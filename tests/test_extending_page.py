"""docs/extending.md: each example works as it stands there, run by the command beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_sft

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
EXAMPLES = re.findall(
    r"`(my_\w+\.py)`:\n\n```python\n(.*?)```\n\n    (python .*?)\n",
    PAGE.read_text("utf-8"),
    re.DOTALL,
)
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


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    assert (
        train_sft.main(
            [
                *SHAPE,
                *QUICK,
                f"run.directory={directory}",
                "run.name=base",
                "sft.batch_size=4",
            ]
        )
        == 0
    )
    return directory / "base"


def test_every_example_is_found():
    assert [name for name, _, _ in EXAMPLES] == [
        "my_loss.py",
        "my_baseline.py",
        "my_reward.py",
        "my_scorer.py",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "command"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES]
)
def test_an_example_trains(name, code, command, base, tmp_path):
    (tmp_path / name).write_text(code, encoding="utf-8")
    script, config, *words = command.split()[1:]
    assert config == "configs/tiny/grpo.toml" and (script in (name, "train_grpo.py"))
    script = ROOT / script if script == "train_grpo.py" else script
    small = (
        "grpo.prompts=2",
        "grpo.group_size=4",
        "reward.weights.random=1",
        "run.directory=runs",
        *QUICK,
    )
    line = [
        sys.executable,
        str(script),
        str(ROOT / config),
        *words,
        f"model.path={base}",
        *small,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    steps = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert len(steps) == 2 and all(step["grad_norm"] > 0 for step in steps)
    if name == "my_reward.py":
        assert "reward/says_why" in steps[0]
    if name == "my_scorer.py":
        assert steps[0]["my/groups"] == 2 and "reward/novelty" in steps[0]
