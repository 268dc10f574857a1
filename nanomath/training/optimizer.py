"""AdamW (arXiv 1711.05101) on float32 weights, and the learning-rate schedule.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- w - lr [ m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w ]

g is the gradient, summed over micro-batches and ranks and clipped. A penalty lambda ||w - w0||^2 on
the distance to the start w0 (L2-SP, arXiv 1802.01483) is a part of the loss: 2 lambda (w - w0), of
the float32 weights, is added to the sum. So it is clipped and divided by sqrt(v) like any other
gradient, and unlike `decay`.

At a learning rate of 1e-6 an update is far below the resolution of a bfloat16 weight and would
vanish. So when a model computes in bfloat16 the optimizer keeps float32 masters: gradients of
all micro-batches are summed in float32, the masters are updated, and their rounded values are
written into the model's own tensors, in place. Masters and moments may live on the CPU while
the model does not.

The moments m and v may be kept in bfloat16 between the steps. Its resolution is 1/256, and an
average that moves by less, as v does with b2 = 0.999, would be stuck if it were rounded to the
nearest. It is rounded up or down by chance instead (arXiv 1502.02551), up with the probability
of the part that is cut off, which is right on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanomath.training import ranks
from nanomath.training.sharding import (
    assemble,
    computes_in,
    drop_copies,
    is_slice,
    local,
    slice_of,
)

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(
    step: int,
    steps: float,
    peak: float,
    schedule: str,
    warmup: int = 0,
    final: float = 0.0,
) -> float:
    """Return the learning rate of step 0, 1, ... steps-1.

    It rises over `warmup` steps, then falls to `final` (a share of the peak) as the
    schedule says.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - (1 - final) * done)
    if schedule == "cosine":
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
    raise ValueError(
        f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}"
    )


@dataclass
class Weight:
    """A trainable parameter with its Adam state: tensors of the parameter's shape, or of this
    rank's slice of it.

    `copy` is the float32 master of a parameter that is rounded or lies elsewhere; any other is
    its own master.
    """

    parameter: nn.Parameter
    copy: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: int = 0

    @property
    def master(self) -> Tensor:
        return local(self.parameter.detach()) if self.copy is None else self.copy

    @property
    def gradient(self) -> Tensor | None:
        if self.copy is not None and self.parameter.collector[1] is not self.copy:
            raise RuntimeError(
                "another Optimizer of this model has been made since, and has its gradients: "
                "use that one"
            )
        gradient = self.parameter.grad if self.copy is None else self.copy.grad
        return None if gradient is None else local(gradient)

    @property
    def rounded(self) -> bool:
        """Whether the model computes with less than the master has, so that a checkpoint
        must hold the master as well.
        """
        return computes_in(self.parameter).itemsize < self.master.dtype.itemsize


@dataclass
class Optimizer:
    """AdamW over a model's trainable parameters. Matrices decay, vectors (norms, biases) do
    not.

    `state_dtype`, float32 or bfloat16, is what the moments are kept in; `device` is where
    they and the masters are, by default beside the weights. With `keep_weights` its state
    has all weights, for a module that no other file of a checkpoint holds. Among several
    ranks each makes the same update, or that of its slices of the weights.
    """

    model: nn.Module
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_norm: float
    state_dtype: torch.dtype = torch.float32
    device: str = ""
    keep_weights: bool = False

    def __post_init__(self) -> None:
        self.penalty = 0.0
        self.start: dict[str, Tensor] = {}
        self.weights = {
            name: self._weight(p, torch.device(self.device or p.device))
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def _weight(self, parameter: nn.Parameter, device: torch.device) -> Weight:
        own = parameter.dtype.itemsize >= 4 and parameter.device.type == device.type
        copy = (
            None
            if own
            else local(parameter.detach()).to(device, torch.float32, copy=True)
        )
        if copy is not None:
            collect_gradients(parameter, copy)
        like = local(parameter.detach()) if copy is None else copy
        dtype = torch.bfloat16 if self.state_dtype == torch.bfloat16 else like.dtype
        return Weight(
            parameter, copy, *(torch.zeros_like(like, dtype=dtype) for _ in range(2))
        )

    @torch.no_grad()
    def hold(self, start: nn.Module, penalty: float) -> None:
        """Add penalty * ||weights - those of `start`||^2 to the loss from now on."""
        parameters = dict(start.named_parameters())
        self.penalty = penalty
        self.start = {
            name: slice_of(parameters[name].detach(), like=weight.parameter).to(
                weight.master, copy=True
            )
            for name, weight in self.weights.items()
        }

    def _moved(self) -> dict[str, Tensor]:
        """Return weights - start of all weights, where there is a penalty on it."""
        return {
            name: self.weights[name].master - start
            for name, start in self.start.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> dict[str, float]:
        """Update the weights from the gradients summed so far, and clear the gradients.

        Returns the norm of the gradient before clipping and ||update|| / ||weights||, of
        the whole and of each part of the model. FloatingPointError names a parameter whose
        gradient is not finite, before any weight has changed, or one that is not finite
        itself after the update. Parameters without a gradient stay as they are.
        """
        gradients = self._gradients()
        distances = self._moved()
        for name in distances.keys() & gradients.keys():
            gradients[name].add_(distances[name], alpha=2 * self.penalty)
        norms = self._norms(gradients)
        if not math.isfinite(norm := math.hypot(*norms.values())):
            bad = next(
                name for name, value in norms.items() if not math.isfinite(value)
            )
            raise FloatingPointError(
                f"the gradient norm is {norm}; first bad gradient: {bad}"
            )
        scale = min(1.0, self.max_norm / (norm + 1e-6))
        moved = {}
        for index, (name, weight) in enumerate(self.weights.items()):
            if name in gradients:
                moved[name] = self._update(
                    weight, gradients[name].mul_(scale), lr, index
                )
        self._clear_gradients()
        self._write_back()
        sizes = self._norms(
            {name: weight.master for name, weight in self.weights.items()}
        )
        if bad := [name for name, size in sizes.items() if not math.isfinite(size)]:
            raise FloatingPointError(
                f"the weights are not finite after the update: {bad[0]} has norm {sizes[bad[0]]}"
            )
        moves = by_part(self._over_slices(moved))
        lengths = by_part(sizes)
        change = math.hypot(*moves.values()) / (math.hypot(*lengths.values()) or 1.0)
        distance = {}
        if self.start:
            distance["start_distance"] = math.hypot(
                *self._norms(self._moved()).values()
            )
        return {
            "grad_norm": norm,
            "update_ratio": change,
            **distance,
            **{f"grad_norm/{part}": size for part, size in by_part(norms).items()},
            **{
                f"update_ratio/{part}": m / (lengths[part] or 1.0)
                for part, m in moves.items()
            },
        }

    def _gradients(self) -> dict[str, Tensor]:
        """Return the summed gradients of the parameters that have one on any rank."""
        gradients = {name: weight.gradient for name, weight in self.weights.items()}
        present = torch.tensor(
            [gradient is not None for gradient in gradients.values()], dtype=torch.int32
        )
        ranks.sum_([present])
        known = {
            name: torch.zeros_like(self.weights[name].master)
            if gradient is None
            else gradient
            for (name, gradient), somewhere in zip(
                gradients.items(), present.tolist(), strict=True
            )
            if somewhere
        }
        # The backward pass has summed those of slices.
        ranks.sum_(
            [
                gradient
                for name, gradient in known.items()
                if not is_slice(self.weights[name].parameter)
            ]
        )
        return known

    def _norms(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        return self._over_slices(
            {name: torch.linalg.vector_norm(tensor) for name, tensor in tensors.items()}
        )

    def _over_slices(self, norms: dict[str, Tensor]) -> dict[str, float]:
        """Return the norms of whole tensors, given those of this rank's slices.

        All values come to the host in one transfer.
        """
        if not norms:
            return {}
        values = torch.stack(list(norms.values())).cpu().double()
        cut = torch.tensor([is_slice(self.weights[name].parameter) for name in norms])
        if cut.any():
            # What is not cut counts once.
            squares = torch.where(cut | ranks.is_main(), values.square(), 0.0)
            ranks.sum_([squares])
            values = squares.sqrt()
        return dict(zip(norms, values.tolist(), strict=True))

    def _update(
        self, weight: Weight, gradient: Tensor, lr: float, index: int
    ) -> Tensor:
        """Make AdamW's update of one parameter, and return the norm of the change."""
        master = weight.master
        before = master.clone()
        # Themselves, if not rounded.
        moments = [weight.exp_avg.to(master.dtype), weight.exp_avg_sq.to(master.dtype)]
        adamw(
            [master],
            [gradient],
            *([moment] for moment in moments),
            max_exp_avg_sqs=[],
            state_steps=[torch.tensor(float(weight.updates), device=master.device)],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=self.weight_decay if weight.parameter.dim() >= 2 else 0.0,
            eps=self.eps,
            maximize=False,
        )
        weight.updates += 1
        if self.state_dtype == torch.bfloat16:
            self._round_moments(
                weight, *moments, seed=weight.updates * len(self.weights) + index
            )
        return torch.linalg.vector_norm(before.sub_(master))

    def _round_moments(
        self, weight: Weight, exp_avg: Tensor, exp_avg_sq: Tensor, seed: int
    ) -> None:
        """Keep the moments in bfloat16, rounded by noise that depends on the step and the
        parameter alone.
        """
        generator = torch.Generator(exp_avg.device).manual_seed(seed)
        # Drawn for the whole parameter: a slice is rounded as it would be without being cut.
        noise = torch.empty(
            weight.parameter.shape, dtype=torch.int32, device=exp_avg.device
        )
        noise = slice_of(
            noise.random_(-(2**31), 2**31, generator=generator), like=weight.parameter
        )
        noise = noise.to(exp_avg.device)
        weight.exp_avg.copy_(round_by_chance(exp_avg, noise & 0xFFFF))
        weight.exp_avg_sq.copy_(round_by_chance(exp_avg_sq, (noise >> 16) & 0xFFFF))

    def _clear_gradients(self) -> None:
        for weight in self.weights.values():
            weight.parameter.grad = None
            if weight.copy is not None:
                weight.copy.grad = None

    def _write_back(self) -> None:
        """Write the rounded masters into the model's tensors."""
        for weight in self.weights.values():
            if weight.copy is not None:
                local(weight.parameter.detach()).copy_(weight.copy)
        drop_copies(self.model)

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold besides the model: moments, step counts, and
        the masters of rounded weights.

        All ranks must call it together; the main one gets the tensors, whole even where
        weights are cut.
        """
        tensors = {}
        for name, weight in self.weights.items():
            parts = {"exp_avg": weight.exp_avg, "exp_avg_sq": weight.exp_avg_sq}
            if weight.rounded or self.keep_weights:
                parts["master"] = weight.master
            whole = {
                f"{key}.{name}": assemble(part, like=weight.parameter).cpu()
                for key, part in parts.items()
            }
            if ranks.is_main():
                tensors |= {
                    f"step.{name}": torch.tensor(float(weight.updates)),
                    **whole,
                }
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state()`.

        ValueError names what is missing or of another shape, and then nothing has changed.
        """
        for name, weight in self.weights.items():
            _check_state(name, weight, tensors, weight.rounded or self.keep_weights)
        for name, weight in self.weights.items():
            weight.updates = int(tensors[f"step.{name}"])
            parts = {"exp_avg": weight.exp_avg, "exp_avg_sq": weight.exp_avg_sq}
            # More exact than the model's own file, needed or not.
            if f"master.{name}" in tensors:
                parts["master"] = weight.master
            for key, part in parts.items():
                part.copy_(slice_of(tensors[f"{key}.{name}"], like=weight.parameter))
        self._write_back()


def by_part(norms: dict[str, float]) -> dict[str, float]:
    """Combine the norms of parameters by name into those of the parts of the model.

    A part is a layer ("layers.3"), or what stands beside the layers ("embed_tokens").
    """
    parts: dict[str, list[float]] = {}
    for name, norm in norms.items():
        words = name.removeprefix("model.").removesuffix(".weight").split(".")
        size = 2 if words[0] == "layers" else 1
        parts.setdefault(".".join(words[:size]), []).append(norm)
    return {part: math.hypot(*sizes) for part, sizes in parts.items()}


def _check_state(
    name: str, weight: Weight, tensors: dict[str, Tensor], master: bool
) -> None:
    """Raise a ValueError if the tensors do not hold the state of this weight."""
    for key in ("step", "exp_avg", "exp_avg_sq", *["master"] * master):
        if f"{key}.{name}" not in tensors:
            raise ValueError(
                f"the checkpoint's optimizer state lacks {key}.{name}: it is of another model "
                "or dtype"
            )
        found = tensors[f"{key}.{name}"].shape
        expected = weight.parameter.shape if key != "step" else torch.Size()
        if found != expected:
            raise ValueError(
                f"the checkpoint's optimizer state is of another model: {key}.{name} has shape "
                f"{list(found)}, expected {list(expected)}"
            )


def collect_gradients(parameter: nn.Parameter, master: Tensor) -> None:
    """Add the parameter's gradients to the master's as backward produces them, in the
    master's dtype and on its device.

    A master that collected gradients before no longer does.
    """

    def collect(parameter: Tensor) -> None:
        gradient = local(parameter.grad).to(master.device, master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    if hasattr(parameter, "collector"):
        parameter.collector[0].remove()
    parameter.collector = (
        parameter.register_post_accumulate_grad_hook(collect),
        master,
    )


def round_by_chance(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 values to bfloat16, up or down by chance.

    noise is int32 in [0, 2^16): a value is rounded away from zero where adding it carries
    over the cut.
    """
    return (
        ((values.float().view(torch.int32) + noise) & -(2**16))
        .view(torch.float32)
        .bfloat16()
    )
