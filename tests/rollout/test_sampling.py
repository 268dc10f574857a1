"""Choosing tokens: exact frequencies over a grid of u against a loop, and the ends of the unit
interval.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanomath.rollout.sampling import SamplingParams, sample_tokens

GRID = 4000
some_logits = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)
some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([1e-6, 0.3, 0.77, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
)


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((z - top) / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


def kept_tokens(p: list[float], params: SamplingParams) -> list[int]:
    """The tokens that top-k, then top-p, then min-p leave, by going down the list of the
    likeliest.
    """
    order = sorted(range(len(p)), key=lambda v: -p[v])
    order = order[: params.top_k or None]
    mass, kept = sum(p[v] for v in order), []
    for v in order:
        if kept and sum(p[w] for w in kept) >= params.top_p * mass:
            break
        kept.append(v)
    return [v for v in kept if p[v] >= params.min_p * p[order[0]]]


def is_close_call(p: list[float], params: SamplingParams) -> bool:
    """Whether float32 rounding could decide whether a token is kept."""
    order = sorted(p, reverse=True)[: params.top_k or None]
    sums = [sum(order[:i]) / sum(order) for i in range(1, len(order))]
    close = any(abs(s - params.top_p) < 1e-5 for s in sums) and params.top_p < 1
    return close or any(
        abs(v - params.min_p * order[0]) < 1e-5 * order[0] for v in order[1:]
    )


def draw_grid(
    logits: list[float], params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and logprobs of few logits, all in one block, at GRID evenly spaced second
    numbers.
    """
    u = torch.stack(
        (torch.full((GRID,), 0.7), (torch.arange(GRID) + 0.5) / GRID), dim=1
    )
    return sample_tokens(torch.tensor([logits]).expand(GRID, -1), u, params)


@settings(max_examples=60, deadline=None)
@given(some_logits, some_params)
def test_frequencies_and_logprobs(logits, params):
    p = softmax(logits, params.temperature)
    # Ties have a test of their own
    assume(len(set(p)) == len(p) and not is_close_call(p, params))
    kept = kept_tokens(p, params)
    mass = sum(p[v] for v in kept)
    token, logprob, sampling = draw_grid(logits, params)
    for v in range(len(p)):
        chosen = token == v
        expected = p[v] / mass if v in kept else 0.0
        assert float(chosen.float().mean()) == pytest.approx(expected, abs=2 / GRID)
        if chosen.any():
            assert logprob[chosen].tolist() == pytest.approx(
                [math.log(p[v])] * int(chosen.sum()), abs=1e-4
            )
            assert sampling[chosen].tolist() == pytest.approx(
                [math.log(p[v] / mass)] * int(chosen.sum()), abs=1e-4
            )


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, [0, 1, 2, 3]),  # all that are as likely as the second stay
        ({"top_k": 1}, [0]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.41}, [0, 1, 2, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.5}, [0]),
        ({"min_p": 0.4}, [0, 1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        (
            {"top_k": 4, "top_p": 0.43},
            [0, 1, 2, 3],
        ),  # 0.43 of the 0.94 that top-k left is more than the first has
    ],
)
def test_what_ties_with_the_last_one_kept_stays(params, kept):
    token, _, sampling = draw_grid(
        [math.log(p) for p in (0.4, 0.18, 0.18, 0.18, 0.06)], SamplingParams(**params)
    )
    assert sorted(set(token.tolist())) == kept
    assert float(sampling[token == 0].exp()[0]) == pytest.approx(
        0.4 / sum((0.4, 0.18, 0.18, 0.18, 0.06)[v] for v in kept)
    )


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(top_k=150), SamplingParams(top_p=0.9)]
)
def test_frequencies_over_several_blocks_of_the_vocabulary(params):
    """A grid over both uniform numbers: the first chooses among three blocks, the second
    inside one.
    """
    logits = torch.randn(
        1, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    side = (torch.arange(400) + 0.5) / 400
    u = torch.cartesian_prod(side, side)
    token, _, _ = sample_tokens(logits.float().expand(len(u), -1), u, params)
    p = logits.softmax(-1)[0]
    kept = kept_tokens(p.tolist(), params)
    expected = torch.zeros(300, dtype=torch.float64).index_copy(
        0, torch.tensor(kept), p[kept] / p[kept].sum()
    )
    found = torch.bincount(token, minlength=300).double() / len(u)
    block = torch.cat([part.sum().expand(len(part)) for part in expected.split(128)])
    # A step of each grid
    assert ((found - expected).abs() <= (expected / block + block) / 400 + 1e-6).all()


ends = st.sampled_from([0.0, 1e-45, 0.5, 1 - 2**-24, 1 - 2**-23])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=12),
    ends,
    ends,
    some_params,
)
def test_no_impossible_token_at_the_ends_of_the_interval(logits, first, second, params):
    row = torch.tensor([logits])
    token, logprob, sampling = sample_tokens(
        row, torch.tensor([[first, second]]), params
    )
    p = (row / params.temperature).softmax(-1)[0]
    assert 0 <= int(token) < len(logits) and p[token] > 0
    assert logprob.isfinite().all() and sampling.isfinite().all()
    assert float(logprob) <= float(sampling) + 1e-6 <= 1e-5
    if params.top_k:
        assert int((p > p[token]).sum()) < params.top_k


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=40_000)],
)
def test_a_large_vocabulary_of_which_half_is_impossible(params):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50_000, generator=generator) * 3
    logits[:, ::2] = -math.inf  # the first one too
    u = torch.cat(
        (
            torch.rand(60, 2, generator=generator),
            torch.tensor([[0.0, 1 - 2**-24], [1 - 2**-24, 0.0]]),
        )
    )
    token, logprob, sampling = sample_tokens(logits.expand(len(u), -1), u, params)
    assert (
        (token % 2 == 1).all()
        and logprob.isfinite().all()
        and (sampling >= logprob - 1e-5).all()
    )


def test_greedy_takes_the_likeliest_and_reports_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 0.0]])
    token, logprob, sampling = sample_tokens(
        logits, torch.full((2, 2), 0.9), SamplingParams(temperature=0, top_k=2)
    )
    assert token.tolist() == [1, 0] and sampling.tolist() == [0.0, 0.0]
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[torch.arange(2), token])


def test_without_truncation_both_logprobs_are_the_same_numbers():
    _, logprob, sampling = draw_grid([0.1, 2.0, -1.0], SamplingParams(temperature=0.7))
    assert torch.equal(logprob, sampling)


def test_logits_are_left_alone():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sample_tokens(logits, torch.full((3, 2), 0.5), SamplingParams(0.5, 3, 0.8, 0.1))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
    ],
)
def test_what_makes_no_sense_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}: [^\n]*$"):
        SamplingParams(**{name: value})
