"""What a decoding step writes down, against a loop over the rows."""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.record import record, record_reference

record_triton = partial(record, form="triton")

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed"
)


def new_case(rows: int, width: int, ends: int, seed: int):
    """What was drawn, the state by name, and the ends."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random)

    limit, done = integers(1, width + 1, rows), integers(0, 2, rows).bool()
    count = torch.where(
        done, limit, (torch.rand(rows, generator=random) * limit).long()
    )
    state = {
        "token": integers(0, 9, rows),
        "position": integers(-1, 50, rows).int(),
        "count": count,
        "limit": limit,
        "done": done,
        "tokens": integers(0, 9, rows, width + 1),
        "logprobs": torch.randn(rows, width + 1, generator=random),
        "sampling_logprobs": torch.randn(rows, width + 1, generator=random),
    }
    drawn = integers(0, 9, rows), *torch.randn(2, rows, generator=random)
    return drawn, state, torch.arange(ends)


def by_hand(drawn, state, eos) -> dict[str, list]:
    s = {name: value.tolist() for name, value in state.items()}
    for row, (new, logprob, sampling) in enumerate(
        zip(*(values.tolist() for values in drawn), strict=True)
    ):
        place = -1 if s["done"][row] else s["count"][row]
        s["tokens"][row][place], s["logprobs"][row][place] = new, logprob
        s["sampling_logprobs"][row][place], s["token"][row] = sampling, new
        if not s["done"][row]:
            s["count"][row] += 1
            s["position"][row] += 1
            s["done"][row] = new in eos.tolist() or s["count"][row] == s["limit"][row]
    return s


def assert_right(function, device, drawn, state, eos):
    expected, there = (
        by_hand(drawn, state, eos),
        {name: value.to(device) for name, value in state.items()},
    )
    assert (
        function([x.to(device) for x in drawn], list(there.values()), eos.to(device))
        is None
    )
    assert {name: value.tolist() for name, value in there.items()} == expected
    assert [(value.dtype, value.shape) for value in there.values()] == [
        (v.dtype, v.shape) for v in state.values()
    ]


SIZES = {
    "rows": st.integers(0, 5) | st.sampled_from([127, 128, 129, 300]),
    "width": st.integers(1, 9),
    "ends": st.integers(0, 3),
    "seed": st.integers(0, 99),
}


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_the_reference(rows, width, ends, seed):
    assert_right(record_reference, "cpu", *new_case(rows, width, ends, seed))
    assert_right(record, "cpu", *new_case(rows, width, ends, seed))


@needs_triton
@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_triton(kernel_device, rows, width, ends, seed):
    assert_right(record_triton, kernel_device, *new_case(rows, width, ends, seed))


@needs_triton
def test_the_first_rows_of_more(kernel_device):
    """Slots beyond those of the step are left alone."""
    drawn, state, eos = new_case(7, 4, 1, 0)
    expected = by_hand([x[:3] for x in drawn], state, eos)
    there = {
        name: value.to(kernel_device) for name, value in copy.deepcopy(state).items()
    }
    three = (
        [x[:3].to(kernel_device) for x in drawn],
        [value[:3] for value in there.values()],
    )
    record_triton(*three, eos.to(kernel_device))
    assert {name: value.tolist() for name, value in there.items()} == expected


@needs_triton
def test_state_that_is_no_piece_of_memory(kernel_device):
    drawn, state, eos = new_case(4, 3, 1, 0)
    state["sampling_logprobs"] = state["sampling_logprobs"].T.contiguous().T
    with pytest.raises(ValueError, match="contiguous"):
        record_triton(
            *([x.to(kernel_device) for x in some] for some in (drawn, state.values())),
            eos.to(kernel_device),
        )
