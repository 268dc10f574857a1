r"""The loss of a policy step, axis by axis. All matrices are [B, T]: B sequences, T tokens.

    L = sum_{i,t} w_{i,t} [ - gain(rho_{i,t}, A_{i,t}) + beta KL_{i,t} ]

Weights w: how token losses become one number. They are fixed for a whole optimizer step
*before* it is cut into micro-batches, so the gradient cannot depend on how it is cut.

    token     w = 1 / (all response tokens)                DAPO, arXiv 2503.14476
    sequence  w = 1 / (B |o_i|)                            GRPO, arXiv 2402.03300
    constant  w = 1 / (B L_max)                            Dr. GRPO, arXiv 2503.20783
    sum       w = 1 / (completions with a token)           DPO, arXiv 2305.18290

Ratio rho: how far the policy has moved since it sampled. All three have the gradient
rho d log pi(o_t). GSPO's token form has the value and, wherever the advantage and the weight
are the same for all tokens of a sequence, the gradient of exp(mean_t log rho_t); unlike that
it also takes advantages that differ within a sequence.

    token     pi(o_t) / pi_old(o_t)                        PPO, arXiv 1707.06347; GRPO
    sequence  sg(exp(mean_t log rho_t)) pi / sg(pi)        GSPO, arXiv 2507.18071
    off       pi(o_t) / sg(pi(o_t))                        REINFORCE, RLOO

Gain: what happens to ratios that are too far out.

    ppo    min(rho A, clip(rho, 1 - low, 1 + high) A)      PPO; high > low: DAPO's clip-higher
    dual   the same, but at least c A where A < 0          dual-clip PPO, arXiv 1912.09729
    cispo  sg(clip(rho, 1 - low, 1 + high)) A log pi       CISPO, MiniMax-M1, arXiv 2506.13585
    off    rho A                                           with ratio "off" it is REINFORCE

KL: estimates of KL(pi || pi_ref) from tokens drawn from pi (Schulman, "Approximating KL
divergence", 2020), of x = log pi - log pi_ref.

    k1  x        k2  x^2 / 2        k3  exp(-x) - 1 + x        k3+  k3's value, k2's gradient

k1 and k3 are unbiased in value, and k3 is never negative. Where an estimate stands decides
what it does (arXiv 2510.01555, 2512.21852; tests/algorithms shows all of this by enumeration).
In the reward, k1 gives the gradient of the KL (if advantages are not divided by a spread) and
the others do not. In the loss, k2 and k3+ give it token by token, k3 gives the gradient of the
*forward* KL(pi_ref || pi), k1 none. Tokens drawn from an older pi_old are carried over to pi by
the ratio pi / pi_old, either as a weight ("weight") or with its gradient ("ratio"); with the
gradient, k1 and k3 in the loss give the gradient of the KL as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

Choices = Any  # the keys of [algorithm]; see nanomath/settings.py for what each means

# exp(20) is 5e8: a token so far off carries no information. Beyond, the ratio is held and its
# gradient is 0, because exp of more than 88 is infinite in float32, and infinity times a zero
# gradient is NaN.
LIMIT = 20.0


def check_name(axis: str, name: str, known: Collection[str]) -> None:
    """Raise a ValueError that lists the names of the axis where `name` is none of them."""
    if name not in known:
        raise ValueError(f"unknown {axis} {name!r}: choose one of {', '.join(known)}")


@dataclass
class Tokens:
    """The response tokens of B episodes: everything known of them, as matrices [B, T].

    A matrix that nothing needs is None. `policy_weights` are the weights of the policy
    gradient after corrections and selections, `covariance_weights` those of the tokens that
    KL-Cov holds back. The behaviour policy is what the sampler drew from, after top-k and
    the like.
    """

    mask: Tensor  # the response tokens
    loss_mask: Tensor  # those of them that carry loss
    sampler_logprobs: Tensor  # under the sampler's full distribution
    behavior_logprobs: Tensor
    # Of the policy before the first update; None: this one.
    old_logprobs: Tensor | None = None
    old_entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    policy_weights: Tensor | None = None
    covariance_weights: Tensor | None = None

    def rows(self, rows: Tensor) -> Tokens:
        """Return the tokens of some episodes."""
        return Tokens(**{name: matrix[rows] for name, matrix in self._known().items()})

    def like(self, logprobs: Tensor) -> Tokens:
        """Return the tokens in the width, the dtype and on the device of logprobs [B, R].

        The columns left out hold no token.
        """
        cut = {}
        for name, matrix in self._known().items():
            dtype = torch.bool if matrix.dtype == torch.bool else logprobs.dtype
            cut[name] = matrix[:, : logprobs.shape[1]].to(logprobs.device, dtype)
        return Tokens(**cut)

    def _known(self) -> dict[str, Tensor]:
        matrices = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: matrix for name, matrix in matrices.items() if matrix is not None}


# ------------------------------------------------------------------------------------ weights


def response_mask(lengths: Tensor) -> Tensor:
    """Mark the first lengths[i] tokens of row i: [B] -> bool [B, T]. A pad id plays no
    part.
    """
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def token_weights(mask: Tensor, max_length: int) -> Tensor:
    """Give every token the same weight, so that long completions count more."""
    return mask.double() / mask.sum().clamp(min=1)


def sequence_weights(mask: Tensor, max_length: int) -> Tensor:
    """Give every completion the same weight, so that a token of a long one counts less."""
    return mask.double() / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def constant_weights(mask: Tensor, max_length: int) -> Tensor:
    """Give every token a weight that depends on nothing that was sampled.

    ValueError without a maximum length.
    """
    if max_length <= 0:
        raise ValueError(
            "aggregation 'constant' divides by the maximum length: "
            f"{max_length} is not positive"
        )
    return mask.double() / (len(mask) * max_length)


def summed_weights(mask: Tensor, max_length: int) -> Tensor:
    """Sum over a completion's tokens, and take the mean over the completions that have any."""
    return mask.double() / mask.any(dim=1).sum().clamp(min=1)


AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token": token_weights,
    "sequence": sequence_weights,
    "constant": constant_weights,
    "sum": summed_weights,
}


def loss_weights(mask: Tensor, how: str, max_length: int = 0) -> Tensor:
    """Return the weight of every token's loss, float64 [B, T], zero where mask [B, T] is
    False.

    `max_length` is L_max in tokens, needed by "constant" only. Empty responses weigh
    nothing but still count in B.
    """
    check_name("aggregation", how, AGGREGATIONS)
    return AGGREGATIONS[how](mask, max_length)


# -------------------------------------------------------------------------------------- ratio


def token_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return log rho_t, 0 outside the mask."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-LIMIT, LIMIT)


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return mean_t log rho_t at every token, with the gradient of its log pi; 0 outside
    the mask.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).detach()
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(
        min=1
    )
    # The difference first: mean + log pi would round.
    token = mean.clamp(-LIMIT, LIMIT) + (logprobs - logprobs.detach())
    return torch.where(mask, token, 0.0)


def no_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return 0, with the gradient of log pi."""
    return torch.where(mask, logprobs - logprobs.detach(), 0.0)


RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": token_log_ratio,
    "sequence": sequence_log_ratio,
    "off": no_log_ratio,
}


# ------------------------------------------------------------------------ the policy gradient


def ppo_gain(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    dual: float,
) -> Tensor:
    """Return the smaller gain: moving the ratio out of [1 - low, 1 + high] gains nothing."""
    return torch.minimum(
        ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    )


def dual_gain(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    dual: float,
) -> Tensor:
    """Return PPO's gain, but at least dual * A where A < 0.

    A token that has grown far likelier is thus not pushed down without end.
    """
    gain = ppo_gain(ratio, logprobs, advantages, low, high, dual)
    return torch.where(advantages < 0, torch.maximum(gain, dual * advantages), gain)


def cispo_gain(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    dual: float,
) -> Tensor:
    """Return a gain in which every token keeps its gradient, with a bounded weight."""
    return ratio.detach().clamp(1 - low, 1 + high) * advantages * logprobs


def plain_gain(
    ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    dual: float,
) -> Tensor:
    """Return the importance-weighted advantage as it is."""
    return ratio * advantages


CLIPS: dict[str, Callable[..., Tensor]] = {
    "ppo": ppo_gain,
    "dual": dual_gain,
    "cispo": cispo_gain,
    "off": plain_gain,
}


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    ratio: str = "token",
    clip: str = "ppo",
    dual_clip: float = 3.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the scalar loss, and the masks [B, T] `clipped_low` and `clipped_high`.

    A token is clipped when its ratio has left the clip range in the direction in which its
    advantage pushes (with "ppo" it has no gradient). advantages: [B] or [B, T]. mask: the
    response tokens, where it differs from weights != 0 (a sequence's ratio is a mean over
    all of them). Tokens outside the mask never count, whatever they hold; tokens of weight
    0 inside it count only through the ratio of their sequence.
    """
    check_name("ratio", ratio, RATIOS)
    check_name("clip", clip, CLIPS)
    weighted = weights != 0
    mask = weighted if mask is None else mask
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    logprobs = torch.where(mask, logprobs, 0.0)
    advantages = torch.where(weighted, advantages, 0.0)
    rho = RATIOS[ratio](logprobs, old_logprobs, mask).exp()
    gain = CLIPS[clip](rho, logprobs, advantages, clip_low, clip_high, dual_clip)
    clipped = {
        "clipped_low": (advantages < 0) & (rho < 1 - clip_low),
        "clipped_high": (advantages > 0) & (rho > 1 + clip_high),
    }
    return -(weights * gain).sum(), clipped


# ----------------------------------------------------------------------------------------- KL


def k1(x: Tensor) -> Tensor:
    """Return x."""
    return x


def k2(x: Tensor) -> Tensor:
    """Return x^2 / 2."""
    return x.square() / 2


def k3(x: Tensor) -> Tensor:
    """Return exp(-x) - 1 + x, a straight line below -LIMIT, where exp would overflow."""
    y = (-x).clamp(max=LIMIT)
    return y.expm1() + y.exp() * (-x - y) + x


def k3_plus(x: Tensor) -> Tensor:
    """Return k3's value with k2's gradient."""
    return k2(x) + (k3(x) - k2(x)).detach()


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3+": k3_plus,
}
KL_CORRECTIONS = ("off", "weight", "ratio")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Estimate the KL at every token: the result has the shape of the two logprobs."""
    check_name("KL estimator", kind, KL_ESTIMATORS)
    return KL_ESTIMATORS[kind](logprobs - ref_logprobs)


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor,
    weights: Tensor,
    kind: str = "k3",
    correction: str = "off",
) -> Tensor:
    """Return sum w rho KL: rho is 1 ("off"), pi / pi_old as a "weight", or with gradient
    ("ratio").
    """
    check_name("KL correction", correction, KL_CORRECTIONS)
    weighted = weights != 0
    ref_logprobs = torch.where(weighted, ref_logprobs, 0.0)
    kl = kl_estimate(torch.where(weighted, logprobs, 0.0), ref_logprobs, kind)
    if correction == "off":
        return (weights * kl).sum()
    rho = token_log_ratio(logprobs, old_logprobs, weighted).exp()
    return (weights * (rho if correction == "ratio" else rho.detach()) * kl).sum()
