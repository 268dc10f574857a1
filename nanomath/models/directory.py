"""Where a model lies: in a directory, in a run, or on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from nanomath.data.files import from_hub, read_json

TOKENIZER_FILES = ("*.json", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")

ADAPTER_CONFIG = "adapter_config.json"  # of what lora.py and peft write
OF_A_MODEL = ("config.json", ADAPTER_CONFIG)

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
STEP_DIRECTORY = re.compile(r"step-(\d+)")


def resolve_model_dir(
    path_or_hub_id: str | PathLike[str], files: tuple[str, ...] = MODEL_FILES
) -> Path:
    """Return the directory a model lies in: the one named, a run's newest complete
    checkpoint, or a copy from the hub.

    `files` are the patterns of what is fetched from the hub; without a network, the copy
    that was fetched before is used.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path if holds(path, OF_A_MODEL) else _newest_checkpoint(path)
    if path.exists():
        raise ValueError(f"{path} is a file: name the model's directory")
    if not HUB_ID.fullmatch(str(path_or_hub_id)):
        raise FileNotFoundError(f"no such model directory: {path}")
    return from_hub(str(path_or_hub_id), "model", files)


def _newest_checkpoint(path: Path) -> Path:
    """Return the complete step-N of the highest N in a run directory or its checkpoints,
    and any other directory as it is.
    """
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    complete = complete_steps(checkpoints, *OF_A_MODEL)
    if complete:
        return list(complete.values())[-1]
    if any(checkpoints.glob("step-*")) or checkpoints != path:
        raise FileNotFoundError(
            f"no complete checkpoint (a step-N directory with a config.json) in {checkpoints}"
        )
    return path


def base_of(
    directory: Path, base: str = "", files: tuple[str, ...] = MODEL_FILES
) -> Path:
    """Return the directory of the model that the adapter in `directory` was trained on: that of
    `base`, or else of what adapter_config.json names, beside it or wherever models are looked for.
    """
    file = directory / ADAPTER_CONFIG
    named = base or read_json(file).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{file} names no base_model_name_or_path: set model.base")
    beside = directory / named
    try:
        found = resolve_model_dir(
            beside if beside.is_dir() and not base else named, files
        )
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"{directory} is an adapter, and its base is not there: {error} (model.base names "
            "another place)"
        ) from None
    if found.resolve() == directory.resolve():
        raise ValueError(
            f"{file}: the adapter is named as its own base: set model.base"
        )
    return found


def holds(directory: Path, files: Sequence[str]) -> bool:
    """Return whether one of the files is there."""
    return any((directory / file).is_file() for file in files)


def complete_steps(checkpoints: Path, *files: str) -> dict[int, Path]:
    """Return the directories step-N that hold one of the `files`, in the order of N."""
    steps = {
        int(match[1]): path
        for path in checkpoints.glob("step-*")
        if (match := STEP_DIRECTORY.fullmatch(path.name)) and holds(path, files)
    }
    return dict(sorted(steps.items()))
