"""The policy step with adapters: the policy learns, what samples is what learns, and the
reference stays the starting model.
"""

from __future__ import annotations

import pytest
import torch

from nanomath.data.problem import Problem
from nanomath.models.lora import LoRA
from nanomath.models.scores import response_scores
from nanomath.rollout import Episode
from nanomath.settings import LINEAR_LAYERS, Algorithm
from nanomath.training.optimizer import Optimizer
from nanomath.training.policy_step import PolicyStep
from nanomath.training.shared_sampler import SharedSampler

PROMPTS = [[5, 6, 7], [300, 12]]
GROUP = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_learns_which_tokens_to_draw(new_model, tokenizer, dtype):
    base = new_model(dtype=dtype)
    before = [p.detach().clone() for p in base.parameters()]
    good = set((base.lm_head.weight[:, 0] > 0).nonzero()[:, 0].tolist())  # about a half
    lora = LoRA(base, 4, 8.0, LINEAR_LAYERS)
    model = lora.applied_to(base)
    merged = lora.merged(base, dtype)
    sampler = SharedSampler(merged, tokenizer)
    sampler.refresh = lambda: lora.merge(base, merged)
    optimizer = Optimizer(lora, 0.0, (0.9, 0.95), 1e-8, 1.0)
    algorithm = Algorithm(kl_coef=0.001)
    policy = PolicyStep(
        model, base, optimizer, GROUP, algorithm, reward_weights={"good": 1.0}
    )
    rewards = []
    for step in range(20):
        drawn = sampler.generate(PROMPTS, GROUP, max_new_tokens=6, seed=step)
        episodes = []
        for c in drawn:
            share = sum(token in good for token in c.tokens) / c.length
            scores = {"good": share, "total": share}
            episodes.append(
                Episode(Problem("0", "", ""), PROMPTS[c.prompt_index], c, scores)
            )
        rewards.append(sum(e.rewards["good"] for e in episodes) / len(episodes))
        rollout = policy.prepare(episodes)
        reference, _ = response_scores(base, rollout.examples, 0)
        assert torch.equal(rollout.tokens.ref_logprobs.float(), reference)
        metrics = policy.step(episodes, step, 0.02)
        assert metrics["gap_max"] < (1e-4 if dtype == torch.float32 else 1.0)
    assert sum(rewards[:3]) / 3 < 0.65 and sum(rewards[-3:]) / 3 > 0.75, rewards
    assert metrics["kl"] > 0.01
    assert all(map(torch.equal, base.parameters(), before))
