"""A run's directory: runs/NAME/ with config.toml, run.json, metrics.jsonl, groups.jsonl,
rollouts.jsonl, heldout.jsonl, alarms.jsonl and checkpoints/step-N/.

Every line is flushed as it is written, so nothing computed is lost when a run dies. On
resuming, the lines of steps after the checkpoint are dropped (they will be computed again), as
is a last line that was cut short.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanomath.data.files import json_line, remove_scratch, replacing


class RunFailed(RuntimeError):
    """A run could not go on; the message says where, why, and what is intact.

    The commands exit with 1.
    """


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Return the records of a JSONL file, without a last line that was cut short.

    ValueError for a broken line elsewhere.
    """
    # Bytes, because the last line may end in the middle of a character.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            # No newline after it: the writer was stopped in the middle.
            if number == len(lines):
                return
            raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}:{number}: expected a JSON object, got {record!r:.60}"
            )
        yield record


class RunLog:
    """The directory of one run, open for writing.

    An OSError names the file that could not be written. Of several processes that compute
    the same run only one `writes`; for the others all methods but `read` do nothing.
    """

    def __init__(
        self, directory: str | Path, resume: bool, writes: bool = True
    ) -> None:
        """Check the directory; nothing is written yet.

        FileExistsError if it holds another run and `resume` is not asked for.
        """
        self.directory = Path(directory)
        self.writes = writes
        self.trackers: list[Callable[[int, dict[str, float]], None]] = []
        held = (self.directory / "config.toml").exists()
        if held and not resume:
            raise FileExistsError(
                f"{directory} already holds a run: add --resume to go on with it, or choose "
                "another run.name"
            )
        if resume and not held:
            raise FileNotFoundError(
                f"{directory} holds no run to resume: leave out --resume to start it"
            )

    def begin(self, config: str, step: int) -> None:
        """Write the resolved config, and drop what was logged after `step`, where training
        goes on.

        At step 0 everything is dropped: the model before the first update is measured
        again.
        """
        if not self.writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_scratch(self.directory)
        write_atomically(self.directory / "config.toml", config)
        for path in self.directory.glob("*.jsonl"):
            kept = [
                record
                for record in read_jsonl(path)
                if record.get("step", -1)
                <= (step or -1)  # other commands write no step
            ]
            write_atomically(path, "".join(map(json_line, kept)))

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def read(self, name: str) -> list[dict[str, Any]]:
        """Return the lines that are logged under a file's name so far, none if that file is
        not there.
        """
        path = self.directory / name
        return list(read_jsonl(path)) if path.exists() else []

    def write(self, name: str, text: str) -> None:
        """Replace the file `name` of the run."""
        if self.writes:
            write_atomically(self.directory / name, text)

    def metrics(self, step: int, **values: Any) -> None:
        """Add one line about `step` to metrics.jsonl, and tell the trackers."""
        self.add("metrics", step, [values])
        for track in self.trackers:
            track(step, values)

    def add(self, name: str, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Add records about `step` to NAME.jsonl, a line each."""
        if not self.writes:
            return
        path = self.directory / f"{name}.jsonl"
        with _named(path), open(path, "a", encoding="utf-8") as file:
            for record in records:
                file.write(json_line({"step": step, **record}))

    def sync(self) -> None:
        """Make sure that the log is on the disk: a checkpoint must not survive a crash of
        the machine without its lines.
        """
        for path in self.directory.glob("*.jsonl") if self.writes else ():
            with _named(path), open(path, "rb") as file:
                os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content at once: a reader, or a crash, sees the old text or the new
    one.
    """
    with _named(path), replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in the OSError of a write, which does not name it itself."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from error
