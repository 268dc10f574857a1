"""The products of training by kernels/cpu.cpp are those of PyTorch, and are chosen where its
library is slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import compiled, products
from kernels.linear_logprob import linear_logprob, linear_logprob_reference
from kernels.packed import packed_rows
from kernels.products import DEEP, add_outer, linear, times, times_transposed

CLOSE = 3e-6  # of the sum of the terms' sizes

sizes = {
    "rows": st.sampled_from([0, 1, 7, 130, DEEP, DEEP + 1, 2 * DEEP + 33]),
    "features": st.integers(1, 70),
    "dim": st.integers(1, 70),
    "seed": st.integers(0, 99),
}


@pytest.fixture(autouse=True, params=[True, False], ids=["ours", "library's"])
def ours(request, monkeypatch) -> bool:
    if request.param and not compiled.runs_compiled(torch.empty(0)):
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(products, "library_is_slow", lambda: request.param)
    return request.param


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_product(found: Tensor, left: Tensor, right: Tensor) -> None:
    """It is left @ right, but for rounding."""
    size = left.double().abs() @ right.double().abs()
    error = (found.double() - left.double() @ right.double()).abs()
    assert found.dtype == torch.float32 and (error <= CLOSE * size).all()


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_each_product(rows, features, dim, seed):
    x, y, weight = draw(seed, (rows, dim), (rows, features), (features, dim))
    assert_product(linear(x, weight), x, weight.T)
    out = torch.empty(rows, features)
    assert times_transposed(weight)(x, out).data_ptr() == out.data_ptr()
    assert_product(out, x, weight.T)
    assert_product(times(weight)(y), y, weight)
    total = torch.zeros(features, dim)
    add_outer(total, y, x)
    assert_product(total, y.T, x)
    add_outer(total, y, x)
    assert_product(total / 2, y.T, x)


@settings(max_examples=40, deadline=None)
@given(**sizes, biased=st.booleans(), transposed=st.booleans())
def test_the_gradients_of_a_layer(rows, features, dim, seed, biased, transposed):
    x, gradient, weight, bias = draw(
        seed, (dim, rows, 1), (rows, 1, features), (features, dim), (features,)
    )
    x = x.permute(1, 2, 0) if transposed else x.permute(1, 2, 0).contiguous()
    inputs = [x, weight, bias] if biased else [x, weight]
    for each in inputs:
        each.requires_grad_()
    y = linear(*inputs)
    assert y.shape == (rows, 1, features)
    flat = x.detach()[:, 0], gradient[:, 0]
    d_x, d_weight, *d_bias = torch.autograd.grad(y, inputs, gradient)
    assert_product(d_x[:, 0], flat[1], weight.detach())
    assert_product(d_weight, flat[1].T, flat[0])
    torch.testing.assert_close(y, torch.nn.functional.linear(*inputs))
    if biased:
        torch.testing.assert_close(d_bias[0], gradient.sum((0, 1)))


def test_a_frozen_weight_has_no_gradient():
    x, weight = draw(0, (5, 8), (6, 8))
    linear(x.requires_grad_(), weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 8))
    assert weight.grad is None


def test_other_types_are_the_librarys():
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = (each.to(dtype) for each in draw(0, (5, 8), (6, 8)))
        assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
        assert torch.equal(times(weight.mT)(x), x @ weight.mT)


def test_ours_are_those_of_the_sampler(ours):
    """Bit for bit, so that what trainer and sampler differ by is attention alone."""
    before = torch.get_num_threads()
    for rows, features in (300, 48), (48, 300):
        x, weight = draw(0, (rows, 64), (features, 64))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made = linear(x, weight)
            torch.set_num_threads(before)
            assert not ours or torch.equal(made, packed_rows(x, weight))


@pytest.mark.parametrize("chunk", [0, 64])
def test_the_logprobs_of_tokens(chunk):
    hidden, weight, gradient = draw(0, (150, 32), (200, 32), (150,))
    target = torch.arange(150)
    found = []
    for function, more in (
        (linear_logprob, {"chunk": chunk}),
        (linear_logprob_reference, {}),
    ):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logprobs, entropy = function(*inputs, target, 0.7, **more)
        found.append(
            [logprobs, entropy, *torch.autograd.grad(logprobs, inputs, gradient)]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("maker", "capability", "slow"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_where_the_library_is_slow(monkeypatch, ours, maker, capability, slow):
    if not ours:
        return
    monkeypatch.undo()
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(compiled, "runs_compiled", lambda tensor: True)
    products.library_is_slow.cache_clear()
    try:
        assert products.library_is_slow() is slow
    finally:
        products.library_is_slow.cache_clear()


@pytest.mark.parametrize("dim", [2047, 2048, 2049, 6000])
def test_a_sum_in_parts_is_whole(dim):
    """cpu.cpp adds up 2,048 numbers, then the sums; the bias counts once."""
    x, weight, bias = draw(0, (5, dim), (33, dim), (33,))
    assert_product(linear(x, weight, bias) - bias, x, weight.T)
    total = torch.ones(33, 17)
    others = draw(1, (dim, 33), (dim, 17))
    add_outer(total, *others)
    assert_product(total - 1, others[0].T, others[1])


def test_a_sum_over_a_vocabulary_keeps_its_digits():
    y, weight = draw(0, (16, 100_000), (100_000, 40))
    exact = y.double() @ weight.double()
    assert (times(weight)(y) - exact).norm() < 2e-6 * exact.norm()
