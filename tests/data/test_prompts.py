"""Prompts and responses: placeholders, chats, plain text, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.data.problem import Problem
from nanomath.data.prompts import (
    Message,
    PromptTemplate,
    render_prompt,
    render_response,
)

PROBLEM = Problem("p1", "What is 9 * 2?", "18", "9 * 2 = 18", {"level": 3, "a.b": "x"})
EXAMPLE = {"question": "1 + 1?", "solution": "It is 2.", "answer": "2", "level": "1"}


def lay_out(messages: list[Message], add_generation_prompt: bool) -> str:
    text = "".join(
        f"<{message['role']}>{message['content']}</>" for message in messages
    )
    return text + "<assistant>" * add_generation_prompt


# --- placeholders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("{solution}", "9 * 2 = 18"),
        (
            "{solution}\n\nThe answer is \\boxed{{answer}}.",
            "9 * 2 = 18\n\nThe answer is \\boxed{18}.",
        ),
        (
            "\\boxed{...} {x \\in S} {} {{}} { answer } {n} }{",
            "\\boxed{...} {x \\in S} {} {{}} { answer } {n} }{",
        ),
        (
            "\\boxed{} \\text{no} \\frac{ab}{cd} x^{ab}",
            "\\boxed{} \\text{no} \\frac{ab}{cd} x^{ab}",
        ),
        (
            "\\sqrt[3]{ab} \\min*{ab}_{ab} \\frac{a^{2}b}{cd}",
            "\\sqrt[3]{ab} \\min*{ab}_{ab} \\frac{a^{2}b}{cd}",
        ),
        ('Write {"answer": 1} or {a, b}', 'Write {"answer": 1} or {a, b}'),
        ("{{unknown}} {{answer}} {{{answer}}} {{answer}", "{unknown} {18} {{18}} {18"),
        ("level {level}, {a.b}: {answer}{answer}", "level 3, x: 1818"),
        ("nothing", "nothing"),
    ],
)
def test_only_known_names_in_braces_are_replaced(response: str, text: str) -> None:
    assert render_response(PROBLEM, PromptTemplate(response=response)) == text


@settings(deadline=None, max_examples=100)
@given(
    question=st.text(min_size=1),
    answer=st.text(min_size=1),
    solution=st.text(min_size=1),
)
def test_what_is_put_in_is_never_read_as_a_template(
    question: str, answer: str, solution: str
) -> None:
    problem = Problem("p", question, answer, solution, {"key": "{answer}"})
    template = PromptTemplate(
        "Q: {question}\nA:", "{solution}|{key}|{answer}", chat=False
    )
    assert render_prompt(problem, template) == f"Q: {question}\nA:"
    assert render_response(problem, template) == f"{solution}|{{answer}}|{answer}"


def test_a_field_of_the_problem_wins_over_metadata_of_the_same_name() -> None:
    problem = Problem(
        "p", "asked", "18", metadata={"question": "other", "solution": "other"}
    )
    assert render_prompt(problem, PromptTemplate(chat=False)) == "asked"
    with pytest.raises(ValueError, match="problem 'p' has no solution"):
        render_response(problem, PromptTemplate())


# --- layouts ---------------------------------------------------------------------------------


def test_a_chat_is_laid_out_by_the_tokenizer() -> None:
    assert (
        render_prompt(PROBLEM, PromptTemplate(), lay_out)
        == "<user>What is 9 * 2?</><assistant>"
    )
    template = PromptTemplate(
        "Solve: {question}",
        "{solution} #### {answer}",
        system="Be {answer}.",
        few_shot=[EXAMPLE],
    )
    assert render_prompt(PROBLEM, template, lay_out) == (
        "<system>Be {answer}.</><user>Solve: 1 + 1?</><assistant>It is 2. #### 2</>"
        "<user>Solve: What is 9 * 2?</><assistant>"
    )


def test_plain_text_joins_the_parts_with_blank_lines() -> None:
    template = PromptTemplate(
        "Question: {question}\nAnswer:", " {solution}", chat=False
    )
    assert render_prompt(PROBLEM, template) == "Question: What is 9 * 2?\nAnswer:"
    template = PromptTemplate(
        template.template, template.response, "Maths.", (EXAMPLE, EXAMPLE), chat=False
    )
    example = "Question: 1 + 1?\nAnswer: It is 2."
    assert (
        render_prompt(PROBLEM, template)
        == f"Maths.\n\n{example}\n\n{example}\n\nQuestion: What is 9 * 2?\nAnswer:"
    )


def test_an_example_reads_as_a_training_text_does() -> None:
    template = PromptTemplate(
        "Q ({level}): {question}\nA:", " {solution}\n#### {answer}", chat=False
    )
    problem = Problem(
        "e", EXAMPLE["question"], EXAMPLE["answer"], EXAMPLE["solution"], {"level": 1}
    )
    trained = render_prompt(problem, template) + render_response(problem, template)
    with_example = PromptTemplate(
        template.template, template.response, few_shot=[EXAMPLE], chat=False
    )
    assert (
        render_prompt(PROBLEM, with_example)
        == f"{trained}\n\n{render_prompt(PROBLEM, template)}"
    )


def test_a_prompt_needs_no_solution() -> None:
    problem = Problem("p", "asked", "18")
    assert render_prompt(problem, PromptTemplate(few_shot=[EXAMPLE]), lay_out).endswith(
        "<user>asked</><assistant>"
    )


# --- errors ----------------------------------------------------------------------------------


def test_a_template_must_ask_the_question() -> None:
    with pytest.raises(
        ValueError,
        match=r"the prompt template 'Solve: \{problem\}' must contain \{question\}",
    ):
        PromptTemplate("Solve: {problem}")


def test_a_missing_field_names_the_problem_and_the_template() -> None:
    with pytest.raises(ValueError) as caught:
        render_response(
            Problem("gsm8k-7", "asked", "18"), PromptTemplate(response="{solution}!")
        )
    assert (
        str(caught.value)
        == "problem 'gsm8k-7' has no solution, which the template '{solution}!' needs"
    )


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{question}\n{quesion}", "quesion"),
        ("{question} ({Level})", "Level"),
        ("{question}{levle}", "levle"),
        ("{question} {a.c}", "a.c"),
        ("{question} \\boxed{{anwser}}", "anwser"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_fields_that_there_are(
    template: str, word: str
) -> None:
    with pytest.raises(ValueError) as caught:
        render_prompt(PROBLEM, PromptTemplate(template, chat=False))
    assert str(caught.value) == (
        f"the template {template!r} has {{{word}}}, but problem 'p1' no such field: it has "
        f"level, a.b, question, "
        f"answer, solution ({{{{{word}}}}} stands for the word in braces)"
    )


def test_a_field_without_a_value_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="problem 'p' has no level, which the template '{question} {level}' needs",
    ):
        render_prompt(
            Problem("p", "q", "1", metadata={"level": None}),
            PromptTemplate("{question} {level}"),
            lay_out,
        )


@pytest.mark.parametrize(
    ("example", "name"),
    [
        ({"solution": "2"}, "question"),
        ({"question": "1 + 1?"}, "solution"),
        ({"question": "?", "solution": "2"}, "answer"),
    ],
)
def test_an_example_that_lacks_a_field_is_refused_at_once(
    example: dict[str, str], name: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"problem 'few_shot\[1\]' has no {name}, which the template"
    ):
        PromptTemplate(response="{solution} {answer}", few_shot=[EXAMPLE, example])


def test_a_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="a chat prompt needs the tokenizer's chat template; .* chat=false",
    ):
        render_prompt(PROBLEM, PromptTemplate())
