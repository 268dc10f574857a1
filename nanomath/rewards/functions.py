r"""Reward functions of a group of completions, and their weighted sum.

A reward function maps the completions of *one* problem to one number each, because some
rewards compare within the group. All are pure: the same group always gets the same rewards.
Each completion is graded once, before the functions see it. Every component is logged
apart; the sum

    total_i = Σ_k weight_k · reward_k(problem, group)_i

is what the advantages are made of. "accuracy" is always computed, also when it has no weight:
without it nobody can see that another component is being gamed.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanomath.config import did_you_mean
from nanomath.data.language import repeated_share
from nanomath.data.problem import Problem
from nanomath.rewards.equality import answers_equal
from nanomath.rewards.extraction import (
    REASONING_ENDS,
    after_reasoning,
    extract_answer,
    find_boxes,
)

_POSITIVE = ("max_length", "buffer", "ngram")
# Japanese and Chinese write no spaces between words: there, every character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Response:
    """What a reward sees of a completion.

    `length` counts tokens, `finished` says whether it ended before the limit. `correct` says
    whether it gives the gold answer, and `conclusion` is its text after the reasoning:
    `RewardSet` fills in these two.
    """

    text: str
    length: int
    finished: bool = True
    correct: bool = False
    conclusion: str = ""


RewardFunction = Callable[..., list[float]]


def is_correct(
    problem: Problem,
    text: str,
    lenient: bool = False,
    reasoning_ends: Sequence[str] = REASONING_ENDS,
) -> bool:
    """Return whether the completion `text` gives the gold answer, found as in `extract_answer`.

    ValueError if the problem has none.
    """
    answer = extract_answer(text, lenient=lenient, reasoning_ends=reasoning_ends)
    return is_right(problem, answer)


def is_right(problem: Problem, answer: str | None) -> bool:
    """Return whether an answer (None: there is none) is the gold one.

    ValueError if the problem has none.
    """
    if not problem.answer.strip():
        raise ValueError(
            f"problem {problem.id!r} has no gold answer: a missing gold answer is an error, "
            "never a reward"
        )
    return answer is not None and answers_equal(problem.answer, answer)


def accuracy(problem: Problem, completions: Sequence[Response]) -> list[float]:
    """Give 1 for the gold answer, 0 for any other and for none."""
    return [float(completion.correct) for completion in completions]


def format_reward(problem: Problem, completions: Sequence[Response]) -> list[float]:
    r"""Give 1 for exactly one non-empty `\boxed{}` that stands in the last paragraph, else 0.

    The box has its place after the reasoning: an answer that comes first, or a box for every
    intermediate result, is not the format.
    """
    return [
        float(_has_box_in_place(completion.conclusion)) for completion in completions
    ]


def _has_box_in_place(text: str) -> bool:
    boxes, cut = find_boxes(text)
    if cut or len(boxes) != 1 or not boxes[0].content:
        return False
    return re.search(r"\n\s*\n", text[boxes[0].end :].rstrip()) is None


def cosine(
    problem: Problem,
    completions: Sequence[Response],
    max_length: float = 30_000,
    right_short: float = 1.0,
    right_long: float = 0.1,
    wrong_short: float = -1.0,
    wrong_long: float = -0.1,
) -> list[float]:
    """Pay right answers less the longer they are, and take less for longer wrong ones (arXiv
    2502.03373; settings of 2507.08267).

    r = m + (M - m)/2 · (1 + cos(π · min(1, len / max_length))), len in characters, M the value
    at length 0 and m the value from max_length on: right 1.0 to 0.1, wrong -1.0 to -0.1. So
    the *shortest* wrong answer loses most: where the answer is not found yet, thinking on is
    worth while.
    """
    rewards = []
    for completion in completions:
        short = right_short if completion.correct else wrong_short
        long = right_long if completion.correct else wrong_long
        share = min(1.0, len(completion.text) / max_length)
        rewards.append(long + (short - long) / 2 * (1 + math.cos(math.pi * share)))
    return rewards


def group_length(problem: Problem, completions: Sequence[Response]) -> list[float]:
    """Pay for being shorter than the others of the group (Kimi 1.5, arXiv 2501.12599): λ for
    right, min(0, λ) for wrong.

    λ = 1/2 - (len - min len) / (max len - min len), len in tokens; 0 for all where all lengths
    are equal.
    """
    lengths = [completion.length for completion in completions]
    shortest = min(lengths)
    spread = max(lengths) - shortest
    if not spread:
        return [0.0] * len(completions)
    rewards = []
    for completion in completions:
        value = 0.5 - (completion.length - shortest) / spread
        rewards.append(value if completion.correct else min(0.0, value))
    return rewards


def overlong(
    problem: Problem,
    completions: Sequence[Response],
    max_length: float = 20_480,
    buffer: float = 4_096,
) -> list[float]:
    """Punish length as DAPO does (arXiv 2503.14476): -clamp((len - (L - c)) / c, 0, 1), len in
    tokens.
    """
    start = max_length - buffer
    return [
        -min(1.0, max(0.0, (completion.length - start) / buffer))
        for completion in completions
    ]


def repetition(
    problem: Problem,
    completions: Sequence[Response],
    ngram: float = 3,
    max_penalty: float = 1.0,
) -> list[float]:
    """Give -max_penalty · (1 - distinct n-grams / n-grams) of the words, in (-max_penalty, 0]
    (as in open-r1).
    """
    return [
        -max_penalty
        * repeated_share(_WORD.findall(completion.text.lower()), int(ngram))
        for completion in completions
    ]


def random_reward(
    problem: Problem,
    completions: Sequence[Response],
    seed: float = 0,
    probability: float = 0.5,
) -> list[float]:
    """Give 1 with the given probability whatever the answer, a fixed function of seed, problem
    and text: a control.

    Some models improve on benchmarks under it (arXiv 2506.10947); a gain that it matches shows
    nothing about a method.
    """
    rewards = []
    for completion in completions:
        key = f"{int(seed)}\0{problem.id}\0{completion.text}".encode(
            "utf-8", "surrogatepass"
        )
        draw = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
        rewards.append(float(draw < probability * 2**64))
    return rewards


REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "format": format_reward,
    "cosine": cosine,
    "group_length": group_length,
    "overlong": overlong,
    "repetition": repetition,
    "random": random_reward,
}


class RewardSet:
    """The weighted sum of named rewards: `reward_set(problem, completions)` gives a dict for
    each completion.

    `params` holds parameters by reward name; `lenient` and `reasoning_ends` say how answers are
    found, as in `extract_answer`. Each dict has all components by name, unweighted, and
    "total". ValueError for a name or parameter that does not exist.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        params: Mapping[str, Mapping[str, Any]] | None = None,
        lenient: bool = False,
        reasoning_ends: Sequence[str] = REASONING_ENDS,
    ):
        params = params or {}
        for name in [*weights, *params]:
            _check_known(name, REWARDS, "reward")
        self.weights = {"accuracy": 0.0, **weights}
        for name in params:
            if name not in self.weights:
                raise ValueError(
                    f"parameters for the reward {name!r}, which has no weight: give it one, "
                    "or drop them"
                )
        self.lenient = lenient
        self.reasoning_ends = tuple(reasoning_ends)
        self.functions = {
            name: _bind(name, params.get(name, {})) for name in self.weights
        }

    def __call__(
        self, problem: Problem, completions: Sequence[Response]
    ) -> list[dict[str, float]]:
        """Return one dict of components and "total" for each completion of the group.

        ValueError without a gold answer.
        """
        group = [
            Response(
                c.text,
                c.length,
                c.finished,
                is_correct(problem, c.text, self.lenient, self.reasoning_ends),
                after_reasoning(c.text, self.reasoning_ends),
            )
            for c in completions
        ]
        columns = [function(problem, group) for function in self.functions.values()]
        rows = []
        for values in zip(*columns, strict=True):
            row = dict(zip(self.functions, values, strict=True))
            total = sum(self.weights[name] * value for name, value in row.items())
            rows.append({**row, "total": total})
        return rows


def _bind(name: str, params: Mapping[str, Any]) -> RewardFunction:
    function = REWARDS[name]
    known = list(inspect.signature(function).parameters)[2:]
    for parameter, value in params.items():
        _check_known(parameter, known, f"parameter of the reward {name!r}")
        if parameter in _POSITIVE and not value > 0:
            raise ValueError(
                f"the parameter {parameter!r} of the reward {name!r} is {value}: it must be "
                "above 0"
            )
    return partial(function, **params)


def _check_known(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        names = (
            f"{did_you_mean(name, known)} known: {', '.join(known)}" if known else ""
        )
        raise ValueError(
            f"unknown {what}: {name!r}; {names.strip() or 'it takes none'}"
        )
