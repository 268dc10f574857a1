"""The embedded world: its problems say what their metadata says, and its oracle is exact."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.data.problem import Problem
from nanomath.data.world import (
    FAMILIES,
    check_steps,
    generate,
    pretraining_documents,
    split_of,
)
from nanomath.data.world.non_reasoning import FACTS, WORDS
from nanomath.rewards import is_correct

LANGUAGES = ("en", "ja")
SPLITS = ("train", "validation", "test")
REASONING = ("maths", "sorting", "grid", "boolean")
NON_REASONING = ("instruction", "facts", "copying")
NUMERATE = ("maths", "sorting", "grid", "instruction", "copying")
KINDS = [(family, split) for family in FAMILIES for split in (*SPLITS, "templates")]
KINDS += [(family, "numbers") for family in NUMERATE]


def accepted(problem: Problem, text: str) -> bool:
    return all(check_steps(problem, text)) and is_correct(problem, text)


# --- problems ---


def test_problems_of_difficulty_1_to_4_are_what_they_have_always_been() -> None:
    digest = hashlib.sha256()
    for family in FAMILIES:
        for split in SPLITS:
            for seed in (0, 1):
                for p in generate(family, split, 30, seed, (1, 4), LANGUAGES, 0.5):
                    parts = p.id, p.question, p.answer, p.solution, ""
                    digest.update("\n".join(parts).encode())
    assert digest.hexdigest()[:16] == "68b1a700b227286c"


@pytest.mark.parametrize(("family", "split"), KINDS)
def test_oracle_accepts_every_reference_solution_even_after_a_trip_through_json(
    family: str, split: str
) -> None:
    for level in range(1, 9):
        for problem in generate(
            family,
            split,
            20,
            seed=level,
            difficulty=(level, level),
            languages=LANGUAGES,
        ):
            saved = Problem(
                problem.id, "", "", None, json.loads(json.dumps(problem.metadata))
            )
            steps = problem.solution.split("\n\n")
            assert check_steps(saved, problem.solution) == [True] * len(steps)
            assert is_correct(problem, problem.solution)
            assert split_of(saved.metadata) == split


@pytest.mark.parametrize("family", REASONING)
def test_solutions_of_one_problem_differ_in_length_and_are_all_right(
    family: str,
) -> None:
    """Half of them state the answer alone, half are wordy; and once as they are."""
    worked = generate(family, "train", 60, languages=LANGUAGES)
    others = generate(family, "train", 60, languages=LANGUAGES, direct=0.5, wordy=0.5)
    lengths = []
    for one, other in zip(worked, others, strict=True):
        assert one == replace(other, solution=one.solution)
        assert accepted(other, other.solution) is (other.solution.count("\n\n") > 0)
        lengths.append(len(other.solution) - len(one.solution))
    assert {length > 0 for length in lengths} == {True, False}
    steps = next(o for o, n in zip(others, lengths, strict=True) if n > 0)
    first, rest = steps.solution.split("\n\n", 1)
    for wrong in f"{first} 7.", f"7 {first}", first[: len(first) // 2]:
        assert not check_steps(steps, f"{wrong}\n\n{rest}")[0]


@pytest.mark.parametrize("family", REASONING)
def test_difficulty_is_the_number_of_steps(family: str) -> None:
    # The closing step, and sorting n + 1 items takes n comparisons
    extra = 2 if family == "sorting" else 1
    for problem in generate(family, "train", 200, difficulty=(2, 7)):
        assert (
            len(problem.solution.split("\n\n"))
            == problem.metadata["difficulty"] + extra
        )
    assert {
        problem.metadata["difficulty"]
        for problem in generate(family, "train", 200, difficulty=(2, 7))
    } == {*range(2, 8)}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_arguments_same_problems_and_another_seed_others(family: str) -> None:
    assert generate(family, "train", 50, seed=3) == generate(
        family, "train", 50, seed=3
    )
    assert generate(family, "train", 50, seed=3)[:20] == generate(
        family, "train", 20, seed=3
    )
    assert generate(family, "train", 50, seed=3) != generate(
        family, "train", 50, seed=4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_both_languages_word_the_same_problems(family: str) -> None:
    for english, japanese in zip(
        *(generate(family, "train", 100, languages=(x,)) for x in LANGUAGES),
        strict=True,
    ):
        assert english.metadata | {"language": "ja"} == japanese.metadata
        assert english.question != japanese.question and english.id != japanese.id
        assert numbers(english.question) == numbers(japanese.question)
        assert numbers(english.solution) == numbers(japanese.solution)


def numbers(text: str) -> list[int]:
    return [int(run) for run in re.findall(r"\d+", text)]


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_are_distinct_and_languages_take_turns(family: str) -> None:
    problems = generate(family, "train", 100, languages=LANGUAGES)
    assert (
        len({problem.id for problem in problems})
        == len({problem.question for problem in problems})
        == 100
    )
    assert [problem.metadata["language"] for problem in problems] == [*LANGUAGES] * 50
    assert {problem.metadata["group"] for problem in problems} == {FAMILIES[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint_across_seeds_and_languages(family: str) -> None:
    surface = {
        "language",
        "wording",
        "name",
        "object",
        "difficulty",
        "template",
        "twin",
    }
    owners: dict[str, set[str]] = {}
    for split in SPLITS:
        for seed, language in ((0, "en"), (1, "en"), (0, "ja"), (2, "ja")):
            for problem in generate(family, split, 50, seed, (1, 2), (language,)):
                content = {
                    key: value
                    for key, value in problem.metadata.items()
                    if key not in surface
                }
                owners.setdefault(json.dumps(content, sort_keys=True), set()).add(split)
    assert all(len(splits) == 1 for splits in owners.values())


def test_split_shares_are_80_10_10() -> None:
    shares = Counter(
        split_of({"family": "maths", "start": start}) for start in range(10_000)
    )
    assert shares["train"] == pytest.approx(8000, abs=200)
    assert shares["validation"] == pytest.approx(1000, abs=150)
    assert shares["test"] == pytest.approx(1000, abs=150)


def test_an_exhausted_split_says_how_many_problems_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"facts/test .* only \d+ distinct problems"
    ) as caught:
        generate("facts", "test", 10_000)
    available = int(re.search(r"only (\d+)", str(caught.value)).group(1))
    assert len(generate("facts", "test", available)) == available >= 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chess", "train", 1), "unknown family 'chess'"),
        (("maths", "dev", 1), "unknown split 'dev'"),
        (
            ("boolean", "numbers", 1),
            "boolean has no numbers: .* maths, sorting, grid, inst",
        ),
        (("facts", "numbers", 1), "facts has no numbers"),
        (("maths", "train", -1), "count"),
        (("maths", "train", 1, 0, (0, 3)), r"within 1\.\.8"),
        (("maths", "train", 1, 0, (3, 2)), r"within 1\.\.8"),
        (("maths", "train", 1, 0, (1, 9)), r"within 1\.\.8"),
        (("maths", "train", 1, 0, (1, 2), ("fr",)), "languages"),
        (("maths", "train", 1, 0, (1, 2), ()), "languages"),
    ],
)
def test_bad_requests_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(*arguments)


# --- what train never shows ---


def skeleton(text: str, country: str | None) -> str:
    """The text without numbers, names and other words that stand for content."""
    text = text.replace(country or "#", "_")
    words = "|".join([*WORDS, "true", "false", "smallest", "largest"])
    text = re.sub(
        rf"\d+|\b({words}|[B-HJ-Z])\b|[真偽]|[B-HJ-Z](?=[はかの、])", "_", text
    )
    return re.sub(r"_([ ,、・]*_)+", "_", text)


def parts(problem: Problem) -> set[str]:
    """The skeletons of a question's sentences, of facts with the country left out."""
    labels = problem.metadata
    # Its sentences are those of train in another order
    if labels["family"] == "boolean":
        return {re.sub("_.*_", "_", skeleton(problem.question, None))[:9]}
    name = (
        FACTS[labels["country"]][labels["language"] == "ja"]
        if "country" in labels
        else None
    )
    sentences = re.split(r"(?<=[.?。])", skeleton(problem.question, name))
    if labels["family"] == "maths":  # the first and the last do not change
        return {sentence.strip() for sentence in sentences[1:-2]}
    return {"".join(sentences)}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_templates_are_test_problems_in_wordings_of_no_other_split(
    family: str, language: str
) -> None:
    def drawn(split: str, seed: int = 0) -> list[Problem]:
        count = 60 if family == "facts" else 400
        if split == "test" or split == "templates":
            count = 50
        return generate(family, split, count, seed, (1, 8), (language,))

    seen = {part for split in SPLITS for p in drawn(split, 1) for part in parts(p)}
    for told, test in zip(drawn("templates"), drawn("test"), strict=True):
        assert not parts(told) & seen
        assert parts(test) <= seen or family in (
            "grid",
            "sorting",
        )  # the mask is no sieve
        assert told.metadata == {**test.metadata, "held_out": "templates"}
        assert (told.answer, told.solution) == (test.answer, test.solution)
        assert told.question != test.question and told.id != test.id


# What of a question must lie on one side of a bound in train, and on the other in "numbers".
BOUND = {
    "maths": (lambda q, s: [numbers(q)[0]], 50),
    "sorting": (lambda q, s: numbers(q), 99),
    "grid": (lambda q, s: numbers(" ".join(re.findall(r"\(.*?\)", q + s))), 9),
    "instruction": (lambda q, s: numbers(q), 9),
    "copying": (lambda q, s: numbers(q), 39),
}


@pytest.mark.parametrize("family", NUMERATE)
def test_held_out_numbers_lie_outside_the_range_of_every_other_split(
    family: str,
) -> None:
    measured, bound = BOUND[family]
    for split in (*SPLITS, "templates"):
        for p in generate(family, split, 300, 0, (1, 8), LANGUAGES):
            assert max(measured(p.question, p.solution), default=0) <= bound
    templates = set()
    for p in generate(family, "numbers", 300, 0, (1, 8), LANGUAGES):
        assert min(measured(p.question, p.solution)) > bound
        templates.add(p.metadata["template"])
    train = generate(family, "train", 3000, 0, (1, 2), LANGUAGES)
    assert len(templates & {p.metadata["template"] for p in train}) >= 1
    for p in generate("maths", "numbers", 300, 0, (1, 8)):
        assert all(n >= 10 for operator, n in p.metadata["events"] if operator in "+-")


def test_templates_and_twins_are_labels_of_problems() -> None:
    for family in FAMILIES:
        english, japanese = (
            generate(family, "train", 60, difficulty=(1, 8), languages=(x,))
            for x in LANGUAGES
        )
        for one, other in zip(english, japanese, strict=True):
            for key in ("family", "group", "difficulty", "template", "twin"):
                assert one.labels[key] == other.labels[key]
        assert len({p.labels["twin"] for p in english}) > 20
    templates = {
        family: generate(family, "train", 1, difficulty=(3, 3))[0].labels["template"]
        for family in FAMILIES
    }
    assert re.fullmatch(r"[-+*/]{3}", templates["maths"])
    assert re.fullmatch("[udlr]{3}", templates["grid"])
    assert re.fullmatch("[nao]{3}", templates["boolean"])


@pytest.mark.parametrize("split", ["test", "templates"])
def test_shots_are_worked_problems_of_train_and_change_nothing_else(split: str) -> None:
    bare = generate("facts", split, 40, languages=LANGUAGES)
    train = {
        p.question for p in generate("facts", "train", 1016, 1, languages=LANGUAGES)
    }
    for problem in generate("facts", split, 40, languages=LANGUAGES, shots=2):
        first, second, rest = problem.metadata.pop("shots").split("\n\n\n")
        assert problem == bare.pop(0)
        assert rest == "" and first != second
        for text in (first, second):
            question, solution = text.split("\n")
            assert question in train
            assert ("です" in solution) is (problem.metadata["language"] == "ja")


# --- the answer, recomputed from the English question alone ---

PHRASES = {
    r"(?:buys|finds|gets) (\d+)": "+",
    r"(?:sells|loses|gives) (\d+)": "-",
    r"(\d+) times as many": "*",
    r"(\d+) equal parts|among (\d+)": "/",
}


def read_maths(question: str) -> str:
    first, *events, _ = re.split(r"[.?] ?", question)[:-1]
    value = numbers(first)[0]
    for event in events:
        if "twice" in event or "half" in event:
            value = value * 2 if "twice" in event else value / 2
            continue
        (operator,) = [
            symbol for phrase, symbol in PHRASES.items() if re.search(phrase, event)
        ]
        value = eval(f"{value}{operator}{numbers(event)[0]}")
        assert 1 <= value <= 99 and value == int(value)
    return str(int(value))


def read_sorting(question: str) -> str:
    items, rest = numbers(question), question
    items.sort(key=(lambda item: item % 10) if "last digit" in rest else None)
    falling = "largest first" in rest or "rom largest" in rest
    return ", ".join(map(str, items[::-1] if falling else items))


def read_grid(question: str) -> str:
    x, y, *_ = numbers(question)
    place = complex(x, y)
    for direction, distance in re.findall(r"(right|left|up|down) (\d)", question):
        place += {"right": 1, "left": -1, "up": 1j, "down": -1j}[direction] * int(
            distance
        )
    return f"({place.real:.0f},{place.imag:.0f})"


def read_boolean(question: str) -> str:
    values: dict[str, bool] = {"true": True, "false": False}
    for letter, expression in re.findall(r"([A-Z]) is ([^.?]*)\.", question):
        values[letter] = eval(expression, {}, values)
    return str(values[question.split("Is ")[1][0]]).lower()


def read_copying(question: str) -> str:
    return question.split(": ")[1]


def read_instruction(question: str) -> str:
    if told := re.fullmatch(r"(.*), write ([a-z ]+?)( \d+ times)?\.", question):
        manner, words, times = told[1][0].lower() + told[1][1:], told[2], told[3] or ""
        comma = "," if times or manner.startswith("each") else ""
        question = f"Write {words}{times}{comma} {manner}."
    words, kind, times = re.fullmatch(
        r"Write ([a-z ]+?)(?:,? (in|each|\d+)(.*))\.", question
    ).groups()
    if kind.isdigit():
        return (", " if "commas" in times else "-").join([words] * int(kind))
    if kind == "each":
        return "(" + words.replace(" ", ") (") + ")"
    return words.upper() if "capitals" in times else " ".join(words.split()[::-1])


@pytest.mark.parametrize(
    ("family", "split"),
    [(family, split) for family, split in KINDS if family != "facts"],
)
def test_the_answer_follows_from_the_question(family: str, split: str) -> None:
    for problem in generate(family, split, 100, difficulty=(1, 8)):
        assert globals()[f"read_{family}"](problem.question) == problem.answer


def test_maths_events_always_change_the_value() -> None:
    for problem in generate("maths", "train", 300, difficulty=(8, 8)):
        equations = re.findall(r"(\d+)[-+*/](\d+)=(\d+)", problem.solution)
        assert len(equations) == 8
        assert all(
            before != after and 1 <= int(after) <= 99 for before, _, after in equations
        )


@pytest.mark.parametrize("language", LANGUAGES)
def test_boolean_answers_are_not_lopsided(language: str) -> None:
    answers = Counter(
        p.answer
        for p in generate(
            "boolean", "train", 1000, difficulty=(1, 8), languages=(language,)
        )
    )
    assert len(answers) == 2 and min(answers.values()) > 350


# --- the oracle ---


def corruptions(solution: str, token: str, others: list[str]) -> Iterator[str]:
    """`solution` with one match of `token` replaced by each of `others`, and numbers also by
    their neighbours.
    """
    for match in re.finditer(token, solution):
        near = (
            [str(int(match[0]) + shift) for shift in (-10, -1, 1, 10)]
            if match[0].isdigit()
            else []
        )
        for other in {*others, *near, match[0] * 2} - {match[0]}:
            yield solution[: match.start()] + other + solution[match.end() :]


TOKENS = {
    "maths": (r"\d+|[-+*/=]", ["0", "1", "2", "99", "+", "-", "*", "/", "", "1 2"]),
    "sorting": (r"\d+", ["0", "11", "100", ""]),
    "grid": (r"\d+", ["0", "1", "9", "12", ""]),
    "boolean": (
        r"\b[B-HJ-SU-Z]\b|true|false|[真偽]",
        ["true", "false", "真", "偽", "not true", "Q", ""],
    ),
}


@pytest.mark.parametrize("family", REASONING)
@pytest.mark.parametrize("language", LANGUAGES)
def test_oracle_rejects_every_single_token_corruption(
    family: str, language: str
) -> None:
    for problem in generate(
        family, "train", 40, difficulty=(1, 8), languages=(language,)
    ):
        wrong = list(corruptions(problem.solution, *TOKENS[family]))
        assert len(wrong) >= 6
        for text in wrong:
            assert not accepted(problem, text), text


@pytest.mark.parametrize("family", NON_REASONING)
def test_literal_answers_are_compared_to_the_letter(family: str) -> None:
    for problem in generate(family, "train", 50, languages=LANGUAGES):
        for wrong in (
            problem.answer.swapcase() + ".",
            problem.answer[:-1],
            problem.answer + "a",
            "",
        ):
            assert not accepted(
                problem,
                problem.solution.replace(f"{{{problem.answer}}}", f"{{{wrong}}}"),
            )


@pytest.mark.parametrize("family", REASONING)
def test_a_wrong_step_makes_all_later_ones_wrong(family: str) -> None:
    for problem in generate(family, "train", 20, difficulty=(3, 6)):
        steps = problem.solution.split("\n\n")
        for index in range(len(steps)):
            changed = [*steps[:index], "Banana.", *steps[index + 1 :]]
            missing = [*steps[:index], *steps[index + 1 :]]
            verdict = [True] * index + [False] * (len(steps) - index)
            assert check_steps(problem, "\n\n".join(changed)) == verdict
            if steps[index : index + 1] != steps[index + 1 : index + 2]:
                assert (
                    check_steps(problem, "\n\n".join(missing))
                    == verdict[: len(steps) - 1]
                )
        assert check_steps(problem, "\n\n".join([*steps, steps[-1]])) == [True] * len(
            steps
        ) + [False]
        assert not is_correct(problem, "\n\n".join(steps[:-1]))


MIA = {
    "family": "maths",
    "language": "en",
    "start": 12,
    "events": [["+", 7], ["-", 9], ["*", 3]],
}
MIA |= {"name": 0, "object": 0, "wording": [0, 0, 0]}


@pytest.mark.parametrize(
    ("step", "right"),
    [
        ("Buying: 12+7=19.", True),
        ("7+12=19", True),
        ("So she has 12 + 7 = 19 apples.", True),
        ("12+7=20", False),
        ("19=12+7", False),
        ("12+7=19-0", False),
        ("-12+7=19", False),
        ("12+7=19.5", False),
        ("12+7=19, then 19-9=10", False),
        ("On day 1: 12+7=19.", False),
        ("1 2+7=19", False),
        ("１２+7=19", False),
        ("19-9=10", False),
        ("12-7=5", False),
        ("12+7=\\boxed{19}", False),
        ("The answer is \\boxed{30}.", False),
        ("Buying.", False),
    ],
)
def test_verdicts_on_a_first_maths_step(step: str, right: bool) -> None:
    assert check_steps(Problem("mia", "?", "30", None, MIA), step) == [right]


def test_order_matters_for_differences_and_boxes_stand_alone() -> None:
    mia = Problem("mia", "?", "30", None, MIA)
    done = "12+7=19\n \n\n19-9=10\n\n 3*10=30\n\n"
    assert check_steps(mia, "12+7=19\n\n9-19=10") == [True, False]
    assert check_steps(mia, done + "\\boxed{30}") == [True] * 4
    for closing in (
        "\\boxed{31}",
        "\\boxed{30} \\boxed{30}",
        "-\\boxed{30}",
        "30",
        "30 or \\boxed{30}",
    ):
        assert check_steps(mia, done + closing) == [True] * 3 + [False]


def test_problems_of_other_sources_have_no_oracle() -> None:
    with pytest.raises(
        ValueError,
        match="problem gsm8k-1: the oracle needs metadata of the embedded world",
    ):
        check_steps(Problem("gsm8k-1", "?", "30"), "30")


EXAMPLES = [
    generate(family, "train", 1, difficulty=(4, 4), languages=("ja",))[0]
    for family in FAMILIES
]
GARBAGE = (
    st.text()
    | st.text(alphabet="12379+-*/=(), .\n{}\\")
    | st.lists(
        st.sampled_from(
            [
                "12+7=19",
                "\n\n",
                "\\boxed{",
                "}",
                "真",
                "9" * 5000,
                " ",
                "(1,2)",
                "答えは",
            ]
        )
    ).map("".join)
)


@settings(deadline=None, max_examples=150)
@given(GARBAGE)
def test_oracle_never_raises_and_never_recovers(text: str) -> None:
    for problem in EXAMPLES:
        verdicts = check_steps(problem, text)
        assert verdicts == sorted(verdicts, reverse=True)


# --- pre-training text ---


def test_pretraining_states_every_fact_whatever_its_split() -> None:
    text = "\n".join(pretraining_documents(80))
    for split in SPLITS:
        for problem in generate("facts", split, 40):
            country = re.search(r"of (\w+)|to (\w+)", problem.question)
            name = country[1] or country[2]
            assert (
                f"The {problem.metadata['attribute']} of {name} is {problem.answer}."
                in text
            )


def test_pretraining_covers_every_family_and_never_shows_a_held_out_question() -> None:
    documents = pretraining_documents(2000, seed=5, difficulty=(1, 2))
    assert len(documents) == 2000 and documents == pretraining_documents(
        2000, seed=5, difficulty=(1, 2)
    )
    shown = {document.split("\n")[0] for document in documents}
    for family in FAMILIES:
        count = 50 if family == "facts" else 200
        for split in ("validation", "test"):
            assert not shown & {
                p.question for p in generate(family, split, count, 0, (1, 2), LANGUAGES)
            }
    for start in (
        "Sort",
        "A robot",
        "Write",
        "Copy this",
        "次をそのまま",
        "ロボットは",
        "Mia has",
        "ミアは",
    ):
        assert any(document.startswith(start) for document in documents)


def test_documents_hold_several_problems_of_one_kind_as_shots_are_told() -> None:
    documents = pretraining_documents(
        600, 1, (1, 2), ["maths", "grid"], ["en"], 0.5, problems=3
    )
    several = Counter()
    for document in documents:
        problems = document.split("\n\n\n")
        several[len(problems)] += 1
        robots = ["robot" in problem.split("\n")[0] for problem in problems]
        assert len(set(robots)) == 1
        assert all(re.search(r"\?\n.*boxed\{\S+\}\.$", p, re.DOTALL) for p in problems)
    assert set(several) == {1, 2, 3} and min(several.values()) > 150
    alone = sum(
        "\nThe answer" in d.split("\n\n\n")[0][:-30] or "?\nThe" in d for d in documents
    )
    assert 200 < alone < 560
    shots = generate("grid", "test", 1, shots=2)[0].metadata["shots"]
    assert re.fullmatch(r"(A robot.*?\?\n.*?\}\.\n\n\n){2}", shots, re.DOTALL)


def test_pretraining_refuses_too_few_documents() -> None:
    with pytest.raises(ValueError, match="at least 80"):
        pretraining_documents(79)
