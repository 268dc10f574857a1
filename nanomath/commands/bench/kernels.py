"""Every kernel against its floor and its PyTorch reference.

    python -m nanomath bench kernels [--check] [CONFIG.toml] [key=value ...]

    python -m nanomath bench kernels
    python -m nanomath bench kernels kernels=paged_attention rows=64,256 context=4096
    python -m nanomath bench kernels --check

The floor is the time in which this machine, as measured just before, can read and write what
the kernel must, or make its matrix products. On a GPU a call is replayed from a CUDA graph, the
last cache emptied before each; the kernels of training run as they are. On a CPU the C++
kernels are timed; truncated_sample and record have none, and are PyTorch twice. --check runs
tests/kernels and tests/gpu instead, on the GPU, or where there is none by Triton's interpreter
and on a pretended GPU. Its exit code is pytest's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import nanomath
from kernels import (
    attention,
    linear,
    linear_logprob,
    lm_head,
    record,
    rms_norm,
    rope_write,
    swiglu,
    truncation,
)
from nanomath.commands.bench.measure import (
    SHAPES,
    Bench,
    Found,
    Report,
    in_new_process,
    in_one_line,
    number,
    peak_memory,
    ratio,
    this_machine,
)
from nanomath.commands.bench.training import materialised_logprob
from nanomath.config import option, parse_arguments
from nanomath.models import ModelConfig
from nanomath.rollout.floor import Machine, seconds_of

CHECKS = ("tests/kernels", "tests/gpu")  # what --check runs
FLUSHED = 256 << 20  # bytes written to empty a GPU's last cache
GROUP = 16  # samples of a prompt, where a kernel can share it
TRUNCATION = (1.0, 50, 0.95, 0.0)  # temperature, top-k, top-p, min-p

# --- the calls -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model's shape and the size of a call."""

    config: ModelConfig
    rows: int  # of a decoding step
    context: int
    tokens: int  # of a training step
    device: str
    dtype: torch.dtype

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def uniform(self) -> Tensor:
        return torch.rand(self.rows, 2, device=self.device)


@dataclass(frozen=True)
class Case:
    """A kernel in the form for the device, its PyTorch reference, and what both must do."""

    kernel: Callable[..., object]
    reference: Callable[..., object]
    arguments: tuple
    moved: float  # bytes that must be read or written
    flops: float = 0  # of matrix products
    in_graph: bool = True  # whether a CUDA graph can hold it


def add_rms_norm_case(s: Setting) -> Case:
    x, delta = s.random(2, s.rows, s.config.hidden_size)
    arguments = x, delta, s.random(s.config.hidden_size), s.config.norm_eps
    forms = rms_norm.add_rms_norm, rms_norm.add_rms_norm_reference
    return Case(*forms, arguments, moved=4 * x.nbytes)


def swiglu_case(s: Setting) -> Case:
    gate_up = s.random(s.rows, 2 * s.config.intermediate_size)
    return Case(
        swiglu.swiglu, swiglu.swiglu_reference, (gate_up,), moved=1.5 * gate_up.nbytes
    )


def cache(s: Setting) -> tuple[attention.Pages, Tensor]:
    """Return the pages of the context of every row, and the rows' slots."""
    device = torch.device(s.device)
    pages = -(-s.context // attention.page_size(device))
    heads = s.config.num_kv_heads
    keys, values = attention.new_pages(
        (s.rows * pages,), heads, s.config.head_dim, s.dtype, device
    )
    keys.normal_()
    values.normal_()
    table = torch.randperm(s.rows * pages, device=device).view(s.rows, pages).int()
    slot = torch.arange(s.rows, device=device, dtype=torch.int32)
    return attention.Pages(keys, values, table), slot


def rope_write_case(s: Setting) -> Case:
    pages, slot = cache(s)
    heads = s.config.num_heads + 2 * s.config.num_kv_heads
    qkv = s.random(s.rows, heads * s.config.head_dim)
    half = s.random(2, s.context, s.config.head_dim // 2)
    cos, sin = half.repeat(1, 1, 2)  # both halves of a row are alike
    position = torch.randint(s.context, slot.shape, device=s.device, dtype=torch.int32)
    arguments = qkv, position, slot, (cos, sin), pages
    forms = rope_write.rope_write, rope_write.rope_write_reference
    return Case(*forms, arguments, moved=2 * qkv.nbytes)


def attention_case(s: Setting, group: int = 1) -> Case:
    """Decoding. In groups, all of the context but its last page is the prompt's."""
    pages, slot = cache(s)
    kernel = attention.paged_attention
    shared = 0
    if group > 1:
        shared = pages.table.shape[1] - 1
        pages.table[:, :shared] = pages.table[::group, :shared].repeat_interleave(
            group, 0
        )
        most = attention.rows_per_tile(s.config.num_heads, s.config.num_kv_heads)
        width = max(n for n in range(1, min(group, most) + 1) if group % n == 0)
        tiles = slot.view(-1, width)
        kernel = partial(
            kernel, tiles=tiles, shared=torch.full_like(tiles[:, 0], shared)
        )
    q = s.random(s.rows, s.config.num_heads, s.config.head_dim)
    common = shared * pages.keys.shape[2]
    read = s.rows * (s.context - common) + s.rows // group * common
    a_token = 2 * s.config.num_kv_heads * s.config.head_dim * q.itemsize
    return Case(
        kernel,
        attention.paged_attention_reference,
        (q, pages, slot, torch.full_like(slot, s.context)),
        moved=2 * q.nbytes + read * a_token,
        flops=4 * s.context * q.numel(),
    )


def linear_case(s: Setting) -> Case:
    """gate_up; the reference is the library's product."""
    x = s.random(s.rows, s.config.hidden_size)
    weight = s.random(2 * s.config.intermediate_size, s.config.hidden_size)
    moved = x.nbytes + weight.nbytes + s.rows * len(weight) * x.itemsize
    flops = 2 * s.rows * weight.numel()
    return Case(linear.invariant_linear, F.linear, (x, weight), moved, flops)


def sample_case(s: Setting) -> Case:
    hidden = s.random(s.rows, s.config.hidden_size)
    weight = s.random(s.config.vocab_size, s.config.hidden_size)
    arguments = hidden, weight, s.uniform(), 1.0
    flops = 2 * s.rows * weight.numel()
    return Case(
        lm_head.sample, lm_head.sample_reference, arguments, weight.nbytes, flops
    )


def truncation_case(s: Setting) -> Case:
    logits = s.random(s.rows, s.config.vocab_size)
    forms = truncation.truncated_sample, truncation.truncated_sample_reference
    return Case(*forms, (logits, s.uniform(), *TRUNCATION), moved=logits.nbytes)


def record_case(s: Setting) -> Case:
    """Rows that are done, which could go on like this for ever."""
    new_token = torch.randint(9, (s.rows,), device=s.device)
    drawn = new_token, *torch.zeros(2, s.rows, device=s.device)
    token, count, limit = torch.zeros(3, s.rows, dtype=torch.int64, device=s.device)
    tokens = torch.zeros(s.rows, s.context + 1, dtype=torch.int64, device=s.device)
    logprobs, sampling = torch.zeros(2, s.rows, s.context + 1, device=s.device)
    state = token, count.int(), count, limit, limit == 0, tokens, logprobs, sampling
    arguments = drawn, state, torch.tensor([9], device=s.device)
    moved = s.rows * (16 + 17 + 25)  # read: what was drawn, the state; written
    return Case(record.record, record.record_reference, arguments, moved)


def logprob_case(s: Setting) -> Case:
    """Forward and backward, which need four products; the reference makes all logits at once."""
    hidden = s.random(s.tokens, s.config.hidden_size).requires_grad_()
    weight = (
        s.random(s.config.vocab_size, s.config.hidden_size).mul_(0.02).requires_grad_()
    )
    target = torch.randint(s.config.vocab_size, (s.tokens,), device=s.device)
    return Case(
        _gradients_of(linear_logprob.linear_logprob),
        _gradients_of(materialised_logprob),
        (hidden, weight, target),
        moved=3 * weight.nbytes + 2 * hidden.nbytes,
        flops=8 * s.tokens * weight.numel(),
        in_graph=False,
    )


def _gradients_of(
    function: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., object]:
    def gradients(hidden: Tensor, weight: Tensor, target: Tensor) -> object:
        mean = function(hidden, weight, target)[0].mean()
        return torch.autograd.grad(mean, (hidden, weight))

    return gradients


CASES: dict[str, Callable[[Setting], Case]] = {
    "add_rms_norm": add_rms_norm_case,
    "rope_write": rope_write_case,
    "paged_attention": attention_case,
    "grouped_attention": partial(attention_case, group=GROUP),
    "swiglu": swiglu_case,
    "invariant_linear": linear_case,
    "sample": sample_case,
    "truncated_sample": truncation_case,
    "record": record_case,
    "linear_logprob": logprob_case,
}
OF_TOKENS = ("linear_logprob",)  # takes the tokens of a training step instead of rows

# --- the command -----------------------------------------------------------------------------


@dataclass
class KernelBench(Bench):
    """Which kernels, at which sizes."""

    kernels: list[str] = option(list(CASES), "what to measure", choices=tuple(CASES))
    shapes: list[str] = option(
        [], "models; empty: qwen2.5-0.5b, on a GPU 1.5b as well", choices=tuple(SHAPES)
    )
    rows: list[int] = option(
        [], "rows of a decoding step; empty: 16, on a GPU 64 and 256", minimum=1
    )
    context: int = option(1024, "tokens that each row attends to", minimum=1)
    tokens: int = option(
        0, "tokens of a training step, 0: 256, on a GPU 8192", minimum=0
    )
    calls: int = option(20, "calls for each number; the median counts", minimum=1)


def main(argv: list[str]) -> int:
    """Measure the kernels, each in a process of its own, or run their tests."""
    flags = {"--check": "run the kernels' tests instead"}
    config, chosen = parse_arguments(KernelBench, argv, __doc__, flags)
    if chosen:
        return check()
    config.choose_machine()
    choose_sizes(config)
    report = Report("kernels", argv, config)
    machine = this_machine(config)
    report.content["machine"] = asdict(machine)
    report.head(
        "medians; of floor: floor / kernel; ratio: PyTorch / kernel, above 1 is better",
        columns=["kernel            ", "shape       ", "rows", "kernel, us", "floor, us"]
        + ["of floor", "PyTorch, us", "ratio", "peak MB"],
    )
    for kernel in config.kernels:
        found = in_new_process(config.threads, measure, kernel, config, machine)
        for row in found.get("rows", [{"kernel": kernel, **found}]):
            report.add(row, *table_row(row))
    return int(report.failed)


def check() -> int:
    """Return pytest's exit code for CHECKS. An error says what is missing to run them."""
    root = Path(nanomath.__file__).parents[1]
    if lacking := [tests for tests in CHECKS if not (root / tests).is_dir()]:
        raise FileNotFoundError(
            f"--check runs the repository's {' and '.join(lacking)}, and {root} has none"
        )
    if find_spec("pytest") is None:
        raise ImportError("--check needs pytest: pip install pytest hypothesis")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *CHECKS]
    return subprocess.run(command, cwd=root, check=False).returncode


def choose_sizes(config: KernelBench) -> None:
    """Put in what is left to be chosen. ValueError for rows that make no groups."""
    gpu = config.on_gpu
    config.shapes = config.shapes or ["qwen2.5-0.5b", "qwen2.5-1.5b"][: 1 + gpu]
    config.rows = config.rows or ([64, 256] if gpu else [16])
    config.tokens = config.tokens or (8192 if gpu else 256)
    if "grouped_attention" in config.kernels and any(
        rows % GROUP for rows in config.rows
    ):
        raise ValueError(
            f"rows={config.rows}: grouped_attention needs multiples of {GROUP}"
        )


def table_row(row: Found) -> tuple:
    """Return the cells of a row, and why it failed as a note."""
    if "failed" in row:
        return [row["kernel"], row.get("shape", "")], f"failed: {row['failed']}"
    kernel = row["kernel_s"]
    reference = row["reference_s"]
    cells = [row["kernel"], row["shape"], str(row["rows"]), number(kernel, 1, 1e6)]
    cells += [number(row["floor_s"], 1, 1e6), f"{row['floor_s'] / kernel:.0%}"]
    cells += [number(reference, 1, 1e6), ratio(reference, kernel)]
    return ([*cells, number(row["bytes"], 0, 1e-6)],)


# --- in the measured process -----------------------------------------------------------------


def measure(kernel: str, config: KernelBench, machine: Machine) -> Found:
    """Return a row for every shape and number of rows; one that fails is the last."""
    found: list[Found] = []
    dtype = getattr(torch, config.dtype)
    sizes = [config.tokens] if kernel in OF_TOKENS else config.rows
    for shape in config.shapes:
        for rows in sizes:
            found.append({"kernel": kernel, "shape": shape, "rows": rows})
            setting = Setting(
                SHAPES[shape], rows, config.context, config.tokens, config.device, dtype
            )
            try:
                found[-1] |= measure_case(CASES[kernel](setting), config, machine)
            except Exception as error:  # noqa: BLE001 - whatever a kernel raises is a result
                found[-1]["failed"] = in_one_line(error)
                return {"rows": found}  # the device may be of no more use
    return {"rows": found}


def measure_case(case: Case, config: KernelBench, machine: Machine) -> Found:
    """Return seconds of both forms, the floor, and peak bytes of the kernel on a GPU.

    The reference's seconds are None where it runs out of memory.
    """
    device = torch.device(config.device)
    found: Found = {"floor_s": machine.seconds(case.moved, case.flops), "bytes": None}
    kernel = partial(case.kernel, *case.arguments)
    if config.on_gpu:
        before = peak_memory(device, restart=True)
        kernel()
        found["bytes"] = peak_memory(device) - before
        if case.in_graph:
            kernel = in_graph(kernel)
    found["kernel_s"] = typical(kernel, device, config.calls)
    found["reference_s"] = None
    with suppress(torch.OutOfMemoryError):
        reference = partial(case.reference, *case.arguments)
        found["reference_s"] = typical(reference, device, config.calls)
    return found


def typical(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Return the median seconds of so many calls, a GPU's last cache emptied before each.

    On a CPU, where kernels take from microseconds to seconds, these are the calls that fit
    into one second, three at least.
    """
    gpu = device.type == "cuda"
    flush = torch.empty(FLUSHED if gpu else 0, dtype=torch.int8, device=device)
    run()
    found: list[float] = []
    while len(found) < calls and (gpu or len(found) < 3 or sum(found) < 1):
        flush.zero_()
        found.append(seconds_of(run, device))
    return median(found)


def in_graph(run: Callable[[], object]) -> Callable[[], None]:
    """Return the call as a CUDA graph: its kernels without the time of launching them."""
    graph = torch.cuda.CUDAGraph()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        run()
    return graph.replay
