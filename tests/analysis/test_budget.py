"""Accuracy by budget against a direct count, and what two measurements say of each problem."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomath.analysis import budget as module
from nanomath.analysis import statistics
from nanomath.analysis.budget import arrows, by_budget, changes, thinned

samples = st.lists(
    st.tuples(st.integers(0, 1), st.integers(1, 12)), min_size=1, max_size=4
)


def problem(pairs, cluster="c", question="?"):
    right, tokens = zip(*pairs, strict=True)
    return {
        "question": question,
        "cluster": cluster,
        "right": list(right),
        "tokens": list(tokens),
    }


def problems_of(rows):
    return {f"p{i}": problem(row, cluster=i) for i, row in enumerate(rows)}


@settings(
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(samples, min_size=1, max_size=4))
def test_the_curve_is_a_direct_count(monkeypatch, rows):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    found = by_budget(problems_of(rows), 12, [3, 12])

    def counted(n):
        return np.mean(
            [np.mean([ok and size <= n for ok, size in row]) for row in rows]
        )

    for n, score in zip(found.tokens, found.curve, strict=True):
        assert score.mean == pytest.approx(counted(n))
    for n in range(1, 13):  # level between the points
        at = max(i for i, point in enumerate(found.tokens) if point <= n)
        assert found.curve[at].mean == pytest.approx(counted(n))
    assert found.at["3"].mean == pytest.approx(counted(3))
    assert found.area.mean == pytest.approx(np.mean([counted(n) for n in range(1, 13)]))
    everything = np.mean([np.mean([ok for ok, _ in row]) for row in rows])
    assert found.at["12"].mean == pytest.approx(everything)


def test_a_band_is_of_clusters():
    rows = [[(i % 2, 5)] for i in range(40)]
    alone = by_budget(problems_of(rows), 5, [5]).at["5"]
    pairs = {
        name: {**p, "cluster": p["right"][0] + 2 * (i // 8)}
        for i, (name, p) in enumerate(problems_of(rows).items())
    }
    together = by_budget(pairs, 5, [5]).at["5"]
    assert alone.mean == together.mean == 0.5
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_long_curves_are_thinned():
    assert thinned(3) == [0, 1, 2]
    kept = thinned(10_000)
    assert len(kept) == module.POINTS and (kept[0], kept[-1]) == (0, 9999)


def test_arrows():
    a = problems_of([[(0, 4), (0, 6)], [(1, 2), (1, 2)], [(1, 9), (0, 9)]])
    b = problems_of([[(1, 8), (1, 8)], [(1, 2), (1, 2)], [(0, 9), (0, 9)]])
    b["other"] = b["p0"]
    b["p1"] = {**b["p1"], "question": "another"}
    found = arrows(a, b)
    assert [(x.before, x.after, x.band) for x in found] == [
        ((0.0, 5.0), (1.0, 8.0), 0),
        ((0.5, 9.0), (0.0, 9.0), 2),
    ]
    assert found[1].held == (0.0, 9.0)  # the sample that did not choose the band
    text = "\n".join(changes(found))
    assert (
        "accuracy 25.0% -> 50.0% (+25.0" in text and "tokens 7.0 -> 8.5 (+1.5" in text
    )
    assert (
        "0 to 10%         1 problems  accuracy 0.0% -> 100.0% (+100.0)  tokens" in text
    )
    with pytest.raises(ValueError, match="no problem in common"):
        arrows(a, {"p0": {**a["p0"], "question": "another"}})


def test_one_sample_makes_no_bands():
    a = problems_of([[(0, 4)], [(1, 4)]])
    lines = list(changes(arrows(a, a)))
    assert len(lines) == 3 and "no bands" in lines[-1]


def test_bands_do_not_rise_by_chance():
    """Nothing changed; sorted by the samples that they are measured by, hard ones would rise."""
    generator = np.random.default_rng(0)
    truth = generator.uniform(0.2, 0.8, 3000)
    a, b = (
        problems_of([[(int(ok), 5) for ok in generator.random(4) < p] for p in truth])
        for _ in range(2)
    )
    hard = [x for x in arrows(a, b) if x.band == 0]
    honest = np.mean([x.after[0] - x.held[0] for x in hard])
    assert abs(honest) < 0.05
    naive = [x for x in arrows(a, b) if x.before[0] == 0]
    assert np.mean([x.after[0] - x.before[0] for x in naive]) > 0.2
