"""Causal attention whose result for a token is bit for bit a function of that token and those
it sees.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(E)) v_s

It is the sampler's own attention to its cache (kernels/attention.py), every token being a row,
so that trainer and sampler agree. The gradient is that of PyTorch's attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.attention import Pages, new_pages, page_size, paged_attention
from kernels.backend import differentiable
from kernels.packed import packed_rows


def exact_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """[B, H, T, E] of q [B, H, T, E] and k, v [B, K, T, E]; a token sees itself and the window
    - 1 before it.
    """
    return differentiable(
        partial(in_pages, window=window), partial(library_attention, window=window), q, k, v
    )


def library_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """`exact_attention` by PyTorch."""
    tokens = q.shape[2]
    if window is None or tokens <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    place = torch.arange(tokens, device=q.device)
    seen = window_mask(place[:, None], place[None, :], window)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


def window_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """True where a key position may be seen from a query position; broadcasts the two position
    tensors.
    """
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def in_pages(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """The attention of whole sequences by the kernel for single tokens: every token is a row
    of its sequence's slot.
    """
    batch, heads, tokens, size = q.shape
    keys, values = new_pages(
        (batch, -(-tokens // page_size(q.device))), k.shape[1], size, q.dtype, q.device
    )
    pages = keys.shape[1]
    page = keys.shape[3]
    for kept, new in (keys, k), (values, v):
        kept.copy_(
            F.pad(new, (0, 0, 0, pages * page - tokens))
            .unflatten(2, (pages, page))
            .transpose(1, 2)
        )
    integers = {"dtype": torch.int32, "device": q.device}
    table = torch.arange(batch * pages, **integers).view(batch, pages)
    slot = torch.arange(batch, **integers).repeat_interleave(tokens)
    length = torch.arange(1, tokens + 1, **integers).repeat(batch)
    rows = q.transpose(1, 2).flatten(0, 1)
    out = paged_attention(
        rows, Pages(keys.flatten(0, 1), values.flatten(0, 1), table), slot, length, window
    )
    return out.unflatten(0, (batch, tokens)).transpose(1, 2)


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
