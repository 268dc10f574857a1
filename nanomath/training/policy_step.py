"""One policy step: run the models over a rollout, and follow the gradient of the objective.

The algorithm is in `nanomath/algorithms/objective.py`; here are the forward and backward
passes, the micro-batches and the ranks. Matrices [B, T] have B = N G episodes in prompt-major
order and T response tokens, on the CPU in float64. Whatever is a statistic of the batch
(advantages, weights, selections) is computed for the whole of it, by every rank alike, before
the rows are shared out among ranks and cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanomath import algorithms
from nanomath.data.order import generator_of
from nanomath.data.packing import Batch, make_batch
from nanomath.models.transformer import Transformer
from nanomath.rollout.episodes import Episode
from nanomath.settings import Algorithm
from nanomath.training import ranks
from nanomath.training.critic import Critic
from nanomath.training.logprobs import response_states, states_logprobs
from nanomath.training.optimizer import Optimizer
from nanomath.training.rollout_matrices import MEASURED, Rollout, rewards_of
from nanomath.training.sharding import micro_batches_of


@dataclass
class PolicyStep:
    """`step(episodes, number, lr)` updates the model on one rollout and returns its metrics.

    algorithm: the keys of [algorithm]. reward_weights: the weight of each reward by name.
    step_weight: what the rewards of steps are multiplied by. max_length: L_max of the
    "constant" aggregation. token_budget: padded tokens of a micro-batch, 0 for all at once.
    critic: the value model of baseline "value", with its optimizer in `critic_optimizer`; its
    learning rate is `critic_rate` times the policy's. ValueError for an `algorithm.loss` that
    cannot be imported.
    """

    model: Transformer
    reference: Transformer
    optimizer: Optimizer
    group_size: int
    algorithm: Algorithm = field(default_factory=Algorithm)
    temperature: float = 1.0
    reward_weights: dict[str, float] = field(default_factory=dict)
    step_weight: float = 1.0
    max_length: int = 0
    token_budget: int = 0
    seed: int = 0
    critic: Critic | None = None
    critic_optimizer: Optimizer | None = None
    critic_rate: float = 1.0

    def __post_init__(self) -> None:
        self.objective = algorithms.find_objective(self.algorithm.loss)

    def step(self, episodes: list[Episode], number: int, lr: float) -> dict[str, float]:
        """Update on the episodes of N groups; sets their advantages."""
        rollout = self.prepare(episodes)
        for episode, advantages in zip(
            episodes, rollout.tokens.advantages.tolist(), strict=True
        ):
            episode.advantages = advantages[: episode.completion.length]
        updates: list[dict[str, float]] = []
        gap: dict[str, float] = {}
        for epoch in range(self.algorithm.epochs):
            for rows in self._minibatches(len(episodes), number, epoch):
                updates.append(self._update(rollout, rows, lr))
                gap = gap or rollout.gap(
                    rows
                )  # the first pass was made by the weights that sampled
        means = {
            name: sum(update[name] for update in updates) / len(updates) for name in updates[0]
        }
        return {**means, **rollout.metrics(), **gap}

    def prepare(self, episodes: list[Episode]) -> Rollout:
        """The rollout as matrices, with the advantages that the algorithm asks for.

        ValueError where the algorithm needs a value model and there is none.
        FloatingPointError names the model and the episode of a number that is not finite.
        """
        a = self.algorithm
        if a.baseline == "value" and self.critic is None:
            raise ValueError('baseline = "value" needs a value model: critic is None')
        rollout = Rollout.of(episodes)
        tokens = rollout.tokens
        if a.overlong_filter:
            finished = torch.tensor([e.completion.finished for e in episodes])
            tokens.loss_mask = algorithms.overlong_filter(tokens.mask, finished)
        tokens.ref_logprobs, _ = self._measure(
            rollout, "the reference model", self._logprobs_of(self.reference), 2
        )
        tokens.old_logprobs, tokens.old_entropy = self._old_policy(rollout)
        if self.critic:
            (tokens.values,) = self._measure(rollout, "the value model", self._values, 1)
        rewards = rewards_of(episodes, self.reward_weights, self.group_size, self.step_weight)
        tokens.advantages, tokens.returns = algorithms.compute_advantages(a, rewards, tokens)
        return rollout

    def _old_policy(self, rollout: Rollout) -> tuple[Tensor | None, Tensor | None]:
        """The policy's logprobs and entropies before the first update, None where nothing
        needs them. With an exact model the sampler's logprobs are the same, and need no pass
        over the rollout.
        """
        a = self.algorithm
        entropy = None
        sampler_logprobs = rollout.tokens.sampler_logprobs
        logprobs = sampler_logprobs if self.model.exact else None
        early = (
            algorithms.penalises_kl(a, "reward")
            or a.sampler_correction != "off"
            or a.covariance != "off"
        )
        wanted = a.old_logprobs == "trainer" and (early or not algorithms.updates_once(a))
        if a.top_entropy < 1 or (wanted and logprobs is None):
            logprobs, entropy = self._measure(
                rollout, "the policy", self._logprobs_of(self.model), 2
            )
        return (sampler_logprobs if a.old_logprobs == "sampler" else logprobs), entropy

    def _logprobs_of(self, model: Transformer) -> Callable[[Batch], tuple[Tensor, ...]]:
        def logprobs(batch: Batch) -> tuple[Tensor, ...]:
            batch = batch.to(model.device)  # the reference may be elsewhere
            return states_logprobs(
                model, response_states(model, batch), batch, self.temperature
            )

        return logprobs

    def _values(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.critic(self.model, batch),)

    @torch.no_grad()
    def _measure(
        self,
        rollout: Rollout,
        who: str,
        function: Callable[[Batch], tuple[Tensor, ...]],
        outputs: int,
    ) -> list[Tensor]:
        """The `outputs` matrices [S, R] that `function` gives of a batch, of all rows and
        ranks as [B, T].
        """
        matrices = [
            torch.zeros(rollout.tokens.mask.shape, dtype=torch.float64) for _ in range(outputs)
        ]
        for rows, counts in micro_batches_of(self.model, rollout.lengths, self.token_budget):
            parts = function(self._batch(rollout, rows))
            if counts:
                note(matrices, rows, parts)
        ranks.sum_(matrices)
        for matrix in matrices:
            rollout.check(matrix, who)
        return matrices

    def _minibatches(self, total: int, number: int, epoch: int) -> list[Tensor]:
        if self.algorithm.minibatches == 1:
            return [torch.arange(total)]
        parts = torch.randperm(
            total, generator=generator_of(self.seed, number, epoch)
        ).tensor_split(self.algorithm.minibatches)
        return [part for part in parts if len(part)]

    def _update(self, rollout: Rollout, rows: Tensor, lr: float) -> dict[str, float]:
        """One optimizer step on the episodes `rows`, none if they teach nothing."""
        a = self.algorithm
        part = rollout.rows(rows)
        part.tokens = replace(
            part.tokens, **algorithms.compute_weights(a, part.tokens, self.max_length)
        )
        if not rollout.updated and a.old_logprobs == "trainer":
            part.tokens.old_logprobs = (
                None  # it is the policy: rounding must not make a small number of their ratio
            )
        teaches = (
            torch.ones(len(rows), dtype=torch.bool)
            if a.loss
            else algorithms.has_gradient(a, part.tokens)
        )
        measured = [torch.zeros(part.tokens.mask.shape, dtype=torch.float64) for _ in MEASURED]
        total = torch.zeros((), dtype=torch.float64)
        for active in (True, False):
            of_part = (teaches == active).nonzero()[:, 0]
            with torch.set_grad_enabled(active):
                for micro, counts in micro_batches_of(
                    self.model, part.lengths, self.token_budget, of_part
                ):
                    loss, found = self._loss(part, micro)
                    if active:
                        (
                            loss * counts
                        ).backward()  # a batch that only keeps ranks in step counts 0
                    if counts:
                        total += loss.detach().double().cpu()
                        note(measured, micro, found)
        ranks.sum_([*measured, total])
        rollout.note(rows, measured)
        rollout.check(rollout.measured["logprob"], "the policy")
        if not total.isfinite():
            raise FloatingPointError(f"the loss is {float(total)}")
        if not teaches.any():
            return {"loss": float(total), "grad_norm": 0.0, "update_ratio": 0.0}
        rollout.updated = True
        metrics = {"loss": float(total), **self.optimizer.step(lr)}
        if self.critic:
            self.critic_optimizer.step(lr * self.critic_rate)
        return metrics

    def _loss(self, rollout: Rollout, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The share of the loss of some rows, and what their forward pass shows, in the order
        of MEASURED.
        """
        batch = self._batch(rollout, rows)
        states = response_states(self.model, batch)
        logprobs, entropy = states_logprobs(self.model, states, batch, self.temperature)
        tokens = rollout.tokens.rows(rows).like(logprobs)
        loss = self.objective(self.algorithm, logprobs, tokens)
        if self.critic:
            values = self.critic(self.model, batch, states)
            loss = loss + algorithms.value_objective(self.algorithm, values, tokens)
        clipped = algorithms.clipped_tokens(self.algorithm, logprobs, tokens)
        return loss, [logprobs, entropy, clipped["clipped_low"], clipped["clipped_high"]]

    def _batch(self, rollout: Rollout, rows: Tensor) -> Batch:
        return make_batch([rollout.examples[i] for i in rows.tolist()]).to(self.model.device)


def note(matrices: list[Tensor], rows: Tensor, parts: list[Tensor]) -> None:
    """Put parts [S, R] into the given rows of matrices [B, T]."""
    for matrix, part in zip(matrices, parts, strict=True):
        matrix[rows, : part.shape[1]] = part.detach().double().cpu()
