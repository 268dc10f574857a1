"""The exact attention: against float64, and that a token depends on what it sees alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled, exact_attention
from kernels.exact_attention import block_attention, check_rows, in_pages


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_a_block_is_the_end_of_its_sequences(dtype, window):
    """Queries from `first` on have the bits that they have in a pass over whole sequences."""
    q, k, v = qkv(3, 4, 2, 80, 8, dtype)
    first = torch.tensor([3, 70, 41])
    whole = block_attention(q, k, v, zeros(3), window, exact=True)
    some = torch.stack(
        [row[:, n : n + 10] for row, n in zip(q, first.tolist(), strict=True)]
    )
    ends = torch.stack(
        [row[:, n : n + 10] for row, n in zip(whole, first.tolist(), strict=True)]
    )
    assert torch.equal(block_attention(some, k, v, first, window, exact=True), ends)
    library = block_attention(some, k, v, first, window, exact=False)
    torch.testing.assert_close(library, ends, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("window", [None, 5])
def test_the_gradient(window):
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 9, 6, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *x: exact_attention.exact_attention(*x, window), (q, k, v)
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
        exact_attention, "packed_rows", lambda x, weight: F.linear(x, weight) + len(x)
    )
    with pytest.raises(
        ValueError,
        match="^exact: on this CPU the rows of a matrix product depend on how many there are",
    ):
        check_rows([weight], torch.float32)
