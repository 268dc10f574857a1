"""What a policy step logs about its tokens: means over response tokens. See
docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.nn.functional import logsigmoid

from nanomath.algorithms import (
    Rewards,
    Tokens,
    explained_variance,
    kl_estimate,
    preferences,
    top_entropy,
)
from nanomath.models.batches import Example
from nanomath.rollout.episodes import Episode
from nanomath.settings import Algorithm

# Share of the tokens whose mean entropy is logged apart (arXiv 2506.01939).
TOP_ENTROPY = 0.2


def set_measurements(
    episodes: Sequence[Episode], tokens: Tokens, measured: Mapping[str, Tensor]
) -> None:
    """Set what rollouts.jsonl tells of each token of the episodes: their advantages, and by name
    what was measured of them.

    `gap` is log pi_old - log pi_sampler, `kl` log pi_old - log pi_ref where there is a
    reference, pi_old being the policy before the first update. `entropy` is that of the policy's
    newest forward pass; so are, where there are several updates, `ratio`, to the probability
    under the old policy, and `clipped` (-1: below the range of the ratio, 1: above it).
    `measured` holds matrices [B, T].
    """
    newest = measured["logprob"]
    old = tokens.old_logprobs
    before = newest if old is None else old
    matrices = {
        "gap": before - tokens.sampler_logprobs,
        "entropy": measured["entropy"],
    }
    if tokens.ref_logprobs is not None:
        matrices["kl"] = before - tokens.ref_logprobs
    if old is not None:
        clipped = measured["clipped_high"] - measured["clipped_low"]
        matrices |= {"ratio": (newest - old).exp(), "clipped": clipped.int()}
    for i, episode in enumerate(episodes):
        length = episode.completion.length
        episode.advantages = tokens.advantages[i, :length].tolist()
        for name, matrix in matrices.items():
            episode.measured[name] = matrix[i, :length].tolist()


def rollout_metrics(tokens: Tokens, measured: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the means of what the newest forward passes of the policy measured.

    `measured` holds matrices [B, T] by name.
    """
    mask = tokens.mask
    logprobs = measured["logprob"]
    matrices = {
        name: measured[name] for name in ("entropy", "clipped_low", "clipped_high")
    }
    if tokens.ref_logprobs is not None:
        matrices["kl"] = kl_estimate(logprobs, tokens.ref_logprobs, "k3")
        matrices["kl_k1"] = kl_estimate(logprobs, tokens.ref_logprobs, "k1")
    metrics = {name: float(matrix[mask].mean()) for name, matrix in matrices.items()}
    top = top_entropy(measured["entropy"], mask, TOP_ENTROPY)
    metrics["entropy_top"] = float(measured["entropy"][top].mean())
    if tokens.values is not None:
        metrics["explained_variance"] = explained_variance(
            tokens.values, tokens.returns, mask
        )
    return metrics


def lesson_metrics(
    a: Algorithm,
    rewards: Rewards,
    tokens: Tokens,
    logprobs: Tensor,
    shown: Iterable[tuple[Example, Example]],
) -> dict[str, float]:
    """Return what was made of the samples where it is not their rewards alone: the share that
    has a loss and the mean -log pi of these, DPO's pairs, the distance to the teacher, and the
    share for which it is shown more than the policy.

    `logprobs` [B, T] are those of the policy's newest forward passes, `shown` the examples as the
    teacher and as the policy sees them.
    """
    metrics = {}
    chosen = tokens.loss_mask.any(dim=1)
    if a.samples != "all":
        metrics["taught"] = float(chosen.double().mean())
        if chosen.any():
            metrics["nll"] = float(-logprobs[tokens.loss_mask].mean())
    if a.advantage == "preference":
        paired = chosen.view(-1, rewards.group_size).any(dim=1)
        margins = preferences(a, rewards, tokens)[1][paired]
        metrics["pairs"] = float(paired.double().mean())
        if len(margins):
            metrics["preference/loss"] = float(-logsigmoid(margins).mean())
            metrics["preference/margin"] = float(margins.mean())
            metrics["preference/accuracy"] = float((margins > 0).double().mean())
    if tokens.teacher_logprobs is not None:
        distance = tokens.old_logprobs - tokens.teacher_logprobs
        metrics["teacher_kl"] = float(distance[tokens.mask].mean())
        more = [teachers.prompt != ours.prompt for teachers, ours in shown]
        metrics["demonstrated"] = sum(more) / len(more)
    return metrics


def gap_of(tokens: Tokens, logprobs: Tensor) -> dict[str, float]:
    """Return `sampler_gap` of tokens whose logprobs [B, T] the policy gave."""
    matrices = logprobs, tokens.sampler_logprobs, tokens.behavior_logprobs
    return sampler_gap(*(matrix[tokens.mask] for matrix in matrices))


def sampler_gap(trainer: Tensor, sampler: Tensor, behavior: Tensor) -> dict[str, float]:
    """Compare the sampler with the trainer, by the logprobs [n] of n tokens.

    The gap is |Δlogprob|, mean and largest. The effective sample size is (sum w)^2 / (n sum
    w^2), as a share of the n tokens, w = trainer / behaviour probability: the behaviour
    policy is what the sampler drew from.
    """
    gap = (trainer - sampler).abs()
    weights = (trainer - behavior).exp()
    size = weights.sum().square() / (len(weights) * weights.square().sum())
    return {
        "gap_mean": float(gap.mean()),
        "gap_max": float(gap.max()),
        "effective_samples": float(size),
    }
