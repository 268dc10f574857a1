"""The embedded world's tokenizer: exact round trips, single digits, the same in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.data.world import CHAT_TEMPLATE, FAMILIES, generate, world_tokenizer

TOKENIZER = world_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def pieces(text: str) -> list[str]:
    return [TOKENIZER.decode([token]) for token in ids(text)]


def test_plain_text_begins_with_the_token_that_ends_answers() -> None:
    assert TOKENIZER.encode("").ids == [0]
    assert TOKENIZER.encode("7 = 7").ids == [0, *ids("7 = 7")]


@settings(deadline=None, max_examples=300)
@given(st.text() | st.text(alphabet="a 1\n\t\r.　９がカ漢é"))
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="0123456789+-=., ab\n"))
def test_every_digit_and_every_blank_line_is_a_token_of_its_own(text: str) -> None:
    for piece in pieces(text):
        assert piece.isdigit() is any(character.isdigit() for character in piece)
        assert len(piece) == 1 or not piece.isdigit()
        assert piece in ("\n", "\n\n") or "\n" not in piece


def test_the_blank_line_never_merges() -> None:
    blank = TOKENIZER.token_to_id("ĊĊ")
    assert blank is not None
    for text in ("a.\n\nb", "1.\n\n2", "}\n\n The", "。\n\n答え", "\n\n"):
        assert ids(text).count(blank) == 1
    assert [token for token in TOKENIZER.get_vocab() if "ĊĊ" in token] == ["ĊĊ"]


def test_common_words_are_one_token_with_their_space() -> None:
    assert pieces("Mia has 12 apples.") == [
        "Mia",
        " has",
        " ",
        "1",
        "2",
        " apples",
        ".",
    ]
    assert pieces("Buying: 12+7=19.") == [
        "Buying",
        ":",
        " ",
        "1",
        "2",
        "+",
        "7",
        "=",
        "1",
        "9",
        ".",
    ]
    assert pieces("The answer is \\boxed{3}.") == [
        "The",
        " answer",
        " is",
        " \\",
        "boxed",
        "{",
        "3",
        "}.",
    ]
    assert pieces("ミアは12個") == ["ミア", "は", "1", "2", "個"]


def test_vocabulary_is_small_and_opens_with_the_special_tokens() -> None:
    assert TOKENIZER.get_vocab_size() <= 1024
    assert [
        TOKENIZER.token_to_id(token)
        for token in ("<|endoftext|>", "<|user|>", "<|assistant|>")
    ] == [0, 1, 2]
    assert ids("<|user|>7<|assistant|>") == [
        1,
        TOKENIZER.token_to_id("7"),
        2,
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("language", ["en", "ja"])
def test_problems_are_compact(family: str, language: str) -> None:
    for problem in generate(
        family, "test", 20, difficulty=(4, 4), languages=(language,)
    ):
        assert len(ids(problem.question + problem.solution)) < 128


def test_training_is_the_same_in_every_process() -> None:
    script = (
        "import hashlib; from nanomath.data.world import generate, world_tokenizer as w; "
        "print(hashlib.sha256(w().to_str().encode()).hexdigest(), generate('grid', 'test', "
        "3)[2].id)"
    )
    here = hashlib.sha256(TOKENIZER.to_str().encode()).hexdigest()
    expected = f"{here} {generate('grid', 'test', 3)[2].id}"
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-c", script]
        environment = {
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


def test_chat_template_spends_one_token_on_each_role() -> None:
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    question, answer = (
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    )
    system = {"role": "system", "content": "Be brief."}
    assert (
        template.render(messages=[question], add_generation_prompt=True)
        == "<|user|>1+1?<|assistant|>"
    )
    assert (
        template.render(messages=[question, answer])
        == "<|user|>1+1?<|assistant|>2<|endoftext|>"
    )
    conversation = template.render(
        messages=[system, question, answer, question], add_generation_prompt=True
    )
    assert (
        conversation
        == "<|user|>Be brief.\n1+1?<|assistant|>2<|endoftext|><|user|>1+1?<|assistant|>"
    )
