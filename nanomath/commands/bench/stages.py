"""Where the time of a decoding step goes: operators, or on a GPU kernels, sorted into stages
by name and shape.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kernels.lm_head import BLOCK

LOOKS = 6  # reports of progress that are profiled; on a GPU there are several steps to one
STAGES = (
    "projections",
    "lm_head",
    "attention",
    "sampling",
    "elementwise",
    "other",
    "all in one",
)
Generate = Callable[[Callable[..., None]], object]  # given what to call with the progress
Shapes = Sequence[Sequence[int]]  # of an operator's inputs

# On a CPU an operator belongs to the first line that fits it. A layer works on matrices [rows,
# width]; tensors of three axes and more are heads, of attention.
CPU_KERNELS = {
    "attend": "attention",
    "rope_write": "attention",
    "lm_head": "sampling",
    "add_rms_norm": "elementwise",
    "swiglu": "elementwise",
    "linear": "projections",
    "decode": "all in one",
}
PRODUCTS = ("mm", "linear", "matmul")
ELEMENTWISE = (
    "add",
    "mul",
    "div",
    "silu",
    "norm",
    "mean",
    "rsqrt",
    "pow",
    "embedding",
    "copy_",
    "cat",
    "index",
)


def operator_stage(name: str, shapes: Shapes, vocabulary: int) -> str:
    """The stage of an operator, or of a kernel of kernels/cpu.cpp with its sizes, of a
    decoding step on a CPU.
    """
    kernel, *sizes = name.split(" ")
    if kernel in CPU_KERNELS:
        return (
            "lm_head"
            if kernel == "linear" and str(vocabulary) in sizes
            else CPU_KERNELS[kernel]
        )
    product = any(word in name for word in PRODUCTS) and any(
        len(shape) == 2 for shape in shapes
    )
    if product:
        return "lm_head" if any(vocabulary in shape for shape in shapes) else "projections"
    if any(_is_logits(shape, vocabulary) for shape in shapes):
        return "sampling"
    if any(len(shape) > 2 for shape in shapes):
        return "attention"
    return "elementwise" if any(word in name for word in ELEMENTWISE) else "other"


def _is_logits(shape: Sequence[int], vocabulary: int) -> bool:
    """Whether a tensor has a number for each token, in a row or in blocks."""
    blocks = -(-vocabulary // BLOCK)
    return list(shape[-1:]) in ([vocabulary], [blocks * BLOCK]) or list(shape[-2:]) == [
        blocks,
        BLOCK,
    ]


# On a GPU a kernel belongs to the first line that has a part of its name.
KERNELS = (
    ("attention", ("_split_kernel", "_merge_kernel", "_rope_write_kernel", "flash", "fmha")),
    ("lm_head", ("_blocks_kernel",)),
    (
        "sampling",
        (
            "_choose_kernel",
            "_truncation_kernel",
            "_record_kernel",
            "softmax",
            "searchsorted",
            "scan",
        ),
    ),
    ("elementwise", ("rms_norm", "swiglu", "elementwise", "embedding", "indexSelect")),
    (
        "projections",
        ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitKreduce", "_linear_kernel"),
    ),
)


def kernel_stage(name: str) -> str:
    """The stage of a GPU kernel of a decoding step."""
    return next(
        (stage for stage, parts in KERNELS if any(part in name for part in parts)), "other"
    )


def stage_shares(generate: Generate, vocabulary: int, gpu: bool) -> dict[str, float]:
    """Each stage's share of the time in operators during LOOKS reports of
    `generate(progress)`, after the first one: without prefill, and without making texts. Empty
    when there were not two reports.
    """
    activities = (
        [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    )
    profiler = profile(activities=activities, record_shapes=True)
    reports = 0
    stopped = False

    def progress(finished: int, *_: int) -> None:
        nonlocal reports, stopped
        reports += 1
        if reports == 1:
            profiler.start()
        elif not stopped and (finished or reports > LOOKS):
            profiler.stop()
            stopped = True

    with silent_stderr():
        generate(progress)
        if not stopped:
            profiler.stop()
    seconds = dict.fromkeys(STAGES, 0.0)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type == DeviceType.CUDA:
            seconds[kernel_stage(event.key)] += event.self_device_time_total
        elif not gpu:
            seconds[operator_stage(event.key, event.input_shapes, vocabulary)] += (
                event.self_cpu_time_total
            )
    total = sum(seconds.values())
    return (
        {stage: spent / total for stage, spent in seconds.items()} if stopped and total else {}
    )


@contextmanager
def silent_stderr() -> Iterator[None]:
    """The profiler's library writes notes of its own to the process's standard error."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
