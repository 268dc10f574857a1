"""Text to token ids and back, and chats to prompts, for any model with a fast Hugging Face
tokenizer.

The byte-pair arithmetic is the `tokenizers` library's own; what is added is what a trainer
needs of the files around tokenizer.json: the special tokens, every id that ends a completion,
and the chat template (chat.py). What stands around plain text is tokenizer.json's alone:
`add_bos_token` and `add_eos_token` of tokenizer_config.json change nothing beside it, in
transformers neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers

from nanomath.data.files import read_optional, write_json
from nanomath.models.chat import chat_template, render
from nanomath.models.directory import (
    ADAPTER_CONFIG,
    TOKENIZER_FILES,
    base_of,
    resolve_model_dir,
)
from nanomath.models.special_tokens import special_tokens
from nanomath.models.stored import (
    LARGEST_COUNT,
    naming,
    one_line,
    whole,
)


class Tokenizer:
    """A tokenizer with its special tokens, and with one chat template or several named
    ones.

    `backend` is a `tokenizers.Tokenizer`; the special tokens are given as text, ValueError
    when its vocabulary lacks one. `eos_ids` are all ids that end a completion, that of
    `eos_token` first: an instruction-tuned model often has several.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
    ) -> None:
        # Files saved in the middle of a training job can carry its truncation, which would
        # silently cut prompts.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        given = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "pad_token": pad_token,
            "unk_token": unk_token,
        }
        self.special_tokens = {
            kind: token for kind, token in given.items() if token is not None
        }
        for kind, token in self.special_tokens.items():
            if backend.token_to_id(token) is None:
                raise ValueError(
                    f"{kind} is {token!r}, which is not in the tokenizer's vocabulary"
                )
        own = [] if eos_token is None else [backend.token_to_id(eos_token)]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *eos_ids]))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of `text`. A special token written out in the text becomes
        its id.

        Nothing is added by default, because a chat template writes its own beginning;
        `add_special_tokens=True` adds what the tokenizer puts around plain text (the
        beginning-of-sequence token of Llama, nothing for Qwen).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`, by default without special tokens.

        Bytes that are not UTF-8 become U+FFFD.
        """
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return `encode(text)`, and for each token the characters [start, end) of `text`
        it stands for.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """Return the prompt text of `messages`, each {"role": ..., "content": ...}, in the
        model's own chat format.

        `add_generation_prompt` opens the assistant's turn; `extra` is passed to the
        template (`tools=[...]`, `enable_thinking=False`). Of several templates `tool_use`
        is the one for tools, `default` that for all else. ValueError when there is no
        template or the template refuses the messages.
        """
        names = {**self.special_tokens, **extra}
        return render(self.chat_template, messages, add_generation_prompt, names)

    @property
    def eos_id(self) -> int:
        """The id that ends a text of the training data; `eos_ids` has all that end a
        completion.
        """
        if not self.eos_ids:
            raise ValueError(
                "the tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json"
            )
        return self.eos_ids[0]

    @property
    def bos_id(self) -> int | None:
        """The id of the beginning-of-sequence token, for the families that have one."""
        return self._special_id("bos_token")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included. The model may have more rows than this
        (padding).
        """
        return self.backend.get_vocab_size(with_added_tokens=True)

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Return whether each token id means the same text as in another tokenizer."""
        return self.backend.get_vocab() == other.backend.get_vocab()

    def save(self, directory: str | PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, which
        transformers reads as well.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(target / "tokenizer.json"), pretty=False)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        config |= self.special_tokens
        if isinstance(self.chat_template, str):
            config["chat_template"] = self.chat_template
        elif self.chat_template is not None:
            config["chat_template"] = [
                {"name": name, "template": template}
                for name, template in self.chat_template.items()
            ]
        write_json(target / "tokenizer_config.json", config)
        write_json(target / "generation_config.json", self.token_ids())

    def token_ids(self) -> dict[str, int | list[int] | None]:
        """Return the ids that generation needs, under the names of a Hugging Face config."""
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        return {
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "pad_token_id": self._special_id("pad_token"),
        }

    def _special_id(self, kind: str) -> int | None:
        token = self.special_tokens.get(kind)
        return None if token is None else self.backend.token_to_id(token)


def load_tokenizer(path_or_hub_id: str | PathLike[str], base: str = "") -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory, a hub id, or a run directory (its
    newest checkpoint). Of an adapter it is that of the model it was trained on, which `base`
    may name.

    A pad_token or unk_token that is not in the vocabulary is left out. FileNotFoundError
    without a tokenizer.json, ValueError for a file that cannot be read, or that
    tokenizer.json contradicts.
    """
    directory = resolve_model_dir(path_or_hub_id, TOKENIZER_FILES)
    if (directory / ADAPTER_CONFIG).is_file():
        return load_tokenizer(base_of(directory, base, TOKENIZER_FILES))
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer.json in {directory}: nanomath reads fast tokenizers only"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.encode("")  # only now a post-processor notices that it lacks a token
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's Rust panics are no Exception
        raise ValueError(
            f"{file} is not a readable tokenizer: {one_line(error)}"
        ) from error
    config = read_optional(directory / "tokenizer_config.json")
    special = special_tokens(backend, directory, config)
    return Tokenizer(
        backend, chat_template(directory, config), _stored_eos_ids(directory), **special
    )


def _stored_eos_ids(directory: Path) -> list[int]:
    """Return the ids that end a completion.

    generation_config.json may have more of them than config.json, which may be older.
    """
    for name in ("generation_config.json", "config.json"):
        stored = read_optional(directory / name).get("eos_token_id")
        if stored is not None:
            with naming(directory / name):
                ids = stored if isinstance(stored, list) else [stored]
                return [whole(id, "eos_token_id", 0, LARGEST_COUNT) for id in ids]
    return []
