"""Decoding steps of a small model in one call on a CPU.

    states = layers(embedding(last tokens)),   next tokens ~ softmax(states W^T / temperature)

A model of a megabyte or two spends more time between operations than in them: on calls, on
memory for their results, and at the barriers where threads wait for each other. Here every
thread takes rows of its own through all layers and several steps. It computes what
nanomath/rollout/engine.py and decoder.py do, step by step and layer by layer, and calls the
very functions that are the CPU forms of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import compiled
from kernels.attention import Pages
from kernels.lm_head import DRAW, GREEDY
from kernels.rope_write import Rope


@dataclass
class SmallModel:
    """The weights of a model, matrices in panels (kernels/packed.py). Each of `layers` holds
    what cpu.cpp's Layer does, None where there is none.
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
        addresses = [
            [0 if w is None else w.data_ptr() for w in layer] for layer in self.layers
        ]
        self.addresses = torch.tensor(addresses, dtype=torch.int64)

    def prefill(
        self, tokens: Tensor, lengths: Sequence[int], rope: Rope, pages: Pages
    ) -> None:
        """Write the keys and values of prompts of these lengths, whose tokens follow one
        another in `tokens`, a prompt to a slot of the pages. Keys and values are [L, pages, K,
        PAGE, E].
        """
        first = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        shape = len(lengths), pages.table.shape[1]
        model = self._model(rope, pages)
        compiled.call(
            "prefill",
            self.embedding.dtype,
            tokens,
            first,
            pages.table,
            model,
            self.eps,
            *shape,
        )

    def advance(
        self,
        steps: int,
        state: Sequence[Tensor],
        noise: Tensor,
        eos: Tensor,
        rope: Rope,
        pages: Pages,
        temperature: float,
    ) -> None:
        """Draw up to `steps` tokens for each row, as `Engine.step` does; the rows' state as in
        kernels/record.py, their noise [n, width + 1, 2], and pages as in `prefill`.
        """
        (rows, columns) = state[-1].shape
        mode = DRAW if temperature else GREEDY
        compiled.call(
            *(
                "decode",
                self.embedding.dtype,
                *state,
                noise,
                eos,
                pages.table,
                self._model(rope, pages),
            ),
            *(
                temperature or 1.0,
                self.eps,
                mode,
                steps,
                len(eos),
                columns - 1,
                rows,
                pages.table.shape[1],
            ),
        )

    def _model(self, rope: Rope, pages: Pages) -> Tensor:
        """cpu.cpp's Model: addresses and numbers, eight bytes each."""
        tensors = (
            self.embedding,
            self.norm,
            self.head,
            *rope,
            self.addresses,
            pages.keys,
            pages.values,
        )
        (layers, _, kv_heads, _, dim) = pages.keys.shape
        width = self.embedding.shape[1]
        shape = (
            layers,
            width,
            self.intermediate,
            self.heads,
            kv_heads,
            dim,
            self.vocabulary,
            self.window or 0,
        )
        return torch.tensor(
            [
                *(tensor.data_ptr() for tensor in tensors),
                pages.values[0].numel(),
                *shape,
            ]
        )
