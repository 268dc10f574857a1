"""Exact mode: the sampler's logprobs are the trainer's to the last bit, and samples depend on
nothing around them.
"""

from __future__ import annotations

import random

import pytest
import torch

from kernels import packed
from kernels.attention import Pages, new_pages
from kernels.rope_write import rope_write
from nanomath.models.batches import Example
from nanomath.models.scores import response_scores
from nanomath.rollout import Completion, Sampler
from nanomath.rollout.decoder import Decoder

EOS = range(0, 1000, 25)
WIDTH, LONGEST = (
    40,
    100,
)  # of completions and prompts: some need one block of keys, some three


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch) -> None:
    """A small model is stepped in one call: the tests' model, and as if it were not one."""
    if request.param == "large":
        monkeypatch.setattr(packed, "SMALL", 0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def prompts(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [
            draw.randrange(1, 1000)
            for _ in range(draw.choice((1, 2, 30, 63, 64, 65, LONGEST)))
        ]
        for _ in range(count)
    ]


def trainer_logprobs(
    model, asked: list[list[int]], found: list[Completion], budget: int, t: float
) -> list[list[float]]:
    """In the trainer's own batches, which mix lengths and depend on the budget."""
    examples = [Example(asked[c.prompt_index], c.tokens) for c in found]
    logprobs, _ = response_scores(model, examples, budget, t)
    return [row[: c.length].tolist() for row, c in zip(logprobs, found, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gap_is_zero(
    size, new_model, new_tokenizer, family_shape, dtype, temperature
):
    model, asked = new_model(1, dtype, max_positions=256, **family_shape), prompts(0, 5)
    model.exact = True
    found = Sampler(model, new_tokenizer(EOS), 7, exact=True).generate(
        asked, n=3, max_new_tokens=WIDTH, temperature=temperature, seed=2
    )
    for budget in (0, 300):
        expected = trainer_logprobs(model, asked, found, budget, temperature)
        assert [c.logprobs for c in found] == expected


def test_the_gap_is_zero_under_truncation_and_when_greedy(
    size, new_model, new_tokenizer
):
    model, asked = new_model(1, max_positions=256), prompts(1, 4)
    model.exact = True
    sampler = Sampler(model, new_tokenizer(EOS), 7, exact=True)
    for options in (
        {"top_k": 20},
        {"top_p": 0.8, "temperature": 1.3},
        {"min_p": 0.1},
        {"temperature": 0.0},
    ):
        found = sampler.generate(asked, n=2, max_new_tokens=WIDTH, **options)
        expected = trainer_logprobs(
            model, asked, found, 0, options.get("temperature") or 1.0
        )
        assert [c.logprobs for c in found] == expected, options


def test_both_logprobs_of_a_truncation_that_cuts_nothing_are_the_trainers(
    size, new_model, new_tokenizer
):
    """The truncated one is the trainer's logprob and the mass that is left, here all of it."""
    found = Sampler(
        new_model(1, max_positions=256), new_tokenizer(EOS), 7, exact=True
    ).generate(prompts(1, 4), n=2, max_new_tokens=WIDTH, min_p=1e-30)
    assert [c.sampling_logprobs for c in found] == [c.logprobs for c in found]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=str,
)
def test_samples_depend_on_nothing_around_them(
    size, new_model, new_tokenizer, dtype, threads
):
    model, asked = new_model(2, dtype, max_positions=256), prompts(2, 12)
    expected = None
    for slots, used in ((1, 1), (5, 1), (64, 2), (17, 2)):
        threads(used)
        order = random.Random(slots).sample(range(len(asked)), len(asked))
        sampler = Sampler(model, new_tokenizer(EOS), slots, exact=True)
        found = sampler.generate(
            [asked[i] for i in order], n=4, max_new_tokens=WIDTH, seed=3
        )
        known = {
            (order[c.prompt_index], c.sample_index): (c.tokens, c.logprobs)
            for c in found
        }
        assert known == (expected or known)
        expected = known


@pytest.mark.parametrize("exact", [True, False])
def test_long_samples_move_with_all_their_keys(size, new_model, new_tokenizer, exact):
    """Few ends, so that samples of several blocks are there when others end and slots are
    given up.
    """
    model, asked = new_model(6, max_positions=400), prompts(5, 6)
    model.exact = exact
    found = Sampler(model, new_tokenizer(range(0, 1000, 90)), 9, exact=exact).generate(
        asked, n=4, max_new_tokens=260
    )
    assert len({c.length // 64 for c in found}) == 5
    expected = trainer_logprobs(model, asked, found, 0, 1.0)
    gaps = [
        abs(a - b)
        for c, row in zip(found, expected, strict=True)
        for a, b in zip(c.logprobs, row, strict=True)
    ]
    assert max(gaps) == 0 if exact else 0 < max(gaps) < 1e-4


def test_the_fast_mode_is_not_that_exact(new_model, new_tokenizer):
    """Else the tests above would show nothing."""
    model, asked = new_model(1, max_positions=256), prompts(0, 5)
    found = Sampler(model, new_tokenizer(EOS), 7).generate(
        asked, n=3, max_new_tokens=WIDTH, seed=2
    )
    expected = trainer_logprobs(model, asked, found, 0, 1.0)
    gaps = [
        abs(a - b)
        for c, row in zip(found, expected, strict=True)
        for a, b in zip(c.logprobs, row, strict=True)
    ]
    assert 0 < max(gaps) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit_of_the_fast_mode_either(
    size, new_model, new_tokenizer, dtype, threads
):
    """The sampler tries out how many are best: a run must not depend on what it found."""
    model, asked = new_model(3, dtype, max_positions=256), prompts(4, 6)
    runs = []
    for used in (1, 2):
        threads(used)
        runs.append(
            Sampler(model, new_tokenizer(EOS), 9).generate(
                asked, n=4, max_new_tokens=WIDTH, seed=3
            )
        )
    assert runs[0] == runs[1]


def test_the_exact_model_is_the_same_function(new_model, family_shape):
    """In value and gradient, up to rounding."""
    tokens = torch.randint(
        0, 1000, (2, 150), generator=torch.Generator().manual_seed(0)
    )
    model = new_model(4, torch.float64, max_positions=256, **family_shape)
    results = []
    for exact in (False, True):
        model.exact = exact
        logprobs = model(tokens).log_softmax(-1)
        model.zero_grad()
        logprobs[:, :, 7].sum().backward()
        results.append(
            [logprobs.detach(), *(p.grad.clone() for p in model.parameters())]
        )
    assert model.exact
    for plain, exact in zip(*results, strict=True):
        torch.testing.assert_close(exact, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_normed_by_the_trainers_kernel(new_model, dtype):
    """On a GPU the decoder norms them so, before rope_write, which then has no norm to do."""
    model = new_model(5, dtype, model_type="qwen3", qk_norm=True, head_dim=12)
    decoder, config = Decoder(model, dtype, exact=True), model.config
    decoder.refresh()
    weights, rope = decoder.layers[0], decoder.rope(20)
    rows, kv_heads, dim = 9, config.num_kv_heads, config.head_dim
    qkv = torch.randn(
        rows,
        (config.num_heads + 2 * kv_heads) * dim,
        generator=torch.Generator().manual_seed(1),
    )
    qkv, place, norms = (
        qkv.to(dtype),
        torch.arange(rows, dtype=torch.int32),
        (weights.q_norm, weights.k_norm),
    )
    found = []
    for given, by_kernel in (
        (qkv, norms),
        (decoder.with_normed_heads(qkv, *norms), (None, None)),
    ):
        pages = [p.zero_() for p in new_pages((1,), kv_heads, dim, dtype, qkv.device)]
        table = torch.zeros(1, 1, dtype=torch.int32)
        q = rope_write(
            given,
            place,
            torch.zeros_like(place),
            rope,
            Pages(*pages, table),
            by_kernel,
            decoder.eps,
        )
        found.append([q, *pages])
    assert not torch.equal(found[0][0].flatten(1), qkv[:, : found[0][0][0].numel()])
    assert all(map(torch.equal, *found))
