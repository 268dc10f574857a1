"""Choosing the next token: temperature, top-k, top-p, min-p, greedy.

The choice is the inverse of the cumulative distribution at one uniform number u per token: the smallest v with
sum_{w <= v} p_w > u. One number a token (not one a vocabulary entry) keeps the noise cheap to key by (seed, sample,
position). n rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. ValueError for what makes no sense."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: it must be between 0 (off) and 1")

    @property
    def truncates(self) -> bool:
        """Whether some of the probability mass is cut off before sampling."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def sample_tokens(logits: Tensor, u: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens [n], their logprobs [n] under the full distribution and [n] under the one sampled from.

    logits [n, V] float32; u [n] in [0, 1). The full distribution is softmax(logits / temperature), at temperature 1
    when greedy; the one sampled from has what top-k, top-p and min-p cut off removed and is renormalised.
    """
    if params.temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logprobs.argmax(-1)
        return token, logprobs.gather(-1, token[:, None])[:, 0], torch.zeros_like(u)
    logprobs = (logits / params.temperature).log_softmax(-1)
    if not params.truncates:
        token, _ = _invert(logprobs.exp(), u)
        picked = logprobs.gather(-1, token[:, None])[:, 0]
        return token, picked, picked
    descending, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    place, kept_mass = _invert(truncate(descending.exp(), params), u)
    picked = descending.gather(-1, place[:, None])[:, 0]
    return ids.gather(-1, place[:, None])[:, 0], picked, picked - kept_mass.log()


def truncate(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Zero what top-k, then top-p (of what top-k left), then min-p cut off; probabilities [n, V] are descending.

    The likeliest token always stays.
    """
    kept = probabilities.clone()
    if params.top_k:
        kept[:, params.top_k :] = 0
    if params.top_p < 1:
        before = kept.cumsum(-1) - kept
        kept[before >= params.top_p * kept.sum(-1, keepdim=True)] = 0
    kept[kept < params.min_p * kept[:, :1]] = 0
    return kept


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The index [n] where the running sum of weights [n, V] first exceeds u times their total, and the total [n]."""
    running = weights.cumsum(-1)
    total = running[:, -1]
    # Rounding may lift u * total to the total itself; one step below it still lands on a token of positive weight.
    level = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(running, level[:, None], right=True)[:, 0]
    return place.clamp(max=weights.shape[1] - 1), total  # beyond the end only where weights are NaN
