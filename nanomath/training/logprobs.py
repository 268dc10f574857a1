"""Logprobs and entropies of response tokens under a model: what every loss starts from.

    log pi(y_t | y_<t) = z_{y_t} - log sum_v exp z_v,   z = logits / temperature
    H_t = - sum_v pi(v) log pi(v)

The temperature is the sampler's, so that the numbers are those of the distribution that was
sampled from. Only the states that predict a response token meet the vocabulary, a chunk of
them at a time; prompts and padding never do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear_logprob import linear_logprob
from nanomath.data.packing import Batch, Example, make_batch, micro_batches
from nanomath.models.transformer import Transformer, document_attention


def response_states(
    model: Transformer, batch: Batch, embedding_noise: Tensor | None = None
) -> Tensor:
    """The states [n, D] that predict the batch's response tokens."""
    attend = None
    if batch.documents is not None:
        attend = document_attention(batch.documents, model.config.sliding_window)
    return model.hidden(batch.tokens, batch.positions, attend, embedding_noise)[
        batch.row, batch.column
    ]


def states_logprobs(
    model: Transformer, states: Tensor, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logprobs and (without gradient) entropies [S, R] of a batch's response tokens, zero
    where there is none.
    """
    logprobs, entropy = linear_logprob(
        states, model.lm_head.weight, batch.target, temperature, exact=model.exact
    )
    return batch.matrix(logprobs), batch.matrix(entropy)


def response_logprobs(
    model: Transformer,
    batch: Batch,
    temperature: float = 1.0,
    embedding_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`states_logprobs` of the batch's own states."""
    return states_logprobs(
        model, response_states(model, batch, embedding_noise), batch, temperature
    )


@torch.no_grad()
def response_scores(
    model: Transformer, examples: list[Example], token_budget: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies, float32 [S, R], of all responses, on the CPU; computed in
    micro-batches.

    Nothing is kept for a backward pass: the peak is one layer's activations or one chunk of
    logits.
    """
    logprobs, entropies = torch.zeros(
        2, len(examples), max([1, *(len(e.response) for e in examples)])
    )
    for micro in micro_batches([len(e) for e in examples], token_budget):
        batch = make_batch([examples[i] for i in micro]).to(model.device)
        found = response_logprobs(model, batch, temperature)
        for result, values in zip((logprobs, entropies), found, strict=True):
            result[torch.tensor(micro), : values.shape[1]] = values.float().cpu()
    return logprobs, entropies
