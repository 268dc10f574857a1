"""Keys and values on a CPU: a prompt's once for all of its samples, and each sample's own in blocks.

    o = sum over the prompt's keys, then the sample's own, of e^s v / sum of e^s

All queries of a group meet the keys of their prompt in one matrix product, which reads them once. A sample's own keys
begin after the prompt; live samples occupy the first slots, so that products work on plain slices and finished samples
cost nothing. In exact mode blocks begin at multiples of BLOCK in the whole sequence, as in the trainer's attention, and
the end of the prompt that fills no block is copied to each sample.

L layers, C prompts, G samples of one, K key/value heads, R query heads of each, E head dimension, J blocks of W keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.block_attention import BLOCK, SUM, exponentials, row_padding, scaled, weighted_values
from nanomath.models.transformer import ModelConfig, causal_attention, exact_causal_attention, window_mask
from nanomath.rollout.decoder import Decoder, Heads

Keep = Callable[[int, Tensor, Tensor], None]  # layer, k and v [P, K, T, E]


def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], keep: Keep) -> None:
    """Run all but the last token of each prompt through the decoder; `keep` gets each layer's keys and values, padded
    at the end to the longest.
    """
    config, device = decoder.model.config, decoder.model.device
    lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    if not (longest := max(map(len, prompts)) - 1):
        return
    place = torch.arange(longest, device=device)
    filled = place < lengths[:, None]  # [P, T]: only real tokens go through the matrix products
    grid = (filled.flatten().cumsum(0) - 1).clamp(min=0).view(filled.shape)
    causal = (exact_causal_attention if decoder.exact else causal_attention)(config.sliding_window)

    def attend(layer: int, heads: Heads) -> Tensor:
        q, k, v = (x[grid].transpose(1, 2) for x in heads.rotated(config.num_heads, config.head_dim))
        keep(layer, k, v)
        return causal(layer, q, k, v).transpose(1, 2)[filled].flatten(1)

    tokens = torch.tensor([token for prompt in prompts for token in prompt[:-1]], device=device)
    decoder.states(tokens, place.expand(filled.shape)[filled], attend, longest)


class GroupedCache:
    """The cache of one call of `generate`. `slots` samples of at most `new` own tokens, prompts of at most `longest`
    cached tokens (all but the last), of which up to `prompts` are held at a time.
    """

    def __init__(
        self, config: ModelConfig, slots: int, new: int, longest: int, prompts: int, dtype: torch.dtype, exact: bool
    ) -> None:
        self.config, self.dtype, self.exact = config, dtype, exact
        self.align = BLOCK if exact else 1
        self.width = BLOCK if exact else -(-longest // SUM) * SUM  # W of the prompts' blocks
        blocks = -(-longest // self.width) if longest else 0
        layers, kv_heads, size = config.num_layers, config.num_kv_heads, config.head_dim
        # Zeros come from the operating system as they are touched: what is never used takes no memory.
        self.prompt_keys, self.prompt_values = torch.zeros(
            2, layers, blocks, prompts, kv_heads, self.width, size, dtype=dtype
        )
        self.keys, self.values = torch.zeros(
            2, layers, _blocks(new + self.align - 1), slots, kv_heads, BLOCK, size, dtype=dtype
        )
        self.place: dict[int, int] = {}  # of each prompt: the first places are taken, without gaps
        self.prompt = torch.zeros(slots, dtype=torch.int64)  # the place of each slot's prompt
        self.start = torch.zeros(slots, dtype=torch.int64)  # where its own keys begin
        self.grouped = 0  # slots that `_group` has numbered, 0 after a change

    @staticmethod
    def bytes_per_slot(config: ModelConfig, positions: int, longest: int, dtype: torch.dtype) -> int:
        """Memory of a slot and of the prompt that it may hold."""
        tokens = _blocks(positions) * BLOCK + 2 * longest
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize * tokens

    # Prompts and samples come and go.

    def prefill(self, decoder: Decoder, prompts: dict[int, Sequence[int]]) -> None:
        """Compute and keep all but the last token of each prompt, known by a number."""
        places = torch.arange(len(self.place), len(self.place) + len(prompts))
        self.place.update(zip(prompts, places.tolist(), strict=True))
        prefill(decoder, list(prompts.values()), lambda layer, k, v: self._keep_prompts(layer, places, k, v))

    def _keep_prompts(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        blocks = -(-k.shape[2] // self.width)
        room = blocks * self.width - k.shape[2]
        for kept, new in (self.prompt_keys, k), (self.prompt_values, v):
            cut = F.pad(new, (0, 0, 0, room)).unflatten(2, (blocks, self.width))  # [P, K, J, W, E]
            kept[layer, :blocks].index_copy_(1, places, cut.permute(2, 0, 1, 3, 4))

    def begin(self, rows: Tensor, prompts: Sequence[int], lengths: Tensor) -> None:
        """Samples of the prompts with these numbers, of so many tokens, begin in slots `rows`."""
        places = torch.tensor([self.place[prompt] for prompt in prompts])
        self.prompt[rows], self.start[rows] = places, (lengths - 1) // self.align * self.align
        self.grouped = 0
        rest = lengths - 1 > self.start[rows]  # in exact mode: keys in a block that is not full
        if rest.any():
            rows, places, block = rows[rest], places[rest], self.start[rows[rest]] // BLOCK
            self.keys[:, 0, rows] = self.prompt_keys[:, block, places]
            self.values[:, 0, rows] = self.prompt_values[:, block, places]

    def move(self, source: Tensor, target: Tensor, positions: Tensor) -> None:
        """Slots `target` take over the samples in slots `source`, whose tokens stand below `positions`."""
        blocks = _blocks(int((positions - self.start[source]).max()))
        for kept in (*self.keys, *self.values):  # of a layer
            kept[:blocks, target] = kept[:blocks, source]
        self.prompt[target], self.start[target] = self.prompt[source], self.start[source]
        self.grouped = 0

    def forget(self, prompt: int) -> None:
        """No sample of the prompt with this number is left: the last one moves to its place."""
        hole, last = self.place.pop(prompt), len(self.place)
        if hole != last:
            for kept in (self.prompt_keys, self.prompt_values):
                kept[:, :, hole] = kept[:, :, last]
            self.place[next(number for number, place in self.place.items() if place == last)] = hole
            self.prompt[self.prompt == last] = hole
            self.grouped = 0

    # A decoding step.

    def arrange(self, live: int) -> int:
        """Before steps of the first `live` slots: number the samples of each prompt. (The count is a GPU's matter.)"""
        if self.grouped != live:
            self._group(live)
        return 0

    def prepare(self, positions: Tensor, _: int = 0) -> None:
        """The next step feeds the tokens of the first len(positions) slots, which stand at `positions`."""
        rows, kv_heads = len(positions), self.config.num_kv_heads
        own = positions - self.start[:rows]
        self.own_blocks = _blocks(int(own.max()) + 1)
        block = own // BLOCK * len(self.prompt) + torch.arange(rows)  # numbers the blocks of a layer
        block = block[:, None] * kv_heads + torch.arange(kv_heads)
        self.new = (block * BLOCK + (own % BLOCK)[:, None]).flatten()  # and these the keys in them
        prompt_keys, own_keys = torch.arange(self.prompt_blocks * self.width), torch.arange(self.own_blocks * BLOCK)
        seen = torch.cat((prompt_keys < self.start[:rows, None], own_keys <= own[:, None]), dim=1)
        if (window := self.config.sliding_window) is not None:
            keys = torch.cat((prompt_keys.expand(rows, -1), self.start[:rows, None] + own_keys), dim=1)
            seen &= window_mask(positions[:, None], keys, window)
        self.bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, None, :]

    def _group(self, rows: int) -> None:
        """Number the samples of each prompt: `members` [C G] are slots, `number` is each slot's number."""
        prompt = self.prompt[:rows]
        counts = prompt.bincount()
        order = prompt.argsort(stable=True)
        self.number = torch.empty(rows, dtype=torch.int64)
        self.number[order] = torch.arange(rows) - (counts.cumsum(0) - counts)[prompt[order]]
        members = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64)  # what is not filled is not read
        members[prompt, self.number] = torch.arange(rows)
        self.members, self.grouped = members, rows
        self.prompt_blocks = -(-int(self.start[:rows].max()) // self.width) if self.width else 0

    def attend(self, layer: int, heads: Heads) -> Tensor:
        """[rows, H E]: remember the step's keys and values, and attend to all before them."""
        rows, kv_heads, size = len(heads.qkv), self.config.num_kv_heads, self.config.head_dim
        q, k, v = heads.rotated(self.config.num_heads, size)
        self.keys[layer].view(-1, size).index_copy_(0, self.new, k.reshape(-1, size))
        self.values[layer].view(-1, size).index_copy_(0, self.new, v.reshape(-1, size))
        keys = [block[:rows].flatten(0, 1) for block in self.keys[layer, : self.own_blocks]]
        values = [block[:rows].flatten(0, 1) for block in self.values[layer, : self.own_blocks]]
        q = q.reshape(rows, kv_heads, -1, size)
        real = q.shape[2]
        q = F.pad(q, (0, 0, 0, row_padding(real, self.dtype, size)))  # [rows, K, R, E]

        own = q.flatten(0, 1)
        scores = [torch.bmm(own, block.transpose(1, 2)).view(*q.shape[:3], -1) for block in keys]
        scores = torch.cat([*self._prompt_scores(layer, q), *scores], dim=-1)
        if self.exact:
            weights, total = exponentials(scores, self.bias, size**-0.5)
        else:  # twice as fast, but its sums depend on how many keys there are
            weights, total = scaled(scores, self.bias, size**-0.5).softmax(-1), None
        border = self.prompt_blocks * self.width
        out = self._prompt_values(layer, weights[..., :border]) if border else None
        out = weighted_values(weights[..., border:].flatten(0, 1), values, out).view(q.shape)
        out = out if total is None else out / total[..., None]
        return out[:, :, :real].to(self.dtype).flatten(1)

    def _prompt_scores(self, layer: int, q: Tensor) -> list[Tensor]:
        """[rows, K, R, W] for each block of the prompts' keys."""
        if not self.prompt_blocks:
            return []
        grouped = self._by_prompt(q)
        blocks = self._of_prompts(self.prompt_keys[layer])
        return [self._by_row(torch.bmm(grouped, block.transpose(1, 2)), q.shape[2]) for block in blocks]

    def _prompt_values(self, layer: int, weights: Tensor) -> Tensor:
        """The prompts' part [rows K, R, E] of the weighted sum of values."""
        total = weighted_values(self._by_prompt(weights), self._of_prompts(self.prompt_values[layer]))
        return self._by_row(total, weights.shape[2]).flatten(0, 1)

    def _of_prompts(self, kept: Tensor) -> list[Tensor]:
        """[C K, W, E] for each block in use."""
        return [block[: len(self.members)].flatten(0, 1) for block in kept[: self.prompt_blocks]]

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[rows, K, R, ..] -> [C K, G R, ..]."""
        grouped = x[self.members.flatten()].unflatten(0, self.members.shape)
        return grouped.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def _by_row(self, x: Tensor, heads: int) -> Tensor:
        """[C K, G R, ..] -> [rows, K, R, ..]."""
        grouped = x.unflatten(0, (len(self.members), -1)).unflatten(2, (-1, heads)).transpose(1, 2)
        return grouped[self.prompt[: len(self.number)], self.number]


def _blocks(tokens: int) -> int:
    """How many blocks that many own tokens fill."""
    return -(-tokens // BLOCK)
