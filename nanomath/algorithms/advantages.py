"""Advantages from rewards, without a value model.

    group     A_i = (r_i - mean r) / (std r + eps)          GRPO, arXiv 2402.03300
    none      A_i =  r_i - mean r                           Dr. GRPO, arXiv 2503.20783
    batch     A_i = (r_i - mean r) / (std of all r + eps)   Lite-PPO, arXiv 2508.08221

with mean and std over the G completions of one prompt unless said otherwise. The standard deviation has G - 1 in its
denominator, as in the public implementations (the paper does not say).
"""

from __future__ import annotations

import torch
from torch import Tensor

STDS = ("group", "batch", "none")


def group_advantages(rewards: Tensor, std: str = "group", eps: float = 1e-4) -> Tensor:
    """Rewards [N, G] of N prompts with G completions each -> advantages [N, G]. ValueError for G < 2."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are {tuple(rewards.shape)}: a group baseline needs [N, G] with G of at least 2")
    flat = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # rounding of the mean must not make 0 a small number
    centred = torch.where(flat, 0.0, rewards - rewards.mean(dim=1, keepdim=True))
    if std == "none":
        return centred
    if std == "group":
        return centred / (rewards.std(dim=1, keepdim=True) + eps)
    if std == "batch":
        return centred / (rewards.std() + eps)
    raise ValueError(f"unknown std {std!r}: choose one of {', '.join(STDS)}")


def process_advantages(step_rewards: Tensor, step_ends: Tensor, width: int, eps: float = 1e-4) -> Tensor:
    """Advantages [G, T] of one group whose steps are rewarded one by one (GRPO's process supervision, 2402.03300).

    step_rewards [G, S] and step_ends [G, S] give each step's reward and the index of the token that ends it; a
    negative index marks an absent step. All step rewards of the group are pooled, r~ = (r - mean R) / (std R + eps),
    and A_t = sum of r~ over the steps that end at or after t. It grows with the number of steps: log that number.
    """
    present = step_ends >= 0
    pooled = step_rewards[present]
    if pooled.numel() < 2 or (pooled == pooled[0]).all():
        return torch.zeros(len(step_rewards), width, dtype=step_rewards.dtype, device=step_rewards.device)
    normalised = torch.where(present, (step_rewards - pooled.mean()) / (pooled.std() + eps), 0.0)
    still_to_end = torch.arange(width, device=step_ends.device) <= step_ends[:, :, None]  # [G, S, T]
    return (normalised[:, :, None] * still_to_end).sum(dim=1)
