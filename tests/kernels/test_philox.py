"""Philox-4x32-10 against the authors' known answers, against Triton's, and as uniform numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kernels.philox import WORD, philox, uniform

ROOT = Path(__file__).parents[2]

# Random123's kat_vectors: counter, key -> output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

TRITON = """
import torch, triton, triton.language as tl
from kernels.philox import philox, uniform

@triton.jit
def draw(words, floats, counters, seed, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    c0, c1, c2, c3 = (tl.load(counters + k * SIZE + i).to(tl.uint32) for k in (0, 1, 2, 3))
    a, b, c, d = tl.philox(seed, c0, c1, c2, c3)
    tl.store(words + i, a.to(tl.int64) & 0xFFFFFFFF)
    tl.store(words + SIZE + i, b.to(tl.int64) & 0xFFFFFFFF)
    tl.store(words + 2 * SIZE + i, c.to(tl.int64) & 0xFFFFFFFF)
    tl.store(words + 3 * SIZE + i, d.to(tl.int64) & 0xFFFFFFFF)
    tl.store(floats + i, tl.rand(seed, c0))

for seed in (0, 1, 1 << 40, (7 << 32) + 123, (1 << 63) - 1):
    counters = torch.randint(0, 2**32, (4, 256), generator=torch.Generator().manual_seed(seed % 1000))
    words, floats = torch.zeros(4, 256, dtype=torch.int64), torch.zeros(256)
    draw[(1,)](words, floats, counters, seed, SIZE=256)
    assert torch.equal(words, torch.stack(philox(seed, tuple(counters)))), seed
    assert torch.equal(floats, uniform(seed, counters[0])), seed
"""


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    low, high = words(key)
    found = philox((high << 32) | low, tuple(torch.tensor([word]) for word in words(counter)))
    assert [int(word) for word in found] == words(output)


def test_known_answers_side_by_side_with_a_scalar_broadcast():
    counters = torch.tensor([words(counter) for counter, key, _ in KNOWN_ANSWERS if key.startswith("0000")] * 2)
    found = philox(0, (counters[:, 0], torch.tensor(0), counters[:, 2], counters[:, 3]))
    assert torch.stack(found, dim=1).tolist() == [words(KNOWN_ANSWERS[0][2])] * 2


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_same_numbers_as_triton(tmp_path):
    script = tmp_path / "draw.py"  # Triton reads a kernel's source from its file
    script.write_text(TRITON)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_uniform_is_uniform():
    u = uniform(3, torch.arange(200_000), torch.tensor(5)).double()
    assert float(u.min()) >= 0 and float(u.max()) < 1
    for power in (1, 2, 3):
        assert float((u**power).mean()) == pytest.approx(1 / (power + 1), abs=4e-3)
    shares = torch.histc(u, 100, 0, 1) / len(u)
    assert float((shares - 0.01).abs().max()) < 0.001
    assert abs(float(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1])) < 0.01


def test_even_the_largest_word_stays_below_one(monkeypatch):
    extremes = torch.tensor([0, 2**31 - 1, 2**31, WORD])
    monkeypatch.setattr("kernels.philox.philox", lambda seed, counters: (extremes,) * 4)
    u = uniform(0, torch.zeros(4, dtype=torch.int64))
    assert u.dtype == torch.float32 and (u >= 0).all() and (u < 1).all()
    assert u[0] == 0 and u[1] > 0.999999


def test_every_counter_and_both_halves_of_the_seed_matter():
    zero, one = torch.tensor([0]), torch.tensor([1])
    keys = [[one if k == place else zero for k in range(4)] for place in range(4)]
    drawn = {float(uniform(0, *key)) for key in keys} | {float(uniform(seed, zero)) for seed in (0, 1, 1 << 32)}
    assert len(drawn) == 7
    assert torch.equal(uniform(9, one), uniform(9, one, zero, zero, zero))
