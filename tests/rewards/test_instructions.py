"""IFEval's 25 instructions: for each, texts that follow it and texts that do not."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from nanomath.rewards.instructions import (
    INSTRUCTIONS,
    check_instructions,
    loose,
    sentences,
    strict,
    words,
)

CASES = [  # kind, arguments, texts that follow it, texts that do not
    ("keywords:existence", {"keywords": ["oak", "elm"]}, ["An ELM, an oak"], ["Oak"]),
    (
        "keywords:frequency",
        {"keyword": "oak", "frequency": 2, "relation": "at least"},
        ["Oak by oak", "oakoak"],
        ["oak", "none"],
    ),
    (
        "keywords:frequency",
        {"keyword": "oak", "frequency": 2, "relation": "less than"},
        ["oak"],
        ["oak oak"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["oak"]}, ["oaks"], ["An Oak."]),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["Elm tree"],
        ["tree"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "It is 3.5 m. Dr. Oak came. He left"],
        ["One... two. Dr. Oak came, e.g. today."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "*** one *** two ***"],
        ["one", "one *** *** two"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        ["one, two"],
        ["it's two"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "elm"},
        ["Oak.\n\nElm, then", 'Oak\n\n"Elm" is', "Oak\n\n'elm's"],
        ["Elm\n\nOak", "Oak\n\nElm\n\nAsh", "Oak", "Oak\n\nElms"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] of [place]"],
        ["[name]", "name]["],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. more", "p. s. more"],
        ["PS more"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["P. P. S more"],
        ["P.S. more"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n* two", "- one\n  - two"],
        ["* one", "* one\n* two\n- three", "**one**\n**two**"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["Well. My answer is maybe."],
        ["My answer is yes", "Yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and *two*"],
        ["*one*", "**one**", "* *\n****"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\nx\nSection 2\ny"],
        ["Section 1\nx", "section 1 section 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]```"],
        ['Here: {"a": 1}', "{'a': 1}"],
    ),
    ("detectable_format:title", {}, ["<<oak>>\ntext"], ["<oak>", "<<  >>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo", "****** one ****** two"],
        ["one ****** one", "one", "a ****** b ****** c", "one ****** ****** two"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Name a tree. "},
        ["name a tree. Oak."],
        ["Oak. Name a tree."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "That is all."},
        ['Oak. "that is ALL."  '],
        ["That is all. Oak"],
    ),
    ("startend:quotation", {}, ['"Oak" and "elm"'], ["Oak", '"', "'Oak'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["An OAK, an ELM", "I am I"],
        ["An OAK", "Oak Elm"],
    ),
    ("change_case:english_capital", {}, ["AN OAK."], ["An OAK."]),
    ("change_case:english_lowercase", {}, ["an oak."], ["An oak.", "12."]),
    ("language:response_language", {"language": "en"}, ["An oak."], ["EIN BAUM"]),
    ("punctuation:no_comma", {}, ["One; two"], ["One, two"]),
]


@pytest.fixture
def langdetect(monkeypatch):
    """A library of that name that takes every text with "BAUM" for German."""

    class LangDetectException(Exception):
        pass

    def detect(text):
        if not any(map(str.isalpha, text)):
            raise LangDetectException
        return "de" if "BAUM" in text else "en"

    module = SimpleNamespace(
        detect=detect,
        LangDetectException=LangDetectException,
        DetectorFactory=SimpleNamespace(seed=None),
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "langdetect", module)
    return module


@pytest.mark.parametrize(("kind", "given", "right", "wrong"), CASES)
def test_each_checker(langdetect, kind, given, right, wrong):
    check_instructions([(kind, given)], "here")
    assert [strict([(kind, given)], text) for text in right] == [[True]] * len(right)
    assert [strict([(kind, given)], text) for text in wrong] == [[False]] * len(wrong)


def test_there_are_25_and_each_is_tested():
    assert len(INSTRUCTIONS) == 25 == len({kind for kind, *_ in CASES})


def test_the_same_text_has_the_same_language(langdetect):
    assert strict([("language:response_language", {"language": "de"})], "BAUM") == [
        True
    ]
    assert langdetect.DetectorFactory.seed == 0
    assert strict([("language:response_language", {"language": "de"})], "12") == [True]
    assert strict([("change_case:english_capital", {})], "EIN BAUM") == [False]


def test_an_empty_response_follows_nothing():
    every = [
        ("punctuation:no_comma", {}),
        ("keywords:forbidden_words", {"forbidden_words": []}),
    ]
    assert strict(every, " \n") == loose(every, "") == [False, False]


@pytest.mark.parametrize(
    ("text", "kind", "given"),
    [
        ("Sure, here it is:\n{}", "detectable_format:json_format", {}),
        ("the end\nI hope, this helps.", "punctuation:no_comma", {}),
        ("Sure,\noak\nbye,", "punctuation:no_comma", {}),
        ("**the end**", "startend:end_checker", {"end_phrase": "the end"}),
        ("Well:\n**{}**", "detectable_format:json_format", {}),
    ],
)
def test_loose_forgives_a_first_line_a_last_line_and_asterisks(text, kind, given):
    assert strict([(kind, given)], text) == [False]
    assert loose([(kind, given)], text) == [True]


def test_loose_forgives_no_more():
    assert loose([("punctuation:no_comma", {})], "a,\nb,\nc,\nd,") == [False]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no end", 1),
        ("One. Two.", 2),
        ('He said "Go!" Then he left.', 2),
        ("Mr. Oak met J. Elm at 3.15 p.", 1),
        ("Wait... what?! Yes.", 2),
        ("- one\n- two", 1),
    ],
)
def test_sentences(text, count):
    assert sentences(text) == count


def test_words():
    assert words("It's a well-known U.S. OAK, no?") == [
        "It's",
        "a",
        "well-known",
        "U.S",
        "OAK",
        "no",
    ]


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (
            "keywords:colour",
            {},
            "unknown instruction 'keywords:colour'; known are keywords:",
        ),
        ("punctuation:no_comma", {"n": 1}, "unexpected keyword argument 'n'"),
        ("detectable_format:multiple_sections", {}, "missing 2 required"),
        (
            "keywords:existence",
            {"keywords": ["("]},
            "missing ), unterminated subpattern",
        ),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "about"},
            "relation 'about': expected 'less than' or 'at least'",
        ),
    ],
)
def test_instructions_that_cannot_be_checked(kind, given, says):
    with pytest.raises(ValueError) as error:
        check_instructions([(kind, given)], "set: row 3")
    assert str(error.value).startswith("set: row 3: ") and says in str(error.value)


def test_languages_are_not_guessed(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(
        ModuleNotFoundError, match="needs langdetect: pip install langdetect"
    ):
        check_instructions([("change_case:english_capital", {})], "here")
    check_instructions([("punctuation:no_comma", {})], "here")
