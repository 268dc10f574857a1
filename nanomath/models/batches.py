"""From sequences of different lengths to rectangles a model computes on, and to logprobs.

    log pi(y_t | y_<t) = z_{y_t} - log sum_v exp z_v,   z = logits / temperature
    H_t = - sum_v pi(v) log pi(v)

An `Example` is a prompt and a response; only response tokens are trained on. `make_batch` lays
sequences out in rows, either one a row (padded at the end) or several (packed: positions
restart, documents do not see one another). Whatever the layout, the batch says where each
response token is predicted, so that losses always see the same [S, R] matrices: S sequences, R
response tokens. B rows, T columns, n response tokens in all.

The temperature is the sampler's, so that the numbers are those of the distribution that was
sampled from. Only the states that predict a response token meet the vocabulary, a chunk of
them at a time; prompts and padding never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.linear_logprob import linear_logprob
from nanomath.models.transformer import Transformer, document_attention


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
class Batch:
    """Rows of tokens, and where in them the response tokens are predicted."""

    tokens: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T], from 0 in each sequence
    documents: Tensor | None  # int64 [B, T], each token's sequence; None: one sequence a row
    row: Tensor  # int64 [n]: the state at (row, column) predicts `target`,
    column: Tensor  # int64 [n]
    target: Tensor  # int64 [n]
    sequence: Tensor  # int64 [n]: which is token `offset` of the response of `sequence`
    offset: Tensor  # int64 [n]
    lengths: Tensor  # int64 [S], response tokens of each sequence

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, tensor in moved.items():
            moved[name] = None if tensor is None else tensor.to(device)
        return Batch(**moved)

    def matrix(self, values: Tensor) -> Tensor:
        """Lay out values [n] of the response tokens as [S, R], zero where there is no token."""
        size = (len(self.lengths), max(1, int(self.lengths.max())))
        return values.new_zeros(size).index_put((self.sequence, self.offset), values)


def make_batch(sequences: Sequence[Example], row_length: int = 0) -> Batch:
    """Lay out sequences one a row, or packed into rows of at most `row_length` tokens.

    ValueError when a prompt is empty (nothing would predict the first token) or a sequence is
    longer than a row.
    """
    lengths = [len(sequence) for sequence in sequences]
    layout = (
        pack_rows(lengths, row_length) if row_length else [[i] for i in range(len(lengths))]
    )
    width = max(sum(lengths[i] for i in row) for row in layout)
    tokens = torch.zeros(len(layout), width, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    documents = torch.full_like(tokens, -1)
    predictions = []  # row, column, sequence, offset of every response token
    for r, row in enumerate(layout):
        start = 0
        for i in row:
            prompt = sequences[i].prompt
            response = sequences[i].response
            if not prompt:
                raise ValueError(
                    f"sequence {i} has an empty prompt: nothing predicts its first token"
                )
            stop = start + lengths[i]
            tokens[r, start:stop] = torch.tensor(prompt + response)
            positions[r, start:stop] = torch.arange(lengths[i])
            documents[r, start:stop] = i
            first = start + len(prompt) - 1
            predictions += [(r, first + t, i, t) for t in range(len(response))]
            start = stop
    row_, column, sequence, offset = torch.tensor(predictions, dtype=torch.int64).view(-1, 4).T
    return Batch(
        tokens=tokens,
        positions=positions,
        documents=documents if row_length else None,
        row=row_,
        column=column,
        target=tokens[row_, column + 1],
        sequence=sequence,
        offset=offset,
        lengths=torch.tensor([len(sequence.response) for sequence in sequences]),
    )


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put items into rows of at most `row_length` tokens, the longest first, where they fit best.

    ValueError for an item that is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []  # left in each row
    for i in by_length(lengths):
        if lengths[i] > row_length:
            raise ValueError(f"sequence {i} has {lengths[i]} tokens: a row holds {row_length}")
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(row_length)
        best = min(fitting, key=lambda r: room[r])
        rows[best].append(i)
        room[best] -= lengths[i]
    return rows


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut items into groups of at most `token_budget` tokens each *after padding*.

    Alike lengths come together. A single item longer than the budget gets a group of its own.
    A budget of 0 puts everything in one group.
    """
    groups: list[list[int]] = []
    for i in by_length(lengths):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (token_budget <= 0 or longest * (len(groups[-1]) + 1) <= token_budget):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def by_length(lengths: Sequence[int]) -> list[int]:
    """The items from the longest to the shortest, equal ones in their order."""
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def response_states(
    model: Transformer, batch: Batch, embedding_noise: Tensor | None = None
) -> Tensor:
    """The states [n, D] that predict the batch's response tokens."""
    attend = None
    if batch.documents is not None:
        attend = document_attention(batch.documents, model.config.sliding_window)
    states = model.hidden(batch.tokens, batch.positions, attend, embedding_noise)
    return states[batch.row, batch.column]


def states_logprobs(
    model: Transformer, states: Tensor, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logprobs and (without gradient) entropies [S, R], zero where there is no token."""
    weight = model.lm_head.weight
    logprobs, entropy = linear_logprob(
        states, weight, batch.target, temperature, exact=model.exact
    )
    return batch.matrix(logprobs), batch.matrix(entropy)


def response_logprobs(
    model: Transformer,
    batch: Batch,
    temperature: float = 1.0,
    embedding_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`states_logprobs` of the batch's own states."""
    states = response_states(model, batch, embedding_noise)
    return states_logprobs(model, states, batch, temperature)


@torch.no_grad()
def response_scores(
    model: Transformer, examples: list[Example], token_budget: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies, float32 [S, R], of all responses, on the CPU, by micro-batches.

    Nothing is kept for a backward pass: the peak is one layer's activations or one chunk of
    logits.
    """
    longest = max([1, *(len(example.response) for example in examples)])
    scores = torch.zeros(2, len(examples), longest)
    for micro in micro_batches([len(example) for example in examples], token_budget):
        batch = make_batch([examples[i] for i in micro]).to(model.device)
        found = torch.stack(response_logprobs(model, batch, temperature))
        scores[:, micro, : found.shape[2]] = found.float().cpu()
    return scores[0], scores[1]
