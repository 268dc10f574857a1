"""Realistic launches of the kernels at the end of a step, for the compile gate."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from gate import Case

from kernels import linear_logprob, lm_head
from kernels.philox import uniform_pair
from kernels.truncation import truncated_sample_triton

uniform_pair_triton = partial(uniform_pair, form="triton")

BF16, F16, F32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int64
CLASSES = ("mma", "wgmma", "tcgen05")


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def products(dim: int, vocabulary: int, cut: dict, dtype: torch.dtype = BF16) -> Case:
    """A forward and a backward launch with one of lm_head's tiles."""

    def launch() -> None:
        states, weight = meta(256, dim, dtype=dtype), meta(vocabulary, dim, dtype=dtype)
        numbers, dz = meta(256, dtype=F32), linear_logprob._aligned(256, weight)
        with mock.patch.object(lm_head, "tile", lambda _: cut):
            lm_head.sample_triton(states, weight, meta(256, 2, dtype=F32), 0.9)
            linear_logprob._logit_gradients(
                states, weight, meta(256, dtype=I64), numbers, numbers, 0.9, dz
            )

    name = f"products {dim} x {vocabulary} {str(dtype)[6:]} {cut['ROWS']} x {cut['COLUMNS']}"
    classes = (
        {} if dtype == F32 else {"_blocks_kernel": CLASSES, "_gradient_kernel": CLASSES}
    )
    return Case(
        name, launch, classes, sms=(90, 100) if cut is lm_head.WIDE else (80, 90, 100)
    )


def truncation(vocabulary: int, dtype: torch.dtype = BF16) -> Case:
    def launch() -> None:
        truncated_sample_triton(
            meta(256, vocabulary, dtype=dtype),
            meta(256, 2, dtype=F32),
            0.9,
            50,
            0.9,
            0.05,
        )

    return Case(f"truncation {vocabulary} {str(dtype)[6:]}", launch)


def noise(seed: int, counters: int) -> Case:
    def launch() -> None:
        uniform_pair_triton(seed, *[meta(256, 1024, dtype=I64)] * counters)

    return Case(f"noise {seed} {counters}", launch)


CASES = [
    products(1536, 151_936, lm_head.WIDE),  # Qwen2.5-1.5B
    products(896, 151_936, lm_head.WIDE, F16),  # Qwen2.5-0.5B
    products(576, 49_152, lm_head.WIDE),  # SmolLM2-135M
    products(40, 100, lm_head.WIDE),
    products(1536, 151_936, lm_head.NARROW),
    products(40, 1001, lm_head.NARROW),
    products(1536, 151_936, lm_head.FLOAT32, F32),
    products(40, 1001, lm_head.FLOAT32, F32),
    truncation(151_936),
    truncation(49_152, F16),
    truncation(151_936, F32),
    truncation(100, F32),
    noise(1, 1),
    noise(1 << 40, 4),
]
