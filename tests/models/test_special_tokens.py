"""The tokens in the files around tokenizer.json, and what stands around plain text, against
transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from nanomath.models import load_tokenizer

NAMES = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
}
TEXT = "a<think>b</think> </s><unk><s>(<pad>"
VOCABULARY = {
    token: id
    for id, token in enumerate(
        ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    )
}
NEXT = len(VOCABULARY)  # the id of the first token that is added


def token(content: str, special: bool = True, **flags: bool) -> dict[str, object]:
    none = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special, **none, **flags}


KNOWN = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>")}


def write(
    directory: Path, config: dict, added: bool = True, around: str = "", **files: object
) -> Path:
    """A directory of a byte-level tokenizer whose tokenizer.json knows the tokens of KNOWN, as
    added ones or not.
    """
    backend = tokenizers.Tokenizer(models.BPE(VOCABULARY, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if added:
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if around:
        pairs = [("<s>", 1), ("</s>", 2)]
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=pairs
        )
    backend.save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config": config, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def assert_as_in_transformers(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = (
        load_tokenizer(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
    )
    assert (
        ours.backend.get_added_tokens_decoder().keys()
        == theirs.added_tokens_decoder.keys()
    )
    for id, found in ours.backend.get_added_tokens_decoder().items():
        assert repr(found) == repr(theirs.added_tokens_decoder[id])
    ids = ours.encode(TEXT)
    assert ids == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXT, add_special_tokens=True) == theirs(TEXT)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_tokens.get("pad_token") == theirs.pad_token


THINK = {str(NEXT): token("<think>", special=False), str(NEXT + 1): token("</think>")}
DECODERS = {
    "all known": KNOWN,
    "new ones": {**KNOWN, **THINK},
    "new ones alone": THINK,
    "new ones in another order": dict(reversed(THINK.items())),
    "padding": {
        **KNOWN,
        str(NEXT): token("<pad>", special=False),
    },  # special all the same: it is the pad_token
    "other flags": {"1": token("<s>", lstrip=True), "0": token("<unk>", special=False)},
    "a special token of the vocabulary": {str(VOCABULARY["("]): token("(")},
    "a plain token of the vocabulary": {
        str(VOCABULARY["("]): token("(", special=False)
    },
}


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("case", DECODERS)
def test_stated_tokens_are_added(case: str, added: bool, tmp_path: Path) -> None:
    names = {**NAMES, "pad_token": "<pad>"} if case == "padding" else NAMES
    assert_as_in_transformers(
        write(tmp_path, {**names, "added_tokens_decoder": DECODERS[case]}, added)
    )


def test_added_tokens_have_the_ids_and_flags_that_are_stated(tmp_path: Path) -> None:
    loaded = load_tokenizer(write(tmp_path, {**NAMES, "added_tokens_decoder": THINK}))
    ids = loaded.encode("<think>a</think>")
    assert (ids[0], ids[-1], len(ids)) == (NEXT, NEXT + 1, 3)
    assert loaded.decode(ids) == "<think>a"
    loaded.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode("<think>a</think>") == ids


OLD = {
    "ids": {"added_tokens": {"<think>": NEXT}},
    "padding": {
        "added_tokens": {"<pad>": NEXT + 1, "<think>": NEXT},
        "special_tokens_map": {"pad_token": "<pad>"},
    },
    "special": {
        "added_tokens": {"<think>": NEXT, "</think>": NEXT + 1},
        "special_tokens_map": {"extra_special_tokens": ["</think>"]},
    },
    "known": {"added_tokens": {"<s>": 1}},
    "names": {
        "special_tokens_map": {
            "bos_token": "</s>",
            "eos_token": {"content": "<unk>", "lstrip": False},
        }
    },
}


@pytest.mark.parametrize("case", OLD)
def test_files_of_older_versions_are_read(case: str, tmp_path: Path) -> None:
    assert_as_in_transformers(write(tmp_path, NAMES, **OLD[case]))


def test_files_of_older_versions_are_not_read_beside_the_newer_one(
    tmp_path: Path,
) -> None:
    files = {
        "added_tokens": {"<think>": NEXT},
        "special_tokens_map": {"bos_token": "</s>", "pad_token": "<unk>"},
    }
    assert_as_in_transformers(
        write(tmp_path, {**NAMES, "added_tokens_decoder": KNOWN}, **files)
    )


CONFLICTS = {
    "taken id": (
        {"1": token("<think>")},
        f"the token '<think>' has id 1 here, but {NEXT} after tokenizer.json",
    ),
    "id with a gap": (
        {str(NEXT + 5): token("<x>")},
        f"the token '<x>' has id {NEXT + 5} here, but {NEXT} after",
    ),
    "other id": (
        {"7": token("<s>")},
        "the token '<s>' has id 7 here, but 1 after tokenizer.json",
    ),
    "no id": (
        {"x": token("<x>")},
        "added_tokens_decoder['x']: an id must be a whole number",
    ),
    "no token": ({"9": "<x>"}, "added_tokens_decoder['9'] = '<x>' must be an object"),
    "no text": ({"9": {}}, "added_tokens_decoder['9'].content = None must be text"),
    "no flag": (
        {"9": {**token("<x>"), "special": 1}},
        "added_tokens_decoder['9'].special = 1 must be true or false",
    ),
    "empty": (
        {str(NEXT): token("")},
        f"the token '' has id {NEXT} here, but None after tokenizer.json",
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_a_conflict_is_one_line(case: str, tmp_path: Path) -> None:
    decoder, message = CONFLICTS[case]
    write(tmp_path, {**NAMES, "added_tokens_decoder": decoder})
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/tokenizer_config.json: {message}")
    assert "\n" not in str(caught.value)


def test_a_conflict_in_an_older_file_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, NAMES, added_tokens={"<think>": 1})
    with pytest.raises(
        ValueError, match="added_tokens.json: the token '<think>' has id 1 here, but "
    ):
        load_tokenizer(tmp_path)


def test_padding_and_unknown_tokens_may_be_missing(tmp_path: Path) -> None:
    loaded = load_tokenizer(
        write(
            tmp_path,
            {**NAMES, "pad_token": "<pad>", "unk_token": {"content": "<none>"}},
        )
    )
    assert loaded.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert loaded.eos_id == 2
    # No id is made up that the model has no embedding for
    assert loaded.vocab_size == NEXT


@pytest.mark.parametrize("kind", ["bos_token", "eos_token"])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_other_special_tokens_may_not(kind: str, file: str, tmp_path: Path) -> None:
    write(tmp_path, NAMES, **{file: {kind: "<none>"}})
    with pytest.raises(
        ValueError,
        match=f"{file}.json: {kind} is '<none>', which is not in the tokenizer's vocab",
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        (None, None),
        (True, None),
        (False, None),
        (None, True),
        (True, True),
        (False, False),
    ],
)
@pytest.mark.parametrize("around", ["", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    "kind",
    [
        "LlamaTokenizerFast",
        "GPT2TokenizerFast",
        "Qwen2TokenizerFast",
        "PreTrainedTokenizerFast",
    ],
)
def test_tokenizer_json_says_what_stands_around_plain_text(
    kind: str, around: str, flags: tuple, tmp_path: Path
) -> None:
    """With a tokenizer.json, transformers too takes no notice of add_bos_token and
    add_eos_token.
    """
    transformers = pytest.importorskip("transformers")
    asked = dict(zip(("add_bos_token", "add_eos_token"), flags, strict=True))
    config = {
        **NAMES,
        "tokenizer_class": kind,
        **{key: value for key, value in asked.items() if value is not None},
    }
    write(tmp_path, config, around=around)
    ids = load_tokenizer(tmp_path).encode("ab", add_special_tokens=True)
    assert (
        ids == transformers.AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"]
    )
    assert (ids[0] == 1, ids[-1] == 2) == ("<s>" in around, "</s>" in around)
