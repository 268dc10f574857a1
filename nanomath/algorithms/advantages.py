"""Advantages: how much better a completion, or what follows a token, was than expected.

    group          A_i = r_i - mean r                GRPO, arXiv 2402.03300
    leave_one_out  A_i = r_i - mean of the other r   RLOO, arXiv 2402.14740: G/(G-1) (r_i - mean r)

over the G completions of one prompt, then divided by

    group          std r + eps over the group        GRPO
    batch          std r + eps over all N G rewards  Lite-PPO, arXiv 2508.08221
    off            1                                 Dr. GRPO, arXiv 2503.20783

The standard deviation has G - 1 in its denominator, as in the public implementations (the
papers do not say). Without a group (PPO, REINFORCE++) advantages come token by token from
`token_rewards` and `gae` (value.py). Rewards of steps have advantages of their own (credit.py),
and so has what is learnt without comparing rewards (lessons.py). N prompts, G samples of each,
B = N G sequences, T tokens, K reward components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import check_name


@dataclass
class Rewards:
    """The rewards of B = N G episodes in prompt-major order.

    `total` is [B]; by component they are [C, B] with weights [C]. Rewards of steps are [B,
    S] with the indices of the tokens that end the steps (-1: no step); both are None where
    no step is rewarded. `right` is bool [B]: whose answer is right.
    """

    total: Tensor
    components: Tensor
    component_weights: Tensor
    group_size: int
    step_weight: float
    steps: Tensor | None = None
    step_ends: Tensor | None = None
    right: Tensor | None = None


def minus_group_mean(rewards: Tensor) -> Tensor:
    """Return r - mean r of the row: [N, G] -> [N, G]."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def minus_mean_of_others(rewards: Tensor) -> Tensor:
    """Return r_i - 1/(G-1) sum_{j != i} r_j: [N, G] -> [N, G]."""
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def group_std(rewards: Tensor) -> Tensor:
    """Return one standard deviation for each row: [N, G] -> [N, 1]."""
    return rewards.std(dim=1, keepdim=True)


def batch_std(rewards: Tensor) -> Tensor:
    """Return one standard deviation for all rewards: [N, G] -> scalar."""
    return rewards.std()


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": minus_group_mean,
    "leave_one_out": minus_mean_of_others,
}
SCALES: dict[str, Callable[[Tensor], Tensor]] = {"group": group_std, "batch": batch_std}


def group_advantages(
    rewards: Tensor, baseline: str = "group", scale: str = "group", eps: float = 1e-4
) -> Tensor:
    """Return the advantages [N, G] of rewards [N, G]: N prompts with G completions each.

    Equal rewards give exactly 0. `baseline` is a key of BASELINES, `scale` one of SCALES or
    "off". ValueError for another name and for G < 2.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards are {tuple(rewards.shape)}: a group baseline needs [N, G] with G of "
            "at least 2"
        )
    check_name("scale", scale, (*SCALES, "off"))
    check_name("baseline", baseline, BASELINES)
    advantages = BASELINES[baseline](rewards)
    if scale != "off":
        advantages = advantages / (SCALES[scale](rewards) + eps)
    # Rounding of the mean must not make 0 a small number.
    flat = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(flat, 0.0, advantages)


def decoupled_advantages(
    components: Tensor,
    weights: Tensor,
    baseline: str = "group",
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Return A = sum_k w_k A_k of [K, N, G] and [K] -> [N, G] (GDPO, arXiv 2601.05242).

    Each component has advantages A_k of its own, so that one of small spread counts as much
    as one of large spread. GDPO whitens the sum over the batch as well: see `whiten`.
    """
    apart = [group_advantages(rewards, baseline, scale, eps) for rewards in components]
    return (torch.stack(apart) * weights[:, None, None]).sum(dim=0)


def token_rewards(
    outcomes: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0
) -> Tensor:
    """Return r_t = 1[t is the last token] R - beta kl_t: [B], [B, T] -> [B, T], 0 outside
    the mask.

    This is the KL in the reward as in PPO for language models (arXiv 2203.02155) and
    REINFORCE++ (arXiv 2501.03262). The sign matters: with log pi_ref - log pi in place of
    kl, drift would be paid for. An empty completion earns nothing.
    """
    lengths = mask.sum(dim=1)
    last = mask & (
        torch.arange(mask.shape[1], device=mask.device) == lengths[:, None] - 1
    )
    rewards = torch.where(last, outcomes[:, None], 0.0)
    return rewards if kl is None else rewards - kl_coef * torch.where(mask, kl, 0.0)


def whiten(advantages: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Return (A - mean A) / (std A + eps) over all tokens of the batch: [B, T] -> [B, T].

    It is 0 outside the mask. PPO's and REINFORCE++'s public code does the same. Fewer than
    two tokens, or equal advantages, give 0.
    """
    values = advantages[mask]
    if values.numel() < 2 or (values == values[0]).all():
        return torch.zeros_like(advantages)
    return torch.where(mask, (advantages - values.mean()) / (values.std() + eps), 0.0)
