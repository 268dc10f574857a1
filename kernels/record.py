"""The end of a decoding step: what each row drew is written down, and the row goes on or is
done.

    written_m[count_m] = drawn_m,   count_m += 1,   position_m += 1
    done_m = drawn_m in eos or count_m >= limit_m

A row that was done before stays as it is, and writes into a spare last column. PyTorch takes a
dozen small operations for this, which in a CUDA graph are as many kernels; here it is one
launch, BLOCK rows a program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import jit, runs_triton, tl, triton

BLOCK = 128

Drawn = tuple[Tensor, Tensor, Tensor]


def record(
    drawn: Drawn, state: Sequence[Tensor], eos: Tensor, form: str | None = None
) -> None:
    """Record what was drawn: tokens int64 [n], their logprobs and sampling logprobs float32
    [n]; all in place.

    state, contiguous: the rows' last token int64, position int32, count and limit int64, done
    bool, each [n]; and what is written, tokens int64, logprobs and sampling logprobs float32,
    each [n, width + 1]. eos int64 [k].
    """
    form = form or ("triton" if runs_triton(eos) else "reference")
    if form == "reference":
        record_reference(drawn, state, eos)
        return
    if not all(tensor.is_contiguous() for tensor in (*drawn, *state)):
        raise ValueError("the rows' state must be contiguous: it is changed in place")
    rows = len(drawn[0])
    columns = state[-1].shape[1]
    if rows:
        grid = (triton.cdiv(rows, BLOCK),)
        _record_kernel[grid](
            *drawn, *state, eos, rows, columns, EOS=len(eos), BLOCK=BLOCK, num_warps=4
        )


def record_reference(drawn: Drawn, state: Sequence[Tensor], eos: Tensor) -> None:
    """Do what `record` does in PyTorch."""
    token, position, count, limit, done, *written = state
    going = ~done
    column = torch.where(done, written[0].shape[1] - 1, count)[:, None]
    for matrix, values in zip(written, drawn, strict=True):
        matrix.scatter_(1, column, values[:, None])
    count += going
    position += going
    done |= drawn[0][:, None].eq(eos).any(1) | (count >= limit)
    token.copy_(drawn[0])


@jit
def _record_kernel(
    drawn, logprob, sampling_logprob, token, position, count, limit, done, tokens, logprobs,
    sampling_logprobs, eos, rows, columns, EOS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    new = tl.load(drawn + row, mask=here, other=0)
    was_done = tl.load(done + row, mask=here, other=1).to(tl.int32) > 0
    at = tl.load(count + row, mask=here, other=0)
    place = row.to(tl.int64) * columns + tl.where(was_done, columns - 1, at)
    tl.store(tokens + place, new, mask=here)
    tl.store(logprobs + place, tl.load(logprob + row, mask=here), mask=here)
    tl.store(
        sampling_logprobs + place, tl.load(sampling_logprob + row, mask=here), mask=here
    )
    tl.store(token + row, new, mask=here)

    going = here & (was_done == 0)
    tl.store(count + row, at + 1, mask=going)
    tl.store(position + row, tl.load(position + row, mask=going) + 1, mask=going)
    ended = at + 1 >= tl.load(limit + row, mask=here, other=0)
    for i in tl.static_range(EOS):
        ended |= new == tl.load(eos + i)
    tl.store(done + row, was_done | ended, mask=here)
