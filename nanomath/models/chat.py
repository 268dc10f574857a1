"""Chats as the text of a prompt, by the chat template of a model.

A chat template is Jinja that came with somebody's weights, so it runs in jinja2's sandbox, in
the dialect transformers defines
(https://huggingface.co/docs/transformers/chat_templating_writing), and renders the same text
as there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanomath.data.files import read_text
from nanomath.models.stored import naming, one_line, text


def render(
    templates: str | Mapping[str, str] | None,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool,
    names: dict[str, Any],
) -> str:
    """Return the prompt text of `messages` by a template, or by the right one of several.

    names: what else the template may use. ValueError when there is no template or it refuses
    the messages.
    """
    template = chosen_template(templates, names.get("tools") is not None)
    names = {"tools": None, "documents": None, **names}
    try:
        return _compile(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            **names,
        )
    except Exception as error:  # a template is foreign code: any error is its refusal
        raise ValueError(
            f"the chat template failed on these messages: {one_line(error)}"
        ) from error


def chosen_template(templates: str | Mapping[str, str] | None, with_tools: bool) -> str:
    """Return the template for messages with or without tools."""
    if templates is None:
        raise ValueError(
            "the tokenizer has no chat template: chat=false in the config uses plain prompts"
        )
    if isinstance(templates, str):
        return templates
    name = "tool_use" if with_tools and "tool_use" in templates else "default"
    if name not in templates:
        given = ", ".join(map(repr, sorted(templates)))
        raise ValueError(
            f"the tokenizer has no chat template of the name 'default', but {one_line(given)}"
        )
    return templates[name]


def chat_template(
    directory: Path, config: dict[str, Any]
) -> str | dict[str, str] | None:
    """Return the chat template as text, or several by name; None where there is none.

    Files of templates go before tokenizer_config.json.
    """
    files = {"default": directory / "chat_template.jinja"}
    files |= {
        file.stem: file
        for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))
    }
    templates = {
        name: read_text(file) for name, file in files.items() if file.is_file()
    }
    if not templates:
        with naming(directory / "tokenizer_config.json"):
            templates = _stored_templates(config.get("chat_template"))
    return (
        templates["default"] if templates.keys() == {"default"} else templates or None
    )


def _stored_templates(stored: Any) -> dict[str, str]:
    """Return the templates in tokenizer_config.json by name; a single one is `default`."""
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {"default": stored}
    if not isinstance(stored, list) or not all(
        isinstance(entry, dict) for entry in stored
    ):
        raise ValueError(
            f"chat_template = {stored!r:.60} must be text, "
            "or a list of objects with name and template"
        )
    return {
        text(entry.get("name"), "chat_template.name"): text(
            entry.get("template"), "chat_template.template"
        )
        for entry in stored
    }


class _GenerationBlock(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words in some templates; it
    renders its body.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@cache
def _compile(chat_template: str) -> jinja2.Template:
    """Compile the template in the environment that transformers promises to template
    authors.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(chat_template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as models saw it in training; jinja2's own filter escapes for HTML and
    sorts the keys.
    """
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
