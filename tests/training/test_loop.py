"""The loop: what happens in which order, and how it ends."""

from __future__ import annotations

import errno
import math
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.training import ranks
from nanomath.training.alarms import LASTS, collapse, lasting
from nanomath.training.failure import out_of_memory
from nanomath.training.loop import Loop, TimeBudget, share_used
from nanomath.training.runlog import RunFailed, RunLog, read_jsonl


class Run:
    """A loop whose parts write down that they were called; `at` maps an event to what happens
    during it.
    """

    def __init__(
        self, directory, steps: int, at: dict | None = None, start: int = 0, **options
    ) -> None:
        self.events: list[str] = []
        self.at = at or {}
        self.log = RunLog(directory / "run", resume=start > 0)
        self.log.begin("", start)
        self.updates = 0
        self.loop = Loop(
            self.log, steps, lambda n: self.note(f"save {n}"), self.evaluate, **options
        )

    def go(self, start: int = 0) -> bool:
        """Whether all steps get done."""
        with self.loop.running(start):
            for step in self.loop:
                self.loop.record(self.step(step))
        return self.loop.finished

    def note(self, event: str) -> None:
        self.events.append(event)
        self.at.get(event, lambda: None)()

    def step(self, number: int) -> dict[str, float]:
        self.note(f"step {number}")
        self.updates = number + 1
        return {"loss": 0.5}

    def evaluate(self, done: int) -> dict[str, float]:
        self.note(f"evaluate {self.updates}")
        return {"heldout": 0.1 * self.updates}


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def fail(error: BaseException):
    def fail() -> None:
        raise error

    return fail


def test_order(tmp_path):
    run = Run(tmp_path, 5, eval_every=2, save_every=3)
    assert run.go() is True
    assert run.events == [
        *("evaluate 0", "step 0", "step 1", "evaluate 2", "step 2", "save 3"),
        *("step 3", "evaluate 4", "step 4", "evaluate 5", "save 5"),
    ]
    lines = list(read_jsonl(run.log.directory / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert [line["heldout"] for line in lines if "heldout" in line] == pytest.approx(
        [0, 0.2, 0.4, 0.5]
    )
    assert all(
        line["loss"] == 0.5 and line["seconds"] >= 0
        for line in lines
        if "heldout" not in line
    )


def test_a_resumed_run_starts_behind_its_checkpoint(tmp_path):
    run = Run(tmp_path, 4)
    assert run.go(start=2) is True
    assert run.events == ["step 2", "step 3", "evaluate 4", "save 4"]


def test_a_run_is_done_with_its_tokens(tmp_path):
    run = Run(tmp_path, 9, limits={"tokens": 10, "seconds": 0})
    run.step = lambda number: {"tokens": 4}
    assert run.go() is True
    assert run.events == ["evaluate 0", "evaluate 0", "save 3"]  # 4 + 4 + 4
    assert run.loop.used == 1.2


def test_a_run_is_done_with_its_seconds_and_goes_on_with_what_it_has_used(tmp_path):
    ticks = iter(range(100))  # a step takes one, and asks the time again
    run = Run(tmp_path, 99, limits={"seconds": 3.0}, clock=lambda: float(next(ticks)))
    with run.loop.running():
        for step in run.loop:
            run.loop.record({})
            if step == 1:
                break
    limits = {"seconds": 3.0}
    again = Run(tmp_path, 99, start=2, limits=limits, clock=lambda: float(next(ticks)))
    assert again.go(start=2) is True and again.loop.done == 3


def test_nothing_to_evaluate(tmp_path):
    run = Run(tmp_path, 2, eval_every=1)
    run.loop.evaluate = None
    assert run.go() is True and run.events == ["step 0", "step 1", "save 2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_after_the_step(tmp_path, number, capsys):
    before = signal.getsignal(number)
    run = Run(tmp_path, 9, at={"step 3": send(number)}, eval_every=5)
    assert run.go() is False
    assert run.events[-2:] == ["step 3", "save 4"]
    assert signal.getsignal(number) is before
    assert number.name in capsys.readouterr().err
    assert [
        line["step"] for line in read_jsonl(run.log.directory / "metrics.jsonl")
    ] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_signal_during_an_evaluation_saves_as_well(tmp_path):
    run = Run(tmp_path, 9, at={"evaluate 2": send(signal.SIGTERM)}, eval_every=2)
    assert run.go() is False
    assert run.events[-2:] == ["evaluate 2", "save 2"]


def test_a_signal_during_a_save_loses_nothing(tmp_path):
    run = Run(tmp_path, 9, at={"save 2": send(signal.SIGTERM)}, save_every=2)
    assert run.go() is False
    assert (
        run.events[-1] == f"save {run.updates}"
        and run.updates in (2, 3)
        and len(set(run.events)) == len(run.events)
    )


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    run = Run(tmp_path, 2, at={"step 1": send(signal.SIGINT)})
    assert run.go() is True and run.events[-2:] == ["evaluate 2", "save 2"]


def test_the_second_signal_interrupts(tmp_path):
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    before = signal.getsignal(signal.SIGINT)
    run = Run(tmp_path, 9, at={"step 1": twice})
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert signal.getsignal(signal.SIGINT) is before and not any(
        "save" in event for event in run.events
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_a_signal_interrupts_at_once(tmp_path, number):
    before = signal.getsignal(number)
    run = Run(tmp_path, 9, at={"evaluate 0": send(number)})
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert run.events == ["evaluate 0"] and signal.getsignal(number) is before


def test_what_one_rank_is_asked_all_do(tmp_path, monkeypatch):
    run = Run(
        tmp_path,
        9,
        at={
            "step 3": lambda: monkeypatch.setattr(ranks, "any_rank", lambda flag: True)
        },
    )
    assert run.go() is False and run.events[-2:] == ["step 3", "save 4"]


def test_a_measurement_worth_keeping_is_saved(tmp_path):
    asked = []

    def keep(done: int, measured: dict) -> bool:
        asked.append((done, measured["heldout"]))
        return done in (0, 2)

    run = Run(tmp_path, 5, eval_every=2, keep=keep)
    assert run.go() is True
    assert [event for event in run.events if "save" in event] == [
        "save 0",
        "save 2",
        "save 5",
    ]
    assert asked == [(0, 0), (2, 0.2), (4, 0.4), (5, 0.5)]


# --- failing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FloatingPointError("the gradient norm is nan"), "the gradient norm is nan$"),
        (
            OSError("rollouts.jsonl could not be written: No space left on device"),
            "rollouts.jsonl could .* on device$",
        ),
        (
            ValueError("not a probability\nmore"),
            r"ValueError: not a probability \(NANOMATH_TRACEBACK=1 shows where\)$",
        ),
        (
            RuntimeError("sizes differ"),
            r"RuntimeError: sizes differ \(NANOMATH_TRACEBACK=1 shows where\)$",
        ),
        (MemoryError(), "out of memory$"),
    ],
)
def test_an_error_names_the_step_and_nothing_is_saved(tmp_path, error, said):
    run = Run(tmp_path, 9, at={"step 2": fail(error)}, eval_every=5)
    with pytest.raises(RunFailed, match=f"^step 3: {said}") as failure:
        run.go()
    assert failure.value.__cause__ is error and run.events[-1] == "step 2"
    assert not any("save" in event for event in run.events)
    assert [
        line["step"] for line in read_jsonl(run.log.directory / "metrics.jsonl")
    ] == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("event", ["evaluate 0", "evaluate 2", "save 2"])
def test_an_error_elsewhere_names_the_place(tmp_path, event):
    run = Run(
        tmp_path,
        9,
        at={event: fail(OSError(errno.ENOSPC, "No space left on device"))},
        eval_every=2,
        save_every=2,
    )
    place = (
        "checkpoint step-2 could not be written"
        if event == "save 2"
        else f"measuring after step {event[-1]}"
    )
    with pytest.raises(RunFailed, match=f"^{place}: .*No space left on device$"):
        run.go()
    assert run.events[-1] == event


@pytest.mark.parametrize(
    "error", [TypeError("bug"), KeyError("bug"), AssertionError("bug")]
)
def test_a_bug_stays_a_bug(tmp_path, error):
    with pytest.raises(type(error)):
        Run(tmp_path, 9, at={"step 2": fail(error)}).go()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["step", "evaluate"])
def test_a_number_that_is_not_finite_is_named_and_not_logged(tmp_path, part, value):
    run = Run(tmp_path, 9, eval_every=1, save_every=1)
    whose = run if part == "step" else run.loop
    healthy = getattr(whose, part)
    broken = lambda *done: {**healthy(*done), "kl": value if run.updates == 3 else 0.0}  # noqa: E731
    setattr(whose, part, broken)
    place = "step 3" if part == "step" else "measuring after step 3"
    with pytest.raises(RunFailed, match=f"^{place}: kl is {value}$"):
        run.go()
    assert (
        run.events[-1] == ("step 2" if part == "step" else "evaluate 3")
        and "save 2" in run.events
    )
    text = (run.log.directory / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert max(
        line["step"] for line in read_jsonl(run.log.directory / "metrics.jsonl")
    ) == (2 if part == "step" else 3)


@pytest.mark.parametrize(
    ("module", "phase"),
    [
        ("nanomath.rollout.sampler", " (sampling)"),
        ("nanomath.rewards", " (rewarding)"),
        ("nanomath.training.optimizer", " (weight update)"),
        ("nanomath.training.policy_step", " (forward and backward pass)"),
        ("nanomath.training.runlog", ""),
        ("nanomath.models.transformer", ""),
    ],
)
def test_the_phase_is_where_the_error_came_from(tmp_path, module, phase):
    scope = {"__name__": module}
    exec("def fail(): raise RuntimeError('broken')", scope)
    with pytest.raises(RunFailed) as failure:
        Run(tmp_path, 9, at={"step 2": scope["fail"]}).go()
    assert str(failure.value).startswith(f"step 3{phase}: RuntimeError: broken")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                "allocate memory: you tried "
                "to allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "out of memory: 3.00 GiB asked for",
        ),
        (
            RuntimeError(
                "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total "
                "capacity of 7.79 GiB"
            ),
            "out of memory: 20.5 GiB asked for",
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            "out of memory",
        ),
        (RuntimeError("the memory of an elephant"), ""),
        (None, ""),
    ],
)
def test_errors_about_memory(error, said):
    assert out_of_memory(error) == said


# --- time ------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def timed(
    directory, minutes: float, step: float, evaluate: float, save: float, **options
) -> tuple[Run, float]:
    """A run whose parts take so many seconds each, and how many it took."""
    clock = Clock()

    class Timed(dict):
        def get(self, event: str, default: object):
            clock.now += {"step": step, "evaluate": evaluate, "save": save}[
                event.split()[0]
            ]
            return default

    run = Run(directory, 40, minutes=minutes, clock=clock, **options)
    run.at = Timed()
    run.go()
    return run, clock.now - 1000


def test_the_run_ends_before_its_time_is_up(tmp_path, capsys):
    run, seconds = timed(tmp_path, 1.0, step=10, evaluate=7, save=2)
    assert run.events[-2:] == [
        "step 4",
        "save 5",
    ]  # at 57 seconds another step would end at 67
    assert seconds == 59
    assert (
        "step 5: another one might not end within run.minutes = 1"
        in capsys.readouterr().err
    )
    assert list(read_jsonl(run.log.directory / "metrics.jsonl"))[-1]["seconds"] == 10


def test_one_step_is_always_done(tmp_path):
    run, _ = timed(tmp_path, 0.01, step=10, evaluate=7, save=2)
    assert run.events == ["evaluate 0", "step 0", "save 1"]


def test_without_a_limit_there_is_all_the_time(tmp_path):
    run, _ = timed(tmp_path, 0, step=1e6, evaluate=1e6, save=1e6)
    assert run.updates == 40


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.5, 3), *[st.floats(0.1, 20)] * 3, st.integers(0, 4), st.integers(0, 4)
)
def test_what_takes_the_same_every_time_ends_in_time(
    tmp_path_factory, minutes, step, evaluate, save, eval_every, save_every
):
    """And not long before. What a save costs is known after the first one."""
    often = {"eval_every": eval_every, "save_every": save_every}
    run, seconds = timed(
        tmp_path_factory.mktemp("timed"), minutes, step, evaluate, save, **often
    )
    unused = 60 * minutes - seconds
    known = sum("save" in event for event in run.events) > 2
    over = 1e-6 if known else 2 * save + 1e-6  # 1e-6: the clock's sums are rounded
    assert run.updates in (1, 40) or unused >= -over
    assert run.updates == 40 or unused <= step + evaluate + 2 * save + 1e-6


def test_the_longest_of_each_part_counts():
    clock = Clock()
    budget = TimeBudget(1.0, clock)
    for part, seconds in ("step", 5), ("step", 20), ("step", 1), ("save", 4):
        with budget.timed(part):
            clock.now += seconds
    assert budget.allows(["step", "save"]) and budget.allows(
        ["step", "save", "measurement"]
    )
    assert budget.allows(["step", "save", "save"]) and not budget.allows(
        ["step", "step"]
    )


# --- alarms ----------------------------------------------------------------------------------


def collapsing(run: Run, at: int) -> Run:
    """From step `at` on nothing is right any more, and the KL has risen tenfold."""
    run.step = lambda i: (
        {"pass@1": 0.5 + 0.01 * (i % 2), "kl": 0.02}
        if i < at
        else {"pass@1": 0.0, "kl": 0.2}
    )
    return run


@pytest.mark.parametrize("stop", [True, False])
def test_only_if_asked_a_collapse_ends_the_run(tmp_path, capsys, stop):
    run = collapsing(Run(tmp_path, 60, stop_on_collapse=stop), 25)
    assert run.go() is not stop
    (alarm,) = (
        line
        for line in read_jsonl(run.log.directory / "alarms.jsonl")
        if line["alarm"] == "collapse"
    )
    assert 26 < alarm["step"] < 35 and alarm["text"].startswith(
        "collapse: accuracy fell from 50"
    )
    said = f"step {alarm['step']}: {alarm['text']}" + "; run.on_collapse = stop" * stop
    assert [
        line for line in capsys.readouterr().err.splitlines() if "collapse" in line
    ] == [said]
    assert run.events[-1] == (f"save {alarm['step']}" if stop else "save 60")


@pytest.mark.parametrize("broken_at", [0, 30, 45])
def test_a_collapse_that_lasts_ends_the_run_as_done(tmp_path, capsys, broken_at):
    """Twenty steps after its alarm, all of them counted if it was broken off between."""
    limits = {"tokens": 0, "collapse": True}
    if broken_at:
        collapsing(Run(tmp_path, broken_at, limits=limits), 25).go()
    run = collapsing(Run(tmp_path, 90, start=broken_at, limits=limits), 25)
    assert run.go(broken_at)
    said = {a["alarm"]: a for a in read_jsonl(run.log.directory / "alarms.jsonl")}
    alarm = said["collapse"]
    end = alarm["step"] + LASTS - 1
    assert run.events[-2:] == ["evaluate 0", f"save {end}"]
    assert f"step {end}: done before step 90" in capsys.readouterr().err
    lines = list(read_jsonl(run.log.directory / "metrics.jsonl"))
    assert lasting(lines, "collapse") == alarm["step"]
    assert share_used(lines, {"collapse": False}) == 0.0


def test_a_dip_ends_nothing(tmp_path):
    run = Run(tmp_path, 60, limits={"collapse": True})
    run.step = lambda i: {
        "pass@1": 0.5 * (not 25 <= i < 35),
        "kl": 0.02 + 0.2 * (25 <= i < 35),
    }
    assert run.go() and run.events[-1] == "save 60"
    lines = list(read_jsonl(run.log.directory / "metrics.jsonl"))
    assert (
        any(collapse(lines[:n]) for n in range(61))
        and lasting(lines, "collapse") is None
    )


def test_so_does_a_scorer_that_is_hacked(tmp_path, capsys):
    run = Run(tmp_path, 60, stop_on_collapse=True)
    run.step = lambda i: {
        "pass@1": 0.5 + 0.01 * (i % 2) - 0.3 * (i >= 25),
        "reward/prm": 0.3 + 0.3 * (i >= 25),
    }
    assert not run.go()
    assert "PRM reward rises while accuracy falls" in capsys.readouterr().err
    assert run.events[-1].startswith("save ") and run.events[-1] != "save 60"


@pytest.mark.parametrize("broken_at", [5, 27, 30, 45])
def test_a_resumed_run_raises_the_same_alarms(tmp_path, broken_at):
    whole = collapsing(Run(tmp_path / "whole", 60), 25)
    whole.go()
    collapsing(Run(tmp_path / "parts", broken_at), 25).go()
    parts = collapsing(Run(tmp_path / "parts", 60, start=broken_at), 25)
    parts.go(broken_at)
    alarms = [
        list(read_jsonl(run.log.directory / "alarms.jsonl")) for run in (whole, parts)
    ]
    assert alarms[0] == alarms[1] and alarms[0]


def test_without_alarms_there_is_no_file_of_them(tmp_path):
    run = Run(tmp_path, 3)
    run.go()
    assert sorted(path.name for path in run.log.directory.iterdir()) == [
        "config.toml",
        "metrics.jsonl",
    ]


# --- showing ---------------------------------------------------------------------------------


def test_progress_is_shown_where_there_is_no_terminal(tmp_path, capsys):
    run = Run(
        tmp_path,
        20,
        show={"heldout": "heldout {:.0%}", "loss": "loss {:.2f}", "absent": "{:.1f}"},
    )
    run.go()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 10 and lines[-1] == "step 20/20  heldout 200%  loss 0.50"
