"""The residual sum and the norm that follows it.

    r = x + delta,   y = w * r / sqrt(mean(r^2) + eps)   (arXiv 1910.07467)

r is rounded to the model's dtype before it is normalised, the mean is taken in float32, and
the quotient is rounded before the weight, as in the model's own code. One program a row, the
whole row in registers.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.backend import (
    Differentiable,
    form_for,
    form_with_gradient,
    jit,
    require,
    tl,
    triton,
)

SUMMED = 16  # rows of a program that share its part of the weight's gradient


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, form: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return x + delta and its norm, both [M, D]; without delta x itself is the sum."""
    form = form or form_for(x)
    if form == "reference":
        return add_rms_norm_reference(x, delta, weight, eps)
    rows, dim = x.shape
    fits = weight.shape == (dim,) and (delta is None or delta.shape == x.shape)
    require(fits, "[M, D], [M, D] or none, and [D]", x=x, delta=delta, weight=weight)
    x = x.contiguous()
    out = torch.empty_like(x)
    residual = x
    if delta is not None:
        delta = delta.contiguous()
        residual = torch.empty_like(x)
    tensors = x, delta, weight, residual, out
    if form == "cpu":
        compiled.call("add_rms_norm", x.dtype, *tensors, eps, rows, dim)
    elif rows:
        block = triton.next_power_of_2(dim)
        # A thread then loads 16 bytes of bfloat16
        warps = min(16, max(1, block // 256))
        options = {"num_warps": warps, "enable_fp_fusion": False}
        _add_rms_norm_kernel[(rows,)](*tensors, eps, D=dim, BLOCK=block, **options)
    return residual, out


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: str | None = None) -> Tensor:
    """The norm [.., D] of x alone, differentiable: with n = x / sqrt(mean(x^2) + eps)

    dx = (w dy - n mean(w dy n)) / sqrt(mean(x^2) + eps),   dw = sum over the rows of dy n
    """
    form = form or form_with_gradient(x)
    if form == "reference":
        return add_rms_norm_reference(x, None, weight, eps)[1]
    normed = Differentiable.apply(
        lambda x, weight: add_rms_norm(x, None, weight, eps, form)[1],
        partial(_gradient, eps, form),
        x.reshape(-1, x.shape[-1]).contiguous(),
        weight,
    )
    return normed.view(x.shape)


def _gradient(
    eps: float, form: str, x: Tensor, weight: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor]:
    rows, dim = x.shape
    d_x = torch.empty_like(x)
    tensors = x, weight, d_y.contiguous(), d_x
    if form == "cpu":
        d_weight = torch.empty_like(weight)
        compiled.call("rms_norm_gradient", x.dtype, *tensors, d_weight, eps, rows, dim)
        return d_x, d_weight
    parts = x.new_zeros(triton.cdiv(rows, SUMMED), dim, dtype=torch.float32)
    block = triton.next_power_of_2(dim)
    if rows:
        _gradient_kernel[len(parts),](
            *tensors, parts, eps, rows, D=dim, BLOCK=block, SUMMED=SUMMED,
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return d_x, parts.sum(0).to(weight.dtype)


def add_rms_norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` with the model's operations."""
    residual = x if delta is None else x + delta
    shape = x.shape[-1:]
    if x.dtype.itemsize >= 4:
        return residual, F.rms_norm(residual, shape, weight, eps)
    normed = F.rms_norm(residual.float(), shape, None, eps)
    return residual, weight * normed.to(x.dtype)


@jit
def _add_rms_norm_kernel(
    x, delta, weight, residual, out, eps, D: tl.constexpr, BLOCK: tl.constexpr
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, BLOCK)
    real = i < D
    total = tl.load(x + row + i, mask=real, other=0.0).to(tl.float32)
    if delta is not None:
        total += tl.load(delta + row + i, mask=real, other=0.0).to(tl.float32)
        tl.store(residual + row + i, total.to(DTYPE), mask=real)
        total = total.to(DTYPE).to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(total * total) / D + eps)
    w = tl.load(weight + i, mask=real, other=0.0).to(tl.float32)
    tl.store(
        out + row + i,
        ((total * scale).to(DTYPE).to(tl.float32) * w).to(DTYPE),
        mask=real,
    )


@jit
def _gradient_kernel(
    x, weight, d_y, d_x, parts, eps, rows, D: tl.constexpr, BLOCK: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    real = i < D
    w = tl.load(weight + i, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(SUMMED):
        row = part * SUMMED + n
        here = real & (row + i * 0 < rows)
        a = tl.load(x + row * D + i, mask=here, other=0.0).to(tl.float32)
        d = tl.load(d_y + row * D + i, mask=here, other=0.0).to(tl.float32)
        scale = tl.math.rsqrt(tl.sum(a * a) / D + eps)
        mean = tl.sum(w * d * a) / D * scale * scale
        tl.store(d_x + row * D + i, (w * d - a * mean) * scale, mask=here)
        total += d * a * scale
    tl.store(parts + part * D + i, total, mask=real)
