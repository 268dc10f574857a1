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
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .losses import check_name


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
    return scores.masked_fill(~present, 1.0).prod(dim=1, keepdim=True) * is_last(present)


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
    rewards = CREDITS[form](scores.masked_fill(~present, 0.0), present, temperature, eta)
    return rewards.masked_fill(~present, 0.0)
