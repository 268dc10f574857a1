"""Truncated sampling, both forms against a sort in float64."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from walk import token_at

from kernels import lm_head
from kernels.truncation import (
    truncated_sample,
    truncated_sample_reference,
    truncated_sample_triton,
)

FORMS = [
    truncated_sample_reference,
    pytest.param(
        truncated_sample_triton,
        marks=pytest.mark.skipif(
            find_spec("triton") is None, reason="triton is not installed"
        ),
    ),
]
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # Of the interpreter, about padding
    pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning"),
]
INFINITY = float("inf")


def kept_tokens(
    z: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[list[int], bool]:
    """What the rules leave, by going down the sorted list; and whether float32 rounding could
    decide otherwise.
    """
    order = sorted(range(len(z)), key=lambda v: -z[v])
    weight = [math.exp((logit - z[order[0]]) / temperature) for logit in z]
    if top_k:
        order = [v for v in order if z[v] >= z[order[min(top_k, len(z)) - 1]]]
    close = False
    if top_p < 1:
        mass, running = sum(weight[v] for v in order), 0.0
        for v in order:
            running += weight[v]
            close |= abs(running / mass - top_p) < 1e-5
            if running >= top_p * mass:
                order = [w for w in order if z[w] >= z[v]]
                break
    if min_p:
        close |= any(
            min_p != 1 and abs(weight[v] - min_p) < 1e-5 * min_p for v in order
        )
        order = [v for v in order if weight[v] >= min_p]
    return sorted(order), close


def check(
    form,
    logits: Tensor,
    u: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    """Every row of a form's answer against the sort."""
    found = [part.cpu() for part in form(logits, u, temperature, top_k, top_p, min_p)]
    assert found[0].dtype == torch.int64 and all(
        part.dtype == torch.float32 for part in found[1:]
    )
    for row, (z, v) in enumerate(
        zip(logits.double().tolist(), u.tolist(), strict=True)
    ):
        kept, close = kept_tokens(z, temperature, top_k, top_p, min_p)
        if close:
            continue
        logprobs = (torch.tensor(z, dtype=torch.float64) / temperature).log_softmax(-1)
        mass = logprobs[kept].logsumexp(-1)
        weights = torch.zeros(len(z), dtype=torch.float64).index_copy_(
            0, torch.tensor(kept), logprobs[kept].exp()
        )
        token = int(found[0][row])
        expected, close = token_at(weights.tolist(), v)
        assert token in kept and (close or token == expected)
        entropy = -torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum()
        exact = torch.stack((logprobs[token], logprobs[token] - mass, entropy))
        torch.testing.assert_close(
            torch.stack([part[row] for part in found[1:]]).double(),
            exact,
            rtol=1e-5,
            atol=1e-5,
        )


def problem(
    seed: int, n: int, vocabulary: int, dtype: torch.dtype, device: str, step: float = 0
) -> tuple[Tensor, ...]:
    """logits and u; a step makes the logits multiples of it, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(n, vocabulary, generator=generator)
    logits = (logits / step).round() * step if step else logits
    return logits.to(dtype).to(device), torch.rand(n, 2, generator=generator).to(device)


@pytest.mark.parametrize("form", FORMS)
def test_against_a_sort(kernel_device, form):
    @settings(max_examples=20, deadline=None)
    @given(
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        seed=st.integers(0, 999),
        n=st.integers(1, 3),
        vocabulary=st.sampled_from([1, 2, 60, 127, 128, 129, 300]),
        step=st.sampled_from([0, 0, 0.5]),
        temperature=st.sampled_from([1.0, 0.6, 1.7]),
        top_k=st.sampled_from([0, 0, 1, 2, 7, 50, 400]),
        top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.77, 0.95]),
        min_p=st.sampled_from([0.0, 0.0, 0.03, 0.4, 1.0]),
    )
    def any_case(dtype, seed, n, vocabulary, step, temperature, top_k, top_p, min_p):
        logits, u = problem(seed, n, vocabulary, dtype, kernel_device, step)
        check(
            form,
            logits,
            u,
            temperature,
            top_k if top_k < vocabulary else 0,
            top_p,
            min_p,
        )

    any_case()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_several_tiles(kernel_device, form):
    """With a mass that the reference's first and second list of the likeliest do not reach in
    the flat rows.
    """
    logits, u = problem(1, 3, 8700, torch.bfloat16, kernel_device)
    logits[1] *= 0.05
    logits[2] *= 5
    # The second and the third draw from the last tile
    u[:, 0] = torch.tensor([0.3, 0.96, 0.99])
    check(form, logits, u, 1.0, 0, 0.93, 0.0)
    check(form, logits, u, 0.9, 4000, 0.5, 0.001)
    u[:, 0] = torch.tensor([0.97, 0.5, 0.5])
    check(form, logits, u, 1.0, 0, 0.999, 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((2, 1.0, 0.0), [1.0, 0.5, 0.5]),  # what ties with the second stays
        ((0, 0.7, 0.0), [1.0, 0.5, 0.5]),  # 0.34 of the mass, and 0.21 each
        ((0, 0.33, 0.0), [1.0]),
        ((0, 1e-9, 0.0), [1.0]),
        ((0, 1.0, 1.0), [1.0]),
        ((3, 0.7, 0.9), [1.0]),
        ((4, 1.0, 0.0), [1.0, 0.5, 0.5, 0.0, 0.0]),  # as zeros do, whatever their sign
        ((6, 1.0, 0.0), [1.0, 0.5, 0.5, 0.0, 0.0]),  # what has no mass is never drawn
        ((0, 1.0, 0.0), [1.0, 0.5, 0.5, 0.0, 0.0]),
    ],
)
def test_ties_and_edges(kernel_device, form, options, expected):
    """The tokens that a grid of u draws."""
    logits = torch.tensor(
        [0.5, -INFINITY, -0.0, 1.0, 0.0, 0.5, -INFINITY], device=kernel_device
    )
    grid = (torch.arange(5, device=kernel_device) + 0.5) / 5
    u = torch.stack((grid, grid), dim=-1)
    token = form(logits.expand(5, 7), u, 1.0, *options)[0]
    assert sorted(logits[token.unique()].tolist(), reverse=True) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval(kernel_device, form, edge):
    logits = torch.full((1, 500), -5.0, device=kernel_device)
    logits[0, [130, 400]] = 1.0
    token, full, truncated, _ = form(
        logits, torch.full((1, 2), edge, device=kernel_device), 1.0, 2, 1.0, 0.0
    )
    assert int(token) == (400 if edge else 130)
    assert float(truncated) == pytest.approx(-math.log(2)) and float(full) < float(
        truncated
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((3, 1.0, 0.0), marks=pytest.mark.slow),
        pytest.param((0, 0.8, 0.0), marks=pytest.mark.slow),
        pytest.param((0, 1.0, 0.1), marks=pytest.mark.slow),
        (3, 0.8, 0.1),
    ],
)
def test_logits_that_are_no_numbers(kernel_device, form, options):
    logits, u = problem(2, 3, 300, torch.float32, kernel_device)
    expected = form(logits, u, 0.8, *options)
    logits[1, 17] = float("nan")
    found = form(logits, u, 0.8, *options)
    assert all(
        torch.equal(a[::2], b[::2]) for a, b in zip(found, expected, strict=True)
    )
    assert found[1][1].isnan() and 0 <= int(found[0][1]) < 300


def test_the_rows_that_one_chunk_holds_do_not_matter(monkeypatch):
    logits, u = problem(3, 7, 300, torch.float32, "cpu")
    whole = truncated_sample(logits, u, 0.9, 20, 0.9, 0.01)
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", 1)
    for a, b in zip(
        truncated_sample(logits, u, 0.9, 20, 0.9, 0.01), whole, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_more_than_the_vocabulary_is_everything():
    logits, u = problem(4, 5, 30, torch.float32, "cpu")
    for top_k in (30, 31, 1000):
        for a, b in zip(
            truncated_sample(logits, u, 1.0, top_k),
            truncated_sample(logits, u, 1.0),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_greedy_needs_no_truncation():
    for temperature in (0.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            truncated_sample(torch.zeros(1, 3), torch.zeros(1, 2), temperature, 2)
