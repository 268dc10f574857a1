"""The least time in which a machine can do a decoding step: what has to be read, and what has
to be multiplied.

    seconds of a stage = max(bytes read / bytes copied a second,
                             FLOPs / FLOPs a second of matrix products)

A step reads every weight once, whatever the number of rows, and the keys and values of every
row; activations, norms and biases are not counted. What is cached in faster memory may be read
faster than this: a model of a few megabytes can beat its floor on a CPU. The sum over the
stages is the floor, as no machine overlaps them in one stream of work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from kernels.packed import packed_linear
from nanomath.models.transformer import ModelConfig

# Bytes of what is copied: far more than the last cache holds.
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}
# (rows, width).
PRODUCTS = {
    "cpu": ((16, 2048), (64, 2048), (256, 2048)),
    "cuda": ((256, 8192), (4096, 8192)),
}


@dataclass(frozen=True)
class Machine:
    """The speeds that were measured on a machine."""

    copy_bytes_per_s: float  # bytes read plus bytes written
    gemm_flops_per_s: float  # two for each multiplication and addition

    def seconds(self, read: float, flops: float) -> float:
        """Return the least seconds in which so many bytes can be read and so many FLOPs
        computed.
        """
        return max(read / self.copy_bytes_per_s, flops / self.gemm_flops_per_s)


def step_floor(
    config: ModelConfig,
    rows: int,
    context: float,
    dtype: torch.dtype,
    machine: Machine,
    shared: float = 0,
    group: int = 1,
) -> dict[str, float]:
    """Return the least seconds of each stage of a decoding step.

    The step is of `rows` sequences with `context` tokens each. The first `shared` tokens of
    a context are common to `group` neighbouring rows and are read once for them.
    """
    c = config
    size = dtype.itemsize
    layers = config.num_layers
    heads = c.num_heads * c.head_dim
    kv_heads = c.num_kv_heads * c.head_dim
    attention = c.hidden_size * (2 * heads + 2 * kv_heads)  # q, k, v and o
    # Gate, up and down.
    projections = layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    lm_head = c.vocab_size * c.hidden_size
    seen = context if c.sliding_window is None else min(context, c.sliding_window)
    common = max(0, shared - (context - seen))  # of what is seen
    read = rows * (seen - common) + -(-rows // group) * common
    return {
        "projections": machine.seconds(projections * size, 2 * rows * projections),
        "lm_head": machine.seconds(lm_head * size, 2 * rows * lm_head),
        "attention": machine.seconds(
            2 * layers * kv_heads * size * read, 4 * layers * heads * rows * seen
        ),
    }


def measure_machine(
    device: torch.device | str, dtype: torch.dtype, seconds: float = 0.3
) -> Machine:
    """Measure for `seconds` each how fast this machine copies memory, and how fast it
    multiplies matrices of a decoding step's shapes in `dtype`.

    On a CPU the product is the sampler's own, with as many threads as torch uses.
    """
    device = torch.device(device)
    linear = packed_linear if device.type == "cpu" else F.linear
    rates = []
    for rows, width in PRODUCTS[device.type]:
        x, weight = (
            torch.randn(n, width, device=device, dtype=dtype) for n in (rows, width)
        )
        took = fastest(partial(linear, x, weight), device, seconds)
        rates.append(2 * rows * width**2 / took)
    return Machine(copied_per_s(device, COPIED[device.type], seconds), max(rates))


def copied_per_s(device: torch.device, size: int, seconds: float) -> float:
    """Measure for `seconds` how many bytes are read and written a second where so many are
    copied.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    took = fastest(lambda: target.copy_(source), device, seconds)
    return 2 * source.nbytes / took


def fastest(
    run: Callable[[], object], device: torch.device, seconds: float, least: int = 3
) -> float:
    """Return the seconds of the fastest of the calls that fit into `seconds`, and of at
    least so many.

    One more call comes before them and is not timed.
    """
    seconds_of(run, device)
    found = []
    until = time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < until:
        found.append(seconds_of(run, device))
    return min(found)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return how many seconds one call takes, on a GPU by the GPU's own clock."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
