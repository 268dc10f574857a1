"""Tokens, logprobs and entropies from states, both forms against all logits in float64, and the sampler against the
trainer bit for bit."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from walk import token_at

from kernels import lm_head
from kernels.lm_head import logprobs_triton, sample_reference, sample_triton

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning"),  # of the interpreter, about padding
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILES = [lm_head.WIDE, lm_head.NARROW, lm_head.FLOAT32]


def problem(seed: int, n: int, dim: int, vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """hidden, weight and u."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=generator).to(dtype)
    weight = (3 * torch.randn(vocabulary, dim, generator=generator) / dim**0.5).to(dtype)
    return hidden.to(device), weight.to(device), torch.rand(n, 2, generator=generator).to(device)


def softmax64(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs [n, V], entropies [n] and logsumexps [n]."""
    z = hidden.double().cpu() @ weight.double().cpu().T / (temperature or 1.0)
    logprobs = z.log_softmax(-1)
    return logprobs, -(logprobs.exp() * logprobs).sum(-1), z.logsumexp(-1)


def check_sample(found: tuple[Tensor, ...], hidden: Tensor, weight: Tensor, u: Tensor, temperature: float) -> None:
    token, logprob, entropy = (tensor.cpu() for tensor in found)
    logprobs, expected_entropy, _ = softmax64(hidden, weight, temperature)
    assert token.dtype == torch.int64 and logprob.dtype == entropy.dtype == torch.float32
    if temperature == 0:
        assert torch.equal(token, logprobs.argmax(-1))
    else:
        for row, (p, v) in enumerate(zip(logprobs.exp().tolist(), u.tolist(), strict=True)):
            expected, close = token_at(p, v)
            assert close or int(token[row]) == expected
    expected = logprobs.gather(-1, token[:, None])[:, 0]
    assert float((logprob - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1)
    assert float((entropy - expected_entropy).norm()) <= 1e-5 * max(float(expected_entropy.norm()), 1)


shapes = {
    "seed": st.integers(0, 999),
    "n": st.integers(1, 9),
    "dim": st.integers(1, 70),
    "vocabulary": st.sampled_from([1, 5, 127, 128, 129, 300, 512, 513]),
    "temperature": st.sampled_from([1.0, 0.6, 1.7, 0.0]),
}


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_reference(seed, n, dim, vocabulary, temperature):
    hidden, weight, u = problem(seed, n, dim, vocabulary, torch.float32, "cpu")
    check_sample(sample_reference(hidden, weight, u, temperature), hidden, weight, u, temperature)


@pytest.mark.parametrize("vocabulary", [100, 128, 300])
def test_reference_of_states_that_are_no_numbers(vocabulary):
    hidden, weight, u = problem(0, 3, 8, vocabulary, torch.float32, "cpu")
    hidden[1] = float("nan")
    token, logprob, _ = sample_reference(hidden, weight, u, 1.0)
    assert logprob.isnan().tolist() == [False, True, False] and int(token.max()) < vocabulary


# --- Triton ----------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton(kernel_device, dtype):
    @settings(max_examples=12, deadline=None)
    @given(**shapes)
    def check(seed, n, dim, vocabulary, temperature):
        hidden, weight, u = problem(seed, n, dim, vocabulary, dtype, kernel_device)
        check_sample(sample_triton(hidden, weight, u, temperature), hidden, weight, u, temperature)

    check()


@needs_triton
@pytest.mark.parametrize("cut", TILES, ids=["wide", "narrow", "float32"])
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_every_tile_with_odd_sizes(kernel_device, cut, temperature, monkeypatch):
    """More rows than a tile has, a block that is not full, and a tile that lacks its last block."""
    monkeypatch.setattr(lm_head, "tile", lambda weight: cut)
    hidden, weight, u = problem(1, 131, 80, 600, torch.float32, kernel_device)
    check_sample(sample_triton(hidden, weight, u, temperature), hidden, weight, u, temperature)


@needs_triton
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_targets(kernel_device, temperature):
    hidden, weight, _ = problem(2, 135, 33, 700, torch.bfloat16, kernel_device)
    target = torch.randint(700, (135,), generator=torch.Generator().manual_seed(3))
    target[:4] = torch.tensor([0, 699, 127, 128])
    found = logprobs_triton(hidden, weight, target.to(kernel_device), temperature)
    logprobs, entropy, logsumexp = softmax64(hidden, weight, temperature)
    for mine, exact in zip(found, (logprobs.gather(-1, target[:, None])[:, 0], entropy, logsumexp), strict=True):
        assert mine.dtype == torch.float32
        assert float((mine.cpu() - exact).norm() / exact.norm()) < 1e-6


@needs_triton
@pytest.mark.parametrize(("dtype", "temperature"), list(zip(DTYPES, [1.0, 0.6, 0.0], strict=True)))
def test_the_trainer_computes_what_the_sampler_returned(kernel_device, dtype, temperature, monkeypatch):
    """Bit for bit, whatever the number of rows, their order, and how they are cut."""
    n, dim, vocabulary = 300, 576, 49_152
    if kernel_device == "cpu":  # where a row costs a millisecond
        n, dim, vocabulary = 20, 64, 300
        monkeypatch.setattr(lm_head, "tile", lambda weight: lm_head.WIDE | {"ROWS": 16})
    hidden, weight, u = problem(4, n, dim, vocabulary, dtype, kernel_device)
    token, *sampled = sample_triton(hidden, weight, u, temperature)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5)).to(kernel_device)
    for rows in (order, order[:1], order[1:17], order[: n // 2 + 1]):
        again = sample_triton(hidden[rows], weight, u[rows], temperature)
        trained = logprobs_triton(hidden[rows], weight, token[rows], temperature or 1.0)
        assert torch.equal(again[0], token[rows])
        for a, b, c in zip(again[1:], trained, sampled, strict=False):
            assert torch.equal(a, c[rows]) and torch.equal(b, c[rows])
    monkeypatch.setattr(lm_head, "CHUNK_PARTS", 1)
    for a, b in zip(sample_triton(hidden, weight, u, temperature), (token, *sampled), strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_greedy_takes_the_first_of_equals(kernel_device):
    weight = torch.ones(700, 16, device=kernel_device)
    hidden, u = torch.tensor([[1.0], [-1.0]], device=kernel_device).expand(2, 16), torch.rand(2, 2).to(kernel_device)
    assert sample_triton(hidden, weight, u, 0.0)[0].tolist() == [0, 0]
    weight[[130, 250, 600]] = 2.0
    assert sample_triton(hidden, weight, u, 0.0)[0].tolist() == [130, 0]


@needs_triton
@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_never_draw_what_has_no_weight(kernel_device, edge):
    """The exponentials of all but two tokens are exactly 0."""
    weight = torch.full((700, 1), -300.0)
    weight[[133, 390]] = 0.0
    u = torch.full((3, 2), edge)
    token, logprob, entropy = sample_triton(
        torch.ones(3, 1, device=kernel_device), weight.to(kernel_device), u.to(kernel_device), 1.0
    )
    assert token.tolist() == [390 if edge else 133] * 3
    torch.testing.assert_close(torch.stack((-logprob, entropy)).cpu(), torch.full((2, 3), 2.0).log())


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_states_that_are_no_numbers(kernel_device, bad, temperature):
    hidden, weight, u = problem(6, 5, 8, 300, torch.float32, kernel_device)
    expected = sample_triton(hidden, weight, u, temperature)
    hidden[2] = bad
    found = sample_triton(hidden, weight, u, temperature)
    good = [0, 1, 3, 4]
    assert all(torch.equal(a[good], b[good]) for a, b in zip(found, expected, strict=True))
    assert found[1][2].isnan() and 0 <= int(found[0][2]) < 300


@needs_triton
def test_a_target_outside_of_the_vocabulary_has_no_logprob(kernel_device):
    hidden, weight, _ = problem(7, 5, 8, 300, torch.float32, kernel_device)
    target = torch.tensor([-1, 0, 299, 384, 1 << 40], device=kernel_device)
    assert logprobs_triton(hidden, weight, target)[0].isnan().tolist() == [True, False, False, True, True]


@needs_triton
def test_no_rows_and_wrong_shapes(kernel_device):
    hidden, weight, u = problem(8, 4, 8, 30, torch.float32, kernel_device)
    assert [len(part) for part in sample_triton(hidden[:0], weight, u[:0], 1.0)] == [0, 0, 0]
    for wrong in (hidden[:, :5], hidden.bfloat16()):
        with pytest.raises(ValueError, match=r"expected \[n, D\] and \[V, D\]"):
            sample_triton(wrong, weight, u, 1.0)
