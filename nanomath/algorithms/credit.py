"""Credit: from the scores of a solution's steps to rewards on tokens, and to advantages.

A process reward model gives step k = 1 .. n of a solution a score p_k in [0, 1]. CREDITS makes
rewards r_k of them. r_k stands on the last token of step k, and the return of a token is the
sum of the rewards from there on:

    sum         r_k = p_k                                            Math-Shepherd, arXiv 2312.08935; GRPO, 2402.03300
    min         r_k = w_k s_k,  s = 2 p - 1,  w = softmax(-s / T)    PURE, arXiv 2504.15275: about min s from the start
    last        r_n = p_n                                            only the last step counts
    product     r_n = p_1 .. p_n                                     the chance that all steps are right
    clip        r_k = min(p_k - eta, 0)                              arXiv 2410.15115: no step pays, so none is padding
    delta       r_k = p_k - p_{k+1},  r_{n-1} = p_{n-1},  r_n = 0    the same: the return from step k < n is p_k
    clip_delta  clip, then delta                                     the same

The sum pays for more steps, whatever they say; every other form bounds what a solution can
earn. S steps of a solution at most, the present ones first; B solutions, G of one prompt, T
tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .names import unknown


def summed(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """The scores as they are."""
    return scores


def minimum(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """s = 2 p - 1, each weighted by softmax(-s / temperature) over the steps of its solution."""
    signed = 2 * scores - 1
    return signed * (-signed / temperature).masked_fill(~present, -torch.inf).softmax(dim=1)


def last(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """The last step's score, on it."""
    return scores * is_last(present)


def product(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """The product of the scores, on the last step."""
    return scores.masked_fill(~present, 1.0).prod(dim=1, keepdim=True) * is_last(present)


def clipped(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """min(p - eta, 0)."""
    return (scores - eta).clamp(max=0)


def delta(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """p_k - p_{k+1}; the last but one keeps its score, and the last has none: its outcome is
    rewarded already.
    """
    later = torch.cat((scores[:, 1:], torch.zeros_like(scores[:, :1])), dim=1)
    before_last = torch.cat((is_last(present)[:, 1:], torch.zeros_like(present[:, :1])), dim=1)
    return torch.where(is_last(present), 0.0, torch.where(before_last, scores, scores - later))


def clipped_delta(scores: Tensor, present: Tensor, temperature: float, eta: float) -> Tensor:
    """`clipped`, then `delta`."""
    return delta(clipped(scores, present, temperature, eta), present, temperature, eta)


def is_last(present: Tensor) -> Tensor:
    """Which step is the last one: [B, S] -> bool [B, S]."""
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
    """Step rewards [B, S] from scores [B, S] in [0, 1]; step_ends [B, S] is negative where
    there is no step, and the reward 0. `form` is a key of CREDITS; temperature: of "min"; eta:
    of the clipped ones. ValueError for another name.
    """
    if form not in CREDITS:
        raise unknown("credit", form, CREDITS)
    present = step_ends >= 0
    rewards = CREDITS[form](scores.masked_fill(~present, 0.0), present, temperature, eta)
    return rewards.masked_fill(~present, 0.0)


def on_tokens(step_rewards: Tensor, step_ends: Tensor, width: int) -> Tensor:
    """Each step's reward on the token that ends it: [B, S] -> [B, T], 0 elsewhere."""
    present = step_ends >= 0
    rewards = step_rewards.new_zeros(len(step_rewards), width)
    return rewards.scatter_add(
        1, step_ends.clamp(min=0), step_rewards.masked_fill(~present, 0.0)
    )


def to_go(rewards: Tensor) -> Tensor:
    """What is earned from each token on: [B, T] -> [B, T]."""
    return rewards.flip(1).cumsum(dim=1).flip(1)


def process_advantages(
    step_rewards: Tensor, step_ends: Tensor, width: int, eps: float = 1e-4
) -> Tensor:
    """Advantages [G, T] of one group whose steps are rewarded one by one (GRPO's process
    supervision, 2402.03300).

    step_rewards [G, S] and step_ends [G, S] give each step's reward and the index of the token
    that ends it; a negative index marks an absent step. All step rewards of the group are
    pooled, r~ = (r - mean R) / (std R + eps), and A_t = sum of r~ over the steps that end at
    or after t. It grows with the number of steps: log that number.
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
    """Advantages [G, T] of one group against what the others of it earn per token (PURE, arXiv
    2504.15275).

    b_i = sum_{j != i} R_j / sum_{j != i} T_j with R the sum of a solution's step rewards and T
    its length in tokens (lengths [G]); A_t = sum over the steps that end at or after t of r_k
    - b_i tokens_k. Against a mean per *step*, the solution with fewest steps would look best.
    b is 0 where no other has a token.
    """
    present = step_ends >= 0
    rewards = step_rewards.masked_fill(~present, 0.0)
    ends = step_ends.masked_fill(~present, 0)
    earned = rewards.sum(dim=1)
    lengths = lengths.to(rewards.dtype)
    baseline = (earned.sum() - earned) / (lengths.sum() - lengths).clamp(min=1)
    tokens = ends - torch.cat((torch.full_like(ends[:, :1], -1), ends[:, :-1]), dim=1)
    return to_go(on_tokens(rewards - baseline[:, None] * tokens, step_ends, width))
