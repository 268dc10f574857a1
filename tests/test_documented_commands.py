"""Every command that a page or a config shows can be typed: its config is there, its keys and
values are accepted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanomath.commands.bench.all import AllBench
from nanomath.commands.bench.kernels import KernelBench
from nanomath.commands.bench.rollout import RolloutBench
from nanomath.commands.bench.training import TrainingBench
from nanomath.commands.config import SETTINGS
from nanomath.config import load

ROOT = Path(__file__).parents[1]
STUDIES = sorted(ROOT.glob("configs/studies/*.toml"))  # tests/analysis resolves them
CONFIGS = [
    path for path in sorted(ROOT.glob("configs/**/*.toml")) if path not in STUDIES
]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *CONFIGS]
COMMANDS = {
    **SETTINGS,
    "python -m nanomath bench all": AllBench,
    "python -m nanomath bench kernels": KernelBench,
    "python -m nanomath bench rollout": RolloutBench,
    "python -m nanomath bench training": TrainingBench,
}
NAMES = "|".join(name.removeprefix("python ") for name in COMMANDS)
NEW = "=squared_relu"  # what docs/extending.md adds, which has a test
COMMAND = re.compile(rf"python ({NAMES})((?: +[^\s`&#)]+)*)")


def shown(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands of a page and their words; what stands after a wide space is a remark."""
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for match in COMMAND.finditer(text):
        name, words = match.groups()
        key = name if name.startswith("train") else f"python {name}"
        typed = shlex.split(words.strip().split("   ")[0])
        # the benchmarks have keys of their own
        yield f"{key} general" if typed[1:2] == ["general"] else key, typed


EVERY = [(page, *command) for page in PAGES for command in shown(page)]


@pytest.mark.parametrize(
    ("page", "name", "words"), EVERY, ids=lambda value: str(value)[-60:]
)
def test_it_can_be_typed(monkeypatch, page, name, words):
    monkeypatch.chdir(ROOT)
    files = [word for word in words if word.endswith(".toml")]
    overrides = [word for word in words if "=" in word and not word.endswith(NEW)]
    load(COMMANDS[name], files[0] if files else None, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_shows_how_it_is_used(path):
    name = str(path.relative_to(ROOT))
    uses = [command for command, words in shown(path) if name in words]
    assert uses
    load(SETTINGS[uses[0]], path, [])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_a_study_shows_how_it_is_run(path):
    assert f"python -m nanomath study {path.relative_to(ROOT)}" in path.read_text(
        "utf-8"
    )


def test_commands_are_found():
    assert {name for _, name, _ in EVERY} == set(COMMANDS)
    assert any(len(words) > 5 for _, _, words in EVERY)
