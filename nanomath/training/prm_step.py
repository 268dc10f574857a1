"""One optimizer step of a process reward model: cross-entropy of the steps' scores against
labels, hard or soft.

    L = - sum_k w_k [ y_k log p_k + (1 - y_k) log(1 - p_k) ] / sum_k w_k
    w_k = y_k w_right + (1 - y_k) w_wrong

A Monte-Carlo label is a share, which the cross-entropy takes as it is (Math-Shepherd's soft
estimation, arXiv 2312.08935). With weights n / 2 n_right and n / 2 n_wrong both kinds of
steps count for as much in all. Steps without a label, and what is left of a batch without
one, have no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomath.process.labelled import Labelled
from nanomath.process.prm import PRM
from nanomath.process.states import with_common_prompts
from nanomath.training import ranks
from nanomath.training.optimizer import Optimizer
from nanomath.training.ranks import is_sharded, micro_batches_of


@dataclass
class PRMStep:
    """Takes an optimizer step on the labelled steps of solutions: `step(solutions, number,
    lr)`.

    weights: (w_wrong, w_right). head_steps: for so many steps only the new head learns,
    `model.score`. token_budget: tokens of a micro-batch, 0 for all at once; the gradient
    does not depend on it. ValueError for head_steps of a sharded model: FSDP2 sums no
    gradient where the layers before need none.
    """

    prm: PRM
    optimizer: Optimizer
    weights: tuple[float, float] = (1.0, 1.0)
    head_steps: int = 0
    token_budget: int = 0

    def __post_init__(self) -> None:
        if self.head_steps and is_sharded(self.prm.model):
            raise ValueError(
                "prm.head_steps freezes weights for a while, which sharded ones cannot be: "
                "set it to 0"
            )

    def step(
        self, solutions: Sequence[Labelled], number: int, lr: float
    ) -> dict[str, float]:
        """Make step `number`, and return its metrics: the loss, the mean score and the mean
        label of the steps, and the optimizer's.

        ValueError when no step has a label.
        """
        self._freeze(number < self.head_steps)
        laid_out = [
            self.prm.lay_out(i, s.question, s.steps) for i, s in enumerate(solutions)
        ]
        labels = [
            torch.tensor([torch.nan if y is None else y for y in s.labels])
            for s in solutions
        ]
        every = torch.cat(labels)
        known = every[every.isfinite()]
        if not len(known):
            raise ValueError(
                f"none of the {len(every)} steps of a batch has a label: take a larger "
                "prm.batch_size"
            )
        total = self._weight(known).sum()
        places = [at for _, at in laid_out]
        examples = with_common_prompts(
            [tokens for tokens, _ in laid_out], places, [s.question for s in solutions]
        )
        sums = torch.zeros(2, dtype=torch.float64)  # of the loss and of the scores
        for rows, counts in micro_batches_of(
            self.prm.model, examples, self.token_budget
        ):
            chosen = rows.tolist()
            logits = self.prm.logits(
                [examples[i] for i in chosen], [places[i] for i in chosen]
            )
            logprobs = logits.log_softmax(dim=1)
            y = torch.cat([labels[i] for i in rows.tolist()]).to(logprobs.device)
            here = y.isfinite()
            y = y[here]
            logprobs = logprobs[here]
            nll = -(y * logprobs[:, 1] + (1 - y) * logprobs[:, 0])
            loss = (self._weight(y) * nll).sum() / total
            (loss * counts).backward()
            if counts:
                sums += (
                    torch.stack([loss.detach(), logprobs[:, 1].detach().exp().sum()])
                    .double()
                    .cpu()
                )
        ranks.sum_([sums])
        means = {
            "loss": float(sums[0]),
            "score": float(sums[1]) / len(known),
            "label": float(known.mean()),
        }
        return {**means, "steps": len(known), **self.optimizer.step(lr)}

    def _weight(self, labels: Tensor) -> Tensor:
        wrong, right = self.weights
        return labels * right + (1 - labels) * wrong

    def _freeze(self, frozen: bool) -> None:
        """Let the head alone learn, or all parameters."""
        for name, parameter in self.prm.model.named_parameters():
            parameter.requires_grad_(not frozen or name.startswith("score."))


def balancing_weights(solutions: Sequence[Labelled]) -> tuple[float, float]:
    """Return (w_wrong, w_right) with which right and wrong steps count for as much in all.

    ValueError where all labels are alike.
    """
    labels = [y for s in solutions for y in s.labels if y is not None]
    right = sum(labels)
    if not 0 < right < len(labels):
        raise ValueError(
            f"all {len(labels)} labels are {'right' if right else 'wrong'}: there is nothing to "
            "tell apart"
        )
    return len(labels) / (2 * (len(labels) - right)), len(labels) / (2 * right)
