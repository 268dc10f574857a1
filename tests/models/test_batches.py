"""Packing: whatever the layout, every response token is predicted from its own sequence and no
other.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.models.batches import (
    Example,
    make_batch,
    micro_batches,
    pack_rows,
    response_logprobs,
    response_scores,
)

some_lengths = st.lists(st.integers(1, 30), max_size=25)
examples = st.lists(
    st.builds(
        Example,
        st.lists(st.integers(1, 99), min_size=1, max_size=5),
        st.lists(st.integers(1, 99), max_size=6),
    ),
    min_size=1,
    max_size=7,
)
FIXED = [
    Example([3, 5, 7], [11, 13]),
    Example([2], [0, 0, 0, 9, 8, 7]),
    Example([6, 6], []),
    Example([4] * 4, [0]),
]


def alone(model, example: Example, temperature: float = 1.0) -> torch.Tensor:
    """Logprobs of one response from a plain forward pass."""
    logits = model(torch.tensor([example.prompt + example.response]))[
        0, len(example.prompt) - 1 : -1
    ]
    chosen = torch.tensor(example.response, dtype=torch.int64)[:, None]
    return (logits / temperature).log_softmax(-1).gather(-1, chosen)[:, 0]


@pytest.mark.parametrize("row_length", [0, 7, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_documents_do_not_see_one_another(new_model, family_shape, row_length, temperature):
    model = new_model(dtype=torch.float64, **family_shape)
    batch = make_batch(FIXED, row_length)
    with torch.no_grad():
        logprobs, entropy = response_logprobs(model, batch, temperature)
        for row, example in zip(logprobs, FIXED, strict=True):
            n = len(example.response)
            torch.testing.assert_close(
                row[:n], alone(model, example, temperature), rtol=0, atol=1e-10
            )
            assert torch.equal(row[n:], torch.zeros(6 - n, dtype=torch.float64))
    assert (entropy[1] > 0).all() and not entropy.requires_grad


def test_entropy_is_its_definition(new_model):
    model = new_model(dtype=torch.float64)
    with torch.no_grad():
        p = model(torch.tensor([[3, 5, 7, 11, 13]]))[0, 2:4].softmax(-1)
        _, entropy = response_logprobs(model, make_batch(FIXED))
    torch.testing.assert_close(entropy[0, :2], -(p * p.log()).sum(-1), rtol=0, atol=1e-10)


def test_score_is_the_same_for_every_budget(new_model):
    model = new_model()
    expected = torch.zeros(4, 6)
    with torch.no_grad():
        for row, example in zip(expected, FIXED, strict=True):
            row[: len(example.response)] = alone(model, example)
    for budget in (0, 1, 8, 1000):
        torch.testing.assert_close(
            response_scores(model, FIXED, budget)[0], expected, rtol=0, atol=1e-5
        )


@settings(max_examples=60, deadline=None)
@given(examples, st.sampled_from([0, 11, 23]))
def test_every_response_token_has_its_place(sequences, row_length):
    batch = make_batch(sequences, row_length)
    laid_out = batch.matrix(batch.target)
    for i, sequence in enumerate(sequences):
        n = len(sequence.response)
        assert laid_out[i].tolist() == sequence.response + [0] * (laid_out.shape[1] - n)
        places = (batch.sequence == i).nonzero()[:, 0]
        before = batch.tokens[batch.row[places], batch.column[places]].tolist()
        assert before == (sequence.prompt + sequence.response)[len(sequence.prompt) - 1 : -1]
        assert batch.offset[places].tolist() == list(range(n))
        assert batch.positions[batch.row[places], batch.column[places]].tolist() == [
            len(sequence.prompt) - 1 + t for t in range(n)
        ]
    assert batch.lengths.tolist() == [len(s.response) for s in sequences]
    assert (batch.documents is None) == (row_length == 0)
    assert batch.tokens.shape[1] <= (row_length or max(len(s) for s in sequences))
    if batch.documents is not None:
        assert int((batch.documents >= 0).sum()) == sum(len(s) for s in sequences)


def test_to_moves_every_field():
    moved = make_batch(FIXED, 20).to("meta")
    assert all(
        getattr(moved, name).device.type == "meta" for name in moved.__dataclass_fields__
    )
    assert make_batch(FIXED).to("cpu").documents is None


@settings(max_examples=100, deadline=None)
@given(some_lengths, st.integers(0, 80))
def test_micro_batches_cover_everything_once_within_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    if budget == 0:
        assert len(groups) <= 1
    else:
        assert all(
            len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
            for group in groups
        )


@settings(max_examples=100, deadline=None)
@given(some_lengths, st.integers(30, 60))
def test_rows_cover_everything_once_and_are_not_half_empty(lengths, row_length):
    rows = pack_rows(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(n <= row_length for n in filled)
    assert sum(n <= row_length / 2 for n in filled) <= 1  # two such rows would have been one


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="sequence 1 has an empty prompt"):
        make_batch([Example([1], [2]), Example([], [2])])
    with pytest.raises(ValueError, match="sequence 1 has 5 tokens: a row holds 4"):
        make_batch([Example([1], [2]), Example([1, 2], [3, 4, 5])], 4)
