r"""The algorithm of one policy step, in three pure functions: advantages, weights, loss.

    L = sum_{i,t} w_{i,t} [ - gain(rho_{i,t}, A_{i,t}) + beta KL(pi || pi_ref)_{i,t} ]

`compute_advantages` gives A from the rewards of a rollout, `compute_weights` gives w from the
mask of one optimizer step, `policy_objective` gives L of any of its rows: weights make the
losses of micro-batches sum to that of the whole. Which formula each of them takes is a key of
[algorithm] (`a` below), and a row of a table in the files beside this one. A loss of one's own
is a function like `policy_objective`, named by the key `algorithm.loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module

import torch
from torch import Tensor

from .advantages import decoupled_advantages, group_advantages, token_rewards, whiten
from .aggregation import loss_weights
from .credit import on_tokens, process_advantages, token_baseline_advantages
from .kl import kl_estimate, kl_loss
from .policy import policy_loss
from .presets import Choices, has_group_baseline, penalises_kl
from .ratio import sampler_correction
from .selection import top_covariance, top_entropy
from .value import gae, value_loss


@dataclass
class Tokens:
    """What is known of the response tokens of B episodes: matrices [B, T], None where nothing
    needs them.

    mask: the response tokens. loss_mask: those that carry loss. Logprobs: of the sampler under
    its full distribution, of the behaviour policy (what the sampler drew from, after top-k and
    the like), of the policy before the first update (None: it is the policy itself), of the
    reference model. old_entropy: of the policy before the first update. values and returns: of
    the value model. weights: of the token losses. policy_weights: those of the policy
    gradient, after corrections and selections. covariance_weights: of the tokens that KL-Cov
    holds back.
    """

    mask: Tensor
    loss_mask: Tensor
    sampler_logprobs: Tensor
    behavior_logprobs: Tensor
    old_logprobs: Tensor | None = None
    old_entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    policy_weights: Tensor | None = None
    covariance_weights: Tensor | None = None

    def rows(self, rows: Tensor) -> Tokens:
        """Those of some episodes."""
        return Tokens(**{name: matrix[rows] for name, matrix in self._known()})

    def like(self, logprobs: Tensor) -> Tokens:
        """In the width, the dtype and on the device of logprobs [B, R]; the columns left out
        hold no token.
        """
        width = logprobs.shape[1]
        cut = {}
        for name, matrix in self._known():
            matrix = matrix[:, :width].to(logprobs.device)
            cut[name] = matrix if matrix.dtype == torch.bool else matrix.to(logprobs.dtype)
        return Tokens(**cut)

    def _known(self) -> list[tuple[str, Tensor]]:
        matrices = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, matrix) for name, matrix in matrices if matrix is not None]


@dataclass
class Rewards:
    """The rewards of B = N G episodes in prompt-major order: `total` [B], by component [C, B]
    with weights [C], and of their steps [B, S] with the tokens they end on (-1: no step), both
    None where no step is rewarded.
    """

    total: Tensor
    components: Tensor
    component_weights: Tensor
    group_size: int
    step_weight: float
    steps: Tensor | None = None
    step_ends: Tensor | None = None


def compute_advantages(
    a: Choices, rewards: Rewards, tokens: Tokens
) -> tuple[Tensor, Tensor | None]:
    """Advantages [B, T] of the tokens of a whole rollout, and the returns [B, T] that a value
    model learns from.
    """
    if has_group_baseline(a):
        advantages = _group_advantages(a, rewards, tokens)
        returns = None
    else:
        advantages, returns = _token_advantages(a, rewards, tokens)
    return whiten(advantages, tokens.loss_mask) if a.whiten else advantages, returns


def _group_advantages(a: Choices, rewards: Rewards, tokens: Tokens) -> Tensor:
    """One advantage for each completion, from its reward (and its KL, where that is one)
    against its group's; and for each token what the steps that are not over before it add.
    """
    if a.components == "apart":
        components = rewards.components.view(len(rewards.components), -1, rewards.group_size)
        advantages = decoupled_advantages(
            components, rewards.component_weights, a.baseline, a.scale
        )
    else:
        totals = _token_rewards(a, rewards, tokens).sum(dim=1).view(-1, rewards.group_size)
        advantages = group_advantages(totals, a.baseline, a.scale)
    advantages = advantages.flatten()[:, None] * tokens.mask
    return (
        advantages
        if rewards.steps is None
        else advantages + _step_advantages(a, rewards, tokens)
    )


def _step_advantages(a: Choices, rewards: Rewards, tokens: Tokens) -> Tensor:
    """A step's reward against the mean of the group's other steps, or per token against its
    other completions.
    """
    matrices = rewards.steps, rewards.step_ends, tokens.mask.sum(dim=1)
    width = tokens.mask.shape[1]
    groups = []
    for steps, ends, lengths in zip(
        *(matrix.split(rewards.group_size) for matrix in matrices), strict=True
    ):
        if a.baseline == "leave_one_out":
            groups.append(token_baseline_advantages(steps, ends, lengths, width))
        else:
            groups.append(process_advantages(steps, ends, width))
    return rewards.step_weight * torch.cat(groups)


def _token_advantages(a: Choices, rewards: Rewards, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """One advantage for each token, from the value model or the rewards to go; and the
    returns.
    """
    of_tokens = _token_rewards(a, rewards, tokens)
    if rewards.steps is not None:
        of_tokens = of_tokens + rewards.step_weight * on_tokens(
            rewards.steps, rewards.step_ends, of_tokens.shape[1]
        )
    if tokens.values is None:
        return gae(of_tokens, torch.zeros_like(of_tokens), tokens.mask, a.gamma, 1.0)
    return gae(of_tokens, tokens.values, tokens.mask, a.gamma, a.lam)


def _token_rewards(a: Choices, rewards: Rewards, tokens: Tokens) -> Tensor:
    kl = None
    if penalises_kl(a, "reward"):
        kl = kl_estimate(tokens.old_logprobs, tokens.ref_logprobs, a.kl_estimator)
    return token_rewards(rewards.total, tokens.mask, kl, a.kl_coef)


def compute_weights(a: Choices, tokens: Tokens, max_length: int) -> dict[str, Tensor]:
    """The weights [B, T] of one optimizer step on B episodes, by the names that they have in
    `Tokens`.

    max_length: L_max of the "constant" aggregation.
    """
    mask = tokens.loss_mask
    weights = policy_weights = loss_weights(mask, a.aggregation, max_length)
    if a.sampler_correction != "off":
        old = tokens.old_logprobs
        behavior = tokens.behavior_logprobs
        bounds = a.correction_low, a.correction_high
        policy_weights = weights * sampler_correction(
            old, behavior, mask, a.sampler_correction, *bounds
        )
    if a.top_entropy < 1:
        policy_weights = policy_weights * top_entropy(tokens.old_entropy, mask, a.top_entropy)
    if a.covariance == "off":
        return {"weights": weights, "policy_weights": policy_weights}
    steep = top_covariance(tokens.old_logprobs, tokens.advantages, mask, a.covariance_share)
    if a.covariance == "clip":
        return {"weights": weights, "policy_weights": policy_weights * ~steep}
    return {
        "weights": weights,
        "policy_weights": policy_weights,
        "covariance_weights": weights * steep,
    }


def has_gradient(a: Choices, tokens: Tokens) -> Tensor:
    """Which of B episodes have a loss that depends on the policy, or on a value model: bool
    [B].
    """
    matter = tokens.policy_weights * tokens.advantages != 0
    if penalises_kl(a, "loss") or tokens.values is not None:
        matter |= tokens.weights != 0
    if tokens.covariance_weights is not None:
        matter |= tokens.covariance_weights != 0
    return matter.any(dim=1)


def policy_objective(a: Choices, logprobs: Tensor, tokens: Tokens) -> Tensor:
    """The share of the loss that some rows have, from their logprobs [B, T] under the policy."""
    loss, _ = _policy_gradient(a, logprobs, tokens)
    old = _old_logprobs(logprobs, tokens)
    if penalises_kl(a, "loss"):
        kl = kl_loss(
            logprobs, tokens.ref_logprobs, old, tokens.weights, a.kl_estimator, a.kl_correction
        )
        loss = loss + a.kl_coef * kl
    if a.covariance == "kl":
        moved = torch.where(tokens.mask, logprobs, 0.0) - torch.where(tokens.mask, old, 0.0)
        loss = loss + a.covariance_coef * (tokens.covariance_weights * moved.abs()).sum()
    return loss


def find_objective(name: str) -> Callable[[Choices, Tensor, Tensor], Tensor]:
    """The function `module.function` in place of `policy_objective`, which is the one of "".
    ValueError if there is no such function to import.
    """
    if not name:
        return policy_objective
    module, _, function = name.rpartition(".")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"algorithm.loss is {name!r}, not the module.function of a loss: {error}"
        ) from None


def value_objective(a: Choices, values: Tensor, tokens: Tokens) -> Tensor:
    """The same of a value model, from its values [B, T]."""
    return a.value_coef * value_loss(
        values, tokens.values, tokens.returns, tokens.weights, a.value_clip
    )


@torch.no_grad()
def clipped_tokens(a: Choices, logprobs: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """Masks [B, T] `clipped_low` and `clipped_high`; see `policy_loss`."""
    return _policy_gradient(a, logprobs, tokens)[1]


def _policy_gradient(
    a: Choices, logprobs: Tensor, tokens: Tokens
) -> tuple[Tensor, dict[str, Tensor]]:
    return policy_loss(
        logprobs,
        _old_logprobs(logprobs, tokens),
        tokens.advantages,
        tokens.policy_weights,
        a.clip_low,
        a.clip_high,
        ratio=a.ratio,
        clip=a.clip,
        dual_clip=a.dual_clip,
        mask=tokens.mask,
    )


def _old_logprobs(logprobs: Tensor, tokens: Tokens) -> Tensor:
    return logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
