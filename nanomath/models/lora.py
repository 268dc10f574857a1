"""LoRA: small matrices are trained beside the weights, which stay as they are (arXiv 2106.09685).

    y = W x + (alpha / r) B A x        A [r, in], B [out, r];  at the start B = 0

W has no gradient, no state of an optimizer and no float32 master. The names are Hugging Face's
(q_proj, not the fused qkv_proj), and so are the files: peft loads what is saved here, and what
peft saves is loaded here.

A model is frozen as the base, and three models share its tensors, so that no weight is held
twice without need:

    the base          the starting model itself, the reference of the KL penalty
    applied_to(base)  the model in training, which adds B A x to what the base computes
    merged(base)      what the sampler runs: W + (alpha / r) B A in memory of its own, computed
                      from W anew each time. W is only read, so it cannot drift

In float32 the merged weights compute what the model in training does (gap_mean 2.6e-7). In
bfloat16, whose numbers lie 1/256 to 1/128 of their size apart, W + (alpha / r) B A is rounded:
after 20 GRPO steps of a tiny model (rank 8) 3% of an update of 5% of W was lost and 32% of one of
0.5%, and gap_mean was 3e-3, twice that of training the weights in bfloat16. The model in training
adds B A x and loses none of it: the sampler draws from something near the policy.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanomath.data.files import read_json, write_json
from nanomath.models.directory import ADAPTER_CONFIG
from nanomath.models.hf_names import hf_slices
from nanomath.models.stored import naming, number, one_line, whole
from nanomath.models.transformer import Transformer

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN = {  # what peft's config says of an adapter as above; anything else computes otherwise
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


class Adapter(nn.Module):
    """scale B A of one linear layer, computed in the type of what it is applied to."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.A.to(x.dtype)) * self.scale
        return F.linear(low, self.B.to(x.dtype))

    def product(self) -> Tensor:
        """scale B A [out, in]."""
        return self.B @ self.A * self.scale


class LoRA(nn.ModuleDict):
    """The adapters of a model, by the names of their linear layers with / in place of the dots.

    targets: names of linear layers, whole (model.layers.0.mlp.up_proj) or their last part. A
    is uniform within 1 / sqrt(in), which `seed` draws. base: how a saved adapter names the
    model.
    """

    def __init__(
        self,
        model: Transformer,
        rank: int,
        alpha: float,
        targets: Collection[str],
        seed: int = 0,
        base: str = "",
    ) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.base = base
        generator = torch.Generator().manual_seed(seed)
        exact = torch.promote_types(model.dtype, torch.float32)
        for name, weight in linear_layers(model):
            if name in targets or name.rpartition(".")[2] in targets:
                rows, columns = weight.shape
                a = torch.empty(rank, columns).uniform_(-1, 1, generator=generator)
                a = (a / math.sqrt(columns)).to(model.device, exact)
                b = a.new_zeros(rows, rank)
                self[name.replace(".", "/")] = Adapter(a, b, alpha / rank)

    def of(self, name: str) -> Adapter | None:
        """The adapter of a linear layer, by its name."""
        return self._modules.get(name.replace(".", "/"))

    def applied_to(self, base: Transformer) -> Transformer:
        """A model that computes with the adapters, whose weights are the tensors of `base`;
        these are frozen.
        """
        model = sharing_weights(base.requires_grad_(False))
        for module, parts in self._by_module(base).items():
            model.get_submodule(module).register_forward_hook(adding(parts))
        return model

    def merged(self, base: Transformer, dtype: torch.dtype) -> Transformer:
        """A model of plain weights in place of `applied_to`, for `merge` to bring up to date.
        What has adapters has weights of its own, in `dtype`; the other tensors are those of
        `base`.
        """
        model = sharing_weights(base)
        for module in self._by_module(base):
            linear = model.get_submodule(module)
            own = linear.weight.detach().to(dtype, copy=True)
            linear.weight = nn.Parameter(own, requires_grad=False)
        self.merge(base, model)
        return model

    @torch.no_grad()
    def merge(self, base: Transformer, into: Transformer) -> None:
        """Write W + scale B A into the weights of `into`, in place; W is that of `base`."""
        weights = dict(linear_layers(into))
        for name, weight in linear_layers(base):
            if adapter := self.of(name):
                weights[name].copy_(weight + adapter.product())

    def _by_module(
        self, model: Transformer
    ) -> dict[str, list[tuple[int, Adapter | None]]]:
        """By our name of a linear layer that has adapters, the rows of its parts with theirs."""
        modules: dict[str, list[tuple[int, Adapter | None]]] = {}
        for name, ours, start, stop in hf_slices(model):
            part = (stop - start, self.of(name.removesuffix(".weight")))
            if ours.endswith(".weight"):
                modules.setdefault(ours.removesuffix(".weight"), []).append(part)
        return {
            module: parts
            for module, parts in modules.items()
            if any(a for _, a in parts)
        }

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by their names in peft's file."""
        return {
            f"{PREFIX}{key.replace('/', '.')}.lora_{name}.weight": parameter.detach()
            for key, adapter in self.items()
            for name, parameter in adapter.named_parameters()
        }

    def save(self, directory: Path) -> None:
        """Write the adapter as peft does, into a new directory."""
        directory.mkdir(parents=True)
        config = {
            **PLAIN,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted({key.rpartition("/")[2] for key in self}),
            "inference_mode": True,
        }
        write_json(directory / ADAPTER_CONFIG, config)
        tensors = {name: t.cpu().contiguous() for name, t in self.tensors().items()}
        save_file(tensors, directory / WEIGHTS, {"format": "pt"})
        # safetensors makes it readable to its owner only
        shutil.copymode(directory / ADAPTER_CONFIG, directory / WEIGHTS)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Take over the numbers of a saved adapter. ValueError for one of another rank, alpha
        or other layers.
        """
        _, alpha, stored = _read(directory)
        if alpha != self.alpha:
            raise ValueError(
                f"{directory}: lora_alpha is {alpha:g}, but the run has {self.alpha:g}"
            )
        own = self.tensors()
        if odd := own.keys() ^ stored.keys():
            fault = "lacks" if odd <= own.keys() else "holds"
            raise ValueError(
                f"{directory / WEIGHTS} {fault} {one_line(min(odd))}: it is an adapter of other "
                "layers"
            )
        for name, tensor in own.items():
            if stored[name].shape != tensor.shape:
                raise ValueError(
                    f"{directory / WEIGHTS}: {name} has shape {list(stored[name].shape)}, expected "
                    f"{list(tensor.shape)}"
                )
            tensor.copy_(stored[name])


def load_lora(model: Transformer, directory: Path) -> LoRA:
    """The adapters that `save` or peft wrote into a directory, as those of the model.

    FileNotFoundError when a file is not there; ValueError when one is damaged, when peft would
    compute otherwise than B A x, or when the layers are not those of the model.
    """
    rank, alpha, stored = _read(directory)
    names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in stored}
    lora = LoRA(model, rank, alpha, names)
    lora.load(directory)
    return lora


def _read(directory: Path) -> tuple[int, float, dict[str, Tensor]]:
    """Rank, alpha and tensors of a saved adapter."""
    for name in ADAPTER_CONFIG, WEIGHTS:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"no {name} in {directory}")
    file = directory / ADAPTER_CONFIG
    config = read_json(file)
    with naming(file):
        for key, plain in PLAIN.items():
            if (config.get(key) or plain) != plain:
                raise ValueError(
                    f"{key} = {config[key]!r:.60} is not supported: expected {plain!r}"
                )
        rank = whole(config.get("r"), "r")
        alpha = number(config.get("lora_alpha"), "lora_alpha")
    try:
        return rank, alpha, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(
            f"{directory / WEIGHTS} is not a readable safetensors file: {one_line(error)}"
        ) from None


def linear_layers(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, weight) of every linear layer in the blocks; the weight is a view of
    the model's.
    """
    parameters = dict(model.named_parameters())
    for name, ours, start, stop in hf_slices(model):
        weight = parameters[ours].detach()[start:stop]
        if name.startswith("model.layers.") and weight.dim() == 2:
            yield name.removesuffix(".weight"), weight


def sharing_weights(model: Transformer) -> Transformer:
    """The model a second time, with the same tensors for parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def adding(
    parts: list[tuple[int, Adapter | None]],
) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    """A forward hook that adds to each part of a linear layer's result what its adapter gives."""

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        pieces = output.split([rows for rows, _ in parts], dim=-1)
        return torch.cat(
            [
                piece if adapter is None else piece + adapter(*inputs)
                for piece, (_, adapter) in zip(pieces, parts, strict=True)
            ],
            dim=-1,
        )

    return add
