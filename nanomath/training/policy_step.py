"""One policy step: turn the rewards of a rollout into advantages and follow the policy gradient.

    L = sum_{i,t} w_{i,t} [ - gain(rho, A) + beta KL(pi || pi_ref) + c_V (V - return)^2 / 2 ]

Everything one may want to change is a pure function of `nanomath.algorithms`, chosen by the keys of [algorithm]; this
file moves their arguments about. Matrices [B, T] have B = N G episodes in prompt-major order and T response tokens, on
the CPU in float64. Whatever is a statistic of the batch (advantages, weights, selections) is computed for the whole of
it, by every rank alike, before the rows are shared out among ranks and cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanomath import algorithms
from nanomath.data.order import generator_of
from nanomath.data.packing import Batch, make_batch, micro_batches
from nanomath.models.transformer import Transformer
from nanomath.rollout.episodes import Episode
from nanomath.settings import Algorithm
from nanomath.training import ranks
from nanomath.training.critic import Critic
from nanomath.training.logprobs import response_states, states_logprobs
from nanomath.training.optimizer import Optimizer
from nanomath.training.rollout_matrices import MEASURED, Rollout
from nanomath.training.sharding import is_sharded


@dataclass
class PolicyStep:
    """`step(episodes, number, lr)` updates the model on one rollout and returns its metrics.

    algorithm: what is computed. reward_weights: of the components, where each has advantages of its own. step_weight:
    of the advantages, or without a group of the rewards, of steps. max_length: L_max of the "constant" aggregation.
    token_budget: padded tokens of a micro-batch, 0 for all at once. critic: the value model of baseline "value", with
    its optimizer in `critic_optimizer`; its learning rate is `critic_rate` times the policy's.
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

    def step(self, episodes: list[Episode], number: int, lr: float) -> dict[str, float]:
        """Update on the episodes of N groups; sets their advantages."""
        rollout = self.prepare(episodes)
        for episode, advantages in zip(episodes, rollout.advantages.tolist(), strict=True):
            episode.advantages = advantages[: episode.completion.length]
        updates: list[dict[str, float]] = []
        gap: dict[str, float] = {}
        for epoch in range(self.algorithm.epochs):
            for chosen in self._minibatches(len(episodes), number, epoch):
                updates.append(self._update(rollout, chosen, lr))
                gap = gap or rollout.gap(chosen)  # the first pass was made by the weights that sampled
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        return {**means, **rollout.metrics(), **gap}

    # Before the first update: what is a function of the whole rollout.

    def prepare(self, episodes: list[Episode]) -> Rollout:
        """The rollout as matrices, with the advantages that the algorithm asks for.

        ValueError where the algorithm needs a value model and there is none. FloatingPointError names the model and the
        episode of a number that is not finite.
        """
        if self.algorithm.baseline == "value" and self.critic is None:
            raise ValueError('baseline = "value" needs a value model: critic is None')
        rollout = Rollout.of(episodes)
        if self.algorithm.overlong_filter:
            finished = torch.tensor([e.completion.finished for e in episodes])
            rollout.counted = algorithms.overlong_filter(rollout.mask, finished)
        rollout.reference, _ = self._score(rollout, "the reference model", self._logprobs_of(self.reference), 2)
        rollout.old, rollout.entropy = self._old_policy(rollout)
        if self.critic:
            (rollout.values,) = self._score(rollout, "the value model", self._values, 1)
        grouped = algorithms.has_group_baseline(self.algorithm)
        advantages = (self._group_advantages if grouped else self._token_advantages)(episodes, rollout)
        rollout.advantages = algorithms.whiten(advantages, rollout.counted) if self.algorithm.whiten else advantages
        return rollout

    def _old_policy(self, rollout: Rollout) -> tuple[Tensor | None, Tensor | None]:
        """pi_old's logprobs and entropies, None where nothing needs them before the first update. With an exact model
        the sampler's logprobs are pi_old's, and need no pass over the rollout.
        """
        a, entropy = self.algorithm, None
        logprobs = rollout.sampled if self.model.exact else None
        early = self._kl_in_reward or a.sampler_correction != "off" or a.covariance != "off"
        wanted = a.old_logprobs == "trainer" and (early or not algorithms.updates_once(a))
        if a.top_entropy < 1 or (wanted and logprobs is None):
            logprobs, entropy = self._score(rollout, "the policy", self._logprobs_of(self.model), 2)
        return (rollout.sampled if a.old_logprobs == "sampler" else logprobs), entropy

    def _group_advantages(self, episodes: list[Episode], rollout: Rollout) -> Tensor:
        """One advantage for each completion, from its reward (and its KL, where that is one) against its group's; and
        for each token what the steps that are not over before it add.
        """
        a = self.algorithm
        if a.components == "apart":
            columns = [[e.rewards[name] for e in episodes] for name in self.reward_weights]
            components = torch.tensor(columns, dtype=torch.float64).view(len(columns), -1, self.group_size)
            weights = torch.tensor(list(self.reward_weights.values()), dtype=torch.float64)
            advantages = algorithms.decoupled_advantages(components, weights, a.baseline, a.scale)
        else:
            rewards = self._token_rewards(episodes, rollout).sum(dim=1).view(-1, self.group_size)
            advantages = algorithms.group_advantages(rewards, a.baseline, a.scale)
        advantages = advantages.flatten()[:, None] * rollout.mask
        return advantages + self._step_advantages(episodes, rollout) if _has_steps(episodes) else advantages

    def _step_advantages(self, episodes: list[Episode], rollout: Rollout) -> Tensor:
        """What the rewards of steps are above those of the group's other steps, or of its other tokens."""
        matrices = *_steps(episodes), rollout.mask.sum(dim=1)
        width, found = rollout.mask.shape[1], []
        for rewards, ends, lengths in zip(*(matrix.split(self.group_size) for matrix in matrices), strict=True):
            if self.algorithm.baseline == "leave_one_out":
                found.append(algorithms.token_baseline_advantages(rewards, ends, lengths, width))
            else:
                found.append(algorithms.process_advantages(rewards, ends, width))
        return self.step_weight * torch.cat(found)

    def _token_advantages(self, episodes: list[Episode], rollout: Rollout) -> Tensor:
        """One advantage for each token: from the value model, or the rewards to go. Sets the returns as well."""
        a, rewards = self.algorithm, self._token_rewards(episodes, rollout)
        if _has_steps(episodes):
            rewards = rewards + self.step_weight * algorithms.on_tokens(*_steps(episodes), rewards.shape[1])
        values, lam = (torch.zeros_like(rewards), 1.0) if rollout.values is None else (rollout.values, a.lam)
        advantages, rollout.returns = algorithms.gae(rewards, values, rollout.mask, a.gamma, lam)
        return advantages

    def _token_rewards(self, episodes: list[Episode], rollout: Rollout) -> Tensor:
        a = self.algorithm
        outcomes = torch.tensor([e.rewards["total"] for e in episodes], dtype=torch.float64)
        kl = algorithms.kl_estimate(rollout.old, rollout.reference, a.kl_estimator) if self._kl_in_reward else None
        return algorithms.token_rewards(outcomes, rollout.mask, kl, a.kl_coef)

    @property
    def _kl_in_reward(self) -> bool:
        return algorithms.penalises_kl(self.algorithm, "reward")

    @property
    def _kl_in_loss(self) -> bool:
        return algorithms.penalises_kl(self.algorithm, "loss")

    def _logprobs_of(self, model: Transformer) -> Callable[[Batch], tuple[Tensor, ...]]:
        def logprobs(batch: Batch) -> tuple[Tensor, ...]:
            batch = batch.to(model.device)  # the reference may be elsewhere
            return states_logprobs(model, response_states(model, batch), batch, self.temperature)

        return logprobs

    def _values(self, batch: Batch) -> tuple[Tensor, ...]:
        return (self.critic(self.model, batch),)

    @torch.no_grad()
    def _score(
        self, rollout: Rollout, who: str, function: Callable[[Batch], tuple[Tensor, ...]], outputs: int
    ) -> list[Tensor]:
        """The `outputs` matrices [S, R] that `function` gives of a batch, of all rows and ranks as [B, T]."""
        matrices = [torch.zeros(rollout.mask.shape, dtype=torch.float64) for _ in range(outputs)]
        for rows, counts in self._cut(rollout, torch.arange(len(rollout.examples))):
            parts = function(self._batch(rollout, rows))
            if counts:
                _note(matrices, rows, parts)
        ranks.sum_(matrices)
        for matrix in matrices:
            rollout.check(matrix, who)
        return matrices

    # The updates.

    def _minibatches(self, total: int, number: int, epoch: int) -> list[Tensor]:
        if self.algorithm.minibatches == 1:
            return [torch.arange(total)]
        parts = torch.randperm(total, generator=generator_of(self.seed, number, epoch)).tensor_split(
            self.algorithm.minibatches
        )
        return [part for part in parts if len(part)]

    def _update(self, rollout: Rollout, chosen: Tensor, lr: float) -> dict[str, float]:
        """One optimizer step on the episodes `chosen`, none if they teach nothing."""
        weights = self._weights(rollout, chosen)
        idle = self._idle(rollout, chosen, weights)
        measured = [torch.zeros(rollout.mask.shape, dtype=torch.float64) for _ in MEASURED]
        total = torch.zeros((), dtype=torch.float64)
        for active, part in ((True, chosen[~idle]), (False, chosen[idle])):
            with torch.set_grad_enabled(active):
                for rows, counts in self._cut(rollout, part):
                    loss, found = self._loss(rollout, rows, weights)
                    if active:
                        (loss * counts).backward()  # a batch that only keeps ranks in step counts 0
                    if counts:
                        total += loss.detach().double().cpu()
                        _note(measured, rows, found)
        ranks.sum_([*measured, total])
        rollout.note(chosen, measured)
        rollout.check(rollout.measured["logprob"], "the policy")
        if not total.isfinite():
            raise FloatingPointError(f"the loss is {float(total)}")
        if idle.all():
            return {"loss": float(total), "grad_norm": 0.0, "update_ratio": 0.0}
        rollout.moved = True
        metrics = {"loss": float(total), **self.optimizer.step(lr)}
        if self.critic:
            self.critic_optimizer.step(lr * self.critic_rate)
        return metrics

    def _weights(self, rollout: Rollout, chosen: Tensor) -> dict[str, Tensor]:
        """What the token losses of one optimizer step are multiplied by, [B, T] each: the policy gradient, the penalty
        on tokens of high covariance ("held_back"), and the rest ("every").
        """
        a, mask = self.algorithm, rollout.counted[chosen]
        every = algorithms.loss_weights(mask, a.aggregation, self.max_length)
        weights = {"every": every, "policy": every}
        if a.sampler_correction != "off":
            old, drawn = rollout.old[chosen], rollout.drawn_from[chosen]
            bounds = a.correction_low, a.correction_high
            weights["policy"] = every * algorithms.sampler_correction(old, drawn, mask, a.sampler_correction, *bounds)
        if a.top_entropy < 1:
            weights["policy"] = weights["policy"] * algorithms.top_entropy(rollout.entropy[chosen], mask, a.top_entropy)
        if a.covariance != "off":
            share = a.covariance_share
            steep = algorithms.top_covariance(rollout.old[chosen], rollout.advantages[chosen], mask, share)
            if a.covariance == "clip":
                weights["policy"] = weights["policy"] * ~steep
            else:
                weights["held_back"] = every * steep
        return {name: torch.zeros(rollout.mask.shape).double().index_put((chosen,), w) for name, w in weights.items()}

    def _idle(self, rollout: Rollout, chosen: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Which of the episodes `chosen` have a gradient of zero, bool [n]: they are measured only."""
        teaching = weights["policy"] * rollout.advantages != 0
        if self._kl_in_loss or self.critic:
            teaching |= weights["every"] != 0
        if "held_back" in weights:
            teaching |= weights["held_back"] != 0
        return ~teaching[chosen].any(dim=1)

    def _loss(self, rollout: Rollout, rows: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The share of the loss of some rows, and what their forward pass shows, in the order of MEASURED."""
        a, batch = self.algorithm, self._batch(rollout, rows)
        states = response_states(self.model, batch)
        logprobs, entropy = states_logprobs(self.model, states, batch, self.temperature)

        def cut(matrix: Tensor) -> Tensor:
            matrix = matrix[rows, : logprobs.shape[1]].to(logprobs.device)
            return matrix if matrix.dtype == torch.bool else matrix.to(logprobs.dtype)

        every, policy = cut(weights["every"]), cut(weights["policy"])
        # Before the first update pi_old is pi, and rounding must not make log pi - log pi_old a small number.
        old = cut(rollout.old) if rollout.moved or a.old_logprobs == "sampler" else logprobs.detach()
        options = {"ratio": a.ratio, "clip": a.clip, "dual_clip": a.dual_clip, "mask": cut(rollout.mask)}
        loss, clipped = algorithms.policy_loss(
            logprobs, old, cut(rollout.advantages), policy, a.clip_low, a.clip_high, **options
        )
        if self._kl_in_loss:
            reference = cut(rollout.reference)
            kl = algorithms.kl_loss(logprobs, reference, old, every, a.kl_estimator, a.kl_correction)
            loss = loss + a.kl_coef * kl
        if a.covariance == "kl":
            loss = loss + a.covariance_coef * (cut(weights["held_back"]) * (logprobs - old).abs()).sum()
        if self.critic:
            values, old_values = self.critic(self.model, batch, states), cut(rollout.values)
            value_loss = algorithms.value_loss(values, old_values, cut(rollout.returns), every, a.value_clip)
            loss = loss + a.value_coef * value_loss
        return loss, [logprobs, entropy, clipped["clipped_low"], clipped["clipped_high"]]

    def _batch(self, rollout: Rollout, rows: Tensor) -> Batch:
        return make_batch([rollout.examples[i] for i in rows.tolist()]).to(self.model.device)

    def _cut(self, rollout: Rollout, rows: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """This rank's micro-batches of the rows, and whether each counts."""
        lengths = [len(rollout.examples[i]) for i in rows.tolist()]
        cut_one = partial(micro_batches, token_budget=self.token_budget)
        for micro, counts in ranks.cut(lengths, cut_one, is_sharded(self.model)):
            yield rows[micro], counts


def _has_steps(episodes: Sequence[Episode]) -> bool:
    """Whether steps are rewarded."""
    return any(e.step_rewards for e in episodes)


def _steps(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
    """The rewards of steps, and the tokens they end on, -1 where there is no step: [B, S] each."""
    rewards = [torch.tensor(e.step_rewards, dtype=torch.float64) for e in episodes]
    ends = [torch.tensor(e.step_ends, dtype=torch.int64) for e in episodes]
    return pad_sequence(rewards, batch_first=True), pad_sequence(ends, batch_first=True, padding_value=-1)


def _note(matrices: list[Tensor], rows: Tensor, parts: Sequence[Tensor]) -> None:
    """Put parts [S, R] into the given rows of matrices [B, T]."""
    for matrix, part in zip(matrices, parts, strict=True):
        matrix[rows, : part.shape[1]] = part.detach().double().cpu()
