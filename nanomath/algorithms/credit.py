"""Credit: how the scores of a solution's steps become rewards of these steps.

A process reward model gives step k = 1 .. n of a solution a score p_k in [0, 1]. CREDITS
makes rewards r_k of them, which stand on the last token of their step; the return of a
token is the sum of the rewards from there on. B solutions, S steps of one at most, the
present ones first.

    sum         r_k = p_k                      Math-Shepherd, arXiv 2312.08935; GRPO, 2402.03300
    min         r_k = w_k (2 p_k - 1)          PURE, arXiv 2504.15275; w = softmax((1 - 2 p) / T)
    last        r_n = p_n                      only the last step counts
    product     r_n = p_1 .. p_n               the chance that all steps are right
    clip        r_k = min(p_k - eta, 0)        arXiv 2410.15115: no step pays, so none is padding
    delta       r_k = p_k - p_{k+1}            the same: the return from step k < n is p_k
    clip_delta  clip, then delta               the same

With "delta", r_{n-1} = p_{n-1} and r_n = 0. The return of "min" is about min (2 p - 1) from
the start. The sum pays for more steps, whatever they say; every other form bounds what a
solution can earn.

Within a group of G samples the rewards of steps are compared with those of all its steps
(`process_advantages`) or with what the other samples earn per token (`token_baseline_advantages`),
and come on top of what the whole completion is worth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .advantages import Rewards
from .losses import Choices, Tokens, check_name


def summed(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """Return the scores as they are."""
    return scores


def minimum(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """Weight s = 2 p - 1 by softmax(-s / temperature) over the steps of its solution."""
    signed = 2 * scores - 1
    return signed * (-signed / temperature).masked_fill(~present, -torch.inf).softmax(
        dim=1
    )


def last(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """Keep the last step's score, and 0 on the other steps."""
    return scores * is_last(present)


def product(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """Put the product of the scores on the last step."""
    return scores.masked_fill(~present, 1.0).prod(dim=1, keepdim=True) * is_last(
        present
    )


def clipped(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """Return min(p - eta, 0)."""
    return (scores - eta).clamp(max=0)


def delta(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """Return p_k - p_{k+1}; the last step but one keeps its score.

    The last step gets 0: its outcome is rewarded already.
    """
    later = torch.cat((scores[:, 1:], torch.zeros_like(scores[:, :1])), dim=1)
    before_last = torch.cat(
        (is_last(present)[:, 1:], torch.zeros_like(present[:, :1])), dim=1
    )
    return torch.where(
        is_last(present), 0.0, torch.where(before_last, scores, scores - later)
    )


def clipped_delta(
    scores: Tensor, present: Tensor, temperature: float, eta: float
) -> Tensor:
    """Apply `clipped`, then `delta`."""
    return delta(clipped(scores, present, temperature, eta), present, temperature, eta)


def is_last(present: Tensor) -> Tensor:
    """Mark the last step of each solution: [B, S] -> bool [B, S]."""
    return present & (present.cumsum(dim=1) == present.sum(dim=1, keepdim=True))


CREDITS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sum": summed,
    "min": minimum,
    "last": last,
    "product": product,
    "clip": clipped,
    "delta": delta,
    "clip_delta": clipped_delta,
}


def credit(
    scores: Tensor,
    step_ends: Tensor,
    form: str = "min",
    temperature: float = 0.1,
    eta: float = 0.5,
) -> Tensor:
    """Return step rewards [B, S] from scores [B, S] in [0, 1].

    step_ends [B, S] is negative where there is no step: the reward is 0 there. `form` is a
    key of CREDITS, temperature belongs to "min", eta to the clipped ones. ValueError for
    another name.
    """
    check_name("credit", form, CREDITS)
    present = step_ends >= 0
    rewards = CREDITS[form](
        scores.masked_fill(~present, 0.0), present, temperature, eta
    )
    return rewards.masked_fill(~present, 0.0)


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


def step_advantages(a: Choices, rewards: Rewards, tokens: Tokens) -> Tensor:
    """Compare the rewards of steps with the group's: with all its steps, or with what its
    other completions earn per token. Return advantages [B, T].
    """
    matrices = (rewards.steps, rewards.step_ends, tokens.mask.sum(dim=1))
    groups = zip(
        *(matrix.split(rewards.group_size) for matrix in matrices), strict=True
    )
    width = tokens.mask.shape[1]
    if a.baseline == "leave_one_out":
        advantages = [token_baseline_advantages(*group, width) for group in groups]
    else:
        advantages = [
            process_advantages(steps, ends, width) for steps, ends, _ in groups
        ]
    return rewards.step_weight * torch.cat(advantages)
