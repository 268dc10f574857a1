"""The clipped policy-gradient loss (PPO, arXiv 1707.06347; as GRPO uses it, arXiv 2402.03300).

    rho_t = pi(o_t) / pi_old(o_t),   L = - sum w min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)

A wider upper range (eps_high > eps_low) is DAPO's clip-higher, arXiv 2503.14476.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss, and the [B, T] masks `clipped_low` and `clipped_high` of the tokens that lost their gradient.

    logprobs, old_logprobs, weights: [B, T]; advantages: [B] or [B, T]. Tokens with weight 0 never count, whatever
    their logprobs hold.
    """
    counted = weights != 0
    advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).expand_as(logprobs)
    log_ratio = torch.where(counted, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    stats = {
        "clipped_low": counted & (advantages < 0) & (ratio < 1 - clip_low),
        "clipped_high": counted & (advantages > 0) & (ratio > 1 + clip_high),
    }
    return -(weights * surrogate).sum(), stats
