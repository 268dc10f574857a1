"""Every kernel against its floor and its PyTorch reference.

    python -m nanomath bench kernels [CONFIG.toml] [key=value ...] | --check
    python -m nanomath bench kernels kernels=paged_attention rows=64,256 context=4096

The floor is the time in which this machine, as measured just after, can read and write what the
kernel must, or make its matrix products. Times are medians: of a second of calls on a CPU, where
the C++ kernels run (truncated_sample has none, and is PyTorch twice); on a GPU of
triton.testing.do_bench's, each with an empty last cache and the kernel in a CUDA graph, unless
it has a backward pass. MB: the peak of the first call; ratio: PyTorch's time / the kernel's.
--check runs tests/kernels and tests/gpu instead, where there is no GPU on a pretended one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

import nanomath
from kernels import (
    attention,
    linear,
    linear_logprob,
    lm_head,
    products,
    rms_norm,
    swiglu,
)
from kernels import causal_attention as attention_forms
from kernels import rope_write as rope
from kernels import truncation as cut
from kernels.backend import triton
from nanomath.commands.bench import measure
from nanomath.config import option, parse_arguments
from nanomath.models import ModelConfig
from nanomath.rollout.floor import measure_machine
from nanomath.training.sittings import peak_memory

GROUP = 16  # samples of a prompt, where a kernel can share it
SEQUENCE = 128  # tokens of a sequence in training
MEASURED = 1.0  # seconds of calls on a CPU


@dataclass(frozen=True)
class Setting(ModelConfig):
    """A model's shape and the size of a call."""

    rows: int = 0  # of a decoding step, or tokens of a training step
    context: int = 0
    dtype: torch.dtype = torch.float32

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype)


@dataclass(frozen=True)
class Case:
    """A kernel in the form for the device, its PyTorch reference, and what both must do."""

    kernel: Callable
    reference: Callable
    arguments: tuple
    flops: float = 0  # of matrix products
    moved: float = 0  # bytes that must be read or written; 0: arguments and results


def add_rms_norm_case(s: Setting) -> Case:
    x, delta = s.random(2, s.rows, s.hidden_size)
    arguments = x, delta, s.random(s.hidden_size), s.norm_eps
    return Case(rms_norm.add_rms_norm, rms_norm.add_rms_norm_reference, arguments)


def swiglu_case(s: Setting) -> Case:
    gate_up = s.random(s.rows, 2 * s.intermediate_size)
    return Case(swiglu.swiglu, swiglu.swiglu_reference, (gate_up,))


def cache(s: Setting) -> tuple:
    """Return the pages of the context of every row, and the rows' slots."""
    device = torch.get_default_device()
    pages = -(-s.context // attention.page_size(device))
    heads = s.num_kv_heads, s.head_dim
    keys, values = attention.new_pages((s.rows * pages,), *heads, s.dtype, device)
    table = torch.randperm(s.rows * pages).view(s.rows, pages).int()
    filled = attention.Pages(keys.normal_(), values.normal_(), table)
    return filled, torch.arange(s.rows, dtype=torch.int32)


def rope_write_case(s: Setting) -> Case:
    pages, slot = cache(s)
    heads = s.num_heads + 2 * s.num_kv_heads
    qkv = s.random(s.rows, heads * s.head_dim)
    half = s.random(2, s.context, s.head_dim // 2)
    cos, sin = half.repeat(1, 1, 2)  # both halves of a row are alike
    position = torch.randint(s.context, slot.shape, dtype=torch.int32)
    forms = rope.rope_write, rope.rope_write_reference
    return Case(*forms, (qkv, position, slot, (cos, sin), pages), moved=2 * qkv.nbytes)


def attention_case(s: Setting, group: int = 1) -> Case:
    """Decoding. In groups, all of the context but its last page is the prompt's."""
    pages, slot = cache(s)
    kernel = attention.paged_attention
    q = s.random(s.rows, s.num_heads, s.head_dim)
    shared = (pages.table.shape[1] - 1) * (group > 1)
    if group > 1:
        first = pages.table[::group, :shared]
        pages.table[:, :shared] = first.repeat_interleave(group, 0)
        most = attention.rows_per_tile(s.num_heads, s.num_kv_heads)
        parts = [part for rows in slot.view(-1, group) for part in rows.split(most)]
        tiles = pad_sequence(parts, True, -1)
        known = torch.full_like(tiles[:, 0], shared)
        kernel = partial(kernel, tiles=tiles, shared=known)
    common = shared * pages.keys.shape[2]  # tokens that are read once for a group
    read = s.rows * s.context - (s.rows - s.rows // group) * common
    a_token = 2 * s.num_kv_heads * s.head_dim * q.itemsize
    arguments = q, pages, slot, torch.full_like(slot, s.context)
    work = 4 * s.context * q.numel(), 2 * q.nbytes + read * a_token
    return Case(kernel, attention.paged_attention_reference, arguments, *work)


def linear_case(s: Setting) -> Case:
    """gate_up; the reference is the library's product."""
    x = s.random(s.rows, s.hidden_size)
    weight = s.random(2 * s.intermediate_size, s.hidden_size)
    flops = 2 * s.rows * weight.numel()
    return Case(linear.invariant_linear, F.linear, (x, weight), flops)


def sample_case(s: Setting) -> Case:
    hidden = s.random(s.rows, s.hidden_size)
    weight = s.random(s.vocab_size, s.hidden_size)
    arguments = hidden, weight, torch.rand(s.rows, 2), 1.0
    flops = 2 * s.rows * weight.numel()
    return Case(lm_head.sample, lm_head.sample_reference, arguments, flops)


def truncation_case(s: Setting) -> Case:
    arguments = s.random(s.rows, s.vocab_size), torch.rand(s.rows, 2)
    forms = cut.truncated_sample, cut.truncated_sample_reference
    return Case(*forms, (*arguments, 1.0, 50, 0.95, 0.0))  # top-k 50, top-p 0.95


def logprob_case(s: Setting) -> Case:
    """Forward and backward, which need four products; the reference makes all logits at once."""
    hidden = s.random(s.rows, s.hidden_size)
    weight = s.random(s.vocab_size, s.hidden_size).mul_(0.02)
    target = torch.randint(s.vocab_size, (s.rows,))
    arguments = hidden.requires_grad_(), weight.requires_grad_(), target
    forms = linear_logprob.linear_logprob, linear_logprob.linear_logprob_reference
    flops = 8 * s.rows * weight.numel()
    return Case(*(partial(gradients, form) for form in forms), arguments, flops)


def training_attention_case(s: Setting) -> Case:
    """Forward and backward, of sequences of at most SEQUENCE tokens."""
    length = min(s.rows, SEQUENCE)
    pieces = attention_forms.whole_rows(s.rows // length, length)
    tokens = s.rows // length * length
    heads = s.random(tokens, s.num_heads + 2 * s.num_kv_heads, s.head_dim)
    angles = torch.rand(s.head_dim // 2), torch.arange(tokens)
    given = s.num_kv_heads, rope.rope_tables(*angles, s.dtype), pieces
    forms = attention_forms.causal_attention, attention_forms.library_attention
    forms = (partial(gradients, form) for form in forms)
    # Two products forward and five backward, of the half of the scores that is seen
    flops = 7 * length * tokens * s.num_heads * s.head_dim
    return Case(*forms, (heads.requires_grad_(), *given), flops)


def training_linear_case(s: Setting) -> Case:
    """gate_up, forward and backward: three products."""
    x = s.random(s.rows, s.hidden_size).requires_grad_()
    weight = s.random(2 * s.intermediate_size, s.hidden_size).requires_grad_()
    forms = (partial(gradients, form) for form in (products.linear, F.linear))
    return Case(*forms, (x, weight), 6 * s.rows * weight.numel())


def gradients(function: Callable, *arguments: Tensor) -> tuple:
    """Return those of the mean of the result, or of the first of several, by the arguments
    that have one.
    """
    found = function(*arguments)
    mean = (found if isinstance(found, Tensor) else found[0]).mean()
    given = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    return torch.autograd.grad(mean, given)


CASES = {
    "add_rms_norm": add_rms_norm_case,
    "rope_write": rope_write_case,
    "paged_attention": attention_case,
    "grouped_attention": partial(attention_case, group=GROUP),
    "swiglu": swiglu_case,
    "invariant_linear": linear_case,
    "sample": sample_case,
    "truncated_sample": truncation_case,
    "linear": training_linear_case,
    "causal_attention": training_attention_case,
    "linear_logprob": logprob_case,
}
TRAINED = ("linear", "causal_attention", "linear_logprob")


@dataclass
class KernelBench(measure.Bench):
    """Which kernels, at which sizes."""

    kernels: list[str] = option(list(CASES), "what to measure", choices=CASES)
    shapes: list[str] = option(["qwen2.5-0.5b"], "models", choices=measure.SHAPES)
    rows: list[int] = option([16], "rows of a decoding step", minimum=1)
    context: int = option(1024, "tokens that each row attends to", minimum=1)
    tokens: int = option(256, f"tokens of {', '.join(TRAINED)}", minimum=1)
    repeats: int = option(1, "processes for each number; the best counts", minimum=1)


def main(argv: list[str]) -> int:
    """Measure the kernels, each call in a process of its own, or run their tests."""
    flags = {"--check": "run the kernels' tests instead"}
    config, chosen = parse_arguments(KernelBench, argv, __doc__, flags)
    if chosen:
        root = Path(nanomath.__file__).parents[1]
        if not (root / "tests").is_dir():
            raise FileNotFoundError(f"--check runs a clone's tests: none in {root}")
        tests = "-p", "no:cacheprovider", "tests/kernels", "tests/gpu"
        return subprocess.run([sys.executable, "-mpytest", *tests], cwd=root).returncode
    if "grouped_attention" in config.kernels and any(n % GROUP for n in config.rows):
        raise ValueError(f"rows={config.rows}: groups need multiples of {GROUP}")
    config.prepare()
    cases = [
        {"kernel": kernel, "shape": shape, "rows": rows}
        for kernel, shape in product(config.kernels, config.shapes)
        for rows in ([config.tokens] if kernel in TRAINED else config.rows)
    ]
    sides = {"kernel": measure_call, "PyTorch": partial(measure_call, ours=False)}
    return measure.report(["kernels", *argv], config, cases, sides)


def measure_call(
    config: KernelBench, kernel: str, shape: str, rows: int, ours: bool = True
) -> dict:
    """Return the numbers of a call of a kernel with its floor, or of its reference."""
    size = {"rows": rows, "context": config.context, "dtype": config.torch_dtype}
    with torch.device(config.device):  # not around the calls, each of which it slows
        case = CASES[kernel](Setting(**vars(measure.SHAPES[shape]), **size))
    run = partial(case.kernel if ours else case.reference, *case.arguments)
    before = peak_memory(config.place, restart=True)
    tensors = [x for x in tree_leaves((case.arguments, run())) if isinstance(x, Tensor)]
    found = {"MB": (peak_memory(config.place) - before) / 1e6}
    if config.on_gpu:
        if ours and not any(x.requires_grad for x in tensors):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run = graph.replay
        found["ms"] = triton.testing.do_bench(run, return_mode="median")
    else:
        timer = Timer(
            "run()", globals={"run": run}, num_threads=torch.get_num_threads()
        )
        found["ms"] = 1e3 * timer.blocked_autorange(min_run_time=MEASURED).median
    if ours:
        machine = measure_machine(config.place, config.torch_dtype)
        moved = case.moved or sum(x.nbytes for x in tensors)
        floor = 1e3 * machine.seconds(moved, case.flops)
        found |= {"floor, ms": floor, "of floor": floor / found["ms"]}
    return found
