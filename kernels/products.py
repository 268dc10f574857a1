"""The matrix products of training on a CPU whose library is slow at them.

    y = x W^T + b,    dx = dy W,    dW = dy^T x,    db = sum over the rows of dy

PyTorch leaves float32 products to Intel's MKL, and MKL gives an AMD processor with AVX-512 its
code for AVX2: 108 GFLOP/s of a core of an EPYC (Zen 5) that does 220 to 260 in kernels/cpu.cpp.
There they are made by it, on operands that are laid out in panels as they are needed, which costs
a hundredth of the product. Elsewhere, and in other types, they are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels import compiled
from kernels.packed import PANEL, by_panels, panels

# Rows of dy and x that meet at a time: what is laid out of them stays in the second cache, and
# the columns of dy are read from few pages (dW of 1024 x 128: 180 GFLOP/s, with 2048 rows 122).
DEEP = 512


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., N] from x [..., D], weight [N, D] and bias [N], differentiable."""
    if is_slow(x, weight):
        return with_gradients(_forward, x, weight, bias)
    return F.linear(x, weight, bias)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return by_panels(x, panels(weight), bias, x.new_empty(len(x), len(weight)))


def with_gradients(
    product: Callable, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """product(rows of x, weight, bias), which is x W^T + b up to rounding, [..., N], with the
    gradients at the head of this file.
    """
    return _Linear.apply(product, x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        product: Callable,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(rows_of(x), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = rows_of(gradient)
        d_x = times(weight)(rows).view(x.shape) if needs_x else None
        d_weight = None
        if needs_weight:
            d_weight = weight.new_zeros(weight.shape)
            add_outer(d_weight, rows, rows_of(x))
        return None, d_x, d_weight, rows.sum(0) if needs_bias else None


def times_transposed(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what writes x W^T [M, N] to its second argument, from x [M, D]."""
    if is_slow(weight):
        laid_out = panels(weight)
        return lambda x, out: by_panels(x.contiguous(), laid_out, None, out)
    return lambda x, out: torch.mm(x, weight.mT, out=out)


def times(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what makes y W [M, D] of y [M, N]."""
    if not is_slow(weight):
        return lambda y: y @ weight
    laid_out = column_panels(weight)
    return lambda y: by_panels(
        y.contiguous(), laid_out, None, y.new_empty(len(y), weight.shape[1])
    )


def add_outer(total: Tensor, y: Tensor, x: Tensor) -> None:
    """total += y^T x, all of one dtype: [N, D] from y [M, N] and x [M, D]."""
    if not is_slow(y, x):
        total.addmm_(y.mT, x)
        return
    for some, others in zip(y.split(DEEP), x.split(DEEP), strict=True):
        by_panels(some.contiguous().mT, column_panels(others), None, total, add=True)


def column_panels(weight: Tensor) -> Tensor:
    """Lay out the transpose of a matrix [N, D] for `by_panels`."""
    lacking = -weight.shape[1] % PANEL
    if lacking:  # it copies
        weight = F.pad(weight, (0, lacking))
    return weight.unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def is_slow(*operands: Tensor) -> bool:
    """Whether the library is slow at products of these."""
    return (
        all(x.is_cpu and x.dtype == torch.float32 for x in operands)
        and library_is_slow()
    )


@cache
def library_is_slow() -> bool:
    """Whether this is a CPU with AVX-512 that is not Intel's, and kernels/cpu.cpp was built."""
    cpuinfo = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpuinfo.is_file()
        and "GenuineIntel" not in cpuinfo.read_text(encoding="utf-8")
        and compiled.runs_compiled(torch.empty(0))
    )
