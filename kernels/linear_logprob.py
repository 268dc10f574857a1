"""Logprobs and entropies of tokens from hidden states and the lm_head weight, a chunk of the
logits at a time.

    z = W h / temperature,   log pi(y) = z_y - logsumexp z
    H = logsumexp z - sum_v softmax(z)_v z_v

With a vocabulary of 150,000 the float32 logits of a batch are larger than the model, and
differentiating them takes several times their size. Here they exist for `chunk` tokens at a
time. The forward pass keeps one number a token, its logsumexp; the backward pass computes the
logits again, and from them, with g the gradient of log pi(y),

    dz = g (onehot(y) - softmax(z)) / temperature,   dh = dz W,   dW = sum over chunks of dz^T h

One matrix product in four is thus spent on computing something twice. On a CPU it is won back
by writing less memory. Tokens that make a single chunk keep their softmax instead: it would be
as large again in the backward pass.

The Triton form never holds the logits, nor any softmax: the forward pass is
kernels/lm_head.py's, so its logprobs are bit for bit those of the sampler, and a kernel that
cuts the products in the same way writes dz, in the weight's dtype, for `chunk` tokens at a
time. dz W and dz^T h are left to cuBLAS, which adds the chunks up in float32. Choosing the
tokens that have a gradient makes the host wait for the device once; the products saved are
worth far more. The idea: Cut Cross-Entropy (arXiv 2411.09009), Liger Kernel (arXiv
2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels import lm_head
from kernels.backend import INTERPRETED, jit, require, runs_triton, tl
from kernels.lm_head import logits_tile
from kernels.packed import packed_rows
from kernels.products import add_outer, times, times_transposed

# Logits held at once, 160 MB of float32; the matrix products run no faster on more of them.
CHUNK_LOGITS = 40_000_000
CHUNK_ROWS = 64  # but a tenth slower on a number of rows that is no multiple of this
ALIGNED = 16  # numbers; Triton knows a multiple of it when it sees one
# Numbers of dz that the Triton form holds at once, 1 GiB of bfloat16: W is read once for each
CHUNK_GRADIENT = 1 << 29


Chunks = Iterator[
    tuple[Tensor, Tensor, Tensor]
]  # tokens [c] that have a gradient, their states [c, D] and dz [c, V]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    chunk: int = 0,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logprobs and (without gradient) entropies [n] of int64 target [n], from hidden [n, D]
    and weight [V, D].

    Float32, or float64 where the weight is; the matrix products run in the weight's own dtype.
    chunk: tokens at a time, 0: as many as make about CHUNK_LOGITS logits. exact: logprobs bit
    for bit the exact sampler's. Tokens whose logprob gets a gradient of exactly 0 cost nothing
    in the backward pass. ValueError when the shapes do not fit or the temperature is not
    positive.
    """
    n = len(target)
    (vocabulary, dim) = weight.shape
    require(
        target.shape == (n,) and hidden.shape == (n, dim),
        "[n, D], [V, D], [n]",
        hidden=hidden,
        weight=weight,
        target=target,
    )
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}: logprobs need one above 0")
    if runs_triton(weight) and weight.dtype in lm_head.DTYPES:
        return linear_logprob_triton(hidden, weight, target, temperature, chunk)
    chunk = chunk or CHUNK_ROWS * max(1, CHUNK_LOGITS // (CHUNK_ROWS * vocabulary))
    return _LinearLogprob.apply(
        hidden, weight, target, temperature, max(1, min(chunk, n)), exact, False
    )


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `linear_logprob` in PyTorch, up to rounding, from all logits [n, V] at once."""
    logs = ((hidden @ weight.T).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, target[:, None])[:, 0], entropy


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, target, temperature, chunk, exact, fused
    ) -> tuple[Tensor, Tensor]:
        kept = None
        if fused:
            logprobs, entropy, logsumexp = lm_head.logprobs_triton(
                hidden, weight, target, temperature
            )
        else:
            rooms = _rooms(chunk, weight)
            multiply = _exact_logits(weight) if exact else times_transposed(weight)
            parts = []
            if len(target) <= chunk and any(ctx.needs_input_grad):
                kept = rooms[0]
            for h, y in zip(hidden.split(chunk), target.split(chunk), strict=True):
                z = _logits(h, temperature, rooms, multiply)
                parts.append(
                    lm_head.statistics(z, y, softmax=None if kept is None else z)
                )
            logprobs, entropy, logsumexp = (
                torch.cat(part) for part in zip(*parts, strict=True)
            )
        ctx.save_for_backward(hidden, weight, target, logsumexp, kept)
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.fused = fused
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, gradient: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        """dh = dz W and dW = sum over chunks of dz^T h, None for one that is not needed."""
        hidden, weight = ctx.saved_tensors[:2]
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[0]:
            multiply = times(weight)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=_precise(weight))
        for rows, h, dz in (
            _chunks_triton(ctx, gradient) if ctx.fused else _chunks(ctx, gradient)
        ):
            if d_hidden is not None:
                d_hidden[rows] = multiply(dz)
            if d_weight is not None:
                _add_product(d_weight, dz, h)
            # After the last one the memory of the chunks is free for the copy of d_weight.
            del dz
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _chunks(ctx: FunctionCtx, gradient: Tensor) -> Chunks:
    """dz from logits that are computed again, or from the softmax that was kept."""
    hidden, weight, target, logsumexp, kept = ctx.saved_tensors
    rooms = _rooms(ctx.chunk, weight, kept)
    multiply = times_transposed(weight) if kept is None else None
    # Without clipped tokens and advantages of zero
    for rows in gradient.nonzero()[:, 0].split(ctx.chunk):
        h = hidden[rows]
        g = gradient[rows, None] / ctx.temperature
        if kept is None:
            softmax = (
                _logits(h, ctx.temperature, rooms, multiply)
                .sub_(logsumexp[rows, None])
                .exp_()
            )
        else:
            softmax = kept if len(rows) == len(kept) else kept[rows]
        dz = softmax.mul_(-g).scatter_add_(1, target[rows, None], g)
        if dz.dtype != weight.dtype:
            dz = rooms[1][: len(rows)].copy_(dz)
        yield rows, h, dz


def _precise(weight: Tensor) -> torch.dtype:
    """What everything but the matrix products is computed in: float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


def _rooms(
    chunk: int, weight: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Memory for the logits of any chunk, in float32 (`first`, where it is given) and in the
    weight's own dtype, one and the same where that is float32. On a CPU touching fresh pages for
    each chunk would cost more than the softmax.
    """
    if first is None:
        first = weight.new_empty(chunk, weight.shape[0], dtype=_precise(weight))
    same = first.dtype == weight.dtype
    return first, first if same else torch.empty_like(first, dtype=weight.dtype)


def _logits(
    hidden: Tensor,
    temperature: float,
    rooms: tuple[Tensor, Tensor],
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """z [c, V] of states [c, D], in the first rows of the first of `rooms`, rounded exactly as
    the model's own logits are, which `multiply` writes to its second argument.
    """
    z, product = (room[: len(hidden)] for room in rooms)
    multiply(hidden, product)
    if product.dtype != z.dtype:
        z.copy_(product)
    return z if temperature == 1 else z.div_(temperature)


def _exact_logits(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """As `times_transposed`, each row of the product a function of that row of x alone."""
    return lambda x, out: out.copy_(packed_rows(x, weight))


def _add_product(d_weight: Tensor, dz: Tensor, h: Tensor) -> None:
    """d_weight += dz^T h, summed over chunks in the precision of d_weight."""
    if d_weight.dtype == dz.dtype:
        add_outer(d_weight, dz, h)
    elif dz.is_cuda:  # without rounding the product, nor holding it
        torch.addmm(d_weight, dz.T, h, out_dtype=d_weight.dtype, out=d_weight)
    else:
        d_weight += dz.T @ h


# --- Triton ----------------------------------------------------------------------------------


def linear_logprob_triton(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` without its checks; chunk: tokens of dz at a time, 0: as many as make
    about CHUNK_GRADIENT.
    """
    tile = lm_head.tile(weight)["ROWS"]
    chunk = chunk or tile * max(1, CHUNK_GRADIENT // (tile * weight.shape[0]))
    return _LinearLogprob.apply(hidden, weight, target, temperature, chunk, False, True)


def _chunks_triton(ctx: FunctionCtx, gradient: Tensor) -> Chunks:
    """dz by a kernel that makes the logits again, and keeps them to itself."""
    hidden, weight, target, logsumexp, _ = ctx.saved_tensors
    places = gradient.nonzero()[:, 0]
    room = _aligned(min(ctx.chunk, len(places)), weight)
    for rows in places.split(ctx.chunk):
        h = hidden[rows]
        dz = room[: len(rows)]
        _logit_gradients(
            h,
            weight,
            target[rows],
            logsumexp[rows],
            gradient[rows],
            ctx.temperature,
            dz,
        )
        yield rows, h, dz


def _aligned(rows: int, weight: Tensor) -> Tensor:
    """Memory for dz whose rows begin on multiples of ALIGNED numbers, whatever the vocabulary:
    they are then written in wide stores, from fewer registers. What lies between them is zero:
    oneDNN's bfloat16 product on a CPU with matrix units takes it for a part of the row.
    """
    vocabulary = len(weight)
    room = weight.new_empty(rows, -(-vocabulary // ALIGNED) * ALIGNED)
    room[:, vocabulary:] = 0
    return room[:, :vocabulary]


def _logit_gradients(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    gradient: Tensor,
    temperature: float,
    dz: Tensor,
) -> None:
    """dz [c, V] = gradient (onehot(target) - softmax(z)) / temperature of states h [c, D]."""
    (vocabulary, dim) = weight.shape
    cut = lm_head.tile(weight)
    if len(h):
        _gradient_kernel[lm_head.grid(len(h), vocabulary, cut)](
            h, weight.contiguous(), target, logsumexp, gradient.float(), dz, len(h),
            vocabulary, dz.stride(0), 1 / temperature, dim, UPCAST=INTERPRETED,
            enable_fp_fusion=True, **cut
        )  # fmt: skip


@jit
def _gradient_kernel(
    hidden, weight, target, logsumexp, gradient, dz, n, vocabulary, stride, inverse, D:
    tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, UPCAST:
    tl.constexpr,
):  # fmt: skip
    rows, columns, z = logits_tile(
        hidden, weight, n, vocabulary, D, ROWS, COLUMNS, INNER, UPCAST
    )
    here = rows < n
    g = tl.load(gradient + rows, mask=here, other=0.0).to(tl.float32) * inverse
    y = tl.load(target + rows, mask=here, other=-1)
    p = tl.exp(z * inverse - tl.load(logsumexp + rows, mask=here, other=0.0)[:, None])
    out = g[:, None] * (tl.where(columns[None, :] == y[:, None], 1.0, 0.0) - p)
    tiles = tl.cdiv(n, ROWS)
    row = tl.program_id(0) % tiles * ROWS
    column = tl.program_id(0) // tiles * COLUMNS
    # 32 bits are enough for these
    inside = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    place = dz + row.to(tl.int64) * stride + column + inside
    tl.store(
        place,
        out.to(dz.dtype.element_ty),
        mask=here[:, None] & (columns < vocabulary)[None, :],
    )
