"""The event of a study: read off runs that are written here, into numbers, a page and a picture."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from nanomath.analysis import event, figures
from nanomath.analysis.cells import in_order, make_cells
from nanomath.analysis.pool import Pool
from nanomath.analysis.results import as_json, as_table, collect
from nanomath.analysis.study import study_of
from nanomath.training.alarms import LASTS

TABLE = {
    "question": "When?",
    "baseline": "low_beta=0.04",
    "seeds": [0, 1, 2, 3, 4],
    "measures": ["grpo.kl"],
    "stages": {"grpo": {"run": "train_grpo.py", "keys": {"model.path": "x"}}},
    "axes": {
        "rate": {
            "low": {"grpo.optim.lr": 1e-4},
            "high": {"grpo.optim.lr": 1e-3, "grpo.run.steps": 99},
        },
        "beta": {
            "beta=0.04": {"grpo.algorithm.kl_coef": 0.04},
            "beta=0": {"grpo.algorithm.kl_coef": 0.0},
        },
    },
    "event": {
        "alarm": "grpo.collapse",
        "announce": ["entropy", "alarm/kl"],
        "ahead": 10,
    },
}
LAST = 100


def write_run(place, falls_at: int | None) -> None:
    """A run of LAST steps, whose accuracy is gone from a step on, ten times as much KL with it, and
    its entropy 30 steps before.
    """
    place.mkdir(parents=True)
    falls = falls_at or LAST + 31
    lines = [
        {
            "step": step,
            "pass@1": 0.5 + 0.02 * (step % 2) if step < falls else 0.0,
            "kl": 0.02 if step < falls else 0.2,
            "entropy": 1.0 if step < falls - 30 else 0.2,
            "seconds": 1.0,
            "loss": 0.0,
        }
        for step in range(1, LAST + 1)
    ]
    (place / "config.toml").write_text("[grpo]\n")
    (place / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (place / "cell.json").write_text('{"state": "done", "seconds": 1.0}\n')
    if falls_at:
        alarm = {"step": falls_at + 2, "alarm": "kl", "text": "KL jumped"}
        (place / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")


def results_of(tmp_path, falls, **changed):
    """Of a study whose runs fall at falls(arm, seed): a step, or None for never."""
    study = study_of("when", {**TABLE, **changed})
    chains = make_cells(study, tmp_path)
    for (arm, seed), chain in chains.items():
        write_run(tmp_path / chain["grpo"].name, falls(arm, seed))
    return collect(study, chains, Pool(tmp_path, 1, print))


def high_falls(arm: str, seed: int) -> int | None:
    return 60 + seed if arm.startswith("high") else None


def test_every_number_has_its_cell(tmp_path):
    results = results_of(tmp_path, high_falls)
    found = json.loads(as_json(results))["event"]
    for key, one in found["values"].items():
        arm, seed = key.split(", seed ")
        falls = high_falls(arm, int(seed))
        assert one["cell"] == results.chains[arm, int(seed)]["grpo"].name
        assert one["last"] == LAST and (one["step"] is None) == (falls is None)
        assert falls is None or falls < one["step"] < falls + LASTS // 2
    low, high = (found["axes"]["arm"][arm] for arm in ("low_beta=0", "high_beta=0"))
    assert (low["had_it"], high["had_it"], high["without"][-1]) == (0, 5, 0.0)
    assert low["p"] == 1.0 and low["mean"] == LAST
    assert high["p"] == pytest.approx(2 / 252)
    assert high["p_holm"] == pytest.approx(3 * 2 / 252)
    mean = [
        one["step"] for key, one in found["values"].items() if "high_beta=0," in key
    ]
    assert high["mean"] == pytest.approx(sum(mean) / 5)


def test_axes_are_tested_all_else_equal(tmp_path):
    """The rate is told apart, and the penalty, which does nothing, is not."""
    results = results_of(tmp_path, high_falls)
    axes = results.event.table["axes"]
    assert axes["rate"]["high"]["runs"] == 10 and axes["rate"]["high"]["p"] < 0.001
    assert axes["beta"]["beta=0"]["had_it"] == 5 and axes["beta"]["beta=0"]["p"] == 1.0
    assert "p" not in axes["rate"]["low"]
    table = as_table(results)
    assert "## When grpo.collapse began that lasted" in table
    assert "| rate | high | 10 | 10 | 100% (72 to 100) |" in table
    assert "| beta | beta=0.04 | 10 | 5 | 50% (24 to 76) |" in table
    assert "have a p of 0.0079 at least, 3 such comparisons of 0.024 by Holm" in table


def test_few_events_are_said_to_say_nothing(tmp_path):
    table = as_table(results_of(tmp_path, lambda arm, seed: 60 if seed == 1 else None))
    assert "4 of 20 runs had it: that says nothing about warnings" in table
    assert "| measure | warning |" not in table


def test_what_announces_it(tmp_path):
    """Chosen with seeds 0, 2, 4 and judged by 1, 3, of as many arms as it takes."""
    arms = {f"a{i}": {"grpo.optim.lr": 1e-4 * (i + 1)} for i in range(6)}
    changed = {"arms": arms, "baseline": "a0"}
    study = {key: value for key, value in TABLE.items() if key != "axes"} | changed
    made = study_of("when", study)
    chains = make_cells(made, tmp_path)
    for (arm, seed), chain in chains.items():
        write_run(tmp_path / chain["grpo"].name, 70 + seed if arm > "a2" else None)
    results = collect(made, chains, Pool(tmp_path, 1, print))
    found = results.event.table["announced"]
    assert list(found) == ["entropy", "alarm/kl"]
    assert found["entropy"]["warning"].startswith("below 0.")
    assert (
        found["entropy"]["hits"].mean == 1
        and found["entropy"]["false_alarms"].mean == 0
    )
    assert 25 < found["entropy"]["lead"] < 40
    assert found["alarm/kl"]["hits"].mean == 0  # two steps after the fall
    table = as_table(results)
    assert "do best with the seeds 0, 2, 4; the other seeds judge" in table
    row = next(line for line in table.splitlines() if line.startswith("| entropy |"))
    assert "| 100% (61 to 100) | 0% (0 to 39) |" in row and row.endswith("| 6 |")


def test_the_picture_has_a_panel_for_each_axis(tmp_path):
    results = results_of(tmp_path / "cells", high_falls)
    drawn = figures.survival_curves(results.event)
    assert [axes.get_title("left") for axes in drawn.axes] == ["rate", "beta"]
    labels = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    assert labels == ["low (0 of 10)", "high (10 of 10)"]
    low, high = (
        line
        for line in drawn.axes[0].lines
        if len(line.get_xdata()) > 1 and line.get_label()[0] != "_"
    )
    assert (
        low.get_linestyle() != high.get_linestyle()
        and low.get_marker() != high.get_marker()
    )
    assert low.get_ydata()[-1] == 1 and high.get_ydata()[-1] == 0
    (tmp_path / "out").mkdir()
    written = {
        path.name
        for path in figures.draw(results, tmp_path / "cells", tmp_path / "out")
    }
    assert {f"grpo.collapse-survival.{form}" for form in ("png", "svg")} <= written


def test_many_arms_leave_room_for_their_curves(tmp_path):
    arms = {f"arm-{n}": {"grpo.optim.lr": 1e-4 * (n + 1)} for n in range(12)}
    table = {name: value for name, value in TABLE.items() if name != "axes"}
    study = study_of("when", {**table, "arms": arms, "baseline": "arm-0"})
    chains = make_cells(study, tmp_path)
    for (_, seed), chain in chains.items():
        write_run(tmp_path / chain["grpo"].name, 40 + seed)
    results = collect(study, chains, Pool(tmp_path, 1, print))
    curves = dict(figures.curves(results, "grpo.kl", tmp_path))
    for figure in (
        figures.survival_curves(results.event),
        figures.lines(curves, "grpo.kl"),
    ):
        figure.canvas.draw()
        (axes,) = figure.axes
        assert not axes.collections  # no bands
        frame = axes.get_window_extent()
        assert frame.height > figure.bbox.height / 2
        assert axes.get_legend().get_window_extent().x0 >= frame.x1


def test_nothing_is_done_yet(tmp_path):
    study = study_of("when", TABLE)
    results = collect(study, make_cells(study, tmp_path), Pool(tmp_path, 1, print))
    assert json.loads(as_json(results))["event"] == {}
    assert "began that lasted" not in as_table(results)


def test_cells_that_are_missing_are_left_out(tmp_path):
    results = results_of(tmp_path, high_falls)
    for (arm, seed), chain in results.chains.items():
        if arm == "low_beta=0" or (arm == "high_beta=0" and seed > 1):
            (tmp_path / chain["grpo"].name / "cell.json").unlink()
    again = collect(
        results.study, results.chains, Pool(tmp_path, 1, print)
    ).event.table["axes"]
    arms = again["arm"]
    assert "low_beta=0" not in arms and arms["high_beta=0"]["runs"] == 2
    assert arms["high_beta=0"]["p"] == pytest.approx(1 / 21)
    assert again["rate"]["high"]["p"] == pytest.approx(2 / 252)


def test_what_a_run_does_not_log_is_found_with_its_first_cell(tmp_path):
    study = study_of(
        "when", {**TABLE, "event": {**TABLE["event"], "announce": ["entropie"]}}
    )
    cell = next(iter(in_order(make_cells(study, tmp_path)).values()))
    write_run(tmp_path / cell.name, None)
    with pytest.raises(
        ValueError, match="no metric 'entropie' in .*did you mean entropy"
    ):
        event.check(study, cell, tmp_path)
