"""Choosing tokens: exact frequencies over a grid of u, truncation against a loop, and the ends of the unit interval."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanomath.rollout.sampling import SamplingParams, sample_tokens, truncate

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
    """The tokens that top-k, then top-p, then min-p leave, by going down the list of the likeliest."""
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
    return close or any(abs(v - params.min_p * order[0]) < 1e-5 * order[0] for v in order[1:])


def draw_grid(logits: list[float], params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and logprobs at GRID evenly spaced u."""
    u = (torch.arange(GRID) + 0.5) / GRID
    return sample_tokens(torch.tensor([logits]).expand(GRID, -1), u, params)


@settings(max_examples=60, deadline=None)
@given(some_logits, some_params)
def test_frequencies_and_logprobs(logits, params):
    p = softmax(logits, params.temperature)
    assume(len(set(p)) == len(p) and not is_close_call(p, params))  # ties have a test of their own
    kept = kept_tokens(p, params)
    mass = sum(p[v] for v in kept)
    token, logprob, sampling = draw_grid(logits, params)
    for v in range(len(p)):
        chosen = token == v
        expected = p[v] / mass if v in kept else 0.0
        assert float(chosen.float().mean()) == pytest.approx(expected, abs=2 / GRID)
        if chosen.any():
            assert logprob[chosen].tolist() == pytest.approx([math.log(p[v])] * int(chosen.sum()), abs=1e-4)
            assert sampling[chosen].tolist() == pytest.approx([math.log(p[v] / mass)] * int(chosen.sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": 2}, [0.25, 0.25, 0, 0]),  # ties: the first ones stay
        ({"top_p": 0.5}, [0.25, 0.25, 0, 0]),  # half is reached by two
        ({"top_p": 0.51}, [0.25, 0.25, 0.25, 0]),
        ({"min_p": 1.0}, [0.25, 0.25, 0.25, 0.25]),
        ({"top_k": 9}, [0.25, 0.25, 0.25, 0.25]),
        ({"top_k": 3, "top_p": 0.5}, [0.25, 0.25, 0, 0]),  # half of the three that top-k left
    ],
)
def test_ties(params, expected):
    assert truncate(torch.full((1, 4), 0.25), SamplingParams(**params)).tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9), some_params)
def test_truncation_is_a_loop_down_the_likeliest(weights, params):
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    assume(not is_close_call(p, params))
    before = torch.tensor([p], dtype=torch.float64)
    given_ = before.clone()
    kept = set(kept_tokens(p, params))
    assert truncate(given_, params).tolist() == [[v if i in kept else 0.0 for i, v in enumerate(p)]]
    assert torch.equal(given_, before)


ends = st.sampled_from([0.0, 1e-45, 0.5, 1 - 2**-24, 1 - 2**-23])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=12), ends, some_params)
def test_no_impossible_token_at_the_ends_of_the_interval(logits, u, params):
    row = torch.tensor([logits])
    token, logprob, sampling = sample_tokens(row, torch.tensor([u]), params)
    p = (row / params.temperature).softmax(-1)[0]
    assert 0 <= int(token) < len(logits) and p[token] > 0
    assert logprob.isfinite().all() and sampling.isfinite().all()
    assert float(logprob) <= float(sampling) + 1e-6 <= 1e-5
    if params.top_k:
        assert int((p > p[token]).sum()) < params.top_k


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=40_000)])
def test_a_large_vocabulary_of_which_half_is_impossible(params):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50_000, generator=generator) * 3
    logits[:, ::2] = -math.inf  # the first one too
    u = torch.cat((torch.rand(60, generator=generator), torch.tensor([0.0, 1 - 2**-24])))
    token, logprob, sampling = sample_tokens(logits.expand(len(u), -1), u, params)
    assert (token % 2 == 1).all() and logprob.isfinite().all() and (sampling >= logprob - 1e-5).all()


def test_greedy_takes_the_likeliest_and_reports_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 0.0]])
    token, logprob, sampling = sample_tokens(logits, torch.tensor([0.9, 0.9]), SamplingParams(temperature=0, top_k=2))
    assert token.tolist() == [1, 0] and sampling.tolist() == [0.0, 0.0]
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[torch.arange(2), token])


def test_without_truncation_both_logprobs_are_the_same_numbers():
    _, logprob, sampling = draw_grid([0.1, 2.0, -1.0], SamplingParams(temperature=0.7))
    assert torch.equal(logprob, sampling)


def test_logits_are_left_alone():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sample_tokens(logits, torch.tensor([0.1, 0.5, 0.9]), SamplingParams(0.5, 3, 0.8, 0.1))
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
