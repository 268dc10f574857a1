"""The step of a small model in one call, against the decoder's layers and the sampler's
choice, family by family.
"""

from __future__ import annotations

import pytest
import torch

from kernels import packed
from nanomath.rollout import Sampler

EOS = range(0, 1000, 25)
PROMPTS = [
    [5],
    [7, 300, 12, 44],
    [9] * 11,
    [3] * 30,
    list(range(1, 26)),
    [8] * 66,
    list(range(9, 105)),
]


def samples(model, tokenizer, check_every: int | None = None, **options):
    sampler = Sampler(model, tokenizer, 7)
    sampler.check_every = check_every
    return sampler.generate(PROMPTS, n=3, max_new_tokens=30, seed=1, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_the_same_samples_as_layer_by_layer(
    new_model, new_tokenizer, family_shape, temperature, monkeypatch
):
    model, tokenizer = new_model(1, **family_shape), new_tokenizer(EOS)
    sampler = Sampler(model, tokenizer, 7)
    sampler.decoder.refresh()
    assert sampler.decoder.small is not None
    found = samples(model, tokenizer, temperature=temperature)
    assert samples(model, tokenizer, check_every=1, temperature=temperature) == found
    monkeypatch.setattr(packed, "SMALL", 0)
    sampler.decoder.refresh()
    assert sampler.decoder.small is None
    expected = samples(model, tokenizer, temperature=temperature)
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=2e-5)


def test_a_step_on_the_optimizer_is_seen(new_model, new_tokenizer):
    """The weights are laid out for each call of `generate` again."""
    model, tokenizer = new_model(1), new_tokenizer(EOS)
    sampler = Sampler(model, tokenizer, 7)
    options = {"n": 2, "max_new_tokens": 10}
    sampler.generate(PROMPTS, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.1)  # unseen by its version
    assert sampler.generate(PROMPTS, **options) == Sampler(
        model, tokenizer, 7
    ).generate(PROMPTS, **options)


def test_other_types_go_layer_by_layer(new_model, new_tokenizer):
    for dtype in (torch.bfloat16, torch.float16):
        model = new_model(1, dtype)
        sampler = Sampler(model, new_tokenizer(EOS), 7)
        assert len(sampler.generate(PROMPTS, n=1, max_new_tokens=3)) == len(PROMPTS)
        assert sampler.decoder.small is None
    wide = Sampler(new_model(1), new_tokenizer(EOS), 7, dtype=torch.bfloat16)
    wide.generate(PROMPTS, n=1, max_new_tokens=3)
    assert wide.decoder.small is None


def test_threads_change_no_bit(new_model, new_tokenizer):
    model, before, found = new_model(2), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(samples(model, new_tokenizer(EOS)))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
