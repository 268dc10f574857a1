"""docs/extending.md: each example works as it stands there, run by the commands beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_sft

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
EXAMPLES = re.findall(
    r"`(my_\w+\.py)`:\n\n```python\n(.*?)```\n\n    (python .*?)\n", PAGE, re.DOTALL
)
# Sections that change the tree: title, and the text with new files, diffs and commands.
CHANGES = {
    title: text
    for title, text in re.findall(
        r"^## ([^\n]*)(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE
    )
    if "```diff" in text
}
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
    options = f"run.directory={directory}", "run.name=base", "sft.batch_size=4"
    assert train_sft.main([*SHAPE, *QUICK, *options]) == 0
    return directory / "base"


def typed(words: list[str], directory: Path, path: list[Path]) -> str:
    """What a command prints, run in `directory`; `path` is where modules are found."""
    environment = {
        name: value for name, value in os.environ.items() if name[:7] != "TRITON_"
    }
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    environment["OMP_NUM_THREADS"] = "1"
    line = [sys.executable, *words]
    done = subprocess.run(
        line,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps_of(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def change(text: str, tree: Path) -> None:
    """Write a section's files and make its changes, whose old lines stand in a file once."""
    for name, code in re.findall(
        r"`(\w+/[\w/]+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL
    ):
        (tree / name).write_text(code, encoding="utf-8")
    for diff in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
            name, hunks = part.split("\n", 1)
            changed = (tree / name).read_text("utf-8")
            for hunk in hunks.split("@@\n"):
                before, after = (
                    re.sub(rf"(?m)^(\{sign}.*\n|.)", "", hunk) for sign in "+-"
                )
                assert changed.count(before) == 1, before
                changed = changed.replace(before, after)
            (tree / name).write_text(changed, encoding="utf-8")


def test_every_example_is_found():
    names = (
        "my_loss.py",
        "my_baseline.py",
        "my_reward.py",
        "my_scorer.py",
        "my_format.py",
    )
    assert tuple(name for name, _, _ in EXAMPLES) == names
    assert list(CHANGES) == ["An architecture", "A kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "command"),
    EXAMPLES[:-1],
    ids=[name for name, _, _ in EXAMPLES[:-1]],
)
def test_an_example_trains(name, code, command, base, tmp_path):
    (tmp_path / name).write_text(code, encoding="utf-8")
    script, config, *words = command.split()[1:]
    assert config == "configs/tiny/grpo.toml" and (script in (name, "train_grpo.py"))
    script = ROOT / script if script == "train_grpo.py" else script
    small = (
        f"model.path={base}",
        "grpo.prompts=2",
        "grpo.group_size=4",
        "reward.weights.random=1",
        "run.directory=runs",
        *QUICK,
    )
    typed([str(script), str(ROOT / config), *words, *small], tmp_path, [ROOT, tmp_path])
    (run,) = (tmp_path / "runs").iterdir()
    steps = steps_of(run)
    assert len(steps) == 2 and all(step["grad_norm"] > 0 for step in steps)
    if name == "my_reward.py":
        assert "reward/says_why" in steps[0]
    if name == "my_scorer.py":
        assert steps[0]["my/groups"] == 2 and "reward/novelty" in steps[0]


@pytest.mark.slow
def test_the_format_trains_goes_on_and_is_measured(base, tmp_path, monkeypatch):
    name, code, command = EXAMPLES[-1]
    (tmp_path / name).write_text(code, encoding="utf-8")
    row = {"prompt": "1 + 1?", "completions": ["1 + 1 = 2", "so 3"], "labels": [1, 0]}
    (tmp_path / "rows.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    script, kind, config, *words = command.split()[1:]
    assert (script, kind, config) == (name, "train", "configs/tiny/prm.toml")
    data = "prm.train=rows.jsonl", "prm.heldout=rows.jsonl", "run.directory=runs"
    line = [script, kind, str(ROOT / config), *words, *data, f"model.path={base}"]
    for more in (["run.steps=2"], ["run.steps=30", "--resume"]):
        typed([*line, *more], tmp_path, [ROOT])
    steps = steps_of(tmp_path / "runs" / "value")
    assert len(steps) == 30 and steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    found = typed([script, "eval", "runs/value", "rows.jsonl"], tmp_path, [ROOT])
    assert "8 labelled steps" in found


@pytest.mark.slow
@pytest.mark.parametrize("title", CHANGES)
def test_a_change_passes_its_own_tests(title, tmp_path):
    pytest.importorskip("triton")
    for name in ("nanomath", "kernels", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train_sft.py", "train_grpo.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    change(CHANGES[title], tmp_path)
    commands = re.findall(r"^    python (.*)$", CHANGES[title], re.MULTILINE)
    assert commands[0].startswith("-m pytest tests/")
    for command in commands:
        printed = typed(command.split(), tmp_path, [tmp_path])
        if "pytest" not in command:
            lines = [line for line in printed.splitlines() if "squared_relu" in line]
            assert lines and not any(re.search("spills|failed", line) for line in lines)
