r"""Prompts: how a Problem becomes the text that a model reads, and the text that it should
write.

A template is plain text in which `{question}`, `{answer}`, `{solution}` and `{KEY}`, for each
metadata key of the problem, are replaced in one pass. Every other brace stands for itself, so
that LaTeX needs no escapes: the template `\boxed{{answer}}` becomes `\boxed{18}`, and `{x \in
S}`, `\boxed{}` and `\text{no}` stay. A word in braces that is no field, and no argument of a
LaTeX command, is a mistake; `{{word}}` is the way to write `{word}`.

In a chat (instruction-tuned models) the prompt is a system message, the few-shot examples as
turns, and the question, all laid out by the tokenizer's own chat template. In plain text (base
models) it is the same parts joined with blank lines, where an example is its prompt followed
by its response, exactly as training concatenates the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanomath.data.problem import Problem

PLACE = re.compile(r"\{(\{)?([^{}]+)\}(?(1)\})")
WORD = re.compile(r"[^\W\d][\w.]*\w")  # what can be a misspelt field
# What an argument in braces follows.
LATEX = re.compile(r"(\\[a-zA-Z]+\*?(\[[^]]*\])?(\{([^{}]|\{[^{}]*\})*\})*|[\^_])\Z")

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class PromptTemplate:
    """Says how problems are asked and answered.

    `template` makes the question and `response` the answer to it, also in the `few_shot`
    examples: mappings with `question` and whatever else the two templates name. ValueError
    if `template` does not ask the question or an example lacks a field.
    """

    template: str = "{question}"
    response: str = "{solution}"
    system: str = ""
    few_shot: Sequence[Mapping[str, str]] = ()
    chat: bool = True

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise ValueError(
                f"the prompt template {self.template!r} must contain {{question}}"
            )
        self.example_turns()

    def example_turns(self) -> list[tuple[str, str]]:
        """Return (question, response) of each few-shot example, as text."""
        turns = []
        for i, example in enumerate(self.few_shot):
            problem = Problem(
                id=f"few_shot[{i}]",
                question=example.get("question", ""),
                answer=example.get("answer", ""),
                solution=example.get("solution"),
                metadata=dict(example),
            )
            turns.append((_fill(self.template, problem), _fill(self.response, problem)))
        return turns


def render_prompt(
    problem: Problem,
    template: PromptTemplate,
    apply_chat_template: Callable[[list[Message], bool], str] | None = None,
) -> str:
    """Return the text that a model is given for a problem.

    `apply_chat_template(messages, add_generation_prompt)` is the tokenizer's method; a chat
    needs it (ValueError).
    """
    question = _fill(template.template, problem)
    if not template.chat:
        examples = [asked + answered for asked, answered in template.example_turns()]
        return "\n\n".join([*filter(None, [template.system]), *examples, question])
    if apply_chat_template is None:
        raise ValueError(
            "a chat prompt needs the tokenizer's chat template; for a base model set chat=false"
        )
    messages = (
        [{"role": "system", "content": template.system}] if template.system else []
    )
    for asked, answered in template.example_turns():
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    return apply_chat_template([*messages, {"role": "user", "content": question}], True)


def render_response(problem: Problem, template: PromptTemplate) -> str:
    """Return the text that a model is trained to write for a problem.

    ValueError if the problem lacks a field that the template names.
    """
    return _fill(template.response, problem)


def _fill(text: str, problem: Problem) -> str:
    """Replace the names in braces in `text` by the problem's fields. ValueError for a field
    that the problem does not have.
    """
    own = {
        "question": problem.question,
        "answer": problem.answer,
        "solution": problem.solution,
    }
    fields = {**problem.metadata, **own}

    def value(match: re.Match[str]) -> str:
        doubled, name = match.groups()
        if name in fields:
            if fields[name] is None or (name in own and not own[name]):
                raise ValueError(
                    f"problem {problem.id!r} has no {name}, which the template {text!r} needs"
                )
            return f"{{{fields[name]}}}" if doubled else str(fields[name])
        if not WORD.fullmatch(name):
            return match[0]
        if bool(doubled) == bool(LATEX.search(text, 0, match.start())):
            raise ValueError(
                f"the template {text!r} has {{{name}}}, "
                f"but problem {problem.id!r} no such field: it has "
                f"{', '.join(fields):.300} ({{{{{name}}}}} stands for the word in braces)"
            )
        return f"{{{name}}}"

    return PLACE.sub(value, text)
