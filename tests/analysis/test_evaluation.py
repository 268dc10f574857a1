"""pass@k and maj@k against enumeration, the intervals, and the report of a sampler whose
completions are known.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.analysis.evaluation import (
    SUBSETS,
    best_at_k,
    evaluate,
    grade,
    maj_at_k,
    mean_score,
    pass_at_k,
)
from nanomath.data.problem import Problem
from nanomath.rollout import Completion

# One vote: nothing, the right answer, or one of three wrong ones.
votes = st.lists(st.sampled_from([None, "7", "1", "2", "3"]), min_size=1, max_size=7)


# --- pass@k and maj@k ------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(
        sum(map(any, subsets)) / len(subsets), abs=1e-12
    )


def majority_by_sorting(answers: tuple[str | None, ...], gold: str) -> Fraction:
    """The chance that the winner of one vote is `gold`, ties decided by lot."""
    cast = sorted(answer for answer in answers if answer is not None)
    tally = sorted(((cast.count(answer), answer) for answer in set(cast)), reverse=True)
    winners = [answer for count, answer in tally if count == tally[0][0]]
    return Fraction(gold in winners, len(winners)) if winners else Fraction(0)


@settings(deadline=None, max_examples=100)
@given(votes, st.data())
def test_maj_at_k_is_the_mean_over_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    ways = [majority_by_sorting(subset, "7") for subset in combinations(answers, k)]
    exact = sum(ways) / len(ways)
    assert maj_at_k(answers, [a == "7" for a in answers], k) == pytest.approx(
        float(exact), abs=1e-12
    )


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["7", "7", "1"], 1),
        (["7", "1", "1"], 0),
        (["7", "1"], 1 / 2),
        (["7", "7", "1", "1", "2", "2"], 1 / 3),
        (["7", None, None, None], 1),
        (["1", None, None], 0),
        ([None, None], 0),
    ],
)
def test_majority_of_all_samples(answers, expected):
    assert maj_at_k(
        answers, [a == "7" for a in answers], len(answers)
    ) == pytest.approx(expected)


def test_right_answers_are_one_answer_however_they_are_written():
    assert (
        maj_at_k(["1/2", "0.5", "3", "3", "4"], [True, True, False, False, False], 5)
        == 0.5
    )
    assert (
        maj_at_k(["1/2", "0.5", "50%", "3", "3"], [True, True, True, False, False], 5)
        == 1
    )


def test_many_subsets_are_sampled_and_the_estimate_is_near():
    answers = ["7"] * 9 + ["1"] * 7 + [None] * 4
    right = [a == "7" for a in answers]
    assert comb(20, 5) > SUBSETS
    exact = float(
        sum(majority_by_sorting(s, "7") for s in combinations(answers, 5)) / comb(20, 5)
    )
    estimates = [maj_at_k(answers, right, 5, seed) for seed in range(20)]
    assert estimates[0] == maj_at_k(answers, right, 5, seed=0)
    assert abs(np.mean(estimates) - exact) < 4 * 0.5 / np.sqrt(20 * SUBSETS)


# --- intervals -------------------------------------------------------------------------------


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    scores = [mean_score(generator.random(100) < 0.3, seed) for seed in range(60)]
    held = sum(s.low <= 0.3 <= s.high for s in scores)
    assert held >= 50  # 57 expected; binomial, so 50 is four standard deviations below
    width = np.mean([s.high - s.low for s in scores])
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 100), rel=0.1)


def test_score():
    one = mean_score([0.0, 1.0, 1.0, 0.0], seed=3)
    assert one.mean == 0.5 and one.low < 0.5 < one.high
    assert one == mean_score([0.0, 1.0, 1.0, 0.0], seed=3)
    constant = mean_score([1.0] * 5)
    assert (constant.mean, constant.low, constant.high) == (1, 1, 1)
    assert str(mean_score([0.25] * 3)) == "25.0% (no interval: all are the same)"


# --- reports ---------------------------------------------------------------------------------


class Echo:
    """A sampler that says what it is told to: texts[prompt][sample]."""

    def __init__(self, texts: list[list[str]]) -> None:
        self.texts, self.calls = texts, []

    def generate(self, prompts, n, seed, progress=None, **sampling) -> list[Completion]:
        self.calls.append({"prompts": prompts, "n": n, "seed": seed, **sampling})
        return [
            Completion(
                p,
                s,
                [5, 6],
                [-0.5, -0.5],
                [-0.5, -0.5],
                text,
                "eos" if text else "length",
            )
            for p in range(len(prompts))
            for s, text in enumerate(self.texts[p][:n])
        ]


PROBLEMS = [
    Problem("a", "1+1?", "2", metadata={"level": 1, "topic": "sums"}),
    Problem("b", "3+4?", "7", metadata={"level": 2}),
    Problem("c", "5+4?", "9", metadata={"level": 2}),
]
TEXTS = [
    [r"\boxed{2}", r"so \boxed{2}", r"\boxed{2}", r"\boxed{3}"],
    [r"\boxed{7}", r"\boxed{8}", r"\boxed{8}", ""],
    ["", "nine", "", r"\boxed{1}"],
]


def measured(**options):
    options = {"samples": 4, "k": [1], **options}
    return evaluate(Echo(TEXTS), PROBLEMS, [[1], [2], [3]], **options)


def test_scores_of_known_completions():
    report = measured(k=[4, 2])
    assert list(report.scores) == ["pass@1", "pass@2", "maj@2", "pass@4", "maj@4"]
    means = {name: s.mean for name, s in report.scores.items()}
    assert means["pass@1"] == pytest.approx((3 / 4 + 1 / 4) / 3)
    assert means["pass@2"] == pytest.approx((1 + 1 / 2) / 3)
    assert means["pass@4"] == pytest.approx(2 / 3)
    assert means["maj@4"] == pytest.approx(1 / 3)
    assert report.breakdown == {}


def test_metrics():
    metrics = measured(k=[4]).metrics()
    assert metrics == {
        "heldout/pass@1": pytest.approx(1 / 3),
        "heldout/pass@4": pytest.approx(2 / 3),
        "heldout/maj@4": pytest.approx(1 / 3),
        "heldout/pass@1_low": pytest.approx(0, abs=0.2),
        "heldout/pass@1_high": pytest.approx(0.75),
        "heldout/length": 2,
        "heldout/truncated": pytest.approx(3 / 12),
        "heldout/no_answer": pytest.approx(4 / 12),
        "heldout/language/en": pytest.approx(2 / 12),
        "heldout/language/ja": 0,
        "heldout/language/mixed": 0,
    }


def test_records_are_one_for_each_completion_in_order():
    records = list(measured().records())
    assert [(r["problem"], r["sample"]) for r in records] == [
        (p, s) for p in "abc" for s in range(4)
    ]
    assert records[5] == {
        "problem": "b",
        "question": "3+4?",
        "gold": "7",
        "labels": {"level": 2},
        "sample": 1,
        "text": r"\boxed{8}",
        "answer": "8",
        "right": False,
        "finish_reason": "eos",
        "tokens": 2,
        "language": "none",
        "mixed": False,
    }
    assert [r["language"] for r in records] == [
        *("none", "en", *["none"] * 7),
        *("en", "none", "none"),
    ]
    assert [r["right"] for r in records] == [True] * 3 + [False] + [True] + [False] * 7


def test_breakdown_by_a_metadata_key():
    parts = measured(by=["level"]).breakdown
    assert {name: s.mean for name, s in parts.items()} == {
        "level=1": 0.75,
        "level=2": 0.125,
    }
    assert list(measured(by=["topic"]).breakdown) == [
        "topic=sums"
    ]  # of the problems that have it


@torch.no_grad()
def test_how_far_the_model_has_moved(new_model):
    """A completion counts by its tokens: those of the second problem have one, the others two."""
    start = new_model(0).double()
    prompts = [[1], [2, 9], [3]]
    lengths = [2, 1, 2]

    class Uneven(Echo):
        def generate(self, *args, **options):
            return [
                replace(c, tokens=c.tokens[:n], logprobs=c.logprobs[:n])
                for c in super().generate(*args, **options)
                for n in lengths[c.prompt_index : c.prompt_index + 1]
            ]

    gaps = []
    for prompt, length in zip(prompts, lengths, strict=True):
        logits = start(torch.tensor([[*prompt, 5, 6]]))[0, len(prompt) - 1 :].double()
        logprobs = (logits / 0.7).log_softmax(-1)
        theirs = [logprobs[0, 5].item(), logprobs[1, 6].item()][:length]
        gaps.append(sum(-0.5 - one for one in theirs))
    told = {"samples": 4, "start": start, "temperature": 0.7}
    reports = [
        evaluate(Uneven(TEXTS), PROBLEMS, prompts, by=by, **told)
        for by in ([], ["level"])
    ]
    expected = {"": sum(gaps) / 5}
    assert reports[0].kl == pytest.approx(expected, rel=1e-5)
    expected |= {"/level=1": gaps[0] / 2, "/level=2": (gaps[1] + gaps[2]) / 3}
    assert reports[1].kl == pytest.approx(expected, rel=1e-5)
    logged = reports[1].metrics()
    assert {f"heldout/kl{name}": value for name, value in reports[1].kl.items()} == {
        name: value for name, value in logged.items() if "/kl" in name
    }


def test_what_cannot_be_measured_is_refused_before_anything_is_sampled():
    sampler = Echo(TEXTS)
    with pytest.raises(
        ValueError, match=r"metadata key 'levle'; there are: level, topic$"
    ):
        evaluate(sampler, PROBLEMS, [[1], [2], [3]], samples=4, by=["levle"])
    with pytest.raises(ValueError, match="there are: none$"):
        evaluate(sampler, [Problem("d", "?", "1")], [[1]], samples=4, by=["level"])
    with pytest.raises(
        ValueError, match=r"pass@5 needs at least 5 samples of each problem, not 4"
    ):
        evaluate(sampler, PROBLEMS, [[1], [2], [3]], samples=4, k=[1, 5])
    assert sampler.calls == []


def test_the_sampler_is_asked_once_for_everything():
    sampler = Echo(TEXTS)
    evaluate(sampler, PROBLEMS, [[1], [2], [3]], samples=4, seed=9, temperature=0.5)
    assert sampler.calls == [
        {"prompts": [[1], [2], [3]], "n": 4, "seed": 9, "temperature": 0.5}
    ]


def test_lenient_grading_takes_the_last_number():
    completion = Completion(0, 0, [5], [0.0], [0.0], "it must be 7", "eos")
    assert grade(PROBLEMS[1], [completion]).right == [False]
    assert grade(PROBLEMS[1], [completion]).answers == [None]
    assert grade(PROBLEMS[1], [completion], lenient=True).right == [True]


def test_a_problem_without_a_gold_answer_is_an_error():
    completion = Completion(0, 0, [5], [0.0], [0.0], r"\boxed{}", "eos")
    with pytest.raises(ValueError, match="no gold answer"):
        grade(Problem("e", "?", " "), [completion])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7),
    st.data(),
)
def test_best_at_k_is_the_mean_over_all_subsets(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    chances = []
    for subset in combinations(samples, k):
        top = max(value for value, _ in subset)
        hits = [ok for value, ok in subset if value == top]
        chances.append(sum(hits) / len(hits))
    found = best_at_k([value for value, _ in samples], [ok for _, ok in samples], k)
    assert found == pytest.approx(sum(chances) / len(chances), abs=1e-12)


def test_votes_can_be_weighed():
    answers, right = ["7", "3", "3"], [True, False, False]
    assert maj_at_k(answers, right, 3) == 0
    assert maj_at_k(answers, right, 3, 0, [0.9, 0.2, 0.3]) == 1
    assert maj_at_k(answers, right, 3, 0, [0.5, 0.25, 0.25]) == 0.5
    assert maj_at_k(answers, right, 3, 0, [0.0, 0.0, 0.0]) == 0
