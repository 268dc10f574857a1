"""The dtype a model computes in: "auto" is measured on this machine, on the model's own products.

A processor with bfloat16 instructions multiplies two to four times as fast in bfloat16 as in
float32; one without them does it in software, ten to twenty times slower. So both are timed, for a
tenth of a second each: the forward and backward products of one layer of the MLP, whose share of
a step is largest. bfloat16 is taken where it is at least FASTER times as fast: it has a price. An
update smaller than a 256th of a weight is seen by the float32 masters alone until enough of them
have come together (nanomath/training/optimizer.py), so the first steps at a small learning rate do
less than in float32.
"""

from __future__ import annotations

import time

import torch

from kernels.products import add_outer, linear, times
from nanomath.models.config import ModelConfig

DTYPES = ("float32", "bfloat16")
TRIAL = 0.1  # seconds for each dtype
FASTER = 1.5
SLOW = 2.0  # a dtype asked for that takes this many times the other's time is said to be slow
# Weights: a smaller model is not worth a trial, and stays in float32
SMALL = 10_000_000


def settle(
    name: str, key: str, config: ModelConfig, device: torch.device, rows: int
) -> tuple[str, str]:
    """The dtype meant by `name`, "auto" or one that is kept, and a sentence about it or "".

    key: how the config calls it. rows: of the products, about the tokens of a micro-batch or the
    sequences decoded side by side.
    """
    asked = name != "auto"
    if weights(config) < SMALL:
        return (name if asked else DTYPES[0]), ""
    seconds = {
        dtype: trial(config, device, getattr(torch, dtype), rows) for dtype in DTYPES
    }
    plain, short = (seconds[dtype] for dtype in DTYPES)
    best = DTYPES[1] if plain > FASTER * short else DTYPES[0]
    ratio = f"bfloat16 takes {short / plain:.2f} times float32's time for this model's products"
    if not asked:
        return best, f"{key}: {best} ({ratio} on this machine)"
    if name in seconds and seconds[name] > SLOW * min(seconds.values()):
        return (
            name,
            f'{key} = "{name}" is slow on this machine ({ratio}): {key}=auto measures',
        )
    return name, ""


def weights(config: ModelConfig) -> int:
    """The weights of the layers' MLPs, which are most of a model's."""
    return 3 * config.num_layers * config.hidden_size * config.intermediate_size


def trial(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, rows: int
) -> float:
    """The least seconds of one layer's products x Wᵀ, dy W and dyᵀ x in a dtype."""
    x = torch.ones(rows, config.hidden_size, dtype=dtype, device=device)
    weight = torch.ones(
        config.intermediate_size, config.hidden_size, dtype=dtype, device=device
    )
    dy = torch.ones(rows, config.intermediate_size, dtype=dtype, device=device)
    best = float("inf")
    end = time.perf_counter() + TRIAL
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        linear(x, weight)
        times(weight)(dy)
        add_outer(torch.zeros_like(weight), dy, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
