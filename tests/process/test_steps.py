"""Steps: spans tile the text, and each ends on the token that a token-by-token walk finds,
whatever the tokenizer.

With that of a model as well: NANOMATH_TEST_MODEL=models/SmolLM2-135M-Instruct python -m pytest
tests/process
"""

from __future__ import annotations

import os
from functools import cache
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.data.world import generate, world_tokenizer
from nanomath.data.world.oracle import split_steps
from nanomath.models import Tokenizer, load_tokenizer
from nanomath.process.steps import SEPARATORS, Step, guarded, split_text, steps_of

EOS = "<|endoftext|>"
REAL = os.environ.get("NANOMATH_TEST_MODEL")


@cache
def tokenizer_of(name: str) -> Tokenizer:
    """world: the blank line is a token of its own. merging: byte-level, and tokens go across
    blank lines and parts of characters. metaspace: letters, and bytes for what is none, as
    Llama's.
    """
    if name == "real":
        return load_tokenizer(REAL)
    if name == "world":
        return Tokenizer(world_tokenizer(), eos_token=EOS)
    if name == "metaspace":
        known = [
            EOS,
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "\u2581",
            *"Soxabcyz.=12",
        ]
        vocabulary = {token: number for number, token in enumerate(known)}
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocabulary, [], byte_fallback=True)
        )
        backend.add_special_tokens([EOS])
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        parts = [
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Metaspace(),
        ]
        backend.decoder = tokenizers.decoders.Sequence(parts)
        return Tokenizer(backend, eos_token=EOS)
    text = [
        "So x = 2.\n\nThen y.\n\n\n答えは 12 です。\n\n次に、é\n \nあ",
        "a.\n\nb\n\nc",
        ".\n\nS",
        "。\n\n次",
    ] * 3
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=alphabet,
        special_tokens=[EOS],
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    return Tokenizer(backend, eos_token=EOS)


NAMES = ["world", "merging", "metaspace", *(["real"] if REAL else [])]
pieces = st.sampled_from(
    ["\n", "\n\n", " ", "\t", "\r\n", "So,", "Step 1:", "Step 12: x", "x = 2"]
    + ["あ", "答えは12", "é", "🙂", "\u3000", "\ufffd", ".", "1"]
)  # fmt: skip
texts = st.lists(
    pieces | st.text(st.characters(codec="utf-8"), max_size=3), max_size=14
).map("".join)
splits = st.sampled_from(sorted(SEPARATORS))


@settings(max_examples=300, deadline=None)
@given(text=texts, by=splits)
def test_spans_tile_the_text(text, by):
    spans = split_text(text, by)
    if not text.strip():
        assert spans == []
        return
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    assert all(text[start:end].strip() for start, end in spans)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(written=texts, by=splits, cut=st.integers(0, 40), ends=st.booleans())
def test_every_step_ends_on_one_token(name, written, by, cut, ends):
    """Also of completions that were cut anywhere, in the middle of a character too."""
    tokenizer = tokenizer_of(name)
    tokens = tokenizer.encode(written)
    tokens = tokens[: max(1, len(tokens) - cut)] + [tokenizer.eos_id] * ends
    text, made = (
        tokenizer.decode(tokens),
        [tokenizer.decode(tokens[: i + 1]) for i in range(len(tokens))],
    )
    steps = steps_of(tokenizer, tokens, by)
    if not split_text(text, by):
        assert steps == []
        return
    assert (
        steps[0].start == 0
        and steps[-1].end == len(text)
        and steps[-1].token == len(tokens) - 1
    )
    assert all(
        one.end == other.start and one.token < other.token
        for one, other in pairwise(steps)
    )
    borders = {end for _, end in split_text(text, by)}
    for step in steps[:-1]:  # walking along, token by token
        assert step.end in borders
        assert step.token == min(
            i for i, prefix in enumerate(made) if prefix[: step.end] == text[: step.end]
        )


def test_tokens_that_merge_a_blank_line():
    """The reward of a step stands on the token that crosses its end, which may begin the next."""
    tokenizer = tokenizer_of("merging")
    tokens = tokenizer.encode("a.\n\nb\n\nc")
    pieces = [tokenizer.decode([token]) for token in tokens]
    assert any(piece.strip() and "\n\n" in piece for piece in pieces), pieces
    for step in steps_of(tokenizer, tokens)[:-1]:
        before, upto = (len("".join(pieces[: step.token + i])) for i in (0, 1))
        assert before < step.end <= upto


@pytest.mark.parametrize("name", ["merging", "metaspace"])
def test_a_character_of_several_tokens(name):
    """A step that ends within a character's bytes would be a step that ends before it is read."""
    tokenizer = tokenizer_of(name)
    tokens = tokenizer.encode("x🙂\n\ny🙂")
    first, last = steps_of(tokenizer, tokens)
    assert (
        tokenizer.decode(tokens[: first.token + 1])[:4] == "x🙂\n\n"
        and last.token == len(tokens) - 1
    )


def test_the_world_is_split_as_its_oracle_splits():
    tokenizer = tokenizer_of("world")
    for problem in generate(
        "maths", "test", 50, languages=("en", "ja"), difficulty=(2, 6)
    ):
        text, tokens = problem.solution, tokenizer.encode(problem.solution)
        steps = steps_of(tokenizer, [*tokens, tokenizer.eos_id])
        assert [text[step.start : step.end].strip() for step in steps] == split_steps(
            text
        )
        assert [tokenizer.decode([tokens[step.token]]) for step in steps[:-1]] == [
            "\n\n"
        ] * (len(steps) - 1)


@pytest.mark.parametrize(
    ("by", "text", "expected"),
    [
        ("blank_line", "a\n \n\nb\nc\n\n", ["a\n \n\n", "b\nc\n\n"]),
        ("blank_line", "\n\na", ["\n\na"]),
        ("line", "a\n\n b\nc", ["a\n\n ", "b\n", "c"]),
        (
            "step_k",
            "So:\nStep 1: a\n\nb\nStep 2. c Step 3: d",
            ["So:\n", "Step 1: a\n\nb\n", "Step 2. c Step 3: d"],
        ),
        ("step_k", "Step 10: a", ["Step 10: a"]),
        ("line", " \n\t", []),
    ],
)  # fmt: skip
def test_splits(by, text, expected):
    assert [text[start:end] for start, end in split_text(text, by)] == expected


def test_an_unknown_split_is_named():
    with pytest.raises(
        ValueError,
        match="steps are split by 'words': one of blank_line, line, step_k was expected",
    ):
        split_text("a", "words")


def steps_from(words: list[tuple[str, int]]) -> tuple[list[Step], str]:
    """Steps with these words, each of so many tokens."""
    steps, text, token = [], "", -1
    for word, length in words:
        text, token = text + word + "\n\n", token + length
        steps.append(Step(len(text) - len(word) - 2, len(text), token))
    return steps, text


@pytest.mark.parametrize(
    ("words", "options", "expected"),
    [
        (
            [("So,", 2), ("a", 5), ("b", 5), ("ok", 1)],
            {"least_tokens": 3},
            ["So, a", "b ok"],
        ),
        ([("So,", 2)], {"least_tokens": 3}, ["So,"]),
        ([("So,", 2), ("Hm,", 2), ("a", 2)], {"least_tokens": 3}, ["So, Hm, a"]),
        (
            [("a", 3), ("b", 3), ("a", 3), ("b", 3), ("c", 3)],
            {"drop_repeats": True},
            ["a", "b a b", "c"],
        ),
        ([("a", 3), ("a", 3), ("a", 3)], {}, ["a", "a", "a"]),
        (
            [("a", 3), ("b", 3), ("c", 3), ("d", 1)],
            {"most_steps": 2, "least_tokens": 2},
            ["a", "b c d"],
        ),
        ([("a", 3), ("b", 3)], {"most_steps": 2}, ["a", "b"]),
        ([("a", 3), ("b", 0), ("c", 2)], {}, ["a", "b c"]),
        ([], {"most_steps": 2, "drop_repeats": True}, []),
    ],
)
def test_guards(words, options, expected):
    steps, text = steps_from(words)
    found = guarded(steps, text, **options)
    assert [" ".join(text[step.start : step.end].split()) for step in found] == expected
    assert all(one.end == other.start for one, other in pairwise(found))
    if steps:
        assert (found[0].start, found[-1].end, found[-1].token) == (
            0,
            len(text),
            steps[-1].token,
        )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), max_size=8),
    st.integers(0, 5),
    st.integers(0, 4),
    st.booleans(),
)
def test_guarded_steps_keep_what_was_promised(words, least, most, drop):
    words = [
        (word, max(1, length) if i == 0 else length)
        for i, (word, length) in enumerate(words)
    ]
    steps, text = steps_from(words)
    found = guarded(steps, text, least, most, drop)
    assert bool(found) == bool(steps)
    assert not most or len(found) <= most
    assert all(
        one.end == other.start and one.token < other.token
        for one, other in pairwise(found)
    )
    assert set(found[i].end for i in range(len(found))) <= {step.end for step in steps}
    if len(found) > 1:
        lengths = [
            step.token - before
            for step, before in zip(
                found, [-1, *(s.token for s in found)], strict=False
            )
        ]
        assert min(lengths) >= least
