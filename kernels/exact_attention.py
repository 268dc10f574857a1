"""Causal attention whose result for a token is bit for bit a function of that token and those
it sees.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(E)) v_s

It is the sampler's own attention to its cache (kernels/attention.py), every token being a row,
so that trainer and sampler agree. The gradient is that of kernels/causal_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.attention import Pages, new_pages, page_size, paged_attention
from kernels.backend import Differentiable, gradient_of
from kernels.causal_attention import Pieces, causal_attention, side_by_side
from kernels.packed import packed_rows
from kernels.rope_write import Rope


def exact_attention(
    heads: Tensor,
    kv_heads: int,
    rope: Rope,
    pieces: Pieces,
    window: int | None = None,
) -> Tensor:
    """`causal_attention` of the same arguments, exact as the head of this file says."""
    kernel = partial(in_pages, window=window)
    given = kv_heads, rope, pieces
    return Differentiable.apply(
        lambda heads: side_by_side(kernel, heads, *given),
        gradient_of(lambda heads: causal_attention(heads, *given, window)),
        heads,
    )


def in_pages(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, window: int | None = None
) -> Tensor:
    """[S, H, R, E] of q [S, H, R, E] and k, v [S, K, T, E] by the kernel for single tokens: every
    query is a row of its slot, and query r is token first[s] + r of its sequence.

    It sees the keys up to itself, at most `window` of them. What stands beyond the end of a row
    gives no sense, and is seen by nothing before it.
    """
    rows, _, queries, _ = q.shape
    size = page_size(q.device)
    pages = -(-k.shape[2] // size)
    kept = new_pages((rows, pages), k.shape[1], k.shape[3], q.dtype, q.device)
    for cache, new in zip(kept, (k, v), strict=True):
        filled = F.pad(new, (0, 0, 0, pages * size - k.shape[2]))
        cache.copy_(filled.unflatten(2, (pages, size)).transpose(1, 2))
    integers = {"dtype": torch.int32, "device": q.device}
    table = torch.arange(rows * pages, **integers).view(rows, pages)
    slot = torch.arange(rows, **integers).repeat_interleave(queries)
    length = first[:, None] + torch.arange(1, queries + 1, device=q.device)
    length = length.clamp(max=k.shape[2]).flatten().to(torch.int32)
    keys, values = (cache.flatten(0, 1) for cache in kept)
    flat = q.transpose(1, 2).flatten(0, 1)
    out = paged_attention(flat, Pages(keys, values, table), slot, length, window)
    return out.unflatten(0, (rows, queries)).transpose(1, 2)


def check_rows(weights: Sequence[Tensor], dtype: torch.dtype) -> None:
    """ValueError if this CPU, with this many threads, cannot do what the exact mode is made
    of: the CPU kernels, and products with these weights whose rows do not depend on how many
    there are.
    """
    generator = torch.Generator().manual_seed(0)
    if not compiled.runs_compiled(torch.empty(0, dtype=dtype)):
        raise ValueError(
            "exact: on a CPU this needs a C++ compiler, and float32 or bfloat16; "
            f"the dtype is {dtype}"
        )
    for weight in weights:
        x = torch.randn(100, weight.shape[1], generator=generator).to(dtype)
        if not all(
            torch.equal(packed_rows(x[:rows], weight), packed_rows(x, weight)[:rows])
            for rows in (1, 7, 33)
        ):
            raise ValueError(
                "exact: on this CPU the rows of a matrix product depend on how many there are: "
                "try run.threads=1, or do without"
            )
