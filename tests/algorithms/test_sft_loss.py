"""The SFT losses against a double loop, the stop gradient of DFT, and NEFTune's noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from nanomath.algorithms import loss_weights, neftune_noise, response_mask, sft_loss


def case(seed: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = pad(response_mask(torch.tensor(lengths)), (0, 1))
    logprobs = (
        -torch.rand(
            mask.shape,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        * 5
    )
    return logprobs, loss_weights(mask, "token").double()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.booleans(),
)
def test_value_and_gradient(seed, lengths, dft):
    logprobs, weights = case(seed, lengths)
    kept = logprobs.clone(), weights.clone()
    loss = sft_loss(logprobs.requires_grad_(), weights, dft)
    loss.backward()
    total, gradient = 0.0, torch.zeros_like(logprobs)
    for i, n in enumerate(lengths):
        for t in range(n):
            scale = math.exp(kept[0][i, t]) if dft else 1.0
            total -= float(weights[i, t]) * scale * float(kept[0][i, t])
            gradient[i, t] = -float(weights[i, t]) * scale
    assert float(loss.detach()) == pytest.approx(total, abs=1e-10)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=0, atol=1e-10)
    assert torch.equal(logprobs.detach(), kept[0]) and torch.equal(weights, kept[1])


def test_gradient_is_the_derivative():
    logprobs, weights = case(1, [3, 0, 5])
    assert torch.autograd.gradcheck(
        lambda x: sft_loss(x, weights), logprobs.requires_grad_()
    )


@pytest.mark.parametrize("dft", [False, True])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_tokens_without_weight_never_count(junk, dft):
    logprobs, weights = case(5, [2, 4, 0])
    clean = logprobs.clone().requires_grad_()
    sft_loss(clean, weights, dft).backward()
    logprobs[weights == 0] = junk
    loss = sft_loss(logprobs.requires_grad_(), weights, dft)
    loss.backward()
    assert torch.equal(logprobs.grad, clean.grad) and loss.isfinite()


def test_neftune_noise_is_uniform_and_scaled_by_length():
    lengths, width, dim, alpha = torch.tensor([4, 100]), 100, 64, 5.0
    noise = neftune_noise(lengths, width, dim, alpha, torch.Generator().manual_seed(0))
    again = neftune_noise(lengths, width, dim, alpha, torch.Generator().manual_seed(0))
    assert noise.shape == (2, width, dim) and torch.equal(noise, again)
    for row, length in zip(noise, lengths.tolist(), strict=True):
        bound = alpha / math.sqrt(length * dim)
        assert 0.99 * bound < float(row.abs().max()) <= bound
        assert float(row.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert abs(float(row.mean())) < 0.03 * bound
