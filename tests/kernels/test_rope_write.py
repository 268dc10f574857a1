"""Rotation, norm of the heads and the writing of the cache, against complex numbers in float64
and the model's code.
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

from kernels.attention import Pages
from kernels.rope_write import (
    apply_rope,
    rope_tables,
    rope_write,
    rope_write_reference,
    rotated,
)
from nanomath.models.transformer import RMSNorm

rope_write_cpu = partial(rope_write, form="cpu")
rope_write_triton = partial(rope_write, form="triton")

pytestmark = pytest.mark.usefixtures("poisoned")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed"
)
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
    torch.float64: 1e-13,
}
EPS, PAGE, POSITIONS = (
    1e-2,
    16,
    48,
)  # an eps that shows; pages as small as they may be here


@dataclass(frozen=True)
class Problem:
    """The arguments of a call; `pages` before it are the keys' and the values', all distinct
    numbers.
    """

    qkv: Tensor
    position: Tensor
    slot: Tensor
    cos: Tensor
    sin: Tensor
    pages: Tensor
    table: Tensor
    weights: tuple[Tensor, Tensor] | tuple[None, None]
    keys_side_by_side: bool = False  # in memory, as on a CPU

    def run(self, function) -> tuple[Tensor, Tensor]:
        """q, and the pages afterwards."""
        keys, values = self.pages.clone()
        keys = keys.mT.contiguous().mT if self.keys_side_by_side else keys
        pages, rope = Pages(keys, values, self.table), (self.cos, self.sin)
        q = function(self.qkv, self.position, self.slot, rope, pages, self.weights, EPS)
        return q, torch.stack((keys, values))


def problem(
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    norm: bool,
    dtype: torch.dtype,
    device: str,
    seed=0,
) -> Problem:
    """rows: (slot, position)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (
            torch.randn(shape, generator=random, dtype=torch.float64)
            .to(dtype)
            .to(device)
        )

    angles = (
        torch.rand(POSITIONS, dim // 2, generator=random, dtype=torch.float64) * 6.3
    )
    cos, sin = (
        torch.cat((part, part), -1).to(dtype).to(device)
        for part in (angles.cos(), angles.sin())
    )
    slots = max(s for s, _ in rows) + 1
    table = (
        torch.randperm(slots * POSITIONS // PAGE, generator=random)
        .int()
        .reshape(slots, -1)
    )
    slot, position = torch.tensor(rows, dtype=torch.int32, device=device).T
    return Problem(
        qkv=normal(len(rows), (heads + 2 * kv_heads) * dim),
        position=position,
        slot=slot,
        cos=cos,
        sin=sin,
        pages=normal(2, table.numel(), kv_heads, PAGE, dim),
        table=table.to(device),
        weights=(1 + normal(dim) / 2, 1 + normal(dim) / 2) if norm else (None, None),
    )


def brute_force(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation as a product of complex numbers, in float64: q, the pages, and where these are
    written.
    """
    (_, _, kv_heads, _, dim), pages = p.pages.shape, p.pages.cpu().double().clone()
    written = torch.zeros_like(pages, dtype=torch.bool)
    heads = p.qkv.shape[1] // dim - 2 * kv_heads
    q = torch.zeros(len(p.qkv), heads, dim, dtype=torch.float64)
    for m, (s, at) in enumerate(zip(p.slot.tolist(), p.position.tolist(), strict=True)):
        if at < 0:
            continue
        turn = torch.complex(p.cos[at].cpu().double(), p.sin[at].cpu().double())[
            : dim // 2
        ]
        for h, x in enumerate(p.qkv[m].cpu().double().split(dim)):
            weight = p.weights[0] if h < heads else p.weights[1]
            if h < heads + kv_heads:
                if weight is not None:
                    x = weight.cpu().double() * x / (x.square().mean() + EPS).sqrt()
                turned = torch.complex(*x.chunk(2)) * turn
                x = torch.cat((turned.real, turned.imag))
            if h < heads:
                q[m, h] = x
            else:
                entry = (
                    (h - heads) // kv_heads,
                    p.table[s, at // PAGE],
                    (h - heads) % kv_heads,
                    at % PAGE,
                )
                pages[entry], written[entry] = x, True
    return q, pages, written


def assert_right(p: Problem, function) -> None:
    q, pages = p.run(function)
    expected_q, expected_pages, written = brute_force(p)
    tolerance = TOLERANCE[p.qkv.dtype]
    assert q.dtype == p.qkv.dtype and (q[p.position < 0] == 0).all()
    assert (q.cpu().double() - expected_q).norm() <= tolerance * expected_q.norm()
    assert (
        pages.cpu().double() - expected_pages
    ).norm() <= tolerance * expected_pages.norm()
    assert torch.equal(pages.cpu()[~written], p.pages.cpu()[~written])


places = st.dictionaries(
    st.integers(0, 2),
    st.sampled_from([-1, 0, 1, PAGE - 1, PAGE, 2 * PAGE - 1, 2 * PAGE, POSITIONS - 1]),
    min_size=1,
).map(lambda chosen: list(chosen.items()))
shapes = {
    "rows": places,
    "heads": st.integers(1, 3),
    "kv_heads": st.integers(1, 5),
    "dim": st.sampled_from([2, 20, 32, 64, 80, 96, 128]),
    "norm": st.booleans(),
    "seed": st.integers(0, 99),
}


@settings(max_examples=40, deadline=None)
@given(**shapes, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@needs_triton
def test_any_rows(kernel_device, rows, heads, kv_heads, dim, norm, dtype, seed):
    assert_right(
        problem(
            rows, heads * kv_heads, kv_heads, dim, norm, dtype, kernel_device, seed
        ),
        rope_write_triton,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_the_reference(dtype, norm):
    p = problem([(2, 5), (0, -1), (1, 47), (2, 6)], 6, 2, 20, norm, dtype, "cpu")
    assert_right(p, rope_write_reference)


def for_cpu(p: Problem) -> Problem:
    """With the keys of a page side by side."""
    return replace(p, keys_side_by_side=True)


@settings(max_examples=150, deadline=None)
@given(**shapes, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_cpu_form(rows, heads, kv_heads, dim, norm, dtype, seed):
    p = for_cpu(
        problem(rows, heads * kv_heads, kv_heads, dim, norm, dtype, "cpu", seed)
    )
    assert_right(p, rope_write_cpu)
    assert_right(p, rope_write)
    if not norm:  # the model's own bits
        q, pages = p.run(rope_write_cpu)
        expected_q, expected_pages = p.run(rope_write_reference)
        assert torch.equal(q, expected_q) and torch.equal(pages, expected_pages)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotates_with_the_bits_of_the_model(kernel_device, dtype):
    """Rounded product by product, as apply_rope is: where the interpreter rounds as a GPU
    does, nothing differs.
    """
    if dtype == torch.bfloat16 and kernel_device == "cpu":
        pytest.skip("the interpreter truncates to bfloat16")
    p = problem(
        [(0, 5), (1, 47), (2, 20), (0, 6)], 8, 2, 64, False, dtype, kernel_device
    )
    q, pages = p.run(rope_write_triton)
    expected_q, expected_pages = p.run(rope_write_reference)
    assert torch.equal(q, expected_q) and torch.equal(pages, expected_pages)
    heads = p.qkv.unflatten(1, (-1, 64))[:, :8].transpose(0, 1)[None]
    cos, sin = (table[p.position.long()][None, None] for table in (p.cos, p.sin))
    assert torch.equal(q, apply_rope(heads, cos, sin)[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_norms_as_the_model_does(dtype):
    p = problem([(0, 5), (1, 47)], 4, 2, 64, True, dtype, "cpu")
    q, _ = p.run(rope_write_reference)
    norm = RMSNorm(64, EPS).to(dtype)
    norm.weight.data = p.weights[0]
    heads = norm(p.qkv.unflatten(1, (-1, 64))[:, :4]).transpose(0, 1)[None]
    cos, sin = (table[p.position.long()][None, None] for table in (p.cos, p.sin))
    assert torch.equal(q, apply_rope(heads, cos, sin)[0].transpose(0, 1))


@needs_triton
def test_a_row_has_the_same_bits_in_every_launch(kernel_device):
    p = problem(
        [(0, 5), (1, -1), (2, 20), (1, 6)], 9, 3, 32, True, torch.float32, kernel_device
    )
    together, _ = p.run(rope_write_triton)
    for m in range(4):
        part = slice(m, m + 1)
        alone = {name: getattr(p, name)[part] for name in ("qkv", "position", "slot")}
        assert torch.equal(
            replace(p, **alone).run(rope_write_triton)[0][0], together[m]
        )


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 5),
    width=st.integers(1, 20),
    dim=st.sampled_from([2, 8, 20, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    data=st.data(),
)
@needs_triton
def test_rotation_in_training(kernel_device, tokens, width, dim, dtype, data):
    """The kernel has the bits of PyTorch's operations, and its gradient turns them back."""
    turning = data.draw(st.integers(0, width))
    random = torch.Generator().manual_seed(tokens)
    heads, gradient = torch.randn(2, tokens, width, dim, generator=random).to(dtype)
    angles = torch.rand(dim // 2, generator=random), torch.arange(tokens)
    given = [
        x.to(kernel_device) for x in (heads, gradient, *rope_tables(*angles, dtype))
    ]
    found = []
    for form in ("triton", "reference"):
        x = given[0].detach().requires_grad_()
        out = rotated(x, turning, given[2:], form)
        found.append((out, *torch.autograd.grad(out, x, given[1])))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@needs_triton
def test_what_is_refused(kernel_device):
    p = problem([(0, 5)], 4, 2, 32, True, torch.float32, kernel_device)
    with pytest.raises(ValueError, match="neither"):
        replace(p, weights=(p.weights[0], None)).run(rope_write_triton)
    with pytest.raises(ValueError, match=r"\(H \+ 2 K\) E"):
        replace(p, qkv=p.qkv[:, 1:]).run(rope_write_triton)
    with pytest.raises(ValueError, match="contiguous"):
        replace(p, keys_side_by_side=True).run(rope_write_triton)
    with pytest.raises(ValueError, match="contiguous"):
        strided = Pages(p.pages[0], p.pages[1].mT.contiguous().mT, p.table)
        rope_write_triton(p.qkv, p.position, p.slot, (p.cos, p.sin), strided, p.weights)
    none = replace(p, qkv=p.qkv[:0], position=p.position[:0], slot=p.slot[:0])
    assert none.run(rope_write_triton)[0].shape == (0, 4, 32)
