"""Ratios, and the sampler's correction by truncated and masked importance weights, against
their definitions.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import LENGTHS, each_token, new_batch, ratio_of

from nanomath.algorithms import RATIOS, SAMPLER_CORRECTIONS, sampler_correction


@pytest.mark.parametrize("junk", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["token", "sequence", "off"])
def test_ratios_are_logarithms_with_the_gradient_of_log_pi_and_1_outside_the_mask(
    kind, junk
):
    b = new_batch(0)
    new, old = (torch.where(b.mask, x, junk) for x in (b.new, b.old))
    found = RATIOS[kind](new.requires_grad_(), old, b.mask)
    found.sum().backward()
    expected = torch.zeros_like(b.new)
    for i, t in each_token(LENGTHS):
        rows = b.new[i, : LENGTHS[i]].tolist(), b.old[i, : LENGTHS[i]].tolist()
        expected[i, t] = math.log(ratio_of(kind, rows[0][t], *rows, t))
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)
    assert torch.equal(new.grad, b.mask.double())


@pytest.mark.parametrize("seed", range(3))
def test_truncated_and_masked_weights(seed):
    b = new_batch(seed)
    truncated, masked, off = (
        sampler_correction(b.old, b.sampled, b.mask, how, 0.7, 1.3)
        for how in ("truncate", "mask", "off")
    )
    assert torch.equal(off, torch.ones_like(b.old))
    for i, t in each_token(LENGTHS):
        weight = math.exp(float(b.old[i, t]) - float(b.sampled[i, t]))
        assert float(truncated[i, t]) == pytest.approx(min(weight, 1.3), abs=1e-12)
        assert float(masked[i, t]) == pytest.approx(
            weight if 0.7 <= weight <= 1.3 else 0, abs=1e-12
        )


def test_equal_logprobs_weigh_one_and_both_bounds_belong_to_the_range():
    old = torch.tensor([[0.0, 0.5, 2.0, 0.25, 4.0]]).clamp(min=0.1).log()
    sampled, mask = torch.zeros_like(old), torch.ones(1, 5, dtype=torch.bool)
    sampled[0, 0] = old[0, 0]
    found = sampler_correction(old, sampled, mask, "mask", math.exp(math.log(0.5)), 2.0)
    assert found[0].tolist() == pytest.approx([1.0, 0.5, 2.0, 0.0, 0.0])


@pytest.mark.parametrize("how", ["truncate", "mask", "off"])
def test_a_weight_has_no_gradient(how):
    b = new_batch(0)
    assert not sampler_correction(
        b.old.requires_grad_(), b.sampled, b.mask, how, 0.5, 2.0
    ).requires_grad


@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_a_sampler_that_is_far_off(gap):
    mask = torch.ones(1, 1, dtype=torch.bool)
    truncated, masked = (
        sampler_correction(
            torch.tensor([[gap]]), torch.zeros(1, 1), mask, how, 0.5, 2.0
        )
        for how in ("truncate", "mask")
    )
    assert truncated.item() == pytest.approx(2.0 if gap > 0 else 0.0, abs=1e-8)
    assert masked.item() == 0


def test_unknown_names_tell_the_choices():
    b = new_batch(0)
    with pytest.raises(
        ValueError,
        match="unknown sampler correction 'clip': choose one of truncate, mask, off$",
    ):
        sampler_correction(b.old, b.sampled, b.mask, "clip", 0.5, 2.0)
    assert set(SAMPLER_CORRECTIONS) == {"truncate", "mask"}
