"""Causal attention whose result for a token is bit for bit a function of that token and those it sees.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(E)) v_s

On a CPU keys are taken in blocks of a fixed size (kernels/block_attention.py), on a GPU in pages
(kernels/attention.py): each is what the sampler's cache does for single tokens, so that trainer and sampler agree. The
gradient is that of PyTorch's own attention, computed again in the backward pass: the same function up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.attention import PAGE, paged_attention
from kernels.block_attention import BLOCK, ordered_attention, row_padding
from kernels.packed import packed_rows


def exact_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """[B, H, T, E] of q [B, H, T, E] and k, v [B, K, T, E]; a token sees itself and the window - 1 before it."""
    return _ExactAttention.apply(q, k, v, window)


class _ExactAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        return (in_pages if q.is_cuda else ordered_attention)(q, k, v, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            place = torch.arange(q.shape[2], device=q.device)
            seen = place[None, :] <= place[:, None]
            if ctx.window is not None:
                seen &= place[None, :] > place[:, None] - ctx.window
            hidden = None if ctx.window is None else seen
            out = F.scaled_dot_product_attention(q, k, v, hidden, is_causal=hidden is None, enable_gqa=True)
            return (*torch.autograd.grad(out, (q, k, v), gradient), None)


def check_rows(weights: Sequence[Tensor], dtype: torch.dtype, size: int) -> None:
    """ValueError if, on this CPU with this many threads, rows of the products that the exact mode is made of depend on
    how many there are: products with these weights, and with blocks of keys and values of `size`.
    """
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype)

    def with_block(x: Tensor, block: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, row_padding(len(x), dtype, size)))
        return torch.bmm(padded[None], block[None])[0, : len(x)]

    products = [(weight.shape[1], partial(packed_rows, weight=weight)) for weight in weights]
    products += [(m, partial(with_block, block=random(m, n))) for m, n in ((size, BLOCK), (BLOCK, size))]
    for columns, product in products:
        x = random(100, columns)
        if not all(torch.equal(product(x[:rows]), product(x)[:rows]) for rows in (1, 7, 33)):
            raise ValueError(
                "exact: on this CPU the rows of a matrix product depend on how many there are: "
                "try run.threads=1, or do without"
            )


def in_pages(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """The attention of whole sequences by the kernel for single tokens: every token is a row of its sequence's slot."""
    batch, heads, tokens, size = q.shape
    pages = -(-tokens // PAGE)
    room = pages * PAGE - tokens
    key_pages, value_pages = (
        F.pad(x, (0, 0, 0, room)).unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v)
    )
    integers = {"dtype": torch.int32, "device": q.device}
    table = torch.arange(batch * pages, **integers).view(batch, pages)
    slot = torch.arange(batch, **integers).repeat_interleave(tokens)
    length = torch.arange(1, tokens + 1, **integers).repeat(batch)
    rows = q.transpose(1, 2).flatten(0, 1)
    out = paged_attention(rows, key_pages, value_pages, table, slot, length, window)
    return out.unflatten(0, (batch, tokens)).transpose(1, 2)
