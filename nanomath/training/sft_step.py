"""One optimizer step of supervised fine-tuning, and the held-out loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanomath.algorithms import loss_weights, neftune_noise, response_mask, sft_loss
from nanomath.data.packing import Batch, Example, make_batch, micro_batches
from nanomath.models.transformer import Transformer
from nanomath.training.logprobs import response_logprobs, score
from nanomath.training.optimizer import Optimizer


@dataclass
class SFTStep:
    """`step(examples, number, lr)` takes one optimizer step on the responses of `examples`.

    aggregation: "token" or "sequence" mean. token_budget: padded tokens of a micro-batch, 0 for all at once.
    row_length: pack several examples into rows of that many tokens, 0 for one a row. The gradient does not depend on
    either. dft and neftune_alpha: see `nanomath.algorithms.sft`.
    """

    model: Transformer
    optimizer: Optimizer
    aggregation: str = "token"
    token_budget: int = 0
    row_length: int = 0
    dft: bool = False
    neftune_alpha: float = 0.0
    seed: int = 0

    def step(self, examples: list[Example], number: int, lr: float) -> dict[str, float]:
        """Metrics of step `number`: the loss that was descended, the mean NLL and entropy per token, the norm."""
        lengths = torch.tensor([len(example.response) for example in examples])
        weights = loss_weights(response_mask(lengths), self.aggregation)
        noise = self._noise(examples, number)
        loss, nll, entropy = 0.0, 0.0, 0.0
        for micro in self._cut(examples):
            batch = make_batch([examples[i] for i in micro], self.row_length).to(self.model.device)
            added = lay_out([noise[i] for i in micro], batch) if noise else None
            logprobs, entropies = response_logprobs(self.model, batch, embedding_noise=added)
            part = weights[torch.tensor(micro), : logprobs.shape[1]].to(logprobs.device)
            micro_loss = sft_loss(logprobs, part, self.dft)
            micro_loss.backward()
            loss += float(micro_loss.detach())
            nll -= float(logprobs.detach().sum())
            entropy += float(entropies.sum())
        tokens = int(lengths.sum())
        norm = self.optimizer.step(lr)
        return {"loss": loss, "nll": nll / tokens, "entropy": entropy / tokens, "grad_norm": norm, "tokens": tokens}

    def _cut(self, examples: list[Example]) -> list[list[int]]:
        """Micro-batches. Packed rows have no padding to speak of, so their budget is filled in the given order."""
        lengths = [len(example) for example in examples]
        if not self.row_length:
            return micro_batches(lengths, self.token_budget)
        cuts: list[list[int]] = []
        filled = 0
        for i, length in enumerate(lengths):
            if not cuts or (self.token_budget and filled + length > self.token_budget):
                cuts.append([])
                filled = 0
            cuts[-1].append(i)
            filled += length
        return cuts

    def _noise(self, examples: list[Example], number: int) -> list[Tensor]:
        """NEFTune's noise [T, D] of every example, drawn before the batch is cut; empty when it is off."""
        if not self.neftune_alpha:
            return []
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        dim, alpha = self.model.config.hidden_size, self.neftune_alpha
        lengths = [len(example) for example in examples]
        return [neftune_noise(torch.tensor([n]), n, dim, alpha, generator)[0] for n in lengths]


def lay_out(noise: list[Tensor], batch: Batch) -> Tensor:
    """Noise [T, D] of each sequence of a batch, where its tokens stand: [B, T, D]."""
    if batch.documents is None:
        return torch.nn.utils.rnn.pad_sequence(noise, batch_first=True).to(batch.tokens.device)
    placed = torch.zeros(*batch.tokens.shape, noise[0].shape[1])
    for i, values in enumerate(noise):
        placed[batch.documents.cpu() == i] = values
    return placed.to(batch.tokens.device)


def heldout_loss(model: Transformer, examples: list[Example], token_budget: int) -> float:
    """Mean negative logprob per response token."""
    total = -float(score(model, examples, token_budget).sum())
    return total / sum(len(example.response) for example in examples)
