"""Whatever stands in a model's directory: the model and its tokenizer are loaded as what the
files say, or one line says which of them cannot be read and why. Any other end of a loader is
a fault of its own.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from nanomath.models import (
    ModelConfig,
    Tokenizer,
    Transformer,
    load_model,
    load_tokenizer,
    save_model,
)
from nanomath.models.hf import INDEX_FILE
from nanomath.models.hf_names import hf_slices

T = TypeVar("T")
quickly = settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

SHAPE = {
    "vocab_size": 9,
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
ROPE["original_max_position_embeddings"] = 16
CONFIG = ModelConfig(
    **SHAPE,
    intermediate_size=6,
    max_positions=64,
    rope_scaling=ROPE,
    tie_embeddings=False,
)
VOCABULARY = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "<unk>": 4, "<s>": 5, "</s>": 6}
TOKEN = {"content": "<think>", "special": False, "lstrip": False, "normalized": True}
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "pad_token": None,
    "additional_special_tokens": ["<s>"],
    "added_tokens_decoder": {"7": TOKEN, "8": {**TOKEN, "content": "</think>"}},
    "chat_template": [
        {"name": "default", "template": "{{ 1 }}"},
        {"name": "tool_use", "template": "{{ 2 }}"},
    ],
}

SPECIAL = [
    "",
    " ",
    "1",
    "7",
    "12",
    "true",
    "null",
    "w1",
    "<s>",
    "<x>",
    "\ud800",
    "\0",
    "a\nb",
    "\u2028",
    "../x",
    "{{",
]
SPECIAL += [
    "llama",
    "qwen3",
    "float32",
    "linear",
    "full_attention",
    "sliding_attention",
    "model.safetensors",
    "x" * 999,
]
texts = st.sampled_from(SPECIAL) | st.text(max_size=4)
NUMBERS = [
    0,
    1,
    2,
    3,
    4,
    8,
    9,
    -1,
    0.5,
    2.0,
    8.0,
    2**24,
    2**31,
    2**63,
    10**30,
    10**400,
    1e-300,
    1e300,
    1e400,
    -0.0,
]
scalars = st.none() | st.booleans() | st.sampled_from([*NUMBERS, float("nan")]) | texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2)
    ),
    max_leaves=5,
)


def changed(content: Any) -> st.SearchStrategy[Any]:
    """The content with one value, at any depth, replaced, left out or joined by another."""
    if isinstance(content, dict) and content:
        entry = st.sampled_from(sorted(content))
        replaced = entry.flatmap(
            lambda key: changed(content[key]).map(lambda value: {**content, key: value})
        )
        without = entry.map(
            lambda key: {name: value for name, value in content.items() if name != key}
        )
        return st.one_of(
            replaced,
            replaced,
            without,
            st.tuples(texts, values).map(lambda kv: {**content, kv[0]: kv[1]}),
        )
    if isinstance(content, list) and content:
        replaced = changed(content[0]).map(lambda value: [value, *content[1:]])
        return replaced | values.map(lambda value: [*content, value]) | values
    return values


def broken(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some cut out, and others put in their place."""
    pieces = [
        b"",
        b"\xff",
        b"\0",
        b"\n",
        b'"',
        b"{",
        b"]",
        b",",
        b"NaN",
        b"1" * 5000,
        b"\\ud800",
        b"[" * 100000,
    ]
    places = st.integers(0, len(data)) | st.integers(0, min(len(data), 40))
    cut = st.tuples(
        places,
        st.integers(0, 4) | places,
        st.sampled_from(pieces) | st.binary(max_size=4),
    )
    return cut.map(lambda c: data[: c[0]] + c[2] + data[c[0] + c[1] :]) | st.binary(
        max_size=20
    )


def result(read: Callable[[], T], *names: str) -> T | None:
    """What is read; None where one line that has one of the names says why it is not."""
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError)
        message = str(error)
        assert (
            any(name in message for name in names)
            and len(message.splitlines()) == 1
            and len(message) < 1000
        )
        message.encode()  # it can be printed
        return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with everything that a directory may have."""
    backend = tokenizers.Tokenizer(
        models.BPE(VOCABULARY, [("a", "b")], unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace("c", "a")]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 5)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    directory = tmp_path_factory.mktemp("models") / "whole"
    save_model(
        Transformer(CONFIG).init_weights(0),
        Tokenizer(backend, eos_token="</s>"),
        directory,
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [6, 3]})
    )
    return directory


@contextmanager
def changed_copy(whole: Path, files: dict[str, bytes | None]) -> Iterator[Path]:
    """A copy of the directory in which these files have that content, or are not there."""
    with TemporaryDirectory(dir=whole.parent) as place:
        directory = Path(shutil.copytree(whole, Path(place) / "copy"))
        for name, content in files.items():
            if content is None:
                (directory / name).unlink()
            else:
                (directory / name).write_bytes(content)
        yield directory


def written(content: Any) -> st.SearchStrategy[bytes]:
    """The content as JSON, with a change in what it says or in how it says it."""
    right = changed(content).map(lambda content: json.dumps(content).encode())
    return st.one_of(
        right, right, right.flatmap(broken), broken(json.dumps(content).encode())
    )


def assert_loaded(model: Transformer, directory: Path) -> None:
    """Every number is that of the files, and the model computes."""
    stored = {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for name, parameter, start, stop in hf_slices(model):
        source = (
            "lm_head.weight"
            if model.config.tie_embeddings and name not in stored
            else name
        )
        ours, theirs = (
            model.get_parameter(parameter)[start:stop].data,
            stored[source].float(),
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, model.config.vocab_size)


def check_model(directory: Path, name: str) -> None:
    model = result(lambda: load_model(directory), name, "safetensors files of")
    if model is not None:
        assert_loaded(model, directory)


@quickly
@given(data=st.data())
def test_any_config(whole: Path, data: st.DataObject) -> None:
    content = json.loads((whole / "config.json").read_bytes())
    with changed_copy(whole, {"config.json": data.draw(written(content))}) as directory:
        check_model(directory, "config.json")


def tampered(data: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with a header that says something else."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    said = changed(header).map(lambda content: json.dumps(content).encode())
    return said.map(
        lambda header: struct.pack("<Q", len(header)) + header + data[8 + length :]
    )


@quickly
@given(data=st.data())
def test_any_weights(whole: Path, data: st.DataObject) -> None:
    stored = (whole / "model.safetensors").read_bytes()
    weights = data.draw(broken(stored) | tampered(stored))
    with changed_copy(whole, {"model.safetensors": weights}) as directory:
        check_model(directory, "model.safetensors")


NAMES = [
    "model.norm.weight",
    "lm_head.weight",
    "model.embed_tokens.weight",
    "score.weight",
    "a\nb",
    "",
]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.complex64,
]
shapes = st.sampled_from([(), (0,), (8,), (9, 8), (8, 9), (1, 8)])
tensors = st.none() | st.builds(torch.ones, shapes, dtype=st.sampled_from(DTYPES))


@quickly
@given(name=st.sampled_from(NAMES), tensor=tensors, tied=st.booleans())
def test_any_tensor(
    whole: Path, name: str, tensor: torch.Tensor | None, tied: bool
) -> None:
    config = json.loads((whole / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    stored = {**load_file(whole / "model.safetensors"), name: tensor}
    weights = save(
        {name: tensor for name, tensor in stored.items() if tensor is not None}
    )
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": weights}
    with changed_copy(whole, files) as directory:
        check_model(directory, "model.safetensors")


@quickly
@given(data=st.data())
def test_any_index(whole: Path, data: st.DataObject) -> None:
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    files = {
        file: save({name: tensors[name] for name in held})
        for file, held in shards.items()
    }
    index = {
        "metadata": {},
        "weight_map": {name: file for file, held in shards.items() for name in held},
    }
    files |= {"model.safetensors": None, INDEX_FILE: data.draw(written(index))}
    with changed_copy(whole, files) as directory:
        check_model(directory, INDEX_FILE)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@quickly
@given(data=st.data())
def test_any_tokenizer(whole: Path, name: str, data: st.DataObject) -> None:
    content = data.draw(written(json.loads((whole / name).read_bytes())))
    with changed_copy(whole, {name: content}) as directory:
        check_tokenizer(directory, name, "tokenizer_config.json")


OLD = {
    "added_tokens.json": {"<think>": 7, "<x>": 8},
    "special_tokens_map.json": {"eos_token": "</s>"},
}


@pytest.mark.parametrize("name", OLD)
@quickly
@given(data=st.data())
def test_any_old_tokenizer(whole: Path, name: str, data: st.DataObject) -> None:
    """The files that are read where tokenizer_config.json has no added_tokens_decoder."""
    files = {file: json.dumps(content).encode() for file, content in OLD.items()}
    files |= {"tokenizer_config.json": None, name: data.draw(written(OLD[name]))}
    with changed_copy(whole, files) as directory:
        check_tokenizer(directory, name)


def check_tokenizer(directory: Path, *names: str) -> None:
    """What is loaded has its tokens, and renders a chat or refuses it."""
    tokenizer = result(lambda: load_tokenizer(directory), *names)
    if tokenizer is None:
        return
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    assert vocabulary.keys() >= set(tokenizer.special_tokens.values())
    assert all(type(id) is int and id >= 0 for id in tokenizer.eos_ids)
    assert isinstance(tokenizer.encode("", add_special_tokens=True), list)
    try:
        assert isinstance(tokenizer.apply_chat_template([], tools=[]), str)
    except ValueError as error:
        assert "chat template" in str(error)
