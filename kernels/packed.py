"""Matrix products on a CPU with weights laid out for it once: y = x W^T + b.

oneDNN reorders a weight into the blocks its inner loop reads (torch's compiler does the same when it freezes a model).
Against the plain product that is 1.3 to 1.6 times as fast in float32 on an AVX-512 machine, and a tenth in bfloat16.
It also has a property that the exact mode needs: with at least INVARIANT_ROWS rows, a row of the result depends on that
row of x alone, bit for bit, and not on the number of rows or threads. The plain product of other CPUs does not promise
this, but keeps it when every call has the same number of rows.

What oneDNN does around a product takes longer than multiplying a few rows with a small matrix: those are multiplied by
kernels/cpu.cpp, from panels of LANES rows of the weight, which has that property by the way it is written.
"""

from __future__ import annotations

from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled

INVARIANT_ROWS = 16
SMALL = 1 << 18  # numbers in a small matrix
LANES = 16  # as in cpu.cpp
PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
PACKED_TYPES = [torch.float32] if PACKS else []
if PACKS and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PACKED_TYPES.append(torch.bfloat16)

_packed: dict[int, tuple[ref[Tensor], tuple, Tensor]] = {}  # id of a weight -> it, what it was then, its packed form


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, D] x [N, D] -> [M, N] in the dtype of x, to which weight and bias are rounded. Without gradient.

    A weight is packed when it is first used, and again when it was changed in place.
    """
    bias = None if bias is None else bias.detach().to(x.dtype)
    if is_small(weight, x.dtype):
        out = torch.empty(len(x), len(weight))
        compiled.call("linear", x.dtype, x.contiguous(), packed(weight, x.dtype), bias, out, *out.shape, x.shape[1])
        return out
    if x.dtype not in PACKED_TYPES:
        return F.linear(x, weight.to(x.dtype), bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed(weight, x.dtype), bias, "none", [], "")


def packed_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`packed_linear`, each row of which is a function of that row of x alone."""
    rows = len(x)
    if is_small(weight, x.dtype):
        return packed_linear(x, weight, bias)
    if x.dtype in PACKED_TYPES:
        padded = F.pad(x, (0, 0, 0, max(0, INVARIANT_ROWS - rows)))
        return packed_linear(padded, weight, bias)[:rows]
    tiles = [F.pad(tile, (0, 0, 0, 64 - len(tile))) for tile in x.split(64)]
    return torch.cat([packed_linear(tile, weight, bias) for tile in tiles] or [x.new_zeros(0, len(weight))])[:rows]


def is_small(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in this dtype with this matrix are made by kernels/cpu.cpp, from panels."""
    return dtype == torch.float32 and weight.numel() <= SMALL and compiled.library() is not None


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, D] in this dtype and laid out: by oneDNN, or in panels [ceil(N / LANES), D, LANES]."""
    key, state = id(weight), (weight._version, weight.data_ptr(), dtype)
    known = _packed.get(key)
    if known is None or known[0]() is not weight or known[1] != state:
        with torch.no_grad():
            plain = weight.detach().to(dtype).contiguous()
            laid_out = _in_panels(plain) if is_small(weight, dtype) else torch.ops.mkldnn._reorder_linear_weight(plain)
        known = _packed[key] = ref(weight, lambda _: _packed.pop(key, None)), state, laid_out
    return known[2]


def _in_panels(weight: Tensor) -> Tensor:
    return F.pad(weight, (0, 0, 0, -len(weight) % LANES)).unflatten(0, (-1, LANES)).mT.contiguous()


def forget_packed() -> None:
    """Give the memory of all packed weights back."""
    _packed.clear()
