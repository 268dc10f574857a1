"""Where a model lies, and how a directory is written so that it is there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

TOKENIZER_FILES = ("*.json", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
STEP_DIRECTORY = re.compile(r"step-(\d+)")


def resolve_model_dir(
    path_or_hub_id: str | PathLike[str], files: tuple[str, ...] = MODEL_FILES
) -> Path:
    """The directory a model lies in: the one named, a run's newest complete checkpoint, or a
    copy from the hub.

    `files` are the patterns of what is fetched from the hub; without a network, what was
    fetched before is used.
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
        copy = snapshot_download(
            str(path_or_hub_id), allow_patterns=list(files), ignore_patterns=["consolidated*"]
        )
    except (
        Exception
    ) as error:  # the hub client raises its own kinds, the HTTP library's and the system's
        reason = str(error).strip().partition("\n")[0]
        kind = type(error).__name__
        raise FileNotFoundError(
            f"{path} is no directory here, nor can the hub give it ({kind}: {reason})"
        ) from error
    return Path(copy)


def _newest_checkpoint(path: Path) -> Path:
    """The complete step-N of the highest N in a run directory or its checkpoints; any other
    directory as it is.
    """
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = {
        int(match[1]): place
        for place in checkpoints.iterdir()
        if (match := STEP_DIRECTORY.fullmatch(place.name))
    }
    complete = [step for step in steps if (steps[step] / "config.json").is_file()]
    if complete:
        return steps[max(complete)]
    if steps or checkpoints != path:
        raise FileNotFoundError(
            f"no complete checkpoint (a step-N directory with a config.json) in {checkpoints}"
        )
    return path


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """A scratch directory beside `target` that takes its place when the block ends, and
    vanishes when it fails.

    Its files are on the disk itself before it is renamed: a crash of the machine cannot leave
    empty ones. What safetensors says of a disk that is full becomes an OSError.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.new")
    former = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(
        scratch, ignore_errors=True
    )  # left by a process that was killed and had the same number
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
    """Delete what `replace_directory` left beside its targets in `directory` when its process
    was killed.
    """
    for path in (*directory.glob(".*.new"), *directory.glob(".*.old")):
        shutil.rmtree(path, ignore_errors=True)
