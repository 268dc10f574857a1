"""Attention of single query tokens over a paged KV cache: decoding, prefill, and any mixture
of the two.

    o_m = sum_t softmax_t(q_m . k_t / sqrt(E)) v_t
          over positions max(0, length_m - window) <= t < length_m

Split-KV as in Flash-Decoding (Dao et al., 2023), with online softmax (arXiv 1805.02867) inside
a split. Program (tile of rows, KV head, page) computes the normalised o and the log2-sum-exp
over that page in float32, and a second kernel merges a row's pages in their order. A split is
always a page, so a row's result is bit for bit the same whatever else is in the launch; pages
outside a row's reach exit at once. The R = H / K query heads of a KV head are the rows of one
matrix product, padded to 16, the least a tensor core takes. The cache is [pages, K, PAGE, E]:
what a program reads of it is one contiguous piece.

Rows that have their first pages in common (samples of one prompt; neighbouring tokens of a
prompt being prefilled) may be named as a tile: those pages are then read once a tile (the
cascade of Hydragen, arXiv 2402.05099), the others once a row, and merged as before.

On a CPU pages are smaller, so that prompts share most of theirs, and the keys of a page lie
side by side, [E, PAGE]: a vector register then holds the same entry of each of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.backend import INTERPRETED, form_for, jit, require, tl, triton

PAGE = 256  # keys in a page and in a split, on a GPU
# rows of the largest matrix product: more would need more registers than there are
WIDEST_TILE = 64
MERGE = 8  # partial results that the merge loads at once
# Exponentials are powers of 2: that is what the hardware has
LOG2_E = 1.4426950408889634
WORKSPACE = 256 << 20  # bytes of partial results that a launch may take


class Pages(NamedTuple):
    """A cache: keys and values [pages, K, PAGE, E], and where those of each slot are, table
    int32 [slots, P].
    """

    keys: Tensor
    values: Tensor
    table: Tensor


def page_size(device: torch.device) -> int:
    """Keys in a page."""
    return compiled.PAGE if device.type == "cpu" else PAGE


def new_pages(
    shape: tuple[int, ...],
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return uninitialised room for keys and for values, [*shape, K, PAGE, E] each."""
    page = page_size(device)
    keys, values = (
        torch.empty(*shape, kv_heads, page, head_dim, dtype=dtype, device=device)
        for _ in range(2)
    )
    if device.type == "cpu":
        keys = keys.view(*shape, kv_heads, head_dim, page).mT
    return keys, values


def rows_per_tile(heads: int, kv_heads: int) -> int:
    """The most query tokens that a tile may name."""
    return WIDEST_TILE // (heads // kv_heads)


def paged_attention(
    q: Tensor,
    pages: Pages,
    slot: Tensor,
    length: Tensor,
    window: int | None = None,
    tiles: Tensor | None = None,
    shared: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    """Return [M, H, E] of q [M, H, E]: row m sees the first length[m] keys of slot[m], or the
    last `window` of these.

    slot, length int32 [M]; length 0 is an idle row and gives zeros. The table of pages should
    be no wider than the contexts need, for the cost grows with P. tiles int32 [n, ROWS], ROWS
    <= rows_per_tile, filled up with -1: rows whose first shared[t] pages (int32 [n]) are the
    same. Together they must name every row that is not idle once. They change the result by
    rounding only.
    """
    form = form or form_for(q)
    if form == "reference":
        return paged_attention_reference(q, pages, slot, length, window)
    keys, values, table = pages
    rows, heads, dim = q.shape
    kv_heads = keys.shape[1]
    page = PAGE if form == "triton" else compiled.PAGE
    if form == "triton" and (dim % 16 or dim > 128):
        raise ValueError(
            f"head dimension {dim}: the Triton kernel has multiples of 16 up to 128"
        )
    require(
        keys.shape == values.shape == (len(keys), kv_heads, page, dim)
        and heads % kv_heads == 0,
        f"[M, H, E] and twice [pages, K, {page}, E], H a multiple of K",
        q=q,
        keys=keys,
        values=values,
    )
    q, table, slot, length = (
        tensor.contiguous() for tensor in (q, table, slot, length)
    )
    out = torch.empty_like(q)
    if form == "cpu":
        tensors = q, keys.mT, values, table, slot, length, out
        sizes = rows, heads, kv_heads, dim, table.shape[1]
        compiled.call("attend", q.dtype, *tensors, window or 0, *sizes)
    else:
        cache = Pages(keys, values, table)
        _launch(q, slot, length, out, cache, window or 0, tiles, shared)
    return out


def paged_attention_reference(q, pages, slot, length, window=None) -> Tensor:
    """Compute `paged_attention` in PyTorch, in float32 or wider.

    Keys and values are copied for each row that sees them.
    """
    size = pages.keys.shape[2]
    _, heads, dim = q.shape
    most = -(-int(length.max()) // size) if len(q) else 0
    place = torch.arange(most * size, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    step = max(1, WORKSPACE // max(1, 8 * heads * most * size * dim))
    for rows in length.nonzero()[:, 0].split(step):
        end = length[rows, None]
        seen = (place < end) & (place >= end - (window or most * size))  # [M, T]
        used = pages.table[slot[rows].long(), :most].long()
        used = used.masked_fill(place[::size] >= end, 0)
        keys, values = (
            cache[used]
            .transpose(1, 2)
            .flatten(2, 3)
            .to(wide)
            .masked_fill(~seen[:, None, :, None], 0)
            for cache in pages[:2]
        )  # [M, K, T, E]
        o = F.scaled_dot_product_attention(
            q[rows, :, None].to(wide),
            keys,
            values,
            seen[:, None, None],
            enable_gqa=True,
        )
        out[rows] = o[:, :, 0].to(q.dtype)
    return out


def _launch(q, slot, length, out, cache: Pages, window: int, tiles, shared) -> None:
    """Write the result to `out` in two launches, with tiles three.

    The partial results take 4 (E + 1) bytes a row, query head and page of the table, 135 MB
    for 64 rows of 32 heads over 32k keys of 128: rows are worked off so many at a time that
    they stay within WORKSPACE. A launch with tiles is not cut: its caller chooses the rows.
    """
    if not (cache.keys.is_contiguous() and cache.values.is_contiguous()):
        raise ValueError(
            "keys and values must be contiguous: a copy of the cache would take too long"
        )
    rows, heads, dim = q.shape
    pages = cache.table.shape[1]
    kv_heads = cache.keys.shape[1]
    groups = heads // kv_heads
    width = 1
    step = max(1, WORKSPACE // (4 * heads * pages * (dim + 1)))
    if tiles is not None:
        width = tiles.shape[1]
        if width > rows_per_tile(heads, kv_heads):
            raise ValueError(
                f"a tile of {width} rows: at most {rows_per_tile(heads, kv_heads)} fit"
            )
        if width == 1 or q.element_size() == 4:
            # float32 has no tensor cores to fill, and larger products need more registers
            # than there are
            tiles = None
            width = 1
        else:
            tiles = tiles.contiguous()
            shared = shared.contiguous()
            step = max(1, rows)
    block_e = triton.next_power_of_2(dim)
    for first in range(0, rows, step):
        some, some_slot, some_length, some_out = (
            tensor[first : first + step] for tensor in (q, slot, length, out)
        )
        partial = q.new_empty(len(some), heads, pages, dim, dtype=torch.float32)
        lse = q.new_empty(len(some), heads, pages, dtype=torch.float32)
        named = len(some) if tiles is None else tiles.numel()
        # first the pages that a tile shares, then each row's own
        for rows_each in sorted({width, 1}, reverse=True):
            block_m = max(16, triton.next_power_of_2(rows_each * groups))
            _split_kernel[(named // rows_each, kv_heads, pages)](
                some, *cache, some_slot, some_length, tiles, shared, partial, lse, dim**-0.5 *
                LOG2_E, window, pages, KV_HEADS=kv_heads, GROUPS=groups, E=dim,
                BLOCK_E=block_e, ROWS=rows_each, WIDTH=width, PAGE=PAGE, BLOCK_M=block_m,
                UPCAST=INTERPRETED, enable_fp_fusion=True, **split_config(block_m, block_e,
                q.element_size()),
            )  # fmt: skip
        _merge_kernel[(len(some), heads)](
            partial, lse, some_length, some_out, window, PAGES=pages, HEADS=heads, E=dim,
            BLOCK_E=block_e, PAGE=PAGE, STEP=MERGE, num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip


def split_config(block_m: int, dim: int, itemsize: int) -> dict[str, int]:
    """The tile of keys and the options of a split, such that five or more small splits fit on
    a multiprocessor at once, with some 150 KB of loads in flight. Float32 takes twice the
    registers and has no tensor cores.
    """
    if itemsize == 4:
        return {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    if block_m == 64:
        return {"BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3 if dim <= 64 else 2}


@jit
def _split_kernel(
    q, key_pages, value_pages, page_table, slot, length, tiles, shared, partial, lse, scale,
    window, pages, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, E: tl.constexpr, BLOCK_E:
    tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, BLOCK_M:
    tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ROWS query tokens x GROUPS heads against one page of a KV head. Neighbouring programs
    take neighbouring rows, not pages: samples of one prompt then read its pages at the same
    time, once from memory and then from the L2 cache.
    """
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    page = tl.program_id(2)
    i = tl.arange(0, BLOCK_M)
    head = kv_head * GROUPS + i % GROUPS
    if tiles is None:
        row = tl.where(i < GROUPS, program, -1)
    else:
        common = tl.load(shared + program * ROWS // WIDTH)
        if ROWS > 1:
            if page >= common:
                return
        elif page < common:
            return
        inside = i < ROWS * GROUPS
        row = tl.load(tiles + program * ROWS + i // GROUPS, mask=inside, other=-1)
    row = row.to(tl.int64)
    end = tl.load(length + row, mask=row >= 0, other=0)
    start = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    lowest = tl.min(tl.where(end > 0, start, 1 << 30))
    highest = tl.max(end)
    if (page * PAGE >= highest) | ((page + 1) * PAGE <= lowest):
        return

    # Any that reaches it: they have this page in common
    some_row = tl.max(tl.where(end > page * PAGE, row, -1))
    block = tl.load(
        page_table + tl.load(slot + some_row).to(tl.int64) * pages + page
    ).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    real = (row >= 0)[:, None] & (e < E)[None, :]
    query = tl.load(
        q + (row * (KV_HEADS * GROUPS) + head)[:, None] * E + e[None, :],
        mask=real,
        other=0.0,
    )
    if UPCAST:
        query = query.to(tl.float32)
    base = (block * KV_HEADS + kv_head) * PAGE * E
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for offset in range(0, PAGE, BLOCK_N):
        n = offset + tl.arange(0, BLOCK_N)
        t = page * PAGE + n
        # Nothing else is read, so that what was never written cannot be NaN
        wanted = (t >= lowest) & (t < highest)
        mask = wanted[:, None] if E == BLOCK_E else wanted[:, None] & (e < E)[None, :]
        place = base + n[:, None] * E + e[None, :]
        keys = tl.load(key_pages + place, mask=mask, other=0.0)
        values = tl.load(value_pages + place, mask=mask, other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        seen = (t[None, :] >= start[:, None]) & (t[None, :] < end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet: no -inf - -inf
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.math.exp2(scores - safe_top[:, None])
        shrink = tl.math.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, 1)
        o = tl.dot(
            weights.to(values.dtype),
            values,
            o * shrink[:, None],
            input_precision="ieee",
        )
        top = new_top
    # Of a row that sees nothing of this page, o is 0 and top is -inf
    total = tl.where(total > 0, total, 1.0)
    at = (row * (KV_HEADS * GROUPS) + head) * pages + page
    tl.store(partial + at[:, None] * E + e[None, :], o / total[:, None], mask=real)
    tl.store(lse + at, top + tl.math.log2(total), mask=row >= 0)


@jit
def _merge_kernel(
    partial, lse, length, out, window, PAGES: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, PAGE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """o = sum_p 2^(lse_p - max) o_p / sum_p 2^(lse_p - max), pages in order, STEP at a time
    whatever PAGES is.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    end = tl.load(length + row)
    first = tl.where(window > 0, tl.maximum(end - window, 0), 0) // PAGE
    last = (end + PAGE - 1) // PAGE
    e = tl.arange(0, BLOCK_E)
    step = tl.arange(0, STEP)
    base = (row * HEADS + head) * PAGES
    top = float("-inf")
    total = 0.0
    o = tl.zeros([BLOCK_E], tl.float32)
    for chunk in range(0, PAGES, STEP):
        if (chunk < last) & (chunk + STEP > first):
            page = chunk + step
            there = (page >= first) & (page < last)
            masses = tl.load(lse + base + page, mask=there, other=float("-inf"))
            place = (base + page)[:, None] * E + e[None, :]
            parts = tl.load(
                partial + place, mask=there[:, None] & (e < E)[None, :], other=0.0
            )
            new_top = tl.maximum(top, tl.max(masses))
            weights = tl.math.exp2(masses - new_top)
            shrink = tl.math.exp2(top - new_top)
            total = total * shrink + tl.sum(weights)
            o = o * shrink + tl.sum(weights[:, None] * parts, 0)
            top = new_top
    o = o / tl.where(end > 0, total, 1.0)
    tl.store(out + (row * HEADS + head) * E + e, o.to(out.dtype.element_ty), mask=e < E)
