"""Which completions and tokens count, and what makes up for a sampler that rounds otherwise. Plain
GRPO needs none of it. All matrices are [B, T]: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .losses import check_name, token_log_ratio

ROUNDING = 1e-5  # of the largest value: float32's error of a logprob or an entropy


def overlong_filter(mask: Tensor, finished: Tensor) -> Tensor:
    """Return the mask without completions that were cut off; finished is bool [B] (DAPO,
    section 3.4).

    A completion cut off at the length limit may have been right so far: its reward says
    nothing.
    """
    return mask & finished[:, None]


def top_entropy(entropies: Tensor, mask: Tensor, share: float) -> Tensor:
    """Mark the `share` of the masked tokens with the highest entropies ("80/20", arXiv
    2506.01939).
    """
    return _top(entropies, mask, share)


def top_covariance(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, share: float
) -> Tensor:
    """Mark the `share` of the masked tokens with the highest (A - mean A) (log pi - mean
    log pi).

    Their updates take most of the entropy away: Clip-Cov drops their gradient, KL-Cov holds
    them back by |log pi - log pi_old| (arXiv 2505.22617). The authors' Clip-Cov draws its
    tokens at random from those with a covariance between 1 and 5; we take the highest,
    which needs no random numbers.
    """
    if not mask.any():
        return mask
    covariance = (advantages - advantages[mask].mean()) * (
        logprobs - logprobs[mask].mean()
    )
    return _top(covariance, mask, share) & (covariance > 0)


def _top(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """Mark the round(share n) highest of n masked values, at least one, and all that equal
    the last.

    The first tokens of one prompt's samples have one entropy: were some of them chosen and
    others not, rounding, and so the way a batch is cut, would decide. Hence equal up to
    rounding. A share of 0 selects nothing.
    """
    masked = values[mask]
    if not len(masked) or share <= 0:
        return torch.zeros_like(mask)
    last = masked.topk(max(1, round(share * len(masked)))).values[-1]
    return mask & (values >= last - ROUNDING * masked.abs().max())


def truncated_weights(weights: Tensor, low: float, high: float) -> Tensor:
    """Return min(w, high): truncated importance sampling (TIS, Yao et al. 2025)."""
    return weights.clamp(max=high)


def masked_weights(weights: Tensor, low: float, high: float) -> Tensor:
    """Return w where low <= w <= high, 0 elsewhere: masked importance sampling (MIS)."""
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


SAMPLER_CORRECTIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "truncate": truncated_weights,
    "mask": masked_weights,
}


def sampler_correction(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    how: str,
    low: float,
    high: float,
) -> Tensor:
    """Return weights [B, T] that correct for a sampler whose probabilities are not the
    trainer's.

    They are pi_old(trainer) / pi(sampler), without gradient, bounded by
    SAMPLER_CORRECTIONS[how] (off: 1), and multiply each token's policy loss.
    `sampler_logprobs` are those of the distribution that was drawn from.
    """
    if how == "off":
        return torch.ones_like(old_logprobs)
    check_name("sampler correction", how, (*SAMPLER_CORRECTIONS, "off"))
    weights = token_log_ratio(old_logprobs, sampler_logprobs, mask).detach().exp()
    return SAMPLER_CORRECTIONS[how](weights, low, high)
