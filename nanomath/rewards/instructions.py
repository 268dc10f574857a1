r"""Whether a response follows verifiable instructions (IFEval, arXiv 2311.07911): a small function
for each of its 25 kinds, and the strict and the loose verdict.

    strict   the response as it stands
    loose    any of eight forms of it: with or without its first line, its last line, and every
             "*" of markdown

An empty response follows nothing. Two checkers need to count what the paper's code counts with
NLTK: sentences and words in capitals. Here both are rules of a line (`sentences`, `words`). Three
ask for the language of a response, which langdetect tells, as in the paper: without that library
they are refused, not guessed (`check_library`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

PERIODS = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Inc|Ltd|Jr|Sr|Co|vs|etc|e\.g|i\.e|[A-Z])\.(?=\s)"
    r"|\.{2,}(?=\s+[a-z])"
)
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]*]*(?=\s|$)")
FIRST_WORD = re.compile(r"'*\"*([^.,?!'\"]*)")
ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
OF_A_LANGUAGE = (
    "language:response_language",
    "change_case:english_capital",
    "change_case:english_lowercase",
)


def compares(count: int, relation: str, number: int) -> bool:
    """Return whether a count is "less than" or "at least" a number."""
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation {relation!r}: expected 'less than' or 'at least'")
    return count < number if relation == "less than" else count >= number


def sentences(text: str) -> int:
    """Count sentences: pieces that end in . ! or ? and white space, but for abbreviations, and
    what is left at the end.
    """
    pieces = SENTENCE_END.split(PERIODS.sub("x", text))
    return sum(any(map(str.isalnum, piece)) for piece in pieces)


def words(text: str) -> list[str]:
    """Return the words; an apostrophe, a hyphen or a point inside does not part them."""
    return re.findall(r"\w+(?:[-'’.]\w+)*", text)


def language_of(text: str) -> str | None:
    """Return the ISO 639-1 code that langdetect gives a text, None where it finds none (a text
    without letters). The same text always has the same language.
    """
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws at random
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def split_sections(parts: Sequence[str]) -> list[str] | None:
    """Return the parts that are not empty; None where one between two others is. The first and
    the last may be.
    """
    inner = parts[1:-1]
    return None if not all(map(str.strip, inner)) else [p for p in parts if p.strip()]


# --- the instructions ------------------------------------------------------------------------


def existence(text: str, keywords: Sequence[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(keyword.strip(), text, re.IGNORECASE)
    return compares(len(found), relation, frequency)


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(
        re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def letter_frequency(
    text: str, letter: str, let_frequency: int, let_relation: str
) -> bool:
    count = text.lower().count(letter.strip().lower())
    return compares(count, let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    return language_of(text) in (language, None)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compares(sentences(text), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are parted by ***."""
    parts = split_sections(re.split(r"\s?\*\*\*\s?", text))
    return parts is not None and len(parts) == num_paragraphs


def number_words(text: str, num_words: int, relation: str) -> bool:
    return compares(len(re.findall(r"\w+", text)), relation, num_words)


def nth_paragraph_first_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Paragraphs are parted by a blank line; those that are empty do not add to their number."""
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if not 1 <= nth_paragraph <= count or not parts[nth_paragraph - 1].strip():
        return False
    word = FIRST_WORD.match(parts[nth_paragraph - 1].split()[0])[1]
    return count == num_paragraphs and word.lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(patterns.get(marker, marker.lower()), text.lower()))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(text: str) -> bool:
    return any(answer in text for answer in ANSWERS)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """Sections in *one* or in **two** asterisks that are not empty."""
    found = re.findall(r"\*([^\n*]*)\*", text) + re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(inside.strip()) for inside in found) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    marks = re.findall(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)
    return len(marks) >= num_sections


def json_format(text: str) -> bool:
    """The whole text is JSON, in a fence of code or without one."""
    inside = re.fullmatch(
        r"(?:```(?:json|Json|JSON)?)?(.*?)(?:```)?", text.strip(), re.DOTALL
    )
    try:
        json.loads(inside[1].strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    found = re.findall(r"<<[^\n]+>>", text)
    return any(one.lstrip("<").rstrip(">").strip() for one in found)


def two_responses(text: str) -> bool:
    """Parted by ******, and different."""
    parts = split_sections(text.split("******"))
    return (
        parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()
    )


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(
    text: str, capital_frequency: int, capital_relation: str
) -> bool:
    count = sum(map(str.isupper, words(text)))
    return compares(count, capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and response_language(text, "en")


def english_lowercase(text: str) -> bool:
    return text.islower() and response_language(text, "en")


def no_comma(text: str) -> bool:
    return "," not in text


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}

# --- verdicts --------------------------------------------------------------------------------

# Each kind with what its checker is given.
Instructions = Sequence[tuple[str, dict[str, Any]]]


def check_instructions(instructions: Instructions, place: str) -> None:
    """ValueError for a kind that is not known and for arguments that do not fit it;
    ModuleNotFoundError where it needs langdetect and there is none.
    """
    for kind, given in instructions:
        if kind not in INSTRUCTIONS:
            raise ValueError(
                f"{place}: unknown instruction {kind!r:.80}; known are {', '.join(INSTRUCTIONS)}"
            )
        if kind in OF_A_LANGUAGE and not find_spec("langdetect"):
            raise ModuleNotFoundError(
                f"{place}: the instruction {kind} needs langdetect: pip install langdetect, or "
                "leave the benchmark out"
            )
        try:
            INSTRUCTIONS[kind]("A text, to try.", **given)
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise ValueError(f"{place}: instruction {kind}: {error}") from None


def strict(instructions: Instructions, text: str) -> list[bool]:
    """Return of each instruction whether the text follows it."""
    return [
        bool(text.strip()) and INSTRUCTIONS[kind](text, **given)
        for kind, given in instructions
    ]


def loose(instructions: Instructions, text: str) -> list[bool]:
    """Return of each instruction whether any form of the text follows it."""
    lines = text.split("\n")
    cuts = (lines[1:], lines[:-1], lines[1:-1])
    forms = [text, *("\n".join(cut).strip() for cut in cuts)]
    forms += [form.replace("*", "") for form in forms]
    return [
        any(verdicts)
        for verdicts in zip(*(strict(instructions, f) for f in forms), strict=True)
    ]
