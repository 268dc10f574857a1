"""How the losses of single tokens become one number: L = sum_{i,t} w_{i,t} l_{i,t}.

The weights w are fixed for a whole optimizer step *before* it is cut into micro-batches, so
the gradient cannot depend on how it is cut. This is the place where averaging conventions
differ between papers:

    token     w = 1 / (all response tokens)          DAPO, arXiv 2503.14476
    sequence  w = 1 / (B |o_i|)                      GRPO, arXiv 2402.03300
    constant  w = 1 / (B L_max)                      Dr. GRPO, arXiv 2503.20783
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .names import unknown


def response_mask(lengths: Tensor, width: int | None = None) -> Tensor:
    """True for the first lengths[i] tokens of row i: [B] -> bool [B, T]. Made from lengths,
    never from a pad id.
    """
    width = int(lengths.max()) if width is None else width
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def token_weights(mask: Tensor, max_length: int) -> Tensor:
    """Every token counts alike, so long completions count more."""
    return mask.double() / mask.sum().clamp(min=1)


def sequence_weights(mask: Tensor, max_length: int) -> Tensor:
    """Every completion counts alike, so the tokens of long ones count less. An empty one still
    counts in B.
    """
    return mask.double() / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def constant_weights(mask: Tensor, max_length: int) -> Tensor:
    """A token's weight depends on nothing that was sampled: the sum over the sequence, up to a
    constant.
    """
    if max_length <= 0:
        raise ValueError(
            f"aggregation 'constant' divides by the maximum length: {max_length} is not positive"
        )
    return mask.double() / (len(mask) * max_length)


AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token": token_weights,
    "sequence": sequence_weights,
    "constant": constant_weights,
}


def loss_weights(mask: Tensor, how: str, max_length: int = 0) -> Tensor:
    """Weight of every token's loss, float64 [B, T], zero where mask [B, T] is False.

    `max_length` is L_max in tokens, needed by "constant" only. Empty responses weigh nothing
    but still count in B.
    """
    if how not in AGGREGATIONS:
        raise unknown("aggregation", how, AGGREGATIONS)
    return AGGREGATIONS[how](mask, max_length)
