"""The exact attention: against float64, and that a token depends on what it sees alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels import exact_attention as module
from kernels.causal_attention import Pieces, causal_attention, whole_rows
from kernels.exact_attention import check_rows, exact_attention, in_pages
from kernels.rope_write import rope_tables


def qkv(
    batch: int, heads: int, kv_heads: int, tokens: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, n, tokens, size) for n in (heads, kv_heads, kv_heads))
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    )


def brute_force(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    place = torch.arange(q.shape[2])
    seen = place[None, :] <= place[:, None]
    seen &= place[None, :] > place[:, None] - (window or len(place))
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(
        ~seen, -torch.inf
    )
    return scores.softmax(-1) @ v


def zeros(batch: int) -> torch.Tensor:
    return torch.zeros(batch, dtype=torch.int64)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "tokens", "size"),
    [(2, 6, 2, 1, 8), (1, 3, 3, 64, 12), (2, 7, 1, 150, 80)],
)
def test_attention(dtype, window, batch, heads, kv_heads, tokens, size):
    given = qkv(batch, heads, kv_heads, tokens, size, dtype)
    expected = brute_force(*given, window)
    assert (
        float(
            (in_pages(*given, zeros(batch), window) - expected).norm() / expected.norm()
        )
        < 4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 2, 8), (7, 1, 80)], ids=str)
def test_a_token_depends_on_what_it_sees_alone(dtype, heads):
    q, k, v = qkv(3, *heads[:2], 200, heads[2], dtype)
    whole, before = in_pages(q, k, v, zeros(3)), torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch, tokens in ((1, 1), (3, 63), (1, 64), (2, 65), (1, 199)):
            part = in_pages(*(x[:batch, :, :tokens] for x in (q, k, v)), zeros(batch))
            assert torch.equal(part, whole[:batch, :, :tokens])
    torch.set_num_threads(before)


def heads_and_rope(tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """4 queries, 2 keys and 2 values of 8 numbers, and cos and sin of 40 positions and again."""
    generator = torch.Generator().manual_seed(tokens)
    heads = torch.randn(tokens, 8, 8, generator=generator).to(dtype)
    rope = rope_tables(torch.tensor([1.0, 0.3, 0.1, 0.01]), torch.arange(tokens), dtype)
    return heads, 2, rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_a_piece_is_the_end_of_its_sequence(dtype, window):
    """What goes on from another piece has the bits that it has in a pass over all of it."""
    heads, few, rope = heads_and_rope(130, dtype)
    first = torch.cat((torch.arange(80), torch.arange(90, 130)))
    alone = heads[first], few, tuple(x[torch.arange(120)] for x in rope)
    whole = exact_attention(*alone, whole_rows(1, 120), window)
    # and another piece beside it, of tokens 80 to 90
    position = torch.cat((torch.arange(90), torch.arange(80, 120)))
    shared = heads, few, tuple(x[position] for x in rope)
    pieces = Pieces(torch.tensor([[0, 80, -1], [80, 10, 0], [90, 40, 0]]))
    found = exact_attention(*shared, pieces, window)
    assert torch.equal(found[first], whole)
    near = causal_attention(*shared, pieces, window)
    atol = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(near, found, rtol=0, atol=atol)


@pytest.mark.parametrize("window", [None, 5])
def test_the_gradient(window):
    heads, *others = heads_and_rope(15, torch.float64)
    pieces = Pieces(torch.tensor([[0, 6, -1], [6, 5, 0], [11, 4, 0]]))
    assert torch.autograd.gradcheck(
        lambda heads: exact_attention(heads, *others, pieces, window),
        heads.requires_grad_(),
    )


def test_a_machine_that_is_not_fit_is_refused(monkeypatch):
    weight = torch.randn(16, 24)
    check_rows([weight], torch.float32)
    with pytest.raises(
        ValueError,
        match="^exact: on a CPU .* float32 or bfloat16; the dtype is torch.float16",
    ):
        check_rows([weight], torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "library", lambda: None)
        with pytest.raises(
            ValueError, match="^exact: on a CPU this needs a C[+][+] compiler"
        ):
            check_rows([weight], torch.float32)
    monkeypatch.setattr(
        module, "packed_rows", lambda x, weight: F.linear(x, weight) + len(x)
    )
    with pytest.raises(
        ValueError,
        match="^exact: on this CPU the rows of a matrix product depend on how many there are",
    ):
        check_rows([weight], torch.float32)
