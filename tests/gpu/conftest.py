"""The GPU of the tests in this folder: the machine's, or a pretended one where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from kernels import attention
from nanomath.models import Transformer

pytest.importorskip("triton")


@pytest.fixture
def gpu(monkeypatch) -> Iterator[bool]:
    """While a test runs there is a device "cuda"; whether it is real. Pages are small, as
    interpreting is slow.
    """
    monkeypatch.setattr(attention, "PAGE", 64)
    if torch.cuda.is_available():
        yield True
    else:
        from pretended_gpu import pretended_gpu

        with pretended_gpu():
            yield False


@pytest.fixture
def two_models(gpu, new_model) -> Callable[..., tuple[Transformer, Transformer]]:
    """two_models(dtype, **changes of the config): a small model on the CPU, and the same on
    the GPU.
    """

    def make(
        dtype: torch.dtype = torch.float32, **changes
    ) -> tuple[Transformer, Transformer]:
        small = {
            "hidden_size": 16,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "intermediate_size": 16,
        }
        model = new_model(
            1, dtype, **{**small, "num_layers": 1, "max_positions": 256, **changes}
        )
        return model, copy.deepcopy(model).to("cuda")

    return make
