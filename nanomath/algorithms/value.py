"""Values: generalised advantage estimation (arXiv 1506.02438) and PPO's clipped value loss.

delta_t = r_t + gamma V_{t+1} - V_t
A_t = sum_k (gamma lambda)^k delta_{t+k},    return_t = A_t + V_t
L = sum w 1/2 max((V - return)^2, (V_old + clip(V - V_old, -c, c) - return)^2)
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns [B, T] from rewards and values [B, T].

    mask, bool [B, T], is True up to the last token. With values of 0 and lambda 1 the
    advantages are the discounted rewards to go.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    later_advantage = torch.zeros_like(values[:, 0])
    later_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        advantages[:, t] = later_advantage = delta + gamma * lam * later_advantage
        later_value = values[:, t]
    return advantages, advantages + values


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    clip: float = 0.2,
) -> Tensor:
    """Return the scalar loss of values [B, T] against returns [B, T].

    clip bounds how far one rollout may move a value.
    """
    weighted = weights != 0
    values, old_values, returns = (
        torch.where(weighted, x, 0.0) for x in (values, old_values, returns)
    )
    near = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (near - returns).square())
    return (weights * worse).sum() / 2


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - var(return - V) / var(return) over the masked tokens: 1 perfect, 0 no
    better than a constant.

    It is 0, and not NaN, where the returns do not vary.
    """
    values = values[mask]
    returns = returns[mask]
    if returns.numel() < 2 or (returns == returns[0]).all():
        return 0.0
    return float(1 - (returns - values).var() / returns.var())
