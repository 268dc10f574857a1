"""silu(gate) * up against float64 and the model's operations."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import compiled
from kernels.swiglu import gated, swiglu, swiglu_reference

swiglu_cpu = partial(swiglu, form="cpu")
swiglu_triton = partial(swiglu, form="triton")

pytestmark = pytest.mark.usefixtures("poisoned")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed"
)
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 1e-3,
    torch.float64: 1e-14,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gate_up(rows, width, dtype, device, seed=0):
    random = torch.Generator().manual_seed(seed)
    return (
        (3 * torch.randn(rows, 2 * width, generator=random, dtype=torch.float64))
        .to(dtype)
        .to(device)
    )


def assert_right(function, x):
    gate, up = x.double().chunk(2, dim=-1)
    expected, y = gate * torch.sigmoid(gate) * up, function(x)
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert (y.double() - expected).norm() <= TOLERANCE[x.dtype] * expected.norm()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 70) | st.sampled_from([1023, 1024, 1025, 2048, 2500]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@needs_triton
def test_any_shape(kernel_device, rows, width, dtype, seed):
    assert_right(swiglu_triton, gate_up(rows, width, dtype, kernel_device, seed))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_the_reference(dtype):
    x = gate_up(3, 50, dtype, "cpu")
    assert_right(swiglu_reference, x)


@needs_triton
def test_silu_is_rounded_before_the_product(kernel_device):
    """In float16 a product that was rounded once would differ in about a third of the
    elements.
    """
    x = gate_up(4, 1000, torch.float16, kernel_device)
    assert (swiglu_triton(x) != swiglu_reference(x)).sum() <= 20


@needs_triton
def test_extremes_and_refusals(kernel_device):
    x = torch.tensor(
        [[-1e4, 1e4, -100.0, 0.0, 1.0, 1.0, 2.0, 3.0]], device=kernel_device
    )
    assert swiglu_triton(x).tolist() == [[0.0, 1e4, pytest.approx(0.0, abs=1e-40), 0.0]]
    with pytest.raises(ValueError, match=r"expected \[M, 2 F\]"):
        swiglu_triton(x[:, 1:])
    assert swiglu_triton(x[:0]).shape == (0, 4)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 70) | st.sampled_from([352, 1023]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_cpu_form(rows, width, dtype, seed):
    x = gate_up(rows, width, dtype, "cpu", seed)
    assert_right(swiglu_cpu, x)
    assert torch.equal(swiglu(x), swiglu_cpu(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [352, 20])
def test_neither_rows_nor_threads_change_a_bit_of_the_cpu_form(dtype, width):
    """143 rows of 352 are cut between two threads in the middle of a row, if they are cut as
    PyTorch does.
    """
    x, before = gate_up(300, width, dtype, "cpu", 0), torch.get_num_threads()
    whole = swiglu_cpu(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(
            torch.equal(swiglu_cpu(x[:rows]), whole[:rows])
            for rows in (1, 2, 95, 143, 200, 299)
        )
    torch.set_num_threads(before)


def test_extremes_and_refusals_of_the_cpu_form():
    x = torch.tensor(
        [[-1e4, 1e4, -100.0, 0.0, -torch.inf, torch.nan, 1.0, 1.0, 2.0, 3.0, 1.0, 1.0]]
    )
    y = swiglu_cpu(x)[0].tolist()
    assert (
        y[:4]
        == [pytest.approx(0.0, abs=1e-30), 1e4, pytest.approx(0.0, abs=1e-30), 0.0]
        and y[5] != y[5]
    )
    with pytest.raises(ValueError, match=r"expected \[M, 2 F\]"):
        swiglu_cpu(x[:, 1:])
    assert swiglu_cpu(x[:0]).shape == (0, 6)


def gate_gradient(function, x, d_y):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, d_y)[0]


def assert_right_gradient(rows, width, dtype, seed, device="cpu", form=None):
    x = gate_up(2 * rows, width, dtype, device, seed).unflatten(0, (2, rows))
    random = torch.Generator().manual_seed(seed)
    d_y = torch.randn(2, rows, width, generator=random).to(device)
    expected = gate_gradient(swiglu_reference, x.double(), d_y.to(dtype).double())
    found = gate_gradient(partial(gated, form=form), x, d_y.to(dtype))
    assert found.dtype == dtype
    error = (found.double() - expected).norm()
    assert error <= TOLERANCE[dtype] * expected.norm()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 70),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    seed=st.integers(0, 99),
)
def test_the_gradient(rows, width, dtype, seed):
    assert_right_gradient(rows, width, dtype, seed)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 3),
    width=st.integers(1, 70) | st.sampled_from([1023, 1025]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@needs_triton
def test_the_gradient_on_a_gpu(kernel_device, rows, width, dtype, seed):
    assert_right_gradient(rows, width, dtype, seed, kernel_device, "triton")


def test_the_gradient_of_large_gates():
    x = torch.tensor([[-1e4, -200.0, -89.0, 0.0, 89.0, 1e4, *[2.0] * 6]])
    expected = gate_gradient(swiglu_reference, x.double(), torch.ones(1, 6).double())
    found = gate_gradient(gated, x, torch.ones(1, 6))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.skipif(
    not compiled.runs_compiled(torch.empty(0)), reason="there is no C++ compiler"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_kernel_with_a_gradient(dtype):
    x = gate_up(9, 33, dtype, "cpu")
    assert torch.equal(gated(x), swiglu_cpu(x))
