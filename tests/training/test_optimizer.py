"""AdamW with float32 masters, the refusal of bad gradients, the state, and the learning rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nanomath.training.optimizer import Optimizer, learning_rate

BETAS, EPS = (0.9, 0.95), 1e-8


class Weights(nn.Module):
    """Three parameters: a matrix, a vector, and one that is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float32, value: float = 0.1) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
        self.vector = nn.Parameter(torch.full((2,), value, dtype=dtype))
        self.matrix = nn.Parameter(torch.full((2, 2), value, dtype=dtype))

    def pull(self, strength: float = 1.0) -> None:
        """A backward pass whose gradient is `strength` everywhere."""
        ((self.matrix.sum() + self.vector.sum()) * strength).backward()


def new_optimizer(model: nn.Module, weight_decay: float = 0.0, max_norm: float = math.inf) -> Optimizer:
    return Optimizer(model, weight_decay, BETAS, EPS, max_norm)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5)]),
    ],
)
def test_learning_rates(schedule, expected):
    rates = [learning_rate(step, 6, 3.0, schedule, warmup=2, final=0.1) for step in range(6)]
    assert rates == pytest.approx([3 * rate for rate in expected])


def test_unknown_schedule_names_the_choices():
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        learning_rate(0, 10, 1.0, "exponential")


def test_updates_are_adamw_and_only_matrices_decay():
    model = Weights()
    optimizer = new_optimizer(model, weight_decay=0.3)
    expected = {"matrix": 0.1, "vector": 0.1}
    m = v = 0.0
    for step, (strength, lr) in enumerate([(1.0, 0.01), (-3.0, 0.02), (0.5, 0.005)], start=1):
        model.pull(strength)
        assert optimizer.step(lr) == pytest.approx(abs(strength) * math.sqrt(6))
        m, v = BETAS[0] * m + (1 - BETAS[0]) * strength, BETAS[1] * v + (1 - BETAS[1]) * strength**2
        move = lr * (m / (1 - BETAS[0] ** step)) / (math.sqrt(v / (1 - BETAS[1] ** step)) + EPS)
        expected = {"matrix": expected["matrix"] * (1 - lr * 0.3) - move, "vector": expected["vector"] - move}
        for name, value in expected.items():
            torch.testing.assert_close(getattr(model, name).detach(), torch.full_like(getattr(model, name), value))
    assert torch.equal(model.frozen, torch.ones(2)) and model.matrix.grad is None


def test_gradients_are_clipped_to_the_norm_together():
    model = Weights()
    optimizer = new_optimizer(model, max_norm=0.5)
    model.pull(10.0)
    assert optimizer.step(1.0) == pytest.approx(10 * math.sqrt(6))
    moments = optimizer.state()
    total = sum(float(moments[f"exp_avg.{name}"].square().sum()) for name in ("matrix", "vector"))
    assert math.sqrt(total) == pytest.approx(0.5 * (1 - BETAS[0]), rel=1e-4)


def test_tiny_updates_of_a_bfloat16_model_add_up():
    model = Weights(torch.bfloat16)
    start = float(model.matrix[0, 0].detach())
    optimizer = new_optimizer(model)
    for _ in range(1000):
        model.pull()
        optimizer.step(1e-6)
    master = optimizer.state()["master.matrix"]
    assert master.dtype == torch.float32
    assert master[0, 0].item() == pytest.approx(start - 1e-3, rel=1e-3)
    assert float(model.matrix[0, 0].detach()) < start and torch.equal(model.matrix, master.bfloat16())


def test_micro_batches_of_a_bfloat16_model_are_summed_in_float32():
    """1 + 256/512: in bfloat16 each of the small ones would vanish beside the 1."""
    model = Weights(torch.bfloat16)
    optimizer = new_optimizer(model)
    model.pull(1.0)
    for _ in range(256):
        model.pull(1 / 512)
    assert optimizer.step(0.0) == pytest.approx(1.5 * math.sqrt(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("culprit", ["vector", "matrix"])
def test_a_bad_gradient_is_named_and_changes_nothing(dtype, bad, culprit):
    model = Weights(dtype)
    optimizer = new_optimizer(model, 0.1, max_norm=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.pull()
    (getattr(model, culprit).sum() * bad).backward()
    with pytest.raises(FloatingPointError, match=rf"gradient norm is (nan|inf).*: {culprit}$"):
        optimizer.step(0.1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_and_three_updates_are_six(dtype):
    def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            model.pull(math.sin(step) + 0.2)
            optimizer.step(1e-3)

    whole, first = Weights(dtype), Weights(dtype)
    whole_optimizer, first_optimizer = new_optimizer(whole, 0.1), new_optimizer(first, 0.1)
    train(whole, whole_optimizer, range(6))
    train(first, first_optimizer, range(3))
    second = Weights(dtype)
    second.load_state_dict(first.state_dict())
    second_optimizer = new_optimizer(second, 0.1)
    second_optimizer.load_state({name: value.clone() for name, value in first_optimizer.state().items()})
    train(second, second_optimizer, range(3, 6))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in second.state_dict().items())
    states = whole_optimizer.state(), second_optimizer.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert ("master.matrix" in states[0]) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_from_before_the_first_update_can_be_continued(dtype):
    """A run whose groups were all flat has made no update yet, and may have to be resumed."""
    model, again = Weights(dtype), Weights(dtype)
    optimizers = new_optimizer(model), new_optimizer(again)
    optimizers[1].load_state({name: value.clone() for name, value in optimizers[0].state().items()})
    for weights, optimizer in zip((model, again), optimizers, strict=True):
        weights.pull()
        optimizer.step(0.01)
    assert torch.equal(model.matrix, again.matrix)


def test_a_state_of_another_model_is_refused():
    optimizer = new_optimizer(Weights())
    with pytest.raises(ValueError, match="lacks step.vector"):
        optimizer.load_state({"step.other": torch.tensor(1.0)})
