"""Where a model lies: in a directory, in a run, or on the Hugging Face hub."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from nanomath.data.files import from_hub

TOKENIZER_FILES = ("*.json", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")

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
        return _newest_checkpoint(path) if not (path / "config.json").is_file() else path
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
    complete = complete_steps(checkpoints, "config.json")
    if complete:
        return list(complete.values())[-1]
    if any(checkpoints.glob("step-*")) or checkpoints != path:
        raise FileNotFoundError(
            f"no complete checkpoint (a step-N directory with a config.json) in {checkpoints}"
        )
    return path


def complete_steps(checkpoints: Path, file: str) -> dict[int, Path]:
    """Return the directories step-N that hold `file`, in the order of N."""
    steps = {
        int(match[1]): path
        for path in checkpoints.glob("step-*")
        if (match := STEP_DIRECTORY.fullmatch(path.name)) and (path / file).is_file()
    }
    return dict(sorted(steps.items()))
