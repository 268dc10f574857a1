"""Every parity test of the kernels and every benchmark, in one go.

    python -m nanomath bench all [CONFIG.toml] [key=value ...]

    python -m nanomath bench all                              ten minutes on two CPU cores, fifteen on a GPU
    python -m nanomath bench all out=bench parts=rollout-0.5b,groups

Writes `bench.json` and `bench.md` into a directory, again after every part: nothing that was
measured is lost when this is stopped. A part that fails is recorded, and the others go on; one
that needs a GPU is named and left out on a CPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nanomath
from nanomath.commands.bench.machine import machine
from nanomath.config import option, parse_arguments
from nanomath.training.build import choose_device

ROOT = Path(nanomath.__file__).parents[1]
RUNNING = "unfinished.json"  # what the part that is running has measured so far
Reports = dict[str, dict[str, Any]]  # of each part that has one


@dataclass(frozen=True)
class Part:
    """One command of `bench`: its words on a GPU, and on a CPU, where "" means that it needs a
    GPU.
    """

    gpu: str
    cpu: str = ""

    def words(self, gpu: bool) -> list[str]:
        return (self.gpu if gpu else self.cpu).split()


PARTS = {
    "check": Part("kernels --check", "kernels --check"),
    "kernels": Part("kernels", "kernels tokens=64 context=512"),
    "logprob": Part(
        "kernels kernels=linear_logprob shapes=qwen2.5-0.5b tokens=262144 calls=3"
    ),
    "rollout-tiny": Part(
        "rollout tiny rows=64 groups=8 against=transformers",
        "rollout tiny rows=64 groups=8 against=transformers repeats=1",
    ),
    "rollout-135m": Part(
        "rollout smollm2 rows=64,256 prompt=448 response=128",
        "rollout smollm2 rows=16 prompt=64 response=16 repeats=1 scored=4",
    ),
    "rollout-0.5b": Part("rollout qwen2.5-0.5b rows=64,256 prompt=960 response=128"),
    "rollout-1.5b": Part("rollout qwen2.5-1.5b rows=64,256 prompt=960 response=128"),
    "groups": Part(
        "rollout qwen2.5-1.5b rows=1024 groups=16 prompt=512 response=128 batches=256,512 repeats=1 "
        "against=unshared,transformers"
    ),
    "exact": Part(
        "rollout qwen2.5-0.5b rows=64 prompt=960 response=128 exact=true repeats=1",
        "rollout tiny rows=16 response=32 exact=true repeats=1",
    ),
    "training": Part(
        "training dtype=bfloat16 cases=smollm2-sft,smollm2-grpo,logprob repeats=1",
        "training cases=tiny-sft,tiny-grpo,tiny-score,logprob tokens=1024 vocabulary=49152 width=576 repeats=1",
    ),
}


@dataclass
class AllBench:
    """Which parts, where to write, and how long it may take."""

    out: str = option(
        "runs/bench", "the directory that bench.json and bench.md are written to"
    )
    parts: list[str] = option(list(PARTS), "what to run", choices=tuple(PARTS))
    minutes: float = option(
        15.0, "parts that have not ended by then are stopped or left out", above=0
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    threads: int = option(0, "CPU threads, 0: let torch decide", minimum=0)


def main(argv: list[str]) -> int:
    """Run the parts one after the other; 1 if one of them failed."""
    config, _ = parse_arguments(AllBench, argv, __doc__)
    config.device = str(choose_device(config.device))
    out = Path(config.out)
    until = time.monotonic() + 60 * config.minutes
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "commit": commit(),
        **machine(config.device, config.threads),
        "config": asdict(config),
        "parts": {},
    }
    for name in config.parts:
        print(f"--- {name}", flush=True)
        results["parts"][name] = run_part(PARTS[name], config, out, until - time.monotonic())
        print(
            results["parts"][name]["output"],
            outcome(results["parts"][name]),
            sep="",
            flush=True,
        )
        write(results, out)
    print(f"--- written to {out / 'bench.json'} and {out / 'bench.md'}")
    failed = [name for name, part in results["parts"].items() if outcome(part) == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def commit() -> str:
    """The commit of the repository, with "-dirty" when something was changed since; "" outside
    of one.
    """
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    with suppress(OSError):
        return subprocess.run(
            command, capture_output=True, text=True, check=False
        ).stdout.strip()
    return ""


# --- one part --------------------------------------------------------------------------------


def run_part(part: Part, config: AllBench, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own: its command, why it was left out or its exit code,
    what it said and saved.
    """
    words = part.words(config.device.startswith("cuda"))
    found: dict[str, Any] = {
        "command": "",
        "skipped": "",
        "code": None,
        "seconds": 0.0,
        "output": "",
        "report": None,
    }
    if not words:
        return found | {"skipped": "needs a GPU"}
    if "against=transformers" in words and find_spec("transformers") is None:
        words.remove(
            "against=transformers"
        )  # the sampler's own numbers are wanted all the same
    if seconds < 1:
        return found | {"skipped": "no time was left"}
    if "--check" not in words:
        words += [
            f"device={config.device}",
            f"threads={config.threads}",
            f"save={out / RUNNING}",
        ]
    began = time.monotonic()
    code, output = run(["-m", "nanomath", "bench", *words], seconds)
    found |= {
        "command": " ".join(["python", "-m", "nanomath", "bench", *words]),
        "code": code,
        "output": output,
    }
    found["seconds"] = round(time.monotonic() - began, 1)
    if (out / RUNNING).is_file():
        found["report"] = json.loads((out / RUNNING).read_text(encoding="utf-8"))
        (out / RUNNING).unlink()
    return found


def run(words: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit code and output of `python words`, None when it was stopped because it took longer
    than that.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # so that it can be ended with all the processes it has begun
    )
    code = None
    try:
        output, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return code, output


def outcome(part: dict[str, Any]) -> str:
    """How a part went, in a word or two."""
    if part["skipped"]:
        return part["skipped"]
    return {0: "done", None: "stopped: out of time"}.get(part["code"], "failed")


# --- what was aimed at -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A number to reach on a GPU in bfloat16; `found` raises when its part has not measured
    it.
    """

    text: str
    bound: float
    at_least: bool
    found: Callable[[Reports], float]


def row(reports: Reports, part: str, rows: int) -> dict[str, Any]:
    """The part's row with so many rows."""
    return next(row for row in reports[part]["rows"] if row["rows"] == rows)


def sampling_cost(point: dict[str, Any]) -> float:
    """What the lm_head and the sampling take beyond the floor of the lm_head's product, as a
    share of the step.
    """
    stages = point["stages"]
    step = point["step_ms"]["nanomath"]
    return stages["lm_head"] + stages["sampling"] - point["floor_ms"]["lm_head"] / step


def times(reports: Reports, other: str) -> float:
    """How many times the tokens a second of another side ours are, in the part of the groups."""
    speed = row(reports, "groups", 1024)["tokens_per_s"]
    return speed["nanomath"] / speed[other]


def logprob_memory(point: dict[str, Any]) -> float:
    """Peak memory as a share of float32 logits [T, V]."""
    return point["bytes"] / (4 * point["rows"] * 151936)


TARGETS = [
    Target(
        "Qwen2.5-1.5B, 256 rows, context 1k: of the floor",
        0.70,
        True,
        lambda r: row(r, "rollout-1.5b", 256)["share"],
    ),
    Target(
        "Qwen2.5-0.5B, 256 rows, context 1k: of the floor",
        0.55,
        True,
        lambda r: row(r, "rollout-0.5b", 256)["share"],
    ),
    Target(
        "Qwen2.5-0.5B, 64 rows, context 1k: of the floor",
        0.50,
        True,
        lambda r: row(r, "rollout-0.5b", 64)["share"],
    ),
    Target(
        "Sampling and logprobs beyond the lm_head's product: of the step, Qwen2.5-1.5B, 256 rows",
        *(0.05, False, lambda r: sampling_cost(row(r, "rollout-1.5b", 256))),
    ),
    Target(
        "64 prompts of 512 tokens x 16: times unshared prompts",
        1.3,
        True,
        lambda r: times(r, "unshared"),
    ),
    Target(
        "64 prompts of 512 tokens x 16: times transformers",
        3.0,
        True,
        lambda r: times(r, "transformers"),
    ),
    Target(
        "Logprobs of 262144 tokens, forward and backward: times the matrix products",
        *(
            1.2,
            False,
            lambda r: (
                row(r, "logprob", 262144)["kernel_s"] / row(r, "logprob", 262144)["floor_s"]
            ),
        ),
    ),
    Target(
        "Logprobs of 262144 tokens: peak memory as a share of float32 logits",
        *(0.02, False, lambda r: logprob_memory(row(r, "logprob", 262144))),
    ),
]


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target with what was measured, None where nothing was."""
    reports = {name: part["report"] for name, part in results["parts"].items()}
    rows = []
    for target in TARGETS:
        found = None
        with suppress(KeyError, TypeError, StopIteration):
            found = target.found(reports)
        met = (
            None
            if found is None
            else (found >= target.bound) == target.at_least or found == target.bound
        )
        rows.append(
            {
                "target": target.text,
                "bound": target.bound,
                "at_least": target.at_least,
                "found": found,
                "met": met,
            }
        )
    return rows


# --- the files -------------------------------------------------------------------------------


def write(results: dict[str, Any], out: Path) -> None:
    """Write both files anew."""
    results["targets"] = targets(results)
    for name, text in (
        ("bench.json", json.dumps(results, indent=1) + "\n"),
        ("bench.md", page(results)),
    ):
        (out / f".{name}").write_text(text, encoding="utf-8")
        (out / f".{name}").replace(out / name)


def page(results: dict[str, Any]) -> str:
    """The Markdown page: the machine, the targets, and each part with what it printed."""
    where = (
        "processor",
        "threads",
        "memory_bytes",
        "python",
        "torch",
        "triton",
        "transformers",
        "nanomath",
        "commit",
    )
    lines = ["# Benchmarks", "", *(f"- {name}: {results[name]}" for name in where), ""]
    lines += ["| on a GPU in bfloat16 | target | measured | |", "|---|---|---|---|"]
    for line in results["targets"]:
        sign = "≥" if line["at_least"] else "≤"
        found = line["found"]
        measured = "not measured" if found is None else f"{found:.3g}"
        verdict = {None: "", True: "met", False: "missed"}[line["met"]]
        lines.append(
            f"| {line['target']} | {sign} {line['bound']:g} | {measured} | {verdict} |"
        )
    lines += ["", "| part | outcome | seconds |", "|---|---|---|"]
    lines += [
        f"| {name} | {outcome(part)} | {part['seconds']:.0f} |"
        for name, part in results["parts"].items()
    ]
    for name, part in results["parts"].items():
        if part["command"]:
            lines += [
                "",
                f"## {name}",
                "",
                "```",
                f"$ {part['command']}",
                part["output"].rstrip(),
                "```",
            ]
    return "\n".join(lines) + "\n"
