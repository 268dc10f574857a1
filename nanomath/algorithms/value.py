"""Generalised advantage estimation (arXiv 1506.02438).

delta_t = r_t + gamma V_{t+1} - V_t,    A_t = sum_k (gamma lambda)^k delta_{t+k},    return_t = A_t + V_t
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] from rewards and values [B, T]; mask, bool [B, T], is True up to the last token."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    later_advantage = torch.zeros_like(values[:, 0])
    later_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * later_value - values[:, t]
        advantages[:, t] = later_advantage = delta + gamma * lam * later_advantage
        later_value = values[:, t]
    return advantages, advantages + values
