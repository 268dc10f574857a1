"""The gate of the feed-forward network (arXiv 2002.05202), between its two matrix products.

    y = silu(gate) * up,   silu(z) = z / (1 + exp(-z))

gate and up are the halves of one row. silu is computed in float32 and rounded to the model's
dtype before the product, as in the model's own code. One program a row and BLOCK columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.backend import form, jit, tl, triton

BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """[M, F] from gate_up [M, 2 F]."""
    return form(gate_up, swiglu_reference, swiglu_triton, swiglu_cpu)(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`swiglu` in PyTorch, of [.., 2 F]. On a CPU F.silu rounds the elements at the end of a
    thread's share otherwise than the rest, so its bits depend on the number of rows and
    threads; those of the other forms do not.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_cpu(gate_up: Tensor) -> Tensor:
    """One pass."""
    out = _room(gate_up)
    compiled.call("swiglu", out.dtype, gate_up.contiguous(), out, *out.shape)
    return out


def _room(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up {list(gate_up.shape)}: expected [M, 2 F]")
    return torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """One launch."""
    out = _room(gate_up)
    rows, width = gate_up.shape
    if out.numel():
        grid = (rows, triton.cdiv(width // 2, BLOCK))
        _swiglu_kernel[grid](
            gate_up.contiguous(),
            out,
            F=width // 2,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


@jit
def _swiglu_kernel(gate_up, out, F: tl.constexpr, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * F + i, mask=i < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + i, mask=i < F, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    tl.store(out + row * F + i, (silu * up).to(DTYPE), mask=i < F)
