"""One optimizer step of supervised fine-tuning, and the held-out loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomath.algorithms import loss_weights, neftune_noise, response_mask, sft_loss
from nanomath.data.order import generator_of
from nanomath.models.batches import (
    Batch,
    Example,
    make_batch,
    response_states,
    states_logprobs,
)
from nanomath.models.scores import response_scores, states_kl
from nanomath.models.transformer import Transformer
from nanomath.training import ranks
from nanomath.training.optimizer import Optimizer
from nanomath.training.ranks import micro_batches_of
from nanomath.training.sharding import whole


@dataclass
class SFTStep:
    """Takes an optimizer step on the responses of examples: `step(examples, number, lr)`.

    aggregation: "token" or "sequence" mean. token_budget: tokens of a micro-batch, 0 for
    all at once; the gradient does not depend on it. dft and neftune_alpha: see
    `nanomath.algorithms.sft`. reference: with kl_coef above 0, the model that the policy is
    held near to at every token of a response.
    """

    model: Transformer
    optimizer: Optimizer
    aggregation: str = "token"
    token_budget: int = 0
    dft: bool = False
    neftune_alpha: float = 0.0
    seed: int = 0
    kl_coef: float = 0.0
    reference: Transformer | None = None

    def step(self, examples: list[Example], number: int, lr: float) -> dict[str, float]:
        """Make step `number`, and return its metrics: the loss, the mean NLL and entropy
        per token, and the optimizer's.

        FloatingPointError, before anything is updated, names the example whose NLL or
        entropy is not finite.
        """
        lengths = torch.tensor([len(example.response) for example in examples])
        weights = loss_weights(response_mask(lengths), self.aggregation)
        noise = self._noise(examples, number)
        # By example.
        loss, nll, entropy, kl = totals = torch.zeros(4, len(examples)).double()
        share = not noise  # each example has noise of its own
        for micro, counts in micro_batches_of(
            self.model, examples, self.token_budget, share_prompts=share
        ):
            chosen = [examples[i] for i in micro.tolist()]
            batch = make_batch(chosen, share).to(self.model.device)
            # Without shared prompts the examples stand one after the other.
            added = None
            if noise:
                added = torch.cat([noise[i] for i in micro.tolist()]).to(
                    self.model.device
                )
            states = response_states(self.model, batch, added)
            logprobs, entropies = states_logprobs(self.model, states, batch)
            part = weights[micro, : logprobs.shape[1]].to(logprobs)
            micro_loss = sft_loss(logprobs, part * counts, self.dft)
            if self.kl_coef:
                kls = self._kl(states, batch)
                micro_loss = micro_loss + self.kl_coef * (part * counts * kls).sum()
                if counts:
                    kl[micro] = kls.detach().sum(1).double().cpu()
            micro_loss.backward()
            if counts:
                # A sum over the micro-batch; only the total is of interest.
                loss[micro[0]] = float(micro_loss.detach())
                nll[micro] = -logprobs.detach().sum(1).double().cpu()
                entropy[micro] = entropies.sum(1).double().cpu()
        ranks.sum_([totals])
        check_finite(nll=nll, entropy=entropy, kl=kl)
        tokens = int(lengths.sum())
        means = {
            "nll": float(nll.sum()) / max(1, tokens),
            "entropy": float(entropy.sum()) / max(1, tokens),
        }
        if self.kl_coef:
            means["kl"] = float(kl.sum()) / max(1, tokens)
        return {
            "loss": float(loss.sum()),
            **means,
            "tokens": tokens,
            **self.optimizer.step(lr),
        }

    def _kl(self, states: Tensor, batch: Batch) -> Tensor:
        """Return KL(pi || pi_ref) [S, R]; the reference sees no noise."""
        with torch.no_grad():
            theirs = response_states(self.reference, batch)
        return states_kl(self.model, states, self.reference, theirs, batch)

    def _noise(self, examples: list[Example], number: int) -> list[Tensor]:
        """Return NEFTune's noise [T, D] of every example, drawn before the batch is cut;
        nothing when it is off.
        """
        if not self.neftune_alpha:
            return []
        generator = generator_of(self.seed, number)
        dim = self.model.config.hidden_size
        alpha = self.neftune_alpha
        lengths = [len(example) for example in examples]
        return [
            neftune_noise(torch.tensor([n]), n, dim, alpha, generator)[0]
            for n in lengths
        ]


def check_finite(**sums: Tensor) -> None:
    """Raise a FloatingPointError that names the first example whose sum in [S] is not
    finite.
    """
    for name, values in sums.items():
        for i, value in enumerate(values.tolist()):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} of example {i + 1} of {len(values)} in the batch is {value}"
                )


def heldout_loss(
    model: Transformer, examples: list[Example], token_budget: int
) -> float:
    """Return the mean negative logprob of a response token, in nats.

    FloatingPointError when one is not finite.
    """
    mine = ranks.share(examples)
    with whole(model):
        sums = (
            response_scores(model, mine, token_budget)[0].double().sum(1).tolist()
            if mine
            else []
        )
    nll = -torch.tensor(ranks.gather(sums), dtype=torch.float64)
    check_finite(nll=nll)
    return float(nll.sum()) / sum(len(example.response) for example in examples)
