"""A real checkpoint gives the same greedy tokens as transformers, in float32, token for token.

NANOMATH_TEST_MODEL=models/SmolLM2-135M-Instruct python -m pytest
tests/rollout/test_real_model.py
"""

from __future__ import annotations

import os

import pytest
import torch

import nanomath
from nanomath.data.world import generate

MODEL = os.environ.get("NANOMATH_TEST_MODEL")


@pytest.mark.skipif(
    MODEL is None, reason="NANOMATH_TEST_MODEL names no model directory"
)
def test_greedy_tokens_of_ten_prompts_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = nanomath.load_model(MODEL), nanomath.load_tokenizer(MODEL)
    questions = [
        problem.question for problem in generate("maths", "test", 10, difficulty=(2, 6))
    ]
    prompts = [
        tokenizer.encode(
            tokenizer.apply_chat_template([{"role": "user", "content": question}])
        )
        for question in questions
    ]
    ours = nanomath.Sampler(model, tokenizer, slots=4).generate(
        prompts, max_new_tokens=64, temperature=0
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32
    )
    for prompt, completion in zip(prompts, ours, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False
        )[0, len(prompt) :]
        assert completion.tokens == expected.tolist()
