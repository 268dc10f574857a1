"""Choosing the next token: temperature, top-k, top-p, min-p, greedy.

The choice is the inverse of the cumulative distribution at two uniform numbers a token
(kernels/lm_head.py), which are cheap to key by (seed, sample, position). n rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import lm_head
from kernels.truncation import truncated_sample
from nanomath.rollout.arguments import checked
from nanomath.rollout.decoder import Decoder

REQUIREMENTS = {
    "temperature": (float, lambda t: 0 <= t < math.inf, "0 (greedy) or a positive number"),
    "top_k": (int, lambda k: k >= 0, "0 (off) or a positive integer"),
    "top_p": (float, lambda p: 0 < p <= 1, "above 0 and at most 1 (off)"),
    "min_p": (float, lambda p: 0 <= p <= 1, "between 0 (off) and 1"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    ValueError for a number that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, requirement in REQUIREMENTS.items():
            # Frozen, but not yet.
            object.__setattr__(
                self, name, checked(name, getattr(self, name), *requirement)
            )

    @property
    def cuts(self) -> bool:
        """Whether some of the probability mass is cut off before sampling."""
        return self.temperature > 0 and (
            self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        )


def next_tokens(
    decoder: Decoder, states: Tensor, u: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the next tokens [n] of states [n, D] at uniform numbers u [n, 2] in [0, 1).

    Returns tokens, their logprobs under the full distribution, and their logprobs under the
    distribution that was sampled from. The full one is softmax(logits / temperature), at
    temperature 1 when greedy; the other one lacks what top-k, top-p and min-p cut off, and
    is renormalised.
    """
    if decoder.on_gpu and not params.cuts:
        token, logprob, _ = lm_head.sample(states, decoder.lm_head, u, params.temperature)
        return token, logprob, under_sampling(logprob, params)
    logits = decoder.logits(states)
    token, logprob, sampling = sample_tokens(logits, u, params)
    if (
        decoder.exact and params.cuts
    ):  # by the kernel that the trainer's logprobs come from
        kept = sampling - logprob
        if decoder.on_gpu:
            logprob = lm_head.logprobs_triton(
                states, decoder.lm_head, token, params.temperature
            )[0]
        else:
            logprob = lm_head.statistics(logits, token, params.temperature)[0]
        sampling = logprob + kept
    return token, logprob, sampling


def sample_tokens(
    logits: Tensor, u: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw as `next_tokens`, from logits [n, V]."""
    if params.cuts:
        options = params.top_k, params.top_p, params.min_p
        return truncated_sample(logits, u, params.temperature, *options)[:3]
    token, logprob, _ = lm_head.sample_logits(logits, u, params.temperature)
    return token, logprob, under_sampling(logprob, params)


def under_sampling(logprob: Tensor, params: SamplingParams) -> Tensor:
    """Return the logprobs under the distribution sampled from, where nothing is cut off: 0
    for a greedy choice, which is certain.
    """
    return logprob if params.temperature else torch.zeros_like(logprob)
