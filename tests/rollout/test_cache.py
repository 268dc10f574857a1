"""The cache, whose pages samples share: the same samples whoever shares, and every page named
rightly.
"""

from __future__ import annotations

import random

import pytest
import torch

from kernels import compiled, packed
from nanomath.rollout import Sampler
from nanomath.rollout.cache import Cache
from nanomath.rollout.engine import bucket

EOS = range(0, 1000, 25)
library = compiled.library
PROMPTS = [
    [5],
    [7, 300, 12, 44],
    [9] * 11,
    [700, 3, 3],
    [1, 2, 3, 4, 5, 6],
    [3] * 30,
    list(range(1, 26)),
]


@pytest.fixture(params=["small", "cpu", "reference"])
def form(request, monkeypatch) -> str:
    """Runs the test with the step of a small model, with the CPU forms of the kernels, and
    with the references.
    """
    if request.param == "cpu":
        monkeypatch.setattr(packed, "SMALL", 0)
    if request.param == "reference":
        monkeypatch.setattr(compiled, "library", lambda: None)
    return request.param


def keeping(model, tokenizer, slots: int, **options) -> Sampler:
    """A sampler that keeps its engine between calls, as on a GPU."""
    sampler = Sampler(model, tokenizer, slots, **options)
    sampler.keep = options.get("keep", True)
    return sampler


@pytest.mark.parametrize(
    ("slots", "check_every", "share_prompts"),
    [
        (3, 5, True),
        (16, 1, False),
        pytest.param(1, 1, True, marks=pytest.mark.slow),
        pytest.param(1, 1, False, marks=pytest.mark.slow),
        pytest.param(3, 5, False, marks=pytest.mark.slow),
        pytest.param(16, 1, True, marks=pytest.mark.slow),
        pytest.param(64, 8, True, marks=pytest.mark.slow),
        pytest.param(64, 8, False, marks=pytest.mark.slow),
    ],
)
def test_the_same_samples(
    form, new_model, new_tokenizer, family_shape, slots, check_every, share_prompts
):
    model, tokenizer, options = (
        new_model(1, **family_shape),
        new_tokenizer(EOS),
        {"n": 4, "max_new_tokens": 30},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "library", library)
        expected = Sampler(model, tokenizer, 4).generate(PROMPTS, seed=1, **options)
    sampler = keeping(model, tokenizer, slots, share_prompts=share_prompts)
    sampler.check_every = check_every
    for _ in range(2):  # the second time in a cache that is not fresh
        found = sampler.generate(PROMPTS, seed=1, **options)
        assert [c.tokens for c in found] == [c.tokens for c in expected]
        for one, other in zip(found, expected, strict=True):
            # float32, added up in other orders
            assert one.logprobs == pytest.approx(other.logprobs, abs=3e-5)


def test_stale_keys_are_never_seen(new_model, new_tokenizer):
    """NaN in all that a new call finds in the cache."""
    model, tokenizer = new_model(1), new_tokenizer(EOS)
    sampler = keeping(model, tokenizer, 5)
    expected = sampler.generate(PROMPTS, n=3, max_new_tokens=20)
    cache = sampler._engine.cache
    for kept in cache.pages[:2]:
        kept.fill_(torch.nan)
    assert sampler.generate(PROMPTS, n=3, max_new_tokens=20) == expected
    assert sampler._engine.cache is cache


def test_an_engine_is_kept_while_it_is_large_enough(new_model, new_tokenizer):
    sampler = keeping(new_model(1), new_tokenizer(EOS), 4)
    sampler.generate(PROMPTS[:4], n=2, max_new_tokens=20)
    first = sampler._engine
    sampler.generate(PROMPTS[:2], n=2, max_new_tokens=10)
    assert sampler._engine is first
    sampler.generate(PROMPTS[:2], n=2, max_new_tokens=40)
    assert sampler._engine is not first
    sampler.release()
    assert sampler._engine is None
    once = keeping(new_model(1), new_tokenizer(EOS), 4, keep=False)
    once.generate(PROMPTS[:4], n=2, max_new_tokens=20)
    assert once._engine is None


def test_pages_are_shared_and_given_back(new_model, new_tokenizer, monkeypatch):
    """Each prompt is in the cache once, whatever its samples, and no page is named twice for
    writing.
    """
    sampler = keeping(new_model(1), new_tokenizer(EOS), 6)
    run = []
    original = type(sampler).engine

    def engine(self, *sizes):
        run.append(original(self, *sizes))
        return run[-1]

    monkeypatch.setattr(type(sampler), "engine", engine)

    def look(finished: int, drawn: int, live: int, context: float) -> None:
        cache, slots = run[0].cache, run[0].slots
        own = cache.own[:live].tolist()
        assert len({page for pages in own for page in pages}) == live * cache.slot_pages
        for row, number in enumerate(cache.prompt_of[:live]):
            full = cache.full[number]
            first = cache._prompt_page(number)
            assert cache.pages.table[row].tolist() == [
                *range(first, first + full),
                *own[row][full:],
            ]
            assert slots.sample[row] // 3 == number

    sampler.generate(PROMPTS, n=3, max_new_tokens=20, progress=look)
    assert not run[0].cache.place and len(run[0].cache.free) == run[0].cache.places


def test_groups_become_tiles(new_model, new_tokenizer, monkeypatch):
    """On a GPU, where prompts have two full pages or more."""
    original, tiles = Cache.arrange, []

    def arrange(cache: Cache, live: int) -> int:
        cache.cascades, cache.grouped = True, 0
        tiles.append(original(cache, live))
        rows = [row for row in cache.tiles[: tiles[-1]].flatten().tolist() if row >= 0]
        assert sorted(rows) == list(range(live))
        for tile, shared in zip(
            cache.tiles[: tiles[-1]].tolist(), cache.shared.tolist(), strict=False
        ):
            assert (
                len(
                    {
                        tuple(cache.pages.table[row, :shared].tolist())
                        for row in tile
                        if row >= 0
                    }
                )
                == 1
            )
        assert set(cache.shared[: tiles[-1]].tolist()) <= {2, 3}
        return tiles[-1]

    monkeypatch.setattr(Cache, "arrange", arrange)
    Sampler(new_model(1, torch.bfloat16), new_tokenizer(()), 6).generate(
        [[3] * 40, [7] * 50], n=3, max_new_tokens=3
    )
    assert tiles == [2, 2, 2]


def test_buckets():
    draw = random.Random(0)
    assert [
        bucket(n, 100) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25, 70, 97)
    ] == [
        *(0, 1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32, 96, 100),
    ]
    for n in (draw.randrange(2, 5000) for _ in range(200)):
        assert n <= bucket(n, 8192) <= n * 1.5


def test_too_little_memory(new_model, new_tokenizer, monkeypatch):
    sampler = Sampler(new_model(1), new_tokenizer(EOS), 4)
    monkeypatch.setattr("nanomath.rollout.sampler.free_memory", lambda device: 100)
    with pytest.raises(
        MemoryError,
        match="^a sequence of 34 tokens needs 0.00 GiB of keys and values, and cpu has 0.00",
    ):
        sampler.generate([PROMPTS[1]], n=4, max_new_tokens=30)
    monkeypatch.setattr("nanomath.rollout.sampler.free_memory", lambda device: 60_000)
    with pytest.warns(
        UserWarning, match="^[123] of 4 slots fit into the memory that is free"
    ):
        found = sampler.generate([PROMPTS[1]], n=4, max_new_tokens=30)
    assert len(found) == 4
