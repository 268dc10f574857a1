"""States of many sequences, of which some begin alike: what they share is computed once.

The samples of a problem are scored after the same question. Its keys and values in every layer
are kept from one pass, and what follows it attends to them and to itself:

    o_t = sum_s softmax_s(q_t . k_s / sqrt(E)) v_s,    s over the shared beginning, then the own tokens up to t

The numbers are those of a pass over whole sequences, up to rounding. Without gradient. S
sequences, P shared beginnings of W tokens, T own tokens, n places; D, K, E as in
transformer.py.
"""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.exact_attention import window_mask
from nanomath.models.batches import micro_batches
from nanomath.models.transformer import Attend, Transformer, causal_attention

UNSEEN = 2**30  # the position of padding: later than that of any token
ALONE = object()  # the group of those that have none


@torch.no_grad()
def states_at(
    model: Transformer,
    sequences: Sequence[list[int]],
    places: Sequence[Sequence[int]],
    groups: Sequence[Hashable],
    token_budget: int = 0,
) -> Iterator[tuple[list[int], Tensor]]:
    """(rows, states [n, D]) until every sequence was among the rows: the states at places[i]
    of sequences[i], in order of the rows. Sequences of one group share what they have in
    common before the first of their places.

    token_budget: tokens, padded, that are computed at once, and whose keys are kept; 0: any
    number.
    """
    for prefixes, members in _shared(sequences, places, groups, token_budget):
        kept = _keys_and_values(model, prefixes) if any(prefixes) else []
        rows = [i for group in members for i in group]
        owner = [p for p, group in enumerate(members) for _ in group]
        own = [sequences[i][len(prefixes[p]) :] for i, p in zip(rows, owner, strict=True)]
        for batch in micro_batches([len(tokens) for tokens in own], token_budget):
            first = [len(prefixes[owner[j]]) for j in batch]
            states = _continue(
                model, [own[j] for j in batch], first, [owner[j] for j in batch], kept
            )
            at = [
                (r, place - first[r]) for r, j in enumerate(batch) for place in places[rows[j]]
            ]
            row, column = zip(*at, strict=True)
            yield [rows[j] for j in batch], states[list(row), list(column)]


def _shared(
    sequences: Sequence[list[int]],
    places: Sequence[Sequence[int]],
    groups: Sequence[Hashable],
    token_budget: int,
) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """What groups share, and the rows of each; as many groups at a time as the budget holds."""
    sizes = Counter(groups)
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group if sizes[group] > 1 else ALONE, []).append(i)
    shared = [
        []
        if group is ALONE
        else os.path.commonprefix([sequences[i][: min(places[i])] for i in rows])
        for group, rows in members.items()
    ]
    rows = list(members.values())
    for some in micro_batches([len(tokens) for tokens in shared], token_budget):
        yield [shared[p] for p in some], [rows[p] for p in some]


def _keys_and_values(
    model: Transformer, prefixes: Sequence[list[int]]
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [P, K, W, E] of every layer."""
    kept: list[tuple[Tensor, Tensor]] = []
    causal = causal_attention(model.config.sliding_window, model.exact)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((k, v))
        return causal(layer, q, k, v)

    model.hidden(padded(prefixes, model.device), attend=attend)
    return kept


def _continue(
    model: Transformer,
    own: list[list[int]],
    first: list[int],
    owner: list[int],
    kept: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """States [S, T, D] of what follows `first` shared tokens, those of prefix `owner`."""
    tokens = padded(own, model.device)
    width = max(first)
    if not width:
        return model.hidden(tokens)
    start, prefix = (torch.tensor(values, device=model.device) for values in (first, owner))
    positions = start[:, None] + torch.arange(tokens.shape[1], device=model.device)
    before = torch.arange(width, device=model.device).expand(len(own), width)
    keys = torch.cat((before.masked_fill(before >= start[:, None], UNSEEN), positions), dim=1)
    seen = window_mask(positions[:, :, None], keys[:, None, :], model.config.sliding_window)[
        :, None
    ]
    return model.hidden(tokens, positions, _after(kept, prefix, width, seen))


def _after(
    kept: list[tuple[Tensor, Tensor]], prefix: Tensor, width: int, seen: Tensor
) -> Attend:
    """Attention to the first `width` kept keys of each row's prefix, and to its own."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (
            torch.cat((old[prefix, :, :width], new), dim=2)
            for old, new in zip(kept[layer], (k, v), strict=True)
        )
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)

    return attend


def padded(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    """Tokens, one sequence a row, int64, with zeros at their ends."""
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True
    ).to(device)
