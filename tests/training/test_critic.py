"""The value model: it starts at zero, learns what is still to come, and moves the policy's
layers only when shared.
"""

from __future__ import annotations

import pytest
import torch
from plain_step import Descent, assert_same, new_critic, new_episodes, new_step

from nanomath.data.problem import Problem
from nanomath.models.batches import Example, make_batch, response_states
from nanomath.rollout import Completion, Episode
from nanomath.training.critic import Critic
from nanomath.training.optimizer import Optimizer

PPO = {"baseline": "value", "scale": "off", "value_coef": 1.0, "aggregation": "token"}
BATCH = make_batch([Example([5, 6], [7, 8, 0]), Example([9], [0])])


def new_optimizer(model) -> Optimizer:
    return Optimizer(model, 0.0, (0.9, 0.99), 1e-8, 1.0)


@pytest.mark.parametrize("own_trunk", [True, False])
def test_values_are_zero_at_the_start(new_model, own_trunk):
    """So that the first advantages are the rewards to come themselves."""
    policy = new_model()
    values = Critic(policy, own_trunk)(policy, BATCH)
    assert values.shape == (2, 3) and values.dtype == torch.float32 and not values.any()

    step = new_step(
        policy,
        new_model(1).requires_grad_(False),
        Descent(policy),
        **{**PPO, "lam": 1.0},
    )
    step.critic = Critic(policy, own_trunk)
    step.critic_optimizer = Descent(step.critic)
    episodes = new_episodes(policy)
    step.step(episodes, 0, 1.0)
    for episode in episodes:
        assert (
            episode.advantages == [episode.rewards["total"]] * episode.completion.length
        )


@pytest.mark.parametrize("own_trunk", [True, False])
def test_a_value_stands_where_its_token_is_predicted(new_model, own_trunk):
    """V_t = w . h_t + b of the state before token t, of one sequence at a time; 0 where there
    is no token.
    """
    policy = new_model(0, torch.float64)
    critic = new_critic(policy, own_trunk)
    trunk = critic.trunk if own_trunk else policy
    values = critic(policy, BATCH)
    for row, (prompt, response) in enumerate((([5, 6], [7, 8, 0]), ([9], [0]))):
        states = trunk.hidden(torch.tensor([prompt + response]))[
            0, len(prompt) - 1 : -1
        ]
        expected = [
            (state @ critic.head.weight[0] + critic.head.bias).item()
            for state in states.detach()
        ]
        assert values[row, : len(response)].tolist() == pytest.approx(
            expected, rel=1e-6
        )
        assert not values[row, len(response) :].any()
    states = response_states(trunk, BATCH)
    assert own_trunk or torch.equal(critic(policy, BATCH, states), values)


def test_an_own_trunk_is_a_copy_without_the_vocabulary(new_model):
    """Of the policy as it is now: later updates of the one leave the other alone."""
    policy = new_model(tie_embeddings=False).requires_grad_(False)
    critic = Critic(policy, own_trunk=True)
    names = {name.removeprefix("trunk.") for name, _ in critic.named_parameters()}
    assert names == {n for n, _ in policy.named_parameters()} - {"lm_head.weight"} | {
        "head.weight",
        "head.bias",
    }
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert torch.equal(critic.trunk.model.norm.weight, policy.model.norm.weight)
    policy.model.norm.weight.add_(1.0)
    assert not torch.equal(critic.trunk.model.norm.weight, policy.model.norm.weight)
    assert {n for n, _ in Critic(policy, own_trunk=False).named_parameters()} == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_only_a_shared_trunk_moves_the_policy(new_model, trunk):
    """The advantages are those of the values before the update, so the value loss has no other
    way to the policy.
    """
    policy, reference = (
        new_model(0, torch.float64),
        new_model(1, torch.float64).requires_grad_(False),
    )
    gradients = []
    for coefficient in (1e-200, 1.0):
        step = new_step(
            policy,
            reference,
            Descent(policy),
            **{**PPO, "value_trunk": trunk, "value_coef": coefficient},
        )
        step.critic = new_critic(policy, trunk == "own")
        step.critic_optimizer = Descent(step.critic)
        step.step(new_episodes(policy), 0, 0.0)
        gradients.append(step.optimizer.gradients[0])
    if trunk == "own":
        assert_same(*gradients)
    else:
        largest = max(float(g.abs().max()) for g in gradients[0].values())
        assert (
            max(
                float((a - b).abs().max())
                for a, b in zip(*(g.values() for g in gradients), strict=True)
            )
            > largest / 10
        )


def new_group(
    tokens: list[list[int]], rewards: list[float], prompt: list[int]
) -> list[Episode]:
    return [
        Episode(
            Problem("p", "q", "a"),
            prompt,
            Completion(
                0, sample, answer, [-1.0] * len(answer), [-1.0] * len(answer), "", "eos"
            ),
            {"accuracy": reward, "total": reward},
        )
        for sample, (answer, reward) in enumerate(zip(tokens, rewards, strict=True))
    ]


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_explained_variance_rises(new_model, trunk):
    """Prompts of two kinds: after the one every answer pays, after the other none. The policy
    stands still.
    """
    policy, reference = new_model(0), new_model(0).requires_grad_(False)
    step = new_step(
        policy,
        reference,
        Descent(policy),
        **{**PPO, "value_trunk": trunk, "value_clip": 10.0},
    )
    step.critic = Critic(policy, trunk == "own")
    step.critic_optimizer, step.critic_rate = new_optimizer(step.critic), 1e11
    episodes = [
        episode
        for prompt, reward in (
            ([5, 6], 1.0),
            ([7, 8], 0.0),
            ([9, 6], 1.0),
            ([4, 8], 0.0),
        )
        for episode in new_group([[11, 12, 0], [13, 0]], [reward, reward], prompt)
    ]
    explained = [
        step.step(episodes, number, 1e-13)["explained_variance"] for number in range(25)
    ]
    assert explained[0] == pytest.approx(0, abs=1e-6)  # a constant explains nothing
    assert explained[-1] > 0.9 and explained[-1] > explained[10] > explained[0]


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_ppo_learns(new_model, trunk):
    """What pays is the second token, whichever stands first."""
    policy, reference = new_model(0), new_model(0).requires_grad_(False)
    options = {
        "value_trunk": trunk,
        "clip": "dual",
        "whiten": True,
        "epochs": 2,
        "kl_coef": 0.01,
        "kl_in": "reward",
    }
    step = new_step(
        policy,
        reference,
        new_optimizer(policy),
        **{**PPO, **options, "kl_estimator": "k1"},
    )
    step.critic = Critic(policy, trunk == "own")
    step.critic_optimizer = new_optimizer(step.critic)
    answers = [[first, second] for first in (11, 12) for second in (21, 22, 23)]
    wanted = []
    for number in range(15):
        metrics = step.step(
            new_group(answers, [float(a[1] == 22) for a in answers], [5, 6]),
            number,
            5e-3,
        )
        with torch.no_grad():
            logprobs = policy(torch.tensor([[5, 6, 11], [5, 6, 12]]))[
                :, -1
            ].log_softmax(-1)
        wanted.append(float(logprobs[:, 22].mean()))
    assert wanted[-1] > wanted[0] + 1 and metrics["kl"] > 0
