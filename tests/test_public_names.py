"""The names that other people's scripts rely on: that they exist, what they take, and what
they give.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanomath
from nanomath import algorithms

ROOT = Path(__file__).parents[1]


def parameters(function) -> dict[str, object]:
    """Names and defaults in order; what has no default is required."""
    named = inspect.signature(function).parameters.values()
    return {
        p.name: p.default if p.default is not p.empty else "required"
        for p in named
        if p.name != "self"
    }


def test_importing_loads_nothing_heavy_and_any_name_loads_on_demand():
    code = (
        "import sys, nanomath;"
        "heavy = {'torch', 'numpy', 'sympy', 'tokenizers', 'jinja2', 'huggingface_hub', "
        "'tqdm', 'transformers'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "from nanomath import extract_answer, answers_equal;"
        "assert answers_equal('7', extract_answer('so it is \\\\boxed{7}'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_name_is_there():
    promised = {
        "load_model",
        "load_tokenizer",
        "save_model",
        "Sampler",
        "Completion",
        "extract_answer",
        "answers_equal",
    }
    assert promised | {"__version__"} == set(nanomath.__all__)
    assert all(callable(getattr(nanomath, name)) for name in promised)


def test_a_name_that_is_not_there():
    with pytest.raises(
        AttributeError, match="module 'nanomath' has no attribute 'sampler'"
    ):
        nanomath.sampler  # noqa: B018
    with pytest.raises(ImportError):
        from nanomath import Trainer  # noqa: F401


def test_signatures():
    assert parameters(nanomath.load_model) == {
        "path_or_hub_id": "required",
        "device": "cpu",
        "dtype": torch.float32,
        "head": None,
        "base": "",
    }
    assert parameters(nanomath.load_tokenizer) == {
        "path_or_hub_id": "required",
        "base": "",
    }
    assert list(parameters(nanomath.save_model))[:3] == [
        "model",
        "tokenizer",
        "directory",
    ]
    options = {
        "slots": 64,
        "exact": False,
        "dtype": None,
        "share_prompts": True,
        "keep": True,
    }
    assert parameters(nanomath.Sampler) == {
        "model": "required",
        "tokenizer": "required",
        **options,
    }
    generate = parameters(nanomath.Sampler.generate)
    assert (
        generate.items()
        >= {
            **{
                "prompts": "required",
                "n": 1,
                "max_new_tokens": 256,
                "temperature": 1.0,
            },
            **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop": (), "seed": 0},
        }.items()
    )
    assert list(generate)[0] == "prompts"
    assert next(iter(parameters(nanomath.extract_answer))) == "text"
    assert list(parameters(nanomath.answers_equal)) == ["gold", "prediction"]


def test_fields_of_a_completion():
    fields = [field.name for field in dataclasses.fields(nanomath.Completion)]
    assert {
        "prompt_index",
        "sample_index",
        "tokens",
        "logprobs",
        "text",
        "finish_reason",
    } <= set(fields)
    assert fields[:2] == ["prompt_index", "sample_index"]


def test_algorithms():
    from nanomath.algorithms import (  # the line of the documentation
        gae,
        group_advantages,
        kl_estimate,
        policy_loss,
        process_advantages,
        sft_loss,
    )

    named = (
        gae,
        group_advantages,
        kl_estimate,
        policy_loss,
        process_advantages,
        sft_loss,
    )
    assert all(inspect.isfunction(function) and function.__doc__ for function in named)
    assert set(algorithms.__all__) >= {function.__name__ for function in named}
    assert all(hasattr(algorithms, name) for name in algorithms.__all__)
    assert list(parameters(sft_loss))[:2] == ["logprobs", "weights"]
    assert list(parameters(policy_loss))[:4] == [
        "logprobs",
        "old_logprobs",
        "advantages",
        "weights",
    ]
    assert list(parameters(gae))[:3] == ["rewards", "values", "mask"]


def test_the_example_of_the_documentation(new_model, tokenizer, tmp_path):
    """Save, load, ask: the shapes, the order and the fields that are promised."""
    original = new_model()
    nanomath.save_model(original, tokenizer, tmp_path / "model")
    model = nanomath.load_model(tmp_path / "model", device="cpu", dtype=torch.float32)
    tokenizer = nanomath.load_tokenizer(tmp_path / "model")

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}], add_generation_prompt=True
    )
    assert (
        isinstance(text, str) and tokenizer.decode(tokenizer.encode("1+1=")) == "1+1="
    )
    tokens = torch.tensor([tokenizer.encode("1+1="), tokenizer.encode("2+2=")])
    logits = model(tokens)
    assert (
        logits.shape == (*tokens.shape, tokenizer.vocab_size)
        and logits.dtype == torch.float32
    )
    assert torch.equal(logits, original(tokens))

    sampler = nanomath.Sampler(model, tokenizer, slots=2)
    out = sampler.generate(
        tokens.tolist(), n=3, max_new_tokens=5, temperature=1.0, stop=("\n",), seed=0
    )
    assert [(c.prompt_index, c.sample_index) for c in out] == [
        (p, s) for p in range(2) for s in range(3)
    ]
    for completion in out:
        assert isinstance(completion, nanomath.Completion)
        assert 1 <= len(completion.tokens) == len(completion.logprobs) <= 5
        assert completion.finish_reason in ("eos", "stop", "length") and isinstance(
            completion.text, str
        )
    assert nanomath.extract_answer(out[0].text) is None
