"""The residual sum and its norm, against float64 and the model's RMSNorm."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import compiled
from kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
)
from nanomath.models.transformer import RMSNorm

add_rms_norm_cpu = partial(add_rms_norm, form="cpu")
add_rms_norm_triton = partial(add_rms_norm, form="triton")

pytestmark = pytest.mark.usefixtures("poisoned")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed"
)
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 1e-3,
    torch.float64: 1e-14,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-2  # one that shows


def inputs(rows, dim, dtype, device, seed=0):
    """x, delta and a weight; rows of very different sizes."""
    random = torch.Generator().manual_seed(seed)
    x, delta = (
        torch.randn(2, rows, dim, generator=random, dtype=torch.float64)
        * 10.0 ** torch.arange(-2, rows - 2)[:, None]
    )
    weight = 1 + torch.randn(dim, generator=random, dtype=torch.float64) / 2
    return [tensor.to(dtype).to(device) for tensor in (x, delta, weight)]


def assert_right(function, x, delta, weight):
    residual, y = function(x, delta, weight, EPS)
    total = (
        x.double()
        if delta is None
        else (x.double() + delta.double()).to(x.dtype).double()
    )
    expected = (
        weight.double() * total / (total.square().mean(-1, keepdim=True) + EPS).sqrt()
    )
    tolerance = TOLERANCE[x.dtype]
    assert residual.dtype == y.dtype == x.dtype
    assert (
        (residual.double() - total).norm(dim=1) <= tolerance * total.norm(dim=1)
    ).all()
    assert (
        (y.double() - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)
    ).all()


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 4),
    dim=st.integers(1, 70) | st.sampled_from([128, 896, 1000, 1024, 4097]),
    dtype=st.sampled_from(DTYPES),
    with_delta=st.booleans(),
    seed=st.integers(0, 99),
)
@needs_triton
def test_any_shape(kernel_device, rows, dim, dtype, with_delta, seed):
    x, delta, weight = inputs(rows, dim, dtype, kernel_device, seed)
    assert_right(add_rms_norm_triton, x, delta if with_delta else None, weight)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("with_delta", [False, True])
def test_the_reference(dtype, with_delta):
    x, delta, weight = inputs(3, 100, dtype, "cpu")
    delta = delta if with_delta else None
    assert_right(add_rms_norm_reference, x, delta, weight)
    norm = RMSNorm(100, EPS).to(dtype)
    norm.weight.data = weight
    residual, y = add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(y, norm(residual))
    assert torch.equal(residual, x if delta is None else x + delta)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 4),
    dim=st.integers(1, 70) | st.sampled_from([128, 576, 1000, 4097]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_delta=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_cpu_form(rows, dim, dtype, with_delta, seed):
    x, delta, weight = inputs(rows, dim, dtype, "cpu", seed)
    delta = delta if with_delta else None
    assert_right(add_rms_norm_cpu, x, delta, weight)
    residual, y = add_rms_norm_cpu(x, delta, weight, EPS)
    assert torch.equal(residual, add_rms_norm_reference(x, delta, weight, EPS)[0])
    for m in range(rows):
        alone = add_rms_norm_cpu(
            x[m : m + 1], None if delta is None else delta[m : m + 1], weight, EPS
        )
        assert torch.equal(alone[0][0], residual[m]) and torch.equal(alone[1][0], y[m])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit_of_the_cpu_form(dtype):
    random, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, delta = torch.randn(2, 401, 100, generator=random).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(add_rms_norm_cpu(x, delta, x[0], EPS))
    torch.set_num_threads(before)
    assert all(
        torch.equal(a, b)
        for found in results
        for a, b in zip(found, results[0], strict=True)
    )


def test_what_the_cpu_form_refuses():
    x, delta, weight = inputs(2, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"expected \[M, D\]"):
        add_rms_norm_cpu(x, delta[:, :4], weight, EPS)
    assert add_rms_norm_cpu(x[:0], delta[:0], weight, EPS)[1].shape == (0, 8)


@needs_triton
def test_the_rounded_sum_is_normalised_and_the_quotient_rounded_before_the_weight(
    kernel_device,
):
    """Integer arithmetic in float16, where every rounding can be predicted."""
    x = torch.tensor([[2048.0, -2048.0]], dtype=torch.float16, device=kernel_device)
    # 2049 rounds to 2048
    delta = torch.tensor([[1.0, 1.0]], dtype=torch.float16, device=kernel_device)
    weight = torch.tensor(
        [1001 / 1024, 1001 / 1024], dtype=torch.float16, device=kernel_device
    )
    residual, y = add_rms_norm_triton(x, delta, weight, 0.0)
    assert residual.tolist() == [[2048, -2047]]
    quotient = (
        torch.tensor([2048.0, -2047.0]) / (2048**2 / 2 + 2047**2 / 2) ** 0.5
    ).half()
    assert torch.equal(y.cpu()[0], quotient * weight.cpu())


@needs_triton
def test_bits_of_the_model_and_of_every_batch(kernel_device):
    """In float16 few of the quotients lie so near a rounding boundary that the order of the
    mean's sum decides.
    """
    x, delta, weight = inputs(4, 300, torch.float16, kernel_device)
    residual, y = add_rms_norm_triton(x, delta, weight, EPS)
    expected_residual, expected = add_rms_norm_reference(x, delta, weight, EPS)
    assert torch.equal(residual, expected_residual)
    assert (y != expected).sum() <= 6
    for m in range(4):
        alone = add_rms_norm_triton(x[m : m + 1], delta[m : m + 1], weight, EPS)
        assert torch.equal(alone[0][0], residual[m]) and torch.equal(alone[1][0], y[m])


@needs_triton
def test_inputs_are_left_alone_and_refused_when_they_do_not_fit(kernel_device):
    x, delta, weight = inputs(2, 8, torch.float32, kernel_device)
    before = x.clone()
    residual, _ = add_rms_norm_triton(x, delta, weight, EPS)
    assert torch.equal(x, before) and residual.data_ptr() != x.data_ptr()
    assert add_rms_norm_triton(x, None, weight, EPS)[0].data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match=r"expected \[M, D\]"):
        add_rms_norm_triton(x, delta[:, :4], weight, EPS)
    with pytest.raises(ValueError, match=r"expected \[M, D\]"):
        add_rms_norm_triton(x, None, weight[:4], EPS)
    assert add_rms_norm_triton(x[:0], delta[:0], weight, EPS)[1].shape == (0, 8)


def norm_gradients(function, x, weight, d_y):
    given = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    return torch.autograd.grad(function(*given), given, d_y)


def assert_right_gradients(rows, dim, dtype, seed, device="cpu", form=None):
    random = torch.Generator().manual_seed(seed)
    x, d_y = torch.randn(2, 2, rows, dim, generator=random, dtype=torch.float64)
    weight = 1 + torch.randn(dim, generator=random, dtype=torch.float64) / 2
    given = [tensor.to(dtype).to(device) for tensor in (3 * x, weight, d_y)]
    expected = norm_gradients(
        lambda x, weight: add_rms_norm_reference(x, None, weight, EPS)[1],
        *(tensor.double() for tensor in given),
    )
    found = norm_gradients(lambda *pair: rms_norm(*pair, EPS, form), *given)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        size = float(other.norm()) + other.numel() ** 0.5
        assert float((one.double() - other).norm()) <= 2 * TOLERANCE[dtype] * size


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 64, 65, 200]),
    dim=st.integers(1, 70) | st.sampled_from([128, 896, 1000]),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    seed=st.integers(0, 99),
)
def test_the_gradient(rows, dim, dtype, seed):
    assert_right_gradients(rows, dim, dtype, seed)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 8, 9, 20]),
    dim=st.integers(1, 70) | st.sampled_from([128, 896, 1000]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@needs_triton
def test_the_gradient_on_a_gpu(kernel_device, rows, dim, dtype, seed):
    assert_right_gradients(rows, dim, dtype, seed, kernel_device, "triton")


@pytest.mark.skipif(
    not compiled.runs_compiled(torch.empty(0)), reason="there is no C++ compiler"
)
def test_threads_change_no_bit_of_the_gradient():
    x, d_y, weight = inputs(5, 40, torch.float32, "cpu")
    x, d_y = (tensor.repeat(400, 1) for tensor in (x, d_y))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(norm_gradients(lambda *pair: rms_norm(*pair, EPS), x, weight, d_y))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
