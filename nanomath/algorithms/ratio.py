"""The importance ratio of the policy to the one that sampled, as a logarithm, and the
correction for a sampler that computes other probabilities than the trainer.

    token     rho_t = pi(o_t) / pi_old(o_t)                              PPO, arXiv 1707.06347; GRPO, arXiv 2402.03300
    sequence  s_t = sg(exp(mean_t log rho_t)) pi(o_t) / sg(pi(o_t))      GSPO, arXiv 2507.18071, its token form
    off       1_t = pi(o_t) / sg(pi(o_t))                                REINFORCE, RLOO

All three have the gradient (ratio) d log pi(o_t). GSPO's token form has the value and,
wherever the advantage and the weight are the same for all tokens of a sequence, the gradient
of exp(mean_t log rho_t); unlike that it also takes advantages that differ within a sequence.
[B, T] throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .names import unknown

# exp(20) is 5e8: a token so far off carries no information. Beyond, the ratio is held and its
# gradient is 0, because exp of more than 88 is infinite in float32, and infinity times a zero
# gradient is NaN.
LIMIT = 20.0


def token_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log rho_t, 0 outside the mask."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-LIMIT, LIMIT)


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """mean_t log rho_t at every token of the sequence, with the gradient of that token's log
    pi; 0 outside the mask.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).detach()
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(
        mask, mean.clamp(-LIMIT, LIMIT) + (logprobs - logprobs.detach()), 0.0
    )  # not mean + log pi first


def no_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """0, with the gradient of log pi."""
    return torch.where(mask, logprobs - logprobs.detach(), 0.0)


RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": token_log_ratio,
    "sequence": sequence_log_ratio,
    "off": no_log_ratio,
}


def truncated_weights(weights: Tensor, low: float, high: float) -> Tensor:
    """min(w, high): truncated importance sampling (TIS, Yao et al. 2025, "Your efficient RL
    framework ...").
    """
    return weights.clamp(max=high)


def masked_weights(weights: Tensor, low: float, high: float) -> Tensor:
    """w where low <= w <= high, 0 elsewhere: masked importance sampling (MIS)."""
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
    """Weights [B, T]: pi_old(trainer) / pi(sampler), without gradient, bounded by
    SAMPLER_CORRECTIONS[how]; off: 1.

    They multiply each token's policy loss. `sampler_logprobs` are those of the distribution
    that was drawn from.
    """
    if how == "off":
        return torch.ones_like(old_logprobs)
    if how not in SAMPLER_CORRECTIONS:
        raise unknown("sampler correction", how, (*SAMPLER_CORRECTIONS, "off"))
    return SAMPLER_CORRECTIONS[how](
        token_log_ratio(old_logprobs, sampler_logprobs, mask).detach().exp(), low, high
    )
