"""Weights cut over the ranks (FSDP2; arXiv 2304.11277), for models whose weights and Adam
state do not fit one device.

Each rank keeps a float32 slice of every weight; a layer is put together, in the dtype that it
computes in, for the time of its forward and of its backward pass, and the gradients are summed
in float32 into the slices. The slices are thus the optimizer's float32 masters. A parameter
that is cut is a DTensor; the functions on tensors here leave any other tensor as it is. Both
are known by their methods: to import their classes would make every start a third slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nanomath.models.transformer import Layer, Transformer
from nanomath.training import ranks


def shard(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Cut the model's weights over the ranks, layer by layer, to compute in `dtype`.

    With one rank nothing is cut.
    """
    if ranks.count() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    exact = torch.promote_types(dtype, torch.float32)
    model.to(exact)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == exact else dtype, reduce_dtype=exact
    )
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.count(),))
    for module in (*model.model.layers, model):
        # The root's weights stay together after its forward pass: lm_head is used after that,
        # and by the backward pass.
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=module is not model,
        )
        # Gradients are sums over ranks, and gloo knows no other way to say so
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    for parameter in model.parameters():
        parameter.computes_in = dtype
    return model


def computes_in(parameter: Tensor) -> torch.dtype:
    """Return the dtype that a parameter has in forward passes."""
    return getattr(parameter, "computes_in", parameter.dtype)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Give every rank all weights for the time of the block, so that forward passes without
    gradient need no other rank.

    It is for work that differs in length from rank to rank (sampling, scoring), and for
    saving. All ranks must come here together.
    """
    parts = [
        m
        for m in model.modules()
        if hasattr(m, "unshard") and is_slice(next(m.parameters()))
    ]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(isinstance(part, Layer), recurse=False)


def drop_copies(model: nn.Module) -> None:
    """Drop the weights that a forward pass put together and kept: the next pass must see
    the updated slices.
    """
    for module in model.modules():
        if hasattr(module, "unshard"):
            module.reshard()


def is_slice(tensor: Tensor) -> bool:
    """Return whether this rank has only a slice of the tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's slice of the tensor; they share memory."""
    return tensor.to_local() if is_slice(tensor) else tensor


def assemble(slice_: Tensor, like: Tensor) -> Tensor:
    """Return the whole of which every rank gives its slice, cut as `like` is.

    All ranks must come here together.
    """
    if not is_slice(like):
        return slice_
    from torch.distributed.tensor import DTensor

    # From where the weight lies: a collective needs its device, the slice may be kept on
    # another.
    slice_ = slice_.to(like.device)
    cut = DTensor.from_local(
        slice_,
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )
    return cut.full_tensor()


def slice_of(whole_: Tensor, like: Tensor) -> Tensor:
    """Return this rank's slice of a whole that all ranks have, cut as `like` is."""
    if not is_slice(like):
        return whole_
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole_.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    ).to_local()
