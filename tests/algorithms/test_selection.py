"""Selected completions and tokens against sorting in a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import each_token, mean, new_batch

from nanomath.algorithms import (
    overlong_filter,
    response_mask,
    top_covariance,
    top_entropy,
)

quick = settings(max_examples=40, deadline=None)
shares = st.sampled_from([0.0, 2e-4, 0.2, 0.5, 0.75, 1.0])
some_lengths = st.lists(st.integers(0, 6), min_size=1, max_size=4)


def highest(scores: dict[tuple[int, int], float], share: float) -> set[tuple[int, int]]:
    """The round(share n) highest, at least one of a share above 0, and all that equal the last
    of them.
    """
    count = max(1, round(share * len(scores))) if share > 0 else 0
    chosen = sorted(scores.values(), reverse=True)[:count]
    size = max(map(abs, scores.values()), default=0)
    return {
        token
        for token, score in scores.items()
        if chosen and score >= chosen[-1] - 1e-5 * size
    }


def tokens_of(mask: torch.Tensor) -> set[tuple[int, int]]:
    return {(i, t) for i, t in mask.nonzero().tolist()}


@quick
@given(st.integers(0, 10**6), some_lengths, shares, st.booleans())
def test_top_entropy_is_the_head_of_the_sorted_tokens(seed, lengths, share, ties):
    b = new_batch(seed, lengths)
    entropies = b.values.round() if ties else b.values
    scores = {(i, t): float(entropies[i, t]) for i, t in each_token(lengths)}
    assert tokens_of(top_entropy(entropies, b.mask, share)) == highest(scores, share)


@quick
@given(st.integers(0, 10**6), some_lengths, shares)
def test_top_covariance_is_the_head_of_the_sorted_tokens(seed, lengths, share):
    b, tokens = new_batch(seed, lengths), each_token(lengths)
    found = top_covariance(b.new, b.advantages, b.mask, share)
    scores = {}
    if tokens:
        logprob, advantage = (
            mean([float(x[i, t]) for i, t in tokens]) for x in (b.new, b.advantages)
        )
        scores = {
            (i, t): (float(b.advantages[i, t]) - advantage)
            * (float(b.new[i, t]) - logprob)
            for i, t in tokens
        }
    assert tokens_of(found) == {
        token for token in highest(scores, share) if scores[token] > 0
    }


def test_the_whole_share_is_the_whole_mask():
    b = new_batch(0)
    assert torch.equal(top_entropy(b.values, b.mask, 1.0), b.mask)


def test_tokens_that_are_equal_up_to_rounding_are_chosen_together():
    """As the first tokens of one prompt's samples are, whose entropies differ by what the
    batch rounds them to.
    """
    entropies = torch.tensor(
        [[3.0, 1.0, 0.5], [2.0 + 1e-6, 0.2, 0.1], [2.0 - 1e-6, 1.9, 0.3]]
    )
    found = top_entropy(entropies, torch.ones(3, 3, dtype=torch.bool), 2 / 9)
    assert found.tolist() == [
        [True, False, False],
        [True, False, False],
        [True, False, False],
    ]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_what_is_rounding_depends_on_the_size_of_the_values(size):
    values = size * torch.tensor(
        [[3.0, 2.0 + 1e-6, 2.0 - 1e-6, 1.999]], dtype=torch.float64
    )
    found = top_entropy(values, torch.ones(1, 4, dtype=torch.bool), 0.5)
    assert found.tolist() == [[True, True, True, False]]


def test_entropies_of_zero_are_equal_too():
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert top_entropy(torch.zeros(1, 4), mask, 0.5).all()


def test_without_spread_no_token_has_a_high_covariance():
    logprobs, mask = (
        torch.tensor([[-0.1, -5.0, -2.5]]),
        torch.ones(1, 3, dtype=torch.bool),
    )
    assert not top_covariance(logprobs, torch.full((1, 3), 0.7), mask, 0.5).any()
    assert not top_covariance(torch.full((1, 3), -0.7), logprobs, mask, 0.5).any()


def test_a_token_surer_and_better_than_others_has_a_high_covariance():
    logprobs, advantages = (
        torch.tensor([[-0.1, -5.0, -2.5, -2.4]]),
        torch.tensor([[2.0, 2.0, 0.1, 0.0]]),
    )
    found = top_covariance(
        logprobs, advantages, torch.ones(1, 4, dtype=torch.bool), 0.25
    )
    assert found.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize(
    "finished", [[True, True, True], [True, False, True], [False, False, False]]
)
def test_overlong_filter_drops_whole_completions(finished):
    lengths = [2, 4, 0]
    found = overlong_filter(
        response_mask(torch.tensor(lengths)), torch.tensor(finished)
    )
    assert found.tolist() == [
        [t < n and whole for t in range(4)]
        for n, whole in zip(lengths, finished, strict=True)
    ]


def test_selecting_has_no_gradient():
    b = new_batch(0)
    assert not top_entropy(b.values.requires_grad_(), b.mask, 0.5).requires_grad
    assert not top_covariance(
        b.new.requires_grad_(), b.advantages, b.mask, 0.5
    ).requires_grad
