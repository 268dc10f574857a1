"""Running the cells of a study side by side, one process and one thread each, and again after
whatever stopped them.

A cell's state is in its directory: cell.json once it has ended, the lock of a file while it runs,
also when whoever started it is gone. A cell that was stopped goes on from its newest checkpoint to
the same bits (nanomath/training/loop.py); one that failed is tried again the next time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanomath.analysis.study import RUNS, Cell
from nanomath.training.checkpoint import checkpoint_steps
from nanomath.training.runlog import write_atomically

ROOT = Path(__file__).parents[2]
PAUSE = 0.1  # seconds between two looks at the processes
DEATH = 1  # Linux: PR_SET_PDEATHSIG, a signal for when the parent is gone


@dataclass
class Running:
    """A cell's process, what it writes to, and the lock that it holds."""

    cell: Cell
    process: subprocess.Popen[bytes]
    began: float
    lock: int


@dataclass
class Pool:
    """`run(cells)` runs what is not done, `workers` at a time, in `directory`.

    say(text) tells how it goes on. It ends, with all cells saved, when none is left, at the time
    `deadline` of time.monotonic (0: never), or with KeyboardInterrupt when it is asked to.
    """

    directory: Path
    workers: int
    say: Callable[[str], None]
    deadline: float = 0.0

    def run(self, cells: Mapping[str, Cell]) -> None:
        left = {name: cell for name, cell in cells.items() if not self.is_done(cell)}
        for cell in left.values():
            self._state_file(cell).unlink(missing_ok=True)  # a failure of an earlier time
        running: list[Running] = []
        self.total = len(cells)
        with interrupts() as asked:
            while (left or running) and not (self._late() or asked):
                for cell in self._ready(left)[: self.workers - len(running)]:
                    if started := self._start(cell):
                        running.append(started)
                        del left[cell.name]
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    self._end(one)
                    self._report(one.cell, cells, running)
                left = self._still_left(left)
                time.sleep(PAUSE)
            self._stop(running)
        if asked:
            raise KeyboardInterrupt

    def is_done(self, cell: Cell) -> bool:
        return self.state(cell).get("state") == "done"

    def state(self, cell: Cell) -> dict[str, Any]:
        """What became of a cell: {"state": "done", "seconds": ...}, {"state": "failed", "reason":
        ...}, or nothing yet.
        """
        path = self._state_file(cell)
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def _state_file(self, cell: Cell) -> Path:
        return self.directory / cell.name / "cell.json"

    def _was_about_to_end(self, cell: Cell) -> bool:
        """Whether all of a run is there but its exit: the last checkpoint is written last."""
        steps = checkpoint_steps(self.directory / cell.name / "checkpoints")
        return cell.config.get("run.steps") in steps

    def _late(self) -> bool:
        return bool(self.deadline) and time.monotonic() > self.deadline

    def _ready(self, left: Mapping[str, Cell]) -> list[Cell]:
        """The cells whose parents are done."""
        return [cell for cell in left.values() if all(map(self.is_done, cell.parents))]

    def _still_left(self, left: Mapping[str, Cell]) -> dict[str, Cell]:
        """Those of the cells that are not done and can be: none with a parent that failed."""
        for cell in left.values():
            for parent in cell.parents:
                if self.state(parent).get("state") == "failed":
                    self._write(cell, state="failed", reason=f"{parent.name} failed")
        return {name: cell for name, cell in left.items() if not self.state(cell)}

    def _start(self, cell: Cell) -> Running | None:
        """Start a cell; None while a process of an earlier study still has it, and where that
        left nothing to do.
        """
        place = self.directory / cell.name
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if self._was_about_to_end(cell):
            os.close(lock)
            self._write(cell, state="done", seconds=self.spent(cell, sittings=None))
            return None
        config = place / "study.toml"
        write_atomically(config, cell.text)
        with open(place / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *self._words(cell), str(config), *self._resume(cell)],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                pass_fds=[lock],
                start_new_session=True,  # the terminal's Ctrl-C is ours; we stop it, once
                preexec_fn=die_with_parent,
            )
        return Running(cell, process, time.monotonic(), lock)

    def _words(self, cell: Cell) -> list[str]:
        first, *others = RUNS[cell.stage.run].words
        words = [str(ROOT / first) if first.endswith(".py") else first, *others]
        if cell.stage.run == "eval":
            words += [cell.config["model.path"], cell.config["problems.source"]]
        return words

    def _resume(self, cell: Cell) -> list[str]:
        begun = (self.directory / cell.name / "config.toml").exists()
        return ["--resume"] if begun else []

    def _end(self, one: Running) -> None:
        """Write down what became of a cell whose process has ended."""
        os.close(one.lock)
        code = one.process.returncode
        if code == 0:
            before = self.spent(one.cell)
            self._write(
                one.cell, state="done", seconds=before + time.monotonic() - one.began
            )
        else:
            self._write(one.cell, state="failed", reason=self._last_words(one.cell, code))

    def _write(self, cell: Cell, **state: Any) -> None:
        (self.directory / cell.name).mkdir(parents=True, exist_ok=True)
        write_atomically(self._state_file(cell), json.dumps(state) + "\n")

    def _last_words(self, cell: Cell, code: int) -> str:
        log = (self.directory / cell.name / "log.txt").read_text("utf-8", "replace")
        lines = [line for line in log.splitlines() if line.strip()]
        return lines[-1].removeprefix("error: ")[:300] if lines else f"exit code {code}"

    def spent(self, cell: Cell, sittings: int | None = -1) -> float:
        """Seconds of the sittings of a cell, by default of all but the last."""
        path = self.directory / cell.name / "run.json"
        try:
            those = json.loads(path.read_text("utf-8"))[:sittings]
        except (OSError, ValueError):
            return 0.0
        return 60 * sum(sitting.get("minutes", 0.0) for sitting in those)

    def _report(
        self, cell: Cell, cells: Mapping[str, Cell], running: list[Running]
    ) -> None:
        state = self.state(cell)
        ended = sum(bool(self.state(c)) for c in cells.values())
        how = (
            f"{state['seconds']:.0f} s"
            if "seconds" in state
            else f"failed: {state['reason']}"
        )
        left = self.minutes_left(cells, running)
        text = f"[{ended}/{self.total}] {cell.name}: {how}; {len(running)} running"
        self.say(text + (f", about {left:.0f} minutes left" if left else ""))

    def minutes_left(
        self, cells: Mapping[str, Cell], running: list[Running] = ()
    ) -> float:
        """By what the cells of each stage have taken, or else by what their author saw."""
        took: dict[str, list[float]] = {}
        for cell in cells.values():
            if "seconds" in (state := self.state(cell)):
                took.setdefault(cell.stage.name, []).append(state["seconds"])
        usual = {name: sum(seconds) / len(seconds) for name, seconds in took.items()}
        left = [
            usual.get(cell.stage.name, 60 * cell.stage.minutes)
            for cell in cells.values()
            if not self.state(cell)
        ]
        gone = sum(time.monotonic() - one.began for one in running)
        return max(0.0, sum(left) - gone) / self.workers / 60

    def _stop(self, running: list[Running]) -> None:
        """Ask what still runs to save and stop, and wait for it."""
        for one in running:
            with contextlib.suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGTERM)
        for one in running:
            one.process.wait()
            if one.process.returncode == 0:  # it was about to end
                self._end(one)
            else:
                os.close(one.lock)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that have come: noted, so that none can come between starting a cell
    and remembering it.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(number, lambda number, _: came.append(number)) for number in numbers
    ]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def die_with_parent() -> None:
    """In a new process: ask Linux for a SIGTERM when the parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH, signal.SIGTERM)
