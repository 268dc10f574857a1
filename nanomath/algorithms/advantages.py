"""Advantages: how much better a completion, or what follows a token, was than expected.

    group          A_i = r_i - mean r                GRPO, arXiv 2402.03300
    leave_one_out  A_i = r_i - mean of the other r   RLOO, arXiv 2402.14740: G/(G-1) (r_i - mean r)

over the G completions of one prompt, then divided by

    group          std r + eps over the group        GRPO
    batch          std r + eps over all N G rewards  Lite-PPO, arXiv 2508.08221
    off            1                                 Dr. GRPO, arXiv 2503.20783

or without any reward:

    one            A_t = 1                           cross-entropy on what SAMPLES leaves
    teacher        A_t = log pi_T(o_t) - log pi(o_t)      on-policy distillation, arXiv 2306.13649
    preference     A_t = +-2 beta sigma(-beta D)     DPO, arXiv 2305.18290

SAMPLES says which completions of a group have a loss at all: the right ones (rejection sampling,
arXiv 2308.01825), the best one (off-policy RL of arXiv 2507.00432), or a pair of a right one y+ and
a wrong one y-. DPO's loss of a pair, -log sigma(beta D) with D = log (pi / pi_ref)(y+) - log (pi /
pi_ref)(y-), has the gradient -beta sigma(-beta D) (grad log pi(y+) - grad log pi(y-)): that of
- sum w A log pi with the weights "sum", w = 1/2 for each completion of a pair over the pairs.

The standard deviation has G - 1 in its denominator, as in the public implementations (the
papers do not say). Without a group (PPO, REINFORCE++) advantages come token by token from
`token_rewards` and `gae`. Rewards of steps (credit.py) have advantages of their own. N prompts,
G samples of each, B = N G sequences, T tokens, S steps of a solution at most (the present ones
first), K reward components.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .losses import check_name


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


def right_samples(rewards: Tensor, right: Tensor, present: Tensor) -> Tensor:
    """Choose the right ones of the present completions; all are [N, G]."""
    return right & present


def best_sample(rewards: Tensor, right: Tensor, present: Tensor) -> Tensor:
    """Choose the first of the highest rewards of each group."""
    rewards = rewards.masked_fill(~present, -torch.inf)
    return _first(present & (rewards == rewards.amax(dim=1, keepdim=True)))


def right_and_wrong(rewards: Tensor, right: Tensor, present: Tensor) -> Tensor:
    """Choose the first right and the first wrong completion of each group that has both."""
    good = _first(right & present)
    bad = _first(~right & present)
    return (good | bad) & good.any(dim=1, keepdim=True) & bad.any(dim=1, keepdim=True)


def _first(marked: Tensor) -> Tensor:
    return marked & (marked.cumsum(dim=1) == 1)


SAMPLES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "right": right_samples,
    "best": best_sample,
    "pair": right_and_wrong,
}


def preference_advantages(
    log_ratios: Tensor, right: Tensor, chosen: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return DPO's advantages [N, G], 0 beyond the pairs, and the margins beta D [N].

    log_ratios [N, G] are log (pi / pi_ref) of whole completions, and `chosen` marks the pair of
    each group that has one: without a pair the margin is 0.
    """
    signs = torch.where(right, 1.0, -1.0).to(log_ratios) * chosen
    margins = beta * (signs * log_ratios).sum(dim=1)
    return 2 * beta * signs * torch.sigmoid(-margins)[:, None], margins


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


def on_tokens(step_rewards: Tensor, step_ends: Tensor, width: int) -> Tensor:
    """Put each step's reward on the token that ends it: [B, S] -> [B, T], 0 elsewhere."""
    present = step_ends >= 0
    rewards = step_rewards.new_zeros(len(step_rewards), width)
    return rewards.scatter_add(
        1, step_ends.clamp(min=0), step_rewards.masked_fill(~present, 0.0)
    )


def to_go(rewards: Tensor) -> Tensor:
    """Return the sum of the rewards from each token on: [B, T] -> [B, T]."""
    return rewards.flip(1).cumsum(dim=1).flip(1)


def process_advantages(
    step_rewards: Tensor, step_ends: Tensor, width: int, eps: float = 1e-4
) -> Tensor:
    """Return the advantages [G, T] of one group by GRPO's process supervision (arXiv
    2402.03300).

    step_rewards [G, S] and step_ends [G, S] give each step's reward and the index of the
    token that ends it; a negative index marks an absent step. All step rewards of the group
    are pooled, r~ = (r - mean R) / (std R + eps), and A_t = sum of r~ over the steps that
    end at or after t. It grows with the number of steps: log that number.
    """
    present = step_ends >= 0
    pooled = step_rewards[present]
    if pooled.numel() < 2 or (pooled == pooled[0]).all():
        return step_rewards.new_zeros(len(step_rewards), width)
    normalised = (step_rewards - pooled.mean()) / (pooled.std() + eps)
    return to_go(on_tokens(normalised, step_ends, width))


def token_baseline_advantages(
    step_rewards: Tensor, step_ends: Tensor, lengths: Tensor, width: int
) -> Tensor:
    """Return the advantages [G, T] over what the rest of a group earns per token (arXiv
    2504.15275).

    b_i = sum_{j != i} R_j / sum_{j != i} T_j with R the sum of a solution's step rewards
    and T its length in tokens (lengths [G]); A_t = sum over the steps that end at or after
    t of r_k - b_i tokens_k. Against a mean per *step*, the solution with fewest steps would
    look best. b is 0 where no other solution has a token.
    """
    present = step_ends >= 0
    rewards = step_rewards.masked_fill(~present, 0.0)
    ends = step_ends.masked_fill(~present, 0)
    earned = rewards.sum(dim=1)
    lengths = lengths.to(rewards.dtype)
    baseline = (earned.sum() - earned) / (lengths.sum() - lengths).clamp(min=1)
    tokens = ends - torch.cat((torch.full_like(ends[:, :1], -1), ends[:, :-1]), dim=1)
    return to_go(on_tokens(rewards - baseline[:, None] * tokens, step_ends, width))
