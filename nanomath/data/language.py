r"""The language of a text, by its script: a definition that can be counted by hand.

    ja      more kana and kanji than Latin letters
    en      Latin letters, and at least as many as kana and kanji
    none    neither: an answer alone, such as \boxed{12}
    mixed   the rarer of the two makes up at least a tenth of the letters

Latin letters count in words of two or more, and not in LaTeX commands: variables, options and
\boxed stand in texts of every language. Digits and signs are neither. Kanji are those of Chinese
too, and French is written as English is. What IFEval asks for is another thing
(nanomath/rewards/instructions.py): langdetect guesses among 55 languages, sees no mixture, and
takes a short text full of numbers for any of them.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from statistics import fmean

LANGUAGES = ("en", "ja")
MIXED = 0.1
COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+")
LATIN = re.compile("[A-Za-zÀ-ÖØ-öø-ɏＡ-Ｚａ-ｚ]{2,}")
# 々〆〇, hiragana, katakana without the middle dot, kanji of all blocks, narrow katakana.
JAPANESE = re.compile(
    "[\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U000323af]"
)


def letters_of(text: str) -> tuple[int, int]:
    """Return how many Latin letters, and how many kana and kanji, a text has."""
    latin = sum(map(len, LATIN.findall(COMMAND.sub(" ", text))))
    return latin, len(JAPANESE.findall(text))


def language_of_script(text: str) -> str:
    """Return "en", "ja" or "none"."""
    latin, japanese = letters_of(text)
    return "ja" if japanese > latin else "en" if latin else "none"


def is_mixed(text: str) -> bool:
    """Return whether a text has both scripts, the rarer in a share MIXED of the letters."""
    counts = letters_of(text)
    return min(counts) > 0 and min(counts) >= MIXED * sum(counts)


def repeated_share(parts: Sequence[Hashable], n: int = 4) -> float:
    """Return the share of the n-grams of tokens, or of words, that occurred earlier in the list.

    It is near 1 when a completion goes in circles.
    """
    ngrams = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def language_metrics(answers: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Return what is logged of (question, completion)s: the share of each language and of mixed
    completions; where questions are of both languages, the share of each that is answered in it.
    """
    answers = list(answers)
    asked = [language_of_script(question) for question, _ in answers]
    told = [language_of_script(text) for _, text in answers]
    metrics = {
        f"language/{name}": fmean(one == name for one in told) for name in LANGUAGES
    }
    metrics["language/mixed"] = fmean(is_mixed(text) for _, text in answers)
    for name in LANGUAGES if set(asked) >= set(LANGUAGES) else ():
        own = [b == name for a, b in zip(asked, told, strict=True) if a == name]
        metrics[f"language/own/{name}"] = fmean(own)
    return metrics
