"""The gate of the feed-forward network (arXiv 2002.05202), between its two matrix products.

    y = silu(gate) * up,   silu(z) = z / (1 + exp(-z))

gate and up are the halves of one row. silu is computed in float32 and rounded to the model's
dtype before the product, as in the model's own code. One program a row and BLOCK columns.
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

BLOCK = 1024


def swiglu(gate_up: Tensor, form: str | None = None) -> Tensor:
    """Return [M, F] from gate_up [M, 2 F]."""
    form = form or form_for(gate_up)
    if form == "reference":
        return swiglu_reference(gate_up)
    rows, width = gate_up.shape
    require(width % 2 == 0, "[M, 2 F]", gate_up=gate_up)
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(rows, width // 2)
    if form == "cpu":
        compiled.call("swiglu", out.dtype, gate_up, out, *out.shape)
    elif out.numel():
        grid = (rows, triton.cdiv(width // 2, BLOCK))
        options = {"num_warps": 4, "enable_fp_fusion": False}
        _swiglu_kernel[grid](gate_up, out, F=width // 2, BLOCK=BLOCK, **options)
    return out


def gated(gate_up: Tensor, form: str | None = None) -> Tensor:
    """[.., F] of gate_up [.., 2 F], differentiable: with s = 1 / (1 + exp(-gate))

    dgate = dy up s (1 + gate (1 - s)),   dup = dy gate s
    """
    form = form or form_with_gradient(gate_up)
    if form == "reference":
        return swiglu_reference(gate_up)
    rows = gate_up.flatten(0, -2).contiguous()
    out = Differentiable.apply(
        partial(swiglu, form=form), partial(_gradient, form), rows
    )
    return out.unflatten(0, gate_up.shape[:-1])


def _gradient(form: str, gate_up: Tensor, d_y: Tensor) -> tuple[Tensor]:
    rows, width = d_y.shape
    found = torch.empty_like(gate_up)
    tensors = gate_up, d_y.contiguous(), found
    if form == "cpu":
        compiled.call("swiglu_gradient", gate_up.dtype, *tensors, rows, width)
    elif found.numel():
        grid = (rows, triton.cdiv(width, BLOCK))
        _gradient_kernel[grid](*tensors, F=width, BLOCK=BLOCK, num_warps=4)
    return (found,)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Compute `swiglu` in PyTorch, of [.., 2 F].

    On a CPU F.silu rounds the elements at the end of a thread's share otherwise than the rest,
    so its bits depend on the number of rows and threads; those of the other forms do not.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@jit
def _swiglu_kernel(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * F + i, mask=i < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + i, mask=i < F, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    tl.store(out + row * F + i, (silu * up).to(DTYPE), mask=i < F)


@jit
def _gradient_kernel(gate_up, d_y, d_gate_up, F: tl.constexpr, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * 2 * F + i
    gate = tl.load(gate_up + at, mask=i < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + F, mask=i < F, other=0.0).to(tl.float32)
    d = tl.load(d_y + row * F + i, mask=i < F, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    d_gate = d * up * s * (1.0 + gate * (1.0 - s))
    tl.store(d_gate_up + at, d_gate.to(DTYPE), mask=i < F)
    tl.store(d_gate_up + at + F, (d * gate * s).to(DTYPE), mask=i < F)
