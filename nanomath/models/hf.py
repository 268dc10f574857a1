"""Models in and out of the Hugging Face layout: config.json, safetensors (one file or
several), tokenizer files.

Loading streams: the headers of the files are held against config.json, then the model is
allocated once, empty, in its final place and dtype, and each stored tensor is copied into the
rows it belongs to (q, k and v share one matrix here, gate and up another), so that no second
copy of the weights ever exists. Saving is the same loop backwards, written beside the target
and renamed. Only safetensors files are read: unpickling a .bin file would run whatever code
its author put there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanomath.data.files import read_json, replacing, write_json
from nanomath.models.directory import ADAPTER_CONFIG, base_of, resolve_model_dir
from nanomath.models.hf_names import hf_slices
from nanomath.models.lora import load_lora
from nanomath.models.stored import naming, one_line
from nanomath.models.transformer import ModelConfig, Transformer

if TYPE_CHECKING:
    from nanomath.models.tokenizer import Tokenizer

INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
# A file beside the index.
SHARD_NAME = re.compile(r"[\w .()-]{1,240}\.safetensors", re.ASCII)
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
DTYPES = ("float32", "bfloat16", "float16", "float64")
PICKLES = (".bin", ".pt", ".pth")
STORED_DTYPES = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True)
class _Header:
    """What a safetensors file says of a tensor before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_model(
    path_or_hub_id: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    head: Callable[[ModelConfig], nn.Module] | None = None,
    base: str = "",
) -> Transformer:
    """Load the model in a Hugging Face directory, under a hub id, or in a run directory
    (its newest checkpoint).

    dtype may be a name, "bfloat16". head: makes the module that stands in place of the
    lm_head as `score`, as in classifiers and reward models. Of an adapter (lora.py) it is the
    model it was trained on, which `base` may name, with the adapter merged into it. As in
    transformers, a stored lm_head that differs from the embedding is kept, even if
    config.json says that they are tied. FileNotFoundError when a file is not there; ValueError
    when an architecture is not supported, a file is damaged, or its tensors are not those of
    its config.json.
    """
    dtype = _dtype(dtype)
    directory = resolve_model_dir(path_or_hub_id)
    if (directory / ADAPTER_CONFIG).is_file():
        model = load_model(base_of(directory, base), device, dtype, head)
        load_lora(model, directory).merge(model, model)
        return model
    config = read_config(directory)
    headers = _read_headers(directory)
    perhaps_tied = (
        config.tie_embeddings
        and head is None
        and {EMBEDDING, LM_HEAD} <= headers.keys()
    )
    with torch.device("meta"):
        model = Transformer(
            replace(config, tie_embeddings=False) if perhaps_tied else config
        )
        if head is not None:
            replace_head(model, head(config))
    _check_headers(
        headers, _places(model, headers), directory, without_head=head is not None
    )
    model.to(dtype).to_empty(device=device)
    if config.tie_embeddings and head is None and not perhaps_tied:
        _tie(model, config)  # to_empty gives every module a parameter of its own
    _copy_weights(headers, _places(model, headers))
    if perhaps_tied and torch.equal(
        model.lm_head.weight, model.model.embed_tokens.weight
    ):
        _tie(model, config)
    return model


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype, or the one of that name. ValueError for one that no model computes
    in.
    """
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, torch.dtype | str) or name not in DTYPES:
        raise ValueError(f"dtype = {dtype!r:.60}: models are {', '.join(DTYPES)}")
    return getattr(torch, name)


def _tie(model: Transformer, config: ModelConfig) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config = config


def replace_head(model: Transformer, head: nn.Module) -> None:
    """Put `head` in place of the lm_head, as `model.score`: the model no longer predicts
    tokens.
    """
    del model.lm_head
    model.score = head


def save_model(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: str | PathLike[str],
    dtype: torch.dtype | str | None = None,
) -> None:
    """Write the model, and its tokenizer if one is given, as a Hugging Face directory that
    transformers can load.

    Everything is written beside `directory` and renamed at the end; a model that was there is
    replaced whole. `dtype` defaults to the model's own, and then loading gives the same bits.
    FileExistsError when `directory` is something other than a model.
    """
    target = Path(directory).resolve()
    if (
        target.exists()
        and not (target / "config.json").is_file()
        and any(target.iterdir())
    ):
        raise FileExistsError(
            f"{target} exists and is not a model directory: name a new one"
        )
    dtype = _dtype(dtype or model.dtype)
    names = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with replacing(target) as scratch:
        scratch.mkdir(parents=True)
        if tokenizer is not None:
            tokenizer.save(scratch)
            names = tokenizer.token_ids()
        config = {
            **model.config.to_hf(),
            **names,
            "torch_dtype": str(dtype).removeprefix("torch."),
            **model.hf_keys,
        }
        write_json(scratch / "config.json", config)
        _write_weights(_hf_tensors(model), dtype, scratch)


def check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> None:
    """Raise a ValueError when the tokenizer has ids that the model has no embedding for."""
    largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"tokenizer does not match the model's vocabulary: the largest token id is {largest}, "
            f"the model has ids 0 to {model.config.vocab_size - 1}"
        )


def read_config(directory: Path) -> ModelConfig:
    """Read the shape of the model in a directory."""
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no config.json in {directory}: "
            "name a Hugging Face model directory, a run directory or a hub id"
        )
    stored = read_json(file)
    try:
        with naming(file):
            return ModelConfig.from_hf(stored)
    except KeyError as error:
        raise ValueError(f"{file} lacks the key {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    """Return model.safetensors, or else the files that its index names."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / INDEX_FILE
    if not index.is_file():
        hint = ""
        if pickled := [
            file.name for file in directory.iterdir() if file.suffix in PICKLES
        ]:
            hint = f" ({pickled[0]} is a pickle, which is never loaded: convert it to safetensors)"
        raise FileNotFoundError(
            f"no model.safetensors and no {INDEX_FILE} in {directory}{hint}"
        )
    weight_map = read_json(index).get("weight_map", {})
    files = []
    for name in weight_map.values() if isinstance(weight_map, dict) else [weight_map]:
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"{index}: weight_map has {name!r:.60}, which is no safetensors file beside it"
            )
        files.append(directory / name)
        if not files[-1].is_file():
            raise FileNotFoundError(
                f"{files[-1]} is missing, although {INDEX_FILE} names it"
            )
    return sorted(set(files))


@contextmanager
def _open_safetensors(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file: {one_line(error)}"
        ) from error


def _read_headers(directory: Path) -> dict[str, _Header]:
    """Return the headers of all tensors in `directory`. ValueError when two have the same
    name.
    """
    headers: dict[str, _Header] = {}
    for file in _weight_files(directory):
        with _open_safetensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no dictionary)
                if name in headers:
                    raise ValueError(
                        f"{file} holds {name:.100}, which is in {headers[name].file.name} as well"
                    )
                tensor = stored.get_slice(name)
                headers[name] = _Header(
                    file, tuple(tensor.get_shape()), tensor.get_dtype()
                )
    return headers


def _hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return views of the model's parameters under their Hugging Face names; writing to
    them writes to the model.
    """
    parameters = dict(model.named_parameters())
    return {
        hf_name: parameters[name].data[start:stop]
        for hf_name, name, start, stop in hf_slices(model)
    }


def _places(model: Transformer, headers: dict[str, _Header]) -> dict[str, Tensor]:
    """Return `_hf_tensors` under the names that the files use.

    Of a tied embedding and lm_head, a file may store only the lm_head.
    """
    tensors = _hf_tensors(model)
    if model.config.tie_embeddings and EMBEDDING not in headers and LM_HEAD in headers:
        tensors[LM_HEAD] = tensors.pop(EMBEDDING)
    return tensors


def _check_headers(
    headers: dict[str, _Header],
    tensors: dict[str, Tensor],
    directory: Path,
    without_head: bool,
) -> None:
    """Raise a ValueError for tensors that are missing or unknown, of another shape, or no
    floating-point numbers.

    Old files also store the rotary frequencies; an lm_head that is not wanted may be there.
    """
    unknown = {
        name
        for name in headers.keys() - tensors.keys()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if without_head:
        unknown.discard(LM_HEAD)
    for fault, names in (
        ("lack", tensors.keys() - headers.keys()),
        ("hold unknown", unknown),
    ):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            hint = (
                ": config.json says tie_word_embeddings = false"
                if names == {LM_HEAD}
                else ""
            )
            raise ValueError(
                f"the safetensors files of {directory} {fault} {len(names)} tensors: "
                f"{one_line(first)}{hint}"
            )
    for name, tensor in tensors.items():
        header = headers[name]
        expected = tuple(tensor.shape)
        if header.shape != expected:
            raise ValueError(
                f"{header.file}: {name} has shape {header.shape}, config.json means {expected}"
            )
        if header.dtype not in STORED_DTYPES:
            raise ValueError(
                f"{header.file}: {name} is stored as {header.dtype}, "
                f"not as {', '.join(STORED_DTYPES)}"
            )


def _copy_weights(headers: dict[str, _Header], tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` from the files, one tensor at a time."""
    for file in dict.fromkeys(headers[name].file for name in tensors):
        with _open_safetensors(file) as stored:
            for name in stored.offset_keys():
                if name in tensors:
                    tensors[name].copy_(stored.get_tensor(name))


def _write_weights(
    tensors: dict[str, Tensor], dtype: torch.dtype, directory: Path
) -> None:
    """Write model.safetensors, or numbered files with an index when there are more than
    `MAX_SHARD_BYTES`.
    """
    split = split_torch_state_dict_into_shards(
        {name: tensor.to("meta", dtype) for name, tensor in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].to("cpu", dtype) for name in names}
        save_file(shard, directory / file, {"format": "pt"})
        # safetensors makes it readable to its owner only
        shutil.copymode(directory / "config.json", directory / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / INDEX_FILE, index)
