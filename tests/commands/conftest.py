"""A small model on disk, and commands called as the shell calls them but for the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nanomath import settings
from nanomath.commands.main import run_main
from nanomath.models import save_model
from nanomath.training.build import build_model


class Outcome(NamedTuple):
    """What the shell sees of a command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A model of random weights with the tokenizer of the world, and a context of 192 tokens."""
    directory = tmp_path_factory.mktemp("models") / "random"
    shape = settings.NewModel(
        hidden_size=32,
        layers=1,
        heads=2,
        kv_heads=1,
        intermediate_size=64,
        max_positions=192,
    )
    save_model(*build_model(settings.Model(device="cpu", new=shape), seed=1), directory)
    return directory


@pytest.fixture
def call(capsys, monkeypatch, tmp_path) -> Callable[..., Outcome]:
    """call(main, *words) in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(main: Callable[[list[str]], int], *words: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            run_main(main, [str(word) for word in words])
        return Outcome(exited.value.code, *capsys.readouterr())

    return call
