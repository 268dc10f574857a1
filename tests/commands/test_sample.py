"""`python -m nanomath sample`: the answer to one question."""

from __future__ import annotations

from nanomath import Sampler, load_model, load_tokenizer
from nanomath.__main__ import main

QUESTION = "What is 3 + 4?"


def test_it_prints_what_the_sampler_draws(call, model_directory):
    outcome = call(
        main, "sample", model_directory, QUESTION, "sampling.max_new_tokens=12"
    )
    tokenizer = load_tokenizer(model_directory)
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
    )
    sampler = Sampler(load_model(model_directory), tokenizer)
    (greedy,) = sampler.generate([prompt], max_new_tokens=12, temperature=0)
    assert greedy.text.strip()
    assert outcome == (0, greedy.text + "\n", "")


def test_seed_and_temperature(call, model_directory):
    words = (
        "sample",
        model_directory,
        QUESTION,
        "sampling.max_new_tokens=12",
        "sampling.temperature=1",
    )
    one, same, other = (call(main, *words, f"seed={seed}") for seed in (1, 1, 2))
    assert one.code == 0 and one == same and one.out != other.out


def test_plain_text_instead_of_a_chat(call, model_directory):
    words = ("sample", model_directory, "1, 2, 3,", "sampling.max_new_tokens=12")
    chat, plain = call(main, *words), call(main, *words, "prompt.chat=false")
    tokenizer = load_tokenizer(model_directory)
    sampler = Sampler(load_model(model_directory), tokenizer)
    (expected,) = sampler.generate(
        [tokenizer.encode("1, 2, 3,")], max_new_tokens=12, temperature=0
    )
    assert plain.out == expected.text + "\n" != chat.out


def test_a_question_may_look_like_anything(call, model_directory):
    for question in ("x=3, what is x + 1?", "-3 + 4 = ?", "{answer}", "3"):
        outcome = call(
            main, "sample", model_directory, question, "sampling.max_new_tokens=2"
        )
        assert (outcome.code, outcome.err) == (0, ""), question
