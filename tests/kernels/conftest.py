"""What the tests of the kernels share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.backend import INTERPRETED


@pytest.fixture(autouse=True)
def products_in_one_order(monkeypatch) -> None:
    """An element of an interpreted tl.dot is one sum in order, as a GPU's is the same sum wherever it stands in a tile.
    Triton's interpreter multiplies by NumPy, whose library adds up the rows of a tile in different ways on some
    processors.
    """
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(_, a, b, d, *_options):
        total = d.data.copy()
        for k in range(a.data.shape[-1]):
            total += np.multiply(a.data[..., :, k, None], b.data[..., k, None, :], dtype=total.dtype)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def poisoned() -> None:
    """In this mode PyTorch fills what is allocated with NaN, so that what a kernel never writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
