"""The sampler on a GPU: the samples of the CPU, from graphs that outlive an update; exact
logprobs; memory.
"""

from __future__ import annotations

import pytest
import tokenizers
import torch

from nanomath.data.world import world_tokenizer
from nanomath.models import Tokenizer
from nanomath.models.batches import Example
from nanomath.models.scores import response_scores
from nanomath.rollout import Sampler, engine

pytestmark = pytest.mark.slow

EOS = range(0, 1000, 25)
PROMPTS = [[5], [7, 300, 12, 44], [9] * 11]
QWEN3 = {"model_type": "qwen3", "qk_norm": True}
MISTRAL = {"model_type": "mistral", "sliding_window": 5, "num_layers": 2}


@pytest.fixture(autouse=True)
def short_looks(monkeypatch):
    """What is asked for is short: without this most steps would be of slots that are done."""
    monkeypatch.setattr(engine, "LOOK_EVERY", 2)


def same(found, expected, atol: float = 1e-4) -> bool:
    """The same tokens, and logprobs up to rounding."""
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert [(c.text, c.finish_reason) for c in found] == [
        (c.text, c.finish_reason) for c in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=atol)
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=atol)
    return True


@pytest.mark.parametrize(
    ("shape", "sampling"),
    [
        (MISTRAL, {"n": 3}),
        (QWEN3, {"temperature": 0.0}),
        ({}, {"top_k": 50, "top_p": 0.8, "stop": ["e"]}),
    ],
    ids=["window", "greedy", "truncated"],
)
def test_the_samples_of_a_cpu(two_models, new_tokenizer, shape, sampling):
    cpu, gpu = two_models(**shape)
    options = {"n": 2, "max_new_tokens": 4, "seed": 1, **sampling}
    expected = Sampler(cpu, new_tokenizer(EOS), 3).generate(PROMPTS, **options)
    slots = 7 if options["n"] == 3 else 3  # of 5 rows there is no graph: they run as 6
    assert same(
        Sampler(gpu, new_tokenizer(EOS), slots).generate(PROMPTS, **options), expected
    )


def test_a_stop_string_that_is_a_special_token(two_models):
    """In a vocabulary where every other word is one, a sample stops where a CPU's does."""
    cpu, gpu = two_models()
    backend = tokenizers.Tokenizer.from_str(world_tokenizer().to_str())
    backend.add_special_tokens(
        [
            token
            for i in range(100, 1000, 2)
            if (token := backend.id_to_token(i)).isascii()
        ]
    )
    tokenizer, options = Tokenizer(backend), {"n": 2, "max_new_tokens": 4, "seed": 1}
    free = Sampler(cpu, tokenizer, 3).generate(PROMPTS, **options)
    stop = next(
        tokenizer.decode([t], False)
        for c in free
        for t in c.tokens[1:3]
        if not tokenizer.decode([t])
    )
    expected = Sampler(cpu, tokenizer, 3).generate(PROMPTS, stop=stop, **options)
    assert "stop" in [c.finish_reason for c in expected]
    assert same(
        Sampler(gpu, tokenizer, 3).generate(PROMPTS, stop=stop, **options), expected
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own", "bfloat16"])
def test_graphs_see_new_weights(two_models, new_tokenizer, dtype):
    """Weights that an optimizer changes in place, or their copy in another dtype."""
    _, model = two_models()
    options = {"n": 2, "max_new_tokens": 4, "seed": 1}
    sampler = Sampler(model, new_tokenizer(EOS), 3, dtype=dtype)
    before = sampler.generate(PROMPTS, **options)
    kept, graphs = sampler._engine, dict(sampler._engine.graphs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = sampler.generate(PROMPTS, **options)
    assert sampler._engine is kept and graphs and kept.graphs == graphs
    assert same(
        after,
        Sampler(model, new_tokenizer(EOS), 3, dtype=dtype).generate(PROMPTS, **options),
    )
    assert [c.tokens for c in after] != [c.tokens for c in before]


def test_moved_weights_make_new_graphs(two_models, new_tokenizer):
    cpu, model = two_models()
    options = {"n": 2, "max_new_tokens": 4, "seed": 1}
    sampler = Sampler(model, new_tokenizer(EOS), 3)
    sampler.generate(PROMPTS, **options)
    for module in (cpu, model):
        module.model.norm.weight = torch.nn.Parameter(module.model.norm.weight * 2)
    expected = Sampler(cpu, new_tokenizer(EOS), 3).generate(PROMPTS, **options)
    assert same(sampler.generate(PROMPTS, **options), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "sampling"),
    [
        (QWEN3, torch.float32, {}),
        ({}, torch.bfloat16, {}),
        ({}, torch.float32, {"top_p": 0.8}),
    ],
    ids=["qwen3", "bfloat16", "truncated"],
)
def test_exact_logprobs_are_the_trainers(
    two_models, new_tokenizer, shape, dtype, sampling
):
    _, model = two_models(dtype, **shape)
    options = {"n": 2, "max_new_tokens": 4, "seed": 1, **sampling}
    found = Sampler(model, new_tokenizer(EOS), 3, exact=True).generate(
        PROMPTS, **options
    )
    model.exact = True
    scored, _ = response_scores(
        model, [Example(PROMPTS[c.prompt_index], c.tokens) for c in found], 64
    )
    for row, completion in zip(scored, found, strict=True):
        assert torch.equal(row[: completion.length], torch.tensor(completion.logprobs))


def test_groups_read_their_pages_together(two_models, new_tokenizer):
    """Two full pages are shared, in a dtype that the tiles are made for; then by other rows,
    in the same graphs.
    """
    cpu, gpu = two_models(torch.float16)
    long, sampler = [i % 900 + 1 for i in range(130)], Sampler(gpu, new_tokenizer(), 6)
    for prompts, options in ([long, [7, 5]], {"n": 3}), ([[7, 5], long], {"n": 4}):
        options |= {"max_new_tokens": 3, "seed": 1}
        expected = Sampler(cpu, new_tokenizer(), 6).generate(prompts, **options)
        assert same(sampler.generate(prompts, **options), expected, atol=0.01)
        assert (6, 2) in [key[:2] for key in sampler._engine.graphs]


def test_a_step_has_few_kernels(gpu, two_models, new_tokenizer):
    """In a small model the time between them counts."""
    if gpu:
        pytest.skip("a real graph does not tell")
    for layers in 1, 2:
        _, model = two_models(
            torch.bfloat16, num_layers=layers, model_type="qwen2", qkv_bias=True
        )
        sampler = Sampler(model, new_tokenizer(), 2)
        sampler.generate([[5]], n=2, max_new_tokens=2)
        assert {len(graph.operations) for graph in sampler._engine.graphs.values()} == {
            7 + 10 * layers
        }


def test_a_stream_is_the_text(two_models, new_tokenizer):
    _, model = two_models()
    sampler = Sampler(model, new_tokenizer(EOS), 1)
    assert (
        "".join(sampler.stream(PROMPTS[1], 6))
        == sampler.generate([PROMPTS[1]], 1, 6)[0].text
    )


def test_release_gives_the_memory_back(two_models, new_tokenizer):
    _, model = two_models()
    before = torch.cuda.memory_allocated()
    sampler = Sampler(model, new_tokenizer(EOS), 2)
    sampler.generate(PROMPTS[:1], n=2, max_new_tokens=2)
    assert sampler._engine is not None
    sampler.release()
    assert sampler._engine is None and torch.cuda.memory_allocated() <= before + (
        32 << 20
    )  # but for cuBLAS's own


def test_memory_for_no_slot_and_for_some(two_models, new_tokenizer, monkeypatch):
    _, model = two_models()
    sampler = Sampler(model, new_tokenizer(EOS), 4)
    # A page of its own and two for prompts, keys and values of float32
    slot = 3 * 2 * 64 * 16 * 4
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (4 * slot, 4 * slot))
    with pytest.warns(UserWarning, match="3 of 4 slots fit"):
        assert len(sampler.generate([[5, 6]], n=4, max_new_tokens=2)) == 4
    sampler.release()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (slot, slot))
    with pytest.raises(
        MemoryError,
        match=r"a sequence of 4 tokens .* cuda:0 has 0\.00 GiB free: take a lower max_new",
    ):
        sampler.generate([[5, 6]], n=4, max_new_tokens=2)
