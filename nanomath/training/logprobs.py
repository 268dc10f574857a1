"""Logprobs and entropies of response tokens under a model: what every loss starts from.

    log pi(y_t | y_<t) = z_{y_t} - log sum_v exp z_v,   z = logits / temperature
    H_t = - sum_v pi(v) log pi(v)

The temperature is the sampler's, so that the numbers are those of the distribution that was sampled from. Only the
states that predict a response token meet the vocabulary; prompts and padding never do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanomath.data.packing import Batch, Example, make_batch, micro_batches
from nanomath.models.transformer import Transformer, document_attention


def response_logprobs(
    model: Transformer, batch: Batch, temperature: float = 1.0, embedding_noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logprobs and (without gradient) entropies [S, R] of a batch's response tokens, zero where there is none."""
    attend = None
    if batch.documents is not None:
        attend = document_attention(batch.documents, model.config.sliding_window)
    hidden = model.hidden(batch.tokens, batch.positions, attend, embedding_noise)
    logits = model.logits(hidden[batch.row, batch.column])
    logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    picked = logprobs.gather(-1, batch.target[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return batch.matrix(picked), batch.matrix(entropy)


@torch.no_grad()
def score(model: Transformer, examples: list[Example], token_budget: int, temperature: float = 1.0) -> Tensor:
    """Logprobs [S, R] of all responses under a model, on the CPU, computed in micro-batches."""
    result = torch.zeros(len(examples), max(1, *(len(e.response) for e in examples)))
    for micro in micro_batches([len(e) for e in examples], token_budget):
        batch = make_batch([examples[i] for i in micro]).to(model.device)
        logprobs, _ = response_logprobs(model, batch, temperature)
        result[torch.tensor(micro), : logprobs.shape[1]] = logprobs.float().cpu()
    return result
