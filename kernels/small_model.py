"""Decoding steps of a small model in one call on a CPU.

    states = layers(embedding(last tokens)),   next tokens ~ softmax(states W^T / temperature)

A model of a megabyte or two spends more time between operations than in them: on calls, on memory for their results,
and at the barriers where threads wait for each other. Here every thread takes rows of its own through all layers and
several steps. It computes what nanomath/rollout/engine.py and decoder.py do, step by step and layer by layer, and calls
the very functions that are the CPU forms of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import compiled
from kernels.lm_head import DRAW, GREEDY


@dataclass
class SmallModel:
    """The weights of a model, matrices in panels (kernels/packed.py). Each of `layers` holds what cpu.cpp's Layer does,
    None where there is none.
    """

    embedding: Tensor
    layers: Sequence[Sequence[Tensor | None]]
    norm: Tensor
    head: Tensor
    vocabulary: int
    intermediate: int
    heads: int
    eps: float
    window: int | None

    def __post_init__(self) -> None:
        addresses = [[0 if w is None else w.data_ptr() for w in layer] for layer in self.layers]
        self.addresses = torch.tensor(addresses, dtype=torch.int64)

    def advance(
        self,
        rows: int,
        steps: int,
        slots: Sequence[Tensor],
        eos: Tensor,
        rope: tuple[Tensor, Tensor],
        key_pages: Tensor,
        value_pages: Tensor,
        page_table: Tensor,
        positions: int,
        temperature: float,
    ) -> None:
        """Draw up to `steps` tokens for each of the first `rows` slots, as `Engine.step` does.

        slots: token, position, count, limit, done, noise, tokens, logprobs and sampling_logprobs of `Slots`; key_pages
        and value_pages [L, pages, K, PAGE, E]; page_table int32 [slots, P]: the pages of each; rope as from
        `Decoder.rope`; positions: of the longest sample.
        """
        (layers, _, kv_heads, _, dim), width = key_pages.shape, self.embedding.shape[1]
        compiled.call(
            *("decode", self.embedding.dtype, *slots, eos, *rope, self.embedding, self.addresses, self.norm, self.head),
            *(key_pages.mT, value_pages, page_table, temperature or 1.0, self.eps, DRAW if temperature else GREEDY),
            *(steps, len(eos), slots[-1].shape[1] - 1, positions, self.window or 0, rows, width, self.intermediate),
            *(self.heads, kv_heads, dim, page_table.shape[1], self.vocabulary, layers, value_pages[0].numel()),
        )
