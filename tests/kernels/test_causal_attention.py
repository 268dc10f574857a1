"""Attention in training: by kernels/cpu.cpp and by PyTorch it is what float64 says, and so are its
gradients.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import causal_attention as module
from kernels import compiled
from kernels.causal_attention import (
    Pieces,
    causal_attention,
    library_attention,
    whole_rows,
)
from kernels.rope_write import apply_rope, rope_tables

needs_compiler = pytest.mark.skipif(
    not compiled.runs_compiled(torch.empty(0)), reason="there is no C++ compiler"
)
EPS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
LENGTHS = st.sampled_from([1, 2, 9, 15, 16, 63, 64, 65, 130])


def cut(lengths: list[int], origins: list[int]) -> Pieces:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return Pieces(torch.tensor([starts, lengths, origins]).T.contiguous())


@st.composite
def pieces(draw) -> Pieces:
    """Sequences, and what goes on from some of them, in any order."""
    lengths, origins = [], []
    for _ in range(draw(st.integers(1, 6))):
        begun = [i for i, origin in enumerate(origins) if origin < 0]
        origins.append(draw(st.sampled_from([-1, *begun])))
        lengths.append(draw(LENGTHS))
    return cut(lengths, origins)


SHARED = cut([40, 7, 70, 1, 30], [-1, 0, 0, -1, 3])


def inputs(
    pieces: Pieces,
    heads: tuple[int, int] = (2, 2),
    size: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, int, tuple[Tensor, Tensor]]:
    """heads [N, H + 2 K, E], K, and cos and sin of any positions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(pieces.table[:, 1].sum())
    width = heads[0] * heads[1] + 2 * heads[1]
    drawn = torch.randn(tokens, width, size, generator=generator).to(dtype)
    position = torch.randint(500, (tokens,), generator=generator)
    frequencies = 10.0 ** -torch.arange(size // 2)
    return drawn, heads[1], rope_tables(frequencies, position, dtype)


def gradient_like(heads: Tensor, kv_heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    shape = len(heads), heads.shape[1] - 2 * kv_heads, heads.shape[2]
    return torch.randn(shape, generator=generator).to(heads.dtype)


def with_gradients(function, heads, kv_heads, rope, *options, seed=0) -> list[Tensor]:
    given = heads.detach().requires_grad_()
    out = function(given, kv_heads, rope, *options)
    gradient = gradient_like(heads, kv_heads, seed)
    return [out.detach(), *torch.autograd.grad(out, given, gradient)]


def one_by_one(
    heads: Tensor, kv_heads: int, rope: tuple, pieces: Pieces, window: int | None
) -> Tensor:
    """What each token sees, gathered for it, in float64."""
    wide = heads.double()
    q, k, v = wide.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = (x.double()[:, None] for x in rope)
    groups = q.shape[1] // kv_heads
    q = apply_rope(q, cos, sin)
    k = apply_rope(k, cos, sin).repeat_interleave(groups, 1)
    v = v.repeat_interleave(groups, 1)
    found = []
    for start, length, origin in pieces.table.tolist():
        before = []
        if origin >= 0:
            begin, count, _ = pieces.table[origin].tolist()
            before = list(range(begin, begin + count))
        for end in range(start, start + length):
            seen = [*before, *range(start, end + 1)][-(window or 10**9) :]
            scores = torch.einsum("he,the->ht", q[end], k[seen]) / q.shape[2] ** 0.5
            found.append(torch.einsum("ht,the->he", scores.softmax(1), v[seen]))
    return torch.stack(found)


def assert_near(found: list[Tensor], expected: list[Tensor], eps: float) -> None:
    """Near beside numbers of the order of 1, which a gradient is that cancels to 0."""
    for one, other in zip(found, expected, strict=True):
        size = float(other.norm()) + other.numel() ** 0.5
        assert float((one.double() - other).norm()) <= eps * size


@pytest.mark.parametrize("window", [None, 1, 11])
def test_by_pytorch_it_is_the_definition(window):
    heads, few, rope = inputs(SHARED, (2, 1), 8)
    double = heads.double(), few, tuple(x.double() for x in rope)
    expected = with_gradients(one_by_one, *double, SHARED, window)
    found = with_gradients(library_attention, *double, SHARED, window)
    assert_near(found, expected, 1e-12)


@needs_compiler
@settings(max_examples=80, deadline=None)
@given(
    pieces=pieces(),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.sampled_from([2, 8, 16, 20, 32, 64]),
    window=st.sampled_from([None, 1, 2, 17, 70]),
    dtype=st.sampled_from(list(EPS)),
    seed=st.integers(0, 99),
)
def test_it_is_the_librarys(pieces, heads, size, window, dtype, seed):
    drawn, few, rope = inputs(pieces, heads, size, seed, dtype)
    double = drawn.double(), few, tuple(x.double() for x in rope)
    expected = with_gradients(library_attention, *double, pieces, window, seed=seed)
    found = with_gradients(
        causal_attention, drawn, few, rope, pieces, window, seed=seed
    )
    assert all(x.dtype == dtype for x in found)
    assert_near(found, expected, EPS[dtype])


@needs_compiler
def test_large_scores_do_not_overflow():
    heads, few, rope = inputs(SHARED)
    double = 50 * heads.double(), few, tuple(x.double() for x in rope)
    found = with_gradients(causal_attention, 50 * heads, few, rope, SHARED)
    assert all(x.isfinite().all() for x in found)
    assert_near(found[:1], [library_attention(*double, SHARED)], 1e-4)


@needs_compiler
def test_what_a_piece_does_not_see_changes_nothing():
    """Neither what stands in other pieces nor what comes after it in its own."""
    heads, few, rope = inputs(SHARED)
    plain = causal_attention(heads, few, rope, SHARED)
    starts = [0, *SHARED.table[:, 1].cumsum(0).tolist()]
    for i, (start, end) in enumerate(pairwise(starts)):
        noisy = heads.clone()
        noisy[start + (end - start) // 2 : end] = 7.0
        found = causal_attention(noisy, few, rope, SHARED)
        changed = (found != plain).flatten(1).any(1)
        heirs = [j for j in range(5) if SHARED.table[j, 2] == i]
        expected = torch.zeros(len(heads), dtype=bool)
        expected[start + (end - start) // 2 : end] = True
        for j in heirs:
            expected[starts[j] : starts[j + 1]] = True
        assert torch.equal(changed, expected)


@needs_compiler
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_a_piece_has_the_same_bits_in_every_row(dtype):
    """With any number of threads, and whatever stands beside it and what it goes on from."""
    heads, few, rope = inputs(SHARED, (3, 2), 32, dtype=dtype)
    whole = with_gradients(causal_attention, heads, few, rope, SHARED)
    part = Pieces(torch.tensor([[0, 1, -1], [1, 30, 0]]))
    gradient = gradient_like(heads, few, 0)[117:]
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        again = with_gradients(causal_attention, heads, few, rope, SHARED)
        assert all(torch.equal(*pair) for pair in zip(again, whole, strict=True))
        given = heads[117:].clone().requires_grad_()
        alone = causal_attention(given, few, tuple(x[117:] for x in rope), part)
        assert torch.equal(alone, whole[0][117:])
        (found,) = torch.autograd.grad(alone, given, gradient)
        assert torch.equal(found, whole[1][117:])
    torch.set_num_threads(before)


@needs_compiler
def test_it_keeps_one_number_a_query_beside_its_arguments():
    heads, few, rope = inputs(SHARED, (4, 1))
    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = causal_attention(heads.requires_grad_(), few, rope, SHARED)
    beside = [rope[0].numel()] * 2 + [4 * len(heads), 3 * 5]
    sizes = sorted(x.numel() for x in kept)
    assert sizes == sorted([heads.numel(), out.numel(), *beside])


def test_whole_rows_are_pieces():
    expected = [[0, 4, -1], [4, 4, -1], [8, 4, -1]]
    assert whole_rows(3, 4).table.tolist() == expected
    assert whole_rows(0, 4).table.shape == (0, 3)
    assert whole_rows(2, 0).table.shape[1] == 3


def test_other_types_are_the_librarys():
    heads, few, rope = inputs(SHARED, dtype=torch.float64)
    expected = library_attention(heads, few, rope, SHARED)
    assert torch.equal(causal_attention(heads, few, rope, SHARED), expected)


def test_without_a_compiler_it_is_the_librarys(monkeypatch):
    given = *inputs(SHARED), SHARED
    monkeypatch.setattr(module.compiled, "runs_compiled", lambda x: False)
    assert torch.equal(causal_attention(*given), library_attention(*given))
