"""The policy step against an independent GRPO objective, and everything its gradient must not depend on."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from nanomath.data.problem import Problem
from nanomath.rollout import Completion, Episode
from nanomath.training.optimizer import Optimizer
from nanomath.training.policy_step import PolicyStep

GROUPS, SIZE = 3, 4
REWARDS = [1.0, 0.0, 0.5, 0.0, 0.25, 0.25, 0.25, 0.25, 1.0, 1.0, 1.0, 0.0]  # the second group is flat
EOS = 0


@pytest.fixture(scope="module")
def models(new_model):
    """The policy and, different from it, the reference, both in float64."""
    return new_model(0, torch.float64), new_model(1, torch.float64).requires_grad_(False)


def plain_logprobs(model, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]


def new_episodes(model, temperature: float, noise: float = 0.0) -> list[Episode]:
    """Random completions of all lengths, most of them ended by eos; their logprobs are the model's, plus noise."""
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for i in range(GROUPS * SIZE):
        prompt = [3 + i // SIZE] * (1 + i // SIZE)
        tokens = [*torch.randint(1, 300, (i % 5,), generator=generator).tolist(), 7 if i == 3 else EOS]
        with torch.no_grad():
            logprobs = plain_logprobs(model, prompt, tokens, temperature)
        logprobs = (logprobs + noise * torch.randn(len(tokens), generator=generator)).tolist()
        completion = Completion(i // SIZE, i % SIZE, tokens, logprobs, logprobs, "", "eos")
        rewards = {"accuracy": REWARDS[i], "total": REWARDS[i]}
        episodes.append(Episode(Problem(str(i), "q", "a"), prompt, completion, rewards))
    return episodes


def reference_advantages(std: str) -> list[float]:
    groups = [REWARDS[i : i + SIZE] for i in range(0, len(REWARDS), SIZE)]
    means = [sum(group) / SIZE for group in groups]

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    scale = [{"group": deviation(g) + 1e-4, "batch": deviation(REWARDS) + 1e-4, "none": 1.0}[std] for g in groups]
    return [(reward - means[i // SIZE]) / scale[i // SIZE] for i, reward in enumerate(REWARDS)]


def objective(models, episodes, temperature, std, aggregation, clip, beta, old_of) -> dict[str, torch.Tensor]:
    """Gradients of METHODS' - 1/G sum 1/|o| sum { min(rho A, clip(rho) A) - beta k3 }, one token at a time."""
    policy, reference = models
    policy.zero_grad()
    total = sum(e.completion.length for e in episodes)
    loss = torch.zeros((), dtype=torch.float64)
    for episode, advantage in zip(episodes, reference_advantages(std), strict=True):
        tokens = episode.completion.tokens
        new = plain_logprobs(policy, episode.prompt, tokens, temperature)
        ref = plain_logprobs(reference, episode.prompt, tokens, temperature)
        old = new.detach().tolist() if old_of is None else old_of(episode)
        for t in range(len(tokens)):
            ratio = (new[t] - old[t]).exp()
            clipped = torch.clamp(ratio, 1 - clip[0], 1 + clip[1])
            gain = min(ratio * advantage, clipped * advantage, key=lambda value: value.item())
            k3 = (ref[t] - new[t]).exp() - 1 - (ref[t] - new[t])
            weight = {
                "sequence": 1 / len(tokens) / len(episodes),
                "token": 1 / total,
                "constant": 1 / 80 / len(episodes),
            }
            loss = loss - weight[aggregation] * (gain - beta * k3)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return gradients


def gradient(models, recorder, episodes, **options) -> dict[str, torch.Tensor]:
    optimizer = recorder(models[0])
    PolicyStep(*models, optimizer, SIZE, **options).step(episodes, 0, 1e-3)
    assert len(optimizer.gradients) == 1 and optimizer.rates == [1e-3]
    return optimizer.gradients[0]


def assert_same(found: dict, expected: dict, tolerance: float = 1e-10) -> None:
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_on_policy_gradient_is_the_objective(models, recorder, std, aggregation, beta):
    episodes = new_episodes(models[0], 0.8)
    expected = objective(models, episodes, 0.8, std, aggregation, (0.2, 0.2), beta, None)
    options = {"advantage_std": std, "aggregation": aggregation, "kl_coef": beta, "max_length": 80, "temperature": 0.8}
    assert_same(gradient(models, recorder, episodes, **options, token_budget=16), expected, 1e-5)
    assert [e.advantage for e in episodes] == pytest.approx(reference_advantages(std), abs=1e-5)


def test_off_policy_gradient_is_the_clipped_objective(models, recorder):
    episodes = new_episodes(models[0], 1.0, noise=0.4)
    expected = objective(models, episodes, 1.0, "none", "token", (0.1, 0.3), 0.04, lambda e: e.completion.logprobs)
    options = {"advantage_std": "none", "aggregation": "token", "clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.04}
    assert_same(gradient(models, recorder, episodes, **options, old_logprobs="sampler"), expected, 1e-5)


@pytest.mark.parametrize("token_budget", [1, 9, 16, 40])
@pytest.mark.parametrize("old_logprobs", ["sampler", "trainer"])
def test_gradient_does_not_depend_on_the_cut(models, recorder, token_budget, old_logprobs):
    episodes = new_episodes(models[0], 1.0, noise=0.3)
    options = {"kl_coef": 0.1, "old_logprobs": old_logprobs, "temperature": 1.0}
    whole = gradient(models, recorder, episodes, **options)
    assert_same(gradient(models, recorder, episodes, **options, token_budget=token_budget), whole)


def test_skipping_idle_episodes_changes_no_gradient(models, recorder):
    """A KL coefficient too small to matter makes every episode count."""
    episodes = new_episodes(models[0], 1.0, noise=0.3)
    skipped = gradient(models, recorder, episodes, token_budget=16)
    assert sum(e.advantage == 0 for e in episodes) == SIZE
    assert_same(gradient(models, recorder, episodes, token_budget=16, kl_coef=1e-200), skipped)


def test_the_eos_gets_gradient_although_it_pads(models, recorder):
    """Two completions of one eos each, padded by the same id next to longer ones."""
    episodes = new_episodes(models[0], 1.0)
    full = gradient(models, recorder, episodes, aggregation="constant", max_length=80)
    for episode in episodes:
        if episode.completion.tokens[-1] == EOS and episode.completion.length > 1:
            for values in (episode.completion.tokens, episode.completion.logprobs):
                values.pop()
    cut = gradient(models, recorder, episodes, aggregation="constant", max_length=80)
    assert max(float((full[name] - cut[name]).abs().max()) for name in full) > 1e-4


def test_all_groups_flat_no_update(models, recorder):
    episodes = new_episodes(models[0], 1.0)
    for episode in episodes:
        episode.rewards["total"] = 0.1
    optimizer = recorder(models[0])
    metrics = PolicyStep(*models, optimizer, SIZE).step(episodes, 0, 1.0)
    assert optimizer.gradients == [] and metrics["grad_norm"] == 0.0
    assert metrics["kl"] > 0 and all(e.advantage == 0 for e in episodes)


def test_metrics_on_policy(models, recorder):
    episodes = new_episodes(models[0], 0.8)
    metrics = PolicyStep(*models, recorder(models[0]), SIZE, temperature=0.8, token_budget=16).step(episodes, 0, 1.0)
    x, entropies = [], []
    for e in episodes:
        with torch.no_grad():
            new, ref = (plain_logprobs(model, e.prompt, e.completion.tokens, 0.8) for model in models)
            logits = models[0](torch.tensor([e.prompt + e.completion.tokens]))[0, len(e.prompt) - 1 : -1] / 0.8
        x.append(new - ref)
        entropies.append(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1))
    x, entropies = torch.cat(x), torch.cat(entropies)
    assert metrics["kl_k1"] == pytest.approx(float(x.mean()), rel=1e-4)
    assert metrics["kl"] == pytest.approx(float(((-x).exp() - 1 + x).mean()), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-4)
    assert metrics["clipped_low"] == metrics["clipped_high"] == 0
    assert metrics["gap_max"] < 1e-5 and metrics["gap_mean"] <= metrics["gap_max"]


@pytest.mark.parametrize("old_logprobs", ["trainer", "sampler"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_gap_between_sampler_and_trainer_is_measured(models, recorder, old_logprobs, epochs):
    episodes = new_episodes(models[0], 1.0)
    for episode in episodes:
        episode.completion.logprobs[:] = [value - 0.125 for value in episode.completion.logprobs]
    step = PolicyStep(*models, recorder(models[0]), SIZE, old_logprobs=old_logprobs, epochs=epochs)
    metrics = step.step(episodes, 0, 1.0)
    assert metrics["gap_mean"] == pytest.approx(0.125, abs=1e-4)
    assert metrics["gap_max"] == pytest.approx(0.125, abs=1e-4)


@pytest.mark.parametrize("minibatches", [2, 3, 4, 5, 12])
def test_minibatches_cover_every_epoch_once(models, recorder, minibatches):
    """Without updates, and each weighed by its size, the minibatches' gradients add up to that of the whole."""
    episodes = new_episodes(models[0], 1.0)
    options = {"aggregation": "constant", "max_length": 10, "kl_coef": 0.1}
    whole = gradient(models, recorder, episodes, **options)
    optimizer = recorder(models[0])
    step = PolicyStep(*models, optimizer, SIZE, epochs=2, minibatches=minibatches, **options)
    step.step(episodes, 5, 1.0)
    assert len(optimizer.gradients) == 2 * minibatches
    for epoch in (0, 1):
        parts = step._minibatches(len(episodes), 5, epoch)
        assert sorted(i for part in parts for i in part.tolist()) == list(range(len(episodes)))
        found = optimizer.gradients[epoch * minibatches : (epoch + 1) * minibatches]
        shares = [len(part) / len(episodes) for part in parts]
        total = {name: sum(s * f[name] for s, f in zip(shares, found, strict=True)) for name in whole}
        assert_same(total, whole, 1e-6)


def test_several_updates_move_away_and_are_clipped(new_model):
    policy, reference = new_model(0), new_model(0).requires_grad_(False)
    episodes = new_episodes(policy, 1.0)
    optimizer = Optimizer(policy, 0.0, (0.9, 0.99), 1e-8, 1.0)
    step = PolicyStep(policy, reference, optimizer, SIZE, epochs=2, minibatches=2, token_budget=32)
    still = step.step(episodes, 0, 0.0)
    assert still["kl"] == pytest.approx(0, abs=1e-6) and still["clipped_low"] == still["clipped_high"] == 0
    moved = step.step(episodes, 1, 3e-3)
    assert 0 < moved["clipped_low"] + moved["clipped_high"] < 1
    assert moved["kl"] > 1e-4 and moved["gap_max"] < 1e-4 and moved["grad_norm"] > 0


def test_rewards_rise(new_model):
    """Paying for one token as the only answer makes it likely."""
    policy, reference = new_model(0), new_model(0).requires_grad_(False)
    step = PolicyStep(policy, reference, Optimizer(policy, 0.0, (0.9, 0.99), 1e-8, 1.0), 4, kl_coef=0.01)
    wanted = []
    for number in range(12):
        episodes = []
        for sample, token in enumerate((11, 12, 13, 14)):
            completion = Completion(0, sample, [token], [-1.0], [-1.0], "", "length")
            episodes.append(Episode(Problem("p", "q", "a"), [5, 6], completion, {"total": float(token == 12)}))
        step.step(episodes, number, 1e-2)
        with torch.no_grad():
            wanted.append(float(policy(torch.tensor([[5, 6]]))[0, -1].log_softmax(-1)[12]))
    assert wanted[-1] > wanted[0] + 1 and sum(b > a for a, b in pairwise(wanted)) >= 9


def test_a_bad_logprob_stops_before_the_update(new_model):
    policy = new_model(0)
    episodes = new_episodes(policy, 1.0)
    episodes[0].completion.logprobs[0] = math.nan
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = Optimizer(policy, 0.0, (0.9, 0.99), 1e-8, 1.0)
    step = PolicyStep(policy, new_model(0).requires_grad_(False), optimizer, SIZE, old_logprobs="sampler")
    with pytest.raises(FloatingPointError):
        step.step(episodes, 0, 1e-2)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
