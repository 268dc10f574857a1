"""What the benchmarks share: named shapes, processes of their own, peak memory, reports, and
what the machine is.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import nanomath
from nanomath.data.files import replacing
from nanomath.models import ModelConfig
from nanomath.rollout.floor import Machine, measure_machine

QWEN = {"model_type": "qwen2", "norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True}
SHAPES = {  # of configs/tiny, SmolLM2-135M and Qwen2.5; time and memory do not depend on the values of the weights
    "tiny": ModelConfig(1024, 128, 3, 4, 2, 32, 352, 512),
    "smollm2": ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192),
    "qwen2.5-0.5b": ModelConfig(151936, 896, 24, 14, 2, 64, 4864, 32768, **QWEN),
    "qwen2.5-1.5b": ModelConfig(151936, 1536, 28, 12, 2, 128, 8960, 32768, **QWEN),
}
Call = tuple[Callable[..., Any], ...]  # a function of a module and its arguments

# --- processes -------------------------------------------------------------------------------


def in_new_process(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returns, as a list that is empty where it ran out of memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return [pool.submit(function, *arguments).result()]
        except (
            BrokenProcessPool,
            torch.OutOfMemoryError,
        ):  # the operating system killed it, or CUDA refused
            return []


def by_turns(sides: dict[str, list[Call]], bar: tqdm) -> dict[str, list[Any]]:
    """What the calls of each side return, where memory sufficed; the sides take turns, each
    call in a new process.
    """
    found: dict[str, list[Any]] = {side: [] for side in sides}
    for turn in zip(*sides.values(), strict=True):
        for side, call in zip(sides, turn, strict=True):
            found[side] += in_new_process(*call)
            bar.update()
    return found


def use_threads(threads: int) -> None:
    """In a measured process: so many CPU threads, 0 leaves it to torch."""
    if threads:
        torch.set_num_threads(threads)


def this_machine(config: Any) -> Machine:
    """What `config`'s device does with `config.threads` in `config.dtype`, measured in a
    process of its own.
    """
    (measured,) = in_new_process(_measure_machine, config.device, config.dtype, config.threads)
    return measured


def _measure_machine(device: str, dtype: str, threads: int) -> Machine:
    use_threads(threads)
    return measure_machine(device, getattr(torch, dtype))


def peak_memory(device: torch.device, restart: bool = False) -> int:
    """Most bytes in use at a time, on the GPU or resident in this process; counted from now on
    with `restart`.
    """
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if (
        not status.is_file()
    ):  # no Linux, and no way to restart: what was there before is the most so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    lines = status.read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# --- reports ---------------------------------------------------------------------------------


def new_report(target: str, argv: Iterable[str], config: Any) -> dict[str, Any]:
    """What was measured with which command on which machine, without any rows yet.

    FileNotFoundError when `config.save` lies in no directory.
    """
    if config.save and not Path(config.save).absolute().parent.is_dir():
        raise FileNotFoundError(f"save: there is no directory to write {config.save} to")
    command = shlex.join(["python", "-m", "nanomath", "bench", target, *argv])
    return {
        "command": command,
        **machine(config.device, config.threads),
        "config": asdict(config),
        "rows": [],
    }


def save_report(report: dict[str, Any], path: str) -> None:
    """Write the report, if it is to be saved; a reader finds the old one or the new one,
    whole.
    """
    if path:
        with replacing(Path(path)) as scratch:
            scratch.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(
            (line.partition(": ")[2] for line in lines if line.startswith("model name")),
            processor,
        )
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name(device)
    return {
        "processor": processor,
        "threads": threads or torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nanomath": nanomath.__version__,
        **{name: version(name) for name in ("triton", "transformers")},
    }


def version(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def place(report: dict[str, Any]) -> str:
    """Processor, threads and torch in words."""
    return f"{report['processor']}, {report['threads']} threads, torch {report['torch']}"
