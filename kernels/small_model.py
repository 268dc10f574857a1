"""The whole decoding step of a small model in one call on a CPU, and the matrix products that it is made of.

    states = layers(embedding(last tokens));  next tokens ~ softmax(states W^T / temperature)

A model of a megabyte or two spends more time between operations than in them: on calls, on memory for their results,
and at the barriers where threads wait for each other. Here every thread takes rows of its own through the whole step.
It computes what nanomath/rollout/decoder.py does, and calls the very functions that are the CPU forms of the kernels.
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
    eps: float
    window: int | None

    def __post_init__(self) -> None:
        addresses = [[0 if w is None else w.data_ptr() for w in layer] for layer in self.layers]
        self.addresses = torch.tensor(addresses, dtype=torch.int64)

    def step(
        self,
        token: Tensor,
        position: Tensor,
        slot: Tensor,
        rope: tuple[Tensor, Tensor],
        key_pages: Tensor,
        value_pages: Tensor,
        page_table: Tensor,
        u: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Next tokens and their logprobs [M] after int64 token [M], as `lm_head.sample` chooses them at u [M, 2].

        position, slot, page_table, rope: as in kernels/rope_write.py; key_pages, value_pages [L, pages, K, PAGE, E].
        """
        rows, (layers, _, kv_heads, _, dim), width = len(token), key_pages.shape, self.embedding.shape[1]
        new, found = torch.empty(rows, dtype=torch.int64), torch.empty(3, rows)
        heads = self.layers[0][5].shape[1] // dim  # of o in panels [.., H E, LANES]
        compiled.call(
            *("decode", found.dtype, token.contiguous(), position.contiguous(), slot.contiguous(), *rope),
            *(self.embedding, self.addresses, self.norm, self.head, key_pages.mT, value_pages, page_table.contiguous()),
            *(u.contiguous(), new, *found, temperature or 1.0, self.eps, DRAW if temperature else GREEDY),
            *(self.window or 0, rows, width, self.intermediate, heads, kv_heads, dim, page_table.shape[1]),
            *(self.vocabulary, layers, value_pages[0].numel()),
        )
        return new, found[0]
