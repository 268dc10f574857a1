"""The methods as rows of one table, and the combinations of choices that make no sense.

A row names where a method departs from GRPO as published (its settings are the defaults of
[algorithm] in nanomath/settings.py). Any choice can be overridden in the config; `check`
refuses what contradicts itself.

Learning rates, group sizes and sampling lengths are left to the config. Numbers that a paper
does not give are ours: the KL coefficients of rloo, reinforce_pp and ppo are the defaults of
trl and OpenRLHF, the minibatches of dapo, cispo and ppo are 4 (DAPO: 16, of 8192 samples;
CISPO: 16), because one update per rollout would leave nothing to clip.
"""

from __future__ import annotations

from typing import Any

from .losses import Choices
from .objective import has_group_baseline, penalises_kl, updates_once

TOKEN_MEAN = {"aggregation": "token", "kl_coef": 0.0}
WITHOUT_REWARDS = {"baseline": "off", "scale": "off", "clip": "off", "kl_coef": 0.0}
KL_IN_REWARD = {"kl_in": "reward", "kl_estimator": "k1"}
PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300
    "grpo": {},
    # arXiv 2503.20783: no division by lengths and spreads, which favour long wrong answers and
    # extreme problems
    "dr_grpo": {"scale": "off", "aggregation": "constant", "kl_coef": 0.0},
    # arXiv 2503.14476: clip-higher, token mean, dynamic sampling; its overlong punishment is
    # reward.weights.overlong
    "dapo": TOKEN_MEAN
    | {"clip_high": 0.28, "minibatches": 4, "keep_groups": "mixed", "refills": 3},
    # arXiv 2507.18071
    "gspo": {
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl_coef": 0.0,
        "minibatches": 4,
    },
    # MiniMax-M1, arXiv 2506.13585: weights up to 5, none below
    "cispo": TOKEN_MEAN
    | {"clip": "cispo", "clip_low": 1.0, "clip_high": 4.0, "minibatches": 4},
    # arXiv 2402.14740: REINFORCE on whole sequences, hence a sum over tokens
    "rloo": KL_IN_REWARD
    | {
        "baseline": "leave_one_out",
        "scale": "off",
        "ratio": "off",
        "clip": "off",
        "aggregation": "constant",
        "kl_coef": 0.05,
    },
    # arXiv 2501.03262; with baseline = "group", kl_in = "loss" and kl_estimator = "k2" it is
    # REINFORCE++-baseline
    "reinforce_pp": KL_IN_REWARD
    | {
        "baseline": "off",
        "scale": "off",
        "whiten": True,
        "aggregation": "token",
        "kl_coef": 0.01,
    },
    # process supervision of arXiv 2402.03300; reward.weights.accuracy = 0 leaves the steps'
    # rewards alone
    "process_grpo": {"credit": "sum"},
    # arXiv 2504.15275, with the KL of its code; reward.weights.accuracy = 0.1 is its mix with
    # verifiable rewards
    "pure": KL_IN_REWARD
    | {"credit": "min", "baseline": "leave_one_out", "scale": "off", "kl_coef": 0.001},
    # arXiv 1707.06347 with 2203.02155's KL in the reward
    "ppo": KL_IN_REWARD
    | {
        "baseline": "value",
        "scale": "off",
        "whiten": True,
        "clip": "dual",
        "aggregation": "token",
        "kl_coef": 0.05,
        "minibatches": 4,
    },
    # arXiv 2508.08221
    "lite_ppo": TOKEN_MEAN | {"scale": "batch"},
    # arXiv 2601.05242: several rewards
    "gdpo": {"components": "apart", "whiten": True},
    # arXiv 2505.22617, both
    "clip_cov": TOKEN_MEAN | {"covariance": "clip", "minibatches": 4},
    "kl_cov": TOKEN_MEAN | {"covariance": "kl", "clip": "off", "minibatches": 4},
    # cross-entropy on right samples: on-policy SFT of arXiv 2507.00432, rejection sampling of
    # 2308.01825
    "sft": WITHOUT_REWARDS
    | {"advantage": "one", "samples": "right", "ratio": "off", "aggregation": "token"},
    # arXiv 2305.18290, on a pair of every group that has a right sample and a wrong one
    "dpo": WITHOUT_REWARDS
    | {
        "advantage": "preference",
        "samples": "pair",
        "ratio": "off",
        "aggregation": "sum",
    },
    # on-policy distillation: the reverse KL of arXiv 2306.13649 as an advantage of each token
    "opd": WITHOUT_REWARDS | {"advantage": "teacher", "aggregation": "token"},
}


def check(a: Choices) -> None:
    """Raise a ValueError, with the reason, for choices that contradict one another."""
    for contradiction in _contradictions(a):
        raise ValueError(contradiction)


def _contradictions(a: Choices) -> list[str]:
    grouped = has_group_baseline(a)
    once = updates_once(a)
    kl_loss = penalises_kl(a, "loss")
    kl_reward = penalises_kl(a, "reward")
    apart = a.components == "apart"
    corrects = a.sampler_correction != "off"
    unrewarded = a.advantage != "reward"
    pairs = a.samples == "pair"
    found = {
        f"scale = {a.scale!r} divides by the spread of group rewards, but baseline = "
        f'{a.baseline!r} compares with no group: set scale = "off" (and whiten = true to '
        "normalise over the batch)": not grouped and a.scale != "off",
        f'components = "apart" normalises each reward within the group, but baseline = '
        f"{a.baseline!r} has none": not grouped and apart,
        f"keep_groups = {a.keep_groups!r} drops groups without spread, but with baseline = "
        f"{a.baseline!r} they teach as well": (
            not grouped and not pairs and a.keep_groups != "all"
        ),
        f'advantage = {a.advantage!r} compares no rewards: set baseline = "off" and credit = '
        '"off"': unrewarded and (a.baseline != "off" or a.credit != "off"),
        f'advantage = {a.advantage!r} has no rewards to put the KL into: set kl_in = "loss", '
        "or kl_coef = 0": unrewarded and kl_reward,
        f"advantage = {a.advantage!r} means what it is: whiten would shift it": (
            unrewarded and a.whiten
        ),
        'advantage = "preference" has the gradient of DPO on pairs, before any update: it '
        'needs samples = "pair", ratio = "off" and aggregation = "sum"': (
            a.advantage == "preference"
            and not (pairs and a.ratio == "off" and a.aggregation == "sum")
        ),
        'components = "apart" takes advantages of whole completions, but credit = '
        f"{a.credit!r} rewards steps": a.credit != "off" and apart,
        'refills replace dropped groups, but keep_groups = "all" drops none: set keep_groups, '
        "or refills = 0": a.keep_groups == "all" and a.refills > 0,
        'ratio = "sequence" with one update per rollout is always 1 and changes nothing: raise '
        'minibatches (GSPO: 4) or epochs, or set old_logprobs = "sampler"': (
            a.ratio == "sequence" and once
        ),
        'ratio = "off" takes no account of how far the policy has moved since it sampled: it '
        'needs epochs = 1, minibatches = 1 and old_logprobs = "trainer"': (
            a.ratio == "off" and not once
        ),
        f'clip = {a.clip!r} bounds a ratio, but ratio = "off" has none: set clip = "off"': (
            a.ratio == "off" and a.clip != "off"
        ),
        f"dual_clip = {a.dual_clip:g} must be above 1 + clip_high = {1 + a.clip_high:g}": (
            a.clip == "dual" and a.dual_clip <= 1 + a.clip_high
        ),
        'old_logprobs = "sampler" puts the sampler\'s probabilities into the ratio already: '
        "sampler_correction would count them twice": corrects
        and a.old_logprobs == "sampler",
        f"correction_low = {a.correction_low:g} and correction_high = {a.correction_high:g} "
        "must have 1 between them": (
            corrects and not a.correction_low <= 1 <= a.correction_high
        ),
        'kl_estimator = "k1" in the loss has an expected gradient of zero: put it into the '
        'reward (kl_in = "reward"), or let the ratio carry its gradient (kl_correction = '
        '"ratio"), or use k2': (
            kl_loss and a.kl_estimator == "k1" and a.kl_correction != "ratio"
        ),
        f"kl_estimator = {a.kl_estimator!r} has the right gradient by itself: that of the "
        'ratio on top makes it wrong; set kl_correction = "weight", or use k1 or k3': (
            kl_loss and a.kl_estimator in ("k2", "k3+") and a.kl_correction == "ratio"
        ),
        f"kl_estimator = {a.kl_estimator!r} in the reward does not give the gradient of the "
        "KL: only k1 does": kl_reward and a.kl_estimator != "k1",
        f"kl_correction = {a.kl_correction!r} is for the KL in the loss: in the reward the "
        "policy's ratio does it": kl_reward and a.kl_correction != "off",
        'components = "apart" normalises each reward apart, and the KL in the reward is none '
        'of them: set kl_in = "loss"': kl_reward and apart,
        'baseline = "value" needs a value model that learns: value_coef must be above 0': (
            a.baseline == "value" and a.value_coef <= 0
        ),
    }
    return [reason for reason, nonsense in found.items() if nonsense]
