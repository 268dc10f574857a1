"""Whole responses under a model, without a gradient; and how far two models are apart at each of
their tokens.

    KL_t = sum_v pi(v) (log pi(v) - log pi'(v))         with its gradient in pi
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanomath.models.batches import (
    Batch,
    Example,
    make_batch,
    micro_batches,
    response_states,
    states_logprobs,
)
from nanomath.models.transformer import Transformer

SCORED_TOKENS = 4096  # of a micro-batch without a gradient
KL_LOGITS = 2**24  # of one model that `states_kl` has at a time: 64 MB


def states_kl(
    model: Transformer,
    states: Tensor,
    other: Transformer,
    other_states: Tensor,
    batch: Batch,
    temperature: float = 1.0,
) -> Tensor:
    """Return KL(model || other) [S, R] over the whole vocabulary at every response token, zero
    where there is none.

    The states [n, D] of both predict the batch's response tokens. Logits are made a chunk of
    tokens at a time, and again in the backward pass.
    """

    def of_chunk(ours: Tensor, theirs: Tensor) -> Tensor:
        logprobs = (model.logits(ours) / temperature).log_softmax(-1)
        others = (other.logits(theirs) / temperature).log_softmax(-1)
        return (logprobs.exp() * (logprobs - others.to(logprobs.device))).sum(-1)

    rows = max(1, KL_LOGITS // model.config.vocab_size)
    chunks = zip(states.split(rows), other_states.split(rows), strict=True)
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return batch.matrix(torch.cat(parts))


def response_logprobs(
    model: Transformer, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute the batch's states, and return their `states_logprobs`."""
    return states_logprobs(model, response_states(model, batch), batch, temperature)


@torch.no_grad()
def response_scores(
    model: Transformer,
    examples: list[Example],
    token_budget: int = SCORED_TOKENS,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies of all responses by micro-batches, float32 [S, R] on
    the CPU.

    Nothing is kept for a backward pass: the peak is one layer's activations or one chunk of
    logits.
    """
    longest = max([1, *(len(example.response) for example in examples)])
    scores = torch.zeros(2, len(examples), longest)
    for micro in micro_batches(examples, token_budget):
        batch = make_batch([examples[i] for i in micro]).to(model.device)
        found = torch.stack(response_logprobs(model, batch, temperature))
        scores[:, micro, : found.shape[2]] = found.float().cpu()
    return scores.unbind()
