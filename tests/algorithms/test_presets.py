"""The table of methods against the papers, in settings and in what comes out; and what `check`
refuses.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from oracles import (
    GRPO,
    choices,
    clip,
    derivative,
    each_token,
    kl_of,
    mean,
    new_batch,
    ratio_of,
    std,
)

from nanomath.algorithms import (
    PRESETS,
    check,
    decoupled_advantages,
    gae,
    group_advantages,
    has_group_baseline,
    kl_estimate,
    kl_loss,
    loss_weights,
    policy_loss,
    token_rewards,
    top_covariance,
    updates_once,
    whiten,
)
from nanomath.settings import Algorithm

# What each paper changes of GRPO, and for what it leaves open the numbers that presets.py says
# are ours.
PUBLISHED = {
    "grpo": {},
    "dr_grpo": {"scale": "off", "aggregation": "constant", "kl_coef": 0.0},
    "dapo": {
        **{
            "clip_low": 0.2,
            "clip_high": 0.28,
            "aggregation": "token",
            "kl_coef": 0.0,
            "minibatches": 4,
        },
        **{"keep_groups": "mixed", "refills": 3},
    },
    "gspo": {
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl_coef": 0.0,
        "minibatches": 4,
    },
    "cispo": {
        "clip": "cispo",
        "clip_low": 1,
        "clip_high": 4,
        "aggregation": "token",
        "kl_coef": 0,
        "minibatches": 4,
    },
    "rloo": {
        **{
            "baseline": "leave_one_out",
            "scale": "off",
            "ratio": "off",
            "clip": "off",
            "aggregation": "constant",
        },
        **{"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.05},
    },
    "reinforce_pp": {
        **{"baseline": "off", "scale": "off", "whiten": True, "aggregation": "token"},
        **{"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.01},
    },
    "ppo": {
        **{
            "baseline": "value",
            "scale": "off",
            "whiten": True,
            "clip": "dual",
            "dual_clip": 3,
            "aggregation": "token",
        },
        **{
            "kl_in": "reward",
            "kl_estimator": "k1",
            "kl_coef": 0.05,
            "minibatches": 4,
            "gamma": 1,
            "lam": 0.95,
        },
    },
    "lite_ppo": {"scale": "batch", "aggregation": "token", "kl_coef": 0.0},
    "gdpo": {"components": "apart", "whiten": True},
    "clip_cov": {
        "covariance": "clip",
        "aggregation": "token",
        "kl_coef": 0.0,
        "minibatches": 4,
    },
    "kl_cov": {
        "covariance": "kl",
        "clip": "off",
        "aggregation": "token",
        "kl_coef": 0.0,
        "minibatches": 4,
    },
    "sft": {
        **{"advantage": "one", "samples": "right", "aggregation": "token"},
        **{
            "baseline": "off",
            "scale": "off",
            "ratio": "off",
            "clip": "off",
            "kl_coef": 0,
        },
    },
    "dpo": {
        **{"advantage": "preference", "samples": "pair", "aggregation": "sum"},
        **{
            "baseline": "off",
            "scale": "off",
            "ratio": "off",
            "clip": "off",
            "kl_coef": 0,
        },
    },
    "opd": {
        **{"advantage": "teacher", "aggregation": "token"},
        **{"baseline": "off", "scale": "off", "clip": "off", "kl_coef": 0},
    },
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_row_is_what_its_paper_changes_of_grpo(method):
    assert {**GRPO, **PRESETS[method]} == {**GRPO, **PUBLISHED[method]}


def test_the_defaults_of_the_config_are_grpo_as_published():
    defaults = {field.name: field.default for field in fields(Algorithm)}
    assert {name: defaults[name] for name in GRPO} == GRPO


@pytest.mark.parametrize("method", PRESETS)
def test_every_row_makes_sense(method):
    check(choices(**PRESETS[method]))


# --- The rows at work: rewards of three groups of two, one of them flat, against the loss as
# the paper writes it.

LENGTHS, LONGEST, SHARE, COEF = [3, 5, 1, 4, 2, 6], 9, 0.3, 0.7
REWARDS = torch.tensor(
    [[[1.0, 0.0], [0.1, 0.1], [1.0, 0.3]], [[5.0, 9.0], [2.0, 1.0], [4.0, 4.0]]]
).double()
TOKENS = each_token(LENGTHS)


def batch() -> SimpleNamespace:
    b = new_batch(21, LENGTHS)
    b.new = b.old + (b.new - b.old) * 0.6
    return b


def loss_of(a: SimpleNamespace, b: SimpleNamespace) -> torch.Tensor:
    """The public functions put together as the row says."""
    in_reward, in_loss = (
        a.kl_coef > 0 and a.kl_in == place for place in ("reward", "loss")
    )
    kl = kl_estimate(b.old, b.ref, a.kl_estimator) if in_reward else None
    rewards = token_rewards(REWARDS.sum(0).flatten(), b.mask, kl, a.kl_coef)
    if not has_group_baseline(a):
        values, lam = (
            (b.values, a.lam)
            if a.baseline == "value"
            else (torch.zeros_like(b.values), 1.0)
        )
        advantages, _ = gae(rewards, values, b.mask, a.gamma, lam)
    elif a.components == "apart":
        apart = decoupled_advantages(
            REWARDS, torch.ones(2).double(), a.baseline, a.scale, eps=1e-4
        )
        advantages = apart.view(-1, 1).expand_as(b.new)
    else:
        grouped = group_advantages(
            rewards.sum(1).view(3, 2), a.baseline, a.scale, eps=1e-4
        )
        advantages = grouped.view(-1, 1).expand_as(b.new)
    advantages = whiten(advantages, b.mask) if a.whiten else advantages
    weights = loss_weights(b.mask, a.aggregation, LONGEST)
    steep = top_covariance(b.old, advantages, b.mask, SHARE)
    taught = weights * ~steep if a.covariance == "clip" else weights
    options = {
        "ratio": a.ratio,
        "clip": a.clip,
        "dual_clip": a.dual_clip,
        "mask": b.mask,
    }
    loss, _ = policy_loss(
        b.new, b.old, advantages, taught, a.clip_low, a.clip_high, **options
    )
    if in_loss:
        loss = loss + a.kl_coef * kl_loss(
            b.new, b.ref, b.old, weights, a.kl_estimator, a.kl_correction
        )
    if a.covariance == "kl":
        loss = loss + COEF * (weights * steep * (b.new - b.old).abs()).sum()
    return loss


class Paper:
    """What the papers' formulas speak of, for token t of completion i whose logprob is x."""

    def __init__(self, b: SimpleNamespace) -> None:
        self.b, self.total = b, sum(LENGTHS)
        self.r = REWARDS.sum(0).flatten().tolist()
        self.k1 = [
            [float(b.old[i, t] - b.ref[i, t]) for t in range(n)]
            for i, n in enumerate(LENGTHS)
        ]

    def rho(self, i: int, t: int, x: float, kind: str = "token") -> float:
        n = LENGTHS[i]
        return ratio_of(
            kind, x, self.b.new[i, :n].tolist(), self.b.old[i, :n].tolist(), t
        )

    def ppo(
        self,
        i: int,
        t: int,
        x: float,
        a: float,
        low: float,
        high: float,
        kind: str = "token",
    ) -> float:
        rho = self.rho(i, t, x, kind)
        return min(rho * a, clip(rho, 1 - low, 1 + high) * a)

    def grouped(
        self, i: int, rewards: list[float] | None = None
    ) -> tuple[float, float]:
        """r_i - mean and std of its group."""
        rewards = rewards or self.r
        group = rewards[i - i % 2 : i - i % 2 + 2]
        return rewards[i] - mean(group), std(group)

    def grpo_advantage(self, i: int, rewards: list[float] | None = None) -> float:
        centred, spread = self.grouped(i, rewards)
        return centred / (spread + 1e-4)

    def to_go(self, beta: float) -> dict[tuple[int, int], float]:
        """R - beta sum of the k1 from t on."""
        return {(i, t): self.r[i] - beta * math.fsum(self.k1[i][t:]) for i, t in TOKENS}

    def gae(self, beta: float, lam: float) -> dict[tuple[int, int], float]:
        found = {}
        for i, n in enumerate(LENGTHS):
            v = [float(x) for x in self.b.values[i, :n]] + [0.0]
            r = [
                (self.r[i] if t == n - 1 else 0.0) - beta * self.k1[i][t]
                for t in range(n)
            ]
            for t in range(n):
                found[i, t] = math.fsum(
                    lam ** (k - t) * (r[k] + v[k + 1] - v[k]) for k in range(t, n)
                )
        return found

    def steep(self, i: int, t: int) -> bool:
        """Whether the token is among the SHARE with the highest covariance of advantage and
        old logprob.
        """
        a = mean([self.grpo_advantage(j) for j, _ in TOKENS])
        p = mean([float(self.b.old[j, s]) for j, s in TOKENS])
        cov = {
            (j, s): (self.grpo_advantage(j) - a) * (float(self.b.old[j, s]) - p)
            for j, s in TOKENS
        }
        return (i, t) in sorted(TOKENS, key=lambda token: -cov[token])[
            : round(SHARE * len(TOKENS))
        ]


def whitened(advantages: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    values = list(advantages.values())
    return {
        token: (a - mean(values)) / (std(values) + 1e-8)
        for token, a in advantages.items()
    }


def grpo(p: Paper, i: int, t: int, x: float) -> float:
    gain = p.ppo(i, t, x, p.grpo_advantage(i), 0.2, 0.2) - 0.04 * kl_of(
        "k3", x - float(p.b.ref[i, t])
    )
    return -gain / LENGTHS[i] / 6


def dr_grpo(p: Paper, i: int, t: int, x: float) -> float:
    return -p.ppo(i, t, x, p.grouped(i)[0], 0.2, 0.2) / (6 * LONGEST)


def dapo(p: Paper, i: int, t: int, x: float) -> float:
    return -p.ppo(i, t, x, p.grpo_advantage(i), 0.2, 0.28) / p.total


def gspo(p: Paper, i: int, t: int, x: float) -> float:
    return (
        -p.ppo(i, t, x, p.grpo_advantage(i), 3e-4, 4e-4, kind="sequence")
        / LENGTHS[i]
        / 6
    )


def cispo(p: Paper, i: int, t: int, x: float) -> float:
    return (
        -min(p.rho(i, t, float(p.b.new[i, t])), 5) * p.grpo_advantage(i) * x / p.total
    )


def rloo(p: Paper, i: int, t: int, x: float) -> float:
    """The reward includes the KL; the baseline is the mean of the others: G / (G - 1) times r
    - mean.
    """
    rewards = [r - 0.05 * math.fsum(k1) for r, k1 in zip(p.r, p.k1, strict=True)]
    return -p.rho(i, t, x, "off") * 2 * p.grouped(i, rewards)[0] / (6 * LONGEST)


def reinforce_pp(p: Paper, i: int, t: int, x: float) -> float:
    return -p.ppo(i, t, x, whitened(p.to_go(0.01))[i, t], 0.2, 0.2) / p.total


def ppo(p: Paper, i: int, t: int, x: float) -> float:
    a = whitened(p.gae(0.05, 0.95))[i, t]
    gain = p.ppo(i, t, x, a, 0.2, 0.2)
    return -(max(gain, 3 * a) if a < 0 else gain) / p.total


def lite_ppo(p: Paper, i: int, t: int, x: float) -> float:
    return -p.ppo(i, t, x, p.grouped(i)[0] / (std(p.r) + 1e-4), 0.2, 0.2) / p.total


def gdpo(p: Paper, i: int, t: int, x: float) -> float:
    summed = [
        math.fsum(
            p.grpo_advantage(j, component.flatten().tolist()) for component in REWARDS
        )
        for j in range(6)
    ]
    a = whitened({(j, s): summed[j] for j, s in TOKENS})[i, t]
    return (
        -(p.ppo(i, t, x, a, 0.2, 0.2) - 0.04 * kl_of("k3", x - float(p.b.ref[i, t])))
        / LENGTHS[i]
        / 6
    )


def clip_cov(p: Paper, i: int, t: int, x: float) -> float:
    return (
        0.0
        if p.steep(i, t)
        else -p.ppo(i, t, x, p.grpo_advantage(i), 0.2, 0.2) / p.total
    )


def kl_cov(p: Paper, i: int, t: int, x: float) -> float:
    held_back = COEF * abs(x - float(p.b.old[i, t])) if p.steep(i, t) else 0.0
    return -(p.rho(i, t, x) * p.grpo_advantage(i) - held_back) / p.total


PAPERS = (
    grpo,
    dr_grpo,
    dapo,
    gspo,
    cispo,
    rloo,
    reinforce_pp,
    ppo,
    lite_ppo,
    gdpo,
    clip_cov,
    kl_cov,
)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.__name__)
def test_a_row_at_work_is_the_loss_of_its_paper(paper):
    b = batch()
    p, new = Paper(b), b.new.clone().requires_grad_()
    loss = loss_of(
        choices(**PRESETS[paper.__name__]), SimpleNamespace(**{**vars(b), "new": new})
    )
    loss.backward()
    expected = math.fsum(paper(p, i, t, float(b.new[i, t])) for i, t in TOKENS)
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    for i, t in TOKENS:
        slope = derivative(
            lambda x, i=i, t=t: paper(p, i, t, x), float(b.new[i, t]), h=1e-5
        )
        assert float(new.grad[i, t]) == pytest.approx(slope, abs=1e-9)


# --- What makes no sense.

LOSS, REWARD = (
    {"kl_in": "loss", "kl_coef": 0.1},
    {"kl_in": "reward", "kl_coef": 0.1, "kl_estimator": "k1"},
)
NO_GROUP = {"baseline": "off", "scale": "off"}

# changes of GRPO, the keys and words that the message must name, and changes on top that make
# it right
REFUSED = [
    (
        {"baseline": "off"},
        ["scale = 'group'", "baseline = 'off'", 'set scale = "off"', "whiten"],
        {"scale": "off"},
    ),
    (
        {"baseline": "value", "scale": "batch"},
        ["scale = 'batch'", "baseline = 'value'"],
        {"scale": "off"},
    ),
    (
        {**NO_GROUP, "components": "apart"},
        ['components = "apart"', "baseline = 'off'"],
        {"components": "sum"},
    ),
    (
        {**NO_GROUP, "keep_groups": "mixed"},
        ["keep_groups = 'mixed'", "baseline = 'off'"],
        {"keep_groups": "all"},
    ),
    (
        {"refills": 1},
        ["refills", 'keep_groups = "all"', "refills = 0"],
        {"keep_groups": "uneven"},
    ),
    (
        {"ratio": "sequence"},
        ['ratio = "sequence"', "minibatches", "epochs", "old_logprobs"],
        {"minibatches": 2},
    ),
    ({"ratio": "sequence"}, ['ratio = "sequence"'], {"epochs": 2}),
    ({"ratio": "sequence"}, ['ratio = "sequence"'], {"old_logprobs": "sampler"}),
    (
        {"ratio": "off", "clip": "off", "minibatches": 2},
        ['ratio = "off"', "minibatches = 1"],
        {"minibatches": 1},
    ),
    (
        {"ratio": "off", "clip": "off", "epochs": 2},
        ['ratio = "off"', "epochs = 1"],
        {"epochs": 1},
    ),
    (
        {"ratio": "off", "clip": "off", "old_logprobs": "sampler"},
        ['ratio = "off"', 'old_logprobs = "trainer"'],
        {"old_logprobs": "trainer"},
    ),
    (
        {"ratio": "off"},
        ["clip = 'ppo'", 'ratio = "off"', 'set clip = "off"'],
        {"clip": "off"},
    ),
    (
        {"clip": "dual", "dual_clip": 1.2},
        ["dual_clip = 1.2", "1 + clip_high = 1.2"],
        {"dual_clip": 1.3},
    ),
    (
        {"clip": "dual", "dual_clip": 1.1},
        ["dual_clip = 1.1", "1 + clip_high = 1.2"],
        {"clip_high": 0.05},
    ),
    (
        {"sampler_correction": "mask", "old_logprobs": "sampler"},
        ['old_logprobs = "sampler"', "sampler_correction"],
        {"old_logprobs": "trainer"},
    ),
    (
        {"sampler_correction": "mask", "correction_low": 1.1},
        ["correction_low = 1.1"],
        {"correction_low": 1.0},
    ),
    (
        {"sampler_correction": "truncate", "correction_high": 0.9},
        ["correction_high = 0.9"],
        {"correction_high": 1.0},
    ),
    (
        {**LOSS, "kl_estimator": "k1"},
        ['kl_estimator = "k1"', "kl_in", "kl_correction"],
        {"kl_correction": "ratio"},
    ),
    (
        {**LOSS, "kl_estimator": "k1", "kl_correction": "weight"},
        ["zero"],
        {"kl_in": "reward", "kl_correction": "off"},
    ),
    (
        {**LOSS, "kl_estimator": "k2", "kl_correction": "ratio"},
        ["'k2'", "weight"],
        {"kl_correction": "weight"},
    ),
    (
        {**LOSS, "kl_estimator": "k3+", "kl_correction": "ratio"},
        ["'k3+'", "weight"],
        {"kl_estimator": "k3"},
    ),
    ({**REWARD, "kl_estimator": "k3"}, ["'k3' in the reward"], {"kl_estimator": "k1"}),
    ({**REWARD, "kl_estimator": "k2"}, ["'k2' in the reward"], {"kl_in": "loss"}),
    (
        {**REWARD, "kl_correction": "weight"},
        ["kl_correction = 'weight'", "reward"],
        {"kl_correction": "off"},
    ),
    (
        {**REWARD, "components": "apart"},
        ['components = "apart"', 'kl_in = "loss"'],
        {"components": "sum"},
    ),
    (
        {"advantage": "one"},
        ["advantage = 'one'", 'baseline = "off"'],
        NO_GROUP,
    ),
    (
        {"advantage": "teacher", **NO_GROUP, "credit": "sum"},
        ["advantage = 'teacher'", 'credit = "off"'],
        {"credit": "off"},
    ),
    (
        {"advantage": "one", **NO_GROUP, **REWARD},
        ["advantage = 'one'", 'kl_in = "loss"'],
        {"kl_coef": 0.0},
    ),
    (
        {"advantage": "one", **NO_GROUP, "whiten": True},
        ["advantage = 'one'", "whiten"],
        {"whiten": False},
    ),
    *(
        (
            {**PRESETS["dpo"], **wrong},
            ['samples = "pair"', 'ratio = "off"', 'aggregation = "sum"'],
            PRESETS["dpo"],
        )
        for wrong in ({"samples": "all"}, {"ratio": "token"}, {"aggregation": "token"})
    ),
    (
        {"baseline": "value", "scale": "off", "value_coef": 0},
        ["value_coef must be above 0"],
        {"value_coef": 0.1},
    ),
]


@pytest.mark.parametrize(("wrong", "words", "cure"), REFUSED)
def test_what_contradicts_itself_is_refused_with_the_reason_and_the_cure(
    wrong, words, cure
):
    with pytest.raises(ValueError) as error:
        check(choices(**wrong))
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message
    check(choices(**{**wrong, **cure}))


@pytest.mark.parametrize(
    "fine",
    [
        {
            "kl_coef": 0.0,
            "kl_in": "loss",
            "kl_estimator": "k1",
        },  # measured, but not penalised
        {
            "kl_coef": 0.0,
            "kl_in": "reward",
            "kl_estimator": "k3",
            "kl_correction": "ratio",
            "components": "apart",
        },
        {"sampler_correction": "off", "correction_low": 3.0},
        {"clip": "ppo", "dual_clip": 0.5},
        {"baseline": "group", "value_coef": 0.0},
        {"keep_groups": "uneven", "refills": 0},
        {"components": "apart", "baseline": "leave_one_out"},
        {**PRESETS["dpo"], "keep_groups": "mixed", "refills": 1},
        {**PRESETS["opd"], "kl_coef": 0.1},
    ],
)
def test_what_is_switched_off_contradicts_nothing(fine):
    check(choices(**fine))


def test_reinforce_pp_baseline_is_the_row_with_the_changes_its_comment_names():
    check(
        choices(
            **{
                **PRESETS["reinforce_pp"],
                "baseline": "group",
                "kl_in": "loss",
                "kl_estimator": "k2",
            }
        )
    )


def test_who_has_a_group_and_who_updates_once():
    assert [
        b
        for b in ("group", "leave_one_out", "off", "value")
        if has_group_baseline(choices(baseline=b))
    ] == [
        "group",
        "leave_one_out",
    ]
    for epochs, minibatches, old in itertools.product(
        (1, 2), (1, 2), ("trainer", "sampler")
    ):
        found = updates_once(
            choices(epochs=epochs, minibatches=minibatches, old_logprobs=old)
        )
        assert found == (epochs == 1 and minibatches == 1 and old == "trainer")
