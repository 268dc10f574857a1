"""Logprobs of responses: the same gradients in less memory, and scoring that keeps nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from nanomath.models import Transformer
from nanomath.models.batches import (
    Batch,
    Example,
    layout_states,
    make_batch,
)
from nanomath.models.scores import response_logprobs, response_scores

VOCABULARY = 1024
EXAMPLES = [
    Example([5, 6, 7], [8, 9, 0]),
    Example([11], [0]),
    Example([3] * 9, [4, 1, 2, 3]),
    Example([30, 31], []),
]
LONG = [
    Example([i + 1] * 4, [j % 60 for j in range(100)]) for i in range(4)
]  # 400 response tokens


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile take at a time; what kernels use inside is
    not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if (
                storage is not None
                and storage not in self.known
                and id(storage) not in inputs
            ):
                self.known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_bytes(function: Callable[[], object]) -> int:
    with Peak() as peak:
        function()
    return peak.most


def materialised(model: Transformer, batch: Batch, temperature: float) -> Tensor:
    """Logprobs [n] from the logits of all states."""
    states = layout_states(model, batch.layout)
    logits = model.logits(states) / temperature
    return logits.log_softmax(-1)[batch.place, batch.target]


def gradients(model: Transformer, logprobs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (
        logprobs
        * torch.arange(1.0, 1 + logprobs.numel(), dtype=logprobs.dtype).view_as(
            logprobs
        )
    ).sum().backward()
    return {
        name: parameter.grad.clone() for name, parameter in model.named_parameters()
    }


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_are_those_of_the_materialised_logits(
    new_model, family_shape, temperature
):
    model, batch = new_model(dtype=torch.float64, **family_shape), make_batch(EXAMPLES)
    plain = materialised(model, batch, temperature)
    found, entropy = response_logprobs(model, batch, temperature)
    torch.testing.assert_close(found, batch.matrix(plain), rtol=0, atol=1e-10)
    assert found.shape == entropy.shape == (4, 4) and not entropy.requires_grad
    expected, mine = gradients(model, batch.matrix(plain)), gradients(model, found)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            mine[name], gradient, rtol=1e-9, atol=1e-10 * float(gradient.abs().max())
        )


def test_bfloat16_logprobs_are_float32(new_model):
    model, batch = new_model(dtype=torch.bfloat16), make_batch(EXAMPLES)
    logprobs, entropy = response_logprobs(model, batch)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(
        logprobs, batch.matrix(materialised(model, batch, 1.0)), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("token_budget", [0, 1, 12, 1000])
def test_score_gives_logprobs_and_entropies(new_model, token_budget):
    model = new_model()
    expected = [
        values.detach()
        for values in response_logprobs(model, make_batch(EXAMPLES), 0.7)
    ]
    for found, plain in zip(
        response_scores(model, EXAMPLES, token_budget, 0.7), expected, strict=True
    ):
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
        assert not found.requires_grad


def test_nothing_to_score(new_model):
    for examples in [], [Example([3, 4], [])]:
        logprobs, entropies = response_scores(new_model(), examples, 100)
        assert logprobs.tolist() == entropies.tolist() == [[0.0]] * len(examples)


# --- in less memory --------------------------------------------------------------------------


def test_the_vocabulary_never_materialises(new_model, monkeypatch):
    model, batch = new_model(vocab_size=VOCABULARY), make_batch(LONG)
    logits = 400 * VOCABULARY * 4
    monkeypatch.setattr("kernels.linear_logprob.CHUNK_LOGITS", 64 * VOCABULARY)

    def train(logprobs: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: logprobs().sum().backward()

    plain = peak_bytes(train(lambda: materialised(model, batch, 1.0)))
    model.zero_grad()
    chunked = peak_bytes(train(lambda: response_logprobs(model, batch)[0]))
    assert plain > 2 * logits
    assert plain - chunked > 1.5 * logits
    assert peak_bytes(lambda: response_scores(model, LONG, 0)) < logits


def test_gradient_checkpointing_has_the_same_gradients_and_a_lower_peak(new_model):
    model, batch = (
        new_model(vocab_size=64, num_layers=8, dtype=torch.float64),
        make_batch(LONG),
    )
    found = {}
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        peak = peak_bytes(lambda: response_logprobs(model, batch)[0].sum().backward())
        found[checkpointing] = (
            peak,
            gradients(model, response_logprobs(model, batch)[0]),
        )
    assert found[True][0] < found[False][0] / 3
    for name, gradient in found[False][1].items():
        assert torch.equal(gradient, found[True][1][name]), name


def test_the_reference_pass_holds_no_activations(new_model):
    """Its peak does not grow with the layers, as that of a pass with gradient does; nothing is
    kept for backward.
    """
    shallow, deep = (new_model(vocab_size=64, num_layers=layers) for layers in (2, 8))
    batch = make_batch(LONG)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor), lambda _: None
    ):
        scored = [
            peak_bytes(lambda model=model: response_scores(model, LONG, 0))
            for model in (shallow, deep)
        ]
    assert kept == []
    assert scored[0] == scored[1]
    trained = [
        peak_bytes(lambda model=model: response_logprobs(model, batch))
        for model in (shallow, deep)
    ]
    assert trained[1] > 2 * trained[0]
