"""The policy step against an independent one written as loops, its guards and its metrics."""

from __future__ import annotations

import copy
import dataclasses
import math
from itertools import pairwise, product

import pytest
import torch
from plain_step import (
    EOS,
    SIZE,
    WEIGHTS,
    Descent,
    PlainStep,
    assert_same,
    new_critic,
    new_episodes,
    new_step,
    without_zeros,
)
from torch import Tensor

from nanomath.algorithms import PRESETS
from nanomath.data.problem import Problem
from nanomath.rollout import Completion, Episode
from nanomath.training.optimizer import Optimizer
from nanomath.training.policy_step import PolicyStep
from nanomath.training.teacher import Teacher

WIDE = {"covariance_share": 0.2}  # of some thirty tokens
METHODS = {
    name: {"kl_coef": 0.04, **row, **(WIDE if "covariance" in row else {})}
    for name, row in PRESETS.items()
}
REWARD_KL = {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.3}
LOSS_KL = {"kl_coef": 0.3, "minibatches": 2}
DRAWN = {"old_logprobs": "sampler"}
VALUE = {"baseline": "value", "scale": "off"}
CHOICES = {
    "scale off, constant": {"scale": "off", "aggregation": "constant"},
    "scale batch, token": {"scale": "batch", "aggregation": "token"},
    "others, scale batch": {"baseline": "leave_one_out", "scale": "batch"},
    "KL in the reward, group": REWARD_KL,
    "KL in the reward, others": {
        "baseline": "leave_one_out",
        "minibatches": 2,
        **REWARD_KL,
    },
    "KL in the reward, off": {
        "baseline": "off",
        "scale": "off",
        "gamma": 0.9,
        **REWARD_KL,
    },
    "KL in the reward, value": {**VALUE, **REWARD_KL},
    "KL in the reward, sampler": {**REWARD_KL, **DRAWN},
    "KL in the loss, k1": {**LOSS_KL, "kl_estimator": "k1", "kl_correction": "ratio"},
    "KL in the loss, k2": {**LOSS_KL, "kl_estimator": "k2", "kl_correction": "weight"},
    "KL in the loss, k3": {**LOSS_KL, "kl_estimator": "k3", "kl_correction": "ratio"},
    "KL in the loss, k3+": {
        **LOSS_KL,
        "kl_estimator": "k3+",
        "kl_correction": "weight",
    },
    "two rewards apart": {"components": "apart"},
    "two rewards apart, whitened": {
        "components": "apart",
        "whiten": True,
        "scale": "off",
    },
    "overlong filter": {"overlong_filter": True, "kl_coef": 0.1},
    "overlong filter, token": {
        "overlong_filter": True,
        "aggregation": "token",
        "whiten": True,
        "minibatches": 2,
    },
    "overlong filter, value": {"overlong_filter": True, **VALUE},
    "top entropy": {"top_entropy": 0.3, "kl_coef": 0.1},
    "top entropy, sampler": {
        "top_entropy": 0.3,
        "aggregation": "token",
        "minibatches": 2,
        **DRAWN,
    },
    "covariance clip, on policy": {"covariance": "clip", **WIDE},
    "covariance kl, sampler": {
        "covariance": "kl",
        "covariance_coef": 2.0,
        **WIDE,
        **DRAWN,
    },
    "truncated": {
        "sampler_correction": "truncate",
        "correction_high": 1.1,
        "kl_coef": 0.1,
    },
    "truncated, twice": {
        "sampler_correction": "truncate",
        "correction_high": 1.1,
        "minibatches": 2,
    },
    "masked": {
        "sampler_correction": "mask",
        "correction_low": 0.8,
        "correction_high": 1.2,
    },
    "masked, top entropy": {
        "sampler_correction": "mask",
        "correction_low": 0.8,
        "top_entropy": 0.5,
    },
    "sequence ratio, sampler": {
        "ratio": "sequence",
        "clip_low": 0.1,
        "clip_high": 0.1,
        **DRAWN,
    },
    "token ratio, sampler": {
        "clip_low": 0.1,
        "clip_high": 0.3,
        "aggregation": "token",
        "kl_coef": 0.04,
        **DRAWN,
    },
    "dual clip": {"clip": "dual", "dual_clip": 1.3, **DRAWN},
    "CISPO": {"clip": "cispo", "clip_low": 0.2, "clip_high": 0.1, **DRAWN},
    "no clip": {"clip": "off", **DRAWN},
    "value, own": {**VALUE, "epochs": 2, "value_clip": 0.01},
    "value, shared": {
        **VALUE,
        "value_trunk": "shared",
        "epochs": 2,
        "value_clip": 0.01,
        "gamma": 0.9,
        "lam": 0.5,
    },
    "value, shared, KL in the loss": {
        **VALUE,
        "value_trunk": "shared",
        "kl_coef": 0.1,
        "value_coef": 2.0,
    },
    "best sample": {"samples": "best", "minibatches": 2, "kl_coef": 0.1},
    "right samples": {"samples": "right", "aggregation": "token", "whiten": True},
    "right samples, finished": {**PRESETS["sft"], "overlong_filter": True},
    "preference, finished": {
        **PRESETS["dpo"],
        "overlong_filter": True,
        "preference_beta": 0.7,
        "kl_coef": 0.1,
    },
    "teacher, twice": {**PRESETS["opd"], "epochs": 2, "kl_coef": 0.1},
    "teacher, sampler": {**PRESETS["opd"], **DRAWN},
    "whole distribution": {**PRESETS["opd"], "advantage": "teacher_full"},
    "whole distribution, finished": {
        **PRESETS["opd"],
        "advantage": "teacher_full",
        "aggregation": "sequence",
        "overlong_filter": True,
        "minibatches": 2,
    },
    "two passes of three": {"epochs": 2, "minibatches": 3, "kl_coef": 0.04},
}


@pytest.fixture(scope="module")
def models(new_model):
    """The policy and, different from it, the reference and a teacher, all in float64."""
    others = (new_model(seed, torch.float64).requires_grad_(False) for seed in (1, 2))
    return new_model(0, torch.float64), *others


def pair_of_steps(
    models, temperature: float = 0.8, token_budget: int = 16, **options
) -> tuple[PolicyStep, PlainStep]:
    """The policy step and the plain one, each with a copy of the policy, and of a value model
    where there is one.
    """
    policies, reference = [copy.deepcopy(models[0]) for _ in range(2)], models[1]
    step = new_step(
        policies[0],
        reference,
        Descent(policies[0]),
        temperature=temperature,
        token_budget=token_budget,
        **options,
    )
    step.max_length, step.reward_weights, a = 9, WEIGHTS, step.algorithm
    plain = PlainStep(policies[1], reference, a, temperature, max_length=9)
    if a.advantage.startswith("teacher"):
        step.teacher, plain.teacher = Teacher(models[2], None, None), models[2]
    if a.baseline == "value":
        step.critic = new_critic(policies[0], a.value_trunk == "own")
        plain.critic = new_critic(policies[1], a.value_trunk == "own")
        step.critic_optimizer, step.critic_rate, plain.critic_rate = (
            Descent(step.critic),
            0.5,
            0.5,
        )
    return step, plain


def minibatches_of(step: PolicyStep, total: int, number: int) -> list[list[int]]:
    epochs = range(step.algorithm.epochs)
    return [
        chosen.tolist()
        for epoch in epochs
        for chosen in step._minibatches(total, number, epoch)
    ]


def assert_steps_agree(
    step: PolicyStep, plain: PlainStep, episodes: list[Episode], lr: float
) -> dict[str, float]:
    """Advantages, metrics and the gradients of all updates; returns the metrics."""
    metrics = step.step(episodes, 3, lr)
    expected = plain.step(episodes, minibatches_of(step, len(episodes), 3), lr)
    for episode, facts in zip(episodes, plain.facts, strict=True):
        assert episode.advantages == pytest.approx(facts.advantages, abs=1e-10)
    pairs = [(step.optimizer.gradients, plain.gradients)]
    if step.critic:
        pairs.append((step.critic_optimizer.gradients, plain.critic_gradients))
    for found, wanted in pairs:
        found, wanted = (without_zeros(gradients) for gradients in (found, wanted))
        assert len(found) == len(wanted) > 0
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    assert {name: metrics[name] for name in expected} == pytest.approx(
        expected, rel=1e-10, abs=1e-12
    )
    assert metrics.keys() - expected.keys() == {"grad_norm", "update_ratio"}
    return metrics


@pytest.mark.parametrize(
    "options", [*METHODS.values(), *CHOICES.values()], ids=[*METHODS, *CHOICES]
)
def test_a_step_is_the_papers_formulas(models, options):
    """All gradients of the step, to 1e-10 in float64, while the weights move between the
    updates.
    """
    step, plain = pair_of_steps(models, **options)
    assert_steps_agree(step, plain, new_episodes(models[0], 0.8, noise=0.3), lr=0.01)


def reinforce(a, logprobs, tokens):
    """A loss of one's own."""
    return -(tokens.weights * tokens.advantages * logprobs).sum()


def test_a_loss_of_ones_own(models):
    """The same gradients as those of the axes that make REINFORCE of it; and it needs no entry
    in any table.
    """
    found = []
    for options in (
        {"loss": f"{__name__}.reinforce"},
        {"clip": "off", "ratio": "off", "kl_coef": 0.0},
    ):
        policy = copy.deepcopy(models[0])
        step = new_step(
            policy,
            models[1],
            Descent(policy),
            max_length=9,
            aggregation="token",
            **options,
        )
        step.step(new_episodes(models[0], 0.8, noise=0.3), 3, 0.01)
        found.append(step.optimizer.gradients)
    assert_same(found[0][0], found[1][0])
    for name in ("reinforce", "nanomath.reinforce", "no_such_module.reinforce"):
        with pytest.raises(
            ValueError,
            match=f"algorithm.loss is '{name}', not the module.function of a loss",
        ):
            new_step(models[0], models[1], Descent(models[0]), loss=name)


def test_several_updates_are_clipped(models):
    """The table above would prove little about ratios if these stayed within their range."""
    for method in ("dapo", "gspo", "ppo"):
        step, plain = pair_of_steps(models, **METHODS[method])
        metrics = assert_steps_agree(step, plain, new_episodes(models[0], 0.8), lr=0.03)
        assert 0 < metrics["clipped_low"] + metrics["clipped_high"] < 1


def test_kl_cov_holds_nothing_back_before_the_first_update(models):
    """The scores of the rollout and those of a minibatch differ by rounding, of which |x|
    would make a slope of 1.
    """
    first = []
    for coefficient in (0.0, 1e6):
        options = {
            **METHODS["kl_cov"],
            "covariance_share": 1.0,
            "covariance_coef": coefficient,
        }
        step, _ = pair_of_steps(models, token_budget=25, **options)
        step.step(new_episodes(models[0], 0.8), 3, 0.01)
        first.append(step.optimizer.gradients[0])
    assert_same(*first)


# --- what teaches and what does not ----------------------------------------------------------


def gradient(models, recorder, episodes, **options) -> dict[str, Tensor]:
    optimizer = recorder(models[0])
    new_step(*models[:2], optimizer, **options).step(episodes, 0, 1e-3)
    assert len(optimizer.gradients) == 1 and optimizer.rates == [1e-3]
    return optimizer.gradients[0]


def test_skipping_idle_episodes_changes_no_gradient(models, recorder):
    """A KL coefficient too small to matter makes every episode count."""
    episodes = new_episodes(models[0], noise=0.3)
    skipped = gradient(models, recorder, episodes, token_budget=16)
    assert sum(set(e.advantages) == {0} for e in episodes) == SIZE
    assert_same(
        gradient(models, recorder, episodes, token_budget=16, kl_coef=1e-200), skipped
    )


def test_the_eos_gets_gradient_although_it_pads(models, recorder):
    """Completions of one eos each, padded by the same id next to longer ones."""
    episodes = new_episodes(models[0])
    full = gradient(models, recorder, episodes, aggregation="constant", max_length=80)
    for episode in episodes:
        c = episode.completion
        if c.tokens[-1] == EOS and c.length > 1:
            for values in (c.tokens, c.logprobs, c.sampling_logprobs):
                values.pop()
    cut = gradient(models, recorder, episodes, aggregation="constant", max_length=80)
    assert max(float((full[name] - cut[name]).abs().max()) for name in full) > 1e-4


def make_flat(episodes: list[Episode]) -> None:
    for episode in episodes:
        episode.rewards |= {"accuracy": 1.0, "form": 0.5, "total": 1.25}


def make_unfinished(episodes: list[Episode]) -> None:
    for episode in episodes:
        episode.completion = dataclasses.replace(
            episode.completion, finish_reason="length"
        )


@pytest.mark.parametrize(
    ("spoil", "options"),
    [
        (make_flat, {}),
        (
            make_flat,
            {"components": "apart", "whiten": True, "minibatches": 2, "epochs": 2},
        ),
        (
            make_flat,
            {
                "covariance": "clip",
                "top_entropy": 0.2,
                "clip": "cispo",
                "ratio": "token",
            },
        ),
        (make_unfinished, {"overlong_filter": True}),
        (
            make_unfinished,
            {"overlong_filter": True, "kl_coef": 0.1, "aggregation": "token"},
        ),
        (
            make_unfinished,
            {
                "overlong_filter": True,
                "whiten": True,
                "baseline": "off",
                "scale": "off",
            },
        ),
        (
            make_unfinished,
            {"overlong_filter": True, "covariance": "kl", "top_entropy": 0.5},
        ),
    ],
)
def test_without_a_lesson_there_is_no_update(models, recorder, spoil, options):
    """Not even one of a gradient of zero, which Adam's momentum would turn into a step. It is
    measured all the same.
    """
    episodes = new_episodes(models[0])
    spoil(episodes)
    optimizer = recorder(models[0])
    step = new_step(*models[:2], optimizer, **options)
    step.reward_weights = WEIGHTS
    metrics = step.step(episodes, 0, 1.0)
    assert (
        optimizer.gradients == []
        and metrics["grad_norm"] == metrics["update_ratio"] == metrics["loss"] == 0.0
    )
    assert (
        metrics["kl"] > 0
        and metrics["entropy"] > 0
        and all(math.isfinite(value) for value in metrics.values())
    )


def test_a_minibatch_that_teaches_nothing_is_passed_over(models):
    """Twelve of one episode each, four of them in the flat group; the optimizer's metrics are
    means over all twelve, also those of a part of the model, which a step that is not made lacks.
    """

    class OfParts(Descent):
        def step(self, lr):
            metrics = super().step(lr)
            return metrics | {"grad_norm/norm": metrics["grad_norm"]}

    optimizer = OfParts(copy.deepcopy(models[0]))
    step = new_step(optimizer.model, models[1], optimizer, minibatches=12)
    metrics = step.step(new_episodes(models[0]), 0, 1e-3)
    assert len(optimizer.gradients) == 8
    assert metrics["grad_norm"] == pytest.approx(sum(range(1, 9)) / 12)
    assert metrics["grad_norm/norm"] == metrics["grad_norm"]
    assert metrics["update_ratio"] == pytest.approx(10 * sum(range(1, 9)) / 12)


# --- minibatches and updates -----------------------------------------------------------------


@pytest.mark.parametrize("minibatches", [2, 3, 4, 5, 12])
def test_minibatches_cover_every_epoch_once(models, recorder, minibatches):
    """Without updates, and each weighed by its size, the minibatches' gradients add up to that
    of the whole.
    """
    episodes = new_episodes(models[0])
    options = {"aggregation": "constant", "max_length": 10, "kl_coef": 0.1}
    whole = gradient(models, recorder, episodes, **options)
    optimizer = recorder(models[0])
    step = new_step(
        *models[:2], optimizer, epochs=2, minibatches=minibatches, **options
    )
    step.step(episodes, 5, 1.0)
    assert len(optimizer.gradients) == 2 * minibatches
    for epoch in (0, 1):
        parts = step._minibatches(len(episodes), 5, epoch)
        assert sorted(i for part in parts for i in part.tolist()) == list(
            range(len(episodes))
        )
        found = optimizer.gradients[epoch * minibatches : (epoch + 1) * minibatches]
        shares = [len(part) / len(episodes) for part in parts]
        total = {
            name: sum(s * f[name] for s, f in zip(shares, found, strict=True))
            for name in whole
        }
        assert_same(total, whole, 1e-6)  # the norms of the model round to float32


def test_minibatches_are_a_function_of_seed_step_and_epoch(models):
    """So that a run can go on from any step, and no two passes are cut alike."""

    def cut(seed: int, number: int, epoch: int) -> str:
        step = new_step(*models[:2], None, epochs=2, minibatches=3, seed=seed)
        return str([part.tolist() for part in step._minibatches(12, number, epoch)])

    cuts = {place: cut(*place) for place in product((0, 1), (0, 1, 2), (0, 1))}
    assert len(set(cuts.values())) == len(cuts) and all(
        cut(*place) == found for place, found in cuts.items()
    )


def test_the_optimizers_move_the_weights(new_model):
    """With the real ones: at rate 0 all stays, then ratios leave the range and the policy
    leaves the reference.
    """
    policy, reference = new_model(0), new_model(0).requires_grad_(False)
    episodes = new_episodes(policy)
    step = new_step(
        policy,
        reference,
        new_optimizer(policy),
        epochs=2,
        minibatches=2,
        token_budget=32,
    )
    still = step.step(episodes, 0, 0.0)
    assert (
        still["kl"] == pytest.approx(0, abs=1e-6)
        and still["clipped_low"] == still["clipped_high"] == 0
    )
    assert still["update_ratio"] == 0
    moved = step.step(episodes, 1, 3e-3)
    assert 0 < moved["clipped_low"] + moved["clipped_high"] < 1
    assert (
        moved["kl"] > 1e-4
        and moved["gap_max"] < 1e-4
        and moved["grad_norm"] > 0
        and moved["update_ratio"] > 0
    )


def test_rewards_rise(new_model):
    """Paying for one token as the only answer makes it likely."""
    policy, reference = new_model(0), new_model(0).requires_grad_(False)
    step = new_step(policy, reference, new_optimizer(policy), kl_coef=0.01)
    wanted = []
    for number in range(12):
        episodes = []
        for sample, token in enumerate((11, 12, 13, 14)):
            completion = Completion(0, sample, [token], [-1.0], [-1.0], "", "length")
            episodes.append(
                Episode(
                    Problem("p", "q", "a"),
                    [5, 6],
                    completion,
                    {"total": float(token == 12)},
                )
            )
        step.step(episodes, number, 1e-2)
        with torch.no_grad():
            wanted.append(
                float(policy(torch.tensor([[5, 6]]))[0, -1].log_softmax(-1)[12])
            )
    assert wanted[-1] > wanted[0] + 1 and sum(b > a for a, b in pairwise(wanted)) >= 9


# --- guards ----------------------------------------------------------------------------------


def new_optimizer(model) -> Optimizer:
    return Optimizer(model, 0.0, (0.9, 0.99), 1e-8, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["logprobs", "sampling_logprobs"])
def test_a_bad_logprob_of_the_sampler_stops_the_step(models, recorder, kind, bad):
    episodes = new_episodes(models[0])
    getattr(episodes[6].completion, kind)[1] = bad
    optimizer = recorder(models[0])
    with pytest.raises(
        FloatingPointError,
        match=f"^the sampler gave {bad} at token 1 of sample 2 of problem p1$",
    ):
        new_step(*models[:2], optimizer).step(episodes, 0, 1.0)
    assert optimizer.gradients == []


@pytest.mark.parametrize(
    ("who", "options"),
    [
        ("the reference model", {}),
        ("the policy", {}),
        ("the policy", {"minibatches": 2}),
        ("the policy", {"top_entropy": 0.2}),
        ("the value model", {**VALUE, "value_trunk": "own"}),
        ("the value model", {**VALUE, "value_trunk": "shared"}),
    ],
)
def test_a_bad_number_of_a_model_stops_before_the_update(new_model, who, options):
    """A weight that only the prompts of the last group meet, or the bias of the values."""
    policy, reference = (
        new_model(0, tie_embeddings=False),
        new_model(0, tie_embeddings=False).requires_grad_(False),
    )
    step = new_step(
        policy, reference, new_optimizer(policy), token_budget=16, **options
    )
    if step.algorithm.baseline == "value":
        step.critic = new_critic(policy, step.algorithm.value_trunk == "own")
        step.critic_optimizer = new_optimizer(step.critic)
    episodes = new_episodes(policy)
    with torch.no_grad():
        if who == "the value model":
            step.critic.head.bias.fill_(math.nan)
        else:
            (
                reference if who == "the reference model" else policy
            ).model.embed_tokens.weight[5] = math.nan
    where = "token . of sample . of problem " + (
        "p." if who == "the value model" else "p2"
    )
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    with pytest.raises(FloatingPointError, match=f"^{who} gave nan at {where}$"):
        step.step(episodes, 0, 1e-2)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), (
            name
        )


# --- metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("old_logprobs", ["trainer", "sampler"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_gap_between_sampler_and_trainer_is_measured(
    models, recorder, old_logprobs, epochs
):
    episodes = new_episodes(models[0])
    for episode in episodes:
        episode.completion.logprobs[:] = [
            value - 0.125 for value in episode.completion.logprobs
        ]
    step = new_step(
        *models[:2], recorder(models[0]), old_logprobs=old_logprobs, epochs=epochs
    )
    metrics = step.step(episodes, 0, 1.0)
    assert metrics["gap_mean"] == pytest.approx(0.125, abs=1e-6)
    assert metrics["gap_max"] == pytest.approx(0.125, abs=1e-6)
    # The truncated distribution is the trainer's
    assert metrics["effective_samples"] == pytest.approx(1, abs=1e-6)


def test_on_policy_nothing_is_off(models, recorder):
    """The sampler's own model as the reference: no gap, no KL, nothing clipped, every sample
    effective.
    """
    metrics = new_step(models[0], models[0], recorder(models[0]), token_budget=16).step(
        new_episodes(models[0]), 0, 1.0
    )
    assert (
        max(abs(metrics[name]) for name in ("kl", "kl_k1", "gap_mean", "gap_max"))
        < 1e-9
    )
    assert metrics["clipped_low"] == metrics["clipped_high"] == 0
    assert metrics["effective_samples"] == pytest.approx(1, abs=1e-9)


def test_the_loss_is_the_whole_steps(models, recorder):
    """Not the last micro-batch's."""
    episodes = new_episodes(models[0], noise=0.3)
    losses = [
        new_step(
            *models[:2], recorder(models[0]), token_budget=budget, kl_coef=0.1
        ).step(episodes, 0, 1.0)["loss"]
        for budget in (0, 1, 16, 40)
    ]
    assert losses[0] > 1e-3 and losses == pytest.approx([losses[0]] * 4, rel=1e-10)
