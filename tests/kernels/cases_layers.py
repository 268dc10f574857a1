"""Realistic launches of the kernels of a layer, for the compile gate."""

from __future__ import annotations

from functools import partial

import torch
from gate import Case

from kernels import rms_norm, rope_write, swiglu
from kernels.attention import PAGE, Pages, paged_attention, rows_per_tile
from kernels.linear import invariant_linear_triton
from kernels.record import record as write_down

paged_attention_triton = partial(paged_attention, form="triton")
record_triton = partial(write_down, form="triton")
add_rms_norm_triton = partial(rms_norm.add_rms_norm, form="triton")
rope_write_triton = partial(rope_write.rope_write, form="triton")
swiglu_triton = partial(swiglu.swiglu, form="triton")

BF16, F16, F32, I32, I64 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int32,
    torch.int64,
)
TENSOR_CORES = ("mma", "mma", "mma")
WIDE = ("mma", "wgmma", "tcgen05")
BOTH = ("mma", "mma|wgmma", "mma|tcgen05")


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record(rows: int, ends: int) -> Case:
    row, matrix = partial(meta, rows), partial(meta, rows, 1025)
    state = (
        row(dtype=I64),
        row(dtype=I32),
        row(dtype=I64),
        row(dtype=I64),
        row(dtype=torch.bool),
    )
    written = matrix(dtype=I64), matrix(dtype=F32), matrix(dtype=F32)
    drawn = row(dtype=I64), row(dtype=F32), row(dtype=F32)
    return Case(
        f"record {rows}",
        lambda: record_triton(drawn, (*state, *written), meta(ends, dtype=I64)),
    )


def attention(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = BF16,
    width: int = 0,
    pages: int = 8,
) -> Case:
    """width: rows of a tile, 0 for the plain form; pages: those of a slot."""

    def launch() -> None:
        cache, row = meta(4096, kv_heads, PAGE, dim, dtype=dtype), meta(256, dtype=I32)
        tiles = (meta(32, width, dtype=I32), meta(32, dtype=I32)) if width else ()
        q, held = (
            meta(256, heads, dim, dtype=dtype),
            Pages(cache, cache, meta(256, pages, dtype=I32)),
        )
        paged_attention_triton(q, held, row, row, 1 if pages == 1 else None, *tiles)

    classes = (
        {}
        if dtype == F32
        else {"_split_kernel": BOTH if width * heads // kv_heads > 32 else TENSOR_CORES}
    )
    return Case(
        f"attention {heads}/{kv_heads} x {dim} {str(dtype)[6:]} tiles of {width}",
        launch,
        classes,
    )


def rope(heads: int, kv_heads: int, dim: int, norm: bool, dtype: torch.dtype) -> Case:
    def launch() -> None:
        pages, row = meta(4096, kv_heads, PAGE, dim, dtype=dtype), meta(256, dtype=I32)
        angles, weight = (
            meta(256, dim, dtype=dtype),
            meta(dim, dtype=dtype) if norm else None,
        )
        qkv, held = (
            meta(256, (heads + 2 * kv_heads) * dim, dtype=dtype),
            Pages(pages, pages, meta(256, 8, dtype=I32)),
        )
        rope_write_triton(qkv, row, row, (angles, angles), held, (weight, weight))

    return Case(f"rope {heads}/{kv_heads} x {dim} {str(dtype)[6:]}", launch)


def norm(dim: int, dtype: torch.dtype, delta: bool) -> Case:
    x, weight = meta(256, dim, dtype=dtype), meta(dim, dtype=dtype)
    name = f"norm {dim} {str(dtype)[6:]}{' with delta' if delta else ''}"
    return Case(
        name, lambda: add_rms_norm_triton(x, x if delta else None, weight, 1e-6)
    )


def linear(rows: int, features: int, dim: int, dtype: torch.dtype, bias: bool) -> Case:
    x, weight = meta(rows, dim, dtype=dtype), meta(features, dim, dtype=dtype)
    name = f"linear {dim} -> {features} {str(dtype)[6:]}"

    def launch() -> None:
        invariant_linear_triton(
            x, weight, meta(features, dtype=dtype) if bias else None
        )

    return Case(name, launch, {} if dtype == F32 else {"_linear_kernel": WIDE})


def gradients(tokens: int, dim: int, inner: int, dtype: torch.dtype) -> Case:
    """Of the norm and of the gate, and the rotation, which is its own."""

    def launch() -> None:
        x = meta(tokens, dim, dtype=dtype)
        rms_norm._gradient(1e-6, "triton", x, meta(dim, dtype=dtype), x)
        gate_up, d_y = (meta(tokens, n, dtype=dtype) for n in (2 * inner, inner))
        swiglu._gradient("triton", gate_up, d_y)
        angles = meta(tokens, 64, dtype=dtype)
        heads = meta(tokens, 18, 64, dtype=dtype)
        rope_write.rotated(heads, 16, (angles, angles), "triton")

    return Case(f"gradients {dim} {str(dtype)[6:]}", launch)


CASES = [
    attention(14, 2, 64),  # Qwen2.5-0.5B
    attention(12, 2, 128),  # Qwen2.5-1.5B
    attention(8, 8, 80, F16),
    # Triton compiles an integer argument of 1 into the kernel
    attention(8, 4, 32, pages=1),
    attention(12, 2, 128, F32),
    attention(14, 2, 64, width=rows_per_tile(14, 2)),
    attention(12, 2, 128, width=rows_per_tile(12, 2)),
    attention(12, 2, 128, width=4),
    rope(12, 2, 128, False, BF16),
    rope(16, 8, 128, True, BF16),  # Qwen3-0.6B
    rope(8, 4, 80, True, F32),
    norm(1536, BF16, True),
    norm(896, F16, False),
    norm(8192, F32, True),
    Case("swiglu 8960 bfloat16", lambda: swiglu_triton(meta(256, 17920))),
    gradients(4096, 896, 4864, BF16),
    gradients(4096, 8192, 28672, F32),
    gradients(300, 100, 250, F16),
    record(256, 2),
    record(3, 0),
    linear(300, 2048, 1536, BF16, True),
    linear(300, 17920, 1536, BF16, False),
    linear(1, 1000, 100, F16, True),
    linear(300, 2048, 1536, F32, True),
]
