"""README.md: the seven lines are the algorithm, and the files that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from nanomath import algorithms, settings
from nanomath.algorithms import Rewards, Tokens

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LENGTHS = torch.tensor([4, 1, 6, 2, 5, 5])


def test_the_seven_lines_are_the_objective():
    (code,) = re.findall(
        r"## GRPO in seven lines.*?```python\n(.*?)```", README, re.DOTALL
    )
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 7
    torch.manual_seed(0)
    rewards = torch.rand(2, 3, dtype=torch.float64)
    mask = algorithms.response_mask(LENGTHS)
    old, ref, new = -torch.rand(3, *mask.shape, dtype=torch.float64) * 2
    by_hand = new.clone().requires_grad_()
    known = {"torch": torch, "rewards": rewards, "mask": mask, "logprobs": by_hand}
    names = known | {"old_logprobs": old, "ref_logprobs": ref}
    exec(code, names)

    a = settings.Algorithm()
    tokens = Tokens(mask, mask, old, old, old_logprobs=old, ref_logprobs=ref)
    totals = rewards.flatten()
    of_all = Rewards(totals, totals[None], torch.ones(1), group_size=3, step_weight=1.0)
    tokens.advantages, _ = algorithms.compute_advantages(a, of_all, tokens)
    for name, weights in algorithms.compute_weights(a, tokens, 0).items():
        setattr(tokens, name, weights)
    ours = new.clone().requires_grad_()
    loss = algorithms.policy_objective(a, ours, tokens)
    torch.testing.assert_close(names["loss"], loss, rtol=0, atol=1e-12)
    names["loss"].backward()
    loss.backward()
    torch.testing.assert_close(by_hand.grad, ours.grad, rtol=0, atol=1e-12)


def test_every_file_and_page_is_there():
    linked = re.findall(r"\]\(([^)]+)\)", README)
    named = re.findall(
        r"`((?:nanomath|tests|docs|kernels)/[\w/.]+|train_\w+\.py)`", README
    )
    assert len(named) > 6 and len(linked) > 6
    assert [name for name in (*linked, *named) if not (ROOT / name).exists()] == []
