"""The episodes of one policy step as matrices [B, T], and what the passes over them measured.

B = N G episodes in prompt-major order, T response tokens; on the CPU, float64 but for the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanomath.algorithms import explained_variance, kl_estimate, response_mask, top_entropy
from nanomath.data.packing import Example
from nanomath.rollout.episodes import Episode

MEASURED = ("logprob", "entropy", "clipped_low", "clipped_high")
TOP_ENTROPY = 0.2  # share of the tokens whose mean entropy is logged apart (arXiv 2506.01939)


@dataclass
class Rollout:
    """`PolicyStep.prepare` fills in what the algorithm needs; the rest stays None."""

    examples: list[Example]
    names: list[str]  # of the episodes, for errors
    mask: Tensor  # response tokens
    counted: Tensor  # those that carry loss
    sampled: Tensor  # the sampler's logprobs under the full distribution
    drawn_from: Tensor  # and under the truncated one that it drew from
    reference: Tensor | None = None
    old: Tensor | None = None  # pi_old's logprobs
    entropy: Tensor | None = None  # pi_old's entropies
    values: Tensor | None = None
    returns: Tensor | None = None
    advantages: Tensor | None = None
    moved: bool = False  # whether the weights have been updated since
    measured: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Rollout:
        """FloatingPointError if the sampler gave a logprob that is not finite."""
        mask = response_mask(torch.tensor([e.completion.length for e in episodes]))

        def matrix(rows: list[list[float]]) -> Tensor:
            flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
            return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, flat)

        rollout = cls(
            examples=[Example(e.prompt, e.completion.tokens) for e in episodes],
            names=[f"sample {e.completion.sample_index} of problem {e.problem.id}" for e in episodes],
            mask=mask,
            counted=mask,
            sampled=matrix([e.completion.logprobs for e in episodes]),
            drawn_from=matrix([e.completion.sampling_logprobs for e in episodes]),
            measured={name: torch.zeros(mask.shape, dtype=torch.float64) for name in MEASURED},
        )
        for logprobs in (rollout.sampled, rollout.drawn_from):
            rollout.check(logprobs, "the sampler")
        return rollout

    def check(self, values: Tensor, who: str) -> None:
        """FloatingPointError naming the first episode for which `who` gave a number [B, T] that is not finite."""
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, token = bad[0].tolist()
            raise FloatingPointError(f"{who} gave {values[row, token].item()} at token {token} of {self.names[row]}")

    def note(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Keep the newest measurements of the given rows of matrices [B, T], in the order of MEASURED."""
        for name, value in zip(MEASURED, values, strict=True):
            self.measured[name][rows] = value[rows]

    def metrics(self) -> dict[str, float]:
        """Means over response tokens."""

        def mean(matrix: Tensor, mask: Tensor = self.mask) -> float:
            return float(matrix[mask].mean())

        now, entropy = self.measured["logprob"], self.measured["entropy"]
        metrics = {
            "kl": mean(kl_estimate(now, self.reference, "k3")),
            "kl_k1": mean(kl_estimate(now, self.reference, "k1")),
            "entropy": mean(entropy),
            "entropy_top": mean(entropy, top_entropy(entropy, self.mask, TOP_ENTROPY)),
            "clipped_low": mean(self.measured["clipped_low"]),
            "clipped_high": mean(self.measured["clipped_high"]),
        }
        if self.values is not None:
            metrics["explained_variance"] = explained_variance(self.values, self.returns, self.mask)
        return metrics

    def gap(self, rows: Tensor) -> dict[str, float]:
        """Sampler against trainer on the given rows, as last measured: |Δlogprob|, mean and largest, and the effective
        sample size (sum w)^2 / (n sum w^2) of w = trainer / sampler probability, as a share of the n tokens.
        """
        mask = self.mask[rows]
        return sampler_gap(*(m[rows][mask] for m in (self.measured["logprob"], self.sampled, self.drawn_from)))


def sampler_gap(trainer: Tensor, sampled: Tensor, drawn_from: Tensor) -> dict[str, float]:
    """`Rollout.gap` of the logprobs [n] of n tokens: the trainer's, the sampler's, those under what it drew from."""
    gap, weights = (trainer - sampled).abs(), (trainer - drawn_from).exp()
    size = weights.sum().square() / (len(weights) * weights.square().sum())
    return {"gap_mean": float(gap.mean()), "gap_max": float(gap.max()), "effective_samples": float(size)}
