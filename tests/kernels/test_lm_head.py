"""Tokens, logprobs and entropies from states, both forms against all logits in float64, and
the sampler against the trainer bit for bit.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from walk import token_at

from kernels import compiled, lm_head
from kernels.lm_head import (
    logprobs_triton,
    sample,
    sample_logits,
    sample_triton,
    statistics,
)

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed"
)
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # Of the interpreter, about padding
    pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILES = [lm_head.WIDE, lm_head.NARROW, lm_head.FLOAT32]


def problem(
    seed: int, n: int, dim: int, vocabulary: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """hidden, weight and u."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=generator).to(dtype)
    weight = (3 * torch.randn(vocabulary, dim, generator=generator) / dim**0.5).to(
        dtype
    )
    return (
        hidden.to(device),
        weight.to(device),
        torch.rand(n, 2, generator=generator).to(device),
    )


def softmax64(
    hidden: Tensor, weight: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs [n, V], entropies [n] and logsumexps [n]."""
    z = hidden.double().cpu() @ weight.double().cpu().T / (temperature or 1.0)
    logprobs = z.log_softmax(-1)
    return logprobs, -(logprobs.exp() * logprobs).sum(-1), z.logsumexp(-1)


def check_sample(
    found: tuple[Tensor, ...],
    hidden: Tensor,
    weight: Tensor,
    u: Tensor,
    temperature: float,
) -> None:
    token, logprob, entropy = (tensor.cpu() for tensor in found)
    logprobs, expected_entropy, _ = softmax64(hidden, weight, temperature)
    assert (
        token.dtype == torch.int64 and logprob.dtype == entropy.dtype == torch.float32
    )
    if temperature == 0:
        assert torch.equal(token, logprobs.argmax(-1))
    else:
        for row, (p, v) in enumerate(
            zip(logprobs.exp().tolist(), u.tolist(), strict=True)
        ):
            expected, close = token_at(p, v)
            assert close or int(token[row]) == expected
    expected = logprobs.gather(-1, token[:, None])[:, 0]
    assert float((logprob - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1)
    assert float((entropy - expected_entropy).norm()) <= 1e-5 * max(
        float(expected_entropy.norm()), 1
    )


shapes = {
    "seed": st.integers(0, 999),
    "n": st.integers(1, 9),
    "dim": st.integers(1, 70),
    "vocabulary": st.sampled_from([1, 5, 127, 128, 129, 300, 512, 513]),
    "temperature": st.sampled_from([1.0, 0.6, 1.7, 0.0]),
}


@pytest.fixture(params=["cpu", "reference"])
def form(request, monkeypatch) -> str:
    """Runs the test with the CPU form, and without."""
    if request.param == "reference":
        monkeypatch.setattr(compiled, "library", lambda: None)
    return request.param


def test_any_shape(form):
    @settings(max_examples=60, deadline=None)
    @given(**shapes)
    def check(seed, n, dim, vocabulary, temperature):
        hidden, weight, u = problem(seed, n, dim, vocabulary, torch.float32, "cpu")
        check_sample(
            sample(hidden, weight, u, temperature), hidden, weight, u, temperature
        )

    check()


@pytest.mark.parametrize("vocabulary", [100, 128, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_states_that_are_no_numbers(form, vocabulary, temperature):
    hidden, weight, u = problem(0, 3, 8, vocabulary, torch.float32, "cpu")
    hidden[1] = float("nan")
    token, logprob, _ = sample(hidden, weight, u, temperature)
    assert (
        logprob.isnan().tolist() == [False, True, False]
        and 0 <= int(token.min()) <= int(token.max()) < vocabulary
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [5, 128, 300])
def test_statistics(form, temperature, vocabulary):
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(40, vocabulary, generator=generator)
    z[0, 1:], z[1, 0] = -torch.inf, -torch.inf
    target = torch.randint(vocabulary, (40,), generator=generator)
    target[0], target[1] = 0, 1
    logprobs = (z.double() / temperature).log_softmax(-1)
    expected = (
        logprobs.gather(-1, target[:, None])[:, 0],
        -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1),
        (z.double() / temperature).logsumexp(-1),
    )
    softmax = torch.full_like(z, torch.nan)
    for mine, exact in zip(
        statistics(z, target, temperature, softmax), expected, strict=True
    ):
        assert (
            mine.dtype == torch.float32
            and float((mine - exact).norm() / exact.norm()) < 1e-6
        )
    assert float((softmax - logprobs.exp()).abs().max()) < 1e-6
    again = z.clone()
    assert torch.equal(
        statistics(again, target, temperature, again)[0],
        statistics(z, target, temperature)[0],
    )
    assert torch.equal(again, softmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_form_gives_sampler_and_trainer_the_same_bits(dtype):
    """With any number of rows and threads; the trainer's logits are float32 that were rounded
    to the dtype.
    """
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    z = (3 * torch.randn(50, 1000, generator=generator)).to(dtype)
    u = torch.rand(50, 2, generator=generator)
    for temperature in (1.0, 0.7, 0.0):
        token, logprob, _ = sample_logits(z, u, temperature)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(
                statistics(z.float(), token, temperature or 1.0)[0], logprob
            )
            alone = [
                sample_logits(z[i : i + 1], u[i : i + 1], temperature)
                for i in range(50)
            ]
            assert torch.equal(torch.cat([t for t, _, _ in alone]), token)
            assert torch.equal(torch.cat([p for _, p, _ in alone]), logprob)
    torch.set_num_threads(before)


def test_targets_outside_of_the_vocabulary_have_no_logprob_in_the_cpu_form():
    logprobs, entropies, _ = statistics(torch.zeros(3, 9), torch.tensor([-1, 8, 9]))
    assert (
        logprobs.isnan().tolist() == [True, False, True] and not entropies.isnan().any()
    )
    with pytest.raises(ValueError, match="do not fit logits"):
        statistics(torch.zeros(3, 9), torch.tensor([1, 2]))


# --- Triton ----------------------------------------------------------------------------------


@needs_triton
def test_triton(kernel_device):
    @settings(max_examples=20, deadline=None)
    @given(dtype=st.sampled_from(DTYPES), **shapes)
    def check(dtype, seed, n, dim, vocabulary, temperature):
        hidden, weight, u = problem(seed, n, dim, vocabulary, dtype, kernel_device)
        check_sample(
            sample_triton(hidden, weight, u, temperature),
            hidden,
            weight,
            u,
            temperature,
        )

    check()


@needs_triton
@pytest.mark.parametrize("cut", TILES, ids=["wide", "narrow", "float32"])
@pytest.mark.parametrize(
    "temperature", [0.7, pytest.param(0.0, marks=pytest.mark.slow)]
)
def test_every_tile_with_odd_sizes(kernel_device, cut, temperature, monkeypatch):
    """More rows than a tile has, a block that is not full, and a tile that lacks its last
    block.
    """
    monkeypatch.setattr(lm_head, "tile", lambda weight: cut)
    hidden, weight, u = problem(1, 131, 80, 600, torch.float32, kernel_device)
    check_sample(
        sample_triton(hidden, weight, u, temperature), hidden, weight, u, temperature
    )


@needs_triton
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_targets(kernel_device, temperature):
    hidden, weight, _ = problem(2, 135, 33, 700, torch.bfloat16, kernel_device)
    target = torch.randint(700, (135,), generator=torch.Generator().manual_seed(3))
    target[:4] = torch.tensor([0, 699, 127, 128])
    found = logprobs_triton(hidden, weight, target.to(kernel_device), temperature)
    logprobs, entropy, logsumexp = softmax64(hidden, weight, temperature)
    for mine, exact in zip(
        found,
        (logprobs.gather(-1, target[:, None])[:, 0], entropy, logsumexp),
        strict=True,
    ):
        assert mine.dtype == torch.float32
        assert float((mine.cpu() - exact).norm() / exact.norm()) < 1e-6


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [
        (torch.bfloat16, 0.6),
        pytest.param(torch.float32, 1.0, marks=pytest.mark.slow),
        pytest.param(torch.float16, 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_trainer_computes_what_the_sampler_returned(
    kernel_device, dtype, temperature, monkeypatch
):
    """Bit for bit, whatever the number of rows, their order, and how they are cut."""
    n, dim, vocabulary = 300, 576, 49_152
    if kernel_device == "cpu":  # where a row costs a millisecond
        n, dim, vocabulary = 20, 64, 300
        monkeypatch.setattr(lm_head, "tile", lambda weight: lm_head.WIDE | {"ROWS": 16})
    hidden, weight, u = problem(4, n, dim, vocabulary, dtype, kernel_device)
    token, *sampled = sample_triton(hidden, weight, u, temperature)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5)).to(
        kernel_device
    )
    for rows in (order, order[:1], order[1:17], order[: n // 2 + 1]):
        again = sample_triton(hidden[rows], weight, u[rows], temperature)
        trained = logprobs_triton(hidden[rows], weight, token[rows], temperature or 1.0)
        assert torch.equal(again[0], token[rows])
        for a, b, c in zip(again[1:], trained, sampled, strict=False):
            assert torch.equal(a, c[rows]) and torch.equal(b, c[rows])
    monkeypatch.setattr(lm_head, "CHUNK_PARTS", 1)
    for a, b in zip(
        sample_triton(hidden, weight, u, temperature), (token, *sampled), strict=True
    ):
        assert torch.equal(a, b)


@needs_triton
def test_greedy_takes_the_first_of_equals(kernel_device):
    weight = torch.ones(700, 16, device=kernel_device)
    hidden, u = (
        torch.tensor([[1.0], [-1.0]], device=kernel_device).expand(2, 16),
        torch.rand(2, 2).to(kernel_device),
    )
    assert sample_triton(hidden, weight, u, 0.0)[0].tolist() == [0, 0]
    weight[[130, 250, 600]] = 2.0
    assert sample_triton(hidden, weight, u, 0.0)[0].tolist() == [130, 0]


@needs_triton
@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_never_draw_what_has_no_weight(
    kernel_device, edge
):
    """The exponentials of all but two tokens are exactly 0."""
    weight = torch.full((700, 1), -300.0)
    weight[[133, 390]] = 0.0
    u = torch.full((3, 2), edge)
    token, logprob, entropy = sample_triton(
        torch.ones(3, 1, device=kernel_device),
        weight.to(kernel_device),
        u.to(kernel_device),
        1.0,
    )
    assert token.tolist() == [390 if edge else 133] * 3
    torch.testing.assert_close(
        torch.stack((-logprob, entropy)).cpu(), torch.full((2, 3), 2.0).log()
    )


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_states_that_are_no_numbers_in_triton(kernel_device, bad, temperature):
    hidden, weight, u = problem(6, 5, 8, 300, torch.float32, kernel_device)
    expected = sample_triton(hidden, weight, u, temperature)
    hidden[2] = bad
    found = sample_triton(hidden, weight, u, temperature)
    good = [0, 1, 3, 4]
    assert all(
        torch.equal(a[good], b[good]) for a, b in zip(found, expected, strict=True)
    )
    assert found[1][2].isnan() and 0 <= int(found[0][2]) < 300


@needs_triton
def test_a_target_outside_of_the_vocabulary_has_no_logprob(kernel_device):
    hidden, weight, _ = problem(7, 5, 8, 300, torch.float32, kernel_device)
    target = torch.tensor([-1, 0, 299, 384, 1 << 40], device=kernel_device)
    assert logprobs_triton(hidden, weight, target)[0].isnan().tolist() == [
        True,
        False,
        False,
        True,
        True,
    ]


@needs_triton
def test_no_rows_and_wrong_shapes(kernel_device):
    hidden, weight, u = problem(8, 4, 8, 30, torch.float32, kernel_device)
    assert [len(part) for part in sample_triton(hidden[:0], weight, u[:0], 1.0)] == [
        0,
        0,
        0,
    ]
    for wrong in (hidden[:, :5], hidden.bfloat16()):
        with pytest.raises(ValueError, match=r"expected \[n, D\] and \[V, D\]"):
            sample_triton(wrong, weight, u, 1.0)
