"""Which items a step trains on: a pure function of (seed, step), so that there is no cursor
to save and none to lose.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def generator_of(*numbers: int) -> torch.Generator:
    """Return a random generator that is a function of these numbers, such as seed and step.

    The numbers are hashed, because torch uses the lowest 32 bits of a seed only: those of
    seed << 20 + step would soon repeat.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def step_indices(total: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the indices of the `batch_size` items that `step` trains on.

    Every epoch is a permutation of range(total) of its own, and the steps read one epoch
    after the other without gaps; a batch may cross the end of an epoch.
    """
    start = step * batch_size
    places = (divmod(place, total) for place in range(start, start + batch_size))
    return [_permutation(total, epoch, seed)[place] for epoch, place in places]


@lru_cache(maxsize=4)
def _permutation(total: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(total, generator=generator_of(seed, epoch)).tolist()
