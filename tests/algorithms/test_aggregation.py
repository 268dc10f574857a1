"""Masks from lengths, and weights against loops over the three conventions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import weight_of
from torch.nn.functional import pad

from nanomath.algorithms import AGGREGATIONS, loss_weights, response_mask

some_lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6)
NAMES = ["token", "sequence", "constant", "sum"]


@settings(max_examples=60, deadline=None)
@given(some_lengths)
def test_mask_counts_the_first_tokens(lengths):
    mask = response_mask(torch.tensor(lengths))
    assert mask.tolist() == [[t < n for t in range(max(lengths))] for n in lengths]


@settings(max_examples=60, deadline=None)
@given(some_lengths, st.sampled_from(NAMES))
def test_weights_are_their_definition(lengths, how):
    mask = pad(response_mask(torch.tensor(lengths)), (0, 1))
    weights = loss_weights(mask, how, max_length=9)
    assert weights.dtype == torch.float64
    for i, n in enumerate(lengths):
        expected = [
            weight_of(how, lengths, i, 9) if t < n else 0.0
            for t in range(mask.shape[1])
        ]
        assert weights[i].tolist() == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize("how", NAMES)
def test_empty_responses_weigh_nothing(how):
    assert torch.equal(
        loss_weights(torch.zeros(3, 2, dtype=torch.bool), how, 4),
        torch.zeros(3, 2).double(),
    )


@pytest.mark.parametrize("how", NAMES)
def test_any_mask_will_do(how):
    """A selection has holes: weights count what is selected."""
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = {
        "token": [1 / 3] * 3,
        "sequence": [0.25, 0.25, 0.5],
        "constant": [1 / 8] * 3,
        "sum": [1 / 2] * 3,
    }[how]
    assert loss_weights(mask, how, 4)[mask].tolist() == pytest.approx(expected)


def test_mistakes_are_named():
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length in (0, -1):
        with pytest.raises(
            ValueError, match=f"maximum length: {length} is not positive"
        ):
            loss_weights(mask, "constant", length)
    with pytest.raises(ValueError, match="maximum length: 0"):
        loss_weights(mask, "constant")
    assert float(loss_weights(mask, "constant", 1)) == 1.0
    with pytest.raises(
        ValueError,
        match="unknown aggregation 'mean': choose one of token, sequence, constant, sum",
    ):
        loss_weights(mask, "mean")
    assert list(AGGREGATIONS) == NAMES
