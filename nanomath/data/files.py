"""Files as every room reads and writes them, and the Hugging Face hub that they may come
from.

A text or a JSON file is read as what it says, or it is refused in one line that begins with
its name: another tool may have written it, or an editor, or a download that broke off. A
file or a directory is written beside its place and renamed, so that it is there whole or
not at all.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

DEEPEST = 100  # lists and objects in one another
HALF_PAIR = re.compile("[\ud800-\udfff]")


def read_text(file: Path) -> str:
    """Return the text of a file, unpacked where its name ends in .gz.

    ValueError when it is not UTF-8.
    """
    data = file.read_bytes()
    try:
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. ValueError names the file when it holds something
    else.
    """
    # Some editors of Windows write this mark
    text = read_text(file).removeprefix("\ufeff")
    content = parse_json(text, file)
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must hold a JSON object, not {type(content).__name__}"
        )
    return content


def read_optional(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one where there is no such file."""
    return read_json(file) if file.is_file() else {}


def parse_json(
    text: str, file: Path, line: int = 0, parse_float: Callable[[str], float] = float
) -> Any:
    """Return the value of a JSON text: of a whole file, or of one `line` of it.

    ValueError, which begins with the place, for text that is not JSON, for a field that is
    there twice, for half a surrogate pair (JSON can write it, but no text can hold it), and
    for more levels than a reader would go down.
    """
    place = f"{file}:{line}" if line else str(file)
    try:
        content = json.loads(text, parse_float=parse_float, object_pairs_hook=unique)
        if "\\ud" in text.lower() or text.count("[") + text.count("{") > DEEPEST:
            _check(content)
    except json.JSONDecodeError as error:
        where = f"{file}:{line or error.lineno}"
        what = f"not valid JSON: {error.msg} (column {error.colno})"
        raise ValueError(f"{where}: {what}") from None
    except RecursionError:
        raise ValueError(f"{place}: JSON that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return content


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dictionary. ValueError where a name is there twice, as one of
    its values would be lost.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the field {name!r:.60} is there twice")
        found[name] = value
    return found


def _check(value: Any, depth: int = 0) -> None:
    """Raise a ValueError for half a surrogate pair at any depth, and for too great a depth."""
    if depth > DEEPEST:
        raise ValueError(f"lists or objects in one another, more than {DEEPEST}")
    if isinstance(value, str) and HALF_PAIR.search(value):
        raise ValueError(f"half a surrogate pair, which is no character: {value!r:.60}")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for entry in value:
            _check(entry, depth + 1)


def as_json(value: Any) -> str:
    """Return indented JSON of nested values, data classes among them; what is no finite
    number is null.
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    file.write_text(as_json(content), encoding="utf-8")


def check_file(key: str, path: str | Path) -> None:
    """OSError for a file, named by the setting `key`, that could not be written: better before
    the work than after it.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise FileExistsError(
            f"{key}: {target} is no file, and would be replaced by one"
        )
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{key}: there is no directory to write {target} to")
    _check_writable(key, target.absolute().parent)


def check_directory(key: str, path: str | Path) -> None:
    """OSError for a directory, named by the setting `key`, that could not be made, or written
    to.
    """
    place = Path(path).absolute()
    nearest = next(one for one in (place, *place.parents) if one.exists())
    if not nearest.is_dir():
        raise FileExistsError(f"{key}: {nearest} is a file: name a directory")
    _check_writable(key, nearest)


def _check_writable(key: str, directory: str | Path) -> None:
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"{key}: {directory} cannot be written to")


def json_line(record: Mapping[str, Any]) -> str:
    """A line of a JSONL file."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; what the block writes there replaces `target` when it
    ends.

    When the block fails, what it wrote is deleted. The files are on the disk itself before
    they are renamed: a crash of the machine cannot leave empty files. A full disk is an
    OSError, also where safetensors reports it in another way.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}.new")
    former = target.with_name(f".{target.name}.{os.getpid()}.old")
    _remove(scratch)  # left by a process that was killed and had the same number
    try:
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            _sync(path)
        # A file is replaced by the renaming itself, a directory is not
        if target.is_dir():
            _remove(former)
            target.rename(former)
        scratch.rename(target)
    except BaseException as error:
        _remove(scratch)
        if isinstance(error, SafetensorError):
            raise OSError(f"{target}: {error}") from error
        raise
    _sync(target.parent)
    _remove(former)


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_scratch(directory: Path) -> None:
    """Delete what `replacing` left in `directory` when its process was killed."""
    for path in (*directory.glob(".*.new"), *directory.glob(".*.old")):
        _remove(path)


def from_hub(name: str, kind: str, files: Sequence[str]) -> Path:
    """Return a local copy of the `files` (patterns) of a hub repository of `kind`, "model"
    or "dataset".

    Without a network, or with HF_HUB_OFFLINE=1, it is the copy that was fetched before.
    FileNotFoundError when the hub does not give the files.
    """
    from huggingface_hub import (
        snapshot_download,  # slow to import, and most files are here
    )

    try:
        # "consolidated" files are a second copy of the weights, in their authors' own layout
        copy = snapshot_download(
            name,
            repo_type=kind,
            allow_patterns=list(files),
            ignore_patterns=["consolidated*"],
        )
    except (
        Exception
    ) as error:  # its own kinds of errors, the HTTP library's and the system's
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"no {name} here, nor can the hub give it ({type(error).__name__}: {reason})"
        ) from error
    return Path(copy)
