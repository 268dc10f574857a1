"""Confidences against float64 and brute force, what they are worth against every order, thresholds
that do not see the test, and votes against cases made by hand.
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.analysis import confidence as confidence_module
from nanomath.analysis import statistics
from nanomath.analysis.confidence import (
    OF_TOKENS,
    WORTH,
    deepconf,
    filled,
    filtered_vote,
    handoff,
    levels,
    measure_all,
    of_answers,
    propose,
    risks,
    threshold,
    token_measures,
    validation,
    votes,
    worth,
)
from nanomath.analysis.evaluation import Graded, grade, maj_at_k
from nanomath.data.problem import Problem
from nanomath.models.batches import Example
from nanomath.process.measures import auc, calibration_error
from nanomath.rollout import Completion

INF = float("inf")
values = st.sampled_from([-INF, 0.0, 0.25, 0.5, 1.0])
judged = st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=6)


def columns(pairs) -> tuple[np.ndarray, np.ndarray]:
    confidence, right = zip(*pairs, strict=True)
    return np.array(confidence), np.array(right)


def graded(answers: list[str | None], gold: str = "7", name: str = "p") -> Graded:
    problem = Problem(name, "3+4?", gold)
    completions = [
        Completion(0, i, [1], [], [], "" if a is None else rf"\boxed{{{a}}}", "eos")
        for i, a in enumerate(answers)
    ]
    return grade(problem, completions)


# --- measures of completions -----------------------------------------------------------------


def by_hand(model, example: Example, top: int, window: int) -> dict[str, float]:
    """The measures of one completion, from a plain pass and the formulas, token by token."""
    tokens = example.prompt + example.response
    logits = model(torch.tensor([tokens]))[0].double()
    logprob, certainty, confidence = [], [], []
    for t in range(len(example.prompt), len(tokens)):
        p = (logits[t - 1] - logits[t - 1].logsumexp(0)).exp().tolist()
        logprob.append(math.log(p[tokens[t]]))
        certainty.append(-sum(math.log(len(p) * v) for v in p) / len(p))
        most = sorted(p, reverse=True)[:top]
        confidence.append(-sum(map(math.log, most)) / len(most))
    n = len(confidence)
    size = min(window, n)
    windows = [sum(confidence[i : i + size]) / size for i in range(n - size + 1)]
    lowest = sorted(windows)[: max(1, len(windows) // 10)]
    return {
        "mean_logprob": sum(logprob) / n,
        "self_certainty": sum(certainty) / n,
        "deepconf_mean": sum(confidence) / n,
        "deepconf_tail": sum(confidence[-size:]) / size,
        "deepconf_lowest": min(windows),
        "deepconf_bottom": sum(lowest) / len(lowest),
    }


@pytest.mark.parametrize(("top", "window"), [(20, 4), (3, 16), (1000, 1)])
def test_token_measures_are_those_of_the_formulas(new_model, monkeypatch, top, window):
    """Prompts of other lengths, shared and not, and rows of other lengths beside them: neither the
    prompt nor what stands beside a completion counts.
    """
    monkeypatch.setattr(confidence_module, "CHUNK", 7)
    model = new_model(3, torch.float64)
    generator = np.random.default_rng(0)
    examples = [
        Example(prompt, generator.integers(0, 50, size=n).tolist())
        for prompt, n in (([1, 2, 3], 5), ([1, 2, 3], 33), ([9], 1), ([4] * 7, 12))
    ]
    found = token_measures(model, examples, top, window)
    assert set(found) == set(OF_TOKENS)
    for i, example in enumerate(examples):
        for name, value in by_hand(model, example, top, window).items():
            assert found[name][i] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_an_other_prompt_counts_only_by_what_it_predicts(new_model):
    model = new_model(3, torch.float64)
    one, other = (
        token_measures(model, [Example(p, [5, 6, 7])], 20, 2) for p in ([1], [8, 8, 8])
    )
    assert one["mean_logprob"] != other["mean_logprob"]
    assert token_measures(model, [Example([1], [5, 6, 7])] * 2, 20, 2) == {
        name: [pytest.approx(x[0])] * 2 for name, x in one.items()
    }


def test_the_lowest_window_is_not_the_mean():
    found = deepconf(np.array([4.0, 4.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0]), window=2)
    assert found["deepconf_lowest"] == 1 == found["deepconf_bottom"]
    assert found["deepconf_tail"] == 4 and found["deepconf_mean"] == 3.25
    many = deepconf(np.arange(1.0, 22.0), window=2)  # 20 windows: the lowest two
    assert many["deepconf_bottom"] == (1.5 + 2.5) / 2


# --- answers ---------------------------------------------------------------------------------


def test_the_most_frequent_answer_is_proposed():
    found = propose(graded(["7", "8", "8", None]))
    assert (found.answer, found.right, found.samples, found.share) == (
        "8",
        False,
        [1, 2],
        0.5,
    )
    assert propose(graded(["7", "8"])).answer == "7"  # the first seen of equal ones
    assert propose(graded([None, None])).answer is None


def test_classes_of_answers_do_not_depend_on_the_gold_answer():
    """maj@k makes one answer of all right ones; a confidence must not know which these are."""
    answers = ["1/2", "0.5", "3", "50%", "3.0"]
    for gold in ("1/2", "3", "9"):
        found = propose(graded(answers, gold))
        assert (found.samples, found.share) == ([0, 1, 3], 0.6)
    assert (
        propose(graded(answers, "1/2")).right
        and not propose(graded(answers, "3")).right
    )


@given(st.lists(st.sampled_from([None, "7", "1", "2"]), min_size=1, max_size=7))
def test_the_proposal_is_a_winner_of_the_majority_vote(answers):
    item = graded(answers)
    vote = maj_at_k(item.answers, item.right, len(answers))
    assert propose(item).right == (vote == 1) or 0 < vote < 1


def test_a_confidence_is_the_mean_over_the_samples_that_give_the_answer():
    proposals = [propose(graded(["8", "7", "7"])), propose(graded([None, None, None]))]
    assert of_answers(proposals, [[0.9, 0.2, 0.4], [1, 1, 1]]).tolist() == [
        pytest.approx(0.3),
        -INF,
    ]


def test_braces_in_an_answer_stay():
    assert (
        filled("{question}|{answer}", "a{answer}", "{question}")
        == "a{answer}|{question}"
    )


# --- what a confidence is worth --------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(judged)
def test_risks_are_the_mean_over_all_orders_that_the_confidence_allows(pairs):
    rows = [
        [sum(not ok for _, ok in order[: j + 1]) / (j + 1) for j in range(len(order))]
        for order in permutations(pairs)
        if all(a[0] >= b[0] for a, b in zip(order, order[1:], strict=False))
    ]
    assert risks(*levels(*columns(pairs))[1:]).tolist() == pytest.approx(
        np.mean(rows, axis=0).tolist()
    )


@settings(deadline=None, max_examples=25)
@given(judged)
def test_excess_is_over_the_best_of_all_orders(pairs):
    areas = [
        np.mean([sum(not ok for _, ok in o[: j + 1]) / (j + 1) for j in range(len(o))])
        for o in permutations(pairs)
    ]
    found = dict(zip(WORTH, worth(*columns(pairs), 0.95, False), strict=True))
    assert found["aurc"] - found["excess"] == pytest.approx(min(areas))
    assert found["excess"] >= -1e-12


@given(judged, st.sampled_from([0.5, 0.75, 0.95, 1.0]))
def test_the_threshold_lets_through_as_many_as_it_can(pairs, target):
    confidence, right = columns(pairs)
    ways = [
        (np.mean(confidence >= t), t)
        for t in set(confidence) - {-INF}
        if right[confidence >= t].mean() >= target
    ]
    found = threshold(*levels(confidence, right), target)
    assert found == max(ways, default=(0, INF))[1]


def test_auroc_ece_and_means_of_a_case_by_hand():
    confidence = np.array([0.9, 0.8, 0.8, 0.2, -INF])
    right = np.array([True, True, False, False, False])
    found = dict(zip(WORTH, worth(confidence, right, 0.6, True), strict=True))
    assert found["auroc"] == pytest.approx(5.5 / 6)
    assert found["ece"] == pytest.approx((0.1 + abs(1.6 - 1) + 0.2 + 0) / 5)
    assert found["auroc"] == pytest.approx(auc(confidence.tolist(), right.tolist()))
    shares = np.maximum(confidence, 0).tolist()
    assert found["ece"] == pytest.approx(calibration_error(shares, right.tolist()))
    assert found["coverage"] == 0.6
    assert found["when_right"] == pytest.approx(0.85)
    assert found["when_wrong"] == pytest.approx(0.5)
    assert np.isnan(worth(confidence, right, 0.6, False)[WORTH.index("ece")])
    all_right = dict(
        zip(WORTH, worth(confidence, right | True, 0.6, False), strict=True)
    )
    assert all_right["aurc"] == 0 and np.isnan(all_right["auroc"])


# --- validation and test ---------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_clusters_are_not_divided(names, share):
    labels = np.unique(names, return_inverse=True)[1]
    if labels.max() == 0:
        with pytest.raises(ValueError, match="one cluster"):
            validation(labels, share, 0)
        return
    chosen = validation(labels, share, seed=1)
    assert not set(labels[chosen]) & set(labels[~chosen])
    assert 0 < chosen.sum() < len(labels)


def test_the_threshold_does_not_see_the_test(monkeypatch):
    """A confidence that says nothing: on the problems that chose it, a threshold reaches 70% by
    luck alone; on the test it must not.
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 2)
    generator = np.random.default_rng(0)
    peeked, honest = [], []
    for seed in range(60):
        confidence, right = generator.random(40), generator.random(40) < 0.5
        scores, limits, chosen = measure_all(
            {"majority": confidence}, right, range(40), 0.7, 0.5, seed
        )
        for rows, part in ((peeked, chosen), (honest, ~chosen)):
            kept = confidence[part] >= limits["majority"]
            rows += right[part][kept].tolist()
        flipped = np.where(chosen, right, ~right)  # the test's labels change nothing
        again = measure_all(
            {"majority": confidence}, flipped, range(40), 0.7, 0.5, seed
        )
        assert again[1] == limits
        mine = scores["majority"]["test_coverage"].mean
        assert mine == np.mean(confidence[~chosen] >= limits["majority"])
    assert np.mean(peeked) > 0.7
    assert np.mean(honest) == pytest.approx(0.5, abs=0.08)


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch):
    """Right with the probability that the confidence says, three problems to a cluster: AURC and
    accuracy above the threshold, of 150 measurements each; the truth is of 300,000 problems.
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    generator = np.random.default_rng(1)

    def drawn(clusters: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        names = np.repeat(np.arange(clusters), 3)
        confidence = np.clip(
            np.repeat(generator.random(clusters), 3)
            + generator.normal(0, 0.1, 3 * clusters),
            0.01,
            0.99,
        )
        return names, confidence, generator.random(3 * clusters) < confidence

    _, population, answers = drawn(100_000)
    truth = risks(*levels(population, answers)[1:]).mean()
    held = np.zeros(2)
    for seed in range(150):
        names, confidence, right = drawn(70)
        scores, limits, _ = measure_all(
            {"prm": confidence}, right, names, 0.8, 0.5, seed
        )
        above = answers[population >= limits["prm"]].mean()
        for i, (name, value) in enumerate((("aurc", truth), ("test_accuracy", above))):
            held[i] += scores["prm"][name].low <= value <= scores["prm"][name].high
    # 95% of 150 is 142; the percentile interval of a share near 1 is known to be short
    assert (held >= 130).all(), held


# --- votes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "weight", "share", "expected"),
    [
        (["7", "8", "8"], [0.9, 0.2, 0.2], 1.0, 1),
        (["7", "8", "8"], [0.9, 0.5, 0.5], 1.0, 0),
        (["7", "8", "8"], [0.5, 0.25, 0.25], 1.0, 0.5),
        (["7", "8", "8"], [0.5, 0.4, 0.4], 0.1, 1),
        (["8", "7", "7"], [0.5, 0.4, 0.4], 0.1, 0),
        (
            ["7", None, None],
            [0.1, 0.9, 0.9],
            0.1,
            1,
        ),  # those without an answer do not vote
        ([None, None], [0.9, 0.9], 0.9, 0),
        (["7"] * 3 + ["8"] * 7, [1.0] * 10, 0.1, 0),  # equal weights: all are kept
        (["8"] + ["7"] * 9, [0.1] + [1.0] * 9, 0.9, 1),
    ],
)
def test_votes_by_hand(answers, weight, share, expected):
    assert filtered_vote(graded(answers), np.array(weight), share) == pytest.approx(
        expected
    )


def test_votes_are_paired_with_the_plain_one():
    items = [graded(["7", "8", "8"], name=str(i)) for i in range(6)]
    traces = {"prm": [[0.9, 0.1, 0.1]] * 3 + [[0.1, 0.9, 0.9]] * 3}
    found = votes(items, traces, np.arange(6))
    assert list(found) == ["majority", "prm", "prm, top 90%", "prm, top 10%"]
    assert found["majority"][0].mean == 0 and found["majority"][1].high == 0
    score, difference = found["prm"]
    assert (score.mean, difference.mean) == (0.5, 0.5) and difference.low < 0.5
    equal = votes(items, {"prm": [[1.0, 1.0, 1.0]] * 6}, np.arange(6))
    assert equal["prm"][0] == equal["majority"][0] and equal["prm"][1].mean == 0


def test_logprobs_vote_with_probabilities():
    items = [graded(["7", "8", "8"])] * 2
    found = votes(
        items,
        {"mean_logprob": [[math.log(0.9), *[math.log(0.4)] * 2]] * 2},
        np.arange(2),
    )
    assert found["mean_logprob"][0].mean == 1  # 0.9 against 0.8


# --- what a person sees ----------------------------------------------------------------------


def test_a_person_sees_the_test_answers_below_the_threshold():
    items = [
        graded(a, name=str(i)) for i, a in enumerate([["7"], ["8"], [None], ["7"]])
    ]
    proposals = [propose(item) for item in items]
    confidences = {"prm": np.array([0.9, 0.2, -INF, 0.1])}
    chosen = np.array([False, False, False, True])
    rows = list(handoff(items, proposals, confidences, {"prm": 0.5}, chosen, 0.95))
    assert [(row["id"], row["answer"], row["confidence"]) for row in rows] == [
        ("1", "8", {"prm": 0.2}),
        ("2", None, {"prm": None}),
    ]
    assert "0.2" in rows[0]["reason"] and "0.5" in rows[0]["reason"]
    assert rows[1]["reason"] == "No sample gives an answer."
    rows = list(handoff(items, proposals, confidences, {"prm": INF}, chosen, 0.95))
    assert len(rows) == 3 and rows[0]["threshold"] is None
    assert "95%" in rows[0]["reason"]
