"""One policy-gradient step: sample groups, reward them, turn rewards into advantages, update.

    L = sum_{i,t} w_{i,t} [ - min(rho A, clip(rho) A) + beta KL(pi || pi_ref) ]        GRPO, arXiv 2402.03300

Everything one may want to change is a pure function of `nanomath.algorithms`; this file moves their arguments about.
Matrices [B, T]: B = N G episodes in prompt-major order, T response tokens, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanomath.algorithms import group_advantages, kl_estimate, loss_weights, policy_loss, response_mask
from nanomath.data.packing import Example, make_batch, micro_batches
from nanomath.models.transformer import Transformer
from nanomath.rollout.episodes import Episode
from nanomath.training.logprobs import response_logprobs, score
from nanomath.training.optimizer import Optimizer


@dataclass
class PolicyStep:
    """`step(episodes, number, lr)` updates the model on one rollout and returns its metrics.

    advantage_std, aggregation, clip_low, clip_high, kl_estimator: see `nanomath.algorithms`. kl_coef: beta; the KL is
    measured whether or not it is penalised. epochs and minibatches: passes over the rollout and optimizer steps in
    each. old_logprobs: pi_old as the "trainer" computes it before the first update, or as the "sampler" did.
    max_length: L_max of the "constant" aggregation. token_budget: padded tokens of a micro-batch, 0 for all at once.
    """

    model: Transformer
    reference: Transformer
    optimizer: Optimizer
    group_size: int
    temperature: float = 1.0
    advantage_std: str = "group"
    aggregation: str = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    epochs: int = 1
    minibatches: int = 1
    old_logprobs: str = "trainer"
    max_length: int = 0
    token_budget: int = 0
    seed: int = 0

    def step(self, episodes: list[Episode], number: int, lr: float) -> dict[str, float]:
        """Update on the episodes of N groups; sets their advantages."""
        rewards = torch.tensor([episode.rewards["total"] for episode in episodes]).view(-1, self.group_size)
        advantages = group_advantages(rewards, self.advantage_std).flatten()
        for episode, advantage in zip(episodes, advantages.tolist(), strict=True):
            episode.advantage = advantage
        rollout = self._rollout(episodes, advantages)
        norms: list[float] = []
        gap: dict[str, float] = {}
        for epoch in range(self.epochs):
            for chosen in self._minibatches(len(episodes), number, epoch):
                norms.append(self._update(rollout, chosen, lr))
                gap = gap or rollout.gap(chosen)  # the first pass was made by the weights that sampled
        return {"grad_norm": sum(norms) / len(norms), **rollout.metrics(), **gap}

    def _rollout(self, episodes: list[Episode], advantages: Tensor) -> Rollout:
        examples = [Example(e.prompt, e.completion.tokens) for e in episodes]
        lengths = torch.tensor([len(example.response) for example in examples])
        mask = response_mask(lengths)
        sampled = torch.zeros(mask.shape)
        sampled[mask] = torch.tensor([logprob for e in episodes for logprob in e.completion.logprobs])
        return Rollout(
            examples=examples,
            mask=mask,
            advantages=advantages,
            sampled=sampled,
            old=self._old_logprobs(examples, sampled),
            reference=score(self.reference, examples, self.token_budget, self.temperature),
            measured={name: torch.zeros(mask.shape) for name in ("logprob", "entropy", "clipped_low", "clipped_high")},
        )

    def _old_logprobs(self, examples: list[Example], sampled: Tensor) -> Tensor | None:
        """pi_old's logprobs; None where the one update's own forward pass computes them anyway."""
        if self.old_logprobs == "sampler":
            return sampled
        if self.epochs == self.minibatches == 1:
            return None
        return score(self.model, examples, self.token_budget, self.temperature)

    def _minibatches(self, total: int, number: int, epoch: int) -> list[Tensor]:
        if self.minibatches == 1:
            return [torch.arange(total)]
        generator = torch.Generator().manual_seed((self.seed << 24) + number * self.epochs + epoch)
        return list(torch.randperm(total, generator=generator).tensor_split(self.minibatches))

    def _update(self, rollout: Rollout, chosen: Tensor, lr: float) -> float:
        """One optimizer step on the episodes `chosen`, none if they teach nothing; returns the gradient norm."""
        weights = torch.zeros(rollout.mask.shape)
        weights[chosen] = loss_weights(rollout.mask[chosen], self.aggregation, self.max_length)
        # Without a KL term an advantage of zero means a gradient of zero: such episodes are measured only.
        idle = (rollout.advantages[chosen] == 0) & (self.kl_coef == 0)
        for active, part in ((True, chosen[~idle]), (False, chosen[idle])):
            with torch.set_grad_enabled(active):
                for micro in micro_batches([len(rollout.examples[i]) for i in part.tolist()], self.token_budget):
                    loss = self._loss(rollout, part[micro], weights)
                    if active:
                        loss.backward()
        return self.optimizer.step(lr) if not idle.all() else 0.0

    def _loss(self, rollout: Rollout, micro: Tensor, weights: Tensor) -> Tensor:
        """The micro-batch's share of the loss; notes down what it measures on the way."""
        batch = make_batch([rollout.examples[i] for i in micro.tolist()]).to(self.model.device)
        logprobs, entropy = response_logprobs(self.model, batch, self.temperature)

        def cut(matrix: Tensor) -> Tensor:
            return matrix[micro, : logprobs.shape[1]].to(logprobs.device)

        weights, reference = cut(weights), cut(rollout.reference)
        old = logprobs.detach() if rollout.old is None else cut(rollout.old)
        advantages = rollout.advantages[micro].to(logprobs.device)
        loss, stats = policy_loss(logprobs, old, advantages, weights, self.clip_low, self.clip_high)
        if self.kl_coef:
            loss = loss + self.kl_coef * (weights * kl_estimate(logprobs, reference, self.kl_estimator)).sum()
        rollout.note(micro, logprob=logprobs.detach(), entropy=entropy, **stats)
        return loss


@dataclass
class Rollout:
    """The episodes of one step as matrices [B, T], and what the passes over them measured."""

    examples: list[Example]
    mask: Tensor
    advantages: Tensor  # [B]
    sampled: Tensor  # the sampler's logprobs
    old: Tensor | None  # pi_old's; None: those of the forward pass that is differentiated
    reference: Tensor
    measured: dict[str, Tensor]

    def note(self, rows: Tensor, **values: Tensor) -> None:
        """Keep the newest measurement of the given rows."""
        for name, value in values.items():
            self.measured[name][rows, : value.shape[1]] = value.float().cpu()

    def metrics(self) -> dict[str, float]:
        """Means over response tokens."""

        def mean(matrix: Tensor) -> float:
            return float(matrix[self.mask].mean())

        now, reference = self.measured["logprob"], self.reference
        return {
            "kl": mean(kl_estimate(now, reference, "k3")),
            "kl_k1": mean(kl_estimate(now, reference, "k1")),
            "entropy": mean(self.measured["entropy"]),
            "clipped_low": mean(self.measured["clipped_low"]),
            "clipped_high": mean(self.measured["clipped_high"]),
        }

    def gap(self, rows: Tensor) -> dict[str, float]:
        """|Δlogprob| between sampler and trainer on the given rows, as last measured: mean and largest."""
        gap = (self.measured["logprob"] - self.sampled)[rows][self.mask[rows]].abs()
        return {"gap_mean": float(gap.mean()), "gap_max": float(gap.max())}
