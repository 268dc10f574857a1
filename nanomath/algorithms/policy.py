"""The policy-gradient loss of a batch of tokens,  L = - sum_{i,t} w_{i,t} gain_{i,t}.

    ppo    min(rho A, clip(rho, 1 - low, 1 + high) A)             PPO, arXiv 1707.06347; high > low: DAPO's clip-higher
    dual   the same, but at least c A where A < 0                  dual-clip PPO, arXiv 1912.09729
    cispo  sg(clip(rho, 1 - low, 1 + high)) A log pi               CISPO, MiniMax-M1, arXiv 2506.13585
    off    rho A                                                   no clipping; with ratio "off" it is REINFORCE

rho is the ratio of `ratio.py`, A the advantage, w the weights of `aggregation.py`. [B, T]
throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .names import unknown
from .ratio import RATIOS


def ppo_gain(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float
) -> Tensor:
    """Pessimistic: no gain from moving the ratio out of [1 - low, 1 + high]."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def dual_gain(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float
) -> Tensor:
    """PPO's, bounded below by dual * A where A < 0: a token that became far likelier is not
    pushed without end.
    """
    gain = ppo_gain(ratio, logprobs, advantages, low, high, dual)
    return torch.where(advantages < 0, torch.maximum(gain, dual * advantages), gain)


def cispo_gain(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float
) -> Tensor:
    """Every token keeps its gradient, with a bounded weight."""
    return ratio.detach().clamp(1 - low, 1 + high) * advantages * logprobs


def plain_gain(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float
) -> Tensor:
    """The importance-weighted advantage as it is."""
    return ratio * advantages


CLIPS: dict[str, Callable[..., Tensor]] = {
    "ppo": ppo_gain,
    "dual": dual_gain,
    "cispo": cispo_gain,
    "off": plain_gain,
}


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    ratio: str = "token",
    clip: str = "ppo",
    dual_clip: float = 3.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss, and the [B, T] masks `clipped_low` and `clipped_high` of the tokens whose
    ratio has left the clip range in the direction in which their advantage pushes (with "ppo"
    these have no gradient).

    logprobs, old_logprobs, weights: [B, T]; advantages: [B] or [B, T]; mask: the response
    tokens, where it differs from weights != 0 (a sequence's ratio is a mean over all of them).
    What is outside the mask never counts, whatever it holds; tokens of weight 0 inside it only
    through the ratio of their sequence.
    """
    for axis, name, known in (("ratio", ratio, RATIOS), ("clip", clip, CLIPS)):
        if name not in known:
            raise unknown(axis, name, known)
    weighted = weights != 0
    mask = weighted if mask is None else mask
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    logprobs = torch.where(mask, logprobs, 0.0)
    advantages = torch.where(weighted, advantages, 0.0)
    rho = RATIOS[ratio](logprobs, old_logprobs, mask).exp()
    gain = CLIPS[clip](rho, logprobs, advantages, clip_low, clip_high, dual_clip)
    clipped = {
        "clipped_low": (advantages < 0) & (rho < 1 - clip_low),
        "clipped_high": (advantages > 0) & (rho > 1 + clip_high),
    }
    return -(weights * gain).sum(), clipped
