"""Several processes that compute what one would: `torchrun --nproc_per_node N train_sft.py ...`.

    grad L = sum_i w_i grad l_i = sum over ranks of  sum over the rank's items i of  w_i grad l_i

Whatever is a statistic of the whole batch (loss weights w, advantages, metrics) every rank
computes alike, from the whole batch; only forward and backward passes and sampling are shared
out. So gradients are summed over ranks, never averaged, and N ranks follow the path of one.
Without torchrun there is one rank and everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanomath.models.batches import Example, by_length, micro_batches

T = TypeVar("T")
BUCKET = 2**25  # numbers summed in one call: few calls, and a copy of 128 MB at most


def count() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the rank that writes logs and checkpoints and talks to the
    user.
    """
    return number() == 0


def start(device: torch.device) -> torch.device:
    """Meet the other ranks that torchrun started; return this rank's device of the given kind.

    ValueError when there are more ranks than GPUs on a machine.
    """
    device = _own(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        )
    return device


def _own(device: torch.device) -> torch.device:
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    local = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(
            f"rank {local} of this machine finds {gpus} GPUs: set --nproc_per_node to {gpus} "
            "at most"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def finish() -> None:
    """Part from the other ranks, at the end of a run that went well."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def lost(error: BaseException) -> str:
    """Return the line to print when `error` came of another rank's death, "" when it is our
    own.
    """
    of_a_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    if count() == 1 or not of_a_collective:
        return ""
    return (
        f"rank {number()} of {count()}: another rank died and this one cannot go on; "
        "its own message says why"
    )


def any_rank(flag: bool) -> bool:
    """Return, on all ranks, whether the flag is true on one of them."""
    if count() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def barrier() -> None:
    """Wait here for all ranks."""
    any_rank(False)


def from_main(value: T) -> T:
    """Return the main rank's value on all ranks."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def sum_(tensors: Sequence[Tensor]) -> None:
    """Add up each tensor over the ranks, in place, to the same bits on all of them."""
    if count() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, values in zip(bucket, parts, strict=True):
            tensor.copy_(values.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group neighbours of one type and device: at most BUCKET numbers together, or one
    larger tensor.
    """
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        alike = not bucket or kind == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and size + tensor.numel() <= BUCKET):
            yield bucket
            bucket = []
            size = 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's part of items that all ranks have: every count()-th."""
    return items[number() :: count()]


def gather(part: Sequence[T]) -> list[T]:
    """Return everyone's parts as one list, in the order that `share` cut; parts are
    pickled.
    """
    if count() == 1:
        return list(part)
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, list(part))
    whole: list[Any] = [None] * sum(map(len, parts))
    for rank, values in enumerate(parts):
        whole[rank :: count()] = values
    return whole


def micro_batches_of(
    model: nn.Module,
    examples: Sequence[Example],
    token_budget: int = 0,
    rows: Tensor | None = None,
    share_prompts: bool = True,
) -> Iterator[tuple[Tensor, bool]]:
    """Return this rank's micro-batches of some rows (None: all), each with whether it
    counts.

    The rows are dealt out by length, those of one prompt to one rank, and cut into
    micro-batches of `token_budget` tokens (0: all at once). The ranks of a sharded model
    meet in every forward and backward pass: those with fewer micro-batches go through the
    shortest example once more, which must then have weight 0.
    """
    rows = torch.arange(len(examples)) if rows is None else rows
    chosen = [examples[i] for i in rows.tolist()]
    cuts = []
    for items in _deal(chosen, count(), share_prompts):
        groups = micro_batches([chosen[i] for i in items], token_budget, share_prompts)
        cuts.append([[items[place] for place in group] for group in groups])
    mine = [(micro, True) for micro in cuts[number()]]
    missing = max(map(len, cuts)) - len(mine)
    if missing and is_sharded(model):
        shortest = min(range(len(chosen)), key=lambda i: len(chosen[i]))
        mine += [([shortest], False)] * missing
    for micro, counts in mine:
        yield rows[micro], counts


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model, or a part of it, is cut over the ranks; see sharding.py."""
    return any(hasattr(module, "unshard") for module in model.modules())


def _deal(
    examples: Sequence[Example], parts: int, share_prompts: bool
) -> list[list[int]]:
    """Return the items of each part: from the longest down, each goes where there is least
    so far.

    Those of one prompt go together, if that leaves no part without any.
    """
    members: dict[Hashable, list[int]] = {}
    for i, example in enumerate(examples):
        members.setdefault(tuple(example.prompt) if share_prompts else i, []).append(i)
    units = list(members.values())
    if len(units) < parts:
        units = [[i] for i in range(len(examples))]
    lengths = [sum(len(examples[i]) for i in unit) for unit in units]
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for unit in by_length(lengths):
        least = loads.index(min(loads))
        shares[least] += units[unit]
        loads[least] += lengths[unit]
    return [sorted(items) for items in shares]
