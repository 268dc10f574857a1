"""Paged attention against a float64 softmax over one query at a time; and a row's bits,
whatever else is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention, compiled
from kernels.attention import (
    PAGE,
    Pages,
    new_pages,
    paged_attention,
    paged_attention_reference,
    rows_per_tile,
)

paged_attention_cpu = partial(paged_attention, form="cpu")
paged_attention_triton = partial(paged_attention, form="triton")

pytestmark = pytest.mark.usefixtures("poisoned")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed"
)
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
    torch.float64: 1e-13,
}
EDGES = [0, 1, 2, 63, 64, 65, 255, 256, 257, 300, 511, 512, 513, 600]


@dataclass(frozen=True)
class Problem:
    """The arguments of a call, with pages of NaN wherever a slot has no key."""

    q: Tensor
    key_pages: Tensor
    value_pages: Tensor
    page_table: Tensor
    slot: Tensor
    length: Tensor
    window: int | None = None

    def arguments(self) -> tuple:
        return self.q, self.pages, self.slot, self.length, self.window

    @property
    def pages(self) -> Pages:
        return Pages(self.key_pages, self.value_pages, self.page_table)


def problem(
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    shared: int = 0,
    spare: int = 0,
    seed: int = 0,
    page: int = PAGE,
) -> Problem:
    """rows: (slot, length). All slots have their first `shared` pages in common; the table has
    `spare` columns more.
    """
    random = torch.Generator().manual_seed(seed)
    slots, columns = (
        max(s for s, _ in rows) + 1,
        max(1, *(-(-n // page) for _, n in rows)),
    )
    pages = torch.full(
        (2, slots * columns + 1, kv_heads, page, dim), float("nan"), dtype=torch.float64
    )
    table = 1 + torch.randperm(slots * columns, generator=random).reshape(
        slots, columns
    )  # page 0 is nobody's
    table[:, :shared] = table[0, :shared]
    for s in range(slots):
        t = torch.arange(max((n for place, n in rows if place == s), default=0))
        entries = torch.randn(
            2, len(t), kv_heads, dim, generator=random, dtype=torch.float64
        )
        pages[:, table[s, t // page], :, t % page] = entries.transpose(0, 1)
    table = torch.nn.functional.pad(table, (0, spare)).int().to(device)
    keys, values = pages.to(dtype).to(device)
    if page == compiled.PAGE:  # as `new_pages` makes them on a CPU
        keys = keys.mT.contiguous().mT
    q = 2 * torch.randn(len(rows), heads, dim, generator=random, dtype=torch.float64)
    slot, length = torch.tensor(rows, dtype=torch.int32, device=device).T
    return Problem(q.to(dtype).to(device), keys, values, table, slot, length, window)


def brute_force(p: Problem) -> Tensor:
    """Float64, one row and one head at a time."""
    out = torch.zeros(p.q.shape, dtype=torch.float64)
    table, groups, page = (
        p.page_table.cpu().long(),
        p.q.shape[1] // p.key_pages.shape[1],
        p.key_pages.shape[2],
    )
    for m, (s, n) in enumerate(zip(p.slot.tolist(), p.length.tolist(), strict=True)):
        t = (
            torch.arange(n)
            if p.window is None
            else torch.arange(max(0, n - p.window), n)
        )
        for h in range(p.q.shape[1] if n else 0):
            keys, values = (
                c.cpu().double()[table[s, t // page], h // groups, t % page]
                for c in p.pages[:2]
            )
            z = keys @ p.q[m, h].cpu().double() / p.q.shape[2] ** 0.5
            weights = (z - z.max()).exp()
            out[m, h] = weights @ values / weights.sum()
    return out


def assert_right(out: Tensor, p: Problem) -> None:
    expected = brute_force(p)
    assert out.shape == p.q.shape and out.dtype == p.q.dtype
    assert (out[p.length == 0] == 0).all()
    error = (out.cpu().double() - expected).flatten(1).norm(dim=1)
    # Values may cancel each other
    scale = expected.flatten(1).norm(dim=1).clamp(min=0.2 * p.q[0].numel() ** 0.5)
    assert (error <= TOLERANCE[p.q.dtype] * scale).all(), error


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(EDGES)), min_size=1, max_size=4
    ),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 8),
    dim=st.sampled_from([32, 64, 80, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    window=st.none() | st.sampled_from([1, 2, 64, 200, 256, 300]),
    spare=st.integers(0, 1),
    seed=st.integers(0, 99),
)
@needs_triton
@pytest.mark.slow
def test_any_rows(
    kernel_device, rows, kv_heads, groups, dim, dtype, window, spare, seed
):
    p = problem(
        rows,
        kv_heads * groups,
        kv_heads,
        dim,
        kernel_device,
        dtype,
        window,
        spare=spare,
        seed=seed,
    )
    assert_right(paged_attention_triton(*p.arguments()), p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 100, 300])
def test_the_reference(dtype, window):
    p = problem(
        [(0, 300), (1, 0), (1, 1), (2, 256), (0, 7)], 6, 2, 20, "cpu", dtype, window
    )
    assert_right(paged_attention_reference(*p.arguments()), p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WORKSPACE", 1)  # a row at a time
        assert_right(paged_attention_reference(*p.arguments()), p)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 70) | st.just(300)),
        min_size=1,
        max_size=5,
    ),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 8),
    dim=st.sampled_from([2, 8, 20, 32, 64, 80, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.none() | st.sampled_from([1, 2, 15, 16, 17, 40]),
    spare=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_the_cpu_form(rows, kv_heads, groups, dim, dtype, window, spare, seed):
    p = problem(
        rows,
        kv_heads * groups,
        kv_heads,
        dim,
        "cpu",
        dtype,
        window,
        0,
        spare,
        seed,
        compiled.PAGE,
    )
    assert_right(paged_attention_cpu(*p.arguments()), p)
    assert torch.equal(
        paged_attention(*p.arguments()), paged_attention_cpu(*p.arguments())
    )
    together = paged_attention_cpu(*p.arguments())
    for m in range(len(rows)):
        alone = replace(
            p,
            q=p.q[m : m + 1],
            slot=p.slot[m : m + 1].clone(),
            length=p.length[m : m + 1].clone(),
        )
        assert torch.equal(paged_attention_cpu(*alone.arguments())[0], together[m])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_form_with_any_number_of_threads(dtype):
    rows = [(m % 7, 1 + 13 * m) for m in range(40)]
    p = problem(rows, 9, 3, 64, "cpu", dtype, page=compiled.PAGE)
    whole, before = paged_attention_cpu(*p.arguments()), torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(paged_attention_cpu(*p.arguments()), whole)
    torch.set_num_threads(before)


def test_large_logits_in_the_cpu_form():
    p = problem([(0, 300), (1, 257)], 4, 2, 32, "cpu", page=compiled.PAGE)
    p.q.mul_(100)
    p.key_pages[p.page_table[1].long()] = 1
    assert_right(paged_attention_cpu(*p.arguments()), p)


def test_what_the_cpu_form_refuses():
    p = problem([(0, 3), (0, 4)], 8, 2, 32, "cpu", page=compiled.PAGE)
    with pytest.raises(ValueError, match="H a multiple of K"):
        paged_attention_cpu(*replace(p, q=p.q[:, :7]).arguments())
    with pytest.raises(ValueError, match=r"twice \[pages, K, 16, E\]"):
        paged_attention_cpu(*problem([(0, 3)], 8, 2, 32, "cpu").arguments())
    with pytest.raises(
        ValueError, match="attend: a tensor of shape .* is not contiguous"
    ):
        paged_attention_cpu(*replace(p, key_pages=p.key_pages.contiguous()).arguments())
    none = replace(p, q=p.q[:0], slot=p.slot[:0].clone(), length=p.length[:0].clone())
    assert paged_attention_cpu(*none.arguments()).shape == (0, 8, 32)


def test_new_pages():
    keys, values = new_pages((2, 3), 4, 8, torch.bfloat16, torch.device("cpu"))
    assert keys.shape == values.shape == (2, 3, 4, 16, 8)
    assert keys.mT.is_contiguous() and values.is_contiguous()


@needs_triton
def test_more_pages_than_one_step_of_the_merge(kernel_device):
    """Ten pages; the sum of what each saw is also the log-sum-exp of widely different masses."""
    p = problem([(0, 9 * PAGE + 5), (0, 8 * PAGE), (0, 3)], 2, 1, 32, kernel_device)
    p.key_pages[p.page_table[0, 3].long()] *= 5
    assert_right(paged_attention_triton(*p.arguments()), p)
    p = replace(p, window=300)
    assert_right(paged_attention_triton(*p.arguments()), p)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("dtype", "window"),
    [(torch.float32, 270), (torch.bfloat16, None)],
    ids=["float32", "bfloat16"],
)
def test_a_row_has_the_same_bits_in_every_launch(
    kernel_device, dtype, window, monkeypatch
):
    rows = [(0, 300), (1, 520), (2, 0), (1, 256)]
    p = problem(rows, 6, 1, 64, kernel_device, dtype, window)
    together = paged_attention_triton(*p.arguments())
    for m in range(len(rows)):
        alone = replace(
            p, q=p.q[m : m + 1], slot=p.slot[m : m + 1], length=p.length[m : m + 1]
        )
        assert torch.equal(paged_attention_triton(*alone.arguments())[0], together[m])
    turned = replace(p, q=p.q.flip(0), slot=p.slot.flip(0), length=p.length.flip(0))
    assert torch.equal(paged_attention_triton(*turned.arguments()).flip(0), together)
    wide = replace(p, page_table=torch.nn.functional.pad(p.page_table, (0, 9)))
    assert torch.equal(paged_attention_triton(*wide.arguments()), together)
    elsewhere = torch.randperm(
        len(p.key_pages), generator=torch.Generator().manual_seed(1)
    ).to(kernel_device)
    places = elsewhere.argsort().int()[p.page_table.long()]
    moved = replace(
        p,
        key_pages=p.key_pages[elsewhere],
        value_pages=p.value_pages[elsewhere],
        page_table=places,
    )
    assert torch.equal(paged_attention_triton(*moved.arguments()), together)
    # Two rows at a time
    monkeypatch.setattr(attention, "WORKSPACE", 2 * 4 * 6 * 3 * 65)
    assert torch.equal(paged_attention_triton(*p.arguments()), together)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("window", [None, 1, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (7, 1)])
def test_rows_that_share_pages(kernel_device, window, heads, kv_heads):
    """Two groups of samples: one shares two pages, one none. Idle and short rows have no pages
    where others read.
    """
    rows = [(0, 520), (1, 600), (2, 512), (0, 77), (1, 300), (3, 200), (4, 0)]
    p = problem(
        rows, heads, kv_heads, 32, kernel_device, torch.float16, window, shared=2
    )
    p.page_table[3, 1:], p.page_table[4] = 0, 0
    tiles = torch.tensor(
        [[5, 0, -1, 2, 6, 1], [3, -1, 4, -1, -1, -1]],
        dtype=torch.int32,
        device=kernel_device,
    )
    for shared in ([2, 0], [2, 1], [0, 2], [1, 1]):
        shared = torch.tensor(shared, dtype=torch.int32, device=kernel_device)
        assert_right(paged_attention_triton(*p.arguments(), tiles, shared), p)
    one_each = torch.arange(len(rows), dtype=torch.int32, device=kernel_device)[:, None]
    ones = torch.ones(len(rows), dtype=torch.int32, device=kernel_device)
    assert_right(paged_attention_triton(*p.arguments(), one_each, ones), p)


@needs_triton
@pytest.mark.parametrize("window", [None, 40])
def test_prefill_in_tiles(kernel_device, window):
    """Neighbouring tokens of one prompt, all of whose pages are the same."""
    lengths = list(range(250, 266))
    p = problem(
        [(0, n) for n in lengths], 4, 1, 64, kernel_device, torch.float16, window
    )
    tiles = torch.arange(16, dtype=torch.int32, device=kernel_device).reshape(1, 16)
    shared = torch.full(
        (1,), p.page_table.shape[1], dtype=torch.int32, device=kernel_device
    )
    assert tiles.shape[1] == rows_per_tile(4, 1)
    assert_right(paged_attention_triton(*p.arguments(), tiles, shared), p)


@needs_triton
def test_large_logits_and_equal_keys(kernel_device):
    p = problem([(0, 300), (1, 257)], 4, 2, 32, kernel_device)
    p.q.mul_(100)
    p.key_pages[p.page_table[1].long()] = 1
    assert_right(paged_attention_triton(*p.arguments()), p)


@needs_triton
def test_what_is_refused(kernel_device):
    p = problem([(0, 3), (0, 4)], 8, 2, 32, kernel_device, torch.bfloat16)
    for dim in (24, 144):
        other = problem([(0, 3)], 8, 2, dim, kernel_device)
        with pytest.raises(
            ValueError, match=f"head dimension {dim}: .* multiples of 16 up to 128"
        ):
            paged_attention_triton(*other.arguments())
    with pytest.raises(ValueError, match="a tile of 17 rows: at most 16 fit"):
        paged_attention_triton(
            *p.arguments(),
            torch.zeros(1, 17, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
        )
    with pytest.raises(ValueError, match="H a multiple of K"):
        paged_attention_triton(*replace(p, q=p.q[:, :7]).arguments())
    strided = p.key_pages.repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match="must be contiguous"):
        paged_attention_triton(*replace(p, key_pages=strided).arguments())
    none = replace(p, q=p.q[:0], slot=p.slot[:0], length=p.length[:0])
    assert paged_attention_triton(*none.arguments()).shape == (0, 8, 32)
