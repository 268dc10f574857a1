"""The special and the added tokens of a tokenizer in the files around tokenizer.json, read as
in transformers.

tokenizer_config.json names the special tokens, and its `added_tokens_decoder` gives the added
ones their ids. Where it has none, an older transformers wrote it, whose
special_tokens_map.json and added_tokens.json said so.
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nanomath.data.files import read_optional
from nanomath.models.stored import (
    LARGEST_COUNT,
    flag,
    naming,
    table,
    text,
    whole,
)

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")
ADDED_TOKENS = "added_tokens_decoder"
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def special_tokens(
    backend: tokenizers.Tokenizer, directory: Path, config: dict[str, Any]
) -> dict[str, str]:
    """Add all tokens that the files of `directory` name to the backend, and return the
    special ones by kind.

    config: its tokenizer_config.json. A pad_token or unk_token that is not in the
    vocabulary is left out. ValueError when a bos_token or eos_token is not in it, or when a
    token would get another id than the one stated.
    """
    files = {directory / "tokenizer_config.json": config}
    if ADDED_TOKENS not in config:
        file = directory / "special_tokens_map.json"
        files[file] = read_optional(file)
    named, extra = _named_tokens(files)
    texts = [token for token, _ in named.values()]
    if ADDED_TOKENS in config:
        _add_stated(
            backend, config[ADDED_TOKENS], texts, directory / "tokenizer_config.json"
        )
    else:
        _add_old(backend, {*texts, *extra}, directory / "added_tokens.json")
    _make_special(backend, [*texts, *extra])
    known = {}
    for kind, (token, file) in named.items():
        if backend.token_to_id(token) is not None:
            known[kind] = token
        elif kind in ("bos_token", "eos_token"):
            raise ValueError(
                f"{file}: {kind} is {token!r:.60}, which is not in the tokenizer's vocabulary"
            )
    return known


def _token_text(token: Any, key: str) -> str:
    """Return the text of a special token, stored as text or as {"content": text, "lstrip":
    ...}.
    """
    return text(token.get("content") if isinstance(token, dict) else token, key)


def _named_tokens(
    files: dict[Path, dict[str, Any]],
) -> tuple[dict[str, tuple[str, Path]], list[str]]:
    """Return the special tokens that have a kind, and the texts of those that have none.

    The first are, by kind, the text and the file it is from: the last file that has the
    key.
    """
    named: dict[str, tuple[str, Path]] = {}
    extra: list[str] = []
    for file, settings in files.items():
        with naming(file):
            for kind in SPECIAL_TOKENS:
                if settings.get(kind):
                    named[kind] = (_token_text(settings[kind], kind), file)
                elif kind in settings:
                    named.pop(kind, None)
            for key in EXTRA_TOKENS:
                stored = settings.get(key) or []
                if not isinstance(stored, list | dict):
                    raise ValueError(f"{key} = {stored!r:.60} must be a list of tokens")
                tokens = stored.values() if isinstance(stored, dict) else stored
                extra += [_token_text(token, key) for token in tokens]
    return named, extra


def _add_stated(
    backend: tokenizers.Tokenizer, stored: Any, named: list[str], file: Path
) -> None:
    """Add the tokens of an added_tokens_decoder; those that are there get the flags it
    states.
    """
    same = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    with naming(file):
        stated = _stated_tokens(stored)
        lacking = [(id, token) for id, token in stated if repr(token) not in same]
        for _, token in lacking:
            token.special = token.special or token.content in named
        _add(backend, lacking, stated)


def _add_old(backend: tokenizers.Tokenizer, special: set[str], file: Path) -> None:
    """Add the tokens of an added_tokens.json; those that are there keep their flags."""
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    stated = []
    with naming(file):
        for token, id in read_optional(file).items():
            id = whole(id, f"{token!r:.60}", 0, LARGEST_COUNT)
            flags = {"special": token in special, "normalized": token not in special}
            stated.append((id, AddedToken(token, **flags)))
        lacking = [(id, token) for id, token in stated if token.content not in present]
        _add(backend, lacking, stated)


def _add(
    backend: tokenizers.Tokenizer,
    lacking: list[tuple[int, AddedToken]],
    stated: list[tuple[int, AddedToken]],
) -> None:
    """Add tokens in the order of their ids: each new one gets the next id.

    ValueError when a token has another id than the one stated.
    """
    backend.add_tokens([token for _, token in sorted(lacking, key=itemgetter(0))])
    for id, token in stated:
        if (given := backend.token_to_id(token.content)) != id:
            raise ValueError(
                f"the token {token.content!r:.60} has id {id} here, "
                f"but {given} after tokenizer.json"
            )


def _make_special(backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    """Make tokens of the vocabulary special that are no added tokens yet.

    A name that is not in the vocabulary adds no token: it would get an id that the model
    was not trained on.
    """
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens(
        [
            AddedToken(token, special=True)
            for token in tokens
            if token not in added and backend.token_to_id(token) is not None
        ]
    )


def _stated_tokens(stored: Any) -> list[tuple[int, AddedToken]]:
    """Return the ids and tokens of an added_tokens_decoder, {"260": {"content": "<think>",
    "special": false, ...}}.
    """
    stated = []
    for id, token in table(stored, ADDED_TOKENS).items():
        key = f"{ADDED_TOKENS}[{id!r:.20}]"
        if not (id.isascii() and id.isdigit()):
            raise ValueError(f"{key}: an id must be a whole number")
        token = table(token, key)
        flags = {
            name: flag(token[name], f"{key}.{name}") for name in FLAGS if name in token
        }
        content = text(token.get("content"), f"{key}.content")
        stated.append((int(id), AddedToken(content, **flags)))
    return stated
