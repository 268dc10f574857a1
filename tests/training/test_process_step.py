"""Rewards of steps in a policy step: what they add to the advantages, against loops over steps
and tokens.
"""

from __future__ import annotations

import copy

import pytest
import torch
from plain_step import GROUPS, SIZE, new_episodes, new_step

from nanomath.training.critic import Critic


def with_steps(episodes, rewarded: bool = True):
    """Up to three steps an episode, the last one on the last token."""
    generator = torch.Generator().manual_seed(1)
    for i, episode in enumerate(episodes):
        last = episode.completion.length - 1
        episode.step_ends = sorted({max(0, last - 3), max(0, last - 1), last})[
            -(1 + i % 3) :
        ]
        episode.step_scores = torch.rand(
            len(episode.step_ends), generator=generator
        ).tolist()
        episode.step_rewards = (
            [score - 0.3 for score in episode.step_scores] if rewarded else []
        )
    return episodes


def advantages(model, recorder, episodes, **options):
    policy = copy.deepcopy(model)
    critic = Critic(policy, True) if options.get("baseline") == "value" else None
    step = new_step(
        policy, model, recorder(policy), scale="off", critic=critic, **options
    )
    return step.prepare(episodes).tokens.advantages


def plain(episodes, baseline: str, lam: float) -> list[list[float]]:
    """What the steps add to each token's advantage."""
    found = []
    for i, episode in enumerate(episodes):
        group = episodes[i // SIZE * SIZE : i // SIZE * SIZE + SIZE]
        ends, rewards = episode.step_ends, list(episode.step_rewards)
        if baseline == "group":
            pooled = torch.tensor(
                [r for e in group for r in e.step_rewards], dtype=torch.float64
            )
            rewards = [
                (r - float(pooled.mean())) / (float(pooled.std()) + 1e-4)
                for r in rewards
            ]
        if baseline == "leave_one_out":
            others = [e for e in group if e is not episode]
            each = sum(sum(e.step_rewards) for e in others) / sum(
                e.completion.length for e in others
            )
            rewards = [
                r - each * (end - before)
                for r, end, before in zip(rewards, ends, [-1, *ends], strict=False)
            ]
        found.append(
            [
                sum(
                    r * lam ** (end - t)
                    for r, end in zip(rewards, ends, strict=True)
                    if end >= t
                )
                for t in range(episode.completion.length)
            ]
        )
    return found


@pytest.mark.parametrize(
    ("baseline", "lam"),
    [("group", 1.0), ("leave_one_out", 1.0), ("off", 1.0), ("value", 0.9)],
)
def test_what_steps_add(new_model, recorder, baseline, lam):
    model = new_model(1)
    options = {"baseline": baseline, "lam": lam, "credit": "sum", "step_weight": 0.5}
    episodes = with_steps(new_episodes(model))
    without = advantages(
        model, recorder, with_steps(new_episodes(model), rewarded=False), **options
    )
    added = advantages(model, recorder, episodes, **options) - without
    for row, expected in zip(added, plain(episodes, baseline, lam), strict=True):
        assert (2 * row[: len(expected)]).tolist() == pytest.approx(expected, abs=1e-9)
        assert not row[len(expected) :].any()


def test_an_update_follows_the_steps_alone(new_model, recorder):
    """Where outcomes say nothing, a token before a good step becomes likelier than one before
    a bad step.
    """
    model = new_model(2)
    episodes = with_steps(new_episodes(model))
    for episode in episodes:
        episode.rewards["total"] = 0.0
    optimizer = recorder(model)
    metrics = new_step(
        model, copy.deepcopy(model), optimizer, credit="sum", method="process_grpo"
    ).step(episodes, 0, 0.1)
    assert metrics["loss"] != 0 and len(optimizer.gradients) == 1
    assert (
        sum(float(gradient.abs().sum()) for gradient in optimizer.gradients[0].values())
        > 0
    )
    assert len(episodes) == GROUPS * SIZE and all(
        len(e.advantages) == e.completion.length for e in episodes
    )
