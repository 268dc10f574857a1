"""Whatever shares a row, every token sees its own sequence and no other, as in a pass by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomath.models.batches import (
    Example,
    lay_out,
    layout_states,
    make_batch,
    micro_batches,
)
from nanomath.models.scores import response_logprobs, response_scores
from nanomath.process.states import states_at, with_common_prompts

CONFIGS = {
    "llama": {},
    "window": {"model_type": "mistral", "sliding_window": 5},
    "qk_norm": {"model_type": "qwen3", "qk_norm": True, "num_kv_heads": 1},
    "bias": {"model_type": "qwen2", "qkv_bias": True, "num_kv_heads": 4},
    "scaled": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}
# Few prompts, so that some are shared, and one that begins as another does.
prompts = st.sampled_from([[1], [2, 2, 5], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3], [9] * 11])
examples = st.lists(
    st.builds(Example, prompts, st.lists(st.integers(0, 49), max_size=8)),
    min_size=1,
    max_size=9,
)
FIXED = [
    Example([3, 5, 7], [11, 13]),
    Example([2], [0, 0, 0, 9, 8, 7]),
    Example([3, 5, 7], []),
    Example([4] * 4, [0]),
    Example([3, 5, 7], [11, 14, 15]),
]
property_test = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=CONFIGS)
def model(request, new_model):
    return new_model(3, torch.float64, **CONFIGS[request.param])


def alone(model, example: Example, temperature: float = 1.0) -> torch.Tensor:
    """Logprobs of one response from a plain forward pass."""
    logits = model(torch.tensor([example.prompt + example.response]))
    chosen = torch.tensor(example.response, dtype=torch.int64)[:, None]
    predicting = logits[0, len(example.prompt) - 1 : -1]
    return (predicting / temperature).log_softmax(-1).gather(-1, chosen)[:, 0]


def loss_of(rows, examples) -> torch.Tensor:
    """A sum in which no two tokens of any example weigh the same."""
    parts = []
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        n = len(example.response)
        parts.append(
            (row[:n] * torch.arange(i + 1.0, i + 1 + n, dtype=torch.float64)).sum()
        )
    return torch.stack(parts).sum()


@given(examples=examples, share=st.booleans(), checkpointing=st.booleans())
@property_test
def test_values_and_gradients_are_those_of_passes_by_themselves(
    model, share, checkpointing, examples
):
    model.gradient_checkpointing = checkpointing
    model.zero_grad()
    rows = [alone(model, example, 0.7) for example in examples]
    loss_of(rows, examples).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logprobs, entropy = response_logprobs(model, make_batch(examples, share), 0.7)
    for row, other in zip(logprobs, rows, strict=True):
        torch.testing.assert_close(row[: len(other)], other, rtol=0, atol=1e-10)
        assert not row[len(other) :].any()
    assert not entropy.requires_grad
    loss_of(logprobs, examples).backward()
    for name, parameter in model.named_parameters():
        scale = 1 + float(expected[name].abs().max())
        found = parameter.grad
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-10 * scale)


def test_entropy_is_its_definition(new_model):
    model = new_model(dtype=torch.float64)
    with torch.no_grad():
        p = model(torch.tensor([[3, 5, 7, 11, 13]]))[0, 2:4].softmax(-1)
        _, entropy = response_logprobs(model, make_batch(FIXED))
    torch.testing.assert_close(
        entropy[0, :2], -(p * p.log()).sum(-1), rtol=0, atol=1e-10
    )


def test_score_is_the_same_for_every_budget(new_model):
    model = new_model()
    expected = torch.zeros(len(FIXED), 6)
    with torch.no_grad():
        for row, example in zip(expected, FIXED, strict=True):
            row[: len(example.response)] = alone(model, example)
    for budget in (0, 1, 8, 1000):
        scores, _ = response_scores(model, FIXED, budget)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@given(examples=examples, share=st.booleans())
@property_test
def test_every_token_has_its_place(examples, share):
    batch = make_batch(examples, share)
    layout, places = lay_out(examples, share)
    for example, where in zip(examples, places, strict=True):
        assert layout.tokens[0, where].tolist() == example.prompt + example.response
        assert layout.positions[0, where].tolist() == list(range(len(example)))
    laid_out = batch.matrix(batch.target)
    for i, example in enumerate(examples):
        n = len(example.response)
        assert laid_out[i].tolist() == example.response + [0] * (laid_out.shape[1] - n)
        mine = (batch.sequence == i).nonzero()[:, 0]
        assert (
            batch.place[mine].tolist()
            == places[i][len(example.prompt) - 1 : -1].tolist()
        )
        assert batch.offset[mine].tolist() == list(range(n))
    assert batch.lengths.tolist() == [len(e.response) for e in examples]
    start, length, _ = layout.pieces.table.unbind(1)
    pieces = [torch.arange(a, a + n) for a, n in zip(start, length, strict=True)]
    assert torch.cat(pieces).tolist() == list(range(layout.tokens.shape[1]))
    assert layout.tokens.shape[1] == distinct(examples, share)


def distinct(examples, share: bool) -> int:
    """Tokens that there are, with shared prompts counted once."""
    if not share:
        return sum(map(len, examples))
    once = {tuple(example.prompt) for example in examples}
    return sum(map(len, once)) + sum(len(example.response) for example in examples)


def test_what_fills_the_pieces_up_is_never_seen(model):
    batch = make_batch(FIXED)
    expected, _ = response_logprobs(model, batch)
    block = batch.layout.pieces.block
    queries = torch.randint(batch.layout.tokens.shape[1], block.queries.shape)
    queries.view(-1)[block.kept] = block.queries.flatten()[block.kept]
    ends = block.first + batch.layout.pieces.table[:, 1]
    keys = torch.randint(batch.layout.tokens.shape[1], block.keys.shape)
    real = torch.arange(keys.shape[1]) < ends[:, None]
    keys = torch.where(real, block.keys, keys)
    filled = block._replace(queries=queries, keys=keys)
    vars(batch.layout.pieces)["block"] = filled
    found, _ = response_logprobs(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_to_moves_every_tensor():
    moved = make_batch(FIXED).to("meta")
    tensors = [moved.place, moved.target, moved.sequence, moved.offset, moved.lengths]
    layout = moved.layout
    tensors += [layout.tokens, layout.positions, layout.pieces.table]
    assert all(tensor.device.type == "meta" for tensor in tensors)


@given(examples=examples, budget=st.integers(0, 60), share=st.booleans())
@property_test
def test_micro_batches_cover_everything_once_within_the_budget(examples, budget, share):
    groups = micro_batches(examples, budget, share)
    assert sorted(i for group in groups for i in group) == list(range(len(examples)))
    assert all(groups) and (budget or len(groups) <= 1)
    for group in groups:
        size = distinct([examples[i] for i in group], share)
        assert len(group) == 1 or not budget or size <= budget


def test_a_group_is_not_taken_apart_where_it_fits():
    groups = [Example([p] * 10, [1] * (2 + i)) for p in range(3) for i in range(4)]
    assert [len(rows) for rows in micro_batches(groups, 30)] == [4, 4, 4]
    assert [len(rows) for rows in micro_batches(groups, 60)] == [8, 4]
    assert micro_batches([], 30) == []


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="sequence 1 has an empty prompt"):
        make_batch([Example([1], [2]), Example([], [2])])


# --- states of any places --------------------------------------------------------------------


def collected(model, sequences, places, groups, budget):
    found = [None] * len(sequences)
    given = with_common_prompts(sequences, places, groups)
    assert [example.prompt + example.response for example in given] == sequences
    for rows, states in states_at(model, given, places, budget):
        assert (
            len(states) == sum(len(places[i]) for i in rows)
            and not states.requires_grad
        )
        for i in rows:
            assert found[i] is None
            found[i] = states[: len(places[i])]
            states = states[len(places[i]) :]
    return found


def check(model, sequences, places, groups, budget):
    found = collected(model, sequences, places, groups, budget)
    for states, tokens, at in zip(found, sequences, places, strict=True):
        with torch.no_grad():
            expected = model.hidden(torch.tensor([tokens]))[0, at]
        torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9)


@st.composite
def batches(draw):
    """Sequences of a few groups, that share more or less with the others of theirs."""
    token = st.integers(0, 9)
    drawn = []
    for group in range(draw(st.integers(1, 4))):
        start = draw(st.lists(token, max_size=12))
        for _ in range(draw(st.integers(1, 4))):
            tokens = start + draw(st.lists(token, min_size=1, max_size=8))
            at = draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=4))
            drawn.append((tokens, at, group))
    return [list(part) for part in zip(*draw(st.permutations(drawn)), strict=True)]


@given(batch=batches(), budget=st.sampled_from([0, 1, 17, 40, 1000]))
@property_test
def test_states_as_of_whole_passes(model, batch, budget):
    check(model, *batch, budget)


def test_a_place_in_what_is_shared(model):
    """Alike sequences share what comes before the first place; places need not be sorted."""
    check(model, [[1, 2, 3, 4]] * 3, [[3, 0], [2], [1, 1]], ["q"] * 3, 0)
    check(model, [[1, 2, 3, 4]] * 3, [[3], [3], [3]], ["q"] * 3, 0)


def test_what_is_shared_is_computed_once(new_model, monkeypatch):
    model = new_model(0, torch.float64)
    passes = []
    hidden = model.hidden

    def count(tokens, *args, **options):
        passes.append(tokens.numel())
        return hidden(tokens, *args, **options)

    monkeypatch.setattr(model, "hidden", count)
    sequences = [[*range(20), 50 + i, 60 + i] for i in range(8)]
    collected(model, sequences, [[21]] * 8, ["q"] * 8, 0)
    collected(model, [[i, 2, 3] for i in range(4)], [[2]] * 4, list("abcd"), 0)
    assert passes == [20 + 8 * 2, 4 * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_rows_have_the_bits_of_sequences_by_themselves(new_model, dtype):
    model = new_model(0, dtype, sliding_window=6, model_type="mistral")
    model.exact = True
    layout, places = lay_out(FIXED)
    with torch.no_grad():
        states = layout_states(model, layout)
        for where, example in zip(places, FIXED, strict=True):
            by_itself = model.hidden(torch.tensor([example.prompt + example.response]))[
                0
            ]
            assert torch.equal(states[where], by_itself)
