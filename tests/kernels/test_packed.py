"""Packed products: the numbers, weights that change, and rows that do not feel each other."""

from __future__ import annotations

import pytest
import torch

from kernels import packed
from kernels.packed import _packed, forget_packed, packed_linear, packed_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["panels", "library"], autouse=True)
def form(request, monkeypatch):
    """Products by kernels/cpu.cpp where it has them, and the same ones by oneDNN or as PyTorch
    makes them.
    """
    forget_packed()
    if request.param == "library":
        monkeypatch.setattr(packed, "in_panels", lambda weight, dtype: False)
    yield
    forget_packed()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [packed_linear, packed_rows])
@pytest.mark.parametrize("rows", [0, 1, 16, 70])
@pytest.mark.parametrize(
    "shape", [(1, 24), (16, 24), (17, 24), (40, 24), (64, 24), (33, 7), (5, 1)], ids=str
)
def test_the_product(dtype, function, rows, shape):
    (features, dim), bias = shape, random(shape[0], seed=2)
    x, weight = random(rows, dim), random(features, dim, seed=1)
    for given in (None, bias.to(dtype)):
        found = function(x.to(dtype), weight.to(dtype), given)
        expected = x @ weight.T + (0 if given is None else bias)
        assert found.shape == (rows, features) and found.dtype == dtype
        assert (
            float((found.double() - expected).abs().max() if rows else 0)
            < 60 * torch.finfo(dtype).eps
        )


def test_a_float32_weight_in_bfloat16():
    x, weight = random(5, 24).bfloat16(), random(40, 24, seed=1).float()
    assert torch.equal(packed_linear(x, weight), packed_linear(x, weight.bfloat16()))


def test_a_weight_that_changed_is_packed_again():
    x, weight = (
        random(20, 24).float(),
        torch.nn.Parameter(random(40, 24, seed=1).float()),
    )
    first = packed_linear(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(packed_linear(x, weight), first * 2)
    forget_packed()
    weight.data.mul_(2)  # unseen
    assert torch.equal(packed_linear(x, weight), first * 4)


def test_a_packed_weight_dies_with_its_weight():
    forget_packed()
    weight = random(40, 24).float()
    packed_linear(random(3, 24).float(), weight)
    before = len(_packed)
    del weight
    assert len(_packed) == 0 or before == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 40), (576, 192), (1536, 64), (33, 7)], ids=str)
def test_a_row_depends_on_itself_alone(dtype, shape):
    x, weight = (
        random(150, shape[0]).to(dtype),
        random(shape[1], shape[0], seed=1).to(dtype),
    )
    whole, before = packed_rows(x, weight), torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 7, 16, 17, 64, 65, 149):
            assert torch.equal(packed_rows(x[:rows], weight), whole[:rows])
    torch.set_num_threads(before)
