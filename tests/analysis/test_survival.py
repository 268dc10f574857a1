"""Survival curves and the log-rank test against values by hand, and warnings that are planted."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate
from operator import mul

import numpy as np
import pytest

pytest.importorskip("scipy")
from nanomath.analysis import survival
from nanomath.analysis.survival import Runs, Threshold, announcements, log_rank, wilson

# Weeks of remission of 42 patients (Freireich et al., Blood 21, 1963): 6-MP, events and censored;
# placebo, all of them events.
TREATED = Runs.of(
    [6, 6, 6, 7, 10, 13, 16, 22, 23] + [None] * 12,
    [0] * 9 + [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35],
)
PLACEBO = Runs.of(
    [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23], [0] * 21
)


def test_kaplan_meier_by_hand():
    steps, share = survival.kaplan_meier(TREATED)
    left = [(3, 21), (1, 17), (1, 15), (1, 12), (1, 11), (1, 7), (1, 6)]
    factors = [1 - Fraction(d, n) for d, n in left]
    assert steps == [6, 7, 10, 13, 16, 22, 23]
    assert share == pytest.approx([float(s) for s in accumulate(factors, mul)])
    none = Runs.of([None, None], [5, 9])
    assert survival.kaplan_meier(none) == ([], [])


def test_the_log_rank_statistic_by_hand():
    """What the treated have less what they would have: 9 - 19.25, as textbooks have it."""
    scores = survival.log_rank_scores(survival.together(TREATED, PLACEBO))
    assert scores[:21].sum() == pytest.approx(-10.251, abs=1e-3)
    assert scores.sum() == pytest.approx(0, abs=1e-12)
    # None of the ways that were drawn is beyond
    assert log_rank([(TREATED, PLACEBO)]) == 1e-4
    few = Runs.of([1, 2], [0, 0]), Runs.of([3, 4], [0, 0])
    by_hand = [3 / 4, 3 / 4 - 1 / 3, 5 / 12 - 1 / 2, -1 / 12 - 1]
    assert survival.log_rank_scores(survival.together(*few)) == pytest.approx(by_hand)
    assert log_rank([few]) == log_rank([few[::-1]]) == 2 / 6


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_smallest_p_is_reached_where_all_of_one_arm_come_first(n):
    soon = Runs.of(list(range(10, 10 + n)), [0] * n)
    never = Runs.of([None] * n, [400] * n)
    late = Runs.of([300] * n, [0] * n)
    for other in (never, late):
        assert log_rank([(soon, other)]) == survival.smallest_p(n)
    assert (survival.smallest_p(n) < 0.05) == (n > 3)
    assert log_rank([(never, never)]) == 1.0


def drawn(generator, n: int, scale: float, until: int) -> Runs:
    steps = np.ceil(generator.exponential(scale, n)).astype(int)
    return Runs.of([int(s) if s <= until else None for s in steps], [until] * n)


@pytest.mark.parametrize("until", [10**6, 400])
def test_false_alarms_are_no_more_than_is_said(until):
    """Of studies in which the arms are alike, 5 against 5, one in twenty at most is told apart."""
    generator = np.random.default_rng(0)
    alike = [
        (drawn(generator, 5, 400, until), drawn(generator, 5, 400, until))
        for _ in range(2000)
    ]
    share = np.mean([log_rank([pair]) <= 0.05 for pair in alike])
    assert 0.02 < share < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 2000)


def test_strata_are_told_from_their_own_alone(monkeypatch):
    """Strata of quite other times: no false alarms, and an effect in each of them is found."""
    monkeypatch.setattr(survival, "DRAWS", 199)
    generator = np.random.default_rng(1)

    def study(effect: float) -> float:
        scales = (20, 100, 600)
        return log_rank(
            [
                (
                    drawn(generator, 5, scale, 400),
                    drawn(generator, 5, effect * scale, 400),
                )
                for scale in scales
            ]
        )

    assert np.mean([study(1) <= 0.05 for _ in range(400)]) < 0.05 + 2 * 0.011
    assert np.mean([study(6) <= 0.05 for _ in range(50)]) > 0.8


def test_one_stratum_drawn_is_about_one_stratum_counted(monkeypatch):
    pair = (
        Runs.of([30, 50, 60, None, 90], [400] * 5),
        Runs.of([80, 200, 70, None, None], [400] * 5),
    )
    exact = log_rank([pair])
    # Fewer than the 252 ways: they are drawn
    monkeypatch.setattr(survival, "DRAWS", 200)
    assert abs(log_rank([pair]) - exact) < 0.1


def test_the_mean_is_of_steps_that_every_run_was_watched():
    assert survival.horizon(Runs.of([20, None, None], [0, 300, 400])) == 300
    assert survival.horizon(Runs.of([20, 70], [0, 0])) == 70


def test_wilson_by_hand():
    nothing, half = wilson(0, 10), wilson(5, 10)
    z = 1.959964
    assert (nothing.low, nothing.high) == pytest.approx(
        (0, z**2 / (10 + z**2)), abs=1e-5
    )
    spread = z * np.sqrt(10 / 4 + z**2 / 4) / (10 + z**2)
    assert (half.low, half.high) == pytest.approx(
        (0.5 - spread, 0.5 + spread), abs=1e-5
    )


# --- warnings --------------------------------------------------------------------------------

STEPS = list(range(1, 201))
EVENTS = [150, None] * 12
HALF = [True, True, False, False] * 6


def runs(early: int, size: float = 1.0, start: float = 0.0):
    """Series of 24 runs: in those with the event at 150 something of `size` happens `early` steps
    before; they begin as far apart as `start`.
    """
    generator = np.random.default_rng(2)
    for event in EVENTS:
        values = start * generator.random() + 0.1 * generator.random(200)
        if event:
            values[event - early :] += size
        yield STEPS, list(values)


@pytest.mark.parametrize(
    ("size", "start", "text"),
    [(1.0, 0, "above 0"), (-1.0, 0, "below -0"), (1.0, 30, "above start +")],
)
def test_a_planted_warning_is_found_with_its_lead(size, start, text):
    found = announcements({"it": list(runs(60, size, start))}, EVENTS, HALF, 20)["it"]
    assert found["warning"].startswith(text)
    assert found["hits"].mean == 1 and found["false_alarms"].mean == 0
    assert 51 <= found["lead"] <= 60 and len(found["leads"]) == 6


def test_what_comes_too_late_or_means_nothing_is_no_hit():
    measures = {"late": list(runs(15)), "noise": list(runs(60, 0.0))}
    found = announcements(measures, EVENTS, HALF, 20)
    for worth in found.values():
        assert worth["hits"].mean - worth["false_alarms"].mean < 0.7
    assert Threshold(1, False, 0.5).first(measures["late"][0]) > 130
    assert Threshold(1, False, 5.0).first(measures["late"][0]) is None
    # No window is full
    assert Threshold(1, False, 0.0).first((STEPS[:5], [1.0] * 5)) is None


def test_few_collapses_say_nothing():
    few = [150 if i < 8 else None for i in range(24)]
    assert announcements({"it": list(runs(60))}, few, HALF, 20) == {}
