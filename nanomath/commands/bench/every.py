"""Every parity test of the kernels and every benchmark, one command after the other.

    python -m nanomath bench all [CONFIG.toml] [key=value ...]

    python -m nanomath bench all                     ten minutes on two CPU cores, fifteen on a GPU
    python -m nanomath bench all out=bench parts=rollout-0.5b,groups

Writes `bench.json` and `bench.md` into a directory, again after every part: nothing that was
measured is lost when this is stopped. A part that fails is recorded, and the others go on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nanomath
from nanomath.commands.bench.measure import Bench, machine_facts
from nanomath.config import option, parse_arguments
from nanomath.data.files import as_json
from nanomath.training.runlog import write_atomically

ROOT = Path(nanomath.__file__).parents[1]
CPU = {
    "check": "kernels --check",
    "kernels": "kernels tokens=64 context=512",
    "rollout-tiny": "rollout tiny rows=64 groups=8 against=transformers repeats=1",
    "rollout-135m": "rollout smollm2 rows=16 prompt=64 response=16 repeats=1 scored=4",
    "exact": "rollout tiny rows=16 response=32 exact=true repeats=1",
    "training": "training shapes=tiny sequences=32 repeats=1",
    "logprob": "training shapes=smollm2 steps=logprob tokens=1024 repeats=1",
}
GPU = {
    "check": "kernels --check",
    "kernels": "kernels",
    "logprob": "kernels kernels=linear_logprob shapes=qwen2.5-0.5b tokens=262144 calls=3",
    "rollout-tiny": "rollout tiny rows=64 groups=8 against=transformers",
    "rollout-135m": "rollout smollm2 rows=64,256 prompt=448 response=128",
    "rollout-0.5b": "rollout qwen2.5-0.5b rows=64,256 prompt=960 response=128",
    "rollout-1.5b": "rollout qwen2.5-1.5b rows=64,256 prompt=960 response=128",
    "groups": "rollout qwen2.5-1.5b rows=1024 groups=16 prompt=512 response=128 repeats=1 "
    "against=unshared,transformers batches=256,512",
    "exact": "rollout qwen2.5-0.5b rows=64 prompt=960 response=128 exact=true repeats=1",
    "training": "training shapes=smollm2 repeats=1",
}


@dataclass
class AllBench(Bench):
    """Which parts, and where to write."""

    out: str = option("runs/bench", "the directory of bench.json and bench.md")
    parts: list[str] = option([], "what to run; empty: all", choices=tuple(GPU))


def main(argv: list[str]) -> int:
    """Run the parts one after the other; 1 if one of them failed."""
    config, _ = parse_arguments(AllBench, argv, __doc__)
    config.choose_machine()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    commands = GPU if config.on_gpu else CPU
    results = {**machine_facts(config), "commit": commit(), "parts": {}}
    for name in config.parts or commands:
        print(f"--- {name}", flush=True)
        words = commands[name].split() if name in commands else []
        part = run_part(words, config, out / f"{name}.json")
        results["parts"][name] = part
        print(part["output"] + part["outcome"], flush=True)
        write_atomically(out / "bench.json", as_json(results))
        write_atomically(out / "bench.md", page(results))
    failed = [
        name for name, part in results["parts"].items() if part["outcome"] == "failed"
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run_part(words: list[str], config: AllBench, save: Path) -> dict[str, Any]:
    """Run a command of `bench` in a process of its own; return how it went, said and saved."""
    part = {
        "command": "",
        "outcome": "needs a GPU",
        "seconds": 0.0,
        "output": "",
        "report": None,
    }
    if not words:
        return part
    if find_spec("transformers") is None:  # the other numbers are wanted all the same
        words = [word.replace(",transformers", "") for word in words]
        words = [word for word in words if word != "against=transformers"]
    if "--check" not in words:
        words += [f"device={config.device}", f"dtype={config.dtype}"]
        words += [f"threads={config.threads}", f"save={save}"]
    save.unlink(missing_ok=True)
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-m", "nanomath", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    part["command"] = " ".join(["python", "-m", "nanomath", "bench", *words])
    part["outcome"] = "failed" if ran.returncode else "done"
    part["seconds"] = round(time.monotonic() - began, 1)
    part["output"] = ran.stdout
    if save.is_file():
        part["report"] = json.loads(save.read_text(encoding="utf-8"))
    return part


def commit() -> str:
    """Return the commit of the repository, with "-dirty" after a change; "" outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        ran = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return ""
    return ran.stdout.strip()


def page(results: dict[str, Any]) -> str:
    """Return the Markdown page: the machine, the table of parts, and what each one printed."""
    parts = results["parts"]
    lines = ["# Benchmarks", ""]
    lines += [f"- {name}: {fact}" for name, fact in results.items() if name != "parts"]
    lines += ["", "| part | outcome | seconds | command |", "|---|---|---|---|"]
    for name, part in parts.items():
        lines.append(
            f"| {name} | {part['outcome']} | {part['seconds']:.0f} | `{part['command']}` |"
        )
    for name, part in parts.items():
        if part["command"]:
            output = part["output"].replace(f"{sysconfig.get_path('purelib')}/", "")
            lines += ["", f"## {name}", "", "```", output.rstrip(), "```"]
    return "\n".join(lines) + "\n"
