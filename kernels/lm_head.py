"""The end of a decoding step, and of a trainer's forward pass: from the last states to tokens,
logprobs and entropies.

    z = W h / temperature,   log pi(y) = z_y - log sum_v exp z_v
    H = log sum_v exp z_v - sum_v pi(v) z_v

A token is drawn by inverting the cumulative distribution twice: u_1 chooses a block of BLOCK
neighbouring tokens by the blocks' masses, u_2 one of the tokens in it. Two uniform numbers a
token, not one for every entry of the vocabulary, and a GPU needs one pass: whoever computes
the logits of a block also finds the block's mass and the token that u_2 would choose there,
and the logits need never be written.

The Triton form: a program multiplies ROWS states by COLUMNS rows of W, adding up over D in
float32 in one order, and keeps five numbers of each block: its top logit, sum exp(z - top),
sum (z - top) exp(z - top), a candidate, and the candidate's z - top. A second kernel, one
program a row, merges the blocks in one order. The tile is the same for any number of rows, and
no reduction crosses rows: a row's results depend neither on the other rows nor on how many
there are. The sampler (`sample`) and the trainer (`logprobs_triton`) launch the same two
compiled kernels, to which the kind of candidate is a run-time argument: their logprobs of a
token are bit-equal. Logits are not rounded to the weight's dtype on the way, as PyTorch's
matrix product does; in bfloat16 that moves a logprob by up to 2^-8 of the logit.

The CPU form works on logits that are there, a row at a time in two passes; `statistics` and
`sample_logits` are one function of kernels/cpu.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels import compiled
from kernels.backend import INTERPRETED, jit, require, runs_triton, tl, triton
from kernels.linear import product_tile

BLOCK = 128
# rows are finished so many logits at a time, which stay in a CPU's cache from pass to pass
CHUNK_LOGITS = 1 << 20
# The Triton form keeps so many numbers of blocks at a time, 64 MiB
CHUNK_PARTS = 1 << 24
# of a weight that the Triton form takes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How the products are cut into programs: for Hopper and later GPUs, for those with less shared
# memory, and for float32, which has no matrix units.
WIDE = {"ROWS": 128, "COLUMNS": 2 * BLOCK, "INNER": 64, "num_warps": 8, "num_stages": 4}
NARROW = {"ROWS": 128, "COLUMNS": BLOCK, "INNER": 64, "num_warps": 8, "num_stages": 3}
FLOAT32 = {"ROWS": 64, "COLUMNS": BLOCK, "INNER": 16, "num_warps": 8, "num_stages": 3}
# what a candidate is; neither 1 nor 16, which Triton would compile apart
TARGET = 2
DRAW = 3
GREEDY = 4


def sample(
    hidden: Tensor, weight: Tensor, u: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens, their logprobs and the entropies [n] of states [n, D] under W [V, D]; u [n,
    2] in [0, 1).

    Temperature 0 is greedy, with logprobs and entropies at temperature 1.
    """
    if runs_triton(weight) and weight.dtype in DTYPES:
        return sample_triton(hidden, weight, u, temperature)
    return sample_logits(hidden @ weight.T, u, temperature)


def sample_reference(
    hidden: Tensor, weight: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`sample` on all logits at once, computed in the weight's dtype and finished in float32."""
    return _sample_logits_reference(hidden @ weight.T, u, temperature)


def sample_logits(
    logits: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `sample` does from logits [n, V] of any dtype."""
    if not compiled.runs_compiled(logits):
        return _sample_logits_reference(logits, u, temperature)
    token = torch.empty(len(logits), dtype=torch.int64)
    mode = DRAW if temperature else GREEDY
    logprob, entropy, _ = _rows_cpu(logits, token, temperature or 1.0, mode, u)
    return token, logprob, entropy


def _sample_logits_reference(
    logits: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    return in_chunks(partial(_sample_rows, temperature=temperature), logits, u)


def in_chunks(function: Callable, logits: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """Return function(logits, u), computed for some rows at a time."""
    rows = max(1, CHUNK_LOGITS // logits.shape[1])
    parts = [
        function(z, v) for z, v in zip(logits.split(rows), u.split(rows), strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _sample_rows(
    z: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    z, weights, blocks, total = normalised(z.float(), temperature or 1.0)
    token = z.argmax(-1) if temperature == 0 else draw(weights, blocks, u)
    return token, *_logprob_and_entropy(z, weights, total, token)


def _logprob_and_entropy(
    z: Tensor, weights: Tensor, total: Tensor, token: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the tokens and the rows of what `normalised` returned."""
    log_total = total.log()
    # 0 * -inf would spoil it
    mean = torch.linalg.vecdot(weights, z.clamp(min=torch.finfo(z.dtype).min)) / total
    return z.gather(-1, token[:, None])[:, 0] - log_total, log_total - mean


def statistics(
    logits: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    softmax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs of int64 target [n], entropies and logsumexps [n] of logits [n, V]. On a CPU
    the logprobs of tokens that `sample_logits` chose are the same bits, and NaN outside of the
    vocabulary. softmax [n, V], of the logits' dtype, takes the probabilities; it may be the
    logits.
    """
    if compiled.runs_compiled(logits):
        return _rows_cpu(logits, target, temperature, TARGET, None, softmax)
    top = logits.amax(-1) / temperature
    z, weights, _, total = normalised(logits, temperature)
    if softmax is not None:
        torch.div(weights, total[:, None], out=softmax)
    return *_logprob_and_entropy(z, weights, total, target), total.log() + top


def _rows_cpu(
    logits: Tensor,
    token: Tensor,
    temperature: float,
    mode: int,
    u: Tensor | None,
    softmax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs, entropies and logsumexps [n]; the tokens are given, or written to `token`."""
    given = softmax is None or (
        softmax.shape == logits.shape and softmax.dtype == torch.float32
    )
    if not given or token.shape != logits.shape[:1] or token.dtype != torch.int64:
        raise ValueError(
            f"token {token.dtype} {list(token.shape)} or softmax "
            f"do not fit logits {list(logits.shape)}"
        )
    found = torch.empty(3, len(logits))
    u = None if u is None else u.float().contiguous()
    tensors = logits.contiguous(), u, token.contiguous(), *found, softmax
    compiled.call("lm_head", logits.dtype, *tensors, temperature, mode, *logits.shape)
    return tuple(found)


def normalised(z: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z / temperature - its max [n, V], the exponentials of that, their sums by blocks, and in
    all [n].
    """
    z = z if temperature == 1 else z / temperature
    z = z - z.amax(-1, keepdim=True)
    weights = z.exp()
    blocks = block_sums(weights)
    return z, weights, blocks, blocks.sum(-1)


def block_sums(weights: Tensor) -> Tensor:
    """[n, V] -> [n, ceil(V / BLOCK)]."""
    n, vocabulary = weights.shape
    whole = vocabulary // BLOCK * BLOCK
    sums = (
        weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
        if whole
        else weights[:, :0]
    )
    if whole == vocabulary:
        return sums
    return torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True)), dim=-1)


def draw(weights: Tensor, blocks: Tensor, u: Tensor) -> Tensor:
    """One index [n] of each row of weights [n, V], in proportion to them, at u [n, 2]; blocks
    are their sums.
    """
    block = _invert(blocks, u[:, 0])
    inside = (block * BLOCK)[:, None] + torch.arange(BLOCK, device=weights.device)
    last = weights.shape[1] - 1
    masses = weights.gather(-1, inside.clamp(max=last)) * (inside <= last)
    # Beyond the end only where weights are NaN
    return (block * BLOCK + _invert(masses, u[:, 1])).clamp_(max=last)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """The index [n] where the running sum of weights [n, m] first exceeds u times their total."""
    running = weights.cumsum(-1)
    total = running[:, -1]
    # Rounding may lift u * total to the total itself; one step below it still lands on a
    # positive weight.
    level = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(running, level[:, None], right=True)[:, 0]
    # Beyond the end only where weights are NaN
    return place.clamp(max=weights.shape[1] - 1)


# --- Triton ----------------------------------------------------------------------------------


def sample_triton(
    hidden: Tensor, weight: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`sample`, in two launches for each CHUNK_PARTS numbers."""
    mode = DRAW if temperature else GREEDY
    token = hidden.new_empty(len(hidden), dtype=torch.int64)
    return _launch(hidden, weight, temperature or 1.0, mode, token, u)[:3]


def logprobs_triton(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs of int64 target [n] (NaN outside of the vocabulary), entropies [n] and
    logsumexps [n].

    For the tokens of `sample_triton` the same as it returned, bit for bit.
    """
    return _launch(hidden, weight, temperature, TARGET, target.contiguous())[1:]


def tile(weight: Tensor) -> dict[str, int]:
    """How the products are cut into programs: the same for any number of rows."""
    if weight.dtype == torch.float32:
        return FLOAT32
    device = weight.is_cuda and torch.cuda.get_device_properties(weight.device)
    return (
        NARROW if device and device.shared_memory_per_block_optin < 200 << 10 else WIDE
    )


def grid(rows: int, vocabulary: int, cut: dict[str, int]) -> tuple[int]:
    """As many programs as `logits_tile` needs."""
    return (triton.cdiv(rows, cut["ROWS"]) * triton.cdiv(vocabulary, cut["COLUMNS"]),)


def _launch(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    mode: int,
    token: Tensor,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, logprobs, entropies, logsumexps [n]; the tokens are given, or written to
    `token`.
    """
    n = len(hidden)
    (vocabulary, dim) = weight.shape
    require(
        hidden.shape == (n, dim)
        and hidden.dtype == weight.dtype
        and weight.dtype in DTYPES,
        f"[n, D] and [V, D] of one dtype of {DTYPES}",
        hidden=hidden,
        weight=weight,
    )
    hidden = hidden.contiguous()
    weight = weight.contiguous()
    cut = tile(weight)
    logprob, entropy, logsumexp = (
        hidden.new_empty(n, dtype=torch.float32) for _ in range(3)
    )
    u = logprob if u is None else u.float().contiguous()  # not read when there is none
    blocks = triton.cdiv(vocabulary, BLOCK)
    chunk = max(1, CHUNK_PARTS // (5 * blocks * cut["ROWS"])) * cut["ROWS"]
    parts = hidden.new_empty(min(n, chunk), 5, blocks, dtype=torch.float32)
    for first in range(0, n, chunk):
        h, v, y, *out = (
            t[first : first + chunk]
            for t in (hidden, u, token, logprob, entropy, logsumexp)
        )
        _blocks_kernel[grid(len(h), vocabulary, cut)](
            h, weight, v, y, parts, len(h), vocabulary, blocks, 1 / temperature, mode, dim, BLOCK,
            UPCAST=INTERPRETED, enable_fp_fusion=True, **cut,
        )  # fmt: skip
        _choose_kernel[(len(h),)](
            parts, v, y, *out, blocks, mode, BLOCK, triton.next_power_of_2(blocks),
            enable_fp_fusion=True,
        )  # fmt: skip
    return token, logprob, entropy, logsumexp


@jit
def logits_tile(
    hidden, weight, n, vocabulary, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """This program's rows, columns, and the products of hidden's rows with weight's, added up
    in float32.
    """
    tiles = tl.cdiv(n, ROWS)
    # neighbours read the same part of the weight
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    z = product_tile(
        hidden, weight, rows, columns, n, vocabulary, D, ROWS, COLUMNS, INNER, UPCAST
    )
    return rows, columns, z


@jit
def first_above(running, weights, level, place, axis: tl.constexpr):
    """The first place along `axis` whose running sum exceeds the level; never one without
    weight, 0 among NaN.
    """
    last = tl.max(tl.where(weights > 0, place, 0), axis)
    above = tl.where((running > level) & (weights > 0), place, 1 << 30)
    # A level that rounding lifted to the total means the last
    return tl.minimum(tl.min(above, axis), last)


@jit
def _summarise(
    z,
    block,
    rows,
    u,
    target,
    parts,
    n,
    vocabulary,
    blocks,
    inverse,
    mode,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the five numbers of one block of each row, from its products z [ROWS, BLOCK]."""
    # The token is found in two steps: its group, then the token in it.
    GROUP: tl.constexpr = 16
    GROUPS: tl.constexpr = BLOCK // GROUP
    place = tl.arange(0, BLOCK)[None, :]
    group = tl.arange(0, GROUPS)[None, :]
    inner = tl.arange(0, GROUP)[None, :]
    here = rows < n
    z = tl.where(block * BLOCK + place < vocabulary, z * inverse, float("-inf"))
    top = tl.max(z, 1)
    z -= top[:, None]
    w = tl.exp(z)
    moment = tl.sum(tl.where(w > 0, z * w, 0.0), 1)
    groups = tl.sum(tl.reshape(w, (ROWS, GROUPS, GROUP)), 2)
    total = tl.sum(groups, 1)
    level = total
    candidate = tl.zeros((ROWS,), tl.int32)
    if mode == 2:  # TARGET
        candidate = (tl.load(target + rows, mask=here, other=0) % BLOCK).to(tl.int32)
    if mode == 4:  # GREEDY
        last = tl.minimum(BLOCK, vocabulary - block * BLOCK) - 1  # among NaN
        candidate = tl.min(tl.where(z == 0, place, last), 1)
    first = candidate // GROUP
    second = candidate % GROUP
    if mode == 3:  # DRAW
        level *= tl.load(u + 2 * rows + 1, mask=here, other=0.0)
        running = tl.cumsum(groups, 1)
        first = first_above(running, groups, level[:, None], group, 1)
        level -= tl.sum(tl.where(group == first[:, None], running - groups, 0.0), 1)
    # The group's exponentials are computed again: the registers do not hold those of the whole
    # block until here.
    chosen = (group == first[:, None])[:, :, None]
    within = tl.sum(tl.where(chosen, tl.reshape(z, (ROWS, GROUPS, GROUP)), 0.0), 1)
    if mode == 3:
        again = tl.exp(within)
        second = first_above(tl.cumsum(again, 1), again, level[:, None], inner, 1)
    value = tl.sum(tl.where(inner == second[:, None], within, 0.0), 1)
    part = parts + rows.to(tl.int64) * (5 * blocks) + block
    keep = rows < tl.where(block < blocks, n, 0)
    tl.store(part, top, mask=keep)
    tl.store(part + blocks, total, mask=keep)
    tl.store(part + 2 * blocks, moment, mask=keep)
    tl.store(part + 3 * blocks, (first * GROUP + second).to(tl.float32), mask=keep)
    tl.store(part + 4 * blocks, value, mask=keep)


# One binary for any n: Triton would compile 1, multiples of 16 and other numbers of rows apart.
@partial(jit, do_not_specialize=("n",))
def _blocks_kernel(
    hidden, weight, u, target, parts, n, vocabulary, blocks, inverse, mode,
    D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    rows, columns, z = logits_tile(
        hidden, weight, n, vocabulary, D, ROWS, COLUMNS, INNER, UPCAST
    )
    block = tl.program_id(0) // tl.cdiv(n, ROWS) * (COLUMNS // BLOCK)
    if COLUMNS == BLOCK:
        _summarise(
            z,
            block,
            rows,
            u,
            target,
            parts,
            n,
            vocabulary,
            blocks,
            inverse,
            mode,
            BLOCK,
            ROWS,
        )
    else:  # one half after the other, as the registers do not hold what both need at once
        left, right = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, BLOCK)), (0, 2, 1)))
        _summarise(
            left,
            block,
            rows,
            u,
            target,
            parts,
            n,
            vocabulary,
            blocks,
            inverse,
            mode,
            BLOCK,
            ROWS,
        )
        _summarise(
            right,
            block + 1,
            rows,
            u,
            target,
            parts,
            n,
            vocabulary,
            blocks,
            inverse,
            mode,
            BLOCK,
            ROWS,
        )


@jit
def _choose_kernel(
    parts,
    u,
    token,
    logprob,
    entropy,
    logsumexp,
    blocks,
    mode,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0)
    part = parts + row.to(tl.int64) * (5 * blocks)
    block = tl.arange(0, PADDED)
    here = block < blocks
    tops = tl.load(part + block, mask=here, other=float("-inf"))
    top = tl.max(tops, 0)
    scale = tl.exp(tops - top)
    mass = tl.load(part + blocks + block, mask=here, other=0.0) * scale
    moment = tl.load(part + 2 * blocks + block, mask=here, other=0.0) * scale
    moment = tl.sum(moment + tl.where(mass > 0, mass * (tops - top), 0.0), 0)
    total = tl.sum(mass, 0)
    log_total = tl.log(total)
    if mode == 2:  # TARGET
        y = tl.load(token + row)
        chosen = tl.where(y < 0, blocks, tl.minimum(y // BLOCK, blocks)).to(tl.int32)
    else:
        if mode == 3:  # DRAW
            chosen = first_above(
                tl.cumsum(mass, 0), mass, tl.load(u + 2 * row) * total, block, 0
            )
        else:
            chosen = tl.min(tl.where(tops == top, block, blocks - 1), 0)
        tl.store(
            token + row,
            chosen.to(tl.int64) * BLOCK
            + tl.load(part + 3 * blocks + chosen).to(tl.int64),
        )
    inside = chosen < blocks
    value = tl.load(part + 4 * blocks + chosen, mask=inside, other=float("nan"))
    value += tl.load(part + chosen, mask=inside, other=0.0) - top
    tl.store(logprob + row, value - log_total)
    tl.store(entropy + row, log_total - moment / total)
    tl.store(logsumexp + row, top + log_total)
