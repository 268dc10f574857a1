"""What the benchmarks share: keys, shapes, processes of their own, peak memory, and the report."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import nanomath
from nanomath.config import option
from nanomath.data.files import as_json, check_file
from nanomath.models import ModelConfig
from nanomath.rollout.floor import Machine, measure_machine
from nanomath.training.build import choose_device
from nanomath.training.runlog import write_atomically

QWEN = {"model_type": "qwen2", "norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True}
SHAPES = {  # of configs/tiny, SmolLM2-135M and Qwen2.5; the values of the weights cost nothing
    "tiny": ModelConfig(1024, 128, 3, 4, 2, 32, 352, 512),
    "smollm2": ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192),
    "qwen2.5-0.5b": ModelConfig(151936, 896, 24, 14, 2, 64, 4864, 32768, **QWEN),
    "qwen2.5-1.5b": ModelConfig(151936, 1536, 28, 12, 2, 128, 8960, 32768, **QWEN),
}
CALLS = 5  # in a process, the fastest counts: the first may be slow
ENOUGH = 2.0  # seconds after which there are no more calls than two
DTYPES = ("auto", "float32", "bfloat16", "float16")
Found = dict[
    str, Any
]  # what a measured process returns; {"failed": why} where it could not
Call = tuple[Callable[..., Found], ...]  # a function of a module, then its arguments


@dataclass
class Bench:
    """The keys that every benchmark has."""

    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = option("auto", "auto: bfloat16 on a GPU, else float32", choices=DTYPES)
    threads: int = option(0, "CPU threads, 0: let torch decide", minimum=0)
    save: str = option("", "write the numbers and the machine to this JSON file")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def choose_machine(self) -> None:
        """Replace "auto" by what this machine has. ValueError for a device that it has not."""
        self.device = str(choose_device(self.device))
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.on_gpu else "float32"


# --- processes -------------------------------------------------------------------------------


def in_new_process(
    threads: int, function: Callable[..., Found], *arguments: Any
) -> Found:
    """Return what `function` returns, in a process of its own with so many CPU threads.

    A process that fails or runs out of memory is a result as well: {"failed": why}.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _use_threads, (threads,)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, torch.OutOfMemoryError, MemoryError):
            return {
                "failed": "no memory"
            }  # the operating system ended it, or CUDA refused
        except Exception as error:  # noqa: BLE001 - whatever it raised: the others go on
            return {"failed": in_one_line(error)}


def _use_threads(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)


def in_one_line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def by_turns(
    threads: int, repeats: int, sides: dict[str, Call]
) -> dict[str, list[Found]]:
    """Call every side so many times, each in a new process, the sides by turns."""
    found: dict[str, list[Found]] = {side: [] for side in sides}
    for _ in tqdm(range(repeats), unit="turn", disable=None, leave=False):
        for side, call in sides.items():
            found[side].append(in_new_process(threads, *call))
    return found


def best(runs: Sequence[Found]) -> Found:
    """Return the fastest run, by its tokens_per_s or its seconds; a failed one if all are."""
    return max(
        runs, key=lambda run: run.get("tokens_per_s", 1 / run.get("seconds", math.inf))
    )


def goes_on(seconds: Sequence[float]) -> bool:
    """Return whether a process makes another call after calls that took so long."""
    return len(seconds) < 2 or (len(seconds) < CALLS and sum(seconds) < ENOUGH)


def this_machine(config: Bench) -> Machine:
    """Measure how fast the device copies, and multiplies in the config's dtype."""
    found = in_new_process(config.threads, _machine, config.device, config.dtype)
    if "failed" in found:
        raise RuntimeError(f"the machine could not be measured: {found['failed']}")
    return Machine(**found)


def _machine(device: str, dtype: str) -> Found:
    return asdict(measure_machine(device, getattr(torch, dtype)))


def peak_memory(device: torch.device, restart: bool = False) -> int:
    """Return the most bytes in use at a time, on the GPU or resident in this process.

    With `restart` the peak is counted from now on, where the system allows it.
    """
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():  # no Linux: the peak since the process began
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    lines = status.read_text(encoding="utf-8").splitlines()
    return 1024 * next(
        int(line.split()[1]) for line in lines if line.startswith("VmHWM")
    )


# --- the report ------------------------------------------------------------------------------


def need(package: str) -> None:
    """ImportError where a package is missing that something is to be compared with."""
    if find_spec(package) is None:
        raise ImportError(f"against={package} needs it: pip install {package}")


def version(package: str) -> str:
    """Return the version of an installed package, "-" where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def machine_facts(config: Bench) -> dict[str, Any]:
    """Return what the numbers are measured on and with."""
    processor = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(": ")[2]
    if config.on_gpu:
        processor = torch.cuda.get_device_name(config.device)
    return {
        "processor": processor,
        "threads": config.threads or torch.get_num_threads(),
        "load by other work": round(os.getloadavg()[0], 1),  # in the minute before
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "nanomath": nanomath.__version__,
    }


class Report:
    """A table that is printed row by row, and saved as JSON after each row."""

    def __init__(self, target: str, argv: Sequence[str], config: Bench) -> None:
        """Begin the report. OSError when `config.save` could not be written."""
        if config.save:
            check_file("save", config.save)
        self.path = config.save
        self.failed = False
        self.content = {
            "command": shlex.join(["python", "-m", "nanomath", "bench", target, *argv]),
            **machine_facts(config),
            "config": asdict(config),
            "rows": [],
        }

    def head(self, *notes: str, columns: Sequence[str]) -> None:
        """Print the machine, the notes and the names of the columns."""
        facts = self.content
        dtype = facts["config"]["dtype"]
        print(
            f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, {dtype}"
        )
        print(*notes, sep="\n")
        self.widths = [max(10, len(name) + 2) for name in columns]
        self._print(columns)

    def add(self, row: dict[str, Any], cells: Sequence[str], *notes: str) -> None:
        """Print a row as `cells`, with the notes below it, and save it."""
        self._print(cells)
        for note in notes:
            print(f"    {note}", flush=True)
        self.content["rows"].append(row)
        self.failed |= "failed" in row
        if self.path:
            write_atomically(Path(self.path), as_json(self.content))

    def _print(self, cells: Sequence[str]) -> None:
        # A row that failed has fewer cells.
        padded = (
            cell.rjust(width) for cell, width in zip(cells, self.widths, strict=False)
        )
        print("".join(padded), flush=True)


def number(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
    """Return `value * scale` as a cell, "-" where nothing was measured."""
    return "-" if value is None else f"{value * scale:.{digits}f}"


def ratio(value: float | None, other: float | None) -> str:
    """Return how many times `other` the value is as a cell, "-" where one is missing."""
    return "-" if value is None or not other else f"{value / other:.2f}"
