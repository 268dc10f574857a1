"""The estimate of difficulty: its formulas by hand, and what it learns of planted ones."""

from __future__ import annotations

import math

import pytest
import torch

from nanomath.rollout.difficulty import RIDGE, Difficulty, features, posterior

ZERO = torch.zeros(1).double()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_what_is_predicted():
    known = Difficulty(2, 2, strength=4.0)
    known.tensors["weights"] = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    known.tensors["right"][1] = 6.0
    known.tensors["wrong"][1] = 2.0
    states = torch.tensor([[3.0, 4.0], [3.0, 4.0]])  # at unit length 0.6, 0.8
    levels = torch.tensor([0.0, 0.5]).double()
    p, q = known.predict(torch.tensor([0, 1]), states, levels).tolist()
    head = 0.6 - 1.6 + 0.5
    assert q == pytest.approx([sigmoid(head), sigmoid(head + 1.5)])
    mean = (6 + 4 * sigmoid(head)) / (8 + 4)
    logit = math.log(mean / (1 - mean))
    assert p == pytest.approx([sigmoid(head), sigmoid(logit + 1.5)])


def test_a_new_problem_has_the_prediction_of_the_head_alone():
    known = Difficulty(3, 2)
    states = torch.randn(3, 2)
    p, q = known.predict(torch.arange(3), states, torch.zeros(3).double())
    assert p.tolist() == q.tolist() == [0.5] * 3


def test_memory_is_of_samples_without_a_hint_and_fades():
    known = Difficulty(3, 2, discount=0.5)
    states = torch.ones(2, 2)
    levels = torch.tensor([0.0, 0.25]).double()
    right = torch.tensor([3.0, 4.0]).double()
    known.learn(torch.tensor([0, 1]), states, levels, right, 4)
    assert known.tensors["right"].tolist() == [3, 0, 0]
    assert known.tensors["wrong"].tolist() == [1, 0, 0]
    known.learn(torch.tensor([0, 0]), states, torch.zeros(2).double(), right, 4)
    assert known.tensors["right"].tolist() == [8.5, 0, 0]  # 3 / 2 + 3 + 4
    assert known.tensors["wrong"].tolist() == [1.5, 0, 0]


def test_the_posterior_is_the_maximum_with_its_curvature():
    generator = torch.Generator().manual_seed(0)
    x = features(
        torch.randn(7, 3, generator=generator), torch.rand(7, generator=generator)
    )
    right = torch.randint(0, 5, (7,), generator=generator).double()
    mean, root = (
        torch.randn(5, generator=generator).double(),
        torch.randn(5, 5).double(),
    )
    precision = root @ root.T + torch.eye(5).double()
    found, after = posterior(mean, precision, x, right, 4)

    def loss(w):
        q = (x @ w).sigmoid()
        likelihood = (right * q.log() + (4 - right) * (1 - q).log()).sum()
        return (w - mean) @ precision @ (w - mean) / 2 - likelihood

    gradient = torch.autograd.functional.jacobian(loss, found)
    assert gradient.abs().max() < 1e-6
    curvature = torch.autograd.functional.hessian(loss, found)
    assert torch.allclose(after, curvature, atol=1e-9)


def test_separable_data_do_not_make_it_run_away():
    """Where plain Newton steps overshoot."""
    states = torch.eye(40).repeat(2, 1)
    x = features(states, torch.zeros(80).double())
    right = torch.tensor([64.0] * 39 + [0.0]).repeat(2).double()
    start = torch.zeros(42).double(), 1e-6 * torch.eye(42).double()
    mean, _ = posterior(*start, x, right, 64)
    q = (x @ mean).sigmoid()
    assert mean.isfinite().all() and ((q > 0.5) == (right > 0)).all()


@pytest.fixture
def planted():
    """planted(steps, shift, seed): learn from problems of known pass rates, which move by
    `shift` (of their logit) half-way; the estimate, its metrics, and new problems.
    """

    def learn(steps: int = 40, shift: float = 0.0, discount: float = 0.95):
        generator = torch.Generator().manual_seed(1)
        direction = 6 * torch.randn(16, generator=generator).double()
        known = Difficulty(32 * steps, 16, discount=discount)
        metrics = []
        for step in range(steps):
            states = torch.randn(32, 16, generator=generator).double()
            levels = torch.randint(0, 2, (32,), generator=generator).double() / 2
            logits = features(states, levels)[:, :16] @ direction + 4 * levels - 2
            rates = (logits + shift * (step >= steps // 2)).sigmoid()
            right = torch.bernoulli(rates.expand(8, 32), generator=generator).sum(0)
            places = torch.arange(32 * step, 32 * step + 32)
            predictions = known.predict(places, states, levels)
            found = known.calibrate(predictions, right / 8)
            best = float((rates * (1 - rates)).mean())
            metrics.append({**found, "best": best, "mean": float(rates.mean())})
            known.learn(places, states, levels, right, 8)
        return known, metrics

    return learn


def mean(metrics: list[dict[str, float]], name: str) -> float:
    return sum(line[name] for line in metrics) / len(metrics)


def test_the_head_learns_a_planted_difficulty(planted):
    """Its Brier score comes near that of who knows the rates, p (1 - p)."""
    known, metrics = planted()
    first, last = metrics[0], metrics[-10:]
    assert first["hints/brier_head"] == pytest.approx(0.25, abs=1e-9)
    assert mean(last, "hints/brier_head") < mean(last, "best") + 0.02
    assert mean(last, "best") < 0.2 and last[-1]["hints/ece_head"] < 0.05
    # What hints do
    assert float(known.tensors["weights"][-1]) == pytest.approx(4, abs=1)


def test_the_estimate_follows_a_policy_that_improves(planted):
    _, metrics = planted(steps=60, shift=3.0, discount=0.8)
    after, last = metrics[30:32], metrics[-10:]
    assert mean(after, "hints/brier") > mean(after, "best") + 0.04
    assert mean(last, "hints/brier") < mean(last, "best") + 0.04


def test_memory_improves_what_the_prompt_does_not_tell():
    """Half of the problems are always solved, half never, and their states are alike."""
    known = Difficulty(8, 4)
    states, levels = torch.ones(8, 4), torch.zeros(8).double()
    right = torch.tensor([8.0, 0.0] * 4).double()
    for _ in range(3):
        known.learn(torch.arange(8), states, levels, right, 8)
    predictions = known.predict(torch.arange(8), states, levels)
    assert predictions[1].tolist() == pytest.approx([0.5] * 8, abs=1e-6)
    assert ((predictions[0] > 0.9) == (right > 0)).all()
    found = known.calibrate(predictions, right / 8)
    assert found["hints/brier"] < 0.01 < 0.24 < found["hints/brier_head"]


def test_calibration_by_hand():
    known = Difficulty(1, 1, discount=0.5)
    predictions = torch.tensor([[0.12, 0.18, 0.95], [0.5, 0.5, 1.0]]).double()
    rates = torch.tensor([0.0, 0.5, 1.0]).double()
    found = known.calibrate(predictions, rates)
    outcomes = [(0.12, 0, 1), (0.18, 0.5, 1), (0.95, 1, 1)]
    brier = sum(r * (1 - p) ** 2 + (1 - r) * p**2 for p, r, _ in outcomes) / 3
    assert found["hints/brier"] == pytest.approx(brier)
    assert found["hints/ece"] == pytest.approx((abs(0.3 - 0.5) + abs(0.95 - 1)) / 3)
    assert found["hints/ece_head"] == pytest.approx((abs(1.0 - 0.5) + 0) / 3)
    again = known.calibrate(predictions[:, :1], rates[:1])  # the first three count half
    assert again["hints/ece"] == pytest.approx((abs(0.15 + 0.12 - 0.25) + 0.025) / 2.5)


def test_before_anything_was_seen():
    known = Difficulty(1, 2)
    assert torch.equal(known.tensors["precision"], RIDGE * torch.eye(4).double())
    assert (
        known.predict(torch.tensor([0]), torch.ones(1, 2), ZERO).tolist() == [[0.5]] * 2
    )
