"""The language of a text, by hand-counted letters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomath.data.language import (
    is_mixed,
    language_metrics,
    language_of_script,
    letters_of,
)
from nanomath.data.world import FAMILIES, generate

JA = "もらうと42+6=48。\n\n答えは\\boxed{48}です。"
EN = "Getting: 42+6=48.\n\nThe answer is \\boxed{48}."


@pytest.mark.parametrize(
    ("text", "counts", "language", "mixed"),
    [
        ("", (0, 0), "none", False),
        ("12 + 30 = 42", (0, 0), "none", False),
        (r"\boxed{\frac{1}{2}}", (0, 0), "none", False),
        ("x = y + 2z, １２３、。・ $%", (0, 0), "none", False),
        (EN, (18, 0), "en", False),
        (JA, (0, 9), "ja", False),
        ("りんごは３個です", (0, 7), "ja", False),
        ("xは3です。sinではなく\\sinの値", (3, 9), "ja", True),
        (r"解く：\begin{align*} x \end{align*}", (0, 2), "ja", False),
        ("リンゴ ﾘﾝｺﾞ ラーメン 々", (0, 11), "ja", False),
        ("𠮷", (0, 1), "ja", False),
        ("Ｈｅｌｌｏ, naïve", (10, 0), "en", False),
        ("Привет, Γειά, 안녕", (0, 0), "none", False),
        ("答え is", (2, 2), "en", True),
        ("abcdefghi 答", (9, 1), "en", True),
        ("abcdefghij 答", (10, 1), "en", False),
        ("ab 数学の問題です。だから三つ", (2, 12), "ja", True),
    ],
)
def test_counted_by_hand(text, counts, language, mixed):
    assert letters_of(text) == counts
    assert (language_of_script(text), is_mixed(text)) == (language, mixed)


@given(st.text(), st.text())
def test_texts_that_stand_apart_add_up(one, other):
    both = letters_of(f"{one}\n{other}")
    assert both == tuple(
        a + b for a, b in zip(letters_of(one), letters_of(other), strict=True)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("language", ["en", "ja"])
def test_questions_of_the_world_are_in_their_language(family, language):
    """Some have words to be copied, which are the same in both languages."""
    told = [p.question for p in generate(family, "train", 100, languages=(language,))]
    own = [language_of_script(question) == language for question in told]
    assert sum(own) >= (60 if family in ("instruction", "copying") else 100)


def test_what_is_logged():
    answers = [("りんごは？", JA), ("りんごは？", EN), ("Apples?", EN), ("Pens?", "42")]
    assert language_metrics(answers) == {
        "language/en": 0.5,
        "language/ja": 0.25,
        "language/mixed": 0.0,
        "language/own/en": 0.5,
        "language/own/ja": 0.5,
    }
    english = iter([*answers[2:], ("1 + 1", "the 答え")])  # asked in no second language
    assert language_metrics(english) == {
        "language/en": pytest.approx(2 / 3),
        "language/ja": 0.0,
        "language/mixed": pytest.approx(1 / 3),
    }
