"""Sequences of different lengths in one row, what they share computed once, and their logprobs.

    log pi(y_t | y_<t) = z_{y_t} - log sum_v exp z_v,   z = logits / temperature
    H_t = - sum_v pi(v) log pi(v)

A model computes on one row of N tokens without padding, in which sequences stand one after the
other. Of sequences that begin alike (the G completions of a prompt) the beginning stands there
once: its tokens are computed once, forward and backward, and what follows attends to them,

    o_t = sum_s softmax_s(q_t . k_s / sqrt(E)) v_s,   s over the shared beginning, then its own

which is what a pass over whole sequences computes, up to rounding ("Prefix Grouper", arXiv
2506.05433). Only attention is padded: its blocks are [S, R] queries and [S, T] keys.

An `Example` is a prompt and a response; only response tokens are trained on. The batch says
where each of them is predicted, so that losses always see the same [S, R] matrices: S
sequences, R response tokens, n in all. The temperature is the sampler's, so that the numbers
are those of the distribution that was sampled from. Only the states that predict a response
token meet the vocabulary, a chunk of them at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels.exact_attention import block_attention
from kernels.linear_logprob import linear_logprob
from nanomath.models.transformer import Attend, Transformer


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt (at least one) and of the response that follows it.

    The response ends with its eos, if it ended.
    """

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Block:
    """Pieces of the row whose tokens attend together: S pieces of at most R tokens, and T
    keys.
    """

    # int64 [S, R]: where the tokens of each piece stand, 0 beyond its end
    queries: Tensor
    keys: Tensor  # int64 [S, T]: and those it sees, from the first of its sequence
    first: Tensor  # int64 [S]: how many come before its own
    kept: Tensor  # int64 [n]: which of the S R queries are tokens


@dataclass(frozen=True)
class Layout:
    """One row of N tokens in which sequences stand one after the other.

    `blocks` hold all of the tokens in their order.
    """

    tokens: Tensor  # int64 [1, N]
    positions: Tensor  # int64 [1, N], from 0 in each sequence
    blocks: list[Block]

    def to(self, device: torch.device | str) -> Layout:
        """Return the same layout on another device."""
        blocks = [Block(**_moved(block, device)) for block in self.blocks]
        return Layout(self.tokens.to(device), self.positions.to(device), blocks)

    def attend(self, window: int | None, exact: bool) -> Attend:
        """Return the attention of the row's tokens to what they see of their sequence."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [N, heads, E]
            parts = []
            for block in self.blocks:
                out = block_attention(
                    _rows(q, block.queries),
                    _rows(k, block.keys),
                    _rows(v, block.keys),
                    block.first,
                    window,
                    exact,
                )
                parts.append(
                    out.transpose(1, 2).flatten(0, 1).index_select(0, block.kept)
                )
            return torch.cat(parts).transpose(0, 1)[None]

        return attend


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Gather the tokens at places [S, R] of [N, heads, E] as [S, heads, R, E]."""
    return (
        x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
    )


def _moved(of: Block | Batch, device: torch.device | str) -> dict[str, Any]:
    return {field.name: getattr(of, field.name).to(device) for field in fields(of)}


def lay_out(
    examples: Sequence[Example], share: bool = True
) -> tuple[Layout, list[Tensor]]:
    """Return the layout of some examples, and the places [T] of each one's tokens in it,
    int64.

    With `share`, equal prompts stand in the layout once.
    """
    prompts = [tuple(example.prompt) if share else () for example in examples]
    times = Counter(prompts)
    row: list[int] = []

    def put(tokens: Sequence[int]) -> Tensor:
        row.extend(tokens)
        return torch.arange(len(row) - len(tokens), len(row))

    place_of = {prompt: put(prompt) for prompt in times if prompt and times[prompt] > 1}
    alone = [i for i, prompt in enumerate(prompts) if prompt not in place_of]
    places = {i: put(examples[i].prompt + examples[i].response) for i in alone}
    roots = [*place_of.values(), *places.values()]
    blocks = [_block(roots, roots)]
    rest = [i for i in range(len(examples)) if i not in places]
    own = [put(examples[i].response) for i in rest]
    for i, response in zip(rest, own, strict=True):
        places[i] = torch.cat((place_of[prompts[i]], response))
    if rest:
        blocks.append(_block(own, [places[i] for i in rest]))
    positions = torch.empty(len(row), dtype=torch.int64)
    for where in places.values():
        positions[where] = torch.arange(len(where))
    in_order = [places[i] for i in range(len(examples))]
    return Layout(torch.tensor([row]), positions[None], blocks), in_order


def _block(own: Sequence[Tensor], seen: Sequence[Tensor]) -> Block:
    queries = pad_sequence(own, batch_first=True)
    lengths = torch.tensor([len(piece) for piece in own])
    first = torch.tensor([len(piece) for piece in seen]) - lengths
    is_token = torch.arange(queries.shape[1]) < lengths[:, None]
    kept = is_token.flatten().nonzero()[:, 0]
    return Block(queries, pad_sequence(seen, batch_first=True), first, kept)


@dataclass(frozen=True)
class Batch:
    """A layout, and the places in it at which the n response tokens of S sequences are
    predicted.
    """

    layout: Layout
    place: Tensor  # int64 [n]: the state here predicts `target`,
    target: Tensor  # int64 [n]
    sequence: Tensor  # int64 [n]: which is token `offset` of the response of `sequence`
    offset: Tensor  # int64 [n]
    lengths: Tensor  # int64 [S], response tokens of each sequence

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device."""
        return Batch(**_moved(self, device))

    def matrix(self, values: Tensor) -> Tensor:
        """Lay out values [n] of the response tokens as [S, R], zero where there is no token."""
        size = (len(self.lengths), max(1, int(self.lengths.max())))
        return values.new_zeros(size).index_put((self.sequence, self.offset), values)


def make_batch(examples: Sequence[Example], share: bool = True) -> Batch:
    """Return the batch of some examples; with `share`, equal prompts stand in it once.

    ValueError when a prompt is empty: nothing would predict the first token.
    """
    for i, example in enumerate(examples):
        if not example.prompt:
            raise ValueError(
                f"sequence {i} has an empty prompt: nothing predicts its first token"
            )
    layout, places = lay_out(examples, share)
    lengths = torch.tensor([len(example.response) for example in examples])
    before = [
        where[len(e.prompt) - 1 : -1] for where, e in zip(places, examples, strict=True)
    ]
    responses = [token for example in examples for token in example.response]
    return Batch(
        layout=layout,
        place=torch.cat(before),
        target=torch.tensor(responses, dtype=torch.int64),
        sequence=torch.arange(len(examples)).repeat_interleave(lengths),
        offset=torch.cat([torch.arange(n) for n in lengths.tolist()]),
        lengths=lengths,
    )


def micro_batches(
    examples: Sequence[Example], token_budget: int, share: bool = True
) -> list[list[int]]:
    """Cut examples into groups of at most `token_budget` tokens, a shared prompt counted
    once.

    Returns the indices of each group's examples. Examples of similar length come together,
    and so do those of one prompt where the budget allows it. An example longer than the
    budget gets a group of its own. A budget of 0 puts all in one group.
    """
    members: dict[Hashable, list[int]] = {}
    for i in by_length(list(map(len, examples))):
        members.setdefault(tuple(examples[i].prompt) if share else i, []).append(i)
    groups: list[list[int]] = []
    room = 0
    for rows in members.values():
        whole = len(examples[rows[0]].prompt) + sum(
            len(examples[i].response) for i in rows
        )
        known = False  # whether the prompt is in the newest group already
        for i in rows:
            cost = len(examples[i].response) if known else len(examples[i])
            # What fits a group of its own is not taken apart.
            full = cost > room or (not known and room < whole <= token_budget)
            if not groups or (token_budget > 0 and full):
                groups.append([])
                room = token_budget
                cost = len(examples[i])
            groups[-1].append(i)
            room -= cost
            known = share
    return groups


def by_length(lengths: Sequence[int]) -> list[int]:
    """Return the items from the longest to the shortest, equal ones in their order."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def layout_states(
    model: Transformer, layout: Layout, embedding_noise: Tensor | None = None
) -> Tensor:
    """Return the model's states [N, D] of a layout; embedding_noise is [N, D]."""
    attend = layout.attend(model.config.sliding_window, model.exact)
    return model.hidden(layout.tokens, layout.positions, attend, embedding_noise)[0]


def response_states(
    model: Transformer, batch: Batch, embedding_noise: Tensor | None = None
) -> Tensor:
    """Return the states [n, D] that predict the batch's response tokens."""
    return layout_states(model, batch.layout, embedding_noise).index_select(
        0, batch.place
    )


def states_logprobs(
    model: Transformer, states: Tensor, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return logprobs and (without gradient) entropies [S, R] of the response tokens.

    They are zero where there is no token.
    """
    logprobs, entropy = linear_logprob(
        states, model.lm_head.weight, batch.target, temperature, exact=model.exact
    )
    return batch.matrix(logprobs), batch.matrix(entropy)
