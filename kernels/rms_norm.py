"""The residual sum and the norm that follows it.

    r = x + delta,   y = w * r / sqrt(mean(r^2) + eps)                                             (arXiv 1910.07467)

r is rounded to the model's dtype before it is normalised, the mean is taken in float32, and
the quotient is rounded before the weight, as in the model's own code. One program a row, the
whole row in registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.backend import form, jit, tl, triton


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + delta and its norm, both [M, D]; without delta x itself is the sum."""
    run = form(x, add_rms_norm_reference, add_rms_norm_triton, add_rms_norm_cpu)
    return run(x, delta, weight, eps)


def add_rms_norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` with the model's operations."""
    residual = x if delta is None else x + delta
    if x.dtype.itemsize >= 4:
        return residual, F.rms_norm(residual, (x.shape[-1],), weight, eps)
    return residual, weight * F.rms_norm(residual.float(), (x.shape[-1],), None, eps).to(
        x.dtype
    )


def add_rms_norm_cpu(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """One pass."""
    _check(x, delta, weight)
    x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual = x if delta is None else torch.empty_like(out)
    delta = None if delta is None else delta.contiguous()
    compiled.call("add_rms_norm", x.dtype, x, delta, weight, residual, out, eps, *x.shape)
    return residual, out


def _check(x: Tensor, delta: Tensor | None, weight: Tensor) -> None:
    if weight.shape != x.shape[1:] or (delta is not None and delta.shape != x.shape):
        shapes = f"x {list(x.shape)}, delta {delta is not None and list(delta.shape)}, weight {list(weight.shape)}"
        raise ValueError(f"{shapes}: expected [M, D], [M, D] or none, and [D]")


def add_rms_norm_triton(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """One launch."""
    rows, dim = x.shape
    _check(x, delta, weight)
    x = x.contiguous()
    block = triton.next_power_of_2(dim)
    out = torch.empty_like(x)
    residual = x if delta is None else torch.empty_like(x)
    if rows:
        _add_rms_norm_kernel[(rows,)](
            *(x, None if delta is None else delta.contiguous(), weight, residual, out, eps),
            D=dim,
            BLOCK=block,
            num_warps=min(
                16, max(1, block // 256)
            ),  # a thread then loads 16 bytes of bfloat16
            enable_fp_fusion=False,
        )
    return residual, out


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
        out + row + i, ((total * scale).to(DTYPE).to(tl.float32) * w).to(DTYPE), mask=real
    )
