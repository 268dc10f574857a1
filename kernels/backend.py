"""Which form of a kernel runs, and its gradient.

Every kernel has a PyTorch reference, which says what it computes, a Triton form for NVIDIA
GPUs beside it, and most have a CPU form in kernels/cpu.cpp. The function that is named like
the kernel checks its arguments, makes room for the result and runs the form for the device;
its argument `form` forces one of them, as the tests do. Where Triton is not installed the
files still import: a kernel is then a plain function that nobody calls. With
TRITON_INTERPRET=1 Triton itself runs kernels on CPU tensors, slowly, which is how the tests
run them without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels import compiled

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function, **options):
    """`triton.jit`, or the function itself where there is no Triton."""
    return function if triton is None else triton.jit(function, **options)


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton form is to be used for work on `tensor`. ImportError on a GPU that
    Triton is missing for.
    """
    if not tensor.is_cuda:
        return False
    if triton is None:
        raise ImportError(
            "the kernels for this GPU need Triton: pip install triton, or use device cpu"
        )
    return True


def form_for(tensor: Tensor) -> str:
    """The form to be used for work on `tensor`: "triton", "cpu" or "reference"."""
    if runs_triton(tensor):
        return "triton"
    return "cpu" if compiled.runs_compiled(tensor) else "reference"


def require(fits: bool, expected: str, **tensors: Tensor | None) -> None:
    """Unless the tensors fit, raise a ValueError that says what they are and what would fit."""
    if not fits:
        given = ", ".join(
            f"{name} {list(tensor.shape)} {tensor.dtype}"
            for name, tensor in tensors.items()
            if tensor is not None
        )
        raise ValueError(f"{given}: expected {expected}")


def form_with_gradient(tensor: Tensor) -> str:
    """As `form_for`, in training: kernels compute in float32."""
    return "reference" if tensor.dtype.itemsize > 4 else form_for(tensor)


def gradient_of(reference: Callable[..., Tensor]) -> Callable[..., tuple]:
    """Return the gradient of a function, which is computed again for it."""

    def gradient(*given: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in given[:-1]]
            return torch.autograd.grad(reference(*inputs), inputs, given[-1])

    return gradient


class Differentiable(torch.autograd.Function):
    """kernel(*inputs) with gradients gradient(*inputs, that of the result), one an input."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, kernel: Callable, gradient: Callable, *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.gradient = gradient
        return kernel(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradient(*ctx.saved_tensors, gradient)
