"""What the tests of the kernels share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned() -> None:
    """In this mode PyTorch fills what is allocated with NaN, so that what a kernel never
    writes shows.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
