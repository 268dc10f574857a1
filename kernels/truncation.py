"""Sampling from a truncated distribution: top-k, then top-p, then min-p.

With the logits z and the weights w = exp((z - max z) / temperature),

    top-k keeps the tokens whose logit is at least the k-th largest;
    top-p keeps, of these, the fewest likeliest whose weights add up to at least top_p times
        those of all of these;
    min-p drops the tokens whose weight is below min_p times the largest.

Tokens that tie with the last one kept stay as well, and the likeliest always stays. Each rule
is thus a threshold on the logit, a pivot, and the token is drawn from the weights at or above
all three as in kernels/lm_head.py.

The reference looks for the pivot of top-p among the likeliest few tokens, and among more only
in the rows where those do not reach. The Triton form, one program a row, never sorts either:
it finds a pivot two bits at a time, from the top of the order-preserving integer image of a
logit, by three sums over the row for each two bits. All sums have one order.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from kernels.backend import jit, runs_triton, tl, triton
from kernels.lm_head import BLOCK, block_sums, draw, first_above, in_chunks, normalised

# Likeliest tokens that the reference looks at first; a sort takes 20 times as long.
SHORTLIST = 256
LOW_BITS = {
    torch.float32: 0,
    torch.float16: 12,
    torch.bfloat16: 16,
}  # of a float32, even in number, that are always 0

Sampled = tuple[Tensor, Tensor, Tensor, Tensor]


def truncated_sample(
    logits: Tensor,
    u: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Sampled:
    """From logits [n, V] and u [n, 2] in [0, 1): tokens, their logprobs under the full
    distribution and under the truncated one, and the entropies of the full one, each [n].

    top_k 0, top_p 1 and min_p 0 are off. ValueError unless the temperature is positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"the temperature is {temperature}: truncation needs one above 0"
        )
    options = temperature, top_k if 0 < top_k < logits.shape[1] else 0, top_p, min_p
    if runs_triton(logits) and logits.dtype in LOW_BITS:
        return truncated_sample_triton(logits, u, *options)
    return truncated_sample_reference(logits, u, *options)


def truncated_sample_reference(
    logits: Tensor,
    u: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Sampled:
    """Compute `truncated_sample` in PyTorch, in float32 or better."""
    rows = partial(
        _sample_rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    return in_chunks(rows, logits, u)


def _sample_rows(
    z: Tensor, u: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Sampled:
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    scaled, weights, _, total = normalised(z, temperature)
    scaled.clamp_(min=torch.finfo(z.dtype).min)  # 0 * -inf would spoil the entropy
    log_total = total.log()
    entropy = log_total - torch.linalg.vecdot(weights, scaled) / log_total.exp()
    if top_k or top_p < 1:
        likeliest = z.topk(
            min(z.shape[1], max(top_k, SHORTLIST if top_p < 1 else 0))
        ).values
    if top_k:
        weights.mul_(z >= likeliest[:, top_k - 1 : top_k])
    if top_p < 1:
        goal = top_p * weights.sum(-1, keepdim=True)
        weights.mul_(z >= _top_p_pivot(z, likeliest, temperature, goal))
    if min_p > 0:
        weights.mul_(scaled >= math.log(min_p))
    blocks = block_sums(weights)
    token = draw(weights, blocks, u)
    chosen = scaled.gather(-1, token[:, None])[:, 0]
    return token, chosen - log_total, chosen - blocks.sum(-1).log(), entropy


def _top_p_pivot(
    z: Tensor, likeliest: Tensor, temperature: float, goal: Tensor
) -> Tensor:
    """The largest logit [n, 1] at which the weights from the top down reach `goal` [n, 1],
    first among `likeliest`.
    """
    top = likeliest[:, :1]
    mass = ((likeliest - top) / temperature).exp_().cumsum(-1)
    place = (mass < goal).sum(-1, keepdim=True)
    size = likeliest.shape[1]
    most = z.shape[1]
    pivot = likeliest.gather(-1, place.clamp(max=size - 1))
    short = (place[:, 0] == size).nonzero()[:, 0]
    if size < most and len(short):
        z = z[short]
        pivot[short] = _top_p_pivot(
            z, z.topk(min(most, 8 * size)).values, temperature, goal[short]
        )
    return pivot


# --- Triton ----------------------------------------------------------------------------------


def truncated_sample_triton(
    logits: Tensor,
    u: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Sampled:
    """`truncated_sample` in one launch."""
    logits = logits.contiguous()
    n, vocabulary = logits.shape
    token = logits.new_empty(n, dtype=torch.int64)
    full, truncated, entropy = (
        logits.new_empty(n, dtype=torch.float32) for _ in range(3)
    )
    if n:
        tile = min(8192, max(BLOCK, triton.next_power_of_2(vocabulary)))
        _truncation_kernel[(n,)](
            logits, u.float().contiguous(), token, full, truncated, entropy, 1 / temperature,
            top_k, top_p, math.log(min_p) if min_p else -math.inf, V=vocabulary, TILE=tile,
            BLOCK=BLOCK, LOW=LOW_BITS[logits.dtype], TOP_K=top_k > 0, TOP_P=top_p < 1,
            num_warps=max(1, tile // 512), enable_fp_fusion=True,
        )  # fmt: skip
    return token, full, truncated, entropy


@jit
def _logits(row, start, V: tl.constexpr, TILE: tl.constexpr):
    """A tile of a row's logits, -inf beyond its end."""
    place = start + tl.arange(0, TILE)
    return tl.load(row + place, mask=place < V, other=float("-inf")).to(tl.float32)


@jit
def _mass(row, pivot, lowest, top, inverse, V: tl.constexpr, TILE: tl.constexpr):
    """The sum of the weights of logits that are at or above the pivot, and at least `lowest`
    after scaling.
    """
    mass = tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):
        z = _logits(row, start, V, TILE)
        scaled = (z - top) * inverse
        mass += tl.where((z >= pivot) & (scaled >= lowest), tl.exp(scaled), 0.0)
    return tl.sum(mass, 0)


@jit
def _pivot(
    row,
    goal,
    top,
    inverse,
    V: tl.constexpr,
    TILE: tl.constexpr,
    LOW: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The largest logit for which the logits from it up reach `goal`, in number or in weight.

    Order-preserving image of a float: all bits flipped of a negative one, the sign bit of a
    positive one. Of the LOW lowest bits, 0 in the dtype of the logits, nothing needs to be
    found.
    """
    found = tl.full((), 0, tl.uint32)
    one = tl.full((), 1 << 30, tl.uint32)
    for _ in range(0, (32 - LOW) // 2):
        a = tl.zeros((TILE,), tl.float32)
        b = tl.zeros((TILE,), tl.float32)
        c = tl.zeros((TILE,), tl.float32)
        for start in range(0, V, TILE):
            z = _logits(row, start, V, TILE)
            bits = z.to(tl.int32, bitcast=True)
            image = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
            w = (
                tl.full((TILE,), 1.0, tl.float32)
                if COUNT
                else tl.exp((z - top) * inverse)
            )
            a += tl.where(image >= found + one, w, 0.0)
            b += tl.where(image >= found + 2 * one, w, 0.0)
            c += tl.where(image >= found + 3 * one, w, 0.0)
        reached = (tl.sum(a, 0) >= goal).to(tl.int32) + (tl.sum(b, 0) >= goal).to(
            tl.int32
        )
        found += one * (reached + (tl.sum(c, 0) >= goal).to(tl.int32)).to(tl.uint32)
        one = one >> 2
    bits = found.to(tl.int32, bitcast=True)
    pivot = tl.where(bits < 0, bits ^ -0x80000000, ~bits).to(tl.float32, bitcast=True)
    # No number: the image of -inf with its lowest bits unset, or nothing reached the goal
    # because of NaN.
    return tl.where(pivot == pivot, pivot, float("-inf"))


@jit
def _truncation_kernel(
    logits, u, token, full, truncated, entropy, inverse, top_k, top_p, lowest,
    V: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * V
    tops = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, V, TILE):
        tops = tl.maximum(tops, _logits(row, start, V, TILE))
    top = tl.max(tops, 0)

    total = tl.zeros((TILE,), tl.float32)
    moment = tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):
        scaled = (_logits(row, start, V, TILE) - top) * inverse
        w = tl.exp(scaled)
        total += w
        moment += tl.where(w > 0, scaled * w, 0.0)
    total = tl.sum(total, 0)
    moment = tl.sum(moment, 0)

    pivot = float("-inf")
    if TOP_K:
        pivot = _pivot(row, top_k, top, inverse, V, TILE, LOW, True)
    if TOP_P:
        goal = top_p * _mass(row, pivot, float("-inf"), top, inverse, V, TILE)
        pivot = tl.maximum(pivot, _pivot(row, goal, top, inverse, V, TILE, LOW, False))

    kept = _mass(row, pivot, lowest, top, inverse, V, TILE)
    level = tl.load(u + 2 * n) * kept
    before = 0.0
    block = tl.full((), 1 << 30, tl.int32)
    last = tl.full((), 0, tl.int32)
    for start in range(0, V, TILE):
        z = _logits(row, start, V, TILE)
        scaled = (z - top) * inverse
        w = tl.where((z >= pivot) & (scaled >= lowest), tl.exp(scaled), 0.0)
        masses = tl.sum(tl.reshape(w, (TILE // BLOCK, BLOCK)), 1)
        place = start // BLOCK + tl.arange(0, TILE // BLOCK)
        above = (before + tl.cumsum(masses, 0) > level) & (masses > 0)
        block = tl.minimum(block, tl.min(tl.where(above, place, 1 << 30), 0))
        last = tl.maximum(last, tl.max(tl.where(masses > 0, place, 0), 0))
        before += tl.sum(masses, 0)
    # A level that rounding lifted to the total means the last
    block = tl.minimum(block, last)

    z = _logits(row, block * BLOCK, V, BLOCK)
    scaled = (z - top) * inverse
    w = tl.where((z >= pivot) & (scaled >= lowest), tl.exp(scaled), 0.0)
    inside = tl.arange(0, BLOCK)
    chosen = first_above(
        tl.cumsum(w, 0), w, tl.load(u + 2 * n + 1) * tl.sum(w, 0), inside, 0
    )
    value = tl.sum(tl.where(inside == chosen, scaled, 0.0), 0)
    tl.store(token + n, (block * BLOCK + chosen).to(tl.int64))
    tl.store(full + n, value - tl.log(total))
    tl.store(truncated + n, value - tl.log(kept))
    tl.store(entropy + n, tl.log(total) - moment / total)
