"""What is learnt of samples where their rewards are not compared: SFT, DPO, distillation.

    one            A_t = 1                           cross-entropy on what SAMPLES leaves
    teacher        A_t = log pi_T(o_t) - log pi(o_t)      on-policy distillation, arXiv 2306.13649
    preference     A_t = +-2 beta sigma(-beta D)     DPO, arXiv 2305.18290

SAMPLES says which completions of a group have a loss at all: the right ones (rejection sampling,
arXiv 2308.01825), the best one (off-policy RL of arXiv 2507.00432), or a pair of a right one y+ and
a wrong one y-. DPO's loss of a pair, -log sigma(beta D) with D = log (pi / pi_ref)(y+) - log (pi /
pi_ref)(y-), has the gradient -beta sigma(-beta D) (grad log pi(y+) - grad log pi(y-)): that of
- sum w A log pi with the weights "sum", w = 1/2 for each completion of a pair over the pairs.

N prompts, G samples of each, B = N G sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .advantages import Rewards
from .losses import Choices, Tokens


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


def select_samples(a: Choices, rewards: Rewards, mask: Tensor) -> Tensor:
    """Return the mask [B, T] without what `samples`, a key of SAMPLES, leaves out."""
    matrices = rewards.total, rewards.right, mask.any(dim=1)
    chosen = SAMPLES[a.samples](*(x.view(-1, rewards.group_size) for x in matrices))
    return mask & chosen.view(-1, 1)


def _of_the_teacher(a: Choices, rewards: Rewards, tokens: Tokens) -> Tensor:
    """log pi_T - log pi before the first update: what the ratio then carries over."""
    return torch.where(tokens.mask, tokens.teacher_logprobs - tokens.old_logprobs, 0.0)


def _of_pairs(a: Choices, rewards: Rewards, tokens: Tokens) -> Tensor:
    return preferences(a, rewards, tokens)[0].view(-1, 1) * tokens.mask


def preferences(a: Choices, rewards: Rewards, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return `preference_advantages` of a rollout whose loss_mask has the pairs."""
    moved = torch.where(tokens.mask, tokens.old_logprobs - tokens.ref_logprobs, 0.0)
    matrices = moved.sum(dim=1), rewards.right, tokens.loss_mask.any(dim=1)
    grouped = (x.view(-1, rewards.group_size) for x in matrices)
    return preference_advantages(*grouped, a.preference_beta)


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


ADVANTAGES: dict[str, Callable[[Choices, Rewards, Tokens], Tensor]] = {
    "one": lambda a, rewards, tokens: tokens.mask.double(),
    "teacher": _of_the_teacher,
    # Its loss is the KL to the teacher, over the whole vocabulary (training/teacher.py).
    "teacher_full": lambda a, rewards, tokens: torch.zeros_like(
        tokens.sampler_logprobs
    ),
    "preference": _of_pairs,
}
