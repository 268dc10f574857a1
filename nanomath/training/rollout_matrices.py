"""The episodes of one policy step as matrices [B, T], and what the passes over them measured.

B = N G episodes in prompt-major order, T response tokens; on the CPU, float64 but for the
masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanomath.algorithms import (
    Rewards,
    Tokens,
    explained_variance,
    kl_estimate,
    response_mask,
    top_entropy,
)
from nanomath.data.packing import Example
from nanomath.rollout.episodes import Episode

MEASURED = ("logprob", "entropy", "clipped_low", "clipped_high")
TOP_ENTROPY = 0.2  # share of the tokens whose mean entropy is logged apart (arXiv 2506.01939)


@dataclass
class Rollout:
    """Examples to run a model over, the names of their episodes (for errors), what is known of
    their tokens, and what the newest forward passes of the policy measured of them; `updated`:
    whether it has been updated since it sampled.
    """

    examples: list[Example]
    names: list[str]
    tokens: Tokens
    measured: dict[str, Tensor] = field(default_factory=dict)
    updated: bool = False

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Rollout:
        """FloatingPointError if the sampler gave a logprob that is not finite."""
        mask = response_mask(torch.tensor([e.completion.length for e in episodes]))

        def matrix(rows: list[list[float]]) -> Tensor:
            flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
            return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, flat)

        sampler_logprobs = matrix([e.completion.logprobs for e in episodes])
        behavior_logprobs = matrix([e.completion.sampling_logprobs for e in episodes])
        rollout = cls(
            examples=[Example(e.prompt, e.completion.tokens) for e in episodes],
            names=[
                f"sample {e.completion.sample_index} of problem {e.problem.id}"
                for e in episodes
            ],
            tokens=Tokens(mask, mask, sampler_logprobs, behavior_logprobs),
            measured={name: torch.zeros(mask.shape, dtype=torch.float64) for name in MEASURED},
        )
        for logprobs in (sampler_logprobs, behavior_logprobs):
            rollout.check(logprobs, "the sampler")
        return rollout

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example, prompt and response."""
        return [len(example) for example in self.examples]

    def rows(self, rows: Tensor) -> Rollout:
        """The part of some episodes, without measurements."""
        chosen = rows.tolist()
        examples = [self.examples[i] for i in chosen]
        return Rollout(examples, [self.names[i] for i in chosen], self.tokens.rows(rows))

    def check(self, values: Tensor, who: str) -> None:
        """FloatingPointError naming the first episode for which `who` gave a number [B, T]
        that is not finite.
        """
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, token = bad[0].tolist()
            raise FloatingPointError(
                f"{who} gave {values[row, token].item()} at token {token} of {self.names[row]}"
            )

    def note(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Keep the newest measurements of the given rows of matrices [B, T], in the order of
        MEASURED.
        """
        for name, value in zip(MEASURED, values, strict=True):
            self.measured[name][rows] = value

    def metrics(self) -> dict[str, float]:
        """Means over response tokens."""
        tokens = self.tokens

        def mean(matrix: Tensor, mask: Tensor = tokens.mask) -> float:
            return float(matrix[mask].mean())

        now = self.measured["logprob"]
        entropy = self.measured["entropy"]
        metrics = {
            "kl": mean(kl_estimate(now, tokens.ref_logprobs, "k3")),
            "kl_k1": mean(kl_estimate(now, tokens.ref_logprobs, "k1")),
            "entropy": mean(entropy),
            "entropy_top": mean(entropy, top_entropy(entropy, tokens.mask, TOP_ENTROPY)),
            "clipped_low": mean(self.measured["clipped_low"]),
            "clipped_high": mean(self.measured["clipped_high"]),
        }
        if tokens.values is not None:
            metrics["explained_variance"] = explained_variance(
                tokens.values, tokens.returns, tokens.mask
            )
        return metrics

    def gap(self, rows: Tensor) -> dict[str, float]:
        """Sampler against trainer on the given rows, as last measured: |Δlogprob|, mean and
        largest, and the effective sample size (sum w)^2 / (n sum w^2) of w = trainer / sampler
        probability, as a share of the n tokens.
        """
        tokens = self.tokens
        mask = self.tokens.mask[rows]
        matrices = self.measured["logprob"], tokens.sampler_logprobs, tokens.behavior_logprobs
        return sampler_gap(*(matrix[rows][mask] for matrix in matrices))


def rewards_of(
    episodes: Sequence[Episode],
    component_weights: Mapping[str, float],
    group_size: int,
    step_weight: float,
) -> Rewards:
    """The rewards of the episodes of N groups."""
    components = [[e.rewards[name] for e in episodes] for name in component_weights]
    steps = step_ends = None
    if any(e.step_rewards for e in episodes):
        steps = pad_sequence(
            [torch.tensor(e.step_rewards, dtype=torch.float64) for e in episodes],
            batch_first=True,
        )
        ends = [torch.tensor(e.step_ends, dtype=torch.int64) for e in episodes]
        step_ends = pad_sequence(ends, batch_first=True, padding_value=-1)
    return Rewards(
        total=torch.tensor([e.rewards["total"] for e in episodes], dtype=torch.float64),
        components=torch.tensor(components, dtype=torch.float64),
        component_weights=torch.tensor(list(component_weights.values()), dtype=torch.float64),
        group_size=group_size,
        steps=steps,
        step_ends=step_ends,
        step_weight=step_weight,
    )


def sampler_gap(trainer: Tensor, sampler: Tensor, behavior: Tensor) -> dict[str, float]:
    """`Rollout.gap` of the logprobs [n] of n tokens: the trainer's, the sampler's, those under
    what it drew from.
    """
    gap = (trainer - sampler).abs()
    weights = (trainer - behavior).exp()
    size = weights.sum().square() / (len(weights) * weights.square().sum())
    return {
        "gap_mean": float(gap.mean()),
        "gap_max": float(gap.max()),
        "effective_samples": float(size),
    }
