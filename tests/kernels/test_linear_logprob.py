"""linear_logprob against log_softmax of all the logits: values, gradients, and what it holds
and computes.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import kernels.linear_logprob as linear_logprob_module
from kernels.linear_logprob import CHUNK_LOGITS, linear_logprob, linear_logprob_triton


def materialised(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return logprobs.gather(-1, target[:, None])[:, 0], entropy


def problem(
    seed: int, n: int, dim: int, vocabulary: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """hidden, weight, target and the upstream gradient, every third of which is 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (
        torch.randn(n, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    weight = (
        torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    target = torch.randint(vocabulary, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator, dtype=torch.float64)
    return hidden, weight, target, upstream * (torch.arange(n) % 3 > 0)


def gradients(
    logprobs: Tensor, upstream: Tensor, *inputs: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad((logprobs * upstream).sum(), inputs)


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, in numbers."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
        ]
        self.largest = max(self.largest, *sizes, 0)
        return result


# --- values and gradients --------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 999),
    n=st.integers(0, 12),
    dim=st.integers(1, 6),
    vocabulary=st.integers(1, 20),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    chunk=st.integers(0, 14),
)
def test_it_is_the_log_softmax(seed, n, dim, vocabulary, temperature, chunk):
    hidden, weight, target, upstream = problem(seed, n, dim, vocabulary)
    found, entropy = linear_logprob(hidden, weight, target, temperature, chunk)
    expected, expected_entropy = materialised(hidden, weight, target, temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-10)
    for mine, plain in zip(
        gradients(found, upstream, hidden, weight),
        gradients(expected, upstream, hidden, weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [0, 7])
def test_logits_too_large_for_exp(chunk):
    hidden, weight, target, upstream = problem(0, 20, 4, 30)
    with torch.no_grad():
        hidden *= 1000
    found, entropy = linear_logprob(hidden, weight, target, chunk=chunk)
    expected, _ = materialised(hidden, weight, target, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
    assert entropy.isfinite().all()
    for mine, plain in zip(
        gradients(found, upstream, hidden, weight),
        gradients(expected, upstream, hidden, weight),
        strict=True,
    ):
        # The gradient is of the order of 1000
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype):
    """As near to the exact numbers of the rounded inputs as the materialised path is, and in
    the same dtypes.
    """
    hidden, weight, target, upstream = problem(1, 200, 48, 1000, dtype)
    exact_inputs = [
        tensor.detach().double().requires_grad_() for tensor in (hidden, weight)
    ]
    exact = materialised(*exact_inputs, target, 0.7)
    exact = (exact[0].detach(), exact[1], *gradients(exact[0], upstream, *exact_inputs))
    errors = []
    for logprobs, entropy in (
        linear_logprob(hidden, weight, target, 0.7, 64),
        materialised(hidden, weight, target, 0.7),
    ):
        assert logprobs.dtype == entropy.dtype == torch.float32
        found = (
            logprobs.detach(),
            entropy,
            *gradients(logprobs, upstream, hidden, weight),
        )
        assert found[2].dtype == found[3].dtype == dtype
        errors.append(
            [
                float((f - e).norm() / e.norm())
                for f, e in zip(found, exact, strict=True)
            ]
        )
    assert all(mine < 2 * plain for mine, plain in zip(*errors, strict=True)), errors


def test_bfloat16_logprobs_are_those_of_the_logits_that_sampling_sees():
    hidden, weight, target, _ = problem(2, 50, 32, 300, torch.bfloat16)
    # A rounding of the logits apart would be 1e-2
    expected, _ = materialised(hidden, weight, target, 1.0)
    torch.testing.assert_close(
        linear_logprob(hidden, weight, target)[0], expected, rtol=0, atol=2e-6
    )


def test_bfloat16_chunks_are_summed_in_float32():
    """1024 equal contributions; a sum in bfloat16 stops growing at 256 of them."""
    hidden, weight, target, _ = problem(3, 1, 8, 20, torch.bfloat16)
    logprobs, _ = linear_logprob(
        hidden.expand(1024, 8), weight, target.expand(1024), chunk=1
    )
    (total,) = gradients(logprobs, torch.ones(1024), weight)
    (one,) = gradients(linear_logprob(hidden, weight, target)[0], torch.ones(1), weight)
    torch.testing.assert_close(total.float(), 1024 * one.float(), rtol=1e-2, atol=0)


# --- what is differentiated ------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_the_two_is_frozen(wanted):
    *inputs, target, upstream = problem(4, 9, 5, 17)
    (expected,) = gradients(
        materialised(*inputs, target, 1.0)[0], upstream, inputs[wanted]
    )
    inputs[1 - wanted].requires_grad_(False)
    (found,) = gradients(
        linear_logprob(*inputs, target, chunk=4)[0], upstream, inputs[wanted]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_weight_that_is_the_embedding_as_well():
    _, weight, target, upstream = problem(5, 9, 5, 17)
    tokens = target.flip(0)
    (expected,) = gradients(
        materialised(weight[tokens].tanh(), weight, target, 1.0)[0], upstream, weight
    )
    (found,) = gradients(
        linear_logprob(weight[tokens].tanh(), weight, target, chunk=4)[0],
        upstream,
        weight,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_entropy_has_no_gradient():
    hidden, weight, target, _ = problem(6, 9, 5, 17)
    logprobs, entropy = linear_logprob(hidden, weight, target)
    assert logprobs.requires_grad and not entropy.requires_grad
    with torch.no_grad():
        assert not linear_logprob(hidden, weight, target)[0].requires_grad


# --- what it costs ---------------------------------------------------------------------------


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    n, dim, vocabulary, chunk = 64, 4, 512, 8
    hidden, weight, target, upstream = problem(7, n, dim, vocabulary)
    with Sizes() as sizes:
        gradients(
            linear_logprob(hidden, weight, target, 0.9, chunk)[0],
            upstream,
            hidden,
            weight,
        )
    assert sizes.largest == chunk * vocabulary


def test_the_default_chunk_keeps_to_its_size():
    vocabulary = 200_000
    hidden, weight, target, _ = problem(8, 300, 1, vocabulary, torch.float32)
    with Sizes() as sizes, torch.no_grad():
        linear_logprob(hidden, weight, target)
    assert CHUNK_LOGITS / 2 < sizes.largest <= CHUNK_LOGITS


@pytest.mark.parametrize(
    ("chunk", "numbers"),
    [(8, 64), (0, 64 * 500 + 64)],
    ids=["chunks", "a single chunk"],
)
def test_it_keeps_one_number_a_token(chunk, numbers):
    hidden, weight, target, _ = problem(9, 64, 4, 500)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor), lambda _: None
    ):
        linear_logprob(hidden, weight, target, chunk=chunk)
        inputs = {tensor.data_ptr() for tensor in (hidden, weight, target)}
        assert (
            sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in inputs)
            == numbers
        )
        kept.clear()
        with torch.no_grad():
            linear_logprob(hidden, weight, target, chunk=chunk)
        assert kept == []


@pytest.mark.parametrize(
    ("chunk", "products"), [(8, 2), (0, 1)], ids=["the logits again and dz W", "dz W"]
)
def test_tokens_without_gradient_cost_no_product(chunk, products):
    n, dim, vocabulary = 64, 4, 500
    hidden, weight, target, _ = problem(10, n, dim, vocabulary)
    weight.requires_grad_(False)
    logprobs, _ = linear_logprob(hidden, weight, target, chunk=chunk)
    upstream = torch.zeros(n, dtype=torch.float64)
    upstream[[3, 40, 41]] = 1.0
    with FlopCounterMode(display=False) as counter:
        gradients(logprobs, upstream, hidden)
    assert counter.get_total_flops() == products * 2 * 3 * vocabulary * dim


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    """The kept softmax becomes the gradient of the logits in place."""
    hidden, weight, target, _ = problem(11, 9, 5, 17)
    logprobs, _ = linear_logprob(hidden, weight, target)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


# --- mistakes --------------------------------------------------------------------------------


def test_shapes_and_temperatures_that_make_no_sense():
    hidden, weight, target, _ = problem(12, 5, 3, 7)
    for wrong in (
        (hidden[:4], weight, target),
        (hidden, weight[:, :2], target),
        (hidden, weight, target[:, None]),
    ):
        with pytest.raises(ValueError, match=r"expected \[n, D\], \[V, D\], \[n\]"):
            linear_logprob(*wrong)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            linear_logprob(hidden, weight, target, temperature)


# --- Triton ----------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed"
)
# The interpreter, about padding
quiet = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")


@quiet
@needs_triton
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize(
    ("n", "dim", "vocabulary", "chunk"),
    [(1, 1, 1, 0), (5, 40, 300, 2), (200, 33, 290, 130)],
)
def test_the_triton_form(
    kernel_device, poisoned, dtype, tolerance, n, dim, vocabulary, chunk
):
    """Logprobs and entropies to float32; gradients to the rounding of dz and of the result, in
    every chunk.
    """
    hidden, weight, target, upstream = problem(13, n, dim, vocabulary, dtype)
    if n > 1:
        target[:2] = torch.tensor([0, vocabulary - 1])
    exact_inputs = [
        tensor.detach().double().requires_grad_() for tensor in (hidden, weight)
    ]
    exact = linear_logprob(*exact_inputs, target, 0.7)
    inputs = [
        tensor.detach().to(kernel_device).requires_grad_()
        for tensor in (hidden, weight)
    ]
    found = linear_logprob_triton(*inputs, target.to(kernel_device), 0.7, chunk)
    for mine, plain in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine.cpu() - plain).detach().norm()) <= 1e-5 * max(
            1, float(plain.detach().norm())
        )
    mine = gradients(found[0], upstream.to(kernel_device), *inputs)
    for a, b in zip(mine, gradients(exact[0], upstream, *exact_inputs), strict=True):
        assert a.dtype == dtype and float(
            (a.cpu().double() - b).norm()
        ) <= tolerance * float(b.norm())


@quiet
@needs_triton
@pytest.mark.parametrize("wanted", [0, 1])
def test_the_triton_form_with_one_of_the_two_frozen(kernel_device, wanted):
    *inputs, target, upstream = problem(14, 9, 5, 17, torch.float32)
    (expected,) = gradients(
        linear_logprob(*inputs, target)[0], upstream, inputs[wanted]
    )
    inputs = [tensor.detach().to(kernel_device) for tensor in inputs]
    inputs[wanted].requires_grad_()
    found, entropy = linear_logprob_triton(*inputs, target.to(kernel_device), chunk=4)
    (mine,) = gradients(found, upstream.to(kernel_device), inputs[wanted])
    torch.testing.assert_close(mine.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad


@quiet
@needs_triton
def test_the_triton_form_spends_nothing_on_tokens_without_gradient(
    kernel_device, monkeypatch
):
    computed = []
    kernel = linear_logprob_module._logit_gradients
    monkeypatch.setattr(
        linear_logprob_module,
        "_logit_gradients",
        lambda h, *rest: (computed.append(len(h)), kernel(h, *rest)),
    )
    hidden, weight, target, _ = problem(15, 20, 4, 50, torch.float32)
    inputs = [
        tensor.detach().to(kernel_device).requires_grad_()
        for tensor in (hidden, weight)
    ]
    for wanted in ([], [3, 7, 19]):
        upstream = torch.zeros(20, device=kernel_device)
        upstream[wanted] = 1.0
        logprobs, _ = linear_logprob_triton(*inputs, target.to(kernel_device), chunk=2)
        d_hidden, d_weight = gradients(logprobs, upstream, *inputs)
        assert d_hidden.any(1).nonzero()[:, 0].tolist() == wanted and bool(
            d_weight.any()
        ) == bool(wanted)
    assert computed == [2, 1] or computed == [0, 2, 1]
