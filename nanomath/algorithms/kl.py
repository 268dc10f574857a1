"""Estimates of KL(pi || pi_ref) from tokens drawn from pi (Schulman, "Approximating KL
divergence", 2020).

With x = log pi - log pi_ref:   k1 = x     k2 = x^2 / 2     k3 = exp(-x) - 1 + x     k3+ = k3's value, k2's gradient

k1 and k3 are unbiased in value, and k3 is never negative. Where an estimate stands decides what it does (arXiv
2510.01555, 2512.21852; tests/algorithms shows all of this by enumeration):

    in the reward   k1 gives the gradient of the KL (if advantages are not divided by a spread); the others do not
    in the loss     k2 and k3+ give it token by token; k3 gives the gradient of the *forward* KL(pi_ref || pi), k1 none

Tokens drawn from an older pi_old are carried over to pi by the ratio rho = pi / pi_old, either
as a weight ("weight") or with its gradient ("ratio"). With the gradient, k1 and k3 in the loss
give the gradient of the KL as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .names import unknown
from .ratio import LIMIT, token_log_ratio


def k1(x: Tensor) -> Tensor:
    """x."""
    return x


def k2(x: Tensor) -> Tensor:
    """x^2 / 2."""
    return x.square() / 2


def k3(x: Tensor) -> Tensor:
    """exp(-x) - 1 + x, continued as a straight line below -LIMIT, where exp would overflow."""
    y = (-x).clamp(max=LIMIT)
    return y.expm1() + y.exp() * (-x - y) + x


def k3_plus(x: Tensor) -> Tensor:
    """k3's value with k2's gradient."""
    return k2(x) + (k3(x) - k2(x)).detach()


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3+": k3_plus,
}
KL_CORRECTIONS = ("off", "weight", "ratio")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Estimate per token, same shape as the two logprobs."""
    if kind not in KL_ESTIMATORS:
        raise unknown("KL estimator", kind, KL_ESTIMATORS)
    return KL_ESTIMATORS[kind](logprobs - ref_logprobs)


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor,
    weights: Tensor,
    kind: str = "k3",
    correction: str = "off",
) -> Tensor:
    """sum w rho KL, rho being 1 ("off"), pi / pi_old without gradient ("weight") or with it
    ("ratio"). All [B, T].
    """
    if correction not in KL_CORRECTIONS:
        raise unknown("KL correction", correction, KL_CORRECTIONS)
    weighted = weights != 0
    kl = kl_estimate(
        torch.where(weighted, logprobs, 0.0), torch.where(weighted, ref_logprobs, 0.0), kind
    )
    if correction == "off":
        return (weights * kl).sum()
    rho = token_log_ratio(logprobs, old_logprobs, weighted).exp()
    return (weights * (rho if correction == "ratio" else rho.detach()) * kl).sum()
