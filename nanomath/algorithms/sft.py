"""Supervised fine-tuning loss, plain and dynamic.

    plain  L = - sum_{i,t} w_{i,t} log pi(y_{i,t})
    DFT    L = - sum_{i,t} w_{i,t} sg(pi(y_{i,t})) log pi(y_{i,t})      arXiv 2508.05629

With kl_coef, sft_step.py adds  beta sum w KL(pi || pi_ref)  over the whole vocabulary at the same
tokens. (k3 of the solution's own token would be no estimate of it: the token is not drawn from
pi, and its gradient, (1 - pi_ref / pi) grad log pi, only weakens that of the cross-entropy.)

And NEFTune's noise on the embeddings, U(-1, 1) * alpha / sqrt(T D), arXiv 2310.05914.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sft_loss(logprobs: Tensor, weights: Tensor, dft: bool = False) -> Tensor:
    """Return the scalar loss of logprobs [B, T] of reference tokens under `loss_weights`
    [B, T].

    Tokens of weight 0 never count.
    """
    logprobs = torch.where(weights != 0, logprobs, 0.0)
    scale = logprobs.detach().exp() if dft else 1.0
    return -(weights * scale * logprobs).sum()


def neftune_noise(
    lengths: Tensor, width: int, dim: int, alpha: float, generator: torch.Generator
) -> Tensor:
    """Draw noise [B, T, D] for the embeddings of rows of `lengths` [B] tokens, padded to
    `width`.
    """
    noise = torch.rand(len(lengths), width, dim, generator=generator) * 2 - 1
    return noise * (alpha / (lengths * dim).sqrt())[:, None, None]
