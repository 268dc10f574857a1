"""States of sequences that begin alike, against whole passes over each of them; and that the
beginnings are shared.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomath.models.shared_prefix import states_at

CONFIGS = {
    "llama": {},
    "window": {"model_type": "mistral", "sliding_window": 5},
    "qk_norm": {"model_type": "qwen3", "qk_norm": True, "num_kv_heads": 1},
    "bias": {"model_type": "qwen2", "qkv_bias": True, "num_kv_heads": 4},
}
SCALED = {"rope_type": "linear", "factor": 2.0}


def whole(model, sequences, places):
    """The same states, each sequence by itself."""
    with torch.no_grad():
        return [
            model.hidden(torch.tensor([tokens]))[0, at]
            for tokens, at in zip(sequences, places, strict=True)
        ]


def collected(model, sequences, places, groups, budget):
    found = [None] * len(sequences)
    for rows, states in states_at(model, sequences, places, groups, budget):
        assert len(states) == sum(len(places[i]) for i in rows)
        for i in rows:
            assert found[i] is None
            found[i], states = states[: len(places[i])], states[len(places[i]) :]
    return found


def check(model, sequences, places, groups, budget):
    found, expected = (
        collected(model, sequences, places, groups, budget),
        whole(model, sequences, places),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def counted(model, monkeypatch) -> list[int]:
    """The padded tokens of every pass from here on."""
    passes, hidden = [], model.hidden

    def count(tokens, *args, **kwargs):
        passes.append(tokens.numel())
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", count)
    return passes


@pytest.fixture(params=CONFIGS)
def model(request, new_model):
    return new_model(3, torch.float64, **CONFIGS[request.param])


@st.composite
def batches(draw):
    """Sequences of a few groups, that share more or less with the others of theirs."""
    token = st.integers(0, 9)
    sequences, places, groups = [], [], []
    for group in range(draw(st.integers(1, 4))):
        start = draw(st.lists(token, max_size=12))
        for _ in range(draw(st.integers(1, 4))):
            tokens = start + draw(st.lists(token, min_size=1, max_size=8))
            at = draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=4))
            sequences.append(tokens), places.append(at), groups.append(group)
    order = draw(st.permutations(range(len(sequences))))
    return [[part[i] for i in order] for part in (sequences, places, groups)]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=batches(), budget=st.sampled_from([0, 1, 17, 40, 1000]))
def test_as_whole_passes(model, batch, budget):
    check(model, *batch, budget)


def test_a_place_in_what_is_shared(model):
    """Sequences that are all alike share what comes before the first place, which need not be
    sorted.
    """
    check(model, [[1, 2, 3, 4]] * 3, [[3, 0], [2], [1, 1]], ["q"] * 3, 0)
    check(model, [[1, 2, 3, 4]] * 3, [[3], [3], [3]], ["q"] * 3, 0)


def test_positions_are_scaled_alike(new_model):
    model = new_model(1, torch.float64, rope_scaling=SCALED)
    check(model, [[1, 2, 3, 4], [1, 2, 5]], [[3], [2]], ["q", "q"], 0)


def test_what_is_shared_is_computed_once(new_model, monkeypatch):
    model = new_model(0, torch.float64)
    passes = counted(model, monkeypatch)
    sequences = [[*range(20), 50 + i, 60 + i] for i in range(8)]
    collected(model, sequences, [[21]] * 8, ["q"] * 8, 0)
    assert passes == [20, 8 * 2]


def test_those_alone_make_one_pass(new_model, monkeypatch):
    model = new_model(0, torch.float64)
    passes = counted(model, monkeypatch)
    collected(model, [[1, 2, 3]] * 4, [[2]] * 4, list("abcd"), 0)
    assert passes == [4 * 3]


@pytest.mark.parametrize("budget", [30, 64, 200])
def test_no_pass_is_larger_than_the_budget(new_model, monkeypatch, budget):
    model = new_model(0, torch.float64)
    passes = counted(model, monkeypatch)
    groups = [g for g in range(6) for _ in range(5)]
    sequences = [[g] * (10 + 3 * g) + [i] * (1 + i % 4) for i, g in enumerate(groups)]
    check(model, sequences, [[len(tokens) - 1] for tokens in sequences], groups, budget)
    ours = passes[: -len(sequences)]
    assert max(ours) <= budget and (len(ours) == 2) == (budget == 200)


def test_no_gradient_is_kept(new_model):
    ((_, states),) = states_at(new_model(0), [[1, 2]], [[1]], ["q"])
    assert not states.requires_grad
