"""Labelled solutions: every format read as its authors mean it, and one line for what cannot be read."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.process.labelled import Labelled, load_labelled, write
from nanomath.process.measures import auc, calibration_error, f1, measure_scores


def file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def only(path, **options):
    return [(s.question, s.steps, s.labels) for s in load_labelled(path, **options)]


def test_trl_and_back(tmp_path):
    rows = [{"prompt": "q", "completions": ["a", "b", "c"], "labels": [True, 0.25, None]}]
    found = load_labelled(file(tmp_path, *rows))
    assert (found[0].question, found[0].steps, found[0].labels) == ("q", ("a", "b", "c"), (1.0, 0.25, None))
    write(tmp_path / "again.jsonl", found)
    write(tmp_path / "again.jsonl", found)
    assert only(tmp_path / "again.jsonl") == only(tmp_path / "rows.jsonl") * 2
    assert found[0].first_wrong == 1 and found[0].place.endswith("rows.jsonl:1")


def test_math_shepherd(tmp_path):
    text = "Why Step 0? Step 1: 1 + 1 = 2 ки\nStep 2: 2 - 1 = 2 ки"
    row = {"input": text, "label": "Why Step 0? Step 1: 1 + 1 = 2 +\nStep 2: 2 - 1 = 2 -", "task": "GSM8K"}
    expected = ("Why Step 0?", ("Step 1: 1 + 1 = 2", "Step 2: 2 - 1 = 2"), (1.0, 0.0))
    assert only(file(tmp_path, row)) == [expected]


def test_processbench(tmp_path):
    rows = [{"problem": "q", "steps": ["a", "b", "c"], "label": label} for label in (-1, 0, 1)]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(rows))
    assert [labels for _, _, labels in only(path)] == [(1.0, 1.0, 1.0), (0.0, None, None), (1.0, 0.0, None)]
    assert [s.first_wrong for s in load_labelled(path)] == [-1, 0, 1]


def said(text, rating):
    return {"text": text, "rating": rating}


def test_prm800k(tmp_path):
    stages = [
        {"completions": [said("a", 1)], "chosen_completion": 0, "human_completion": None},
        {"completions": [said("b", -1), said("c", 0)], "chosen_completion": None, "human_completion": said("d", None)},
        {"completions": [said("e", 0), said("f", -1), said("g", None)], "chosen_completion": 0},
        {"completions": [said("h", -1)], "chosen_completion": None, "human_completion": None},
    ]
    path = file(tmp_path, {"question": {"problem": "q"}, "label": {"steps": stages}})
    right = [(("a", "b"), (None, 0.0)), (("a", "c"), (None, 1.0)), (("a", "d", "f"), (None, None, 0.0))]
    right += [(("a", "d", "e", "h"), (None, None, None, 0.0)), (("a", "d", "e"), (1.0, None, 1.0))]
    assert only(path) == [("q", *pair) for pair in right]
    wrong = [labels for _, _, labels in only(path, neutral="wrong")]
    assert wrong == [(None, 0.0), (None, 0.0), (None, None, 0.0), (None, None, None, 0.0), (1.0, None, 0.0)]
    skipped = [(steps, labels) for _, steps, labels in only(path, neutral="skip")]
    assert (("a", "d", "e"), (1.0, None, None)) in skipped and len(skipped) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True]}, "2 steps, but 1 labels"),
        ({"prompt": "q", "completions": ["a"], "labels": [1.5]}, "the label 1.5 is not between 0 and 1"),
        ({"prompt": "q", "completions": ["a"], "labels": [-0.1]}, "the label -0.1 is not between 0 and 1"),
        ({"prompt": "q", "completions": [], "labels": []}, "an empty solution cannot be scored"),
        ({"prompt": "q", "completions": ["a", " "], "labels": [1, 1]}, "an empty step cannot be scored"),
        ({"prompt": "q", "completions": 3, "labels": [1]}, "not a labelled solution: TypeError"),
        ({"completions": ["a"], "labels": [1]}, "not a labelled solution: KeyError 'prompt'"),
        ({"input": "q Step 1: a ки", "label": "q Step 1: a ?"}, "step 1 has neither \\+ nor -"),
        ({"input": "q Step 1: a", "label": "q Step 1: a"}, "expected a question, then"),
        ({"input": "q a ки", "label": "q a +"}, "expected a question, then"),
        ({"problem": "q", "steps": ["a"], "label": 1}, "the first wrong step is 1, of 1 steps"),
        ({"text": "q"}, "no labelled solution; its fields are: text"),
    ],
)
def test_what_cannot_be_read(tmp_path, row, message):
    good = {"prompt": "q", "completions": ["a"], "labels": [1]}
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}"):
        load_labelled(file(tmp_path, good, row))


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of labelled solutions"):
        load_labelled(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="there is no labelled solution in it"):
        load_labelled(file(tmp_path))


# --- measures --------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=12))
def test_auc_counts_pairs(pairs):
    right, wrong = ([score for score, ok in pairs if ok is which] for which in (True, False))
    if right and wrong:
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
        assert auc([score for score, _ in pairs], [ok for _, ok in pairs]) == pytest.approx(sum(wins) / len(wins))


def test_calibration_error_is_a_mean_over_bins():
    assert calibration_error([0.95, 1.0, 0.05], [1.0, 0.0, 0.0]) == pytest.approx((0.95 + 0.05) / 3)
    assert calibration_error([0.5] * 4, [1, 1, 0, 0]) == 0


def solution(*labels):
    return Labelled("q", ("a",) * len(labels), labels)


def test_f1_is_a_harmonic_mean():
    solutions = [solution(1, 0, None), solution(1, 1), solution(0, 0), solution(1, 1)]
    scores = [[0.9, 0.4, 0.9], [0.9, 0.5], [0.6, 0.1], [0.2, 0.9]]
    assert f1(solutions, scores) == {"f1_wrong": 0.5, "f1_right": 0.5, "f1": 0.5}
    always_right = [[1.0] * len(s.steps) for s in solutions]
    assert f1(solutions, always_right) == {"f1_wrong": 0.0, "f1_right": 1.0, "f1": 0.0}
    assert f1([solution(0, 0)], [[0.9, 0.1]]) == {"f1_wrong": 0.0}
    assert f1(solutions, [[0.0] * len(s.steps) for s in solutions])["f1_right"] == 0.0


def test_measures_of_a_perfect_scorer_and_of_none():
    solutions = [solution(1.0, 0.0, None), solution(0.75, 1.0)]
    found = measure_scores(solutions, [[1.0, 0.0, 0.3], [1.0, 1.0]])
    expected = {"steps": 4, "right": 0.75, "accuracy": 1.0, "calibration_error": 0.25 / 4, "auc": 1.0}
    assert found == pytest.approx({**expected, "f1_wrong": 1.0, "f1_right": 1.0, "f1": 1.0})
    assert "auc" not in measure_scores([solution(1.0)], [[0.3]])
    assert not math.isnan(measure_scores([solution(1.0)], [[0.3]])["accuracy"])
    assert measure_scores([solution(None)], [[0.3]]) == {"f1_right": 0.0}
