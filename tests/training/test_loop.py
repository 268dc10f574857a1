"""The loop: what happens in which order, and how it ends."""

from __future__ import annotations

import os
import signal

import pytest

from nanomath.training.loop import Loop
from nanomath.training.runlog import RunLog, read_jsonl


class Run:
    """A loop whose parts write down that they were called; `at` maps an event to what happens during it."""

    def __init__(self, directory, steps: int, at: dict | None = None, **options) -> None:
        self.events: list[str] = []
        self.at = at or {}
        self.log = RunLog(directory / "run", resume=False)
        self.log.begin("", 0)
        self.updates = 0
        self.loop = Loop(self.log, steps, self.step, lambda n: self.note(f"save {n}"), self.evaluate, **options)

    def note(self, event: str) -> None:
        self.events.append(event)
        self.at.get(event, lambda: None)()

    def step(self, number: int) -> dict[str, float]:
        self.note(f"step {number}")
        self.updates = number + 1
        return {"loss": 0.5}

    def evaluate(self) -> dict[str, float]:
        self.note(f"evaluate {self.updates}")
        return {"heldout": 0.1 * self.updates}


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def test_order(tmp_path):
    run = Run(tmp_path, 5, eval_every=2, save_every=3)
    assert run.loop.run() is True
    assert run.events == [
        *("evaluate 0", "step 0", "step 1", "evaluate 2", "step 2", "save 3"),
        *("step 3", "evaluate 4", "step 4", "evaluate 5", "save 5"),
    ]
    lines = list(read_jsonl(run.log.directory / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert [line["heldout"] for line in lines if "heldout" in line] == pytest.approx([0, 0.2, 0.4, 0.5])
    assert all(line["loss"] == 0.5 and line["seconds"] >= 0 for line in lines if "heldout" not in line)


def test_a_resumed_run_starts_behind_its_checkpoint(tmp_path):
    run = Run(tmp_path, 4)
    assert run.loop.run(start=2) is True
    assert run.events == ["step 2", "step 3", "evaluate 4", "save 4"]


def test_nothing_to_evaluate(tmp_path):
    run = Run(tmp_path, 2, eval_every=1)
    run.loop.evaluate = None
    assert run.loop.run() is True and run.events == ["step 0", "step 1", "save 2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_after_the_step(tmp_path, number, capsys):
    before = signal.getsignal(number)
    run = Run(tmp_path, 9, at={"step 3": send(number)}, eval_every=5)
    assert run.loop.run() is False
    assert run.events[-2:] == ["step 3", "save 4"]
    assert signal.getsignal(number) is before
    assert number.name in capsys.readouterr().err
    assert [line["step"] for line in read_jsonl(run.log.directory / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_signal_during_an_evaluation_saves_as_well(tmp_path):
    run = Run(tmp_path, 9, at={"evaluate 2": send(signal.SIGTERM)}, eval_every=2)
    assert run.loop.run() is False
    assert run.events[-2:] == ["evaluate 2", "save 2"]


def test_a_signal_during_a_save_loses_nothing(tmp_path):
    run = Run(tmp_path, 9, at={"save 2": send(signal.SIGTERM)}, save_every=2)
    assert run.loop.run() is False
    assert run.events[-1] == f"save {run.updates}" and run.updates in (2, 3) and len(set(run.events)) == len(run.events)


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    run = Run(tmp_path, 2, at={"step 1": send(signal.SIGINT)})
    assert run.loop.run() is True and run.events[-2:] == ["evaluate 2", "save 2"]


def test_the_second_signal_interrupts(tmp_path):
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    before = signal.getsignal(signal.SIGINT)
    run = Run(tmp_path, 9, at={"step 1": twice})
    with pytest.raises(KeyboardInterrupt):
        run.loop.run()
    assert signal.getsignal(signal.SIGINT) is before and not any("save" in event for event in run.events)


def test_a_bad_number_names_the_step(tmp_path):
    def bad() -> None:
        raise FloatingPointError("the gradient norm is nan")

    run = Run(tmp_path, 9, at={"step 2": bad})
    with pytest.raises(FloatingPointError, match="^step 3: the gradient norm is nan"):
        run.loop.run()
    assert not any("save" in event for event in run.events)
    assert [line["step"] for line in read_jsonl(run.log.directory / "metrics.jsonl")] == [0, 1, 2]


def test_progress_is_shown_where_there_is_no_terminal(tmp_path, capsys):
    run = Run(tmp_path, 20, show={"heldout": "heldout {:.0%}", "loss": "loss {:.2f}", "absent": "{:.1f}"})
    run.loop.run()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 10 and lines[-1] == "step 20/20  heldout 200%  loss 0.50"
