"""Runs that are killed, starved and interrupted: what is on disk afterwards, and that --resume
makes it whole.

Every run is a process of its own, forked from one that has imported everything already (this
file as a script), so that a life costs a moment. "The same" always means: every byte of every
file but the times in metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nanomath import load_model, load_tokenizer
from nanomath.training.runlog import read_jsonl

ROOT = Path(__file__).parents[2]
PROBLEMS = [
    {"problem": f"What is {n}?", "answer": n, "solution": rf"\boxed{{{n}}}"}
    for n in range(4)
]
DATA = (
    *(
        "train.source={place}/problems.jsonl",
        "heldout.source={place}/problems.jsonl",
        "model.device=cpu",
    ),
    *("sampling.max_new_tokens=12", "evaluation.samples=6", "optim.schedule=constant"),
)
SFT = (
    *(
        "model.new.hidden_size=32",
        "model.new.layers=1",
        "model.new.heads=2",
        "model.new.kv_heads=1",
        "model.new.intermediate_size=64",
    ),
    *("sft.batch_size=8", "optim.lr=0.01", "sft.neftune_alpha=5", *DATA),
)
GRPO = (
    "model.path={place}/base",
    "grpo.prompts=3",
    "grpo.group_size=4",
    "optim.lr=0.003",
    *DATA,
)
TIMES = {"seconds", "tokens_per_second", "sampling_seconds"}
WRITES = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
}  # audit events


class Life(NamedTuple):
    """How a process ended (a signal's number is negative), what it said, and how long it
    lived.
    """

    code: int
    out: str
    seconds: float

    @property
    def last_words(self) -> str:
        return self.out.strip().splitlines()[-1]


class Nursery:
    """The process that forks, and how to talk to it."""

    def __init__(self, directory: Path) -> None:
        environment = {
            **os.environ,
            **{
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
            },
            **{"TOKENIZERS_PARALLELISM": "false"},
        }
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.place = directory
        lines = "".join(json.dumps(problem) + "\n" for problem in PROBLEMS)
        (directory / "problems.jsonl").write_text(lines, encoding="utf-8")

    def live(self, script: str, *words: str, **fate: Any) -> Life:
        """Call a training script; `fate` as in `meet`."""
        common = [
            word.format(place=self.place)
            for word in (SFT if script == "train_sft" else GRPO)
        ]
        order = {
            "script": script,
            "words": [*common, *words],
            "said": str(self.place / "said"),
            **fate,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        return Life(reply["code"], (self.place / "said").read_text(), reply["seconds"])

    def well(self, script: str, *words: str) -> Life:
        """A life that must go well."""
        life = self.live(script, *words)
        assert life.code == 0, life.out
        return life


@pytest.fixture(scope="module")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    """With a model to start reinforcement from, which solves some of the problems."""
    nursery = Nursery(tmp_path_factory.mktemp("crash"))
    nursery.well(
        "train_sft", f"run.directory={nursery.place}", "run.name=base", "run.steps=30"
    )
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(timeout=60)


def contents(run: Path) -> dict[str, Any]:
    """Every file of a run: bytes, records without their times, or where a link leads."""
    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.suffix == ".jsonl":
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            found[name] = [
                {key: value for key, value in line.items() if key not in TIMES}
                for line in lines
            ]
        elif path.name == "config.toml":
            found[name] = path.read_text(encoding="utf-8").replace(
                str(run.parent), "DIRECTORY"
            )
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def assert_same(run: Path, other: Path) -> None:
    """All files but run.json, which tells when and how often a run was started."""
    one, two = contents(run), contents(other)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] in ([], ["run.json"])


def flags(run: Path) -> list[str]:
    return ["--resume"] if (run / "config.toml").exists() else []


# --- killed ----------------------------------------------------------------------------------

LONG = (
    "run.seed=2",
    "run.steps=24",
    "run.save_every=1",
    "run.eval_every=5",
    "run.keep_best=true",
    "run.keep_last=2",
)


@pytest.fixture(scope="module")
def unbroken(nursery, tmp_path_factory) -> tuple[Path, float]:
    """A run of GRPO that nothing disturbs, and how long it took."""
    directory = tmp_path_factory.mktemp("unbroken")
    life = nursery.well("train_grpo", f"run.directory={directory}", *LONG)
    return directory / "run", life.seconds


def test_the_best_is_kept(unbroken):
    """It was not the last that was measured, so pruning would have taken it."""
    run, _ = unbroken
    scores = {
        line["step"]: line["heldout/pass@1"]
        for line in read_jsonl(run / "metrics.jsonl")
        if "heldout/pass@1" in line
    }
    best = max(scores, key=scores.get)
    assert 0 < best < 22
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "best",
        f"step-{best}",
        "step-23",
        "step-24",
    ]
    assert os.readlink(checkpoints / "best") == f"step-{best}"
    for step in best, 23, 24:
        facts = json.loads((checkpoints / f"step-{step}" / "trainer.json").read_text())
        assert facts == {"step": step, "best": {"step": best, "score": scores[best]}}
    through_the_link, directly = (
        load_model(checkpoints / "best"),
        load_model(checkpoints / f"step-{best}"),
    )
    assert all(
        torch.equal(*pair)
        for pair in zip(
            through_the_link.parameters(), directly.parameters(), strict=True
        )
    )
    assert load_tokenizer(checkpoints / "best").eos_id == load_tokenizer(run).eos_id


@pytest.mark.slow
@pytest.mark.parametrize("by", ["clock", "file operation"])
def test_killed_twenty_times(nursery, unbroken, tmp_path, by):
    """At random moments, or right before a random one of its operations on files, of which a
    step has some twenty.
    """
    whole, seconds = unbroken
    generator, run, codes = random.Random(0), tmp_path / "run", []
    while len(codes) < 20 and set(codes) <= {-signal.SIGKILL}:
        fate = {"kill_before": generator.randrange(1, 120)}
        if by == "clock":  # a life of average length makes a step or two
            fate = {"kill_after": generator.uniform(0, seconds / 8)}
        codes.append(
            nursery.live(
                "train_grpo", f"run.directory={tmp_path}", *LONG, *flags(run), **fate
            ).code
        )
    # Fewer than 20 if the machine has become much faster meanwhile
    assert len(codes) > 5
    if set(codes) == {-signal.SIGKILL}:
        nursery.well("train_grpo", f"run.directory={tmp_path}", *LONG, *flags(run))
    assert_same(run, whole)


def of_each(*pairs: tuple[str, Any]) -> list[Any]:
    """Pairs of a script and a value; that a script has the other value takes long."""
    scripts = {"train_sft": "train_grpo", "train_grpo": "train_sft"}
    others = [(scripts[script], value) for script, value in pairs]
    return [*pairs, *(pytest.param(*other, marks=pytest.mark.slow) for other in others)]


@pytest.mark.parametrize(
    ("script", "best"), of_each(("train_sft", "true"), ("train_grpo", "false"))
)
def test_three_and_three_steps_are_six(nursery, tmp_path, script, best):
    words = [f"run.keep_best={best}", "run.keep_last=1", "run.eval_every=1"]
    places = [f"run.directory={tmp_path}/{name}" for name in ("whole", "parts")]
    nursery.well(script, places[0], "run.steps=6", *words)
    nursery.well(script, places[1], "run.steps=3", *words)
    nursery.well(script, places[1], "run.steps=6", "--resume", *words)
    assert_same(tmp_path / "parts" / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize(
    ("script", "threads"), of_each(("train_sft", 1), ("train_grpo", 2))
)
def test_the_same_command_gives_the_same_bits(nursery, tmp_path, script, threads):
    for name in "ab":
        nursery.well(
            script,
            f"run.directory={tmp_path}/{name}",
            "run.steps=3",
            f"run.threads={threads}",
        )
    assert_same(tmp_path / "a" / "run", tmp_path / "b" / "run")


# --- interrupted -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step(nursery, tmp_path, number):
    """While the starting model is measured, here on so much that it takes its time."""
    run = tmp_path / "run"
    place, slow = (
        f"run.directory={tmp_path}",
        ("evaluation.samples=1000", "sampling.slots=1"),
    )
    life = nursery.live(
        "train_sft",
        place,
        "run.steps=1",
        *slow,
        signal=number,
        when=str(run / "config.toml"),
    )
    assert life.code == 1 and "Traceback" not in life.out
    assert life.last_words == (
        "interrupted; no checkpoint had been written yet, "
        "the same command with --resume starts again"
    )
    assert not (run / "checkpoints").exists()
    nursery.well("train_sft", place, "run.steps=1", "--resume")


# --- starved ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "full"),
    [("train_sft", "checkpoint"), ("train_grpo", "checkpoint"), ("train_grpo", "log")],
)
def test_a_full_disk(nursery, tmp_path, script, full):
    """RLIMIT_FSIZE: no file may grow beyond a size that is in the way of a checkpoint, or of
    the longest log.
    """
    whole, run = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    often = ("run.save_every=2", "run.eval_every=2")
    nursery.well(script, f"run.directory={tmp_path}/whole", "run.steps=4", *often)
    words = [f"run.directory={tmp_path}/parts", *often]
    nursery.well(script, *words, "run.steps=2")
    before = contents(run / "checkpoints" / "step-2")
    log = max(run.glob("*.jsonl"), key=lambda path: path.stat().st_size)
    limit = log.stat().st_size + 50 if full == "log" else 65536
    life = nursery.live(script, *words, "run.steps=4", "--resume", file_limit=limit)
    assert life.code == 1 and "Traceback" not in life.out
    place = (
        f"step 3: {run}/"
        if full == "log"
        else "checkpoint step-4 could not be written: "
    )
    assert (
        life.last_words.startswith(f"error: {place}")
        and "File too large" in life.last_words
    )
    assert life.last_words.endswith(
        "; the checkpoints written before it are intact, --resume goes on from step-2"
    )
    assert contents(run / "checkpoints" / "step-2") == before
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    assert not list(run.glob("*.tmp"))
    nursery.well(script, *words, "run.steps=4", "--resume")
    assert_same(run, whole)


@pytest.mark.slow
def test_too_little_memory(nursery, tmp_path):
    """RLIMIT_AS: 512 MiB more than the bare process has, for a batch that needs far more at
    once.
    """
    words = ("sft.batch_size=40000", "sft.token_budget=0", "run.steps=2")
    life = nursery.live(
        "train_sft", f"run.directory={tmp_path}", *words, memory_limit=2**29
    )
    assert life.code == 1 and "Traceback" not in life.out
    error = life.out[life.out.index("error: ") :].splitlines()
    assert error[0].startswith("error: step 1 (forward")
    assert (
        "out of memory: " in error[0]
        and "GiB asked for; no checkpoint had been written yet" in error[0]
    )
    assert "GiB on cpu" in error[1]
    assert "  sft.token_budget = 0: smaller micro-batches" in error


# --- the process that forks ------------------------------------------------------------------


def serve() -> None:
    """For each order, a line of JSON on stdin, fork a child that calls a script, and report
    how it ended.
    """
    import torch._inductor  # noqa: F401  the optimizer and the deterministic mode would import it in every life

    import train_grpo
    import train_sft
    from nanomath.commands.main import run_main
    from nanomath.data.world import world_tokenizer

    world_tokenizer()  # cached
    mains = {"train_sft": train_sft.main, "train_grpo": train_grpo.main}
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        if (child := os.fork()) == 0:
            meet(order)
            try:
                run_main(mains[order["script"]], order["words"])
            except SystemExit as error:
                code = error.code
            except BaseException:
                code = 3
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                sys.stdout.flush()
                os._exit(code)
        strike(child, order)
        _, status = os.waitpid(child, 0)
        reply = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - began,
        }
        print(json.dumps(reply), flush=True)


def meet(order: dict[str, Any]) -> None:
    """In the child: speak to a file; limits and the kill before the n-th operation on a file
    of the run.
    """
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if limit := order.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if limit := order.get("memory_limit"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit += pages * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if left := order.get("kill_before"):
        place = next(
            word for word in order["words"] if word.startswith("run.directory=")
        ).partition("=")[2]

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            # What is deleted in a directory is named by its name alone.
            left -= event in WRITES and (
                event in ("os.remove", "os.rmdir")
                or str(arguments[0]).startswith(place)
            )
            if left == 0 and event != "os.kill":
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)


def strike(child: int, order: dict[str, Any]) -> None:
    """In the parent: kill the child after a time, or send it a signal when a file is there."""
    if "kill_after" in order:
        time.sleep(order["kill_after"])
        os.kill(child, signal.SIGKILL)
    elif "signal" in order:
        while not Path(order["when"]).exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(child, order["signal"])


if __name__ == "__main__":
    serve()
