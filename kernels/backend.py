"""Which form of a kernel runs: Triton on NVIDIA GPUs, the PyTorch reference everywhere else.

Every kernel file has both, and calls `runs_triton` on one of its tensors to choose. Where Triton is not installed the
files still import: a kernel is then a plain function that nobody calls. With TRITON_INTERPRET=1 Triton itself runs
kernels on CPU tensors, slowly, which is how the tests run them without a GPU.
"""

from __future__ import annotations

import os

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function):
    """`triton.jit`, or the function itself where there is no Triton."""
    return function if triton is None else triton.jit(function)


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton form is to be used for work on `tensor`. ImportError on a GPU that Triton is missing for."""
    if not tensor.is_cuda:
        return False
    if triton is None:
        raise ImportError("the kernels for this GPU need Triton: pip install triton, or use device cpu")
    return True
