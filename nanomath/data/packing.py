"""From sequences of different lengths to the rectangles a model computes on, and back.

An `Example` is a prompt and a response; only response tokens are trained on. `make_batch` lays
sequences out in rows, either one a row (padded at the end) or several (packed: positions
restart, documents do not see one another). Whatever the layout, the batch says where each
response token is predicted, so that losses always see the same [S, R] matrices: S sequences, R
response tokens. B rows, T columns, n response tokens in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt (at least one) and of the response that follows it (it ends with
    its eos, if it ended).
    """

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and where in them the response tokens are predicted."""

    tokens: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T], from 0 in each sequence
    documents: (
        Tensor | None
    )  # int64 [B, T], the sequence each token belongs to; None when rows hold one each
    row: Tensor  # int64 [n]: the state at (row, column) predicts `target`,
    column: Tensor  # int64 [n]
    target: Tensor  # int64 [n]
    sequence: Tensor  # int64 [n]: which is token `offset` of the response of `sequence`
    offset: Tensor  # int64 [n]
    lengths: Tensor  # int64 [S], response tokens of each sequence

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{
                name: None if value is None else value.to(device)
                for name, value in moved.items()
            }
        )

    def matrix(self, values: Tensor) -> Tensor:
        """Lay out values [n] of the response tokens as [S, R], zero where there is no token."""
        size = (len(self.lengths), max(1, int(self.lengths.max())))
        return values.new_zeros(size).index_put((self.sequence, self.offset), values)


def make_batch(sequences: Sequence[Example], row_length: int = 0) -> Batch:
    """Lay out sequences in rows: one a row, or packed into rows of at most `row_length` tokens
    when that is positive.

    ValueError when a prompt is empty (nothing would predict the first token) or a sequence is
    longer than a row.
    """
    for number, sequence in enumerate(sequences):
        if not sequence.prompt:
            raise ValueError(
                f"sequence {number} has an empty prompt: nothing predicts its first token"
            )
    rows = (
        pack_rows([len(s) for s in sequences], row_length)
        if row_length
        else [[i] for i in range(len(sequences))]
    )
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    documents = torch.full_like(tokens, -1)
    places: list[
        tuple[int, int, int, int]
    ] = []  # row, column of the first prediction, sequence, response length
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            sequence = sequences[i]
            stop = start + len(sequences[i])
            tokens[r, start:stop] = torch.tensor(sequence.prompt + sequence.response)
            positions[r, start:stop] = torch.arange(stop - start)
            documents[r, start:stop] = i
            places.append((r, start + len(sequence.prompt) - 1, i, len(sequence.response)))
            start = stop
    row_, column, sequence_, offset = _predictions(places)
    return Batch(
        tokens=tokens,
        positions=positions,
        documents=documents if row_length else None,
        row=row_,
        column=column,
        target=tokens[row_, column + 1],
        sequence=sequence_,
        offset=offset,
        lengths=torch.tensor([len(s.response) for s in sequences]),
    )


def _predictions(
    places: list[tuple[int, int, int, int]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, column, sequence and offset of every response token's prediction, int64 [n] each."""
    row, first, sequence, length = torch.tensor(places).T
    offset = torch.cat([torch.arange(n) for n in length.tolist()])
    repeated = [value.repeat_interleave(length) for value in (row, first, sequence)]
    return repeated[0], repeated[1] + offset, repeated[2], offset


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put items into rows of at most `row_length` tokens, the longest first, each where it
    fits best.
    """
    rows: list[tuple[int, list[int]]] = []  # room left, items
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > row_length:
            raise ValueError(f"sequence {i} has {lengths[i]} tokens: a row holds {row_length}")
        fitting = [r for r, (room, _) in enumerate(rows) if room >= lengths[i]]
        if fitting:
            best = min(fitting, key=lambda r: rows[r][0])
            room, items = rows[best]
            rows[best] = (room - lengths[i], [*items, i])
        else:
            rows.append((row_length - lengths[i], [i]))
    return [items for _, items in rows]


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut items into groups of at most `token_budget` tokens each *after padding*, alike
    lengths together.

    A single item longer than the budget gets a group of its own. A budget of 0 puts everything
    in one group.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (token_budget <= 0 or longest * (len(groups[-1]) + 1) <= token_budget):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
