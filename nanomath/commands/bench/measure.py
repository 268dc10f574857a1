"""What the benchmarks share: keys, shapes, processes of their own, peak memory, and the report."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from nanomath.config import option
from nanomath.data.files import as_json, check_file
from nanomath.models import ModelConfig, Transformer
from nanomath.training import sittings
from nanomath.training.build import choose_device
from nanomath.training.runlog import write_atomically

QWEN = {"model_type": "qwen2", "norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True}
SHAPES = {  # of configs/tiny, SmolLM2-135M and Qwen2.5; the values of the weights cost nothing
    "tiny": ModelConfig(1024, 128, 3, 4, 2, 32, 352, 512),
    "smollm2": ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192),
    "qwen2.5-0.5b": ModelConfig(151936, 896, 24, 14, 2, 64, 4864, 32768, **QWEN),
    "qwen2.5-1.5b": ModelConfig(151936, 1536, 28, 12, 2, 128, 8960, 32768, **QWEN),
}
NO_MEMORY = "no memory"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Bench:
    """The keys that every benchmark has."""

    device: str = option(
        "auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one"
    )
    dtype: str = option("auto", "auto: bfloat16 on a GPU, else float32", choices=DTYPES)
    threads: int = option(0, "CPU threads, 0: let torch decide", minimum=0)
    save: str = option("", "write the numbers and the machine to this JSON file")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def prepare(self) -> None:
        """Replace "auto". An error for a device that is not there, and for a bad `save`."""
        self.device = str(choose_device(self.device))
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.on_gpu else "float32"
        if self.save:
            check_file("save", self.save)


def need(package: str) -> None:
    """ImportError where a package is missing that something is to be compared with."""
    if find_spec(package) is None:
        raise ImportError(f"against={package} needs it: pip install {package}")


def in_new_process(config: Any, function: Callable, case: dict) -> dict:
    """Return what a side returns, in a process of its own; {"failed": why} if it cannot."""
    begin = (torch.set_num_threads, (config.threads,)) if config.threads else ()
    with ProcessPoolExecutor(1, get_context("spawn"), *begin) as pool:
        try:
            return pool.submit(function, config, **case).result()
        except (BrokenProcessPool, torch.OutOfMemoryError, MemoryError):
            return {"failed": NO_MEMORY}  # the system ended it, or CUDA refused
        except Exception as error:  # noqa: BLE001 - whatever it raised: the others go on
            return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}


def now(device: torch.device) -> float:
    """Return the time in seconds at which all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def new_model(config: Bench, shape: str) -> Transformer:
    """Return a model of random weights."""
    model = Transformer(SHAPES[shape]).init_weights(0)
    return model.to(config.device, config.torch_dtype)


def facts(config: Bench) -> dict:
    """Return what the numbers are measured on and with."""
    return {
        "machine": sittings.machine(config.place),
        "load by other work": os.getloadavg()[0],  # in the minute before
        "versions": sittings.versions((*sittings.PACKAGES, "transformers", "trl")),
        "commit": sittings.commit(),
    }


def report(argv: list, config: Any, cases: list[dict], sides: dict) -> int:
    """Measure, print and save case by case; return the exit code, 1 if a side has failed.

    A side is a function(config, **case) that returns "ms" and more, the first is ours, `ratio`
    is to it. Each is called `repeats` times in new processes, by turns; the fastest call counts.
    What we are compared with may lack the memory: that is a result.
    """
    command = shlex.join(["python", "-m", "nanomath", "bench", *argv])
    about = {"command": command, **facts(config), "config": asdict(config)}
    print(*(f"{name}: {shown(fact)}" for name, fact in about.items()), sep="\n")
    rows, failed = [], False
    for case in cases:
        best = {}
        for side, function in config.repeats * list(sides.items()):
            runs = in_new_process(config, function, case), best.get(side, {})
            best[side] = min(runs, key=lambda run: run.get("ms", math.inf))
        ours, *others = best.values()
        for run in others:
            if "ms" in run and "ms" in ours:
                run["ratio"] = run["ms"] / ours["ms"]
        print(shown(case))
        for side, run in best.items():
            print(f"  {side:13} {shown(run)}", flush=True)
            lacking = run is not ours and run.get("failed") == NO_MEMORY
            failed |= "failed" in run and not lacking
        rows.append(case | best)
        if config.save:
            write_atomically(Path(config.save), as_json({**about, "rows": rows}))
    return int(failed)


def shown(value: Any) -> str:
    """Return a value as it is printed: a number with four digits."""
    if isinstance(value, dict):
        return "  ".join(f"{name} {shown(inner)}" for name, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"
    return str(value)
