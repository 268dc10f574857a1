"""The entry points: usage, --help, exit codes, and the page of all config keys."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_grpo
import train_sft
from nanomath import settings
from nanomath.__main__ import COMMANDS, main
from nanomath.commands.main import run_main
from nanomath.training import trainer
from nanomath.training.runlog import RunFailed
from nanomath.training.trainer import make_deterministic, memory_knobs, memory_use

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "train_sft": settings.SFTConfig,
    "train_grpo": settings.GRPOConfig,
    "eval": settings.EvalConfig,
    "sample": settings.SampleConfig,
    "merge": settings.MergeConfig,
    "drift": settings.DriftConfig,
    "prm label": settings.LabelConfig,
    "prm train": settings.PRMConfig,
    "prm eval": settings.PRMEvalConfig,
}


def keys(cls: type) -> list[str]:
    """Every key of a config class, with its section."""
    return names(cls())


def names(part: object, prefix: str = "") -> list[str]:
    """The dotted names of the keys of a dataclass and of those in it."""
    found = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        name = prefix + field.name
        found += names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return found


def shell(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- usage and help --------------------------------------------------------------------------


def test_without_a_command_it_says_which_there_are(call):
    for words, code in ([], 2), (["--help"], 0), (["-h"], 0):
        outcome = call(main, *words)
        assert outcome.code == code
        assert outcome.out.startswith("usage: python -m nanomath COMMAND")
        assert all(f"\n  {command} " in outcome.out for command in COMMANDS)


@pytest.mark.parametrize("command", CONFIGS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_key(call, command, flag):
    script = {"train_sft": train_sft.main, "train_grpo": train_grpo.main}.get(command)
    outcome = call(script, flag) if script else call(main, *command.split(), flag)
    assert outcome.code == 0 and outcome.err == ""
    assert [
        key for key in keys(CONFIGS[command]) if f"  {key}=" not in outcome.out
    ] == []
    assert ("--resume" in outcome.out) == (script is not None or command == "prm train")


def test_help_wins_over_what_else_is_wrong(call):
    assert call(train_sft.main, "missing.toml", "optim.lr=fast", "--help").code == 0
    assert call(main, "eval", "--help").code == 0
    assert call(main, "sample", "model", "question", "--help").code == 0


# --- the page of all keys --------------------------------------------------------------------


def test_the_page_has_every_key_of_every_config(call):
    parts = call(main, "config").out.split("\n## ")[2:]
    tables = {part.partition("\n")[0]: part for part in parts}
    assert len(tables) == len(parts)
    for command, cls in CONFIGS.items():
        reader = (
            f"{command}.py" if command.startswith("train") else f"nanomath {command}"
        )
        for key in keys(cls):
            section, _, name = key.rpartition(".")
            title = (
                f"`[{section}]`" if section else f"`{reader}`: keys without a section"
            )
            (table,) = [part for heading, part in tables.items() if title in heading]
            assert f"\n| `{name}` |" in table and f"`{reader}`" in table


def test_the_page_has_each_key_once_with_defaults_that_differ(call):
    lines = call(main, "config").out.splitlines()
    assert (
        len([line for line in lines if line.startswith("| `gradient_checkpointing` |")])
        == 1
    )
    (split,) = [line for line in lines if line.startswith("| `split` |")]
    assert '| `"train"`; `"validation"` in `[heldout]` of `train_sft.py`, ' in split
    assert (
        '; `"test"` in `[problems]` of `nanomath eval`, `[problems]` of `nanomath drift` |'
        in split
    )
    assert any(
        line.startswith(
            "| `lr` | `float` | `1e-05`; `1e-06` in `[optim]` of `train_grpo.py` |"
        )
        for line in lines
    )
    assert any(
        r"penalty \|log pi - log pi_old\|; at least 0 |" in line for line in lines
    )


def test_the_page_in_the_documentation_is_the_newest(call):
    written = ROOT / "docs" / "config.md"
    if not written.is_file():
        pytest.skip("docs/config.md is not there")
    assert written.read_text(encoding="utf-8") == call(main, "config").out


def test_the_page_takes_no_arguments(call):
    assert call(main, "config", "--help").code == 0
    outcome = call(main, "config", "docs/config.md")
    assert (
        outcome.code == 2
        and outcome.err.startswith("error: ")
        and outcome.err.count("\n") == 1
    )


# --- exit codes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a\nb"), 2),
        (FileNotFoundError("no such file"), 2),
        (FileExistsError("it is there"), 2),
        (ModuleNotFoundError("pip install it"), 2),
        (FloatingPointError("the logits of sample 3 are nan"), 1),
        (RunFailed("step 3: the loss is nan"), 1),
        (MemoryError("out of memory"), 1),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_errors_end_in_one_line(call, error, code):
    def fail(argv: list[str]) -> int:
        raise error

    outcome = call(fail)
    assert outcome.code == code and outcome.out == ""
    said = " ".join(str(error).split()) or "interrupted"
    assert outcome.err == f"error: {said}\n"


def test_a_failed_run_may_say_more_than_one_line(call):
    def fail(argv: list[str]) -> int:
        raise RunFailed(
            "step 3: out of memory\n  grpo.token_budget = 0: smaller micro-batches"
        )

    outcome = call(fail)
    assert outcome.code == 1
    assert (
        outcome.err
        == "error: step 3: out of memory\n  grpo.token_budget = 0: smaller micro-batches\n"
    )


def test_a_bug_keeps_its_traceback():
    def fail(argv: list[str]) -> int:
        raise RuntimeError("unexpected")

    with pytest.raises(RuntimeError, match="unexpected"):
        run_main(fail, [])


def test_the_traceback_of_a_mistake_is_there_for_the_asking(monkeypatch):
    def fail(argv: list[str]) -> int:
        raise ValueError("bad key")

    monkeypatch.setenv("NANOMATH_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad key"):
        run_main(fail, [])


def test_a_rank_does_not_wait_for_threads_that_are_left():
    """As gloo's are; what is to be closed at the end, and what was printed, are not lost."""
    program = """
import atexit, threading, time
from nanomath.commands.main import run_main

def main(argv):
    threading.Thread(target=time.sleep, args=(600,)).start()
    atexit.register(print, "closed")
    print("done", end=" ")
    return 3

run_main(main, [])
"""
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (found.returncode, found.stdout, found.stderr) == (3, "done closed\n", "")


# --- what both training scripts share --------------------------------------------------------


@pytest.mark.parametrize(
    "config", [settings.SFTConfig(), settings.GRPOConfig()], ids=["sft", "grpo"]
)
def test_advice_about_memory_names_keys_that_exist_with_their_values(config):
    """A line each, in the form in which the key is set."""
    config.sampling.slots, config.model.gradient_checkpointing = 96, True
    lines = memory_knobs(config).splitlines()
    assert "  sampling.slots = 96: fewer sequences decoded side by side" in lines
    assert "  model.gradient_checkpointing = true: true recomputes activations" in lines
    named = [line.split(" = ")[0].strip() for line in lines]
    assert set(named) <= set(keys(type(config))) and len(set(named)) == len(named)
    assert sum(name.endswith(".token_budget") for name in named) == 1


def test_memory_in_use_is_a_number_below_what_there_is():
    found = re.fullmatch(
        r"used at most ([\d.]+) GiB of ([\d.]+) GiB on cpu",
        memory_use(torch.device("cpu")),
    )
    assert 0.05 < float(found[1]) < float(found[2])


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [
        ("auto", "cpu", True),
        ("true", "cpu", True),
        ("false", "cpu", False),
        ("auto", "cuda", False),
        ("true", "cuda", True),
    ],
)
def test_deterministic_algorithms(monkeypatch, mode, device, expected):
    monkeypatch.setattr(trainer, "choose_device", torch.device)
    # So that it is as before when the test is over
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.are_deterministic_algorithms_enabled()
    try:
        make_deterministic(mode, device)
        assert torch.are_deterministic_algorithms_enabled() is expected
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (
            ":4096:8" if mode == "true" else None
        )
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_code_a_command_returns(call, returned, code):
    assert call(lambda argv: returned).code == code


def test_from_the_shell():
    done = shell("-m", "nanomath", "evla", "model", "world")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"error: unknown command 'evla': expected one of {', '.join(COMMANDS)}\n"
    )
    done = shell("-m", "nanomath")
    assert (
        done.returncode == 2 and done.stdout.startswith("usage: ") and done.stderr == ""
    )
    done = shell(str(ROOT / "train_sft.py"), "optim.lr=fast")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr == "error: command line: optim.lr: expected a number, got 'fast'\n"
    )
