"""AdamW with float32 masters and rounded moments, the refusal of bad numbers, the state, and
the learning rates.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanomath.training.optimizer import (
    Optimizer,
    by_part,
    learning_rate,
    round_by_chance,
)

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


def new_optimizer(
    model: nn.Module, weight_decay: float = 0.0, max_norm: float = math.inf, **options
) -> Optimizer:
    return Optimizer(model, weight_decay, BETAS, EPS, max_norm, **options)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        (
            "cosine",
            [
                0.5,
                1.0,
                1.0,
                0.1 + 0.45 * (1 + 0.5**0.5),
                0.55,
                0.1 + 0.45 * (1 - 0.5**0.5),
            ],
        ),
    ],
)
def test_learning_rates(schedule, expected):
    rates = [
        learning_rate(step, 6, 3.0, schedule, warmup=2, final=0.1) for step in range(6)
    ]
    assert rates == pytest.approx([3 * rate for rate in expected])


def test_unknown_schedule_names_the_choices():
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        learning_rate(0, 10, 1.0, "exponential")


def test_updates_are_adamw_and_only_matrices_decay():
    model = Weights()
    optimizer = new_optimizer(model, weight_decay=0.3)
    expected = {"matrix": 0.1, "vector": 0.1}
    m = v = 0.0
    for step, (strength, lr) in enumerate(
        [(1.0, 0.01), (-3.0, 0.02), (0.5, 0.005)], start=1
    ):
        model.pull(strength)
        assert optimizer.step(lr)["grad_norm"] == pytest.approx(
            abs(strength) * math.sqrt(6)
        )
        m, v = (
            BETAS[0] * m + (1 - BETAS[0]) * strength,
            BETAS[1] * v + (1 - BETAS[1]) * strength**2,
        )
        move = (
            lr
            * (m / (1 - BETAS[0] ** step))
            / (math.sqrt(v / (1 - BETAS[1] ** step)) + EPS)
        )
        expected = {
            "matrix": expected["matrix"] * (1 - lr * 0.3) - move,
            "vector": expected["vector"] - move,
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                getattr(model, name).detach(),
                torch.full_like(getattr(model, name), value),
            )
    assert torch.equal(model.frozen, torch.ones(2)) and model.matrix.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pull_to_the_start_is_a_gradient_like_any_other(dtype):
    """2 lambda (w - w0), of the float32 weights, added before the gradients are clipped."""
    model = Weights(dtype)
    optimizer = new_optimizer(model)
    optimizer.hold(model, 0.25)
    model.pull(2.0)
    first = optimizer.step(1e-4)  # at the start it pulls nowhere
    assert first["grad_norm"] == pytest.approx(2 * math.sqrt(6))
    moved = optimizer.weights["matrix"].master - optimizer.start["matrix"]
    assert float(moved[0, 0]) == pytest.approx(-1e-4, rel=1e-3)
    assert first["start_distance"] == pytest.approx(1e-4 * math.sqrt(6), rel=1e-3)
    model.pull(2.0)
    pulled = 2.0 + 2 * 0.25 * float(moved[0, 0])
    second = optimizer.step(0.0)
    assert second["grad_norm"] == pytest.approx(pulled * math.sqrt(6), rel=1e-7)
    m = (BETAS[0] * 2.0 + pulled) * (1 - BETAS[0])
    found = optimizer.state()["exp_avg.matrix"][0, 0].item()
    assert found == pytest.approx(m, rel=1e-6)


def test_without_a_penalty_nothing_is_held():
    model = Weights()
    optimizer = new_optimizer(model)
    model.pull()
    assert "start_distance" not in optimizer.step(0.1) and optimizer.start == {}


def test_gradients_are_clipped_to_the_norm_together():
    model = Weights()
    optimizer = new_optimizer(model, max_norm=0.5)
    model.pull(10.0)
    assert optimizer.step(1.0)["grad_norm"] == pytest.approx(10 * math.sqrt(6))
    moments = optimizer.state()
    total = sum(
        float(moments[f"exp_avg.{name}"].square().sum())
        for name in ("matrix", "vector")
    )
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
    assert float(model.matrix[0, 0].detach()) < start and torch.equal(
        model.matrix, master.bfloat16()
    )


def test_micro_batches_of_a_bfloat16_model_are_summed_in_float32():
    """1 + 256/512: in bfloat16 each of the small ones would vanish beside the 1."""
    model = Weights(torch.bfloat16)
    optimizer = new_optimizer(model)
    model.pull(1.0)
    for _ in range(256):
        model.pull(1 / 512)
    assert optimizer.step(0.0)["grad_norm"] == pytest.approx(1.5 * math.sqrt(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("culprit", ["vector", "matrix"])
def test_a_bad_gradient_is_named_and_changes_nothing(dtype, bad, culprit):
    model = Weights(dtype)
    optimizer = new_optimizer(model, 0.1, max_norm=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.pull()
    (getattr(model, culprit).sum() * bad).backward()
    with pytest.raises(
        FloatingPointError, match=rf"gradient norm is (nan|inf).*: {culprit}$"
    ):
        optimizer.step(0.1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_and_three_updates_are_six(dtype, state_dtype):
    def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            model.pull(math.sin(step) + 0.2)
            optimizer.step(1e-3)

    whole, first = Weights(dtype), Weights(dtype)
    options = {"state_dtype": state_dtype}
    whole_optimizer, first_optimizer = (
        new_optimizer(whole, 0.1, **options),
        new_optimizer(first, 0.1, **options),
    )
    train(whole, whole_optimizer, range(6))
    train(first, first_optimizer, range(3))
    second = Weights(dtype)
    second.load_state_dict(first.state_dict())
    second_optimizer = new_optimizer(second, 0.1, **options)
    second_optimizer.load_state(
        {name: value.clone() for name, value in first_optimizer.state().items()}
    )
    train(second, second_optimizer, range(3, 6))
    assert all(
        torch.equal(value, whole.state_dict()[name])
        for name, value in second.state_dict().items()
    )
    states = whole_optimizer.state(), second_optimizer.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert ("master.matrix" in states[0]) == (dtype == torch.bfloat16)
    assert (
        states[0]["exp_avg.matrix"].dtype
        == states[0]["exp_avg_sq.vector"].dtype
        == state_dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_from_before_the_first_update_can_be_continued(dtype):
    """A run whose groups were all flat has made no update yet, and may have to be resumed."""
    model, again = Weights(dtype), Weights(dtype)
    optimizers = new_optimizer(model), new_optimizer(again)
    optimizers[1].load_state(
        {name: value.clone() for name, value in optimizers[0].state().items()}
    )
    for weights, optimizer in zip((model, again), optimizers, strict=True):
        weights.pull()
        optimizer.step(0.01)
    assert torch.equal(model.matrix, again.matrix)


def test_a_state_of_another_model_is_refused():
    optimizer = new_optimizer(Weights())
    with pytest.raises(ValueError, match="lacks step.vector"):
        optimizer.load_state({"step.other": torch.tensor(1.0)})


def test_a_state_of_another_shape_is_refused_and_nothing_is_changed():
    model = Weights()
    optimizer = new_optimizer(model)
    model.pull()
    optimizer.step(0.1)
    before = {name: value.clone() for name, value in optimizer.state().items()}
    other = {name: torch.zeros_like(value) for name, value in before.items()}
    with pytest.raises(
        ValueError, match=r"exp_avg_sq.matrix has shape \[3, 2\], expected \[2, 2\]"
    ):
        optimizer.load_state({**other, "exp_avg_sq.matrix": torch.zeros(3, 2)})
    assert all(
        torch.equal(value, before[name]) for name, value in optimizer.state().items()
    )


def test_a_rounded_model_resumes_from_its_masters_in_float32_too():
    rounded, exact = Weights(torch.bfloat16), Weights()
    optimizer = new_optimizer(rounded)
    rounded.pull()
    optimizer.step(1e-5)
    new_optimizer(exact).load_state(optimizer.state())
    assert torch.equal(exact.matrix.detach(), optimizer.state()["master.matrix"])
    assert not torch.equal(exact.matrix, rounded.matrix.float())
    with pytest.raises(ValueError, match="lacks master.vector.*or dtype"):
        optimizer.load_state(new_optimizer(Weights()).state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_may_hold_the_weights_too(dtype):
    model, other = Weights(dtype), Weights(dtype, value=0.5)
    optimizer = new_optimizer(model, keep_weights=True)
    model.pull()
    optimizer.step(0.1)
    new_optimizer(other, keep_weights=True).load_state(optimizer.state())
    assert torch.equal(other.matrix, model.matrix) and torch.equal(
        other.vector, model.vector
    )
    with pytest.raises(ValueError, match="lacks master"):
        optimizer.load_state(
            {
                name: t
                for name, t in optimizer.state().items()
                if not name.startswith("master")
            }
        )


def test_the_update_is_measured_against_the_weights():
    """Adam's first update is lr in every number: lr sqrt(6) over all six weights, the frozen
    ones left out. A part is what a name begins with.
    """
    model = Weights(value=2.0)
    optimizer = new_optimizer(model)
    model.pull(3.0)
    assert optimizer.step(0.1) == pytest.approx(
        {
            "grad_norm": 3 * math.sqrt(6),
            "update_ratio": 0.1 / 1.9,
            "grad_norm/matrix": 3 * math.sqrt(4),
            "grad_norm/vector": 3 * math.sqrt(2),
            "update_ratio/matrix": 0.1 / 1.9,
            "update_ratio/vector": 0.1 / 1.9,
        }
    )


def test_parts_of_a_model_are_its_layers_and_what_stands_beside_them():
    norms = {
        "model.embed_tokens.weight": 1.0,
        "model.layers.0.self_attn.q_proj.weight": 3.0,
        "model.layers.0.mlp.up_proj.weight": 4.0,
        "model.layers.10.mlp.up_proj.weight": 2.0,
        "lm_head.weight": 0.0,
    }
    parts = {"embed_tokens": 1.0, "layers.0": 5.0, "layers.10": 2.0, "lm_head": 0.0}
    assert by_part(norms) == parts


def test_parameters_without_a_gradient_stay():
    """A policy and a value model in one optimizer, of which one rests."""
    models = nn.ModuleDict({"policy": Weights(), "value": Weights()})
    optimizer = new_optimizer(models, weight_decay=0.5)
    models["policy"].pull()
    models["value"].pull()
    optimizer.step(0.1)
    rested = models["value"].matrix.detach().clone()
    models["policy"].pull()
    assert optimizer.step(0.1)["grad_norm"] == pytest.approx(math.sqrt(6))
    assert torch.equal(models["value"].matrix, rested) and not torch.equal(
        models["policy"].matrix, rested
    )
    steps = {
        name: float(value)
        for name, value in optimizer.state().items()
        if name.startswith("step.")
    }
    assert steps == {
        "step.policy.matrix": 2,
        "step.policy.vector": 2,
        "step.value.matrix": 1,
        "step.value.vector": 1,
    }
    assert optimizer.step(0.1)["grad_norm"] == 0.0  # and all of them may


def test_float64_is_not_rounded():
    model = Weights(torch.float64)
    optimizer = new_optimizer(model)
    model.pull(1 / 3)
    assert optimizer.step(1e-12)["grad_norm"] == pytest.approx(
        math.sqrt(6) / 3, rel=1e-14
    )
    assert float(model.matrix[0, 0].detach()) - 0.1 == pytest.approx(-1e-12, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_longer_finite_are_named(dtype):
    model = Weights(dtype)
    optimizer = new_optimizer(model)
    model.pull()
    with pytest.raises(
        FloatingPointError,
        match="weights are not finite after the update: vector has norm inf",
    ):
        optimizer.step(3e38)


def test_two_optimizers_of_one_model_do_not_share_its_gradients():
    model = Weights(torch.bfloat16)
    former, latter = new_optimizer(model), new_optimizer(model)
    model.pull()
    with pytest.raises(RuntimeError, match="another Optimizer"):
        former.step(0.1)
    assert latter.step(0.1)["grad_norm"] == pytest.approx(math.sqrt(6))


# --- moments in bfloat16 ---------------------------------------------------------------------


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    st.integers(0, 2**16 - 1),
)
@settings(deadline=None, max_examples=300)
def test_rounding_takes_a_neighbour_and_keeps_what_fits(value, noise):
    rounded = round_by_chance(
        torch.tensor([value]), torch.tensor([noise], dtype=torch.int32)
    )
    exact = torch.tensor([value]).bfloat16()
    if torch.equal(exact.float(), torch.tensor([value])):
        assert torch.equal(rounded, exact)
    down, up = (
        round_by_chance(torch.tensor([value]), torch.tensor([n], dtype=torch.int32))
        for n in (0, 2**16 - 1)
    )
    assert float(rounded) in (float(down), float(up)) and abs(float(down)) <= abs(
        value
    ) <= abs(float(up))
    assert abs(float(up)) == math.inf or float(up) - float(down) == pytest.approx(
        0, abs=abs(value) / 127
    )


@pytest.mark.parametrize("value", [1 + 1 / 1024, -3.01, 1e-20, 77.77])
def test_rounding_is_right_on_average(value):
    values = torch.full((2**16,), value)
    rounded = round_by_chance(values, torch.arange(2**16, dtype=torch.int32)).double()
    assert float(rounded.mean()) == pytest.approx(float(values[0]), rel=1e-6)
    assert len(rounded.unique()) == 2


def test_a_long_run_of_small_gradients():
    """b2 = 0.999 moves v by a thousandth at most, less than half a step of bfloat16: to the
    nearest it would be stuck at 1e-3, where the first, large gradients have left it, and the
    updates stay far too small.
    """
    models, betas = [nn.Linear(64, 64, bias=False) for _ in range(2)], (0.9, 0.999)
    optimizers = [
        Optimizer(model, 0.0, betas, EPS, math.inf, dtype)
        for model, dtype in zip(models, (torch.float32, torch.bfloat16), strict=True)
    ]
    stuck = torch.tensor(1e-3, dtype=torch.bfloat16)
    for step in range(3000):
        strength = 1.0 if step == 0 else 1e-3
        for model, optimizer in zip(models, optimizers, strict=True):
            model.weight.grad = torch.full_like(model.weight, strength)
            optimizer.step(1e-6)
        if step:
            stuck = (stuck.float() * 0.999 + 1e-3 * 1e-6).bfloat16()
    exact, rounded = (
        optimizer.state()["exp_avg_sq.weight"].float() for optimizer in optimizers
    )
    assert rounded.mean().item() == pytest.approx(exact.mean().item(), rel=0.02)
    assert float(stuck) > 10 * exact.mean().item()
    mean = [
        optimizer.state()["exp_avg.weight"].float().mean().item()
        for optimizer in optimizers
    ]
    assert mean[1] == pytest.approx(mean[0], rel=0.01)


def test_the_noise_is_a_function_of_step_and_parameter():
    def moments(steps: int) -> dict[str, torch.Tensor]:
        model = nn.ModuleDict(
            {"a": nn.Linear(32, 32, bias=False), "b": nn.Linear(32, 32, bias=False)}
        )
        optimizer = new_optimizer(model, state_dtype=torch.bfloat16)
        optimizer.load_state(
            {
                name: value * 0 + (steps - 1) * (value.dim() == 0)
                for name, value in optimizer.state().items()
            }
        )
        for part in model.values():
            part.weight.grad = torch.full((32, 32), 1 / 3)
        torch.rand(7)  # somebody else's randomness
        optimizer.step(0.0)
        return optimizer.state()

    first, again, later = moments(1), moments(1), moments(2)
    assert torch.equal(first["exp_avg.a.weight"], again["exp_avg.a.weight"])
    assert not torch.equal(first["exp_avg.a.weight"], first["exp_avg.b.weight"])
    assert not torch.equal(first["exp_avg.a.weight"], later["exp_avg.a.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_on_the_cpu(dtype):
    models = [Weights(dtype).cuda() for _ in range(2)]
    optimizers = [
        new_optimizer(models[0], 0.1),
        new_optimizer(models[1], 0.1, device="cpu"),
    ]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.pull(0.3)
            model.pull(math.sin(step))
            optimizer.step(0.01)
    assert (
        models[1].matrix.is_cuda and not optimizers[1].weights["matrix"].master.is_cuda
    )
    states = [optimizer.state() for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)
    torch.testing.assert_close(models[1].matrix, models[0].matrix)
