"""Attention in training: by kernels/cpu.cpp it is what PyTorch's is, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import causal_attention as module
from kernels import compiled
from kernels.causal_attention import causal_attention, library_attention

pytestmark = pytest.mark.skipif(
    not compiled.runs_compiled(torch.empty(0)), reason="there is no C++ compiler"
)
EPS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def inputs(
    sequences: int,
    heads: tuple[int, int],
    queries: int,
    keys: int,
    size: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q, k, v and a gradient of the output, as the model has them: tokens before heads."""
    generator = torch.Generator().manual_seed(seed)
    many, few = heads[0] * heads[1], heads[1]
    shapes = (queries, many), (keys, few), (keys, few), (queries, many)
    return [
        torch.randn(sequences, *shape, size, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        for shape in shapes
    ]


def with_gradients(function, tensors: list[Tensor], *options) -> list[Tensor]:
    *given, gradient = tensors
    given = [x.detach().requires_grad_() for x in given]
    out = function(*given, *options)
    return [out.detach(), *torch.autograd.grad(out, given, gradient)]


def assert_near(found: list[Tensor], expected: list[Tensor], eps: float) -> None:
    """Near beside numbers of the order of 1, which a gradient is that cancels to 0."""
    for one, other in zip(found, expected, strict=True):
        size = float(other.norm()) + other.numel() ** 0.5
        assert float((one.double() - other).norm()) <= eps * size


@settings(max_examples=80, deadline=None)
@given(
    sequences=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    queries=st.sampled_from([1, 2, 9, 63, 64, 65, 130]),
    before=st.sampled_from([0, 1, 15, 16, 40]),
    size=st.sampled_from([2, 8, 16, 20, 32, 64]),
    window=st.sampled_from([None, 1, 2, 17, 70]),
    dtype=st.sampled_from(list(EPS)),
    seed=st.integers(0, 99),
)
def test_it_is_the_librarys(
    sequences, heads, queries, before, size, window, dtype, seed
):
    tensors = inputs(sequences, heads, queries, queries + before, size, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, before + 1, (sequences,), generator=generator)
    expected = with_gradients(
        library_attention, [x.double() for x in tensors], first, window
    )
    found = with_gradients(causal_attention, tensors, first, window)
    assert all(x.dtype == dtype for x in found)
    assert_near(found, expected, EPS[dtype])


def test_without_first_a_row_is_whole():
    tensors = inputs(2, (2, 1), 33, 33, 8)
    expected = with_gradients(library_attention, [x.double() for x in tensors])
    assert_near(with_gradients(causal_attention, tensors), expected, 2e-6)


def test_large_scores_do_not_overflow():
    tensors = [50 * x for x in inputs(1, (1, 2), 40, 40, 16)]
    expected = with_gradients(library_attention, [x.double() for x in tensors])
    found = with_gradients(causal_attention, tensors)
    assert all(x.isfinite().all() for x in found)
    assert_near(found[:1], expected[:1], 1e-5)


def test_what_stands_beyond_the_end_is_seen_by_nothing():
    """Of rows that are padded: neither its values nor its queries change what comes before."""
    tensors = inputs(2, (2, 2), 30, 50, 16)
    first = torch.tensor([20, 5])
    tensors[3][1, :, 20:] = 0  # of queries that are not there
    plain = with_gradients(causal_attention, tensors, first)
    for x in tensors[1:3]:
        x[1, :, 25:] = 1e4  # and of keys
    tensors[0][1, :, 20:] = 7.0
    noisy = with_gradients(causal_attention, tensors, first)
    assert torch.equal(noisy[0][1, :, :20], plain[0][1, :, :20])
    assert torch.equal(noisy[0][0], plain[0][0])
    for one, other in zip(noisy[2:], plain[2:], strict=True):
        assert torch.equal(one[1, :, :25], other[1, :, :25])


def test_a_row_has_the_same_bits_in_every_batch():
    tensors = inputs(3, (3, 2), 70, 90, 32)
    first = torch.tensor([0, 20, 7])
    whole = with_gradients(causal_attention, tensors, first)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone = with_gradients(causal_attention, [x[1:2] for x in tensors], first[1:2])
        assert all(torch.equal(a, w[1:2]) for a, w in zip(alone, whole, strict=True))
    torch.set_num_threads(before)


def test_it_keeps_one_number_a_query_beside_its_arguments():
    q, k, v, _ = inputs(2, (4, 1), 50, 60, 16)
    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = causal_attention(
            *(x.requires_grad_() for x in (q, k, v)), torch.tensor([10, 3])
        )
    sizes = sorted(x.numel() for x in kept)
    assert sizes == sorted(
        [q.numel(), k.numel(), v.numel(), out.numel(), 2 * 4 * 50, 2]
    )


def test_other_types_are_the_librarys():
    q, k, v, _ = (x.double() for x in inputs(1, (2, 1), 9, 9, 8))
    assert torch.equal(causal_attention(q, k, v), library_attention(q, k, v))


def test_without_a_compiler_it_is_the_librarys(monkeypatch):
    q, k, v, _ = inputs(1, (2, 1), 9, 9, 8)
    monkeypatch.setattr(module.compiled, "runs_compiled", lambda x: False)
    assert torch.equal(causal_attention(q, k, v), library_attention(q, k, v))
