"""Reward functions against hand-computed values and plain loops."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.data.problem import Problem
from nanomath.rewards import REWARDS, Response, RewardSet, is_correct
from nanomath.rewards.extraction import after_reasoning

PROBLEM = Problem("p1", "What is 2 + 3?", "5")
RIGHT, WRONG = r"So \boxed{5}", r"So \boxed{6}"
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=8)


def graded(text: str, length: int = 1) -> Response:
    """What `RewardSet` makes of a completion of PROBLEM before the rewards see it."""
    return Response(
        text,
        length,
        correct=is_correct(PROBLEM, text),
        conclusion=after_reasoning(text),
    )


def group(*texts: str) -> list[Response]:
    return [graded(text, len(text.split())) for text in texts]


def test_accuracy_and_is_correct():
    assert REWARDS["accuracy"](PROBLEM, group(RIGHT, WRONG, "5", r"\boxed{5")) == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]
    (row,) = RewardSet({"accuracy": 1.0}, lenient=True)(PROBLEM, group("I get 5"))
    assert row["accuracy"] == 1.0
    assert is_correct(PROBLEM, "The answer is 5.0") and not is_correct(
        PROBLEM, "it is 5"
    )


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("First.\n\nSo $\\boxed{5}$.\n", 1.0),
        (r"\boxed{5}", 1.0),
        ("<think>\\boxed{1}\n\nhm</think>So \\boxed{5}", 1.0),
        ("\\boxed{5}\n\nBecause 2 + 3 is 5.", 0.0),
        (r"\boxed{2} and \boxed{5}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{5", 0.0),
        ("The answer is 5", 0.0),
    ],
)
def test_format(text: str, reward: float):
    assert REWARDS["format"](PROBLEM, group(text)) == [reward]


def padded(text: str, length: int) -> Response:
    return graded("." * (length - len(text)) + text)


def test_cosine_at_its_ends_and_in_the_middle():
    texts = [RIGHT, WRONG]
    half = REWARDS["cosine"](
        PROBLEM, [padded(text, 50) for text in texts], max_length=100
    )
    full = REWARDS["cosine"](
        PROBLEM, [padded(text, 100) for text in texts], max_length=100
    )
    beyond = REWARDS["cosine"](
        PROBLEM, [padded(text, 1000) for text in texts], max_length=100
    )
    short = REWARDS["cosine"](PROBLEM, group(*texts), max_length=1e9)
    assert half == pytest.approx([0.55, -0.55])
    assert full == pytest.approx([0.1, -0.1]) and beyond == full
    assert short == pytest.approx([1.0, -1.0])


@settings(deadline=None, max_examples=50)
@given(st.integers(20, 200), st.integers(20, 200))
def test_cosine_is_monotone_in_length(a: int, b: int):
    short, long = sorted((a, b))
    right = REWARDS["cosine"](
        PROBLEM, [padded(RIGHT, short), padded(RIGHT, long)], max_length=150
    )
    wrong = REWARDS["cosine"](
        PROBLEM, [padded(WRONG, short), padded(WRONG, long)], max_length=150
    )
    assert 1.0 >= right[0] >= right[1] >= 0.1 - 1e-12
    assert -1.0 <= wrong[0] <= wrong[1] <= -0.1 + 1e-12


def test_group_length_by_hand():
    responses = [
        graded(RIGHT, 10),
        graded(RIGHT, 20),
        graded(RIGHT, 30),
        graded(WRONG, 10),
        graded(WRONG, 30),
    ]
    assert REWARDS["group_length"](PROBLEM, responses) == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert REWARDS["group_length"](PROBLEM, responses[:1] * 3) == [0.0, 0.0, 0.0]


@settings(deadline=None, max_examples=50)
@given(LENGTHS)
def test_group_length_properties(lengths: list[int]):
    right = REWARDS["group_length"](
        PROBLEM, [graded(RIGHT, length) for length in lengths]
    )
    wrong = REWARDS["group_length"](
        PROBLEM, [graded(WRONG, length) for length in lengths]
    )
    assert wrong == [min(0.0, value) for value in right]
    if len(set(lengths)) > 1:
        assert max(right) == 0.5 and min(right) == -0.5
        mirrored = [
            graded(RIGHT, max(lengths) + min(lengths) - length) for length in lengths
        ]
        assert sum(right) + sum(
            REWARDS["group_length"](PROBLEM, mirrored)
        ) == pytest.approx(0)
    else:
        assert set(right) == {0.0}


def test_overlong_by_hand():
    responses = [Response("", length) for length in (0, 80, 85, 90, 100, 200)]
    assert REWARDS["overlong"](PROBLEM, responses, max_length=100, buffer=20) == [
        0,
        0,
        -0.25,
        -0.5,
        -1.0,
        -1.0,
    ]
    assert REWARDS["overlong"](PROBLEM, [Response("", 20_480 - 2_048)]) == [-0.5]


def repeated_share(words: list[str], n: int) -> float:
    seen, repeats, total = [], 0, 0
    for i in range(len(words)):
        if i + n <= len(words):
            total += 1
            repeats += words[i : i + n] in seen
            seen.append(words[i : i + n])
    return repeats / total if total else 0.0


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from(["a", "b", "So,"]), max_size=12),
    st.integers(1, 4),
    st.floats(0, 2),
)
def test_repetition_against_a_loop(words: list[str], n: int, penalty: float):
    (reward,) = REWARDS["repetition"](
        PROBLEM, group(" ".join(words)), ngram=n, max_penalty=penalty
    )
    assert reward == pytest.approx(
        -penalty * repeated_share([word.lower() for word in words], n)
    )
    assert -penalty <= reward <= 0


def test_repetition_counts_japanese_characters():
    assert REWARDS["repetition"](
        PROBLEM, group("答答答答答", "答えは五です"), ngram=2
    ) == pytest.approx([-0.75, 0.0])


def test_random_is_a_fixed_fair_coin():
    responses = [Response(f"text {i}", 1) for i in range(2000)]
    rewards = REWARDS["random"](PROBLEM, responses)
    assert rewards == REWARDS["random"](PROBLEM, responses[::-1])[::-1]
    assert set(rewards) == {0.0, 1.0} and abs(sum(rewards) / 2000 - 0.5) < 0.05
    assert rewards != REWARDS["random"](PROBLEM, responses, seed=1)
    assert rewards != REWARDS["random"](Problem("p2", "", "5"), responses)
    assert sum(REWARDS["random"](PROBLEM, responses, probability=0)) == 0
    assert sum(REWARDS["random"](PROBLEM, responses, probability=1)) == 2000


def test_the_sum_of_weighted_components():
    rewards = RewardSet({"format": 0.5, "cosine": 2.0}, {"cosine": {"max_length": 100}})
    first, second = rewards(PROBLEM, group(RIGHT, "The answer is 6"))
    share = math.cos(math.pi * len(RIGHT) / 100)
    assert first == pytest.approx(
        {
            "accuracy": 1.0,
            "format": 1.0,
            "cosine": 0.55 + 0.45 * share,
            "total": 0.5 + 2 * (0.55 + 0.45 * share),
        }
    )
    assert (
        second["accuracy"] == 0
        and second["format"] == 0
        and second["total"] == 2 * second["cosine"]
    )


def test_accuracy_is_logged_without_a_weight_and_lenient_reaches_every_grader():
    assert RewardSet({"format": 1.0})(PROBLEM, group(RIGHT)) == [
        {"accuracy": 1.0, "format": 1.0, "total": 1.0}
    ]
    lenient = RewardSet(
        {"accuracy": 1.0, "cosine": 1.0, "group_length": 1.0}, lenient=True
    )
    first, second = lenient(PROBLEM, group("I get 5", "I really do get 5"))
    assert (
        first["accuracy"] == 1
        and first["cosine"] > 0.9
        and first["group_length"] == 0.5
    )
    assert second["group_length"] == -0.5


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(st.sampled_from(sorted(REWARDS)), st.floats(-2, 2), min_size=1),
    LENGTHS,
)
def test_total_is_the_weighted_sum(weights: dict[str, float], lengths: list[int]):
    responses = [Response(RIGHT if length % 2 else WRONG, length) for length in lengths]
    for row in RewardSet(weights)(PROBLEM, responses):
        assert set(row) == {*weights, "accuracy", "total"}
        assert row["total"] == pytest.approx(
            sum(weight * row[name] for name, weight in weights.items())
        )


@pytest.mark.parametrize(
    ("weights", "params", "message"),
    [
        ({"acuracy": 1.0}, {}, r"unknown reward: 'acuracy'; did you mean accuracy\?"),
        (
            {"accuracy": 1.0},
            {"cosin": {}},
            r"unknown reward: 'cosin'; did you mean cosine\?",
        ),
        (
            {"cosine": 1.0},
            {"cosine": {"max_len": 3}},
            r"parameter of the reward 'cosine': 'max_len'; .* max_length\?",
        ),
        ({"format": 1.0}, {"format": {"x": 3}}, "'x'; it takes none"),
        (
            {"overlong": 1.0},
            {"overlong": {"buffer": 0}},
            "'buffer' of the reward 'overlong' is 0: it must be above 0",
        ),
    ],
)
def test_wrong_settings_are_refused(weights: dict, params: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RewardSet(weights, params)


@pytest.mark.parametrize("answer", ["", "  "])
def test_a_missing_gold_answer_names_the_problem(answer: str):
    with pytest.raises(ValueError, match="'p9' has no gold answer"):
        RewardSet({"format": 1.0})(Problem("p9", "?", answer), group(RIGHT))
