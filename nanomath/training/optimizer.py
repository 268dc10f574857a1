"""AdamW (arXiv 1711.05101) on float32 weights, whatever the model computes in, and the learning-rate schedule.

At a learning rate of 1e-6 an update is far below the resolution of a bfloat16 weight and would vanish. So when a model
computes in bfloat16 the optimizer keeps float32 masters: gradients of all micro-batches are summed in float32, the
masters are updated, and their rounded values are written into the model's own tensors, in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: int = 0, final: float = 0.0) -> float:
    """The rate of step 0, 1, ... steps-1: up over `warmup` steps, then down to `final` (a share of the peak)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - (1 - final) * done)
    if schedule == "cosine":
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
    raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")


class Optimizer:
    """AdamW over a model's trainable parameters. Matrices decay, vectors (norms, biases) do not."""

    def __init__(
        self, model: nn.Module, weight_decay: float, betas: tuple[float, float], eps: float, max_norm: float
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: p if p.dtype == torch.float32 else _master_of(p) for name, p in self.parameters.items()}
        self.max_norm = max_norm
        groups = [
            {"params": [m for m in self.masters.values() if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters.values() if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        for m in self.masters.values():  # as AdamW itself would at the first step, which a checkpoint may precede
            zeros = {"exp_avg": torch.zeros_like(m), "exp_avg_sq": torch.zeros_like(m)}
            self.adamw.state[m] = {"step": torch.zeros((), device=m.device), **zeros}

    def step(self, lr: float) -> float:
        """Update the weights from the gradients summed so far and clear them; returns the norm before clipping.

        FloatingPointError, the weights untouched, when a gradient is not finite.
        """
        masters = self.masters.values()
        norm = nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        if not norm.isfinite():  # asked before clipping, which would spread a NaN to all gradients
            raise FloatingPointError(f"the gradient norm is {norm}; first bad gradient: {self._first_bad_gradient()}")
        nn.utils.clip_grads_with_norm_(masters, self.max_norm, norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        self._write_back()
        return float(norm)

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _first_bad_gradient(self) -> str:
        bad = (n for n, m in self.masters.items() if m.grad is not None and not m.grad.isfinite().all())
        return next(bad, "none alone (their sum overflows)")

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the model: Adam's moments and step counts, and the masters there are."""
        tensors = {}
        for name, master in self.masters.items():
            tensors |= {f"{key}.{name}": value for key, value in self.adamw.state[master].items()}
            if master is not self.parameters[name]:
                tensors[f"master.{name}"] = master.detach()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state()`. ValueError names what is missing."""
        for name, master in self.masters.items():
            keys = ["step", "exp_avg", "exp_avg_sq"]
            copied = master is not self.parameters[name]
            missing = [key for key in [*keys, *["master"] * copied] if f"{key}.{name}" not in tensors]
            if missing:
                raise ValueError(f"the checkpoint's optimizer state lacks {missing[0]}.{name}: it is of another model")
            if copied:
                master.copy_(tensors[f"master.{name}"])
            # The step count too: the fused update keeps it beside the weights.
            self.adamw.state[master] = {key: tensors[f"{key}.{name}"].to(master.device) for key in keys}
        self._write_back()


def _master_of(parameter: nn.Parameter) -> Tensor:
    """A float32 copy that collects the parameter's gradients in float32 as backward produces them."""
    master = parameter.detach().float().clone()
    parameter.register_post_accumulate_grad_hook(_collect_into(master))
    return master


def _collect_into(master: Tensor) -> Callable[[Tensor], None]:
    def collect(parameter: Tensor) -> None:
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad + gradient
        parameter.grad = None

    return collect
