"""The product with independent rows: right, differentiable, and a row's bits whatever the
number of rows.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear
from kernels.linear import invariant_linear, invariant_linear_triton

pytestmark = pytest.mark.usefixtures("poisoned")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed"
)
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
    torch.float64: 1e-14,
}


def inputs(rows, dim, features, dtype, device, seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = ((rows, dim), (features, dim), (features,))
    return [
        torch.randn(s, generator=random, dtype=torch.float64).to(dtype).to(device)
        for s in shapes
    ]


def assert_right(y, x, weight, bias):
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == expected.shape
    # Of the terms: their sum may cancel
    size = x.double().norm(dim=-1, keepdim=True) * weight.double().norm(dim=-1) + 1
    assert (
        (y.double() - expected).abs()
        <= TOLERANCE[x.dtype] * torch.maximum(size, expected.abs())
    ).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 63, 64, 65, 130]),
    dim=st.integers(1, 200),
    features=st.sampled_from([1, 16, 63, 65, 130, 200]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@needs_triton
def test_any_shape(kernel_device, rows, dim, features, dtype, with_bias, seed):
    x, weight, bias = inputs(rows, dim, features, dtype, kernel_device, seed)
    bias = bias if with_bias else None
    assert_right(invariant_linear_triton(x, weight, bias), x, weight, bias)


@needs_triton
def test_a_wide_weight_and_more_row_tiles_than_a_group(kernel_device, monkeypatch):
    monkeypatch.setattr(linear, "GROUP", 2)
    for rows, features in ((321, 130), (300, 8200)):
        x, weight, bias = inputs(rows, 24, features, torch.float16, kernel_device)
        assert_right(invariant_linear_triton(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 64, 65, 200])
def test_on_the_cpu(dtype, rows):
    x, weight, bias = inputs(rows, 40, 30, dtype, "cpu")
    assert_right(invariant_linear(x, weight, bias), x, weight, bias)
    assert_right(invariant_linear(x, weight), x, weight, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [70, 8192])
def test_a_row_has_the_same_bits_in_every_batch(kernel_device, dtype, features):
    """Through the public function: on a GPU the Triton form, on a CPU its library."""
    x, weight, bias = inputs(150, 96, features, dtype, kernel_device)
    together = invariant_linear(x, weight, bias)
    for part in (slice(0, 1), slice(63, 66), slice(140, 150), slice(1, 150)):
        assert torch.equal(invariant_linear(x[part], weight, bias), together[part])
    assert torch.equal(
        invariant_linear(x.reshape(3, 50, 96), weight, bias).flatten(0, 1), together
    )


@needs_triton
def test_a_row_has_the_same_bits_in_every_batch_interpreted(kernel_device):
    x, weight, bias = inputs(150, 96, 70, torch.float16, kernel_device)
    together = invariant_linear_triton(x, weight, bias)
    for part in (slice(0, 1), slice(63, 66), slice(140, 150)):
        assert torch.equal(
            invariant_linear_triton(x[part], weight, bias), together[part]
        )


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients(with_bias):
    x, weight, bias = (
        t.requires_grad_() for t in inputs(5, 7, 6, torch.float64, "cpu")
    )
    x = x.detach().reshape(5, 1, 7).requires_grad_()
    arguments = (x, weight, bias) if with_bias else (x, weight)
    assert torch.autograd.gradcheck(invariant_linear, arguments)
    frozen = invariant_linear(x, weight.detach(), bias.detach())
    torch.testing.assert_close(
        torch.autograd.grad(frozen.sum(), x)[0], weight.detach().sum(0).expand(5, 1, 7)
    )


@needs_triton
def test_what_is_refused(kernel_device):
    x, weight, bias = inputs(2, 8, 6, torch.float32, kernel_device)
    for bad in (
        (x[:, :4], weight, bias),
        (x, weight.half(), bias),
        (x, weight, bias[:3]),
    ):
        with pytest.raises(ValueError, match=r"expected \[M, D\] and \[N, D\]"):
            invariant_linear_triton(*bad)
    assert invariant_linear_triton(x[:0], weight, bias).shape == (0, 6)
