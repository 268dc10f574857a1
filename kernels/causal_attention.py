"""Causal attention of whole rows of queries, as training has it, with its gradients.

    o_r = sum_t p_rt v_t,    p_r = softmax_t(q_r . k_t / sqrt(E))    over the keys t that r sees
    dv_t = sum_r p_rt do_r,    dz_rt = p_rt (do_r . v_t - do_r . o_r)
    dq_r = sum_t dz_rt k_t / sqrt(E),    dk_t = sum_r dz_rt q_r / sqrt(E)

On a CPU kernels/cpu.cpp takes a key/value head of a sequence at a time, and some queries of it
with all their keys: no score outlives them, and nothing is kept for the backward pass but a
logsumexp a query (FlashAttention-2, arXiv 2307.08691). All is computed in float32. PyTorch's own
does the same work in tiles of large products, and is half as fast on the short sequences of a
micro-batch, in bfloat16 a third. Elsewhere it is PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels import compiled


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """[S, H, R, E] of q [S, H, R, E] and k, v [S, K, T, E]: query r is token first[s] + r, and
    sees the keys up to itself, at most `window` of them. `first` None: 0 everywhere.
    """
    if not compiled.runs_compiled(q):
        return library_attention(q, k, v, first, window)
    if first is None:
        first = q.new_zeros(len(q), dtype=torch.int64)
    return _CausalAttention.apply(q, k, v, first, window)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor,
        window: int | None,
    ) -> Tensor:
        # as the model makes them: tokens before heads
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        (rows, queries, heads, dim) = q.shape
        (keys, kv_heads) = k.shape[1:3]
        ctx.sizes = (window or 0, rows, queries, keys, heads, kv_heads, dim)
        out = torch.empty_like(q)
        logsumexp = q.new_empty(rows, heads, queries, dtype=torch.float32)
        tensors = q, k, v, first, out, logsumexp
        compiled.call("causal_attention", q.dtype, *tensors, *ctx.sizes)
        ctx.save_for_backward(*tensors)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first, out, logsumexp = ctx.saved_tensors
        found = [torch.empty_like(x) for x in (q, k, v)]
        gradient = gradient.transpose(1, 2).contiguous()
        tensors = q, k, v, out, gradient, logsumexp, first, *found
        compiled.call("causal_attention_gradient", q.dtype, *tensors, *ctx.sizes)
        return *(x.transpose(1, 2) for x in found), None, None


def library_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """`causal_attention` by PyTorch."""
    queries = q.shape[2]
    keys = k.shape[2]
    if queries == keys and (window is None or keys <= window):  # then first is 0
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    place = torch.arange(queries, device=q.device)[:, None]
    if first is not None:
        place = place + first[:, None, None, None]
    seen = window_mask(place, torch.arange(keys, device=q.device), window)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


def window_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """True where a key position may be seen from a query position; both broadcast."""
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)
