"""Monte-Carlo labels: what is continued, from where, and what the continuations count for."""

from __future__ import annotations

import pytest

from nanomath.data.problem import Problem
from nanomath.process.montecarlo import monte_carlo
from nanomath.process.steps import steps_of
from nanomath.rollout import Completion, Sampler


class Continuing:
    """A sampler whose continuation n of a prefix is endings[(the prefix's text, n)]."""

    def __init__(self, model, tokenizer, endings) -> None:
        self.model, self.tokenizer, self.endings, self.asked = (
            model,
            tokenizer,
            endings,
            [],
        )

    def generate(self, prompts, n, seed, **sampling):
        self.asked = [self.tokenizer.decode(prompt) for prompt in prompts]
        assert (seed, sampling) == (7, {"temperature": 0.5})
        found = []
        for i, prompt in enumerate(prompts):
            for j in range(n):
                text = self.endings(self.tokenizer.decode(prompt), j)
                tokens = self.tokenizer.encode(text)
                found.append(
                    Completion(
                        i,
                        j,
                        tokens,
                        [0.0] * len(tokens),
                        [0.0] * len(tokens),
                        text,
                        "eos",
                    )
                )
        return found


@pytest.fixture
def drawn(tokenizer):
    def make(text: str, reason: str = "eos", prompt: int = 0) -> Completion:
        tokens = tokenizer.encode(text) + [tokenizer.eos_id] * (reason == "eos")
        return Completion(
            prompt, 0, tokens, [0.0] * len(tokens), [0.0] * len(tokens), text, reason
        )

    return make


def test_every_prefix_is_continued(new_model, tokenizer, drawn):
    problems = [Problem("p", "q", "2"), Problem("r", "s", "3")]
    completions = [
        drawn("a\n\nb\n\n\\boxed{2}"),
        drawn("\\boxed{5}"),
        drawn("c\n\n\\boxed{3}", "length", 1),
    ]
    steps = [steps_of(tokenizer, c.tokens) for c in completions]
    right_from = {"qa\n\n": (0, 2), "qa\n\nb\n\n": (), "sc\n\n": (1,)}

    def ending(prefix: str, n: int) -> str:
        return (
            f"\\boxed{{{'2' if prefix.startswith('q') else '3'}}}"
            if n in right_from[prefix]
            else "\\boxed{9}"
        )

    sampler = Continuing(new_model(), tokenizer, ending)
    prompts = [tokenizer.encode("q"), tokenizer.encode("s")]
    found = monte_carlo(
        sampler, problems, prompts, completions, steps, 3, 7, temperature=0.5
    )
    assert sampler.asked == list(right_from)
    first = [
        [True, False, True],
        [False] * 3,
        [True] * 3,
    ]  # the last step's own answer is right
    assert found == [
        first,
        [[False] * 3],
        [[False, True, False], [False] * 3],
    ]  # cut off: not an answer


def test_an_answer_in_the_prefix_counts(new_model, tokenizer, drawn):
    """What a continuation adds is graded with what came before it, as one solution."""
    completion = drawn("\\boxed{2}\n\nThat is it.")
    steps = [steps_of(tokenizer, completion.tokens)]
    sampler = Continuing(
        new_model(), tokenizer, lambda prefix, n: "Yes." if n else "No: \\boxed{4}"
    )
    found = monte_carlo(
        sampler,
        [Problem("p", "q", "2")],
        [[5]],
        [completion],
        steps,
        2,
        7,
        temperature=0.5,
    )
    assert found == [[[False, True], [True, True]]]


def test_a_prefix_that_fills_the_context_is_wrong(new_model, tokenizer, drawn):
    completion = drawn("a\n\n" * 3 + "\\boxed{2}")
    steps = [steps_of(tokenizer, completion.tokens)]
    model = new_model(max_positions=len(completion.tokens))
    sampler = Continuing(model, tokenizer, lambda prefix, n: "\\boxed{2}")
    long = [5] * (len(completion.tokens) - 5)
    found = monte_carlo(
        sampler,
        [Problem("p", "q", "2")],
        [long],
        [completion],
        steps,
        2,
        7,
        temperature=0.5,
    )
    assert [row[0] for row in found[0]] == [True, True, False, True][: len(found[0])]


def test_with_the_real_sampler(new_model, tokenizer, drawn):
    completions = [drawn("a\n\nb"), drawn("c\n\nd\n\ne")]
    steps = [steps_of(tokenizer, c.tokens) for c in completions]
    sampler = Sampler(new_model(0), tokenizer, 4)
    found = monte_carlo(
        sampler,
        [Problem("p", "q", "2")],
        [[5]],
        completions,
        steps,
        2,
        0,
        max_new_tokens=6,
    )
    assert [[len(row) for row in rows] for rows in found] == [[2, 2], [2, 2, 2]]
