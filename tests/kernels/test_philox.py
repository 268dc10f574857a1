"""Philox-4x32-10 against the authors' known answers, against Triton's, and as uniform numbers."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch

from kernels.philox import (
    WORD,
    philox,
    uniform_pair,
)

uniform_pair_triton = partial(uniform_pair, form="triton")
uniform_pair_reference = partial(uniform_pair, form="reference")

# Random123's kat_vectors: counter, key -> output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def first_of_pair(seed: int, *counters: torch.Tensor) -> torch.Tensor:
    return uniform_pair(seed, *counters)[..., 0]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    low, high = words(key)
    found = philox(
        (high << 32) | low, tuple(torch.tensor([word]) for word in words(counter))
    )
    assert [int(word) for word in found] == words(output)


def test_known_answers_side_by_side_with_a_scalar_broadcast():
    counters = torch.tensor(
        [words(counter) for counter, key, _ in KNOWN_ANSWERS if key.startswith("0000")]
        * 2
    )
    found = philox(0, (counters[:, 0], torch.tensor(0), counters[:, 2], counters[:, 3]))
    assert torch.stack(found, dim=1).tolist() == [words(KNOWN_ANSWERS[0][2])] * 2


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "seed", [0, 1, 16, WORD, 1 << 40, (7 << 32) + 123, (1 << 63) - 1]
)
def test_the_same_numbers_as_triton(kernel_device, seed):
    """Over a last program that is not full, with counters that are broadcast, missing, or not
    contiguous.
    """
    # What is never written is NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    counters = torch.randint(
        0, 2**32, (4, 3, 101), generator=torch.Generator().manual_seed(seed % 1000)
    )
    for given in (
        counters[:1],
        counters,
        counters.transpose(1, 2),
        (counters[0], counters[1, :, :1], counters[2, 0]),
    ):
        found = uniform_pair_triton(
            seed, *[counter.to(kernel_device) for counter in given]
        )
        assert torch.equal(found.cpu(), uniform_pair_reference(seed, *given))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_pair_is_the_first_two_words(number):
    counters = torch.randint(
        0, 2**32, (number, 500), generator=torch.Generator().manual_seed(number)
    )
    missing = [torch.zeros_like(counters[0])] * (4 - number)
    words = philox(5, (*counters, *missing))
    for found, word in zip(uniform_pair(5, *counters).unbind(-1), words, strict=False):
        folded = torch.where(word < 2**31, word, 2**32 - 1 - word).double()
        torch.testing.assert_close(found.double(), folded / 2**31, rtol=0, atol=1e-7)
    assert uniform_pair(5, *counters[:, :0]).shape == (0, 2)


def test_uniform_is_uniform():
    u = first_of_pair(3, torch.arange(200_000), torch.tensor(5)).double()
    assert float(u.min()) >= 0 and float(u.max()) < 1
    for power in (1, 2, 3):
        assert float((u**power).mean()) == pytest.approx(1 / (power + 1), abs=4e-3)
    shares = torch.histc(u, 100, 0, 1) / len(u)
    assert float((shares - 0.01).abs().max()) < 0.001
    assert abs(float(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1])) < 0.01


def test_even_the_largest_word_stays_below_one(monkeypatch):
    extremes = torch.tensor([0, 2**31 - 1, 2**31, WORD])
    monkeypatch.setattr("kernels.philox.philox", lambda seed, counters: (extremes,) * 4)
    u = first_of_pair(0, torch.zeros(4, dtype=torch.int64))
    assert u.dtype == torch.float32 and (u >= 0).all() and (u < 1).all()
    assert u[0] == 0 and u[1] > 0.999999


def test_every_counter_and_both_halves_of_the_seed_matter():
    zero, one = torch.tensor([0]), torch.tensor([1])
    keys = [[one if k == place else zero for k in range(4)] for place in range(4)]
    drawn = {float(first_of_pair(0, *key)) for key in keys} | {
        float(first_of_pair(seed, zero)) for seed in (0, 1, 1 << 32)
    }
    assert len(drawn) == 7
    assert torch.equal(first_of_pair(9, one), first_of_pair(9, one, zero, zero, zero))
