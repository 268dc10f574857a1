"""Attention over keys in blocks, in plain PyTorch.

    o = sum_j exp(s_j - max s) v_j / sum_j exp(s_j - max s),   s = q k^T / sqrt(E)

Scores, exponentials and sums of a query are computed block by block of BLOCK keys and added in the order of the blocks,
so its result depends on nothing around it: not on the other queries of a call, nor on how many keys lie beyond those it
sees (they add exact zeros). This holds as long as blocks begin at the same positions, which is what makes the sampler's
attention to its cache bit-equal to the trainer's attention over whole sequences. It takes matrix products whose rows
do not feel each other either, which `row_padding` sees to; kernels/exact_attention.py checks the machine at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
SUM = 16  # exponentials are added within runs of so many keys first; every block is a multiple of it
SCORES = 1 << 26  # scores held at once by `ordered_attention`, 256 MB of float32
ROW_MULTIPLE = 4  # float32 products of fewer rows are computed in another order
LEAST_PRODUCT = 4096


def row_padding(rows: int, dtype: torch.dtype, size: int) -> int:
    """Rows to add to products of so many rows with a block of keys of `size`, so that all take the same path: torch
    gives products of 16-bit numbers of up to LEAST_PRODUCT multiplications to another library than larger ones.
    """
    if dtype.itemsize >= 4:
        return -rows % ROW_MULTIPLE
    return max(0, LEAST_PRODUCT // (BLOCK * size) + 1 - rows)


def scaled(scores: Tensor, bias: Tensor, scale: float) -> Tensor:
    """s [..., W] from q k^T [..., W] and a bias of 0 or -inf; in float32, or in float64 where the scores are."""
    return torch.add(bias.to(torch.promote_types(scores.dtype, torch.float32)), scores, alpha=scale)


def exponentials(scores: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """exp(s - max s) [..., W] and its sums [...], of s as in `scaled`; W a multiple of SUM."""
    s = scaled(scores, bias, scale)
    s.sub_(s.amax(-1, keepdim=True)).exp_()
    return s, s.unflatten(-1, (-1, SUM)).sum(-1).cumsum(-1)[..., -1]


def weighted_values(weights: Tensor, values: Sequence[Tensor], total: Tensor | None = None) -> Tensor:
    """sum_j weights_j values_j [n, M, E], added in order to `total`, from weights [n, M, W] and values [n, W_j, E]."""
    start = 0
    for block in values:
        part = torch.bmm(weights[..., start : start + block.shape[1]].to(block.dtype), block)
        total = part.to(weights.dtype) if total is None else total.add_(part)
        start += block.shape[1]
    return total


def ordered_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention [B, H, T, E] of q [B, H, T, E] to k and v [B, K, T, E], block by block from position 0."""
    (batch, heads, tokens, size), groups = q.shape, k.shape[1]
    if batch > (at_once := max(1, SCORES // (heads * tokens * tokens))):
        parts = zip(*(x.split(at_once) for x in (q, k, v)), strict=True)
        return torch.cat([ordered_attention(*part, window) for part in parts])
    blocks = -(-tokens // BLOCK)
    room = blocks * BLOCK - tokens
    k, v = (F.pad(x, (0, 0, 0, room)).reshape(batch * groups, blocks, BLOCK, size) for x in (k, v))
    place = torch.arange(blocks * BLOCK, device=q.device)
    seen = place[None, :] <= place[:, None]
    if window is not None:
        seen &= place[None, :] > place[:, None] - window
    bias = torch.zeros(seen.shape, device=q.device).masked_fill_(~seen, -torch.inf)
    q = F.pad(q, (0, 0, 0, room)).reshape(batch * groups, -1, size)  # [B K, R T, E], T a multiple of BLOCK
    scores = torch.cat([torch.bmm(q, keys.transpose(1, 2)) for keys in k.unbind(1)], -1)
    shaped = scores.unflatten(1, (-1, blocks * BLOCK))
    weights, total = exponentials(shaped, bias, size**-0.5)
    out = weighted_values(weights.flatten(1, 2), v.unbind(1)) / total.flatten(1, 2)[..., None]
    return out.to(q.dtype).view(batch, heads, -1, size)[:, :, :tokens]
