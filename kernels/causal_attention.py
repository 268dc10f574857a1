"""Causal attention in training: of pieces of a row, with rotary positions and its gradients.

    q', k' = rope(q), rope(k),    o_r = sum_t p_rt v_t,    p_r = softmax_t(q'_r . k'_t / sqrt(E))
    dv_t = sum_r p_rt do_r,    dz_rt = p_rt (do_r . v_t - do_r . o_r)
    dq'_r = sum_t dz_rt k'_t / sqrt(E),    dk'_t = sum_r dz_rt q'_r / sqrt(E)

A token r sees the tokens t of its piece up to itself, and before them all of the piece that its
own goes on from, as a response does from its prompt: what sequences share stands in the row once.

On a CPU kernels/cpu.cpp takes a key/value head of a piece at a time, and some queries of it with
all their keys, straight from the projection's result, rotated as they are read: no score, copy or
rotated head outlives them, and nothing is kept for the backward pass but a logsumexp a query
(FlashAttention-2, arXiv 2307.08691). All is computed in float32. Elsewhere it is PyTorch's, on
pieces that are filled up to the longest. (Its FlexAttention has no gradient on a CPU.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels import compiled
from kernels.rope_write import Rope, rotated


class Block(NamedTuple):
    """S pieces that are filled up to R tokens and T keys."""

    queries: Tensor  # int64 [S, R]: where the tokens of each piece stand
    keys: Tensor  # int64 [S, T]: and those it sees, from the first of its sequence
    first: Tensor  # int64 [S]: how many come before its own
    kept: Tensor  # int64 [N]: which of the S R queries are tokens
    whole: bool  # whether none goes on from another


@dataclass(frozen=True)
class Pieces:
    """How a row of tokens is cut.

    table: int64 [S, 3], of every piece its first token, its number of tokens, and the piece it
    goes on from, one that begins a sequence, or -1. They stand one after the other.
    """

    table: Tensor

    @cached_property
    def block(self) -> Block:
        """The pieces side by side; beyond its end the last token of one stands again."""
        start, length, origin = self.table[..., None].unbind(1)
        first = torch.where(origin < 0, 0, length[origin[:, 0]])
        r = torch.arange(int(length.max()), device=start.device)
        t = torch.arange(int((length + first).max()), device=start.device)
        own = start + torch.minimum(t - first, length - 1)
        keys = torch.where(t < first, start[origin[:, 0]] + t, own)
        kept = (r < length).flatten().nonzero()[:, 0]
        queries = start + torch.minimum(r, length - 1)
        return Block(queries, keys, first[:, 0], kept, not first.any())

    def to(self, device: torch.device | str) -> Pieces:
        return Pieces(self.table.to(device))


def whole_rows(rows: int, length: int, device: torch.device | None = None) -> Pieces:
    """Return the pieces of `rows` sequences of `length` tokens, one after the other."""
    table = [[i * length, length, -1] for i in range(rows)]
    return Pieces(torch.tensor(table, dtype=torch.int64, device=device).view(-1, 3))


def causal_attention(
    heads: Tensor,
    kv_heads: int,
    rope: Rope,
    pieces: Pieces,
    window: int | None = None,
) -> Tensor:
    """[N, H, E] of heads [N, H + 2 K, E] of N tokens: H queries, K keys and K values, none of
    them rotated yet; rope: cos and sin [N, E].

    A token sees at most `window` tokens, itself among them.
    """
    if not compiled.runs_compiled(heads):
        return library_attention(heads, kv_heads, rope, pieces, window)
    return _CausalAttention.apply(heads, kv_heads, rope, pieces, window)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        heads: Tensor,
        kv_heads: int,
        rope: Rope,
        pieces: Pieces,
        window: int | None,
    ) -> Tensor:
        tokens, width, dim = heads.shape
        queries = width - 2 * kv_heads
        ctx.sizes = (window or 0, len(pieces.table), tokens, queries, kv_heads, dim)
        out = heads.new_empty(tokens, queries, dim)
        logsumexp = heads.new_empty(tokens, queries, dtype=torch.float32)
        given = [x.contiguous() for x in (heads, *rope, pieces.table)]
        tensors = *given, out, logsumexp
        compiled.call("causal_attention", heads.dtype, *tensors, *ctx.sizes)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = heads, *_ = ctx.saved_tensors
        found = torch.empty_like(heads)
        tensors = *saved, gradient.contiguous(), found
        compiled.call("causal_attention_gradient", heads.dtype, *tensors, *ctx.sizes)
        return found, None, None, None, None


def library_attention(
    heads: Tensor,
    kv_heads: int,
    rope: Rope,
    pieces: Pieces,
    window: int | None = None,
) -> Tensor:
    """`causal_attention` by PyTorch."""
    attention = partial(_of_block, window=window, whole=pieces.block.whole)
    return side_by_side(attention, heads, kv_heads, rope, pieces)


# q [S, H, R, E], k and v [S, K, T, E], first [S] -> [S, H, R, E]: query r of a piece is token
# first[s] + r of its sequence.
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def side_by_side(
    attention: Attention, heads: Tensor, kv_heads: int, rope: Rope, pieces: Pieces
) -> Tensor:
    """`causal_attention` by an attention of pieces of one length.

    What it gives beyond the end of a piece is left out.
    """
    few = [kv_heads] * 2
    turned = rotated(heads, heads.shape[1] - kv_heads, rope)
    q, k, v = turned.split([heads.shape[1] - 2 * kv_heads, *few], dim=1)
    block = pieces.block
    k, v = (_rows(x, block.keys) for x in (k, v))
    found = attention(_rows(q, block.queries), k, v, block.first)
    return found.transpose(1, 2).flatten(0, 1).index_select(0, block.kept)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Gather the tokens at places [S, R] of [N, heads, E] as [S, heads, R, E]."""
    return (
        x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
    )


def _of_block(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, window: int | None, whole: bool
) -> Tensor:
    if whole and (window is None or k.shape[2] <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    own, t = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    behind = first[:, None, None, None] + own[:, None] - t
    seen = (behind >= 0) & (behind < (window or math.inf))
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
