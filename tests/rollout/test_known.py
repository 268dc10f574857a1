"""Samples of a file and worked solutions in place of what a sampler draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanomath.rollout import Completion, Sampler
from nanomath.rollout.known import Known, certain, read_samples

PROMPT, OTHER = [5, 6], [7]


def named(name: str) -> Completion:
    return Completion(0, 0, [1], [-1.0], [-1.0], name, "eos")


KNOWN = {
    tuple(PROMPT): [named(name) for name in "abcde"],
    tuple(OTHER): [named(name) for name in "vwxyz"],
}


def texts(completions: list[Completion]) -> str:
    return "".join(completion.text for completion in completions)


def test_completions_are_a_function_of_seed_prompt_and_number():
    known = Known(KNOWN, None)
    drawn = known.generate([PROMPT, OTHER, PROMPT], n=2, seed=3, temperature=0.7)
    assert [c.prompt_index for c in drawn] == [0, 0, 1, 1, 2, 2]
    assert [c.sample_index for c in drawn] == [0, 1, 0, 1, 2, 3]
    both = texts(drawn[:2]) + texts(drawn[4:])
    assert len(set(both)) == 4 and set(both) < set("abcde")  # a copy continues
    assert texts(known.generate([PROMPT], n=4, seed=3)) == both
    orders = {texts(known.generate([PROMPT], n=5, seed=seed)) for seed in range(20)}
    assert len(orders) > 10 and all(sorted(order) == list("abcde") for order in orders)
    assert len(set(texts(known.generate([PROMPT], n=7, seed=0)))) == 5


def test_the_rest_is_drawn_as_ever(new_model, tokenizer):
    sampler = Sampler(new_model(), tokenizer)
    options = {"max_new_tokens": 4, "seed": 5}
    drawn = sampler.generate([PROMPT, OTHER], n=3, **options)
    mixed = Known(KNOWN, sampler, last=1).generate([PROMPT, OTHER], n=4, **options)
    for index in range(2):
        group = mixed[4 * index : 4 * index + 4]
        assert group[:3] == drawn[3 * index : 3 * index + 3]
        assert (group[3].prompt_index, group[3].sample_index) == (index, 3)
        assert group[3].text in texts(KNOWN[tuple([PROMPT, OTHER][index])])


@pytest.fixture
def read(tokenizer, tmp_path):
    def read(*rows: dict, **options):
        path = Path(tmp_path) / "samples.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return read_samples(path, tokenizer, **options)

    return read


def test_what_the_tokenizer_spells_is_kept(read, tokenizer):
    """Also where it would spell it otherwise: a sample is what was drawn."""
    odd = [token for letter in "Mia has 4." for token in tokenizer.encode(letter)]
    assert odd != tokenizer.encode("Mia has 4.")
    row = {"question": " q ", "text": "Mia has 4.", "tokens": [*odd, tokenizer.eos_id]}
    logprobs = [-0.5] * len(row["tokens"])
    ((question, (sample,)),) = read(row | {"logprobs": logprobs}).items()
    assert question == "q" and sample.finished
    assert (sample.tokens, sample.logprobs) == (row["tokens"], logprobs)
    saved = row | {"tokens": len(odd) + 1, "ids": row["tokens"]}  # as eval writes it
    assert read(saved)["q"][0].tokens == row["tokens"]
    cut = row | {"text": "Mia", "finish_reason": "stop"}
    assert read(cut)["q"][0].tokens == row["tokens"]


@pytest.mark.parametrize(
    "tokens", [9, [1, 2, 3], [1.0], [10**6], [-1], ["a"], [], None, [0.5]], ids=str
)
def test_what_it_does_not_spell_is_encoded_again(read, tokenizer, tokens):
    row = {"question": "q", "text": "So 4.", "tokens": tokens, "logprobs": [-0.5] * 3}
    (sample,) = read(row)["q"]
    assert sample == certain("So 4.", tokenizer)
    assert sample.tokens == [*tokenizer.encode("So 4."), tokenizer.eos_id]
    assert set(sample.logprobs) == set(sample.sampling_logprobs) == {0.0}
    with pytest.raises(ValueError, match=r"samples.jsonl:1: no logprobs of this token"):
        read(row, need_logprobs=True)
    (long,) = read(row | {"finish_reason": "length"})["q"]
    assert long.tokens == tokenizer.encode("So 4.") and not long.finished


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "4"}, "a sample needs the texts `question` and `text`"),
        ({"question": "q", "text": None}, "a sample needs the texts"),
        (
            {"question": "q", "text": "4", "finish_reason": "tired"},
            "one of eos, stop, le",
        ),
        (
            {"question": "q", "text": "", "finish_reason": "length"},
            "the sample is empty",
        ),
        ([], "a sample needs"),
    ],
)
def test_a_row_that_is_no_sample_is_named(read, row, said):
    with pytest.raises(ValueError, match=f"samples.jsonl:2: .*{said}"):
        read({"question": "q", "text": "4"}, row)
