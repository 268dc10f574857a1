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
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.lm_head import DRAW, GREEDY

Rope = tuple[Tensor, Tensor]  # cos and sin of all positions, each [positions, E]


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

    def prefill(
        self, tokens: Tensor, lengths: Sequence[int], rope: Rope, key_pages: Tensor, value_pages: Tensor, table: Tensor
    ) -> None:
        """Write the keys and values of prompts of these lengths, whose tokens follow one another in `tokens`.

        key_pages and value_pages [L, pages, K, PAGE, E]; table int32 [prompts, P]: the pages of each; rope as from
        `Decoder.rope`.
        """
        first = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        model = self._model(rope, key_pages, value_pages)
        shape = len(lengths), table.shape[1]
        compiled.call("prefill", self.embedding.dtype, tokens, first, table, model, self.eps, *shape)

    def advance(
        self,
        rows: int,
        steps: int,
        slots: Sequence[Tensor],
        eos: Tensor,
        rope: Rope,
        key_pages: Tensor,
        value_pages: Tensor,
        table: Tensor,
        temperature: float,
    ) -> None:
        """Draw up to `steps` tokens for each of the first `rows` slots, as `Engine.step` does.

        slots: token, position, count, limit, done, noise, tokens, logprobs and sampling_logprobs of `Slots`; table of
        the slots' pages, and the rest as in `prefill`.
        """
        compiled.call(
            *("decode", self.embedding.dtype, *slots, eos, table, self._model(rope, key_pages, value_pages)),
            *(temperature or 1.0, self.eps, DRAW if temperature else GREEDY, steps, len(eos), slots[-1].shape[1] - 1),
            *(rows, table.shape[1]),
        )

    def _model(self, rope: Rope, key_pages: Tensor, value_pages: Tensor) -> Tensor:
        """cpu.cpp's Model: addresses and numbers, eight bytes each."""
        tensors = self.embedding, self.norm, self.head, *rope, self.addresses, key_pages, value_pages
        (layers, _, kv_heads, _, dim), width = key_pages.shape, self.embedding.shape[1]
        shape = layers, width, self.intermediate, self.heads, kv_heads, dim, self.vocabulary, self.window or 0
        return torch.tensor([*(tensor.data_ptr() for tensor in tensors), value_pages[0].numel(), *shape])
