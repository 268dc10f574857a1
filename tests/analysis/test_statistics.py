"""Intervals, corrections and what can be seen, by simulation of studies whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanomath.analysis import statistics
from nanomath.analysis.statistics import compare, halved, halving_dose

pytest.importorskip("scipy")
MU = 0.03


def simulated(rng, seeds, clusters, size, of_seeds, of_problems, of_clusters, rest):
    """d [S, n], its clusters, and the three truths: on these seeds, on these problems, mu."""
    names = np.repeat(np.arange(clusters), size)
    a = rng.normal(0, of_seeds, seeds)
    b = rng.normal(0, of_clusters, clusters)[names] + rng.normal(
        0, of_problems, len(names)
    )
    d = MU + a[:, None] + b + rng.normal(0, rest, (seeds, len(names)))
    return d, names, (MU + a.mean(), MU + b.mean(), MU)


SHAPES = [
    (5, 100, 1, 0.0, 0.3, 0.0, 0.3),
    (5, 50, 4, 0.02, 0.2, 0.2, 0.3),
    (3, 200, 1, 0.03, 0.3, 0.0, 0.3),
]
MORE_SHAPES = [
    (5, 100, 1, 0.02, 0.3, 0.0, 0.3),
    (10, 100, 2, 0.01, 0.3, 0.1, 0.3),
    (5, 30, 2, 0.1, 0.3, 0.1, 0.3),
]


@pytest.mark.parametrize(
    "shape",
    [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in MORE_SHAPES)],
    ids=str,
)
def test_of_a_hundred_intervals_ninety_five_hold_the_truth(shape):
    rng = np.random.default_rng(0)
    held = np.zeros(3)
    studies = 2000
    for _ in range(studies):
        d, names, truths = simulated(rng, *shape)
        found = compare(d, names)
        scores = (found.problems, found.seeds, found.both)
        held += [
            s.low <= truth <= s.high for s, truth in zip(scores, truths, strict=True)
        ]
    assert ((held / studies > 0.93) & (held / studies < 0.97)).all(), held / studies


def test_ignoring_clusters_would_not_do():
    """The same simulation says so: the check above can fail."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        d, _, (truth, *_) = simulated(rng, 5, 20, 10, 0.0, 0.1, 0.3, 0.1)
        score = compare(d).problems
        held += score.low <= truth <= score.high
    assert held / 500 < 0.7


def test_a_table_without_effects_sounds_one_time_in_twenty():
    rng = np.random.default_rng(1)
    alarms = 0
    tables = 600
    for _ in range(tables):
        base = rng.normal(0, 0.3, (5, 60)) + rng.normal(0, 0.02, (5, 1))
        p = {}
        for arm in "abcdef":
            scores = rng.normal(0, 0.3, (5, 60)) + rng.normal(0, 0.02, (5, 1))
            p[arm] = compare(scores - base).p
        alarms += min(statistics.holm(p).values()) < 0.05
    assert alarms / tables <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / tables)


def test_what_can_be_seen_is_seen_four_times_of_five():
    rng = np.random.default_rng(2)
    problems, samples, seeds, correlation = 200, 4, 5, 0.5
    delta = statistics.detectable(problems, samples, seeds, correlation=correlation)
    seen = 0
    studies = 1500
    for _ in range(studies):
        one, other = rng.random((2, problems))
        alike = rng.random(problems) < correlation
        rates = (one, np.where(alike, one, other))
        drawn = [
            rng.binomial(samples, rate, (seeds, problems)) / samples for rate in rates
        ]
        d = drawn[0] - drawn[1] - (rates[0] - rates[1]).mean() + delta
        # Of the problems drawn
        d += rng.normal(0, math.sqrt(2 * (1 - correlation) / 12 / problems))
        seen += compare(d).problems.low > 0
    assert 0.76 < seen / studies < 0.84


def test_seeds_widen_what_can_be_seen():
    assert statistics.detectable(256, 4, 1) == pytest.approx(0.071, abs=0.003)
    assert statistics.detectable(1024, 4, 1) == pytest.approx(0.036, abs=0.002)
    assert statistics.detectable(1024, 4, 5, spread=0.02) > statistics.detectable(
        1024, 4, 5
    )


def test_one_seed_says_nothing_about_the_method():
    for seeds in (1, 2):
        found = compare(np.random.default_rng(0).normal(size=(seeds, 50)))
        assert (
            found.seeds is None
            and found.both is None
            and found.headline is found.problems
        )


def test_problems_of_one_cluster_cannot_be_compared():
    with pytest.raises(ValueError, match="one cluster"):
        compare(np.ones((3, 4)), ["a"] * 4)


def test_holm_by_hand():
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert statistics.holm({}) == {}


def test_bands():
    scores = {"a": 0.9, "b": 0.85, "c": 0.5, "d": 0.45}
    apart = {("a", "b"): False, ("a", "c"): True, ("a", "d"): True}
    apart |= {("b", "c"): True, ("b", "d"): True, ("c", "d"): False}
    assert statistics.bands(scores, apart) == [["a", "b"], ["c", "d"]]
    all_apart = dict.fromkeys(apart, True)
    assert statistics.bands(scores, all_apart) == [["a"], ["b"], ["c"], ["d"]]


def test_the_middle_half_and_the_chance_of_improvement():
    scores = np.arange(20.0).reshape(5, 4)
    assert statistics.iqm(scores) == np.arange(5, 15).mean()
    assert statistics.improvement(scores, scores) == 0.5
    assert statistics.improvement(scores + 100, scores) == 1.0
    found = statistics.stratified_bootstrap([scores], statistics.iqm, 500)
    assert found.low < found.mean == statistics.iqm(scores) < found.high


# --- doses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([0.4, 0.2, 0.1], 3.0),  # just at the second
        ([0.4, 0.3, 0.1], np.sqrt(4 * 64) - 1),  # half of the way from 3 to 63, in logs
        ([0.4, 0.1, 0.3], 4 ** (2 / 3) - 1),  # the first time counts
        ([0.4, -0.4, 0.0], 4**0.25 - 1),
        ([0.4, 0.3, 0.21], np.inf),
        ([0.0, 0.0, -0.1], np.nan),
        ([-0.2, 0.0, 0.1], np.nan),
    ],
)
def test_the_dose_at_which_a_curve_is_half(curve, expected):
    assert halved([0, 3, 63], curve) == pytest.approx(expected, nan_ok=True)


def test_the_interval_of_a_dose_is_over_seeds():
    same = np.array([[0.4, 0.3, 0.1]] * 5)
    once = halving_dose([0, 3, 63], same)
    assert once.low == once.mean == once.high == pytest.approx(15)
    generator = np.random.default_rng(1)
    noisy = same + generator.normal(0, 0.05, same.shape)
    some = halving_dose([0, 3, 63], noisy)
    assert some == halving_dose([0, 3, 63], noisy) and some.low < some.mean < some.high
    rarely = np.array([[0.4, 0.3, 0.1]] + [[0.4, 0.3, 0.25]] * 4)
    assert halving_dose([0, 3, 63], rarely).high == np.inf
    nothing = np.array([[0.0, 0.1, 0.0]] * 3)
    assert np.isnan([halving_dose([0, 3, 63], nothing).mean]).all()
