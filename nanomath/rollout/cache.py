"""Keys and values in pages: the full pages of a prompt are shared by its samples.

A slot's pages are named in a table, so that samples can share pages and move to other slots
without copying any keys. Every slot has pages of its own for the longest sample there can be;
the page at the end of a prompt that is not full is copied to each of its samples. On a GPU,
where prompts have CASCADE pages or more, all queries of a group meet the shared pages together
(kernels/attention.py). The tensors that a decoding step reads never move: the step can be a
CUDA graph. A prompt is computed in the same way as a step, each of its tokens being a row.

L layers, K key/value heads, E head dimension, P pages of the longest sample, J of the longest
prompt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from kernels.attention import (
    Pages,
    new_pages,
    page_size,
    paged_attention,
    rows_per_tile,
)
from kernels.rope_write import Norms, Rope, rope_write
from nanomath.rollout.decoder import Decoder

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # of a limit and of what is used of it
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Shared pages from which reading them once for a group is worth another launch.
CASCADE = 2


class Cache:
    """Holds the keys and values of the samples in `slots` and of their prompts.

    A sample has at most `positions` tokens in all, a prompt at most `longest` cached ones
    (all but its last), and up to `prompts` prompts are held at a time. share: whether the
    samples of a prompt share its full pages.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        positions: int,
        longest: int,
        prompts: int,
        share: bool = True,
    ) -> None:
        self.decoder = decoder
        self.share = share
        config = self.config = decoder.model.config
        device = decoder.device
        self.page = page_size(device)
        self.cascades = share and not decoder.exact and decoder.on_gpu
        self.slot_pages = _pages(positions, self.page)
        self.prompt_pages = _pages(longest, self.page)
        integers = {"dtype": torch.int32, "device": device}
        # By slot.
        self.own = torch.arange(slots * self.slot_pages, **integers).view(
            slots, self.slot_pages
        )
        shape = config.num_layers, slots * self.slot_pages + prompts * self.prompt_pages
        kept = new_pages(
            shape, config.num_kv_heads, config.head_dim, decoder.dtype, device
        )
        self.pages = Pages(*kept, self.own.clone())  # of all layers
        self.slot = torch.arange(slots, **integers)
        self.width = rows_per_tile(config.num_heads, config.num_kv_heads)
        self.tiles = torch.full((slots, self.width), -1, **integers)
        self.shared = torch.zeros(slots, **integers)
        self.places = prompts
        self.clear()

    @staticmethod
    def bytes_per_slot(decoder: Decoder, positions: int, longest: int) -> int:
        """Return the bytes of a slot together with those of the prompt that it may hold."""
        page = page_size(decoder.device)
        config = decoder.model.config
        key = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        key *= decoder.dtype.itemsize
        return key * page * (_pages(positions, page) + 2 * _pages(longest, page))

    def clear(self) -> None:
        """Forget all samples and prompts."""
        # On the host: the number of the prompt in each slot.
        self.prompt_of = [-1] * len(self.slot)
        self.free = list(range(self.places))
        self.place: dict[int, int] = {}  # of each prompt
        self.full: dict[int, int] = {}  # pages of each prompt that are full
        self.tile_count = 0
        self.grouped = 0  # rows that `arrange` was last called for, 0 after a change

    def prefill(self, prompts: dict[int, Sequence[int]]) -> None:
        """Compute the keys and values of all but the last token of each prompt, and keep
        them under the prompt's number.
        """
        for number, prompt in prompts.items():
            self.place[number] = self.free.pop()
            self.full[number] = (len(prompt) - 1) // self.page
        device = self.slot.device
        integers = {"dtype": torch.int32, "device": device}
        tokens = torch.tensor(
            [token for prompt in prompts.values() for token in prompt[:-1]],
            device=device,
        )
        if not len(tokens):
            return
        lengths = [len(prompt) - 1 for prompt in prompts.values()]
        first = torch.tensor(
            [self._prompt_page(number) for number in prompts], **integers
        )
        table = first[:, None] + torch.arange(
            _pages(max(lengths), self.page), **integers
        )
        self.step_pages = self.pages._replace(table=table)
        self.tiles_used = 0
        decoder = self.decoder
        if decoder.small is not None:
            return decoder.small.prefill(
                tokens, lengths, decoder.rope(max(lengths)), self.step_pages
            )
        self.step_slot = torch.arange(len(prompts), **integers).repeat_interleave(
            torch.tensor(lengths, device=device)
        )
        self.position = torch.cat(
            [torch.arange(length, **integers) for length in lengths]
        )
        self.length = self.position + 1
        decoder.states(tokens, self.attend, max(lengths))

    def _prompt_page(self, number: int) -> int:
        """Return the number of a prompt's first page."""
        return self.own.numel() + self.place[number] * self.prompt_pages

    def begin(self, rows: Tensor, prompts: Sequence[int], lengths: Tensor) -> None:
        """Begin samples in slots `rows`: of the prompts with these numbers, with `lengths`
        tokens each.
        """
        for row, number in zip(rows.tolist(), prompts, strict=True):
            self.prompt_of[row] = number
        integers = {"dtype": torch.int64, "device": rows.device}
        first = torch.tensor(
            [self._prompt_page(number) for number in prompts], **integers
        )[:, None]
        shared = torch.tensor(
            [self.full[number] if self.share else 0 for number in prompts], **integers
        )[:, None]
        own = self.own[rows].long()
        page = torch.arange(self.slot_pages, device=rows.device)
        self.pages.table[rows] = torch.where(page < shared, first + page, own).int()
        at = ((page >= shared) & (page * self.page < lengths[:, None] - 1)).nonzero(
            as_tuple=True
        )
        for kept in self.pages[:2]:
            kept[:, own[at]] = kept[:, (first + page)[at]]
        self.grouped = 0

    def move(self, source: Tensor, target: Tensor) -> None:
        """Move the samples in slots `source`, with their pages, to slots `target`."""
        self.pages.table[target] = self.pages.table[source]
        self.own[target], self.own[source] = self.own[source], self.own[target]
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            self.prompt_of[t] = self.prompt_of[s]
        self.grouped = 0

    def forget(self, prompt: int) -> None:
        """Free the pages of a prompt of which no sample is left."""
        self.free.append(self.place.pop(prompt))
        del self.full[prompt]

    def arrange(self, live: int) -> int:
        """Name the groups of the first `live` slots that share pages, before steps of these
        slots.

        Returns the number of tiles: rows of one group whose queries read the shared pages
        together.
        """
        if self.cascades and self.grouped != live:
            groups: dict[int, list[int]] = {}
            for row, number in enumerate(self.prompt_of[:live]):
                groups.setdefault(number, []).append(row)
            cut = [
                (n, rows[i : i + self.width])
                for n, rows in groups.items()
                for i in range(0, len(rows), self.width)
            ]
            self.tile_count = 0
            if max(self.full[number] for number in groups) >= CASCADE:
                rows = [rows + [-1] * (self.width - len(rows)) for _, rows in cut]
                self.tiles.fill_(-1)
                self.tiles[: len(cut)] = torch.tensor(rows, dtype=torch.int32)
                self.shared[: len(cut)] = torch.tensor(
                    [self.full[number] for number, _ in cut], dtype=torch.int32
                )
                self.tile_count = len(cut)
            self.grouped = live
        return self.tile_count

    def prepare(self, positions: Tensor, tiles: int) -> None:
        """Say what the next step feeds: the tokens of the first len(positions) slots, which
        stand at `positions` (-1: the slot is done).
        """
        rows = len(positions)
        self.position = positions
        self.length = positions + 1
        self.step_slot = self.slot[:rows]
        self.step_pages = self.pages._replace(table=self.pages.table[:rows])
        self.tiles_used = tiles

    def attend(
        self, layer: int, qkv: Tensor, rope: Rope, norms: Norms, eps: float
    ) -> Tensor:
        """Write the keys and values of the step's rows into the cache, and attend to all up
        to them.

        Returns [rows, H E] from qkv [rows, (H + 2 K) E].
        """
        keys, values, table = self.step_pages
        pages = Pages(keys[layer], values[layer], table)
        tiles = self.tiles_used
        q = rope_write(qkv, self.position, self.step_slot, rope, pages, norms, eps)
        groups = (self.tiles[:tiles], self.shared[:tiles]) if tiles else ()
        window = self.config.sliding_window
        return paged_attention(
            q, pages, self.step_slot, self.length, window, *groups
        ).flatten(1)


def _pages(tokens: int, page: int) -> int:
    """Return how many pages of `page` tokens hold so many tokens."""
    return -(-tokens // page)


def free_memory(device: torch.device) -> int:
    """Return how many bytes could be allocated now, by the machine and, on a CPU, the limits of
    the control groups that this process is in.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # what the operating system would give up its caches for
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        available = 1024 * next(
            int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
        return min(available, *rooms(CGROUPS, Path("/proc/self/cgroup")))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rooms(root: Path, membership: Path) -> list[int]:
    """Return what each control group above this process leaves of its limit, in bytes; the
    files' names are those of version 2 and 1. Memory that holds read files counts as left. A
    group whose files cannot be read says nothing.
    """
    named = membership.read_text().splitlines() if membership.is_file() else []
    places = {root, root / "memory"}
    for line in named:  # 0::/PATH, or N:memory:/PATH
        _, kind, path = line.split(":", 2)
        here = (root / "memory" if kind else root) / path.lstrip("/")
        places |= {
            place for place in (here, *here.parents) if place.is_relative_to(root)
        }
    found = [sys.maxsize]
    for place, (limit, used) in product(places, CGROUP_FILES):
        with suppress(OSError, ValueError):  # ValueError: the limit is "max"
            most = int((place / limit).read_text())
            stat = dict(
                map(str.split, (place / "memory.stat").read_text().splitlines())
            )
            taken = int((place / used).read_text()) - int(stat.get("inactive_file", 0))
            found.append(max(0, most - taken))
    return found
