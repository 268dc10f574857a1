"""What many tests share: two processes of one thread each, no waiting for the disk, the world's
tokenizer, small random models, an optimizer that only looks.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: it then runs kernels on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

from nanomath import settings
from nanomath.data.world import CHAT_TEMPLATE, world_tokenizer
from nanomath.models import ModelConfig, Tokenizer, Transformer, save_model
from nanomath.training.build import build_model

torch.set_num_threads(1)
gc.disable()  # until all is collected, of which nothing is garbage

SHAPES = {
    "llama": {},
    "without groups": {"num_kv_heads": 4, "tie_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "qwen3": {
        "model_type": "qwen3",
        "qk_norm": True,
        "head_dim": 12,
        "num_kv_heads": 1,
    },
}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The quick part as a whole runs in two processes, every file in one of them, where
    pytest-xdist is installed. -n says how many; -n 0 is none but this one.
    """
    option = config.option
    whole = option.markexpr == "not slow" and not option.file_or_dir
    ours = not hasattr(config, "workerinput") and not option.usepdb
    if whole and ours and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist = 2, "loadfile"


def pytest_collection_finish() -> None:
    gc.enable()


class Float64Transformer(Transformer):
    """The same transformer without the rounding of its logits to float32, for comparisons to
    1e-10.
    """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)


@pytest.fixture(scope="session", autouse=True)
def products_in_one_order() -> Iterator[None]:
    """An element of an interpreted tl.dot is one sum in order, the same wherever it stands in
    a tile, as on a GPU. Triton's interpreter multiplies by NumPy, whose library adds up some
    rows of a tile differently on some processors.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        if (
            os.environ.get("TRITON_INTERPRET") == "1"
            and find_spec("triton") is not None
        ):
            from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

            def create_dot(_, a, b, d, *_options):
                total = d.data.copy()
                for k in range(a.data.shape[-1]):
                    total += np.multiply(
                        a.data[..., :, k, None],
                        b.data[..., k, None, :],
                        dtype=total.dtype,
                    )
                return TensorHandle(total, d.dtype.scalar)

            monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What a run puts on the disk itself two dozen times may stay in the system's memory; that
    it is put there, and when, tests of os.fsync hold.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where the Triton form of a kernel runs: on the GPU, or interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def same_torch_afterwards():
    """A run in this process may have asked for deterministic algorithms."""
    before = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(scope="session")
def new_tokenizer() -> Callable[[Sequence[int]], Tokenizer]:
    """new_tokenizer(eos_ids): the world's tokenizer; a model of random weights ends only if
    many ids are an eos.
    """

    def make(eos_ids: Sequence[int] = ()) -> Tokenizer:
        return Tokenizer(
            world_tokenizer(), CHAT_TEMPLATE, eos_ids, eos_token="<|endoftext|>"
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(new_tokenizer) -> Tokenizer:
    """The world's tokenizer as it is."""
    return new_tokenizer()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A model of random weights with the tokenizer of the world, and a context of 192 tokens."""
    directory = tmp_path_factory.mktemp("models") / "random"
    shape = settings.NewModel(
        hidden_size=32,
        layers=1,
        heads=2,
        kv_heads=1,
        intermediate_size=64,
        max_positions=192,
    )
    save_model(*build_model(settings.Model(device="cpu", new=shape), seed=1), directory)
    return directory


@pytest.fixture(scope="session")
def new_model(tokenizer) -> Callable[..., Transformer]:
    """new_model(seed, dtype, **changes of the config): a model whose logits depend strongly on
    all it sees.
    """

    def make(
        seed: int = 0, dtype: torch.dtype = torch.float32, **changes
    ) -> Transformer:
        config = {
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_positions": 128,
        }
        kind = Float64Transformer if dtype == torch.float64 else Transformer
        model = kind(ModelConfig(**{**config, **changes}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    noise * 0.3 if parameter.dim() == 2 else 1 + noise * 0.2
                )
        return model.to(dtype)

    return make


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def family_shape(request) -> dict:
    """Changes of the config that give each family's arithmetic."""
    return request.param


class Recorder:
    """Keeps the gradients it is asked to step along, and leaves the weights alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []

    def step(self, lr: float) -> dict[str, float]:
        parameters = dict(self.model.named_parameters())
        zero = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.gradients.append(
            zero
            | {
                name: p.grad.clone()
                for name, p in parameters.items()
                if p.grad is not None
            }
        )
        self.rates.append(lr)
        self.model.zero_grad()
        return {"grad_norm": 0.0, "update_ratio": 0.0}


@pytest.fixture
def recorder() -> Callable[[torch.nn.Module], Recorder]:
    return Recorder
