"""The step of a process reward model: its gradient is the formula's, however the batch is cut."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from nanomath.process.formats import FORMATS
from nanomath.process.prm import new_prm
from nanomath.training.optimizer import Optimizer
from nanomath.training.prm_step import PRMStep, balancing_weights


def labelled(question: str, *steps: tuple[str, float | None]) -> SimpleNamespace:
    return SimpleNamespace(
        question=question,
        steps=[step for step, _ in steps],
        labels=[label for _, label in steps],
    )


SOLUTIONS = [
    labelled("1 + 1?", ("1 + 1 = 2", 1.0), ("so it is 3", 0.0), ("or 4", None)),
    labelled("How many apples does Mia have now?", ("12 + 8 = 20.", 0.25)),
    labelled("q", ("a", None)),
    labelled("q", ("b", 1.0), ("c", 1.0), ("d", 0.0)),
]


@pytest.fixture
def build(new_model, tokenizer):
    """build(dtype, format): a PRM whose head says something."""

    def make(dtype: torch.dtype = torch.float64, name: str = "token_classification"):
        prm = new_prm(new_model(1, dtype), tokenizer, FORMATS[name]())
        if hasattr(prm.model, "score"):
            with torch.no_grad():
                prm.model.score.weight.normal_(
                    generator=torch.Generator().manual_seed(2)
                )
        return prm

    return make


def brute_force(
    prm, weights: tuple[float, float]
) -> tuple[float, dict[str, torch.Tensor]]:
    prm.model.zero_grad()
    total, loss = 0.0, torch.zeros((), dtype=torch.float64)
    for s in SOLUTIONS:
        tokens, places = prm.format.lay_out(prm.tokenizer, s.question, s.steps)
        states = prm.model.hidden(torch.tensor([tokens]))[0]
        for place, y in zip(places, s.labels, strict=True):
            if y is not None:
                p = (
                    prm.format.logits(prm.model, prm.tokenizer, states[[place]])[0]
                    .double()
                    .softmax(0)
                )
                weight = y * weights[1] + (1 - y) * weights[0]
                loss = loss - weight * (y * p[1].log() + (1 - y) * p[0].log())
                total += weight
    (loss / total).backward()
    gradients = {name: p.grad.clone() for name, p in prm.model.named_parameters()}
    prm.model.zero_grad()
    return float((loss / total).detach()), gradients


@pytest.mark.parametrize("name", ["token_classification", "math_shepherd"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("budget", [0, 1, 60])
def test_the_gradient_is_the_formulas(build, recorder, name, weights, budget):
    prm = build(name=name)
    loss, gradients = brute_force(prm, weights)
    optimizer = recorder(prm.model)
    metrics = PRMStep(prm, optimizer, weights, token_budget=budget).step(
        SOLUTIONS, 0, 0.1
    )
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
    assert (
        metrics["label"] == pytest.approx(3.25 / 6)
        and metrics["steps"] == 6
        and 0 < metrics["score"] < 1
    )
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            optimizer.gradients[0][key], gradient, rtol=1e-5, atol=1e-7
        )


def test_it_learns_what_it_is_told(build):
    prm = build(torch.float32)
    optimizer = Optimizer(prm.model, 0.0, (0.9, 0.95), 1e-8, 1.0)
    step = PRMStep(prm, optimizer)
    for number in range(40):
        metrics = step.step(SOLUTIONS, number, 3e-3)
    # Of the soft label: no score can do better
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 6
    assert entropy < metrics["loss"] < entropy + 0.1
    ((score,),) = prm([(SOLUTIONS[1].question, SOLUTIONS[1].steps)])
    assert score == pytest.approx(0.25, abs=0.15)


def test_the_head_learns_first(build):
    prm = build(torch.float32)
    step = PRMStep(prm, Optimizer(prm.model, 0.0, (0.9, 0.95), 1e-8, 1.0), head_steps=2)
    for number in range(3):
        before = copy.deepcopy(prm.model.state_dict())
        step.step(SOLUTIONS, number, 1e-2)
        moved = {
            name
            for name, value in prm.model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert moved == {"score.weight", "score.bias"} if number < 2 else len(moved) > 2


def test_both_kinds_of_steps_count_for_as_much():
    wrong, right = balancing_weights(SOLUTIONS)
    labels = [y for s in SOLUTIONS for y in s.labels if y is not None]
    assert (
        sum(y * right for y in labels)
        == pytest.approx(sum((1 - y) * wrong for y in labels))
        == pytest.approx(3)
    )
    with pytest.raises(
        ValueError, match="all 2 labels are right: there is nothing to tell apart"
    ):
        balancing_weights([labelled("q", ("a", 1.0), ("b", 1.0), ("c", None))])
    with pytest.raises(ValueError, match="all 1 labels are wrong"):
        balancing_weights([labelled("q", ("a", 0.0))])


def test_a_batch_without_labels(build, recorder):
    prm = build()
    with pytest.raises(ValueError, match="none of the 1 steps of a batch has a label"):
        PRMStep(prm, recorder(prm.model)).step(SOLUTIONS[2:3], 0, 0.1)
