"""Every parity test of the kernels and every benchmark, one command after the other.

    python -m nanomath bench all out=bench parts=rollout-tiny,training

Writes `bench.json` and `bench.md` again after every part: nothing that was measured is lost. A
part that fails is recorded, and the others go on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nanomath.commands.bench import measure
from nanomath.config import option, parse_arguments
from nanomath.data.files import as_json, read_optional
from nanomath.training.runlog import write_atomically

CPU = {
    "check": "kernels --check",
    "kernels": "kernels tokens=64 context=512",
    "logprob": "kernels kernels=linear_logprob shapes=smollm2 tokens=1024",
    "rollout-tiny": "rollout tiny rows=64 groups=8 against=transformers repeats=1",
    "rollout-135m": "rollout smollm2 rows=16 prompt=64 response=16 repeats=1",
    "exact": "rollout tiny rows=16 response=32 exact=true repeats=1",
    "training": "training shapes=tiny sequences=32 repeats=1",
}
GPU = {
    "check": "kernels --check",
    "kernels": "kernels shapes=qwen2.5-0.5b,qwen2.5-1.5b",
    "logprob": "kernels kernels=linear_logprob tokens=262144",
    "rollout-tiny": "rollout tiny rows=64 groups=8 against=transformers",
    "rollout-135m": "rollout smollm2 rows=64,256 prompt=448 response=128",
    "rollout-0.5b": "rollout qwen2.5-0.5b rows=64,256 prompt=960 response=128",
    "rollout-1.5b": "rollout qwen2.5-1.5b rows=64,256 prompt=960 response=128",
    "groups": "rollout qwen2.5-1.5b rows=256,1024 groups=16 prompt=512 against=transformers",
    "exact": "rollout qwen2.5-0.5b rows=64 prompt=960 response=128 exact=true repeats=1",
    "training": "training shapes=smollm2 repeats=1",
}


@dataclass
class AllBench(measure.Bench):
    """Which parts, and where to write."""

    out: str = option("runs/bench", "the directory of bench.json and bench.md")
    parts: list[str] = option([], "what to run; empty: all", choices=tuple(GPU))


def main(argv: list[str]) -> int:
    """Run the parts one after the other; 1 if one of them failed."""
    config, _ = parse_arguments(AllBench, argv, __doc__)
    config.prepare()
    usual = GPU if config.on_gpu else CPU
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {**measure.facts(config), "parts": {}}
    for name in config.parts or usual:
        print(f"--- {name}", flush=True)
        part = run_part({**GPU, **usual}[name].split(), config, out / f"{name}.json")
        print(part["output"] + part["outcome"], flush=True)
        results["parts"][name] = part
        write_atomically(out / "bench.json", as_json(results))
        write_atomically(out / "bench.md", page(results["parts"]))
    return int(any(part["outcome"] == "failed" for part in results["parts"].values()))


def run_part(words: list[str], config: AllBench, save: Path) -> dict:
    """Run a command of `bench` in a process of its own; return how it went, said and saved."""
    if find_spec("transformers") is None:  # the other numbers are wanted all the same
        words = [word for word in words if word != "against=transformers"]
    if "--check" not in words:
        words += [f"device={config.device}", f"dtype={config.dtype}"]
        words += [f"threads={config.threads}", f"save={save}"]
    save.unlink(missing_ok=True)
    began = time.monotonic()
    command = ["-m", "nanomath", "bench", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ran = subprocess.run([sys.executable, *command], text=True, **pipes)
    return {
        "command": " ".join(["python", *command]),
        "outcome": "failed" if ran.returncode else "done",
        "seconds": round(time.monotonic() - began),
        "output": ran.stdout,
        "report": read_optional(save),
    }


def page(parts: dict) -> str:
    """Return the Markdown page: the table of parts, and what each one printed."""
    lines = ["| part | outcome | seconds | command |", "|---|---|---|---|"]
    for name, part in parts.items():
        told = f"{part['outcome']} | {part['seconds']} | `{part['command']}`"
        lines.append(f"| {name} | {told} |")
    lines += [f"\n## {name}\n\n```\n{p['output']}```" for name, p in parts.items()]
    return "\n".join(["# Benchmarks", "", *lines, ""])
