"""One policy step: run the models over a rollout, and follow the gradient of the objective.

The algorithm is in nanomath/algorithms/objective.py; here are the forward and backward passes,
the micro-batches and the ranks. Matrices [B, T] have B = N G episodes in prompt-major order and
T response tokens, on the CPU, in float64 but for masks. Whatever is a statistic of the batch
(advantages, weights, selections) is computed for the whole of it, by every rank alike, before
the rows are shared out among ranks and cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanomath import algorithms
from nanomath.algorithms import Rewards, Tokens
from nanomath.data.order import generator_of
from nanomath.models.batches import (
    Batch,
    Example,
    make_batch,
    response_states,
    states_logprobs,
)
from nanomath.models.transformer import Transformer
from nanomath.rollout.episodes import Episode
from nanomath.settings import Algorithm
from nanomath.training import ranks
from nanomath.training.critic import Critic
from nanomath.training.optimizer import Optimizer
from nanomath.training.policy_metrics import (
    gap_of,
    lesson_metrics,
    rollout_metrics,
    set_measurements,
)
from nanomath.training.teacher import Teacher


@dataclass
class PolicyStep:
    """Updates the model on one rollout: `step(episodes, number, lr)` returns its metrics.

    algorithm: the keys of [algorithm]. reward_weights: the weight of each reward by name.
    step_weight: what the rewards of steps are multiplied by. max_length: L_max of the
    "constant" aggregation. token_budget: tokens of a micro-batch, 0 for all at once.
    critic: the value model of baseline "value", with its optimizer in `critic_optimizer`;
    its learning rate is `critic_rate` times the policy's. teacher: the model that the
    advantages "teacher" and "teacher_full" need. ValueError for an `algorithm.loss` that
    cannot be imported.
    """

    model: Transformer
    reference: Transformer | None
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
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        self.objective = algorithms.find_objective(self.algorithm.loss)

    def step(self, episodes: list[Episode], number: int, lr: float) -> dict[str, float]:
        """Update the model on the episodes of N groups, and return the metrics.

        It also sets the episodes' advantages and what was measured of their tokens.
        """
        rollout = self.prepare(episodes)
        tokens = rollout.tokens
        measured = rollout.measured
        updates: list[dict[str, float]] = []
        gap: dict[str, float] = {}
        for epoch in range(self.algorithm.epochs):
            for rows in self._minibatches(len(episodes), number, epoch):
                updates.append(self._update(rollout, rows, lr))
                # Of the first pass, by the weights that sampled.
                gap = gap or gap_of(tokens.rows(rows), measured["logprob"][rows])
        set_measurements(episodes, tokens, measured)
        # A minibatch without a gradient tells nothing of the parts of the model: 0.
        names = dict.fromkeys(name for update in updates for name in update)
        means = {
            name: sum(update.get(name, 0.0) for update in updates) / len(updates)
            for name in names
        }
        return {
            **means,
            **rollout_metrics(tokens, measured),
            **gap,
            **lesson_metrics(
                self.algorithm,
                rollout.rewards,
                tokens,
                measured["logprob"],
                zip(rollout.shown, rollout.examples, strict=bool(rollout.shown)),
            ),
        }

    def prepare(self, episodes: list[Episode]) -> Rollout:
        """Return the rollout as matrices, with the advantages that the algorithm asks for.

        ValueError where the algorithm needs a value model and there is none.
        FloatingPointError names the model and the episode of a number that is not finite.
        """
        a = self.algorithm
        rollout = rollout_of(episodes)
        tokens = rollout.tokens
        rewards = rollout.rewards = rewards_of(
            episodes, self.reward_weights, self.group_size, self.step_weight
        )
        if a.overlong_filter:
            finished = torch.tensor([e.completion.finished for e in episodes])
            tokens.loss_mask = algorithms.overlong_filter(tokens.mask, finished)
        if a.samples != "all":
            tokens.loss_mask = algorithms.select_samples(a, rewards, tokens.loss_mask)
        if self.reference:
            tokens.ref_logprobs, _ = self._logprobs(
                rollout, "the reference model", self.reference
            )
        tokens.old_logprobs, tokens.old_entropy = self._old_policy(rollout)
        if self.critic:
            (tokens.values,) = self._measure(
                rollout, "the value model", lambda b: (self.critic(self.model, b),), 1
            )
        elif a.baseline == "value":
            raise ValueError('baseline = "value" needs a value model: critic is None')
        if a.advantage.startswith("teacher"):
            rollout.shown = self.teacher.examples(episodes, self.group_size)
            shown = replace(rollout, examples=rollout.shown)
            teacher = self.teacher.model
            tokens.teacher_logprobs, _ = self._logprobs(shown, "the teacher", teacher)
        tokens.advantages, tokens.returns = algorithms.compute_advantages(
            a, rewards, tokens
        )
        return rollout

    def _old_policy(self, rollout: Rollout) -> tuple[Tensor | None, Tensor | None]:
        """Return the policy's logprobs and entropies before the first update, None where
        nothing needs them.

        With an exact model the sampler's logprobs are the same, and need no pass over the
        rollout.
        """
        sampler_logprobs = rollout.tokens.sampler_logprobs
        logprobs = sampler_logprobs if self.model.exact else None
        entropy = None
        if self.needs_old_pass():
            logprobs, entropy = self._logprobs(rollout, "the policy", self.model)
        if self.algorithm.old_logprobs == "sampler":
            logprobs = sampler_logprobs
        return logprobs, entropy

    def needs_old_pass(self) -> bool:
        """Return whether the policy is run over the rollout before its first update."""
        a = self.algorithm
        before_the_update = (
            algorithms.penalises_kl(a, "reward")
            or a.sampler_correction != "off"
            or a.covariance != "off"
            or a.advantage in ("preference", "teacher", "teacher_full")
            or not algorithms.updates_once(a)
        )
        wanted = a.old_logprobs == "trainer" and before_the_update
        return a.top_entropy < 1 or (wanted and not self.model.exact)

    def _logprobs(self, rollout: Rollout, who: str, model: Transformer) -> list[Tensor]:
        """Return a model's logprobs and entropies [B, T]."""

        def of_batch(batch: Batch) -> tuple[Tensor, ...]:
            batch = batch.to(model.device)  # the reference may be elsewhere
            states = response_states(model, batch)
            return states_logprobs(model, states, batch, self.temperature)

        return self._measure(rollout, who, of_batch)

    @torch.no_grad()
    def _measure(
        self,
        rollout: Rollout,
        who: str,
        function: Callable[[Batch], tuple[Tensor, ...]],
        outputs: int = 2,
    ) -> list[Tensor]:
        """Return the `outputs` matrices [S, R] that `function` gives of each batch, put
        together as [B, T].
        """
        matrices = [rollout.matrix() for _ in range(outputs)]
        for rows, counts in ranks.micro_batches_of(
            self.model, rollout.examples, self.token_budget
        ):
            parts = function(rollout.batch(rows, self.model.device))
            if counts:
                note(matrices, rows, parts)
        ranks.sum_(matrices)
        for matrix in matrices:
            rollout.check(matrix, who)
        return matrices

    def _minibatches(self, total: int, number: int, epoch: int) -> list[Tensor]:
        if self.algorithm.minibatches == 1:
            return [torch.arange(total)]
        order = torch.randperm(total, generator=generator_of(self.seed, number, epoch))
        return [
            part for part in order.tensor_split(self.algorithm.minibatches) if len(part)
        ]

    def _update(self, rollout: Rollout, rows: Tensor, lr: float) -> dict[str, float]:
        """Make one optimizer step on the episodes `rows`; none if no token of them has a
        gradient.
        """
        a = self.algorithm
        part = rollout.rows(rows)
        part.tokens = replace(
            part.tokens, **algorithms.compute_weights(a, part.tokens, self.max_length)
        )
        if not rollout.updated and a.old_logprobs == "trainer":
            # It is the policy: rounding must not make a small number of their ratio.
            part.tokens.old_logprobs = None
        teaches = algorithms.has_gradient(a, part.tokens)
        total = torch.zeros((), dtype=torch.float64)
        for active in (True, False):
            of_part = (teaches == active).nonzero()[:, 0]
            with torch.set_grad_enabled(active):
                for micro, counts in ranks.micro_batches_of(
                    self.model, part.examples, self.token_budget, of_part
                ):
                    loss, found = self._loss(part, micro)
                    if active:
                        # Times 0: of a batch that only keeps ranks in step.
                        (loss * counts).backward()
                    if counts:
                        total += loss.detach().double().cpu()
                        note(part.measured.values(), micro, found)
        ranks.sum_([*part.measured.values(), total])
        for name, matrix in part.measured.items():
            rollout.measured[name][rows] = matrix
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
        """Return these rows' share of the loss, and what their forward pass measured
        (`MEASURED`).
        """
        batch = rollout.batch(rows, self.model.device)
        states = response_states(self.model, batch)
        logprobs, entropy = states_logprobs(self.model, states, batch, self.temperature)
        tokens = rollout.tokens.rows(rows).like(logprobs)
        loss = self.objective(self.algorithm, logprobs, tokens)
        if self.algorithm.advantage == "teacher_full":
            shown = [rollout.shown[i] for i in rows.tolist()]
            kl = self.teacher.kl(self.model, states, shown, batch, self.temperature)
            loss = loss + (tokens.weights * kl).sum()
        if self.critic:
            values = self.critic(self.model, batch, states)
            loss = loss + algorithms.value_objective(self.algorithm, values, tokens)
        clipped = algorithms.clipped_tokens(self.algorithm, logprobs, tokens)
        return loss, [logprobs, entropy, *clipped.values()]


MEASURED = ("logprob", "entropy", "clipped_low", "clipped_high")


@dataclass
class Rollout:
    """The episodes of one policy step: the tokens that a model is run over, and what is
    known of them.

    names: the name of each episode, for errors. measured: what the newest forward passes of
    the policy measured, by the names in MEASURED. updated: whether the policy has changed
    since it sampled. shown: the examples as the teacher sees them, none without a teacher.
    """

    examples: list[Example]
    names: list[str]
    tokens: Tokens
    updated: bool = False
    rewards: Rewards | None = None
    shown: list[Example] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.measured = {name: self.matrix() for name in MEASURED}

    def matrix(self) -> Tensor:
        """Return zeros [B, T]."""
        return torch.zeros_like(self.tokens.sampler_logprobs)

    def rows(self, rows: Tensor) -> Rollout:
        """Return the part of some episodes, without measurements."""
        lists = (self.examples, self.names, self.shown or self.examples)
        examples, names, shown = ([each[i] for i in rows.tolist()] for each in lists)
        return Rollout(examples, names, self.tokens.rows(rows), shown=shown)

    def batch(self, rows: Tensor, device: torch.device) -> Batch:
        """Return the batch of some episodes."""
        return make_batch([self.examples[i] for i in rows.tolist()]).to(device)

    def check(self, values: Tensor, who: str) -> None:
        """Raise a FloatingPointError that names the first episode for which `who` gave a
        number that is not finite.
        """
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, token = bad[0].tolist()
            value = values[row, token].item()
            raise FloatingPointError(
                f"{who} gave {value} at token {token} of {self.names[row]}"
            )


def rollout_of(episodes: Sequence[Episode]) -> Rollout:
    """Make the rollout of some episodes.

    FloatingPointError if the sampler gave a logprob that is not finite.
    """
    lengths = torch.tensor([len(e.completion.tokens) for e in episodes])
    mask = algorithms.response_mask(lengths)
    sampler_logprobs = _padded([e.completion.logprobs for e in episodes])
    behavior_logprobs = _padded([e.completion.sampling_logprobs for e in episodes])
    rollout = Rollout(
        examples=[Example(e.prompt, e.completion.tokens) for e in episodes],
        names=[
            f"sample {e.completion.sample_index} of problem {e.problem.id}"
            for e in episodes
        ],
        tokens=Tokens(mask, mask, sampler_logprobs, behavior_logprobs),
    )
    for logprobs in (sampler_logprobs, behavior_logprobs):
        rollout.check(logprobs, "the sampler")
    return rollout


def rewards_of(
    episodes: Sequence[Episode],
    component_weights: Mapping[str, float],
    group_size: int,
    step_weight: float,
) -> Rewards:
    """Return the rewards of the episodes of N groups."""
    components = [[e.rewards[name] for e in episodes] for name in component_weights]
    steps = step_ends = None
    if any(e.step_rewards for e in episodes):
        steps = _padded([e.step_rewards for e in episodes])
        step_ends = _padded([e.step_ends for e in episodes], -1).long()
    return Rewards(
        total=torch.tensor([e.rewards["total"] for e in episodes], dtype=torch.float64),
        components=torch.tensor(components, dtype=torch.float64),
        component_weights=torch.tensor(
            list(component_weights.values()), dtype=torch.float64
        ),
        group_size=group_size,
        steps=steps,
        step_ends=step_ends,
        step_weight=step_weight,
        right=torch.tensor([e.rewards.get("accuracy", 0.0) > 0 for e in episodes]),
    )


def _padded(rows: list[list[float]], padding: float = 0.0) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=padding)


def note(matrices: Sequence[Tensor], rows: Tensor, parts: Sequence[Tensor]) -> None:
    """Write parts [S, R] into the given rows of matrices [B, T]."""
    for matrix, part in zip(matrices, parts, strict=True):
        matrix[rows, : part.shape[1]] = part.detach().double().cpu()
