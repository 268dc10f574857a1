"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A number is a pure function of (seed, counter), so a sample's noise does not depend on the batch, the slot or the order
in which it was drawn. Ten rounds of two 32x32 -> 64-bit multiplications, the key bumped between rounds; int64 tensors
hold the unsigned 32-bit words. The same integers and floats as `triton.language`'s `philox` and `rand`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * constant, in two halves because int64 cannot hold the unsigned 64-bit product."""
    upper, lower = word * (constant >> 16), word * (constant & 0xFFFF)
    middle = (lower >> 16) + (upper & 0xFFFF)
    return (upper >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(seed: int, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words (int64 tensors) for each 128-bit counter, given as four broadcastable int64 tensors."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)
    key_a, key_b = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        high_a, low_a = _multiply(c0, ROUND_A)
        high_b, low_b = _multiply(c2, ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + KEY_A) & WORD, (key_b + KEY_B) & WORD
    return c0, c1, c2, c3


def uniform(seed: int, *counters: Tensor) -> Tensor:
    """Float32 numbers in [0, 1) from the first word; up to four int64 counters, each below 2^32."""
    missing = [torch.zeros_like(counters[0])] * (4 - len(counters))
    word = philox(seed, (*counters, *missing))[0]
    signed = torch.where(word >= 2**31, word - 2**32, word)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.float() * 4.6566127342e-10  # just under 2^-31: the largest word stays below 1
