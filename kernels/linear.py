"""A matrix product whose rows do not feel each other: row i is a function of row i of x and of
the weight, bit for bit.

    y = x W^T + b

Libraries choose their tiles, and whether to split the sum over D, by the number of rows; the
sampler's few rows and the trainer's many then differ in the last bits. Here the tiles depend
on the weight alone: every element is one float32 sum over D in steps of BLOCK_K, never split,
so the bits are the same in every batch. The price is a tile that is the best for neither few
rows nor many (the case for it: He et al., "Defeating Nondeterminism in LLM Inference", 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import INTERPRETED, jit, require, runs_triton, tl, triton
from kernels.packed import packed_rows
from kernels.products import with_gradients

# Row tiles that go through the weight together: the weight's tile is then read once from memory
# for them.
GROUP = 16


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., N] from x [..., D], weight [N, D] and bias [N], differentiable; the gradients are
    plain matrix products.
    """
    product = invariant_linear_triton if runs_triton(x) else packed_rows
    return with_gradients(product, x, weight, bias)


def tile_config(features: int, itemsize: int) -> dict[str, int]:
    """Tile and options by the weight's N and the bytes of an element: narrow weights need
    small tiles to fill a GPU with few rows. Everything fits in the 99 KB of shared memory that
    also small GPUs have.
    """
    if itemsize == 4:
        return {
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_K": 16,
            "num_warps": 8,
            "num_stages": 2,
        }
    if features < 8192:
        return {
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_K": 64,
            "num_warps": 4,
            "num_stages": 5,
        }
    return {
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 64,
        "num_warps": 8,
        "num_stages": 3,
    }


def invariant_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """[M, N] from x [M, D]. One launch."""
    (rows, dim) = x.shape
    features = len(weight)
    require(
        weight.shape == (features, dim)
        and weight.dtype == x.dtype
        and (bias is None or bias.shape == (features,)),
        "[M, D] and [N, D] of one dtype, and a bias [N] or none",
        x=x,
        weight=weight,
        bias=bias,
    )
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    config = tile_config(features, x.element_size())
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(
        features, config["BLOCK_N"]
    )
    if tiles:
        _linear_kernel[(tiles,)](
            x.contiguous(), weight.contiguous(), bias, out, rows, N=features, D=dim,
            GROUP=GROUP, UPCAST=INTERPRETED, enable_fp_fusion=True, **config,
        )  # fmt: skip
    return out


@jit
def product_tile(
    x, weight, m, n, rows, features, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows m [BLOCK_M] of x [rows, D] times rows n [BLOCK_N] of the weight [features, D],
    added up in float32.

    kernels/lm_head.py makes its logits of the same tiles.
    """
    k = tl.arange(0, BLOCK_K)
    # Beyond the ends the last row stands in: the caller keeps nothing of it, and no mask is
    # needed.
    left = x + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * D + k[None, :]
    right = weight + tl.minimum(n, features - 1).to(tl.int64)[:, None] * D + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            a = tl.load(left + start)
            b = tl.load(right + start)
        else:
            inside = (k < D - start)[None, :]
            a = tl.load(left + start, mask=inside, other=0.0)
            b = tl.load(right + start, mask=inside, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return total


@jit
def _linear_kernel(
    x, weight, bias, out, rows, N: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of the result. Programs walk down GROUP row tiles, then on to the next columns."""
    down = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * across)
    inside = tl.program_id(0) % (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    m = (group * GROUP + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = product_tile(x, weight, m, n, rows, N, D, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(
        place,
        total.to(out.dtype.element_ty),
        mask=(m < rows)[:, None] & (n < N)[None, :],
    )
