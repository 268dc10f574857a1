"""The keys and values of the tokens seen so far, in fixed slots.

Live samples always occupy the first rows, so every operation works on a plain slice [:live] and finished samples cost
nothing. L layers, K key/value heads, P positions, E head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomath.models.transformer import Attend, ModelConfig, causal_attention, window_mask


class PromptCache:
    """Keys and values [L, prompts, K, T, E] of a batch of prompts padded at the end, filled by one forward pass."""

    def __init__(self, window: int | None) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.causal = causal_attention(window)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Plain causal attention that remembers what it saw."""
        self.parts.append((k, v))
        return self.causal(layer, q, k, v)


class SlotCache:
    """Keys and values [L, slots, K, P, E]; one token of every live slot is added at a time."""

    def __init__(
        self, config: ModelConfig, slots: int, positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, slots, config.num_kv_heads, positions, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.window = config.sliding_window

    def fill(self, rows: Tensor, prompts: PromptCache, which: Tensor) -> None:
        """Copy prompts `which` [r] into slots `rows` [r]. What lies past a prompt's end is overwritten or masked."""
        for layer, (k, v) in enumerate(prompts.parts):
            self.keys[layer, rows, :, : k.shape[2]] = k[which]
            self.values[layer, rows, :, : v.shape[2]] = v[which]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` positions of slots `source` over slots `target`."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def attend_at(self, positions: Tensor, length: int) -> Attend:
        """The `attend` of one decoding step: row i's token stands at positions[i], all below `length`."""
        live = len(positions)
        rows = torch.arange(live, device=positions.device)
        place = torch.arange(length, device=positions.device)
        mask = window_mask(positions[:, None], place[None, :], self.window)[:, None, None, :]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, rows, :, positions] = k[:, :, 0]
            self.values[layer, rows, :, positions] = v[:, :, 0]
            keys, values = self.keys[layer, :live, :, :length], self.values[layer, :live, :, :length]
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

        return attend
