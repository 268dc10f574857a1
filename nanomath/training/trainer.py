"""A model in training, with its optimizer and its run directory; all training scripts share
it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nanomath import settings
from nanomath.config import load, to_toml
from nanomath.data.files import remove_scratch
from nanomath.models import Tokenizer, Transformer, resolve_model_dir
from nanomath.models.lora import LoRA
from nanomath.rollout import Sampler
from nanomath.training import ranks
from nanomath.training.build import (
    build_model,
    build_sampler,
    choose_device,
    settle_dtypes,
)
from nanomath.training.checkpoint import (
    checkpoint_steps,
    link_best,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from nanomath.training.failure import out_of_memory
from nanomath.training.loop import Loop, Metrics, say, share_used
from nanomath.training.optimizer import Optimizer, learning_rate
from nanomath.training.runlog import RunFailed, RunLog
from nanomath.training.sharding import shard
from nanomath.training.shared_sampler import SharedSampler
from nanomath.training.sittings import Sittings, peak_memory, total_memory

T = TypeVar("T")
RUN_FLAGS = {"--resume": "go on from the newest checkpoint of the run"}
Config = settings.SFTConfig | settings.GRPOConfig | settings.PRMConfig
Build = Callable[[settings.Model, int, str], tuple[Transformer, Tokenizer]]

# What saves memory, in the order in which to try it: none of the first four changes a
# gradient.
MEMORY_KNOBS = {
    "sft.token_budget": "smaller micro-batches",
    "grpo.token_budget": "smaller micro-batches",
    "prm.token_budget": "smaller micro-batches",
    "model.gradient_checkpointing": "true recomputes activations",
    "sampling.slots": "fewer sequences decoded side by side",
    "optim.device": "cpu moves Adam's state off the GPU",
    "optim.state_dtype": "bfloat16 halves Adam's state",
    "model.dtype": "bfloat16 halves weights and activations",
    "lora.rank": "8 trains adapters: the weights have no gradients and no state of Adam's",
}


class Trainer:
    """A run that starts anew or, when `resume` is asked for, where its newest checkpoint
    left it.

    build: makes the model. score: the metric of held-out data that says how good the model
    is; more is better. use: the commands to go on with, in which `RUN` stands for the run's
    directory.
    """

    def __init__(
        self,
        config: Config,
        resume: bool,
        use: Sequence[str],
        build: Build = build_model,
        score: str = "heldout/pass@1",
    ) -> None:
        if config.model.dtype == "float16":
            raise ValueError(
                "model.dtype is float16, whose small gradients become 0: "
                "train in bfloat16 or float32"
            )
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        make_deterministic(config.run.deterministic, config.model.device)
        self.device = str(ranks.start(choose_device(config.model.device)))
        self.config = config
        self.others: dict[str, Any] = {}
        self.build = build
        self.score = score
        self.use = use
        self.exit_code = 1
        self.log = RunLog(
            Path(config.run.directory) / config.run.name, resume, writes=ranks.is_main()
        )
        if resume:  # "the newest checkpoint of a run" may have become another one since
            stored = load(type(config), self.log.directory / "config.toml")
            config.model.path = stored.model.path
            if config.model.dtype == "auto":  # it was settled when the run began
                config.model.dtype = stored.model.dtype
            for name in ("sft", "grpo", "prm"):
                part = getattr(config, name, None)
                if part and part.token_budget == "auto":
                    part.token_budget = getattr(stored, name).token_budget
        elif config.model.path:
            config.model.path = str(resolve_model_dir(config.model.path))
        steps = checkpoint_steps(self.log.checkpoints)
        self.start, self.checkpoint = max(steps.items(), default=(0, None))
        settle_dtypes(config, str(self.checkpoint or ""))
        here = replace(config.model, device=self.device)
        adapters = getattr(config, "lora", settings.LoRA())
        place = self.checkpoint if self.checkpoint and not adapters.rank else ""
        self.model, self.tokenizer = build(here, config.run.seed, str(place))
        if config.model.sharded:
            shard(self.model, self.model.dtype)
        self.base = self.model  # of the adapters, where there are any
        self.lora = self._adapt(adapters) if adapters.rank else None
        self.optimizer = self._optimizer(self.lora or self.model)
        if config.optim.l2_start:
            self.optimizer.hold(self.starting_model(), config.optim.l2_start)
        facts = {}
        if self.checkpoint:
            facts = load_checkpoint(self.checkpoint, self.optimizer)
        best = facts.get("best", {})  # {"step": ..., "score": ...} where it is kept
        self.best = best if best.get("step") in steps else {}
        self.limits = {
            "tokens": config.run.tokens,
            "seconds": config.run.seconds,
            "collapse": config.run.on_collapse == "end",
        }
        lines = self.log.read("metrics.jsonl")
        done = [line for line in lines if line["step"] <= self.start]
        if self.start >= config.run.steps or share_used(done, self.limits) >= 1:
            raise ValueError(
                f"{self.log.directory} has done its {self.start} steps: a larger run.steps goes on"
            )

    def _adapt(self, section: settings.LoRA) -> LoRA:
        """Train adapters of the model in its place: new ones, or those of the checkpoint."""
        base = str(Path(self.config.model.path).resolve())
        seed = self.config.run.seed
        lora = LoRA(
            self.model, section.rank, section.alpha, section.targets, seed, base
        )
        if self.checkpoint:
            lora.load(self.checkpoint)
        self.model = lora.applied_to(self.base)
        return lora

    def starting_model(self, device: str = "") -> Transformer:
        """Return the model as it was before the run's first step, frozen: the base of the
        adapters, or another copy of it.
        """
        if self.lora is not None and not device:
            return self.base
        start = replace(self.config.model, device=device or self.device)
        return self.build(start, self.config.run.seed, "")[0].requires_grad_(False)

    def sampler(self) -> Sampler:
        """What draws from the model as it is by then; with adapters, from a copy of the weights
        that these are merged into.
        """
        section = self.config.sampling
        if self.lora is None:
            kind = SharedSampler if ranks.count() > 1 else Sampler
            return build_sampler(section, self.model, self.tokenizer, kind)
        dtype = getattr(torch, section.dtype or self.config.model.dtype)
        merged = self.lora.merged(self.base, dtype)
        sampler = build_sampler(section, merged, self.tokenizer, SharedSampler)
        sampler.refresh = partial(self.lora.merge, self.base, merged)
        return sampler

    def _optimizer(self, module: nn.Module, keep_weights: bool = False) -> Optimizer:
        o = self.config.optim
        betas = (o.beta1, o.beta2)
        state_dtype = getattr(torch, o.state_dtype)
        return Optimizer(
            module,
            o.weight_decay,
            betas,
            o.eps,
            o.max_norm,
            state_dtype,
            o.device,
            keep_weights,
        )

    def train_beside(self, name: str, module: nn.Module) -> Optimizer:
        """Return the optimizer of another module in training.

        Checkpoints hold both under `name`, and give them back.
        """
        return self.keep(name, self._optimizer(module, keep_weights=True))

    def keep(self, name: str, part: T) -> T:
        """Let checkpoints hold the tensors of `part.state()` under `name`, and give them back
        to `part.load_state`.
        """
        self.others[name] = part
        if self.checkpoint:
            load_checkpoint(self.checkpoint, part, name)
        return part

    def begin(self) -> None:
        """Open the run directory for writing, once everything else is known to be in order."""
        # No rank may look for a run in the directory after another has begun one there.
        ranks.barrier()
        if ranks.is_main():
            remove_scratch(self.log.checkpoints)
        self.log.begin(to_toml(self.config), self.start)
        path = self.log.directory / "run.json"
        self.sittings = Sittings(path, self.start, self.model.device)
        self._note_sitting(self.start)
        if "tensorboard" in self.config.run.track and ranks.is_main():
            self.log.trackers.append(tensorboard(self.log.directory, self.start))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update after `step` updates.

        Where tokens or seconds end the run, it is that of a run of as many steps as there
        will be if they go on to use as much.
        """
        o = self.config.optim
        steps = self.config.run.steps
        if self.loop.used:
            steps = min(steps, step / self.loop.used)
        return learning_rate(step, steps, o.lr, o.schedule, o.warmup, o.final)

    @contextmanager
    def running(
        self, evaluate: Callable[[int], Metrics], show: dict[str, str]
    ) -> Iterator[Loop]:
        """Yield the loop over the steps that are left, say at its end how it went, and set
        `exit_code`.

        RunFailed says what went wrong, which checkpoint there is, and how to save memory if
        that was missing.
        """
        run = self.config.run
        self.begin()
        loop = self.loop = Loop(
            self.log,
            run.steps,
            self.save,
            evaluate,
            run.eval_every,
            run.save_every,
            show,
            keep=self.keeps if run.keep_best else None,
            minutes=run.minutes,
            stop_on_collapse=run.on_collapse == "stop",
            limits=self.limits,
        )
        try:
            with loop.running(self.start):
                yield loop
            self._conclude(loop.finished)
        except KeyboardInterrupt:
            say(f"interrupted; {self._intact()}")
        except RunFailed as failure:
            advice = self._memory_advice() if out_of_memory(failure.__cause__) else ""
            raise RunFailed(
                f"{failure}; {self._intact()}{advice}"
            ) from failure.__cause__

    def save(self, step: int) -> None:
        """Write checkpoint `step` and drop those that are too old to keep."""
        self.log.sync()
        self._note_sitting(step)
        best = {"best": self.best} if self.best else {}
        save_checkpoint(
            self.log.checkpoints,
            step,
            self.lora or self.model,
            self.tokenizer,
            self.optimizer,
            self.others,
            **best,
        )
        if ranks.is_main():
            if self.best:
                link_best(self.log.checkpoints, self.best["step"])
            prune_checkpoints(
                self.log.checkpoints, self.config.run.keep_last, self.best.get("step")
            )
        ranks.barrier()  # no rank goes on, or ends, before it is written

    def _note_sitting(self, step: int) -> None:
        """Write into run.json how far this sitting has come after `step` updates."""
        self.log.write("run.json", self.sittings.text(step))

    def keeps(self, step: int, measured: Metrics) -> bool:
        """Return whether the model after `step` updates is the best so far on held-out
        problems, and remember it if so.
        """
        score = measured[self.score]
        if self.best and score <= self.best["score"]:
            return False
        self.best = {"step": step, "score": score}
        return True

    def _intact(self) -> str:
        """Say which checkpoint there is to go on from."""
        steps = checkpoint_steps(self.log.checkpoints)
        if not steps:
            return "no checkpoint had been written yet, the same command with --resume starts again"
        newest = f"--resume goes on from step-{max(steps)}"
        return f"the checkpoints written before it are intact, {newest}"

    def _memory_advice(self) -> str:
        return (
            f"\n{memory_use(self.model.device)}; what to turn down or on:\n"
            + memory_knobs(self.config)
        )

    def _conclude(self, finished: bool) -> None:
        """Say how the run ended and what can be done next."""
        self.exit_code = 0 if finished else 1
        if finished and ranks.is_main():
            print(self.summary())
        elif not finished:
            step = max(checkpoint_steps(self.log.checkpoints))
            say(
                f"stopped after step {step}, which is saved: the same command with --resume goes on"
            )

    def summary(self) -> str:
        """Return the held-out score before, after and at its best, as the log has it, and
        the commands to go on with.
        """
        measured = [
            line for line in self.log.read("metrics.jsonl") if self.score in line
        ]
        low = f"{self.score}_low"
        high = f"{self.score}_high"
        lines = [
            f"{when} {100 * line[self.score]:5.1f}%"
            + (
                f"  (95% interval {100 * line[low]:.1f} to {100 * line[high]:.1f})"
                if low in line
                else ""
            )
            for when, line in (("before", measured[0]), ("after ", measured[-1]))
        ]
        place = self.log.directory
        name = self.score.removeprefix("heldout/")
        sampling = getattr(self.config, "sampling", None)
        if self.best:
            best = f"best   {100 * self.best['score']:5.1f}%  after step {self.best['step']}"
            lines.append(f"{best}: {place}/checkpoints/best")
        return "\n".join(
            [
                f"{place}: held-out {name}"
                + (f" at temperature {sampling.temperature:g}" if sampling else ""),
                *(f"  {line}" for line in lines),
                f"  every step: {place}/metrics.jsonl   the model: "
                f"{place}/checkpoints/step-{measured[-1]['step']}",
                *(f"  {line.replace('RUN', str(place))}" for line in self.use),
                f"  what happened: python -m nanomath report {place}",
            ]
        )


def tensorboard(directory: Path, start: int) -> Callable[[int, Metrics], None]:
    """Return a writer of metrics into an event file of the run, without the metrics after
    `start`.

    ImportError where tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "run.track: tensorboard is not installed: pip install tensorboard"
        ) from error
    writer = SummaryWriter(
        directory / "tensorboard", purge_step=start + 1 if start else None
    )

    def track(step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def use_of_policy(source: str) -> tuple[str, ...]:
    """Return the commands for a policy that is measured on the problems of `source`."""
    return (
        'ask it: python -m nanomath sample RUN "YOUR QUESTION"',
        f"measure it: python -m nanomath eval RUN {source}",
    )


def make_deterministic(mode: str, device: str) -> None:
    """Make torch use only algorithms that give the same bits every time: "true", "false",
    or "auto" on a CPU only.
    """
    if mode == "true":  # cuBLAS reads this when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A debugging aid that writes all memory twice.
    torch.utils.deterministic.fill_uninitialized_memory = False
    on = mode == "true" or (mode == "auto" and choose_device(device).type == "cpu")
    # What `use_deterministic_algorithms` does, without its import of the compiler.
    torch.set_deterministic_debug_mode("error" if on else "default")


def memory_use(device: torch.device) -> str:
    """Say how much memory was used at most and how much there is: of the GPU, or of this
    process and its machine.
    """
    used = peak_memory(device) / 2**30
    return f"used at most {used:.2f} GiB of {total_memory(device) / 2**30:.2f} GiB on {device}"


def memory_knobs(config: Config) -> str:
    """Return a line for each key of the config that saves memory, with its present value."""
    lines = []
    for key, effect in MEMORY_KNOBS.items():
        part, name = key.split(".")
        if hasattr(section := getattr(config, part, None), name):
            lines.append(f"  {key} = {json.dumps(getattr(section, name))}: {effect}")
    return "\n".join(lines)
