"""Expected gradients by enumeration of every completion of a small softmax policy: no
sampling, no tolerance for noise.

Five tokens, logits theta; completions are one token, or two of which the second depends on the
first. A row of the batch is a completion, its weight is its probability: the loss is then an
expectation, and its gradient is exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import choices, randoms
from torch import Tensor

from nanomath.algorithms import (
    check,
    gae,
    group_advantages,
    kl_estimate,
    kl_loss,
    policy_loss,
    token_rewards,
)

V = 5
ESTIMATORS, PLACES, CORRECTIONS = (
    ("k1", "k2", "k3", "k3+"),
    ("loss", "reward"),
    ("off", "weight", "ratio"),
)

# Which divergence the expected gradient descends. A KL in the reward is a number, which the
# ratio of the policy loss carries over from pi_old: a correction on top of that is one ratio
# too many.
VERDICTS = {
    **{
        ("k1", "loss", "off"): "nothing",
        ("k1", "loss", "weight"): "nothing",
        ("k1", "loss", "ratio"): "reverse",
    },
    **{
        ("k2", "loss", "off"): "reverse",
        ("k2", "loss", "weight"): "reverse",
        ("k2", "loss", "ratio"): "wrong",
    },
    **{
        ("k3", "loss", "off"): "forward",
        ("k3", "loss", "weight"): "forward",
        ("k3", "loss", "ratio"): "reverse",
    },
    **{
        ("k3+", "loss", "off"): "reverse",
        ("k3+", "loss", "weight"): "reverse",
        ("k3+", "loss", "ratio"): "wrong",
    },
    **{
        ("k1", "reward", "off"): "reverse",
        ("k1", "reward", "weight"): "wrong",
        ("k1", "reward", "ratio"): "wrong",
    },
    **{(k, "reward", c): "wrong" for k in ("k2", "k3", "k3+") for c in CORRECTIONS},
}


class OneToken:
    """pi, pi_old and pi_ref over V tokens; logprobs as a batch [V, 1] of all completions."""

    def __init__(self, seed: int, on_policy: bool = False) -> None:
        theta, old, ref = randoms(seed, (V,), (V,), (V,))
        self.theta = theta.requires_grad_()
        self.new = theta.log_softmax(0)[:, None]
        self.old = self.new.detach() if on_policy else old.log_softmax(0)[:, None]
        self.ref = ref.log_softmax(0)[:, None]
        self.mask = torch.ones(V, 1, dtype=torch.bool)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.theta, retain_graph=True)[0]

    def gradients(self) -> dict[str, Tensor]:
        """Of the two divergences, from their definitions."""
        p, q = self.new.exp(), self.ref.exp()
        return {
            "reverse": self.gradient((p * (self.new - self.ref)).sum()),
            "forward": self.gradient((q * (self.ref - self.new)).sum()),
            "nothing": torch.zeros(V, dtype=torch.float64),
        }


def expected_kl_gradient(
    policy: OneToken, estimator: str, place: str, correction: str
) -> Tensor:
    """Of the estimate as it stands in the loss or in the reward, over tokens drawn from
    pi_old.
    """
    p_old = policy.old.exp()
    if place == "loss":
        loss = kl_loss(policy.new, policy.ref, policy.old, p_old, estimator, correction)
        return policy.gradient(loss)
    kl = kl_estimate(policy.new, policy.ref, estimator).detach()
    kl = kl if correction == "off" else kl * (policy.new.detach() - policy.old).exp()
    rewards = token_rewards(
        torch.zeros(V, dtype=torch.float64), policy.mask, kl, kl_coef=1.0
    )
    return policy.gradient(
        policy_loss(policy.new, policy.old, rewards, p_old, ratio="token", clip="off")[
            0
        ]
    )


def verdict(estimator: str, place: str, correction: str) -> str:
    """Without a correction the loss is looked at on-policy; all else must stand being
    off-policy as well.
    """
    policies = [
        OneToken(seed, on_policy=(place == "loss" and correction == "off"))
        for seed in range(3)
    ]
    for name in ("nothing", "reverse", "forward"):
        found = [
            expected_kl_gradient(policy, estimator, place, correction)
            for policy in policies
        ]
        if all(
            (f - p.gradients()[name]).abs().max() < 1e-12
            for f, p in zip(found, policies, strict=True)
        ):
            return name
    return "wrong"


@pytest.mark.parametrize(
    ("estimator", "place", "correction"),
    list(itertools.product(ESTIMATORS, PLACES, CORRECTIONS)),
)
def test_what_each_kl_descends_and_whether_check_lets_it(estimator, place, correction):
    """`check` refuses exactly what descends no divergence. k3 in the loss descends the forward
    one, and is GRPO's.
    """
    found = verdict(estimator, place, correction)
    assert found == VERDICTS[estimator, place, correction]
    config = choices(kl_estimator=estimator, kl_in=place, kl_correction=correction)
    if found in ("reverse", "forward"):
        check(config)
    else:
        with pytest.raises(ValueError, match="kl_"):
            check(config)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_weight_of_one_changes_nothing_on_policy(estimator):
    policy = OneToken(0, on_policy=True)
    plain, weighted = (
        expected_kl_gradient(policy, estimator, "loss", how)
        for how in ("off", "weight")
    )
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-15)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+"])
def test_without_correction_old_tokens_lead_elsewhere(estimator):
    policy = OneToken(0)
    found = expected_kl_gradient(policy, estimator, "loss", "off")
    assert all(
        (found - gradient).abs().max() > 0.01
        for gradient in policy.gradients().values()
    )


def test_k1_in_the_reward_of_the_on_policy_reinforce_gradient():
    policy = OneToken(0, on_policy=True)
    rewards = token_rewards(
        torch.zeros(V),
        policy.mask,
        kl_estimate(policy.new, policy.ref, "k1").detach(),
        1.0,
    )
    loss, _ = policy_loss(
        policy.new, policy.old, rewards, policy.old.exp(), ratio="off", clip="off"
    )
    torch.testing.assert_close(
        policy.gradient(loss), policy.gradients()["reverse"], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_expected_values(seed):
    """k1, k3 and k3+ are unbiased; k2 is off by E[x^2] / 2 - KL, which is of third order in
    the distance.
    """
    policy = OneToken(seed)
    p, x = policy.new.detach().exp(), (policy.new - policy.ref).detach()
    kl = float((p * x).sum())
    found = {
        name: float((p * kl_estimate(policy.new.detach(), policy.ref, name)).sum())
        for name in ESTIMATORS
    }
    assert found["k1"] == pytest.approx(kl, abs=1e-12)
    assert found["k3"] == pytest.approx(kl, abs=1e-12)
    assert found["k3+"] == pytest.approx(kl, abs=1e-12)
    assert found["k2"] - kl == pytest.approx(
        float((p * (x * x / 2 - x)).sum()), abs=1e-12
    )
    assert abs(found["k2"] - kl) > 0.01


def test_the_bias_of_k2_is_of_third_order():
    logits, step = randoms(0, (V,), (V,))
    ref = logits.log_softmax(0)

    def bias(size: float) -> float:
        new = (logits + size * step).log_softmax(0)
        return float(
            (
                new.exp() * (kl_estimate(new, ref, "k2") - kl_estimate(new, ref, "k1"))
            ).sum()
        )

    assert bias(0.02) / bias(0.01) == pytest.approx(8, rel=0.1)


class TwoTokens:
    """pi(a) pi(b | a) over V x V completions as a batch [V^2, 2]; theta holds both tokens'
    logits, [V + 1, V].
    """

    def __init__(self, seed: int) -> None:
        theta, ref, self.outcome, self.value = randoms(
            seed, (V + 1, V), (V + 1, V), (V * V,), (V + 1,)
        )
        self.theta = theta.requires_grad_()
        self.rows, self.ref_rows = (
            theta.log_softmax(1),
            ref.log_softmax(1),
        )  # row 0: first token; row 1 + a: after a
        self.new, self.ref = self._batch(self.rows), self._batch(self.ref_rows)
        self.p = self.new.detach().sum(1).exp()
        self.weights = self.p[:, None].expand(-1, 2)
        self.mask = torch.ones(V * V, 2, dtype=torch.bool)
        self.values = torch.stack(
            [self.value[0].expand(V * V), self.value[1:].repeat_interleave(V)], 1
        )

    def _batch(self, rows: Tensor) -> Tensor:
        return torch.stack([rows[0].repeat_interleave(V), rows[1:].flatten()], dim=1)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.theta, retain_graph=True)[0]

    def reinforce(self, advantages: Tensor) -> Tensor:
        loss, _ = policy_loss(
            self.new,
            self.new.detach(),
            advantages,
            self.weights,
            ratio="off",
            clip="off",
        )
        return self.gradient(loss)

    def kl_of_each_prefix(self) -> Tensor:
        """KL of the next token's distribution after nothing, and after each first token: [V +
        1].
        """
        return (self.rows.exp() * (self.rows - self.ref_rows)).sum(1)

    def kl_gradient(self) -> Tensor:
        """Of the KL between whole completions."""
        log_p, log_q = self.new.sum(1), self.ref.sum(1)
        return self.gradient((log_p.exp() * (log_p - log_q)).sum())

    def objective_gradient(self) -> Tensor:
        """Of the expected outcome."""
        return self.gradient((self.new.sum(1).exp() * self.outcome).sum())


def test_k1_in_the_reward_with_rewards_to_go_descends_the_kl_of_whole_completions():
    policy = TwoTokens(0)
    kl = kl_estimate(policy.new, policy.ref, "k1").detach()
    rewards = token_rewards(torch.zeros(V * V), policy.mask, kl, kl_coef=1.0)
    to_go, _ = gae(rewards, torch.zeros_like(rewards), policy.mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(
        policy.reinforce(to_go), policy.kl_gradient(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_as_a_loss_a_token_answers_for_its_own_kl_alone(estimator):
    """Missing is what the first token does to the KL of the second: sum_a grad pi(a) KL(a)."""
    policy = TwoTokens(0)
    found = policy.gradient(
        kl_loss(policy.new, policy.ref, policy.new.detach(), policy.weights, estimator)
    )
    kl, first = policy.kl_of_each_prefix(), policy.rows[0].exp()
    own = policy.gradient(kl[0] + (first.detach() * kl[1:]).sum())
    influence = policy.gradient((first * kl[1:].detach()).sum())
    torch.testing.assert_close(found, own, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        own + influence, policy.kl_gradient(), rtol=0, atol=1e-12
    )
    assert influence.abs().max() > 0.01


def test_the_outcome_at_the_last_token_teaches_all_tokens():
    policy = TwoTokens(1)
    rewards = token_rewards(policy.outcome, policy.mask)
    to_go, _ = gae(rewards, torch.zeros_like(rewards), policy.mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(
        policy.reinforce(to_go), -policy.objective_gradient(), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        policy.reinforce(policy.outcome),
        -policy.objective_gradient(),
        rtol=0,
        atol=1e-12,
    )
    # Not the reward at its token
    assert (policy.reinforce(rewards) + policy.objective_gradient()).abs().max() > 0.01


def test_gae_with_lambda_one_is_unbiased_whatever_the_values():
    policy = TwoTokens(2)
    rewards = token_rewards(policy.outcome, policy.mask)
    advantages, _ = gae(rewards, policy.values, policy.mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(
        policy.reinforce(advantages), -policy.objective_gradient(), rtol=0, atol=1e-12
    )
    biased, _ = gae(rewards, policy.values, policy.mask, gamma=1.0, lam=0.5)
    assert (policy.reinforce(biased) + policy.objective_gradient()).abs().max() > 0.01


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_true_values_is_unbiased_whatever_lambda(lam):
    policy = TwoTokens(3)
    # The value after each first token
    after = (policy.rows[1:].detach().exp() * policy.outcome.view(V, V)).sum(1)
    start = (policy.rows[0].detach().exp() * after).sum()
    values = torch.stack([start.expand(V * V), after.repeat_interleave(V)], 1)
    advantages, _ = gae(
        token_rewards(policy.outcome, policy.mask),
        values,
        policy.mask,
        gamma=1.0,
        lam=lam,
    )
    torch.testing.assert_close(
        policy.reinforce(advantages), -policy.objective_gradient(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_group_baselines_over_all_groups(baseline, size):
    """Leaving the sample itself out of its baseline is unbiased; GRPO's mean shrinks the
    gradient by (G - 1) / G.
    """
    policy = OneToken(4)
    reward = randoms(5, (V,))[0]
    groups = torch.tensor(list(itertools.product(range(V), repeat=size)))  # [V^G, G]
    chance = policy.new.detach()[groups, 0].sum(1).exp()
    advantages = group_advantages(reward[groups], baseline, scale="off").flatten()
    new = policy.new[groups.flatten()]
    weights = chance.repeat_interleave(size)[:, None] / size
    found = policy.gradient(
        policy_loss(new, new.detach(), advantages, weights, ratio="off", clip="off")[0]
    )
    exact = policy.gradient((policy.new.exp()[:, 0] * reward).sum())
    share = 1.0 if baseline == "leave_one_out" else (size - 1) / size
    torch.testing.assert_close(found, -share * exact, rtol=0, atol=1e-12)


def test_rloo_with_the_kl_in_the_reward_descends_outcome_and_kl():
    """All pairs of two-token completions; the KL of a completion is a part of what it earns."""
    policy = TwoTokens(6)
    earned = policy.outcome - 0.3 * kl_estimate(
        policy.new, policy.ref, "k1"
    ).detach().sum(1)
    pairs = torch.tensor(list(itertools.product(range(V * V), repeat=2)))
    advantages = group_advantages(earned[pairs], "leave_one_out", scale="off").flatten()
    new = policy.new[pairs.flatten()]
    weights = (policy.p[pairs].prod(1) / 2).repeat_interleave(2)[:, None].expand(-1, 2)
    found = policy.gradient(
        policy_loss(new, new.detach(), advantages, weights, ratio="off", clip="off")[0]
    )
    torch.testing.assert_close(
        found,
        0.3 * policy.kl_gradient() - policy.objective_gradient(),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("ratio", ["token", "off"])
def test_tokens_of_an_older_policy(ratio):
    """The token ratio carries the gradient over from pi_old exactly; without it the gradient
    is that of pi_old's.
    """
    policy = OneToken(7)
    reward = randoms(8, (V,))[0]
    loss, _ = policy_loss(
        policy.new, policy.old, reward, policy.old.exp(), ratio=ratio, clip="off"
    )
    exact = policy.gradient((policy.new.exp()[:, 0] * reward).sum())
    right = bool((policy.gradient(loss) + exact).abs().max() < 1e-12)
    assert right == (ratio == "token")
