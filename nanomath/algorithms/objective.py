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
from importlib import import_module

import torch
from torch import Tensor

from .advantages import (
    Rewards,
    decoupled_advantages,
    group_advantages,
    token_rewards,
    whiten,
)
from .credit import step_advantages
from .lessons import ADVANTAGES
from .losses import (
    Choices,
    Tokens,
    kl_estimate,
    kl_loss,
    loss_weights,
    policy_loss,
)
from .selection import sampler_correction, top_covariance, top_entropy
from .value import token_advantages


def compute_advantages(
    a: Choices, rewards: Rewards, tokens: Tokens
) -> tuple[Tensor, Tensor | None]:
    """Return advantages [B, T] of a whole rollout, and the returns [B, T] for a value model
    to learn.
    """
    returns = None
    if a.advantage != "reward":
        advantages = ADVANTAGES[a.advantage](a, rewards, tokens)
    elif has_group_baseline(a):
        advantages = _group_advantages(a, rewards, tokens)
    else:
        of_tokens = _token_rewards(a, rewards, tokens)
        advantages, returns = token_advantages(a, of_tokens, rewards, tokens)
    if a.whiten:
        advantages = whiten(advantages, tokens.loss_mask)
    return advantages, returns


def _group_advantages(a: Choices, rewards: Rewards, tokens: Tokens) -> Tensor:
    """Compare each completion's reward with its group's, and put the advantage on each of
    its tokens.

    The reward includes the KL where `kl_in` is "reward". The rewards of steps add to the
    tokens up to the end of their step.
    """
    if a.components == "apart":
        components = rewards.components.unflatten(1, (-1, rewards.group_size))
        weights = rewards.component_weights
        advantages = decoupled_advantages(components, weights, a.baseline, a.scale)
    else:
        totals = (
            _token_rewards(a, rewards, tokens).sum(dim=1).view(-1, rewards.group_size)
        )
        advantages = group_advantages(totals, a.baseline, a.scale)
    advantages = advantages.flatten()[:, None] * tokens.mask
    if rewards.steps is None:
        return advantages
    return advantages + step_advantages(a, rewards, tokens)


def _token_rewards(a: Choices, rewards: Rewards, tokens: Tokens) -> Tensor:
    kl = None
    if penalises_kl(a, "reward"):
        kl = kl_estimate(tokens.old_logprobs, tokens.ref_logprobs, a.kl_estimator)
    return token_rewards(rewards.total, tokens.mask, kl, a.kl_coef)


def compute_weights(a: Choices, tokens: Tokens, max_length: int) -> dict[str, Tensor]:
    """Return the weights [B, T] of one optimizer step on B episodes, by their names in
    `Tokens`.

    max_length: L_max of the "constant" aggregation.
    """
    mask = tokens.loss_mask
    old = tokens.old_logprobs
    weights = policy_weights = loss_weights(mask, a.aggregation, max_length)
    if a.sampler_correction != "off":
        bounds = (a.sampler_correction, a.correction_low, a.correction_high)
        behavior = tokens.behavior_logprobs
        policy_weights = weights * sampler_correction(old, behavior, mask, *bounds)
    if a.top_entropy < 1:
        chosen = top_entropy(tokens.old_entropy, mask, a.top_entropy)
        policy_weights = policy_weights * chosen
    computed = {"weights": weights, "policy_weights": policy_weights}
    if a.covariance != "off":
        steep = top_covariance(old, tokens.advantages, mask, a.covariance_share)
        if a.covariance == "clip":
            computed["policy_weights"] = policy_weights * ~steep
        else:
            computed["covariance_weights"] = weights * steep
    return computed


def has_gradient(a: Choices, tokens: Tokens) -> Tensor:
    """Mark the episodes whose loss has a gradient: bool [B]."""
    matter = tokens.policy_weights * tokens.advantages != 0
    valued = tokens.values is not None
    if penalises_kl(a, "loss") or valued or a.advantage == "teacher_full":
        matter |= tokens.weights != 0
    if tokens.covariance_weights is not None:
        matter |= tokens.covariance_weights != 0
    return matter.any(dim=1) | bool(a.loss)  # nothing is known of a loss of one's own


def policy_objective(a: Choices, logprobs: Tensor, tokens: Tokens) -> Tensor:
    """Return the share of the loss of some rows, from their logprobs [B, T] under the
    policy.
    """
    loss, _ = _policy_gradient(a, logprobs, tokens)
    old = _old_logprobs(logprobs, tokens)
    if penalises_kl(a, "loss"):
        options = (a.kl_estimator, a.kl_correction)
        kl = kl_loss(logprobs, tokens.ref_logprobs, old, tokens.weights, *options)
        loss = loss + a.kl_coef * kl
    if a.covariance == "kl":
        moved = torch.where(tokens.mask, logprobs, 0.0) - torch.where(
            tokens.mask, old, 0.0
        )
        loss = (
            loss + a.covariance_coef * (tokens.covariance_weights * moved.abs()).sum()
        )
    return loss


@torch.no_grad()
def clipped_tokens(a: Choices, logprobs: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """Return the masks [B, T] `clipped_low` and `clipped_high`; see `policy_loss`."""
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


def find_objective(name: str) -> Callable[[Choices, Tensor, Tokens], Tensor]:
    """Import the function `module.function` that takes the place of `policy_objective`; ""
    is `policy_objective` itself.

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


def has_group_baseline(a: Choices) -> bool:
    """Return whether a completion is compared with the others of its group."""
    return a.baseline not in ("off", "value")


def updates_once(a: Choices) -> bool:
    """Return whether the weights that are updated are those that sampled, so that the ratio
    is 1.
    """
    return a.epochs == a.minibatches == 1 and a.old_logprobs == "trainer"


def penalises_kl(a: Choices, place: str) -> bool:
    """Return whether the KL to the reference is penalised in this place: the "loss" or the
    "reward".
    """
    return a.kl_coef > 0 and a.kl_in == place
