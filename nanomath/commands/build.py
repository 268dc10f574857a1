"""From a section of a config to the part it describes; shared by the scripts and the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from nanomath import settings
from nanomath.config import load, to_toml
from nanomath.data.packing import Example
from nanomath.data.problem import Problem
from nanomath.data.problem_sets import Fields, load_problems
from nanomath.data.prompts import PromptTemplate, render_prompt, render_response
from nanomath.data.world import CHAT_TEMPLATE, generate, world_tokenizer
from nanomath.models import (
    ModelConfig,
    Tokenizer,
    Transformer,
    check_vocabulary,
    load_model,
    load_tokenizer,
    resolve_model_dir,
)
from nanomath.training.optimizer import Optimizer, learning_rate
from nanomath.training.runlog import RunLog, read_jsonl
from nanomath.training.state import checkpoint_steps, load_checkpoint, prune_checkpoints, save_checkpoint

RUN_FLAGS = {"--resume": "go on from the newest checkpoint of the run"}
WORLD_PROBLEMS = 20000  # the world has no end; this many are drawn where no limit is set


class Trainee:
    """A model in training, with its optimizer and its run directory: started anew, or where a checkpoint left it."""

    def __init__(self, config: settings.SFTConfig | settings.GRPOConfig, resume: bool) -> None:
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
                f"  measure it: python -m nanomath eval {place} world",
            ]
        )


def build_model(section: settings.Model, seed: int, path: str = "") -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer at `path` (default: the section's), or new ones for the embedded world."""
    device, dtype, path = choose_device(section.device), getattr(torch, section.dtype), path or section.path
    if path:
        model, tokenizer = load_model(path, device, dtype), load_tokenizer(path)
        check_vocabulary(model, tokenizer)
    else:
        tokenizer = Tokenizer(world_tokenizer(), CHAT_TEMPLATE, eos_token="<|endoftext|>")
        model = new_model(section, tokenizer.vocab_size, seed).to(device, dtype)
    model.gradient_checkpointing = section.gradient_checkpointing
    return model, tokenizer


def new_model(section: settings.Model, vocab_size: int, seed: int) -> Transformer:
    """A model of the section's shape with fresh weights, on the CPU in float32."""
    if section.hidden_size % section.heads:
        raise ValueError(f"[model] {section.heads} heads do not divide hidden_size = {section.hidden_size}")
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=section.hidden_size,
        num_layers=section.layers,
        num_heads=section.heads,
        num_kv_heads=section.kv_heads,
        head_dim=section.hidden_size // section.heads,
        intermediate_size=section.intermediate_size,
        max_positions=section.max_positions,
    )
    return Transformer(config).init_weights(seed)


def choose_device(name: str) -> torch.device:
    """The named device, or for "auto" the best there is. ValueError for one that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def build_problems(section: settings.Problems) -> list[Problem]:
    """The problems of the world, of a file or of a hub dataset."""
    if section.source != "world":
        fields = Fields(
            question=tuple(section.question),
            answer=section.answer,
            solution=section.solution,
            id=section.id,
            answer_after=section.answer_after,
            remove=section.remove,
        )
        return load_problems(
            section.source, fields, split=section.split, header=section.header, skip=section.skip, limit=section.limit
        )
    if not section.families:
        raise ValueError("families is empty: name at least one family of the world")
    share = -(-(section.limit or WORLD_PROBLEMS) // len(section.families))
    difficulty = (section.difficulty[0], section.difficulty[1])
    drawn = [
        generate(family, section.split, share, 0, difficulty, section.languages, section.direct)
        for family in section.families
    ]
    return [problem for together in zip(*drawn, strict=True) for problem in together]


def build_template(section: settings.Prompt) -> PromptTemplate:
    """The template that the section describes."""
    return PromptTemplate(**asdict(section))


def encode_prompts(
    problems: Sequence[Problem], template: PromptTemplate, tokenizer: Tokenizer, longest: int
) -> list[list[int]]:
    """Prompt tokens of every problem. ValueError names the first that leaves no room in a context of `longest`.

    A chat template writes its own special tokens; plain text gets those the tokenizer puts around it.
    """
    prompts = []
    for problem in problems:
        text = render_prompt(problem, template, tokenizer.apply_chat_template)
        prompts.append(tokenizer.encode(text, add_special_tokens=not template.chat))
        if len(prompts[-1]) >= longest:
            raise ValueError(
                f"the prompt of problem {problem.id} has {len(prompts[-1])} tokens: the model's context holds {longest}"
            )
    return prompts


def encode_examples(
    problems: Sequence[Problem], template: PromptTemplate, tokenizer: Tokenizer, longest: int
) -> list[Example]:
    """Prompt and solution tokens of every problem, the end-of-sequence token included in the response."""
    examples = []
    for problem, prompt in zip(problems, encode_prompts(problems, template, tokenizer, longest), strict=True):
        response = [*tokenizer.encode(render_response(problem, template)), tokenizer.eos_id]
        examples.append(Example(prompt, response))
        if len(examples[-1]) > longest:
            raise ValueError(
                f"problem {problem.id} with its solution has {len(examples[-1])} tokens: the model's context holds "
                f"{longest}"
            )
    return examples


def sampling_options(section: settings.Sampling) -> dict[str, object]:
    """The keyword arguments of `Sampler.generate`."""
    options = asdict(section)
    del options["slots"]
    return options
