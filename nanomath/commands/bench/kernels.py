"""Every kernel against its floor and its PyTorch reference.

    python -m nanomath bench kernels [--check] [CONFIG.toml] [key=value ...]

    python -m nanomath bench kernels
    python -m nanomath bench kernels kernels=paged_attention rows=64,256 context=4096
    python -m nanomath bench kernels --check

The floor is the time in which this machine, as measured just before, can read and write what
the kernel must, or make its matrix products. On a GPU a call is replayed from a CUDA graph,
the last cache emptied before each; the kernels of training run as they are. On a CPU the CPU
forms are timed, where a kernel has one. --check runs tests/kernels and tests/gpu instead:
kernels, sampler and training on the GPU, or where there is none on a pretended one, by
Triton's interpreter. Its exit code is pytest's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import nanomath
from nanomath.commands.bench.kernel_cases import (
    CASES,
    GROUP,
    OF_TOKENS,
    WITHOUT_CPU_FORM,
    Case,
    Setting,
)
from nanomath.commands.bench.machine import (
    SHAPES,
    in_new_process,
    new_report,
    peak_memory,
    place,
    save_report,
    this_machine,
    use_threads,
)
from nanomath.config import option, parse_arguments
from nanomath.rollout.floor import Machine, seconds_of
from nanomath.training.build import choose_device

CHECKS = ("tests/kernels", "tests/gpu")  # what --check runs
FLUSHED = 256 << 20  # bytes written to empty a GPU's last cache


@dataclass
class KernelBench:
    """Which kernels, at which sizes."""

    kernels: list[str] = option(list(CASES), "what to measure", choices=tuple(CASES))
    shapes: list[str] = option(
        [], "models; empty: qwen2.5-0.5b, on a GPU 1.5b as well", choices=tuple(SHAPES)
    )
    rows: list[int] = option(
        [],
        f"rows of a decoding step, multiples of {GROUP}; empty: 16, on a GPU 64 and 256",
        minimum=1,
    )
    context: int = option(1024, "tokens that each row attends to", minimum=1)
    tokens: int = option(0, "tokens of a training step, 0: 256, on a GPU 8192", minimum=0)
    dtype: str = option(
        "auto",
        "auto: bfloat16 on a GPU, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    threads: int = option(0, "CPU threads, 0: let torch decide", minimum=0)
    calls: int = option(
        20,
        "calls for each number; the median counts; on a CPU fewer of what is slow",
        minimum=1,
    )
    save: str = option(
        "", "write the numbers, with what they were measured on, to this JSON file"
    )


def main(argv: list[str]) -> int:
    """Measure the kernels, each in a process of its own, print a table and save it after each;
    or run their tests.
    """
    config, flags = parse_arguments(
        KernelBench, argv, __doc__, {"--check": "run the kernels' tests instead"}
    )
    if flags:
        return check()
    resolve(config)
    report = new_report("kernels", argv, config)
    measured = this_machine(config)
    report["machine"] = asdict(measured)
    print(table_head(report))
    with tqdm(total=len(config.kernels), unit="kernel", disable=None, leave=False) as bar:
        for kernel in config.kernels:
            for row in in_new_process(measure, kernel, config, measured) or [
                [no_memory(kernel)]
            ]:
                report["rows"] += row
                bar.write("\n".join(map(table_row, row)))
            save_report(report, config.save)
            bar.update()
    if config.device == "cpu":
        print(
            f"the Triton forms of {', '.join(config.kernels)} need a GPU: the CPU forms were measured"
        )
        if same := [kernel for kernel in config.kernels if kernel in WITHOUT_CPU_FORM]:
            print(f"{' and '.join(same)}: no CPU form, PyTorch was measured twice")
    return int(any("failed" in row for row in report["rows"]))


def check() -> int:
    """pytest's exit code for CHECKS. FileNotFoundError or ImportError where that cannot run."""
    root = Path(nanomath.__file__).parents[1]
    if lacking := [tests for tests in CHECKS if not (root / tests).is_dir()]:
        raise FileNotFoundError(
            f"--check runs the repository's {' and '.join(lacking)}, and {root} has none"
        )
    if find_spec("pytest") is None:
        raise ImportError("--check needs pytest: pip install pytest hypothesis")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *CHECKS]
    return subprocess.run(command, cwd=root, check=False).returncode


def resolve(config: KernelBench) -> None:
    """Put in what is left to be chosen. ValueError for rows that make no groups."""
    config.device = str(choose_device(config.device))
    gpu = config.device.startswith("cuda")
    config.shapes = config.shapes or ["qwen2.5-0.5b", "qwen2.5-1.5b"][: 1 + gpu]
    config.rows = config.rows or ([64, 256] if gpu else [16])
    config.tokens = config.tokens or (8192 if gpu else 256)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if gpu else "float32"
    if "grouped_attention" in config.kernels and any(rows % GROUP for rows in config.rows):
        raise ValueError(f"rows={config.rows}: grouped_attention needs multiples of {GROUP}")


# --- in the measured process -----------------------------------------------------------------


def measure(kernel: str, config: KernelBench, machine: Machine) -> list[dict[str, Any]]:
    """A row for every shape and number of rows; one that fails says why, and is the last."""
    use_threads(config.threads)
    found = []
    for setting, row in settings(kernel, config):
        found.append({"kernel": kernel, **row})
        try:
            found[-1] |= measure_case(CASES[kernel](setting), config, machine)
        except Exception as error:  # noqa: BLE001 - whatever a kernel can raise is a result, the others go on
            found[-1]["failed"] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            break
    return found


def settings(kernel: str, config: KernelBench) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Every setting, and how a row of the table names it."""
    for shape in config.shapes:
        for rows in [0] if kernel in OF_TOKENS else config.rows:
            sizes = rows, config.context, config.tokens
            yield (
                Setting(SHAPES[shape], *sizes, config.device, getattr(torch, config.dtype)),
                {"shape": shape, "rows": rows or config.tokens},
            )


def measure_case(case: Case, config: KernelBench, machine: Machine) -> dict[str, Any]:
    """Seconds of both forms, the reference's None for want of memory; the floor; peak bytes of
    the kernel on a GPU.
    """
    device = torch.device(config.device)
    gpu = device.type == "cuda"
    memory = None
    if gpu:
        before = peak_memory(device, restart=True)
        case.kernel()
        memory = peak_memory(device) - before
    kernel = in_graph(case.kernel) if gpu and case.in_graph else case.kernel
    found = {"floor_s": machine.seconds(case.moved, case.flops), "bytes": memory}
    found["kernel_s"] = typical(kernel, device, config.calls)
    found["reference_s"] = None
    with suppress(torch.OutOfMemoryError):
        found["reference_s"] = typical(case.reference, device, config.calls)
    return found


def typical(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """The median seconds of so many calls, each after the GPU's last cache was emptied; on a
    CPU, where kernels take from microseconds to seconds, of those that fit into one second,
    three at least.
    """
    flush = (
        torch.empty(FLUSHED, dtype=torch.int8, device=device)
        if device.type == "cuda"
        else None
    )
    run()
    found = []
    for _ in range(calls):
        if flush is not None:
            flush.zero_()
        found.append(seconds_of(run, device))
        if flush is None and len(found) >= 3 and sum(found) > 1:
            break
    return median(found)


def in_graph(run: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph: what is left is the time of its kernels, without that of
    launching them.
    """
    graph = torch.cuda.CUDAGraph()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --- the table -------------------------------------------------------------------------------


def no_memory(kernel: str) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "shape": "",
        "rows": 0,
        "failed": "its process ended, most likely for want of memory",
    }


def table_head(report: dict[str, Any]) -> str:
    """What was measured where, and the names of the columns."""
    names = "".join(
        f"{name:>12}"
        for name in ("rows", "kernel, us", "floor, us", "of it", "PyTorch, us", "ratio", "MB")
    )
    return f"{report['config']['dtype']}; {place(report)}; medians\n{'':19}{'':14}{names}"


def table_row(row: dict[str, Any]) -> str:
    """The times of a kernel at one size; what is unknown is a dash."""
    named = f"{row['kernel']:19}{row['shape']:14}{row['rows']:12}"
    if "failed" in row:
        return f"{named}  {row['failed']}"
    kernel = row["kernel_s"]
    floor = row["floor_s"]
    reference = row["reference_s"]
    cells = [
        f"{kernel * 1e6:.1f}",
        f"{floor * 1e6:.1f}",
        f"{floor / kernel:.0%}",
        "-" if reference is None else f"{reference * 1e6:.1f}",
        "-" if reference is None else f"{reference / kernel:.2f}",
        "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}",
    ]
    return named + "".join(f"{cell:>12}" for cell in cells)
