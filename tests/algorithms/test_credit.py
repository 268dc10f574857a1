"""Credit against the papers' formulas written out step by step, and the properties that each
form is there for.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.algorithms import (
    CREDITS,
    credit,
    on_tokens,
    process_advantages,
    to_go,
    token_baseline_advantages,
)

quick = settings(max_examples=60, deadline=None)
solutions = st.lists(st.lists(st.floats(0, 1), max_size=5), min_size=1, max_size=4)
T, ETA = 0.1, 0.4


def plain(form: str, p: list[float]) -> list[float]:
    """The rewards of one solution's steps."""
    n = len(p)
    if form == "clip_delta":
        return plain("delta", plain("clip", p))
    if form == "sum":
        return p
    if form == "min":
        s = [2 * x - 1 for x in p]
        total = sum(math.exp(-x / T) for x in s)
        return [math.exp(-x / T) / total * x for x in s]
    if form == "clip":
        return [min(x - ETA, 0.0) for x in p]
    if form == "delta":
        return [
            p[k] - p[k + 1] if k < n - 2 else p[k] if k == n - 2 else 0.0
            for k in range(n)
        ]
    return [0.0] * (n - 1) + [p[-1] if form == "last" else math.prod(p)] if n else []


def matrices(
    rows: list[list[float]], gap: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [B, S] with junk where there is no step, and step ends; each step has `gap`
    tokens.
    """
    width = max(1, *map(len, rows))
    scores = torch.tensor(
        [row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64
    )
    ends = [
        [gap * (k + 1) - 1 if k < len(row) else -1 for k in range(width)]
        for row in rows
    ]
    return scores, torch.tensor(ends)


@pytest.mark.parametrize("form", CREDITS)
@quick
@given(solutions, st.integers(1, 2))
def test_credit_is_its_definition(form, rows, gap):
    scores, ends = matrices(rows, gap)
    found = credit(scores, ends, form, T, ETA)
    for row, rewards in zip(rows, found.tolist(), strict=True):
        expected = plain(form, row)
        assert rewards == pytest.approx(
            expected + [0.0] * (scores.shape[1] - len(row)), abs=1e-12
        )


def test_the_forms():
    assert set(CREDITS) == {
        "sum",
        "min",
        "last",
        "product",
        "clip",
        "delta",
        "clip_delta",
    }


def test_the_defaults_are_pure():
    scores, ends = matrices([[0.1, 0.9, 0.4]])
    assert torch.equal(credit(scores, ends), credit(scores, ends, "min", 0.1, 0.5))
    assert torch.equal(
        credit(scores, ends, "clip"), credit(scores, ends, "clip", 0.1, 0.5)
    )


def test_the_changes_names():
    with pytest.raises(
        ValueError, match="unknown credit 'minimum': choose one of sum, min"
    ):
        credit(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), "minimum")


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_what_a_whole_solution_earns(p):
    """The sum grows with every step; the minimum is bounded by its scores; the returns of
    delta are the scores.
    """
    scores, ends = matrices([p])
    whole = {
        form: float(credit(scores, ends, form, 0.01, ETA).sum()) for form in CREDITS
    }
    assert whole["sum"] == pytest.approx(math.fsum(p))
    assert 2 * min(p) - 1 - 1e-9 <= whole["min"] <= 2 * min(p) - 1 + 0.01 * len(p)
    assert whole["clip"] <= 0
    returns = to_go(credit(scores, ends, "delta"))[0]
    assert returns.tolist() == pytest.approx([*p[:-1], 0.0])


@pytest.mark.parametrize("form", CREDITS)
def test_an_added_step_of_middling_score(form):
    """Padding pays under the sum alone."""
    short, padded = matrices([[0.9, 0.6]]), matrices([[0.9, 0.6, 0.6]])
    before, after = (float(credit(*m, form, T, 0.4).sum()) for m in (short, padded))
    assert (after > before + 1e-9) == (form == "sum")


def test_on_tokens_and_to_go():
    rewards, ends = (
        torch.tensor([[1.0, 2.0], [4.0, math.nan]]),
        torch.tensor([[0, 3], [2, -1]]),
    )
    placed = on_tokens(rewards, ends, 4)
    assert placed.tolist() == [[1, 0, 0, 2], [0, 0, 4, 0]]
    assert to_go(placed).tolist() == [[3, 2, 2, 2], [4, 4, 4, 0]]


@quick
@given(
    st.lists(st.lists(st.floats(-1, 1), max_size=4), min_size=2, max_size=4),
    st.integers(1, 3),
)
def test_the_baseline_is_what_others_earn_a_token(rows, gap):
    rewards, ends = matrices(rows, gap)
    lengths = [max(1, gap * len(row)) for row in rows]
    found = token_baseline_advantages(
        rewards, ends, torch.tensor(lengths), max(lengths)
    )
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        each = sum(sum(rows[j]) for j in others) / sum(lengths[j] for j in others)
        for t in range(max(lengths)):
            expected = sum(
                r - each * gap for k, r in enumerate(row) if gap * (k + 1) - 1 >= t
            )
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-12)


def test_a_mean_per_token_does_not_favour_few_steps():
    """The same rewards and lengths, cut into one step or four: against a mean per step, one
    step would look better.
    """
    rewards = torch.tensor([[0.4, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]])
    ends, lengths = torch.tensor([[7, -1, -1, -1], [1, 3, 5, 7]]), torch.tensor([8, 8])
    found = token_baseline_advantages(rewards, ends, lengths, 8)
    torch.testing.assert_close(found[:, 0], torch.zeros(2), rtol=0, atol=1e-7)


def test_the_baseline_of_a_single_token():
    rewards, ends = torch.tensor([[0.5], [0.2]]), torch.tensor([[0], [0]])
    found = token_baseline_advantages(rewards, ends, torch.tensor([1, 1]), 1)
    torch.testing.assert_close(found, torch.tensor([[0.3], [-0.3]]))


def test_a_lone_solution_has_no_baseline():
    found = token_baseline_advantages(
        torch.ones(1, 1), torch.tensor([[1]]), torch.tensor([3]), 3
    )
    assert found.tolist() == [[1, 1, 0]]


def test_inputs_stay_as_they_are():
    scores, ends = matrices([[0.5, 0.2], [0.1]])
    kept = scores.clone(), ends.clone()
    for form in CREDITS:
        credit(scores, ends, form)
    (
        process_advantages(scores, ends, 5),
        token_baseline_advantages(scores, ends, torch.tensor([4, 2]), 5),
    )
    torch.testing.assert_close((scores, ends), kept, rtol=0, atol=0, equal_nan=True)
