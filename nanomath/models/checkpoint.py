"""Models in and out of the Hugging Face layout: config.json, safetensors (one file or several), tokenizer files.

Loading streams: the model is allocated once, empty, in its final place and dtype, and each stored tensor is copied into
the rows it belongs to (q, k and v share one matrix here, gate and up another), so that no second copy of the weights
ever exists. Saving is the same loop backwards, written beside the target and renamed. Only safetensors files are
read: unpickling a .bin file would run whatever code its author put there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanomath.models.transformer import ModelConfig, Transformer

if TYPE_CHECKING:
    from nanomath.models.tokenizer import Tokenizer

TOKENIZER_FILES = ("*.json", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
STEP_DIRECTORY = re.compile(r"step-(\d+)")


def load_model(
    path_or_hub_id: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    head: Callable[[ModelConfig], nn.Module] | None = None,
) -> Transformer:
    """The model in a Hugging Face directory, under a hub id, or in a run directory (its newest checkpoint).

    head: makes the module that stands in place of the lm_head as `score`, as in classifiers and reward models.
    FileNotFoundError when a file is not there; ValueError when an architecture is not supported, a file is damaged, or
    its tensors are not those of its config.json.
    """
    directory = resolve_model_dir(path_or_hub_id)
    config = _read_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
        if head is not None:
            replace_head(model, head(config))
    model.to(dtype).to_empty(device=device)
    if config.tie_embeddings and head is None:  # to_empty gives every module a parameter of its own
        model.lm_head.weight = model.model.embed_tokens.weight
    _copy_weights(directory, _hf_tensors(model), without_head=config.tie_embeddings or head is not None)
    return model


def replace_head(model: Transformer, head: nn.Module) -> None:
    """Put `head` in place of the lm_head, as `model.score`: the model predicts no token any more."""
    del model.lm_head
    model.score = head


def save_model(
    model: Transformer, tokenizer: Tokenizer | None, directory: str | PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write the model, and its tokenizer if one is given, as a Hugging Face directory that transformers can load.

    Everything is written beside `directory` and renamed at the end; a model that was there is replaced whole.
    `dtype` defaults to the model's own, and then loading gives the same bits. FileExistsError when `directory` is
    something other than a model.
    """
    target = Path(directory).resolve()
    if target.exists() and not (target / "config.json").is_file() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not a model directory: name a new one")
    dtype = dtype or model.dtype
    names = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with replace_directory(target) as scratch:
        if tokenizer is not None:
            tokenizer.save(scratch)
            names = tokenizer.token_ids()
        config = {**model.config.to_hf(), **names, "torch_dtype": str(dtype).removeprefix("torch."), **model.hf_keys}
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_weights(_hf_tensors(model), dtype, scratch)


def check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> None:
    """ValueError when the tokenizer has ids that the model has no embedding for."""
    largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"tokenizer does not match the model's vocabulary: the largest token id is {largest}, "
            f"the model has ids 0 to {model.config.vocab_size - 1}"
        )


def resolve_model_dir(path_or_hub_id: str | PathLike[str], files: tuple[str, ...] = MODEL_FILES) -> Path:
    """The directory a model lies in: the one named, a run's newest complete checkpoint, or a copy from the hub.

    `files` are the patterns of what is fetched from the hub; without a network, what was fetched before is used.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return _newest_checkpoint(path) if not (path / "config.json").is_file() else path
    if path.exists():
        raise ValueError(f"{path} is a file: name the model's directory")
    if not HUB_ID.fullmatch(str(path_or_hub_id)):
        raise FileNotFoundError(f"no such model directory: {path}")
    try:
        # "consolidated" files are a second copy of the weights, in their authors' own layout
        copy = snapshot_download(str(path_or_hub_id), allow_patterns=list(files), ignore_patterns=["consolidated*"])
    except Exception as error:  # the hub client raises its own kinds, the HTTP library's and the system's
        reason = str(error).strip().partition("\n")[0]
        kind = type(error).__name__
        raise FileNotFoundError(f"{path} is no directory here, nor can the hub give it ({kind}: {reason})") from error
    return Path(copy)


def _newest_checkpoint(path: Path) -> Path:
    """The complete step-N of the highest N in a run directory or its checkpoints; any other directory as it is."""
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = {int(match[1]): place for place in checkpoints.iterdir() if (match := STEP_DIRECTORY.fullmatch(place.name))}
    complete = [step for step in steps if (steps[step] / "config.json").is_file()]
    if complete:
        return steps[max(complete)]
    if steps or checkpoints != path:
        raise FileNotFoundError(f"no complete checkpoint (a step-N directory with a config.json) in {checkpoints}")
    return path


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError names the file when it is not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place when the block ends, and vanishes when it fails.

    Its files are on the disk itself before it is renamed: a crash of the machine cannot leave empty ones. What
    safetensors says of a disk that is full becomes an OSError.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.new")
    former = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed and had the same number
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            _sync(path)
        if target.exists():
            shutil.rmtree(former, ignore_errors=True)
            target.rename(former)
        scratch.rename(target)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{target}: {error}") from error
        raise
    _sync(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_scratch(directory: Path) -> None:
    """Delete what `replace_directory` left beside its targets in `directory` when its process was killed."""
    for path in (*directory.glob(".*.new"), *directory.glob(".*.old")):
        shutil.rmtree(path, ignore_errors=True)


def _read_config(directory: Path) -> ModelConfig:
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no config.json in {directory}: name a Hugging Face model directory, a run directory or a hub id"
        )
    stored = read_json(file)
    try:
        return ModelConfig.from_hf(stored)
    except KeyError as error:
        raise ValueError(f"{file} lacks the key {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or else the files its index names."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / INDEX_FILE
    if not index.is_file():
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(directory.glob(pattern))]
        hint = f" ({pickled[0]} is a pickle, which is never loaded: convert it to safetensors)" if pickled else ""
        raise FileNotFoundError(f"no model.safetensors and no {INDEX_FILE} in {directory}{hint}")
    files = [directory / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, although {INDEX_FILE} names it")
    return files


@contextmanager
def _open_safetensors(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def _hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Views into the model's parameters under their Hugging Face names; writing to them writes to the model."""
    parameters = dict(model.named_parameters())
    return {hf_name: parameters[name].data[start:stop] for hf_name, name, start, stop in model.hf_slices()}


def _copy_weights(directory: Path, tensors: dict[str, Tensor], without_head: bool) -> None:
    """Fill `tensors` from the files, one tensor at a time, after checking that the files hold just these."""
    files = _weight_files(directory)
    stored_names = set()
    for file in files:
        with _open_safetensors(file) as stored:
            stored_names |= set(stored.keys())
    _check_names(stored_names, set(tensors), without_head, directory)
    for file in files:
        with _open_safetensors(file) as stored:
            for name in (name for name in stored.offset_keys() if name in tensors):
                shape, expected = tuple(stored.get_slice(name).get_shape()), tuple(tensors[name].shape)
                if shape != expected:
                    raise ValueError(f"{file}: {name} has shape {shape}, config.json means {expected}")
                tensors[name].copy_(stored.get_tensor(name))


def _check_names(stored: set[str], expected: set[str], without_head: bool, directory: Path) -> None:
    """ValueError for tensors that are missing or unknown. Old files also store the rotary frequencies; an lm_head that
    is the embedding once more, or is not wanted, may be there.
    """
    unknown = {name for name in stored - expected if not name.endswith("rotary_emb.inv_freq")}
    if without_head:
        unknown.discard("lm_head.weight")
    for fault, names in (("lack", expected - stored), ("hold unknown", unknown)):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"the safetensors files of {directory} {fault} {len(names)} tensors: {first}")


def _write_weights(tensors: dict[str, Tensor], dtype: torch.dtype, directory: Path) -> None:
    """model.safetensors, or numbered files with an index when there are more than `MAX_SHARD_BYTES`."""
    shards = _shards({name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()})
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        save_file({name: tensors[name].to("cpu", dtype) for name in names}, directory / file, {"format": "pt"})
        shutil.copymode(directory / "config.json", directory / file)  # safetensors makes it readable to its owner only
    if len(shards) > 1:
        size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, cut into lists of at most `MAX_SHARD_BYTES` (or one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
