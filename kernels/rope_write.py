"""From the fused projection to attention: norm of the heads, rotary positions, new keys and
values into the cache.

    q' = rope(norm(q), position),   cache[slot, position] = rope(norm(k), position), v

Rotary positions (arXiv 2104.09864) in the half-split layout, (x_i, x_{i+E/2}) being a pair;
the norm is Qwen3's RMSNorm on each head of q and k. One program takes BLOCK heads of a row,
whatever they are, a half of each head to a tile. Every product and sum is rounded to the
model's dtype where PyTorch rounds it, so the result is that of the model's own code.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels import compiled
from kernels.attention import Pages
from kernels.backend import (
    Differentiable,
    form_for,
    form_with_gradient,
    jit,
    require,
    tl,
    triton,
)
from kernels.rms_norm import add_rms_norm_reference

BLOCK = 8  # heads a program

# cos and sin of all positions, each [positions, E], the halves alike
Rope = tuple[Tensor, Tensor]
# the weights [E] of the norms of the heads of q and k, or neither
Norms = tuple[Tensor | None, Tensor | None]


def rope_tables(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Return cos and sin [..., E] of positions [...], at frequencies [E/2].

    The angles are computed in float32.
    """
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_write(
    qkv: Tensor,
    position: Tensor,
    slot: Tensor,
    rope: Rope,
    pages: Pages,
    norms: Norms = (None, None),
    eps: float = 1e-6,
    form: str | None = None,
) -> Tensor:
    """Return rotated queries [M, H, E] of qkv [M, (H + 2 K) E], and write keys and values into
    the pages.

    Row m stands at position[m] (int32) of slot[m] (int32). An idle row has position -1: it
    writes nothing and gives zeros. rope: cos and sin as from `Transformer.rope`, in the
    model's dtype; norms: the weights of the heads' norms.
    """
    form = form or form_for(qkv)
    if form == "reference":
        return rope_write_reference(qkv, position, slot, rope, pages, norms, eps)
    keys, values, table = pages
    rows, width = qkv.shape
    _, kv_heads, size, dim = keys.shape
    heads = width // dim - 2 * kv_heads
    require(
        heads > 0
        and width == (heads + 2 * kv_heads) * dim
        and values.shape == keys.shape,
        "[M, (H + 2 K) E] and twice [pages, K, PAGE, E]",
        qkv=qkv,
        keys=keys,
        values=values,
    )
    if (norms[0] is None) != (norms[1] is None):
        raise ValueError(
            "only one of the norms is given: a model norms both q and k, or neither"
        )
    q = qkv.new_empty(rows, heads, dim)
    read = [tensor.contiguous() for tensor in (qkv, position, slot, *rope)]
    table = table.contiguous()
    columns = table.shape[1]
    if form == "cpu":
        tensors = *read, *norms, q, keys.mT, values, table
        sizes = rows, heads, kv_heads, dim, columns
        compiled.call("rope_write", qkv.dtype, *tensors, eps, *sizes)
        return q
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            "keys and values must be contiguous: they are written in place"
        )
    if rows:
        grid = (rows, triton.cdiv(heads + 2 * kv_heads, BLOCK))
        _rope_write_kernel[grid](
            *read, *norms, q, keys, values, table, eps, columns, HEADS=heads,
            KV_HEADS=kv_heads, E=dim, HALF=triton.next_power_of_2(dim // 2), PAGE=size,
            BLOCK=BLOCK, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return q


def rope_write_reference(
    qkv, position, slot, rope, pages, norms=(None, None), eps=1e-6
) -> Tensor:
    """Compute `rope_write` with the model's operations."""
    _, kv_heads, size, dim = pages.keys.shape
    live = position >= 0
    at = position[live].long()
    rows = slot[live].long()
    heads = qkv[live].unflatten(-1, (-1, dim))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if norms[0] is not None:
        q = add_rms_norm_reference(q, None, norms[0], eps)[1]
        k = add_rms_norm_reference(k, None, norms[1], eps)[1]
    page = pages.table[rows, at // size].long()
    cos, sin = (table[at, None] for table in rope)
    pages.keys[page, :, at % size] = apply_rope(k, cos, sin)
    pages.values[page, :, at % size] = v
    out = qkv.new_zeros(len(qkv), *q.shape[1:])
    out[live] = apply_rope(q, cos, sin)
    return out


def rotated(heads: Tensor, turning: int, rope: Rope, form: str | None = None) -> Tensor:
    """heads [N, W, E], of which the first `turning` are rotated by cos and sin [N, E],
    differentiable.
    """
    form = form or form_with_gradient(heads)
    if form != "triton":
        turned = apply_rope(heads[:, :turning], *(x[:, None] for x in rope))
        return torch.cat((turned, heads[:, turning:]), dim=1)
    turn = partial(_turned, turning, [x.contiguous() for x in rope])
    return Differentiable.apply(
        partial(turn, 1.0), lambda _, d: (turn(-1.0, d),), heads
    )


def _turned(turning: int, rope: list[Tensor], direction: float, x: Tensor) -> Tensor:
    tokens, width, dim = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    if tokens:
        grid = (tokens, triton.cdiv(width, BLOCK))
        half = triton.next_power_of_2(dim // 2)
        _turned_kernel[grid](
            x, *rope, out, direction, turning, W=width, E=dim, HALF=half, BLOCK=BLOCK,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the half-split pairs (x_i, x_{i+E/2}) of x [.., E]; cos and sin broadcast to it,
    both halves alike.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@jit
def _rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@jit
def _turned_kernel(
    x, cos, sin, out, direction, turning, W: tl.constexpr, E: tl.constexpr, HALF:
    tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK of the W heads of one row; those that are not turned have cos 1 and sin 0."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    i = tl.arange(0, HALF)[None, :]
    real = (head < W) & (i < E // 2)
    turns = (head < turning) & (i < E // 2)
    place = (row * W + head) * E + i
    angle = row * E + i + head * 0
    a = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x + place + E // 2, mask=real, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32) * direction
    first = _rounded(a * c, DTYPE) - _rounded(b * s, DTYPE)
    second = _rounded(b * c, DTYPE) + _rounded(a * s, DTYPE)
    tl.store(out + place, first.to(DTYPE), mask=real)
    tl.store(out + place + E // 2, second.to(DTYPE), mask=real)


@jit
def _rope_write_kernel(
    qkv, position, slot, cos, sin, q_weight, k_weight, q, key_pages, value_pages, page_table,
    eps, pages, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr, HALF:
    tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK of the HEADS + 2 KV_HEADS heads of one row. An idle row computes with zeros, and
    stores only its q.
    """
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, HALF)
    at = tl.load(position + row)
    live = at + tl.zeros([BLOCK], tl.int32) >= 0
    at = tl.maximum(at, 0)
    half = (i < E // 2)[None, :]
    place = head[:, None] * E + i[None, :]
    source = qkv + row * (HEADS + 2 * KV_HEADS) * E + place
    real = (live & (head < HEADS + 2 * KV_HEADS))[:, None] & half
    first = tl.load(source, mask=real, other=0.0).to(tl.float32)
    second = tl.load(source + E // 2, mask=real, other=0.0).to(tl.float32)
    a = first
    b = second
    if q_weight is not None:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.math.rsqrt(square / E + eps)[:, None]
        of_q = half & (head < HEADS)[:, None]
        of_k = half & (head >= HEADS)[:, None]
        weight = i[None, :] + tl.zeros([BLOCK, HALF], tl.int32)
        wa = tl.load(q_weight + weight, mask=of_q, other=0.0).to(tl.float32)
        wa += tl.load(k_weight + weight, mask=of_k, other=0.0).to(tl.float32)
        wb = tl.load(q_weight + weight + E // 2, mask=of_q, other=0.0).to(tl.float32)
        wb += tl.load(k_weight + weight + E // 2, mask=of_k, other=0.0).to(tl.float32)
        a = _rounded(_rounded(first * scale, DTYPE) * wa, DTYPE)
        b = _rounded(_rounded(second * scale, DTYPE) * wb, DTYPE)
    angle = at * E + i
    c = tl.load(cos + angle, mask=i < E // 2, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=i < E // 2, other=0.0).to(tl.float32)[None, :]
    rotated_a = _rounded(a * c, DTYPE) - _rounded(b * s, DTYPE)
    rotated_b = _rounded(b * c, DTYPE) + _rounded(a * s, DTYPE)

    of_q = half & (head < HEADS)[:, None]
    tl.store(q + row * HEADS * E + place, rotated_a.to(DTYPE), mask=of_q)
    tl.store(q + row * HEADS * E + place + E // 2, rotated_b.to(DTYPE), mask=of_q)

    of_k = real & ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None]
    of_v = real & (head >= HEADS + KV_HEADS)[:, None]
    entry = tl.maximum(tl.load(slot + row), 0).to(tl.int64) * pages + at // PAGE
    page = tl.load(page_table + entry).to(tl.int64)
    kv_head = tl.where(head < HEADS + KV_HEADS, head - HEADS, head - HEADS - KV_HEADS)
    target = ((page * KV_HEADS + kv_head) * PAGE + at % PAGE)[:, None] * E + i[None, :]
    tl.store(key_pages + target, rotated_a.to(DTYPE), mask=of_k)
    tl.store(key_pages + target + E // 2, rotated_b.to(DTYPE), mask=of_k)
    tl.store(value_pages + target, first.to(DTYPE), mask=of_v)
    tl.store(value_pages + target + E // 2, second.to(DTYPE), mask=of_v)
