"""A model in training, with its optimizer and its run directory: what both training scripts share."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nanomath import settings
from nanomath.commands.build import build_model
from nanomath.config import load, to_toml
from nanomath.models import resolve_model_dir
from nanomath.training.optimizer import Optimizer, learning_rate
from nanomath.training.runlog import RunLog, read_jsonl
from nanomath.training.state import checkpoint_steps, load_checkpoint, prune_checkpoints, save_checkpoint

RUN_FLAGS = {"--resume": "go on from the newest checkpoint of the run"}


class Trainee:
    """Started anew, or put where the newest checkpoint of the run left it when `resume` is asked for."""

    def __init__(self, config: settings.SFTConfig | settings.GRPOConfig, resume: bool) -> None:
        if config.model.dtype == "float16":
            raise ValueError("model.dtype is float16, whose small gradients become 0: train in bfloat16 or float32")
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.config, self.log = config, RunLog(Path(config.run.directory) / config.run.name, resume)
        if resume:  # "the newest checkpoint of a run" may have become another one since
            config.model.path = load(type(config), self.log.directory / "config.toml").model.path
        elif config.model.path:
            config.model.path = str(resolve_model_dir(config.model.path))
        self.start, checkpoint = max(checkpoint_steps(self.log.checkpoints).items(), default=(0, None))
        self.model, self.tokenizer = build_model(config.model, config.run.seed, str(checkpoint or ""))
        o = config.optim
        self.optimizer = Optimizer(self.model, o.weight_decay, (o.beta1, o.beta2), o.eps, o.max_norm)
        if checkpoint:
            load_checkpoint(checkpoint, self.optimizer)
        if self.start >= config.run.steps:
            raise ValueError(f"{self.log.directory} has done its {self.start} steps: a larger run.steps goes on")

    def begin(self) -> None:
        """Open the run directory for writing, once everything else is known to be in order."""
        self.log.begin(to_toml(self.config), self.start)

    def learning_rate(self, step: int) -> float:
        """The rate of the update after `step` updates."""
        o = self.config.optim
        return learning_rate(step, self.config.run.steps, o.lr, o.schedule, o.warmup, o.final)

    def save(self, step: int) -> None:
        """Write checkpoint `step` and drop those that are too old to keep."""
        save_checkpoint(self.log.checkpoints, step, self.model, self.tokenizer, self.optimizer)
        prune_checkpoints(self.log.checkpoints, self.config.run.keep_last)

    def conclude(self, finished: bool) -> int:
        """Say how the run ended and what can be done next; returns the exit code."""
        if finished:
            print(self.summary())
            return 0
        step = max(checkpoint_steps(self.log.checkpoints))
        print(f"stopped after step {step}, which is saved: the same command with --resume goes on", file=sys.stderr)
        return 1

    def summary(self) -> str:
        """The held-out pass@1 before and after, as the log has it, and where to look next."""
        measured = [line for line in read_jsonl(self.log.directory / "metrics.jsonl") if "heldout/pass@1" in line]
        lines = [
            f"{when} {100 * line['heldout/pass@1']:5.1f}%  (95% interval {100 * line['heldout/pass@1_low']:.1f} to "
            f"{100 * line['heldout/pass@1_high']:.1f})"
            for when, line in (("before", measured[0]), ("after ", measured[-1]))
        ]
        place = self.log.directory
        return "\n".join(
            [
                f"{place}: held-out pass@1 at temperature {self.config.sampling.temperature:g}",
                *(f"  {line}" for line in lines),
                f"  every step: {place}/metrics.jsonl   the model: {place}/checkpoints/step-{measured[-1]['step']}",
                f'  ask it: python -m nanomath sample {place} "YOUR QUESTION"',
                f"  measure it: python -m nanomath eval {place} {self.config.heldout.source}",
            ]
        )
