"""What goes into the page: columns, curves, the episodes that are chosen, the pairs."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re

import numpy as np
import pytest
from made_run import answers, drift_found, episode, write_run

from nanomath.__main__ import main
from nanomath.analysis import report as page
from nanomath.analysis.runs import read_run

pytest.importorskip("plotly")


def bulk_of(html: str) -> dict:
    text = re.search(r'id="bulk">([^<]*)<', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_columns_hold_what_was_logged(tmp_path):
    rows = [episode(1, 0, k, text="ab"[k]) for k in (0, 1)]
    rows[0] |= {"advantages": 0.5, "logprobs": [-1.0], "gap": -0.25, "kl": [0.75]}
    rows[0] |= {"entropy": [3.0], "ratio": [1.5], "clipped": [1]}
    del rows[1]["gap"], rows[1]["kl"], rows[1]["entropy"]
    run = read_run(write_run(tmp_path / "a", rollouts=rows))
    shown = page.episodes(run, run.rollouts)
    column = {
        name: [math.nan if n is None else n / 1000 for n in whole]
        for name, whole in shown["columns"].items()
    }
    assert [shown["pieces"][i] for e in shown["episodes"] for i in e["tokens"]] == [
        "a",
        "b",
    ]
    assert column["gap"] == pytest.approx([-0.25, math.nan], nan_ok=True)
    assert column["kl"] == pytest.approx([0.75, math.nan], nan_ok=True)
    assert column["entropy"] == pytest.approx([3.0, math.nan], nan_ok=True)
    assert column["ratio"] == [1.5, 1.0] and column["clipped"] == [0.001 * 1000, 0.0]
    assert column["advantages"] == [0.5, -1.0]


def test_thousandths_are_whole():
    extremes = [0.0004, -0.0126, 1e12, -math.inf, math.nan]
    assert page.thousandths(extremes) == [0, -13, 10**9, -(10**9), None]


def test_a_long_curve_keeps_its_extremes():
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_001)
    values[4321] = 99.0
    steps, kept = page.thinned(range(10_001), values.tolist())
    assert len(steps) <= page.POINTS and steps == sorted(steps)
    assert 99.0 in kept and min(kept) == values.min()
    assert page.thinned([1, 2], [0.5, 0.25]) == [[1, 2], [0.5, 0.25]]


def test_of_a_long_run_some_steps_are_chosen(tmp_path):
    rows = [episode(step, 0, k) for step in range(1, 41) for k in (0, 1)]
    rows[31]["rewards"] = {"accuracy": 0.0, "total": -9.0}  # step 16
    run = read_run(write_run(tmp_path / "a", rollouts=rows))
    assert page.chosen_episodes(run, []) == run.rollouts
    budget = sum(len(r["tokens"]) for r in rows) // 4
    chosen = {record["step"] for record in page.chosen_episodes(run, [], budget)}
    assert {1, 16, 40} <= chosen and len(chosen) <= 14


def test_six_rollouts_by_rule(tmp_path):
    rows = [episode(step, 0, k) for step in (1, 2) for k in range(4)]
    rows[1]["rewards"] = {"accuracy": 0.0, "total": -1.0}
    rows[2]["advantages"] = [-7.0] * len(rows[2]["tokens"])
    rows[5]["finish_reason"] = "length"
    rows[6]["ratio"] = [0.1] * len(rows[6]["tokens"])
    rows[3]["tokens"] = rows[3]["tokens"] * 2
    found = {p["rule"]: (p["step"], p["sample"]) for p in page.picks(rows)}
    assert found == {
        "highest reward": (1, 0),
        "lowest reward": (1, 1),
        "largest advantage": (1, 2),
        "longest": (1, 3),
        "first cut at the limit": (2, 1),
        "largest ratio": (2, 2),
    }
    assert page.picks([]) == []


def test_groups_and_layers_are_matrices(tmp_path):
    groups = [
        {"step": 1, "problems": ["a", "b", "c"], "right": [0, 2, 2], "samples": 2},
        {"step": 2, "problems": ["a"], "right": [1], "samples": 2},
    ]
    metrics = [
        {
            "step": n,
            "update_ratio": 0.1,
            "update_ratio/layers.0": n,
            "update_ratio/norm": 2 * n,
        }
        for n in (1, 2)
    ]
    run = read_run(write_run(tmp_path / "a", groups=groups, metrics=metrics))
    assert page.group_counts(run)["counts"] == [[1, 0], [0, 1], [2, 0]]
    assert page.layers(run) == {
        "update_ratio": {
            "parts": ["layers.0", "norm"],
            "steps": [1, 2],
            "values": [[1, 2], [2, 4]],
        }
    }
    assert list(page.curves(run)) == ["update_ratio"]


def test_kinds_of_problems(tmp_path):
    measured = answers(0, [True, False, False, False]) + answers(
        5, [True, True, True, False]
    )
    rows = page.breakdown(read_run(write_run(tmp_path / "a", heldout=measured)))
    assert [
        (r["label"], r["problems"], r["before"], r["after"].mean) for r in rows
    ] == [
        ("difficulty = 1", 2, 0.5, 1.0),
        ("difficulty = 2", 2, 0.0, 0.5),
    ]


def test_every_name_on_the_metrics_page_explains_itself():
    docs = page.metric_docs()

    def section(name: str) -> list[str]:
        return [doc["what"] for doc in docs if re.search(doc["pattern"], name)]

    assert section("heldout/pass@16") == section("heldout/pass@4") != []
    assert len(section("heldout/pass@1/difficulty=3")) == len(section("kl")) == 1
    assert section("update_ratio/layers.11") and section("reward/format")
    assert not section("unheard of")


def test_the_command(tmp_path, capsys):
    run = write_run(
        tmp_path / "a", metrics=[{"step": 1, "kl": 0.5}], rollouts=[episode()]
    )
    empty = write_run(tmp_path / "empty")
    assert main(["report", str(run)]) == 0
    assert bulk_of((run / "report.html").read_text("utf-8"))["runs"][0]["name"] == "a"
    assert main(["report", str(run), str(empty), f"out={tmp_path}/two.html"]) == 0
    assert len(bulk_of((tmp_path / "two.html").read_text("utf-8"))["runs"]) == 2
    assert "two.html: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="report needs a run directory"):
        main(["report"])
    with pytest.raises(FileNotFoundError, match="out: there is no directory"):
        main(["report", str(run), "out=/no/where.html"])


def test_without_plotly_one_line(monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need plotly: pip install plotly"):
        page.plotly_script()


@pytest.mark.slow
def test_a_long_run_stays_below_six_megabytes(tmp_path):
    """2,000 episodes of 200 tokens, no two numbers alike."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(2000):
        row = episode(1 + number // 16, number // 8 % 2, number % 8)
        n = 200
        row["tokens"] = rng.integers(0, 300, n).tolist()
        logprobs = np.round(-rng.exponential(0.5, n), 4)
        row["logprobs"] = logprobs.tolist()
        row["gap"] = np.round(rng.normal(0, 0.005, n), 4).tolist()
        row["kl"] = np.round(rng.normal(0, 0.05, n), 4).tolist()
        row["entropy"] = np.round(rng.exponential(0.5, n), 4).tolist()
        row["advantages"] = [float(np.round(rng.normal(), 4))] * n
        rows.append(row)
    run = write_run(tmp_path / "a", rollouts=rows, metrics=[{"step": 1, "kl": 0.5}])
    main(["report", str(run)])
    assert (run / "report.html").stat().st_size < 6e6


def test_a_drift_is_shown_where_there_is_one(tmp_path):
    directory = write_run(tmp_path / "a")
    assert 'id="drift"' not in page.report([read_run(directory)])
    (directory / "drift.json").write_text(json.dumps(drift_found()), "utf-8")
    html = page.report([read_run(directory)])
    assert html.count('id="drift"') == html.count('href="#drift"') == 1
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.partition('id="drift"')[2]))
    for words in (
        "how far runs/after is from runs/before",
        "Not measured: weights: the shapes differ.",
        "k1 0.125 0.0625 to 0.25",
        "cka 0.75 0.875",
        "k1 an estimate",
        "logical 100%, content 0%",
        "␣so logical 3 2 6",
        "embedding 3 0.5",
        "0.750000",
        "q_proj 1,024 0.01 50.0% 2.5",
    ):
        assert words in text, words


def test_a_drift_of_one_kind_of_measure_is_shown(tmp_path):
    directory = write_run(tmp_path / "a")
    found = drift_found()
    del found["moved"], found["weights"], found["groups"]["all"]["layers"]
    (directory / "drift.json").write_text(json.dumps(found), "utf-8")
    html = page.report([read_run(directory)])
    assert "k1" in html and "The weights" not in html and "moved most" not in html


@pytest.mark.parametrize("text", ["[]", "{", '{"groups": {}}'])
def test_a_drift_that_is_none_is_refused(tmp_path, text):
    directory = write_run(tmp_path / "a")
    (directory / "drift.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"drift\.json"):
        page.report([read_run(directory)])
