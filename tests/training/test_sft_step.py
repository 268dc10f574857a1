"""The SFT step: its gradient is the formula's, however the batch is cut or padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomath.models import scores
from nanomath.models.batches import Example
from nanomath.training.optimizer import Optimizer
from nanomath.training.sft_step import SFTStep, check_finite, heldout_loss

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=8)
EOS = 0  # make_batch pads with 0 as well: the eos must get its gradient all the same
EXAMPLES = [
    Example([5, 6, 7], [8, 9, EOS]),
    Example([11], [EOS]),
    Example([3] * 9, [4, 4, 1, 2, 3, 4, 5, EOS]),
    Example([20, 21], [22, 23, 24, 25, EOS]),
    Example([30, 31, 32, 33], []),
]


def brute_force(
    model, weight_of, dft: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of - sum w [sg(pi)] log pi from one plain forward pass per example."""
    model.zero_grad()
    loss = torch.zeros((), dtype=model.dtype)
    for i, example in enumerate(EXAMPLES):
        tokens = example.prompt + example.response
        logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
        for t, token in enumerate(example.response):
            picked = logprobs[len(example.prompt) + t - 1, token]
            loss = loss - weight_of(i) * picked * (picked.detach().exp() if dft else 1)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return float(loss.detach()), gradients


def weight_of(aggregation: str):
    lengths = [len(example.response) for example in EXAMPLES]
    return {
        "token": lambda i: 1 / sum(lengths),
        "sequence": lambda i: 1 / lengths[i] / len(lengths),
    }[aggregation]


def assert_same(found: dict, expected: dict, tolerance: float = 1e-10) -> None:
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("dft", [False, True])
@pytest.mark.parametrize("token_budget", [0, 1, 12, 30])
def test_gradient(new_model, recorder, aggregation, dft, token_budget):
    model = new_model(dtype=torch.float64)
    expected_loss, expected = brute_force(model, weight_of(aggregation), dft)
    optimizer = recorder(model)
    metrics = SFTStep(model, optimizer, aggregation, token_budget, dft).step(
        EXAMPLES, 0, 1e-3
    )
    assert_same(optimizer.gradients[0], expected)
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-10)
    assert metrics["tokens"] == 17 and optimizer.rates == [1e-3]


def kl_by_hand(
    model, reference, weight_of, coefficient: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """- sum w log pi + beta sum w sum_v pi(v) (log pi(v) - log pi_ref(v)), token by token; the
    mean KL, and the gradients.
    """
    model.zero_grad()
    loss = torch.zeros((), dtype=model.dtype)
    kls = []
    for i, example in enumerate(EXAMPLES):
        tokens = torch.tensor([example.prompt + example.response])
        ours, theirs = (m(tokens)[0].log_softmax(-1) for m in (model, reference))
        for t, token in enumerate(example.response):
            p, q = (x[len(example.prompt) + t - 1] for x in (ours, theirs.detach()))
            kls.append(sum(p.exp() * (p - q)))
            loss = loss + weight_of(i) * (coefficient * kls[-1] - p[token])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return float(sum(kls).detach()) / len(kls), gradients


@pytest.mark.parametrize("token_budget", [0, 1, 30])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_kl_to_the_start_is_that_of_the_whole_vocabulary(
    new_model, recorder, monkeypatch, token_budget, aggregation
):
    monkeypatch.setattr(scores, "KL_LOGITS", 3000)  # two tokens at a time
    model = new_model(dtype=torch.float64)
    reference = new_model(1, torch.float64).requires_grad_(False)
    kl, expected = kl_by_hand(model, reference, weight_of(aggregation), 0.7)
    optimizer = recorder(model)
    step = SFTStep(
        model,
        optimizer,
        aggregation,
        token_budget,
        kl_coef=0.7,
        reference=reference,
    )
    metrics = step.step(EXAMPLES, 0, 1e-3)
    assert_same(optimizer.gradients[0], expected)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-6)


def test_at_the_start_the_kl_has_no_gradient(new_model, recorder):
    model = new_model(dtype=torch.float64)
    plain, held = recorder(model), recorder(model)
    SFTStep(model, plain).step(EXAMPLES, 0, 1.0)
    metrics = SFTStep(model, held, kl_coef=9.0, reference=model).step(EXAMPLES, 0, 1.0)
    assert metrics["kl"] == 0
    assert_same(held.gradients[0], plain.gradients[0])


def test_gradient_checkpointing_changes_nothing(new_model, recorder):
    model = new_model(dtype=torch.float64)
    _, expected = brute_force(model, weight_of("token"))
    model.gradient_checkpointing = True
    optimizer = recorder(model)
    SFTStep(model, optimizer).step(EXAMPLES, 0, 1.0)
    assert_same(optimizer.gradients[0], expected)


def test_metrics_are_means_over_response_tokens(new_model, recorder):
    model = new_model(dtype=torch.float64)
    nll, _ = brute_force(model, weight_of("token"))
    for budget in (0, 1):
        metrics = SFTStep(model, recorder(model), "sequence", budget, dft=True).step(
            EXAMPLES, 0, 1.0
        )
        assert metrics["nll"] == pytest.approx(nll, rel=1e-6)
        assert (
            0 < metrics["entropy"] < torch.tensor(float(model.config.vocab_size)).log()
        )
    assert heldout_loss(model, EXAMPLES, 20) == pytest.approx(nll, rel=1e-5)


def test_the_eos_and_only_the_response_is_trained(new_model, recorder):
    """With one-token responses the loss is -log pi(eos | prompt) alone: its descent raises
    just that.
    """
    model = new_model(dtype=torch.float64)
    optimizer = recorder(model)
    examples = [Example([5, 6, 7], [EOS]), Example([9] * 6, [EOS])]
    metrics = SFTStep(model, optimizer).step(examples, 0, 1.0)
    logprobs = [
        float(model(torch.tensor([e.prompt]))[0, -1].log_softmax(-1)[EOS].detach())
        for e in examples
    ]
    assert metrics["nll"] == pytest.approx(-sum(logprobs) / 2, rel=1e-6)
    model.zero_grad()
    (
        -sum(
            model(torch.tensor([e.prompt]))[0, -1].log_softmax(-1)[EOS]
            for e in examples
        )
        / 2
    ).backward()
    assert_same(
        optimizer.gradients[0], {name: p.grad for name, p in model.named_parameters()}
    )


def test_neftune_is_seeded_by_the_step_and_off_by_default(new_model, recorder):
    model = new_model(dtype=torch.float64)

    def gradient(alpha: float, number: int, seed: int = 0) -> torch.Tensor:
        optimizer = recorder(model)
        SFTStep(model, optimizer, neftune_alpha=alpha, seed=seed).step(
            EXAMPLES, number, 1.0
        )
        return optimizer.gradients[0]["model.norm.weight"]

    assert torch.equal(gradient(5.0, 3), gradient(5.0, 3))
    different = [
        gradient(5.0, 3),
        gradient(5.0, 4),
        gradient(5.0, 3, seed=1),
        gradient(0.0, 3),
    ]
    assert all(
        not torch.allclose(a, b) for i, a in enumerate(different) for b in different[:i]
    )


@pytest.mark.parametrize("layout", [{"token_budget": 12}, {"token_budget": 40}])
def test_neftune_noise_does_not_depend_on_the_cut(new_model, recorder, layout):
    model = new_model(dtype=torch.float64)
    whole, cut = recorder(model), recorder(model)
    SFTStep(model, whole, neftune_alpha=5.0).step(EXAMPLES, 0, 1.0)
    SFTStep(model, cut, neftune_alpha=5.0, **layout).step(EXAMPLES, 0, 1.0)
    assert_same(cut.gradients[0], whole.gradients[0])


@given(
    examples=st.lists(
        st.tuples(TOKENS, st.lists(st.integers(0, 50), max_size=8)),
        min_size=1,
        max_size=6,
    ),
    order=st.randoms(use_true_random=False),
    token_budget=st.integers(0, 40),
    aggregation=st.sampled_from(["token", "sequence"]),
    dft=st.booleans(),
)
@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_gradient_depends_on_no_layout_and_no_order(
    new_model, recorder, examples, order, token_budget, aggregation, dft
):
    plain = [Example(prompt, response) for prompt, response in examples]
    shuffled = order.sample(plain, len(plain))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = new_model(dtype=dtype, vocab_size=51, num_layers=1)
        whole, cut = recorder(model), recorder(model)
        first = SFTStep(model, whole, aggregation, dft=dft).step(plain, 0, 1.0)
        second = SFTStep(model, cut, aggregation, token_budget, dft).step(
            shuffled, 0, 1.0
        )
        assert_same(cut.gradients[0], whole.gradients[0], tolerance)
        assert second == pytest.approx(first, rel=tolerance, abs=tolerance)


def test_a_number_that_is_none_is_named_with_its_example(new_model):
    model = new_model()
    optimizer = Optimizer(model, 0.0, (0.9, 0.99), 1e-8, 1.0)
    with torch.no_grad():
        # Tied: every logprob of the vocabulary is then NaN as well
        model.model.embed_tokens.weight[24] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        FloatingPointError, match="the nll of example 1 of 5 in the batch is nan"
    ):
        SFTStep(model, optimizer, token_budget=12).step(EXAMPLES, 0, 1.0)
    with pytest.raises(
        FloatingPointError, match="the nll of example 1 of 5 in the batch is nan"
    ):
        heldout_loss(model, EXAMPLES, 12)
    assert all(
        torch.equal(p.nan_to_num(), before[name].nan_to_num())
        for name, p in model.named_parameters()
    )
    untied = new_model(tie_embeddings=False)
    with torch.no_grad():
        untied.model.embed_tokens.weight[24] = float("inf")
    with pytest.raises(
        FloatingPointError, match="the nll of example 4 of 5 in the batch is nan"
    ):
        SFTStep(untied, optimizer, token_budget=12).step(EXAMPLES, 0, 1.0)


def test_finite_sums_pass():
    check_finite(
        nll=torch.tensor([0.0, 1e300], dtype=torch.float64), entropy=torch.ones(2)
    )
    with pytest.raises(
        FloatingPointError, match="the entropy of example 2 of 2 in the batch is -inf"
    ):
        check_finite(nll=torch.zeros(2), entropy=torch.tensor([1.0, -float("inf")]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_by_heart(new_model, dtype):
    model = new_model(dtype=dtype)
    optimizer = Optimizer(model, 0.0, (0.9, 0.99), 1e-8, 1.0)
    step = SFTStep(model, optimizer, token_budget=20)
    nll = [step.step(EXAMPLES, number, 1e-2)["nll"] for number in range(25)]
    assert nll[-1] < 0.2 < 1 < nll[0]
