"""Matrix products on a CPU with weights laid out for it once: y = x W^T + b.

A weight is laid out in panels, which kernels/cpu.cpp reads in order, fetching the next one
from memory while it works on one. With as few rows of x as in decoding, that is where a
library loses time. The product also has a property that the exact mode needs: a row of the
result depends on that row of x alone, bit for bit, and not on the number of rows or threads.

oneDNN does what cpu.cpp leaves to it: bfloat16 where the processor has no dot products of it
or has matrix units, and all but small matrices where it is no x86. It reorders a weight into
the blocks its inner loop reads, as torch's compiler has it do when it freezes a model. Its
products, and PyTorch's own of other types, change their order of sums with the number of rows
and of threads; they have the property where every call has TILE rows and one thread.
"""

from __future__ import annotations

import platform
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled

TILE = 64
SMALL = 1 << 18  # numbers in a small matrix
PANEL = 16  # as in cpu.cpp
X86 = platform.machine().lower() in ("x86_64", "amd64")
PACKS = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_reorder_linear_weight"
)
PACKED_TYPES = [torch.float32] if PACKS else []
if PACKS and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PACKED_TYPES.append(torch.bfloat16)

_packed: dict[
    int, tuple[ref[Tensor], tuple, Tensor]
] = {}  # id of a weight -> it, what it was then, its packed form


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, D] x [N, D] -> [M, N] in the dtype of x, to which weight and bias are rounded.
    Without gradient.

    A weight is packed when it is first used, and again when it was changed in place.
    """
    bias = None if bias is None else bias.detach().to(x.dtype)
    if in_panels(weight, x.dtype):
        out = x.new_empty(len(x), len(weight))
        return by_panels(x.contiguous(), packed(weight, x.dtype), bias, out)
    if x.dtype not in PACKED_TYPES:
        return F.linear(x, weight.to(x.dtype), bias)
    return torch.ops.mkldnn._linear_pointwise(
        x, packed(weight, x.dtype), bias, "none", [], ""
    )


def packed_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`packed_linear`, each row of which is a function of that row of x alone."""
    if in_panels(weight, x.dtype):
        return packed_linear(x, weight, bias)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tiles = [F.pad(tile, (0, 0, 0, TILE - len(tile))) for tile in x.split(TILE)]
        products = [packed_linear(tile, weight, bias) for tile in tiles]
    finally:
        torch.set_num_threads(threads)
    return torch.cat(products)[: len(x)] if len(x) else x.new_zeros(0, len(weight))


def in_panels(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in this dtype with this matrix are made by kernels/cpu.cpp."""
    fits = (weight.numel() <= SMALL or X86) and weight.shape[
        1
    ] * dtype.itemsize % 4 == 0
    return fits and "linear" in (compiled.library() or {}).get(dtype, {})


def is_small(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the matrix is one of a small model, which kernels/small_model.py runs."""
    return (
        dtype == torch.float32 and weight.numel() <= SMALL and in_panels(weight, dtype)
    )


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, D] in this dtype and laid out: in panels [ceil(N / PANEL), D / S, PANEL *
    S], of a row S numbers of four bytes together; or by oneDNN.
    """
    key = id(weight)
    state = (weight._version, weight.data_ptr(), dtype)
    known = _packed.get(key)
    if known is None or known[0]() is not weight or known[1] != state:
        with torch.no_grad():
            plain = weight.detach().to(dtype).contiguous()
            laid_out = (
                panels(plain)
                if in_panels(weight, dtype)
                else torch.ops.mkldnn._reorder_linear_weight(plain)
            )
        known = _packed[key] = (
            ref(weight, lambda _: _packed.pop(key, None)),
            state,
            laid_out,
        )
    return known[2]


def by_panels(
    x: Tensor, panels: Tensor, bias: Tensor | None, out: Tensor, add: bool = False
) -> Tensor:
    """Write x W^T + b [M, N] to `out`, from x [M, D] and the panels of W, and return it; with
    `add`, add x W^T to it. x may be the transpose of what lies in memory.
    """
    (rows, dim) = x.shape
    strides = (dim, 1) if x.is_contiguous() else (1, rows)
    x = x if x.is_contiguous() else x.mT
    compiled.call(
        "linear", x.dtype, x, panels, bias, out, *out.shape, dim, *strides, add
    )
    return out


def panels(weight: Tensor) -> Tensor:
    """Lay out a weight [N, D] for `by_panels`."""
    lacking = -len(weight) % PANEL
    if lacking:  # it copies
        weight = F.pad(weight, (0, 0, 0, lacking))
    rows = weight.unflatten(0, (-1, PANEL)).view(torch.int32)
    return rows.mT.contiguous().view(weight.dtype)


def forget_packed() -> None:
    """Give the memory of all packed weights back."""
    _packed.clear()
