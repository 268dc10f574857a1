"""What the tests of the algorithms share: the papers' formulas on plain floats, small random
batches, differences.

Nothing here is taken from nanomath: a formula stands as its paper has it, one token at a time.
Where a paper stops a gradient, the formula takes the point at which it is frozen as an
argument of its own, so that the derivative of the rest can be had by differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

LENGTHS = [3, 0, 1, 5]

# The defaults of [algorithm]: GRPO as published.
GRPO = {
    **{
        "baseline": "group",
        "components": "sum",
        "scale": "group",
        "whiten": False,
        "credit": "off",
        "advantage": "reward",
        "samples": "all",
        "preference_beta": 0.1,
        "loss": "",
    },
    **{
        "ratio": "token",
        "clip": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "aggregation": "sequence",
    },
    **{"kl_coef": 0.04, "kl_estimator": "k3", "kl_in": "loss", "kl_correction": "off"},
    **{
        "old_logprobs": "trainer",
        "sampler_correction": "off",
        "correction_low": 0.5,
        "correction_high": 2.0,
    },
    **{
        "overlong_filter": False,
        "keep_groups": "all",
        "refills": 0,
        "top_entropy": 1.0,
    },
    **{"covariance": "off", "covariance_share": 2e-4, "covariance_coef": 1.0},
    **{"gamma": 1.0, "lam": 0.95, "value_coef": 0.5, "epochs": 1, "minibatches": 1},
}


def choices(**changes: object) -> SimpleNamespace:
    """GRPO's choices with some of them changed."""
    return SimpleNamespace(**{**GRPO, **changes})


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: list[float]) -> float:
    """With G - 1 in the denominator."""
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ratio_of(
    kind: str, x: float, frozen: list[float], old: list[float], t: int
) -> float:
    """The ratio of token t whose logprob is x, in a completion whose logprobs are `frozen`
    where a gradient stops.
    """
    if kind == "token":
        return math.exp(x - old[t])
    if kind == "off":
        return math.exp(x - frozen[t])
    return math.exp(mean([a - b for a, b in zip(frozen, old, strict=True)])) * math.exp(
        x - frozen[t]
    )  # GSPO-token


def gain_of(
    kind: str,
    rho: float,
    frozen_rho: float,
    x: float,
    a: float,
    low: float,
    high: float,
    c: float,
) -> float:
    """What one token adds to the objective."""
    if kind == "off":
        return rho * a
    if kind == "cispo":
        return clip(frozen_rho, 1 - low, 1 + high) * a * x
    gain = min(rho * a, clip(rho, 1 - low, 1 + high) * a)
    return max(gain, c * a) if kind == "dual" and a < 0 else gain


def weight_of(kind: str, lengths: list[int], i: int, longest: int) -> float:
    """1 / (all tokens), 1 / (B |o_i|), 1 / (B L_max), 1 / (completions with a token)."""
    return (
        1
        / {
            "token": sum(lengths),
            "sequence": len(lengths) * lengths[i],
            "constant": len(lengths) * longest,
            "sum": sum(n > 0 for n in lengths),
        }[kind]
    )


def kl_of(kind: str, x: float) -> float:
    """The value of an estimate at x = log pi - log pi_ref."""
    return {
        "k1": x,
        "k2": x * x / 2,
        "k3": math.exp(-x) - 1 + x,
        "k3+": math.exp(-x) - 1 + x,
    }[kind]


def derivative(f: Callable[[float], float], x: float, h: float = 1e-3) -> float:
    """f'(x) from five points, to h^4 / 30 of the fifth derivative; no kink may lie within 2 h."""
    return (f(x - 2 * h) - 8 * f(x - h) + 8 * f(x + h) - f(x + 2 * h)) / (12 * h)


def each_token(lengths: list[int]) -> list[tuple[int, int]]:
    return [(i, t) for i, n in enumerate(lengths) for t in range(n)]


def sum_and_slopes(
    f: Callable[[int, int, float], float], at: Tensor, lengths: list[int]
) -> tuple[float, Tensor]:
    """sum f(i, t, x) over the tokens at x = at[i, t], and its derivatives by each x, [B, T]."""
    slopes = torch.zeros_like(at)
    for i, t in each_token(lengths):
        slopes[i, t] = derivative(lambda x, i=i, t=t: f(i, t, x), float(at[i, t]))
    return math.fsum(f(i, t, float(at[i, t])) for i, t in each_token(lengths)), slopes


def randoms(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Standard normal float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]


def new_batch(
    seed: int, lengths: list[int] = LENGTHS, width: int | None = None
) -> SimpleNamespace:
    """Logprobs of all parties, advantages, values and rewards [B, T] of completions of the
    given lengths; one spare column, so that there is always something that must not count. The
    mask is made here, from the lengths.
    """
    shape = (len(lengths), (max(lengths) + 1) if width is None else width)
    new, old, ref, sampled, advantages, values, old_values, rewards = randoms(
        seed, *[shape] * 8
    )
    mask = torch.tensor(
        [[t < n for t in range(shape[1])] for n in lengths], dtype=torch.bool
    ).view(shape)
    return SimpleNamespace(
        **{
            "mask": mask,
            "new": new * 0.4 - 2,
            "old": old * 0.4 - 2,
            "ref": ref * 0.4 - 2,
            "sampled": sampled * 0.4 - 2,
        },
        **{
            "advantages": advantages,
            "values": values,
            "old_values": old_values,
            "rewards": rewards,
        },
        weights=mask.double() / max(1, sum(lengths)),
    )
