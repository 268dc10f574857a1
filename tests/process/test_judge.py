"""The judge: probabilities of its next token alone, both orders of a pair, and a question that
it does not answer.
"""

from __future__ import annotations

import pytest
import torch

from nanomath.models import Tokenizer
from nanomath.process.judge import (
    MARKS,
    PAIRWISE,
    POINTWISE,
    Judge,
    fill,
    judge_pairwise,
)

GROUPS = [
    ("1 + 1?", ["2", "it is 3", "2"]),
    ("2 + 2?", ["4 {first}"]),
    ("3?", ["a", "b", "c", "d"]),
]


@pytest.fixture
def judge(new_model, new_tokenizer) -> Judge:
    return Judge(new_model(3, max_positions=512), new_tokenizer())


class Biased(Judge):
    """Prefers the longer solution by `strength`, and what stands first by `bias`."""

    strength, bias = 0.2, 0.0

    def compare(self, pairs):
        found = []
        for _, one, other in pairs:
            liked = self.strength * (len(one) > len(other)) - self.strength * (
                len(one) < len(other)
            )
            found.append((0.5 + liked + self.bias, 0.5 + liked - self.bias))
        return found


@torch.no_grad()
def brute_force(judge: Judge, prompt: str, answers: tuple[str, ...]) -> list[float]:
    text = judge.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    after = (
        judge.model(torch.tensor([judge.tokenizer.encode(text)]))[0, -1]
        .double()
        .softmax(0)
    )
    found = []
    for answer in answers:
        tokens = {
            judge.tokenizer.encode(answer)[-1],
            judge.tokenizer.encode(" " + answer)[-1],
        }
        found.append(sum(float(after[token]) for token in tokens))
    return [value / sum(found) for value in found]


@pytest.mark.parametrize("budget", [1, 300, 0])
def test_marks_are_expected_values(judge, budget):
    judge.token_budget = budget
    expected = []
    solutions = [(question, text) for question, texts in GROUPS for text in texts]
    for question, text in solutions:
        chances = brute_force(judge, fill(POINTWISE, question, text), MARKS)
        expected.append(sum(p * k for k, p in enumerate(chances)) / 4)
    assert judge.mark(solutions) == pytest.approx(expected, abs=1e-6)
    assert len(judge.masses) == 8 and all(0 < mass < 1 for mass in judge.masses)


def test_both_orders_are_asked(judge):
    (pair,) = judge.compare([("1 + 1?", "2", "it is 3")])
    first = brute_force(judge, fill(PAIRWISE, "1 + 1?", "2", "it is 3"), ("A", "B"))[0]
    second = brute_force(judge, fill(PAIRWISE, "1 + 1?", "it is 3", "2"), ("A", "B"))[1]
    assert pair == pytest.approx((first, second), abs=1e-6)
    assert judge.compare([]) == []


def test_a_share_of_wins(new_model, new_tokenizer):
    judge = Biased(new_model(3), new_tokenizer())
    groups = [("q", ["a", "bbb", "cc"]), ("r", ["alone"]), ("s", ["same", "same"])]
    scores, consistency = judge_pairwise(judge, groups, opponents=9)
    assert scores == pytest.approx([0.3, 0.7, 0.5, 0.5, 0.5, 0.5]) and consistency == 1
    # It now says that the first is better, whichever stands there; the two orders cancel it.
    judge.bias = 0.3
    scores, consistency = judge_pairwise(judge, groups, opponents=9)
    assert scores == pytest.approx([0.3, 0.7, 0.5, 0.5, 0.5, 0.5]) and consistency == 0
    assert judge_pairwise(judge, groups[1:], 4)[1] is None


def test_each_meets_so_many_others(new_model, new_tokenizer):
    judge, asked = Biased(new_model(3), new_tokenizer()), []
    compare = judge.compare
    judge.compare = lambda pairs: (asked.extend(pairs), compare(pairs))[1]
    judge_pairwise(judge, [("q", list("abcdef"))], opponents=2)
    assert sorted((one, other) for _, one, other in asked) == sorted(
        (a, "abcdef"[(i + step) % 6]) for i, a in enumerate("abcdef") for step in (1, 2)
    )


def test_braces_in_a_solution_stay():
    assert (
        fill("{question}: {first} or {second}", "q{first}", "{second}", "x")
        == "q{first}: {second} or x"
    )


def test_errors(judge, new_model, monkeypatch):
    mass = {}
    monkeypatch.setattr(
        judge, "probabilities", lambda *asked: judge.masses.append(mass["now"])
    )
    mass["now"] = 0.3
    judge.check("1 + 1?", "2")
    assert judge.masses == []
    mass["now"] = 0.001
    with pytest.raises(
        ValueError, match="the judge gives A and B 0.10% of the probability"
    ):
        judge.check("1 + 1?", "2")
    with pytest.raises(
        ValueError, match="what the judge is asked has .* tokens: its context holds 64"
    ):
        Judge(new_model(0, max_positions=64), judge.tokenizer).mark([("q" * 300, "a")])


def test_a_plain_judge_has_no_chat(judge):
    plain = Judge(
        judge.model, Tokenizer(judge.tokenizer.backend, eos_token="<|endoftext|>")
    )
    assert plain.mark([("1 + 1?", "2")]) != judge.mark([("1 + 1?", "2")])
