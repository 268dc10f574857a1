"""Where the time of a decoding step goes: operators, or on a GPU kernels, sorted by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# An operator, or a kernel of kernels/cpu.cpp or of the GPU, belongs to the first stage of which
# its name has a part. Without the C++ kernels a CPU's attention and sampling share operators
# (exp, gather) that count as sampling.
STAGES = {
    "all in one": ("decode",),
    "attention": (
        *("attend", "rope_write", "_split_kernel", "_merge_kernel"),
        *("flash", "fmha", "attention", "bmm"),
    ),
    "lm_head": ("_blocks_kernel",),  # and the products with the vocabulary
    "sampling": (
        *("lm_head", "_choose_kernel", "_truncation_kernel", "_record_kernel"),
        *("softmax", "searchsorted", "scan", "exp", "aten::sum", "gather"),
    ),
    "projections": (
        *("linear", "mm", "matmul", "gemv", "nvjet", "cutlass", "splitKreduce"),
    ),
    "elementwise": (
        *("norm", "swiglu", "silu", "elementwise", "embedding", "index"),
        *("add", "mul", "div", "mean", "rsqrt", "pow", "copy_", "cat"),
    ),
}


def stage_of(name: str, shapes: Sequence[Sequence[int]], vocabulary: int) -> str:
    """Return the stage of an operator with inputs of these shapes, "other" for an unknown one.

    A C++ kernel has its sizes in its name.
    """
    fitting = [
        stage for stage, parts in STAGES.items() if any(part in name for part in parts)
    ]
    stage = fitting[0] if fitting else "other"
    sizes = {str(size) for shape in shapes for size in shape} | set(name.split(" "))
    if stage == "projections" and str(vocabulary) in sizes:
        return "lm_head"
    return stage


def stage_shares(
    generate: Callable[[Callable[..., None]], object], vocabulary: int, gpu: bool
) -> dict[str, float]:
    """Return each stage's share of the time in operators of `generate(progress)`.

    It counts from the first report of progress on: without the prefill. Empty when nothing
    was reported.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    profiler = profile(activities=activities, record_shapes=True)
    started = False

    def progress(*_: float) -> None:
        nonlocal started
        if not started:
            profiler.start()
        started = True

    with silent_stderr():
        generate(progress)
        if not started:
            return {}
        profiler.stop()
    seconds = dict.fromkeys((*STAGES, "other"), 0.0)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type == DeviceType.CUDA:
            seconds[stage_of(event.key, (), vocabulary)] += event.self_device_time_total
        elif not gpu:
            stage = stage_of(event.key, event.input_shapes, vocabulary)
            seconds[stage] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {stage: spent / total for stage, spent in seconds.items()} if total else {}


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Keep the notes that the profiler's library writes off the terminal."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
