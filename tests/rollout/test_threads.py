"""The number of threads that steps run with is found by trial, without wasting many steps on
it.
"""

from __future__ import annotations

import pytest
import torch

from nanomath.rollout import engine as module
from nanomath.rollout.engine import Threads


@pytest.fixture
def clock(monkeypatch):
    """Four threads, and a step that takes seconds[threads]; what ran is kept."""
    state = {"now": 0.0, "threads": 4, "ran": []}
    monkeypatch.setattr(module.time, "perf_counter", lambda: state["now"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: state.update(threads=n))
    return state


def run(
    chooser: Threads, clock: dict, rows: int, seconds: dict[int, float], steps: int
) -> list[int]:
    clock["ran"] = []

    def step() -> None:
        clock["ran"].append(clock["threads"])
        clock["now"] += seconds[clock["threads"]]

    for _ in range(steps):
        chooser.run(rows, step)
        assert clock["threads"] == 4  # as it was
    return clock["ran"]


def test_what_is_hopeless_is_tried_once(clock):
    chooser = Threads()
    assert chooser.trying(64)
    assert run(chooser, clock, 64, {4: 1.0, 2: 1.2, 1: 3.0}, 9) == [
        4,
        4,
        4,
        2,
        2,
        2,
        1,
        4,
        4,
    ]
    assert not chooser.trying(64) and not chooser.trying(100) and chooser.trying(128)
    assert run(chooser, clock, 2, {4: 5.0, 2: 1.2, 1: 1.0}, 12) == [
        4,
        4,
        4,
        2,
        2,
        2,
        1,
        1,
        1,
        1,
        1,
        1,
    ]


def test_another_number_of_threads_is_tried_anew(clock):
    chooser = Threads()
    run(chooser, clock, 8, {4: 1.0, 2: 3.0, 1: 3.0}, 6)
    clock["threads"] = 2

    def step() -> None:
        clock["ran"].append(clock["threads"])
        clock["now"] += 1.0

    clock["ran"] = []
    for _ in range(7):
        chooser.run(8, step)
    assert clock["ran"] == [2, 2, 2, 1, 1, 1, 2]


def test_one_thread_is_left_alone(clock):
    clock["threads"] = 1
    chooser = Threads()
    assert run_once(chooser, clock) == [1] and not chooser.trying(8)


def test_without_a_choice_all_are_taken(clock):
    chooser = Threads(choose=False)
    assert run(chooser, clock, 64, {4: 3.0, 2: 1.2, 1: 1.0}, 9) == [
        4
    ] * 9 and not chooser.trying(64)


def run_once(chooser: Threads, clock: dict) -> list[int]:
    ran = []
    chooser.run(8, lambda: ran.append(clock["threads"]))
    return ran


def test_a_step_that_fails_leaves_the_threads_alone(clock):
    def broken() -> None:
        raise FloatingPointError("no number")

    with pytest.raises(FloatingPointError):
        Threads().run(8, broken)
    assert clock["threads"] == 4
