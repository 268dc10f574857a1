"""Estimates of KL(pi || pi_ref) from tokens drawn from pi (Schulman's "Approximating KL divergence", 2020).

With x = log pi - log pi_ref:   k1 = x     k2 = x^2 / 2     k3 = exp(-x) - 1 + x

k1 and k3 are unbiased in value; k3 is never negative. As a loss term their gradients differ (arXiv 2510.01555): k2's
expectation is the gradient of the reverse KL, k3's that of the forward KL, k1's is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Estimate per token, same shape as the two logprobs."""
    x = logprobs - ref_logprobs
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"unknown KL estimator {kind!r}: choose one of {', '.join(ESTIMATORS)}")
