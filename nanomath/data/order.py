"""Which items a step trains on: a pure function of (seed, step), so there is no cursor to save
and none to lose.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def generator_of(*numbers: int) -> torch.Generator:
    """A generator for what is drawn as a function of these numbers, such as seed and step.

    Hashed, because torch looks at the lowest 32 bits of a seed only: of seed << 20 + step
    those are soon the same.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def step_indices(total: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The `batch_size` items of `step`: every epoch is its own permutation of range(total),
    read without gaps.

    A batch that crosses the end of an epoch goes on in the next one.
    """
    start = step * batch_size
    places = (divmod(place, total) for place in range(start, start + batch_size))
    return [_permutation(total, epoch, seed)[place] for epoch, place in places]


@lru_cache(maxsize=4)
def _permutation(total: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=generator_of(seed, epoch)).tolist()
