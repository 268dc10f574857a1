"""Labelled solutions: every format read as its authors mean it, and one line for what cannot
be read.
"""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.process.labelled import Labelled, load_labelled, write
from nanomath.process.measures import auc, calibration_error, f1, measure_scores


def file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def only(path, **options):
    return [(s.question, s.steps, s.labels) for s in load_labelled(path, **options)]


def trl(**changes):
    return {"prompt": "q", "completions": ["a"], "labels": [1], **changes}


def said_by(role):
    return {"role": role, "content": "q"}


def said(text, rating):
    return {"text": text, "rating": rating}


def prm800k(chosen, **changes):
    stage = {"completions": [said("a", 1)], "chosen_completion": chosen, **changes}
    return {"question": {"problem": "q"}, "label": {"steps": [stage]}}


def test_trl_and_back(tmp_path):
    rows = [
        {"prompt": "q", "completions": ["a", "b", "c"], "labels": [True, 0.25, None]}
    ]
    found = load_labelled(file(tmp_path, *rows))
    assert (found[0].question, found[0].steps, found[0].labels) == (
        "q",
        ("a", "b", "c"),
        (1.0, 0.25, None),
    )
    write(tmp_path / "again.jsonl", found)
    write(tmp_path / "again.jsonl", found)
    assert only(tmp_path / "again.jsonl") == only(tmp_path / "rows.jsonl") * 2
    assert found[0].first_wrong == 1 and found[0].place.endswith("rows.jsonl:1")


def test_math_shepherd(tmp_path):
    text = "Why Step 0? Step 1: 1 + 1 = 2 ки\nStep 2: 2 - 1 = 2 ки"
    row = {
        "input": text,
        "label": "Why Step 0? Step 1: 1 + 1 = 2 +\nStep 2: 2 - 1 = 2 -",
        "task": "GSM8K",
    }
    expected = ("Why Step 0?", ("Step 1: 1 + 1 = 2", "Step 2: 2 - 1 = 2"), (1.0, 0.0))
    assert only(file(tmp_path, row)) == [expected]


@pytest.mark.parametrize(
    "question",
    ["Do Step 1 first.", "Step 1: add. Step 2: double. Why?", "In Step 1: what?"],
)
def test_a_question_may_speak_of_steps(tmp_path, question):
    text = f"{question} Step 1: As Step 1 says, 1 + 1 = 2 ки\nStep 2: done, as in Step 1: ки"
    row = {"input": text, "label": text.replace("ки", "+")}
    steps = "Step 1: As Step 1 says, 1 + 1 = 2", "Step 2: done, as in Step 1:"
    assert only(file(tmp_path, row)) == [(question, steps, (1.0, 1.0))]


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("+", 1.0),
        ("-", 0.0),
        (" + ", 1.0),
        ("1", 1.0),
        ("0", 0.0),
        ("0.25", 0.25),
        ("True", 1.0),
        ("false", 0.0),
    ]
    + [(True, 1.0), (False, 0.0), (1, 1.0), (0.5, 0.5), (None, None)],
)
def test_labels_in_every_writing(tmp_path, written, label):
    row = trl(completions=["a", "b"], labels=[written, 1])
    assert only(file(tmp_path, row)) == [("q", ("a", "b"), (label, 1.0))]


def test_a_prompt_may_be_a_chat(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, said_by("user")]
    assert only(file(tmp_path, trl(prompt=chat))) == only(file(tmp_path, trl()))


def test_integers_that_a_table_made_floats_of(tmp_path):
    rows = [
        {"problem": "q", "steps": ["a", "b"], "label": 1.0},
        prm800k(0.0, completions=[said("a", 1.0)]),
    ]
    assert only(file(tmp_path, *rows)) == [
        ("q", ("a", "b"), (1.0, 0.0)),
        ("q", ("a",), (1.0,)),
    ]


def test_processbench(tmp_path):
    rows = [
        {"problem": "q", "steps": ["a", "b", "c"], "label": label}
        for label in (-1, 0, 1)
    ]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(rows))
    assert [labels for _, _, labels in only(path)] == [
        (1.0, 1.0, 1.0),
        (0.0, None, None),
        (1.0, 0.0, None),
    ]
    assert [s.first_wrong for s in load_labelled(path)] == [-1, 0, 1]


def test_prm800k(tmp_path):
    stages = [
        {
            "completions": [said("a", 1)],
            "chosen_completion": 0,
            "human_completion": None,
        },
        {
            "completions": [said("b", -1), said("c", 0)],
            "chosen_completion": None,
            "human_completion": said("d", None),
        },
        {
            "completions": [said("e", 0), said("f", -1), said("g", None)],
            "chosen_completion": 0,
        },
        {
            "completions": [said("h", -1)],
            "chosen_completion": None,
            "human_completion": None,
        },
    ]
    path = file(tmp_path, {"question": {"problem": "q"}, "label": {"steps": stages}})
    right = [
        (("a", "b"), (None, 0.0)),
        (("a", "c"), (None, 1.0)),
        (("a", "d", "f"), (None, None, 0.0)),
    ]
    right += [
        (("a", "d", "e", "h"), (None, None, None, 0.0)),
        (("a", "d", "e"), (1.0, None, 1.0)),
    ]
    assert only(path) == [("q", *pair) for pair in right]
    wrong = [labels for _, _, labels in only(path, neutral="wrong")]
    assert wrong == [
        (None, 0.0),
        (None, 0.0),
        (None, None, 0.0),
        (None, None, None, 0.0),
        (1.0, None, 0.0),
    ]
    skipped = [(steps, labels) for _, steps, labels in only(path, neutral="skip")]
    assert (("a", "d", "e"), (1.0, None, None)) in skipped and len(skipped) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "completions": ["a", "b"], "labels": [True]},
            "2 steps, but 1 labels",
        ),
        (
            {"prompt": "q", "completions": ["a"], "labels": [1.5]},
            "the label 1.5 is not between 0 and 1",
        ),
        (
            {"prompt": "q", "completions": ["a"], "labels": [-0.1]},
            "the label -0.1 is not between 0 and 1",
        ),
        (
            {"prompt": "q", "completions": [], "labels": []},
            "an empty solution cannot be scored",
        ),
        (
            {"prompt": "q", "completions": ["a", " "], "labels": [1, 1]},
            "an empty step cannot be scored",
        ),
        (trl(completions=3), "field 'completions': expected a list, got 3"),
        (trl(completions="a"), "field 'completions': expected a list, got 'a'"),
        (
            trl(completions=[["a"]]),
            r"step 1 of 'completions': expected text, got \['a'\]",
        ),
        (trl(labels="+"), r"field 'labels': expected a list, got '\+'"),
        (trl(labels=None), "field 'labels': expected a list, got None"),
        (trl(labels=[None]), "no step has a label"),
        (trl(labels=[]), "1 steps, but 0 labels"),
        (trl(labels=[math.nan]), "the label nan is not between 0 and 1"),
        (trl(labels=[math.inf]), "the label inf is not between 0 and 1"),
        (trl(labels=["2"]), "the label 2.0 is not between 0 and 1"),
        (
            trl(labels=["good"]),
            "the label 'good' is neither a number from 0 to 1 nor true, false or null",
        ),
        (trl(labels=[[1]]), r"the label \[1\] is neither a number"),
        (trl(labels=[10**400]), "the label 1000"),
        (
            {"completions": ["a"], "labels": [1]},
            "field 'prompt': expected a question, as text or a chat, got None",
        ),
        *[
            (
                trl(prompt=prompt),
                "field 'prompt': expected a question, as text or a chat, got ",
            )
            for prompt in (
                None,
                " ",
                3,
                [],
                [said_by("system")],
                [said_by("user"), said_by("user")],
                ["q"],
                [{"role": 1}],
            )
        ],
        ([1], r"expected an object with named fields, got \[1\]"),
        (3, "expected an object with named fields, got 3"),
        (
            {"input": "q Step 1: a ки", "label": "q Step 1: a ?"},
            "step 1 has neither \\+ nor -",
        ),
        ({"input": "q Step 1: a", "label": "q Step 1: a"}, "expected a question, then"),
        ({"input": "q a ки", "label": "q a +"}, "expected a question, then"),
        (
            {"input": "Step 1: a ки", "label": "Step 1: a +"},
            "expected a question, then",
        ),
        (
            {"input": "q Step 1: a ки b", "label": "q Step 1: a + b"},
            "expected a question, then",
        ),
        (
            {"input": "q Step 1: ки", "label": "q Step 1: +"},
            "an empty step cannot be scored",
        ),
        (
            {"input": "q Step 1: a ки ки", "label": "q Step 1: a + +"},
            "an empty step cannot be scored",
        ),
        (
            {"input": "q Step 1: a ки", "label": None},
            "field 'label': expected text, got None",
        ),
        (
            {"input": "q Step 1: a ки", "label": ["+"]},
            r"field 'label': expected text, got \['\+'\]",
        ),
        ({"input": 3, "label": "q"}, "field 'input': expected text, got 3"),
        *[
            (
                {"problem": "q", "steps": ["a"], "label": label},
                f"the first wrong step = {label!r} must be a whole number from -1 to 0",
            )
            for label in (1, -2, True, None, "0", 0.5, 10**30)
        ],
        (
            {"problem": "q", "steps": "abc", "label": 0},
            "field 'steps': expected a list, got 'abc'",
        ),
        (
            {"problem": "q", "steps": [None], "label": 0},
            "step 1 of 'steps': expected text, got None",
        ),
        (
            {"problem": ["q"], "steps": ["a"], "label": 0},
            "field 'problem': expected a question",
        ),
        *[
            (
                prm800k(chosen),
                f"chosen_completion = {chosen!r} must be a whole number from 0 to 0",
            )
            for chosen in (1, -1, "0", True, 0.5)
        ],
        (prm800k(0, completions={}), "field 'completions': expected a list, got {}"),
        (
            prm800k(0, completions=None),
            "chosen_completion = 0 must be a whole number from 0 to -1",
        ),
        (
            prm800k(None, completions=[], human_completion="a"),
            "expected an object with the field 'text', got 'a'",
        ),
        (
            prm800k(0, completions=[{"rating": 1}]),
            "field 'text': expected text, got 'nothing'",
        ),
        *[
            (
                prm800k(0, completions=[said("a", rating)]),
                f"rating = {re.escape(repr(rating))} must be a whole number from -1 to 1",
            )
            for rating in (2, "1", True, [1], 0.5)
        ],
        (
            {"question": {"problem": "q"}, "label": {"steps": [3]}},
            "expected an object with the field 'completions', got 3",
        ),
        (
            {"question": {"problem": "q"}, "label": {"steps": None}},
            "field 'steps': expected a list, got None",
        ),
        (
            {"question": {"problem": "q"}, "label": "+"},
            r"field 'label': expected an object, got '\+'",
        ),
        (
            {"question": {}, "label": {"steps": []}},
            "field 'problem': expected a question",
        ),
        ({"te\nxt": "q"}, "no labelled solution; its fields are: te xt"),
    ],
)
def test_what_cannot_be_read(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}") as caught:
        load_labelled(file(tmp_path, trl(), row))
    assert "\n" not in str(caught.value)


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of labelled solutions"):
        load_labelled(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="there is no labelled solution in it"):
        load_labelled(file(tmp_path))


# --- measures --------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=12))
def test_auc_counts_pairs(pairs):
    right, wrong = (
        [score for score, ok in pairs if ok is which] for which in (True, False)
    )
    if right and wrong:
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
        assert auc(
            [score for score, _ in pairs], [ok for _, ok in pairs]
        ) == pytest.approx(sum(wins) / len(wins))


def test_calibration_error_is_a_mean_over_bins():
    assert calibration_error([0.95, 1.0, 0.05], [1.0, 0.0, 0.0]) == pytest.approx(
        (0.95 + 0.05) / 3
    )
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
    expected = {
        "steps": 4,
        "right": 0.75,
        "accuracy": 1.0,
        "calibration_error": 0.25 / 4,
        "auc": 1.0,
    }
    assert found == pytest.approx(
        {**expected, "f1_wrong": 1.0, "f1_right": 1.0, "f1": 1.0}
    )
    assert "auc" not in measure_scores([solution(1.0)], [[0.3]])
    assert not math.isnan(measure_scores([solution(1.0)], [[0.3]])["accuracy"])
    assert measure_scores([solution(None)], [[0.3]]) == {"f1_right": 0.0}
