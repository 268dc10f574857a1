"""Masks from lengths, and weights against loops over the three conventions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.algorithms import loss_weights, response_mask

some_lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(some_lengths, st.integers(0, 3))
def test_mask_counts_the_first_tokens(lengths, extra):
    width = max(lengths) + extra
    mask = response_mask(torch.tensor(lengths), width)
    assert mask.tolist() == [[t < n for t in range(width)] for n in lengths]
    assert torch.equal(response_mask(torch.tensor(lengths)), mask[:, : max(lengths)])


@settings(max_examples=60, deadline=None)
@given(some_lengths, st.sampled_from(["token", "sequence", "constant"]))
def test_weights_are_their_definition(lengths, how):
    mask = response_mask(torch.tensor(lengths), max(lengths) + 1)
    before = mask.clone()
    weights = loss_weights(mask, how, max_length=9)
    for i, n in enumerate(lengths):
        one = {"token": sum(lengths), "sequence": len(lengths) * n, "constant": len(lengths) * 9}[how]
        expected = [1 / one if t < n else 0.0 for t in range(mask.shape[1])]
        assert weights[i].tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_empty_responses_weigh_nothing(how):
    assert torch.equal(loss_weights(torch.zeros(3, 2, dtype=torch.bool), how, 4), torch.zeros(3, 2))


def test_mistakes_are_named():
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="maximum length: 0"):
        loss_weights(mask, "constant")
    with pytest.raises(ValueError, match="token, sequence, constant"):
        loss_weights(mask, "mean")
