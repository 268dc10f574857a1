"""The grading process: time, memory, threads, forks, and its end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanomath.rewards import symbolic
from nanomath.rewards.equality import answers_equal
from nanomath.rewards.worker import Worker

ROOT = Path(__file__).parents[2]
QUESTION = {
    "gold": "x+x",
    "prediction": "2x",
    "relation": "",
    "tolerance": 0.0,
    "math_verify": False,
}
HANGS = QUESTION | {"gold": "1", "prediction": r"\cos(9^{9^{9.1}})"}


@pytest.fixture
def worker():
    worker = Worker(seconds=2.0)
    yield worker
    worker.close()


def test_it_starts_with_the_first_question_and_stays(worker: Worker):
    assert worker.starts == 0
    assert worker.ask(QUESTION) and not worker.ask(QUESTION | {"prediction": "3x"})
    assert worker.starts == 1


def test_a_hanging_question_is_answered_false_and_the_next_one_works(worker: Worker):
    usual, worker.seconds = worker.seconds, 0.3
    assert worker.ask(HANGS) is False
    assert worker.process is None
    worker.seconds = usual
    assert worker.ask(QUESTION) is True
    assert worker.starts == 2


def test_a_crash_is_answered_false_and_the_next_question_works(worker: Worker):
    assert worker.ask(QUESTION)
    worker.process.kill()
    worker.process.wait()
    assert worker.ask(QUESTION) is False
    assert worker.ask(QUESTION) is True


def test_close_leaves_no_zombie(worker: Worker):
    worker.ask(QUESTION)
    process = worker.process
    worker.close()
    worker.close()
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_program_that_does_not_start_is_an_error(tmp_path: Path):
    program = tmp_path / "silent.py"
    program.write_text("raise SystemExit('no sympy')")
    with pytest.raises(RuntimeError, match="did not start"):
        Worker(program).ask(QUESTION)


BOMBS = [
    "9^9^9^9",
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "1000000!",
    "((9!)!)!",
    r"\binom{10^9}{10^8}",
    "(x+1)^{999999999}",
]


def test_bombs_are_refused_before_they_are_computed(worker: Worker):
    for bomb in BOMBS:
        assert not worker.ask(QUESTION | {"gold": bomb, "prediction": "5"})
        assert not worker.ask(QUESTION | {"gold": "5", "prediction": bomb})
    assert worker.starts == 1


@pytest.mark.skipif(
    not Path("/proc/self/limits").exists(), reason="reads the limit from /proc"
)
def test_memory_is_limited(worker: Worker):
    worker.ask(QUESTION)
    limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
    (line,) = (
        line for line in limits.splitlines() if line.startswith("Max address space")
    )
    assert line.split()[3] == str(symbolic.MEMORY_LIMIT)


def test_eight_threads_at_once():
    pairs = [(f"x+{i}", f"{i}+x" if i % 2 else f"{i + 1}+x") for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda pair: answers_equal(*pair), pairs))
    assert verdicts == [i % 2 == 1 for i in range(64)]


SCRIPT = """
import os, sys
print("main is run")
import torch
from nanomath.rewards.equality import answers_equal
from nanomath.rewards.worker import WORKER
torch.ones(64, 64) @ torch.ones(64, 64)
assert answers_equal("x+x", "2x")
child = os.fork()
if not child:
    ok = answers_equal("y+y", "2y") and WORKER.starts == 1
    WORKER.close()
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert answers_equal("z+z", "2z") and WORKER.starts == 1
print(WORKER.process.pid)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_inside_a_process_with_torch_and_after_a_fork(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    (greeting, pid) = run.stdout.split("\n")[:2]
    assert greeting == "main is run" and run.stdout.count("main is run") == 1
    with pytest.raises(ProcessLookupError):  # the worker has gone with its parent
        os.kill(int(pid), 0)
