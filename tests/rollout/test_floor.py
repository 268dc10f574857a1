"""The floor of a decoding step: a table computed by hand, what is shared, and the measurement
of a machine.
"""

from __future__ import annotations

import pytest
import torch

from nanomath.models import ModelConfig
from nanomath.rollout import floor
from nanomath.rollout.floor import Machine, measure_machine, step_floor

H200 = Machine(4.3e12, 790e12)
QWEN = {
    "0.5b": ModelConfig(151936, 896, 24, 14, 2, 64, 4864, 32768),
    "1.5b": ModelConfig(151936, 1536, 28, 12, 2, 128, 8960, 32768),
}
# Qwen2.5, bfloat16, context 1024: rows; milliseconds of projections, lm_head, attention and of the
# step; tokens a second.
TABLE = [
    ("0.5b", 64, (0.166, 0.063, 0.187, 0.417), 153e3),
    ("0.5b", 256, (0.232, 0.088, 0.749, 1.069), 239e3),
    ("1.5b", 64, (0.609, 0.109, 0.437, 1.155), 55e3),
    ("1.5b", 256, (0.849, 0.151, 1.748, 2.748), 93e3),
]


@pytest.mark.parametrize(("model", "rows", "milliseconds", "speed"), TABLE)
def test_the_table(model, rows, milliseconds, speed):
    stages = step_floor(QWEN[model], rows, 1024, torch.bfloat16, H200)
    assert list(stages) == ["projections", "lm_head", "attention"]
    step = sum(stages.values())
    assert [1e3 * seconds for seconds in (*stages.values(), step)] == pytest.approx(
        milliseconds, abs=6e-4
    )
    assert rows / step == pytest.approx(speed, abs=500)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_where_products_are_free_and_flops_where_bytes_are(dtype):
    """Against counts made from the parameters of a layer, one by one."""
    c = ModelConfig(1000, 48, 3, 4, 2, 16, 80, 512)
    layer = {
        "q": 48 * 64,
        "k": 48 * 32,
        "v": 48 * 32,
        "o": 64 * 48,
        "gate": 48 * 80,
        "up": 48 * 80,
        "down": 80 * 48,
    }
    weights = 3 * sum(layer.values())
    size = dtype.itemsize
    read = step_floor(c, 7, 100, dtype, Machine(1.0, float("inf")))
    assert read == {
        "projections": weights * size,
        "lm_head": 48000 * size,
        "attention": 7 * 100 * 3 * 2 * 32 * size,
    }
    flops = step_floor(c, 7, 100, dtype, Machine(float("inf"), 1.0))
    assert flops == {
        "projections": 14 * weights,
        "lm_head": 14 * 48000,
        "attention": 7 * 100 * 3 * 2 * 2 * 64,
    }


def test_shared_tokens_are_read_once_a_group():
    config, reading = QWEN["0.5b"], Machine(1.0, float("inf"))

    def attention(**shared: float) -> float:
        return step_floor(config, 64, 640, torch.bfloat16, reading, **shared)[
            "attention"
        ]

    token = 12288
    assert (
        attention() == attention(shared=512) == attention(group=16) == 64 * 640 * token
    )
    assert attention(shared=512, group=16) == (64 * 128 + 4 * 512) * token
    assert attention(shared=512, group=48) == (64 * 128 + 2 * 512) * token
    free = Machine(float("inf"), 1.0)
    parts = [
        step_floor(config, 64, 640, torch.bfloat16, free, shared, 16)
        for shared in (0, 512)
    ]
    assert parts[0] == parts[1]


def test_a_window_bounds_what_is_seen():
    c = ModelConfig(
        1000, 48, 1, 4, 2, 16, 80, 4096, model_type="mistral", sliding_window=100
    )
    reading, token = Machine(1.0, float("inf")), 2 * 32 * 4

    def attention(context: float, shared: float = 0) -> float:
        return step_floor(c, 8, context, torch.float32, reading, shared, 4)["attention"]

    assert [attention(n) for n in (60, 100, 300)] == [
        8 * n * token for n in (60, 100, 100)
    ]
    # 20 of the shared tokens are out of sight
    assert attention(120, shared=50) == (8 * 70 + 2 * 30) * token
    assert attention(300, shared=50) == 8 * 100 * token


def test_a_copy_counts_twice_and_the_best_product_counts(monkeypatch):
    calls = []

    def pretend(run, device, seconds):
        run()
        calls.append(device.type)
        return (1.0, 2.0, 4.0, 0.5)[len(calls) - 1]

    monkeypatch.setattr(floor, "fastest", pretend)
    monkeypatch.setattr(floor, "COPIED", {"cpu": 4096})
    monkeypatch.setattr(floor, "PRODUCTS", {"cpu": ((2, 32), (8, 32), (4, 64))})
    assert measure_machine("cpu", torch.float32) == Machine(
        2 * 4096 / 0.5, 2 * 4 * 64 * 64 / 4.0
    )
    assert calls == ["cpu"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine(dtype, monkeypatch):
    monkeypatch.setattr(floor, "COPIED", {"cpu": 32 << 20})
    monkeypatch.setattr(floor, "PRODUCTS", {"cpu": ((16, 512),)})
    found = measure_machine("cpu", dtype, seconds=0.01)
    assert 1e8 < found.copy_bytes_per_s < 1e13 and 1e8 < found.gemm_flops_per_s < 1e14


def test_the_fastest_call_counts_and_the_first_does_not(monkeypatch):
    times = iter([0.1, 3.0, 2.0, 4.0])
    monkeypatch.setattr(floor, "seconds_of", lambda run, device: next(times))
    assert floor.fastest(lambda: None, torch.device("cpu"), seconds=0) == 2.0
