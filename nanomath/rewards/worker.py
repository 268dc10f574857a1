"""The process that answers symbolic questions, and that can be killed.

One persistent process for the whole run, started at the first question. It is a fresh
interpreter, neither forked (torch's threads do not survive a fork) nor spawned by
multiprocessing (which imports the user's main module again), so it can be used from any thread
and inside a training process. A question that exceeds the limit costs the process its life,
and the next question starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path

PROGRAM = Path(__file__).with_name("symbolic.py")


class Worker:
    """Asks `program` one question at a time; `seconds` bounds each of them, not the start of
    the process.
    """

    START_SECONDS = 60.0  # importing sympy, on a machine that may be busy

    def __init__(self, program: Path = PROGRAM, seconds: float = 3.0):
        self.program = program
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None
        self.starts = 0  # processes started so far
        self._lock = threading.Lock()

    def ask(self, question: dict) -> bool:
        """Return the program's verdict on one JSON object; False if it found none in time."""
        with self._lock:
            if self.process is None:
                self._start()
            return self._exchange(json.dumps(question), self.seconds) == "1"

    def close(self) -> None:
        """End the process and collect it, so that no zombie stays behind."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self.starts += 1
        self.process = subprocess.Popen(
            # -P: the folder of the program is no place to import from
            [sys.executable, "-P", str(self.program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the run, which then closes the worker
        )
        if self._exchange("", self.START_SECONDS) != "ready":
            raise RuntimeError(
                f"the grading process {self.program.name} did not start: is sympy installed?"
            )

    def _exchange(self, line: str, seconds: float) -> str:
        """Send `line` (nothing if empty) and read one line; "" if the process died or had to
        be killed.
        """
        process = self.process
        waiting = select.poll()  # select() takes no more than 1024 open files
        waiting.register(process.stdout, select.POLLIN)
        reply = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                if line:
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                if waiting.poll(seconds * 1000):
                    reply = process.stdout.readline().strip()
        finally:
            # An interrupt also ends here: a late reply must not answer the next question.
            if not reply:
                self._stop()
        return reply

    def _stop(self) -> None:
        process = self.process
        self.process = None
        if process:
            # On leaving its pipes are closed and it is collected; a pipe may still hold what
            # was not written when the process died.
            with contextlib.suppress(BrokenPipeError), process:
                process.kill()


WORKER = Worker()
atexit.register(WORKER.close)
# A forked child shares the pipes and perhaps a held lock: it needs its own worker.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WORKER.__init__)
