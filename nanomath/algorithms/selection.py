"""Which completions and which tokens carry the policy gradient. Masks, bool [B, T]; none of
these has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-5  # of the largest value: float32's error of a logprob or an entropy


def overlong_filter(mask: Tensor, finished: Tensor) -> Tensor:
    """The mask without the completions that were cut off: finished, bool [B] (DAPO, arXiv
    2503.14476, section 3.4).

    A completion cut off at the length limit may have been right so far: its reward says
    nothing.
    """
    return mask & finished[:, None]


def top_entropy(entropies: Tensor, mask: Tensor, share: float) -> Tensor:
    """The `share` of the masked tokens with the highest entropies [B, T] ("80/20", arXiv
    2506.01939: 0.2).
    """
    return _top(entropies, mask, share)


def top_covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor, share: float) -> Tensor:
    """The `share` of the masked tokens with the highest (A - mean A) (log pi - mean log pi)
    (arXiv 2505.22617).

    Their updates take most of the entropy away: Clip-Cov drops their gradient, KL-Cov holds them back by
    |log pi - log pi_old|. The authors' Clip-Cov draws its tokens at random from those with a covariance between 1 and
    5; we take the highest, which needs no random numbers. logprobs and advantages [B, T].
    """
    if not mask.any():
        return mask
    covariance = (advantages - advantages[mask].mean()) * (logprobs - logprobs[mask].mean())
    return _top(covariance, mask, share) & (covariance > 0)


def _top(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """The round(share n) highest of the n masked values, at least one of a share above 0, and
    what equals the last.

    The first tokens of one prompt's samples have one entropy: were some of them chosen and
    others not, rounding, and so the way a batch is cut, would decide. Hence equal up to
    rounding.
    """
    masked = values[mask]
    if not len(masked) or share <= 0:
        return torch.zeros_like(mask)
    last = masked.topk(max(1, round(share * len(masked)))).values[-1]
    return mask & (values >= last - ROUNDING * masked.abs().max())
