"""Commands called as the shell calls them but for the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from nanomath.commands.main import run_main


class Outcome(NamedTuple):
    """What the shell sees of a command."""

    code: int
    out: str
    err: str


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
