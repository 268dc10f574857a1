"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011).

A number is a pure function of (seed, counter), so a sample's noise does not depend on the
batch, the slot or the order in which it was drawn. Ten rounds of two 32x32 -> 64-bit
multiplications, the key bumped between rounds; int64 tensors hold the unsigned 32-bit words.
The same integers and floats as `triton.language`'s `philox` and `rand`; the Triton form of
`uniform_pair` calls the former, one pair a lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import jit, runs_triton, tl, triton

ROUND_A = 0xD2511F53
ROUND_B = 0xCD9E8D57
KEY_A = 0x9E3779B9
KEY_B = 0xBB67AE85
WORD = 0xFFFFFFFF


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * constant, in two halves because int64 cannot hold the
    unsigned 64-bit product.
    """
    upper = word * (constant >> 16)
    lower = word * (constant & 0xFFFF)
    middle = (lower >> 16) + (upper & 0xFFFF)
    return (upper >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(
    seed: int, counters: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words (int64 tensors) for each 128-bit counter, given as four
    broadcastable int64 tensors.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)
    key_a = seed & WORD
    key_b = (seed >> 32) & WORD
    for _ in range(10):
        high_a, low_a = _multiply(c0, ROUND_A)
        high_b, low_b = _multiply(c2, ROUND_B)
        c0 = high_b ^ c1 ^ key_a
        c1 = low_b
        c2 = high_a ^ c3 ^ key_b
        c3 = low_a
        key_a = (key_a + KEY_A) & WORD
        key_b = (key_b + KEY_B) & WORD
    return c0, c1, c2, c3


def uniform_pair(seed: int, *counters: Tensor, form: str | None = None) -> Tensor:
    """Return two float32 numbers in [0, 1) [..., 2], made of the first two words.

    Up to four int64 counters that broadcast, each below 2^32, those not given being 0.
    """
    form = form or ("triton" if runs_triton(counters[0]) else "reference")
    if form == "reference":
        zero = torch.zeros_like(counters[0])
        c0, c1, c2, c3 = (*counters, zero, zero, zero)[:4]
        words = philox(seed, (c0, c1, c2, c3))[:2]
        return torch.stack([_to_unit(word) for word in words], dim=-1)
    counters = [counter.contiguous() for counter in torch.broadcast_tensors(*counters)]
    out = counters[0].new_empty(*counters[0].shape, 2, dtype=torch.float32)
    n = counters[0].numel()
    if n:
        c0, c1, c2, c3 = (*counters, None, None, None)[:4]
        _pair_kernel[(triton.cdiv(n, 256),)](
            out, c0, c1, c2, c3, seed, n, SIZE=256, num_warps=4
        )
    return out


def _to_unit(word: Tensor) -> Tensor:
    signed = torch.where(word >= 2**31, word - 2**32, word)
    folded = torch.where(signed < 0, -signed - 1, signed)
    # just under 2^-31: the largest word stays below 1
    return folded.float() * 4.6566127342e-10


@jit
def _pair_kernel(out, c0, c1, c2, c3, seed, n, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    here = place < n
    zero = tl.zeros((SIZE,), tl.uint32)
    a = tl.load(c0 + place, mask=here, other=0).to(tl.uint32)
    b = zero if c1 is None else tl.load(c1 + place, mask=here, other=0).to(tl.uint32)
    c = zero if c2 is None else tl.load(c2 + place, mask=here, other=0).to(tl.uint32)
    d = zero if c3 is None else tl.load(c3 + place, mask=here, other=0).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, a, b, c, d)
    tl.store(out + 2 * place, tl.uint_to_uniform_float(first), mask=here)
    tl.store(out + 2 * place + 1, tl.uint_to_uniform_float(second), mask=here)
