"""Sequences of different lengths in one row, what they share computed once, and their logprobs.

    log pi(y_t | y_<t) = z_{y_t} - log sum_v exp z_v,   z = logits / temperature
    H_t = - sum_v pi(v) log pi(v)

A model computes on one row of N tokens without padding, in which sequences stand one after the
other. Of sequences that begin alike (the G completions of a prompt) the beginning stands there
once: its tokens are computed once, forward and backward, and what follows attends to them,

    o_t = sum_s softmax_s(q_t . k_s / sqrt(E)) v_s,   s over the shared beginning, then its own

which is what a pass over whole sequences computes, up to rounding ("Prefix Grouper", arXiv
2506.05433).

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

from kernels.causal_attention import Pieces
from kernels.linear_logprob import linear_logprob
from nanomath.models.transformer import Transformer


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
class Layout:
    """One row of N tokens in which sequences stand one after the other, and what is attended to."""

    tokens: Tensor  # int64 [1, N]
    positions: Tensor  # int64 [1, N], from 0 in each sequence
    pieces: Pieces

    def to(self, device: torch.device | str) -> Layout:
        """Return the same layout on another device."""
        return Layout(**_moved(self, device))


def _moved(of: Layout | Batch, device: torch.device | str) -> dict[str, Any]:
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
    pieces: list[tuple[int, int, int]] = []

    def put(tokens: Sequence[int], origin: int = -1) -> Tensor:
        where = torch.arange(len(row), len(row) + len(tokens))
        if tokens:
            pieces.append((len(row), len(tokens), origin))
        row.extend(tokens)
        return where

    shared = [prompt for prompt in times if prompt and times[prompt] > 1]
    origin = {prompt: (i, put(prompt)) for i, prompt in enumerate(shared)}
    places = []
    for prompt, example in zip(prompts, examples, strict=True):
        if prompt in origin:
            i, begin = origin[prompt]
            places.append(torch.cat((begin, put(example.response, i))))
        else:
            places.append(put(example.prompt + example.response))
    positions = torch.empty(len(row), dtype=torch.int64)
    for where in places:
        positions[where] = torch.arange(len(where))
    table = torch.tensor(pieces, dtype=torch.int64).view(-1, 3)
    return Layout(torch.tensor([row]), positions[None], Pieces(table)), places


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
    return model.hidden(**vars(layout), embedding_noise=embedding_noise)[0]


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
