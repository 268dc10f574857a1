"""The states of a model at some places of token sequences that begin alike."""

from __future__ import annotations

import os.path
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from nanomath.models.batches import Example, lay_out, layout_states, micro_batches
from nanomath.models.transformer import Transformer


@torch.no_grad()
def states_at(
    model: Transformer,
    examples: Sequence[Example],
    places: Sequence[Sequence[int]],
    token_budget: int = 0,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (rows, states [n, D]) by micro-batches, until every example was among the rows.

    The states are those at places[i] of example i, in the order of the rows.
    """
    for rows in micro_batches(examples, token_budget):
        layout, where = lay_out([examples[i] for i in rows])
        at = torch.cat([w[list(places[i])] for w, i in zip(where, rows, strict=True)])
        states = layout_states(model, layout.to(model.device))
        yield rows, states[at.to(model.device)]


def with_common_prompts(
    sequences: Sequence[list[int]],
    places: Sequence[Sequence[int]],
    groups: Sequence[Hashable],
) -> list[Example]:
    """Return token sequences as examples whose prompt is what those of a group begin with
    alike.

    A prompt ends before the first place of its sequences.
    """
    beginnings: dict[Hashable, list[list[int]]] = {}
    for tokens, at, group in zip(sequences, places, groups, strict=True):
        beginnings.setdefault(group, []).append(tokens[: min(at)])
    shared = {
        group: len(os.path.commonprefix(all_)) for group, all_ in beginnings.items()
    }
    lengths = [shared[group] for group in groups]
    return [Example(s[:n], s[n:]) for s, n in zip(sequences, lengths, strict=True)]
