"""The transferability index: the paper's table, brute force, intervals, and files that cannot be
compared.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from nanomath.analysis.transfer import (
    GROUPS,
    PAPER_SIGMA,
    Task,
    compare_transfer,
    estimate,
    gains,
    pooled_sigma,
    read_evaluation,
    resampled,
    table,
    transfer_index,
)

# Huan et al., arXiv 2507.00432, Table 1 (Qwen3-14B-Base): AIME24 AIME25 MATH500 Olympiad |
# GPQA LCB2 ACPBench HeadQA | CoQA MC-TACO IFEval HaluEval.
BASE = [[13.0, 9.3, 60.4, 27.9], [42.6, 29.7, 10.7, 37.6], [10.0, 67.7, 69.2, 35.7]]
TUNED = {
    "SFT think": [
        [52.0, 37.0, 85.0, 25.0],
        [55.9, 21.9, 68.6, 34.8],
        [1.7, 38.2, 42.3, 2.3],
    ],
    "SFT no-think": [
        [16.0, 13.0, 77.2, 22.7],
        [48.7, 23.5, 69.3, 35.0],
        [5.3, 66.1, 41.4, 3.3],
    ],
    "RL": [
        [55.7, 38.0, 87.8, 33.8],
        [57.7, 40.6, 65.4, 40.2],
        [28.2, 74.0, 70.0, 40.7],
    ],
}
base = {group: np.array(row) for group, row in zip(GROUPS, BASE, strict=True)}
tuned = {
    group: np.array([rows[i] for rows in TUNED.values()])
    for i, group in enumerate(GROUPS)
}


@pytest.mark.parametrize(
    ("sigma", "other", "non"),
    [
        (PAPER_SIGMA, [52.2, 165.4, 82.3], [-104.1, -278.9, 52.2]),
        (dict.fromkeys(GROUPS, 1.0), [55.7, 176.2, 87.7], [-117.5, -315.0, 59.0]),
    ],
    ids=["as published", "sigma 1"],
)
def test_the_papers_table(sigma, other, non):
    index = transfer_index(base, tuned, sigma)
    # the scores and the constants have three and four digits
    assert index["other_reasoning"] == pytest.approx(other, abs=0.15)
    assert index["non_reasoning"] == pytest.approx(non, abs=0.15)


def test_gains_are_the_formula():
    expected = []
    for scores in tuned["maths"]:
        missing = [100 - b for b in base["maths"]]
        total = 0.0
        for b, t, m in zip(base["maths"], scores, missing, strict=True):
            total += (
                m / sum(missing) * math.copysign(math.sqrt(abs(t - b) / 4.0), t - b)
            )
        expected.append(total)
    assert gains(base["maths"], tuned["maths"], 4.0) == pytest.approx(expected)


def test_sigma_is_pooled_over_models_and_tasks():
    changes = [
        t - b for row in tuned["maths"] for b, t in zip(base["maths"], row, strict=True)
    ]
    assert pooled_sigma(base["maths"], tuned["maths"]) == pytest.approx(np.std(changes))


# --- evaluations -----------------------------------------------------------------------------


def evaluation(
    maths: float,
    other: float,
    non: float,
    n: int = 400,
    protocol: str = "asked plainly",
) -> dict[str, Task]:
    """Tasks in which so large a share of the problems is right, the first ones."""
    return {
        name: Task(
            group,
            protocol,
            [f"{name}-{i}" for i in range(n)],
            100.0 * (np.arange(n) < round(share * n)),
        )
        for name, group, share in zip(
            ("sums", "puzzles", "facts"), GROUPS, (maths, other, non), strict=True
        )
    }


def test_changes_and_index_with_their_intervals():
    files = {"base": evaluation(0.2, 0.5, 0.5), "a": evaluation(0.6, 0.6, 0.4)}
    report = compare_transfer(files, {}, "paper")
    found = report["models"]["a"]
    assert [found["groups"][g]["mean"] for g in GROUPS] == pytest.approx([40, 10, -10])
    one, paper = found["index"]["one"], found["index"]["paper"]
    assert one["other_reasoning"]["mean"] == pytest.approx(100 * math.sqrt(10 / 40))
    assert one["non_reasoning"]["mean"] == pytest.approx(-100 * math.sqrt(10 / 40))
    for group in GROUPS[1:]:
        ratio = paper[group]["mean"] / one[group]["mean"]
        assert ratio == pytest.approx(1 / math.sqrt(PAPER_SIGMA[group]))
        assert one[group]["low"] < one[group]["mean"] < one[group]["high"]
    # 10% of 400 problems changed, all in one direction: the paired standard error is 1.5 points
    low, high = (found["groups"]["other_reasoning"][key] for key in ("low", "high"))
    assert (low, high) == (pytest.approx(7.1, abs=0.4), pytest.approx(13.0, abs=0.4))


def test_intervals_are_paired():
    """The same problems are drawn for both: without pairs the interval would be 13.9 wide."""
    rows = resampled(
        [100.0 * (np.arange(400) < 200), 100.0 * (np.arange(400) < 208)], [0]
    )
    difference = estimate(rows[:, 1] - rows[:, 0])
    assert difference["mean"] == 2 and difference["high"] - difference["low"] < 3


@pytest.mark.slow
def test_intervals_hold_what_they_promise():
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        before = 100.0 * (generator.random(150) < 0.4)
        # Truly 18 points more
        after = np.where(generator.random(150) < 0.3, 100.0, before)
        rows = resampled([before, after], [trial])
        found = estimate(rows[:, 1] - rows[:, 0])
        held += found["low"] <= 18 <= found["high"]
    assert 180 <= held <= 200


@pytest.mark.parametrize(
    ("maths", "says"),
    [(0.5, "is within noise"), (0.505, "is within noise"), (0.3, "is a loss")],
)
def test_without_a_gain_in_maths_there_is_no_index(maths, says):
    files = {"base": evaluation(0.5, 0.5, 0.5), "a": evaluation(maths, 0.6, 0.4)}
    # noise in maths: as many problems are lost as won
    flipped = files["a"]["sums"].values
    flipped[:40], flipped[-40:] = 0, 100
    report = compare_transfer(files, {})
    found = report["models"]["a"]
    assert found["index"]["one"] == dict.fromkeys(GROUPS[1:])
    assert says in found["undefined"] and found["undefined"] in table(report)
    assert found["groups"]["other_reasoning"]["mean"] == pytest.approx(10)


def test_a_plain_gain_without_an_index_tells_the_gain_that_is_divided_by():
    """One task gains much and one loses little: the roots of their changes nearly cancel."""
    files = {"base": evaluation(0.5, 0.5, 0.5), "a": evaluation(0.6, 0.6, 0.4)}
    for name, score in (("base", 0.5), ("a", 0.42)):
        lost = evaluation(score, 0, 0)["sums"]
        files[name] = {**files[name], "more_sums": lost}
    report = compare_transfer(files, {})
    found = report["models"]["a"]
    gain = np.ravel(gains(np.array([[50.0, 50]]), np.array([[[60.0, 42]]]), 1.0))[0]
    assert found["groups"]["maths"]["mean"] == pytest.approx(1)
    assert found["undefined"].startswith(f"the weighted gain in maths, {gain:+.2f} (")


def test_one_change_has_no_spread():
    files = {"base": evaluation(0.2, 0.5, 0.5), "a": evaluation(0.6, 0.6, 0.4)}
    report = compare_transfer(files, {}, "pooled")
    found = report["models"]["a"]["index"]
    assert (
        found["pooled"]["other_reasoning"] is None and found["one"]["other_reasoning"]
    )
    assert "nothing varies" in table(report)


def test_a_task_can_be_moved_or_left_out():
    files = {
        "base": evaluation(0.2, 0.5, 0.5)
        | {"more": evaluation(0.2, 0.5, 0.5)["facts"]},
        "a": evaluation(0.6, 0.6, 0.4) | {"more": evaluation(0.2, 0.5, 0.9)["facts"]},
    }
    moved = compare_transfer(files, {"more": "other_reasoning"})["models"]["a"][
        "groups"
    ]
    assert moved["other_reasoning"]["mean"] == pytest.approx(25)
    out = compare_transfer(files, {"more": "none"})
    assert out["groups"]["non_reasoning"] == ["facts"]


A = evaluation(0.2, 0.5, 0.5)


@pytest.mark.parametrize(
    ("files", "given", "says"),
    [
        ({"a": A}, {}, "got 1 evaluations, expected the base's and at least one more"),
        (
            {"a": A, "b": {k: A[k] for k in ("sums", "facts")}},
            {},
            "a and b are not of the same tasks: only one has puzzles",
        ),
        (
            {"a": A, "b": evaluation(0.2, 0.5, 0.5, protocol="with examples")},
            {},
            "sums was asked in different ways: 'asked plainly' in a, 'with examples' in b",
        ),
        (
            {"a": A, "b": evaluation(0.2, 0.5, 0.5, n=300)},
            {},
            r"sums has other problems in b \(300\) than in a \(400\)",
        ),
        (
            {"a": A, "b": A},
            {"sums": "none"},
            "the group maths is empty: evaluate on one of ",
        ),
        (
            {"a": A, "b": A},
            {"products": "maths"},
            "groups.products: no such task in the files",
        ),
    ],
    ids=["one model", "tasks", "protocol", "problems", "empty group", "unknown task"],
)
def test_what_cannot_be_compared(files, given, says):
    with pytest.raises(ValueError, match=says):
        compare_transfer(files, given)


# --- files -----------------------------------------------------------------------------------


def test_completions_of_the_world(tmp_path):
    file = tmp_path / "world.jsonl"
    rows = [("a", "maths", True), ("a", "maths", False), ("b", "copying", True)] * 2
    file.write_text(
        "".join(
            json.dumps({"problem": p, "labels": {"family": f}, "right": r}) + "\n"
            for p, f, r in rows
        )
    )
    tasks = read_evaluation(file)
    assert {name: task.group for name, task in tasks.items()} == {
        "maths": "maths",
        "copying": "non_reasoning",
    }
    assert tasks["maths"].values.tolist() == [50] and tasks["maths"].problems == ["a"]
    assert tasks["maths"].protocol == "4 samples a problem"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", '{"scores": 1}'),
        ("x.json", '{"tasks": {"a": {"metric": "acc"}}}'),
        ("x.json", '{"tasks": 3}'),
        ("x.jsonl", '{"problem": "a", "labels": {}, "right": true}\n'),
        ("x.jsonl", '{"problem": "a", "labels": {"family": "art"}, "right": true}\n'),
        ("x.jsonl", "3\n"),
    ],
)
def test_files_that_are_no_evaluation(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"{name}( is no evaluation|:1: expected a JSON)"
    ):
        read_evaluation(tmp_path / name)


def stored(records: str, group: str = "maths") -> str:
    """The text of a general.json of one task."""
    task = f'"group": "{group}", "metric": "acc", "protocol": "p", "digest": "d"'
    return f'{{"tasks": {{"a": {{{task}, "records": [{records}]}}}}}}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (stored(""), "a: expected problems with scores"),
        (stored('{"problem": "q", "acc": NaN}'), "a: expected problems with scores"),
        (stored('{"problem": "q", "acc": 50}'), "a: expected problems with scores"),
        (stored('{"problem": "q", "acc": 1}', "art"), "group: expected one of maths"),
    ],
)
def test_scores_that_are_none(tmp_path, content, says):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"x.json: .*{says}"):
        read_evaluation(tmp_path / "x.json")


def test_problems_that_are_all_alike_give_no_interval_and_no_index():
    files = {"base": evaluation(0, 0.5, 0.5, n=2), "a": evaluation(1, 0.5, 0.5, n=2)}
    report = compare_transfer(files, {})
    assert "+100.0  (no interval: all are the same)" in table(report)
    assert "within noise" in report["models"]["a"]["undefined"]


def test_files_that_are_empty_or_missing(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no completions"):
        read_evaluation(tmp_path / "x.jsonl")
    with pytest.raises(FileNotFoundError, match="no evaluation here"):
        read_evaluation(tmp_path / "y.json")
