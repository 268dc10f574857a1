"""Keys and values on a GPU, in pages: the full pages of a prompt are shared by its samples.

A slot's pages are named in a table, so that samples can share pages and move to other slots without copying any keys.
Every slot has pages of its own for the longest sample there can be; the page at the end of a prompt that is not full is
copied to each of its samples. Where prompts have CASCADE pages or more, all queries of a group meet the shared pages
together (kernels/attention.py). The tensors that a decoding step reads never move: the step can be a CUDA graph.

L layers, K key/value heads, E head dimension, P pages of the longest sample, J of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import PAGE, paged_attention, rows_per_tile
from kernels.rope_write import rope_write
from nanomath.models.transformer import ModelConfig
from nanomath.rollout.cache import prefill
from nanomath.rollout.decoder import Decoder, Heads

CASCADE = 2  # shared pages from which reading them once for a group is worth another launch


class PagedCache:
    """`slots` samples of at most `positions` tokens in all; prompts of at most `longest` cached tokens (all but the
    last), of which up to `prompts` are held at a time. share: whether samples share pages.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        positions: int,
        longest: int,
        prompts: int,
        dtype: torch.dtype,
        device: torch.device,
        share: bool = True,
        exact: bool = False,
    ) -> None:
        self.config, self.share, self.cascades = config, share, share and not exact
        self.pages, self.prompt_pages = _pages(positions), _pages(longest)
        count = slots * self.pages + prompts * self.prompt_pages
        shape = (config.num_layers, count, config.num_kv_heads, PAGE, config.head_dim)
        self.key_pages, self.value_pages = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        integers = {"dtype": torch.int32, "device": device}
        self.own = torch.arange(slots * self.pages, **integers).view(slots, -1)  # pages that belong to each slot
        self.table = self.own.clone()
        self.slot = torch.arange(slots, **integers)
        self.width = rows_per_tile(config.num_heads, config.num_kv_heads)
        self.tiles = torch.full((slots, self.width), -1, **integers)
        self.shared = torch.zeros(slots, **integers)
        self.places = prompts
        self.clear()

    @staticmethod
    def bytes_per_slot(config: ModelConfig, positions: int, longest: int, dtype: torch.dtype) -> int:
        """Memory of a slot and of the prompt that it may hold."""
        page = 2 * config.num_layers * config.num_kv_heads * PAGE * config.head_dim * dtype.itemsize
        return page * (_pages(positions) + 2 * _pages(longest))

    def clear(self) -> None:
        """Forget all samples and prompts."""
        self.prompt_of = [-1] * len(self.slot)  # on the host: the number of the prompt in each slot
        self.free = list(range(self.places))
        self.place: dict[int, int] = {}  # of each prompt
        self.full: dict[int, int] = {}  # pages of each prompt that are full
        self.tile_count = 0
        self.grouped = 0  # rows that `arrange` was last called for, 0 after a change

    def prefill(self, decoder: Decoder, prompts: dict[int, Sequence[int]]) -> None:
        """Compute and keep all but the last token of each prompt, known by a number."""
        for number, prompt in prompts.items():
            self.place[number], self.full[number] = self.free.pop(), (len(prompt) - 1) // PAGE
        used = [_pages(len(prompt) - 1) for prompt in prompts.values()]
        pages = [self._prompt_page(number) + j for number, n in zip(prompts, used, strict=True) for j in range(n)]
        pages, most = torch.tensor(pages, device=self.slot.device), max(used)
        real = torch.tensor([[j < n for j in range(most)] for n in used], device=self.slot.device)

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            for kept, new in (self.key_pages, k), (self.value_pages, v):
                padded = F.pad(new, (0, 0, 0, most * PAGE - new.shape[2])).unflatten(2, (most, PAGE))
                kept[layer].index_copy_(0, pages, padded.transpose(1, 2)[real])

        prefill(decoder, list(prompts.values()), keep)

    def _prompt_page(self, number: int) -> int:
        """The first page of a prompt."""
        return self.own.numel() + self.place[number] * self.prompt_pages

    def begin(self, rows: Tensor, prompts: Sequence[int], lengths: Tensor) -> None:
        """Samples of the prompts with these numbers, of so many tokens, begin in slots `rows`."""
        copied: list[tuple[int, int, int]] = []  # page of a prompt, slot, page of the slot
        table = self.own[rows].cpu()
        for at, (row, number, length) in enumerate(zip(rows.tolist(), prompts, lengths.tolist(), strict=True)):
            first, shared = self._prompt_page(number), self.full[number] if self.share else 0
            table[at, :shared] = torch.arange(first, first + shared)
            copied += [(first + j, at, j) for j in range(shared, _pages(length - 1))]
            self.prompt_of[row] = number
        self.table[rows] = table.to(self.table.device)
        if copied:
            source, at, page = torch.tensor(copied, device=rows.device).unbind(1)
            target = self.own[rows[at], page].long()
            for kept in (self.key_pages, self.value_pages):
                kept[:, target] = kept[:, source]
        self.grouped = 0

    def move(self, source: Tensor, target: Tensor, positions: Tensor) -> None:
        """Slots `target` take over the samples in slots `source`, with their pages."""
        self.table[target] = self.table[source]
        self.own[target], self.own[source] = self.own[source], self.own[target]
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            self.prompt_of[t] = self.prompt_of[s]
        self.grouped = 0

    def forget(self, prompt: int) -> None:
        """No sample of the prompt with this number is left."""
        self.free.append(self.place.pop(prompt))
        del self.full[prompt]

    def arrange(self, live: int) -> int:
        """Before steps of the first `live` slots: name groups that share pages. Returns the number of tiles."""
        if self.grouped != live:
            groups: dict[int, list[int]] = {}
            for row, number in enumerate(self.prompt_of[:live]):
                groups.setdefault(number, []).append(row)
            cut = [(n, rows[i : i + self.width]) for n, rows in groups.items() for i in range(0, len(rows), self.width)]
            self.tile_count = 0
            if self.cascades and max(self.full[number] for number in groups) >= CASCADE:
                rows = [rows + [-1] * (self.width - len(rows)) for _, rows in cut]
                self.tiles.fill_(-1)
                self.tiles[: len(cut)] = torch.tensor(rows, dtype=torch.int32)
                self.shared[: len(cut)] = torch.tensor([self.full[number] for number, _ in cut], dtype=torch.int32)
                self.tile_count = len(cut)
            self.grouped = live
        return self.tile_count

    def prepare(self, positions: Tensor, tiles: int) -> None:
        """The next step feeds the tokens of the first len(positions) slots, which stand at `positions`, -1: none."""
        self.position = positions.int()
        self.length = self.position + 1
        self.tiles_used = tiles

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """[rows, H E]: remember the step's keys and values, and attend to all before them."""
        rows, tiles = len(heads.qkv), self.tiles_used
        keys, values, table, slot = self.key_pages[layer], self.value_pages[layer], self.table[:rows], self.slot[:rows]
        q = rope_write(
            heads.qkv, self.position, slot, *heads.rope, keys, values, table, heads.q_norm, heads.k_norm, heads.eps
        )
        groups = (self.tiles[:tiles], self.shared[:tiles]) if tiles else (None, None)
        out = paged_attention(q, keys, values, table, slot, self.length, self.config.sliding_window, *groups)
        return out.flatten(1)


def _pages(tokens: int) -> int:
    """How many pages that many tokens fill."""
    return -(-tokens // PAGE)
