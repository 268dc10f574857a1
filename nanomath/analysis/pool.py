"""Running the cells of a study side by side, one process and one thread each, and again after
whatever stopped them.

A cell's state is in its directory: cell.json once it has ended, the lock of a file while it runs,
also when whoever started it is gone. So several runners may share the cells: each starts what no
other has. A cell that was stopped goes on from its newest checkpoint to the same bits
(nanomath/training/loop.py); one that failed is tried again the next time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanomath.analysis.cells import Cell
from nanomath.analysis.late import settle
from nanomath.analysis.runs import Run, flat, read_run
from nanomath.analysis.study import NANOMATH, RUNS
from nanomath.training.checkpoint import checkpoint_steps
from nanomath.training.loop import share_used
from nanomath.training.runlog import write_atomically

ROOT = Path(__file__).parents[2]
PAUSE = 0.2  # seconds between two looks at the processes
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

    say(text) tells how it goes on, check(cell) looks at a cell that is done. It ends, with all
    cells saved, when none is left, at the time `deadline` of time.monotonic, with
    KeyboardInterrupt when it is asked to, or with what `check` or the disk raises.
    """

    directory: Path
    workers: int
    say: Callable[[str], None]
    deadline: float = math.inf
    check: Callable[[Cell], None] = lambda cell: None
    # Cells that are done
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, cells: Mapping[str, Cell]) -> None:
        for cell in cells.values():
            if self.state(cell).get("state") == "failed":  # at an earlier time
                self._state_file(cell).unlink(missing_ok=True)
        running: list[Running] = []
        with interrupts() as asked:
            try:
                while not asked and time.monotonic() < self.deadline:
                    left = self._left(cells, running)
                    if not left and not running:
                        break
                    for cell in self._ready(left):
                        if len(running) < self.workers:
                            running += self._start(cell)
                    for one in [
                        one for one in running if one.process.poll() is not None
                    ]:
                        running.remove(one)
                        self._end(one)
                        self._report(one.cell, cells, running)
                        if self.is_done(one.cell):
                            self.check(one.cell)
                    time.sleep(PAUSE)
            finally:
                self._stop(running)
        if asked:
            raise KeyboardInterrupt

    def is_done(self, cell: Cell) -> bool:
        return self.state(cell).get("state") == "done"

    def state(self, cell: Cell) -> dict[str, Any]:
        """What became of a cell: {"state": "done", "seconds": ...}, {"state": "failed", "reason":
        ...}, or nothing yet.
        """
        if cell.name not in self.known:
            path = self._state_file(cell)
            state = json.loads(path.read_text("utf-8")) if path.exists() else {}
            if state.get("state") != "done":
                return state
            self.known[cell.name] = state
        return self.known[cell.name]

    def _state_file(self, cell: Cell) -> Path:
        return self.directory / cell.name / "cell.json"

    def _was_about_to_end(self, cell: Cell) -> bool:
        """Whether all of a run is there but its exit: the last checkpoint is written last."""
        place = self.directory / cell.name
        last = max(checkpoint_steps(place / "checkpoints"), default=0)
        if not last:
            return False
        run = read_run(place)
        limits = {
            name: run.config.get(f"run.{name}", 0) for name in ("tokens", "seconds")
        }
        limits["collapse"] = run.config.get("run.on_collapse") == "end"
        lines = [line for line in run.lines if line["step"] <= last]
        return last == run.config["run.steps"] or share_used(lines, limits) >= 1

    def _ready(self, left: list[Cell]) -> list[Cell]:
        """The cells whose others are done."""
        return [cell for cell in left if all(map(self.is_done, cell.waits_for))]

    def _left(self, cells: Mapping[str, Cell], running: list[Running]) -> list[Cell]:
        """The cells that are to be started: none that waits for one that failed."""
        started = [one.cell.name for one in running]
        left = []
        for cell in cells.values():
            if cell.name in started or self.state(cell):
                continue
            failed = [
                c for c in cell.waits_for if self.state(c).get("state") == "failed"
            ]
            if failed:
                self._write(cell, state="failed", reason=f"{failed[0].name} failed")
            else:
                left.append(cell)
        return left

    def _start(self, cell: Cell) -> list[Running]:
        """Start a cell; nothing while a process of another runner has it, and where that left
        nothing to do.
        """
        place = self.directory / cell.name
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another runner may have ended it meanwhile.
            process = None if self.state(cell) else self._launch(cell, place, lock)
            if process:
                return [Running(cell, process, time.monotonic(), lock)]
        except BlockingIOError:
            pass
        os.close(lock)
        return []

    def _launch(
        self, cell: Cell, place: Path, lock: int
    ) -> subprocess.Popen[bytes] | None:
        """The process of a cell that is ours; None, and its state, where there is nothing to do."""
        if self._was_about_to_end(cell):
            self._write(cell, state="done", seconds=self.spent(cell, sittings=None))
            return None
        try:
            text, words = settle(cell, self.directory)
        except ValueError as error:
            self._write(cell, state="failed", reason=str(error))
            return None
        write_atomically(place / "study.toml", text)
        with open(place / "log.txt", "ab") as log:
            return subprocess.Popen(
                [sys.executable, *self._words(cell, text), *words, *self._resume(cell)],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                pass_fds=[lock],
                start_new_session=True,  # the terminal's Ctrl-C is ours; we stop it, once
                preexec_fn=die_with_parent,
            )

    def _words(self, cell: Cell, text: str) -> list[str]:
        """The command of a cell, whose config is `text`."""
        run = cell.stage.run
        if run not in RUNS:
            return [*NANOMATH, *run.split(), *tomllib.loads(text)["words"]]
        first, *others = RUNS[run].words
        words = [str(ROOT / first) if first.endswith(".py") else first, *others]
        if run == "eval":
            config = flat(tomllib.loads(text))
            words += [config["model.path"], config["problems.source"]]
        return [*words, str(self.directory / cell.name / "study.toml")]

    def _resume(self, cell: Cell) -> list[str]:
        begun = (self.directory / cell.name / "config.toml").exists()
        return ["--resume"] if begun else []

    def _end(self, one: Running) -> None:
        """Write down what became of a cell whose process has ended."""
        code = one.process.returncode
        if code == 0:
            seconds = self.spent(one.cell) + time.monotonic() - one.began
            self._write(one.cell, state="done", seconds=seconds)
        else:
            self._write(
                one.cell, state="failed", reason=self._last_words(one.cell, code)
            )
        os.close(one.lock)  # not before: another runner would start it again

    def _write(self, cell: Cell, **state: Any) -> None:
        (self.directory / cell.name).mkdir(parents=True, exist_ok=True)
        write_atomically(self._state_file(cell), json.dumps(state) + "\n")

    def _last_words(self, cell: Cell, code: int) -> str:
        log = (self.directory / cell.name / "log.txt").read_text("utf-8", "replace")
        lines = [line for line in log.splitlines() if line.strip()]
        return lines[-1].removeprefix("error: ")[:300] if lines else f"exit code {code}"

    def spent(self, cell: Cell, sittings: int | None = -1) -> float:
        """Seconds of the sittings of a cell, by default of all but the last."""
        those = Run(self.directory / cell.name, "", {}).sittings[:sittings]
        return 60 * sum(sitting.get("minutes", 0.0) for sitting in those)

    def _report(
        self, cell: Cell, cells: Mapping[str, Cell], running: list[Running]
    ) -> None:
        state = self.state(cell)
        ended = sum(bool(self.state(c)) for c in cells.values())
        how = (
            f"{state['seconds']:.0f} s"
            if "seconds" in state
            else f"failed: {state.get('reason')}"
        )
        left = self.minutes_left(cells, running)
        text = f"[{ended}/{len(cells)}] {cell.name}: {how}; {len(running)} running"
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
        for one in running:
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
        signal.signal(number, lambda number, _: came.append(number))
        for number in numbers
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
