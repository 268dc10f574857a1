"""The calls of `bench kernels`: each kernel and its reference, and what it must move and
multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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
from nanomath.commands.bench.training import materialised_logprob
from nanomath.models import ModelConfig

GROUP = 16  # samples of a prompt, where a kernel can share it
TRUNCATION = (1.0, 50, 0.95, 0.0)  # temperature, top-k, top-p, min-p


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

    def integers(self, below: int, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(below, (count,), device=self.device, dtype=dtype)

    def uniform(self) -> Tensor:
        return torch.rand(self.rows, 2, device=self.device)


@dataclass(frozen=True)
class Case:
    """A kernel in the form for the device, its PyTorch reference, bytes that must be read or
    written, and FLOPs of matrix products.
    """

    kernel: Callable[[], object]
    reference: Callable[[], object]
    moved: float
    flops: float = 0
    in_graph: bool = True  # whether a CUDA graph can hold it


def add_rms_norm_case(s: Setting) -> Case:
    x, delta = s.random(2, s.rows, s.config.hidden_size)
    arguments = x, delta, s.random(s.config.hidden_size), s.config.norm_eps
    forms = (
        partial(form, *arguments)
        for form in (rms_norm.add_rms_norm, rms_norm.add_rms_norm_reference)
    )
    return Case(*forms, moved=4 * x.nbytes)


def swiglu_case(s: Setting) -> Case:
    gate_up = s.random(s.rows, 2 * s.config.intermediate_size)
    forms = (partial(form, gate_up) for form in (swiglu.swiglu, swiglu.swiglu_reference))
    return Case(*forms, moved=1.5 * gate_up.nbytes)


def cache(s: Setting) -> tuple[attention.Pages, Tensor]:
    """The pages of the context of every row, and the rows' slots."""
    device = torch.device(s.device)
    c = s.config
    pages = -(-s.context // attention.page_size(device))
    keys, values = attention.new_pages(
        (s.rows * pages,), c.num_kv_heads, c.head_dim, s.dtype, device
    )
    keys.normal_()
    values.normal_()
    table = torch.randperm(s.rows * pages, device=s.device).view(s.rows, pages).int()
    return attention.Pages(keys, values, table), torch.arange(
        s.rows, device=s.device, dtype=torch.int32
    )


def rope_write_case(s: Setting) -> Case:
    pages, slot = cache(s)
    qkv = s.random(
        s.rows, (s.config.num_heads + 2 * s.config.num_kv_heads) * s.config.head_dim
    )
    angles = s.random(2, s.context, s.config.head_dim // 2).repeat(
        1, 1, 2
    )  # as cos and sin: both halves are alike
    arguments = qkv, s.integers(s.context, s.rows), slot, tuple(angles), pages
    forms = (
        partial(form, *arguments)
        for form in (rope_write.rope_write, rope_write.rope_write_reference)
    )
    return Case(*forms, moved=2 * qkv.nbytes)


def attention_case(s: Setting, group: int = 1) -> Case:
    """Decoding. In groups, all of the context but its last page is the prompt's."""
    pages, slot = cache(s)
    shared = 0
    tiles = ()
    if group > 1:
        shared = pages.table.shape[1] - 1
        pages.table[:, :shared] = pages.table[::group, :shared].repeat_interleave(group, 0)
        most = attention.rows_per_tile(s.config.num_heads, s.config.num_kv_heads)
        width = next(
            group // parts
            for parts in range(1, group + 1)
            if group % parts == 0 and group // parts <= most
        )
        tiles = None, slot.view(-1, width), torch.full_like(slot[: s.rows // width], shared)
    q = s.random(s.rows, s.config.num_heads, s.config.head_dim)
    length = torch.full_like(slot, s.context)
    arguments = q, pages, slot, length
    common = shared * pages.keys.shape[2]
    read = s.rows * (s.context - common) + s.rows // group * common
    return Case(
        partial(attention.paged_attention, *arguments, *tiles),
        partial(attention.paged_attention_reference, *arguments),
        moved=2 * q.nbytes + 2 * read * s.config.num_kv_heads * s.config.head_dim * q.itemsize,
        flops=4 * s.rows * s.context * s.config.num_heads * s.config.head_dim,
    )


def linear_case(s: Setting) -> Case:
    """gate_up; the reference is the library's product."""
    x = s.random(s.rows, s.config.hidden_size)
    weight = s.random(2 * s.config.intermediate_size, s.config.hidden_size)
    return Case(
        partial(linear.invariant_linear, x, weight),
        partial(F.linear, x, weight),
        moved=x.nbytes + weight.nbytes + s.rows * len(weight) * x.itemsize,
        flops=2 * s.rows * weight.numel(),
    )


def sample_case(s: Setting) -> Case:
    hidden = s.random(s.rows, s.config.hidden_size)
    weight = s.random(s.config.vocab_size, s.config.hidden_size)
    arguments = hidden, weight, s.uniform(), 1.0
    forms = (partial(form, *arguments) for form in (lm_head.sample, lm_head.sample_reference))
    return Case(*forms, moved=weight.nbytes, flops=2 * s.rows * weight.numel())


def truncation_case(s: Setting) -> Case:
    arguments = s.random(s.rows, s.config.vocab_size), s.uniform(), *TRUNCATION
    names = truncation.truncated_sample, truncation.truncated_sample_reference
    return Case(*(partial(form, *arguments) for form in names), moved=arguments[0].nbytes)


def record_case(s: Setting) -> Case:
    """Rows that are done, which could go on like this for ever."""
    drawn = s.integers(9, s.rows, torch.int64), *torch.zeros(2, s.rows, device=s.device)
    token, count, limit = torch.zeros(3, s.rows, dtype=torch.int64, device=s.device)
    tokens = torch.zeros(s.rows, s.context + 1, dtype=torch.int64, device=s.device)
    logprobs, sampling = torch.zeros(2, s.rows, s.context + 1, device=s.device)
    state = token, count.int(), count, limit, limit == 0, tokens, logprobs, sampling
    arguments = drawn, state, torch.tensor([9], device=s.device)
    forms = (partial(form, *arguments) for form in (record.record, record.record_reference))
    return Case(
        *forms, moved=s.rows * (16 + 17 + 25)
    )  # read: what was drawn, the state; written


def logprob_case(s: Setting) -> Case:
    """Forward and backward, in which four products must be made; the reference makes all
    logits at once.
    """
    hidden = s.random(s.tokens, s.config.hidden_size).requires_grad_()
    weight = s.random(s.config.vocab_size, s.config.hidden_size).mul_(0.02).requires_grad_()
    target = s.integers(s.config.vocab_size, s.tokens, torch.int64)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(function(hidden, weight, target)[0].mean(), (hidden, weight))

    return Case(
        partial(gradients, linear_logprob.linear_logprob),
        partial(gradients, materialised_logprob),
        moved=3 * weight.nbytes + 2 * hidden.nbytes,
        flops=8 * s.tokens * weight.numel(),
        in_graph=False,
    )


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
WITHOUT_CPU_FORM = ("truncated_sample", "record")  # on a CPU they are their PyTorch references
