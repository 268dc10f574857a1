"""Values: generalised advantage estimation (arXiv 1506.02438) and PPO's clipped value loss.

delta_t = r_t + gamma V_{t+1} - V_t
A_t = sum_k (gamma lambda)^k delta_{t+k},    return_t = A_t + V_t
L = sum w 1/2 max((V - return)^2, (V_old + clip(V - V_old, -c, c) - return)^2)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .advantages import Rewards
from .credit import on_tokens
from .losses import Choices, Tokens


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


def value_objective(a: Choices, values: Tensor, tokens: Tokens) -> Tensor:
    """Return the share of the value model's loss of some rows, from its values [B, T]."""
    loss = value_loss(
        values, tokens.values, tokens.returns, tokens.weights, a.value_clip
    )
    return a.value_coef * loss


def token_advantages(
    a: Choices, token_rewards: Tensor, rewards: Rewards, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Return each token's advantage, from the value model or the rewards to go; and the
    returns. The rewards of steps are added to those of tokens [B, T].
    """
    if rewards.steps is not None:
        of_steps = on_tokens(rewards.steps, rewards.step_ends, token_rewards.shape[1])
        token_rewards = token_rewards + rewards.step_weight * of_steps
    values, lam = tokens.values, a.lam
    if values is None:
        values, lam = torch.zeros_like(token_rewards), 1.0
    return gae(token_rewards, values, tokens.mask, a.gamma, lam)
