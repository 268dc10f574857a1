"""Time and memory of training steps and of scoring, against the plain way.

    python -m nanomath bench training [CONFIG.toml] [key=value ...]

    python -m nanomath bench training                                   tiny and smollm2, minutes
    python -m nanomath bench training shapes=smollm2 steps=sft,grpo gradient_checkpointing=true
    python -m nanomath bench training shapes=smollm2 steps=sft,grpo lora=8
    python -m nanomath bench training shapes=qwen2.5-0.5b steps=logprob threads=1 save=bench.json

Steps: sft and grpo are forward and backward passes and the optimizer, in grpo also the
reference model's pass; score is the states of one question's solutions; logprob is the logprobs
of random states alone, forward and backward. Ours makes the logits in chunks and computes a
question once for all of its solutions. The plain way makes all logits at once (sft, grpo,
logprob) and computes the question with every solution (grpo, score). Every number is the best of
`repeats` processes, which take turns; memory is the peak beyond weights and optimizer state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanomath.commands.bench.measure import (
    SHAPES,
    Bench,
    Found,
    Report,
    best,
    by_turns,
    number,
    peak_memory,
    ratio,
)
from nanomath.config import option, parse_arguments
from nanomath.data.problem import Problem
from nanomath.models import Transformer, batches
from nanomath.models.batches import Example
from nanomath.models.lora import LoRA
from nanomath.rollout import Completion, Episode
from nanomath.rollout.floor import seconds_of
from nanomath.settings import LINEAR_LAYERS
from nanomath.training import policy_step
from nanomath.training.optimizer import Optimizer
from nanomath.training.policy_step import PolicyStep
from nanomath.training.sft_step import SFTStep

SIDES = ("ours", "plain")
CALLS = 5  # in a process, the fastest counts: the first may be slow
ENOUGH = 2.0  # seconds after which there are no more calls than two


@dataclass
class TrainingBench(Bench):
    """Which steps of which models to measure, and their sizes."""

    steps: list[str] = option(
        ["sft", "grpo", "score", "logprob"],
        "what to measure",
        choices=("sft", "grpo", "score", "logprob"),
    )
    shapes: list[str] = option(["tiny", "smollm2"], "models", choices=tuple(SHAPES))
    sequences: int = option(8, "sequences in a step; in grpo they are one group", minimum=2)
    prompt: int = option(32, "tokens of a prompt", minimum=1)
    response: int = option(96, "tokens of a response", minimum=1)
    tokens: int = option(4096, "tokens of logprob", minimum=1)
    token_budget: int = option(0, "tokens computed at once, 0: all", minimum=0)
    gradient_checkpointing: bool = option(
        False, "recompute each layer in the backward pass"
    )
    lora: int = option(
        0, "sft, grpo: rank of adapters that are trained, 0: the weights are", minimum=0
    )
    repeats: int = option(2, "processes for each number; the best counts", minimum=1)


def main(argv: list[str]) -> int:
    """Measure every step of every shape; 1 if one of them failed."""
    config, _ = parse_arguments(TrainingBench, argv, __doc__)
    config.choose_machine()
    report = Report("training", argv, config)
    sides = [f"{side}, {unit}" for unit in ("ms", "MB") for side in SIDES]
    report.head(
        f"best of {config.repeats}; ratio: ours / plain, below 1 is better",
        columns=["shape    ", "step", *sides[:2], "ratio", *sides[2:], "ratio"],
    )
    for shape in config.shapes:
        for step in config.steps:
            row = {"shape": shape, "step": step, **compare(shape, step, config)}
            report.add(row, *table_row(row))
    return int(report.failed)


def compare(shape: str, step: str, config: TrainingBench) -> Found:
    """Return seconds and bytes of each side; "failed" says which side failed and why."""
    calls = {side: (measure, shape, step, side, config) for side in SIDES}
    found = by_turns(config.threads, config.repeats, calls)
    numbers = {side: best(runs) for side, runs in found.items()}
    row: Found = {
        name: {side: numbers[side].get(name) for side in SIDES}
        for name in ("seconds", "bytes")
    }
    if failed := [f"{side}: {n['failed']}" for side, n in numbers.items() if "failed" in n]:
        row["failed"] = "; ".join(failed)
    return row


def table_row(row: Found) -> tuple[list[str], ...]:
    """Return the cells of a row, and what failed as a note."""
    cells = [row["shape"], row["step"]]
    for name, scale, digits in ("seconds", 1e3, 1), ("bytes", 1e-6, 0):
        ours, plain = (row[name][side] for side in SIDES)
        cells += [number(ours, digits, scale), number(plain, digits, scale)]
        cells.append(ratio(ours, plain))
    return (cells, row["failed"]) if "failed" in row else (cells,)


# --- in the measured process -----------------------------------------------------------------


def measure(shape: str, step: str, side: str, config: TrainingBench) -> Found:
    """Return seconds of the fastest call, and bytes at the peak beyond what there was before."""
    if side == "plain":
        batches.linear_logprob = materialised_logprob
        policy_step.make_batch = partial(batches.make_batch, share=False)
    device = torch.device(config.device)
    run = STEPS[step](shape, side, config)
    before = peak_memory(device, restart=True)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 2 or (
        len(seconds) < CALLS and time.perf_counter() - began < ENOUGH
    ):
        seconds.append(seconds_of(run, device))
    return {"seconds": min(seconds), "bytes": max(0, peak_memory(device) - before)}


def materialised_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the numbers of `linear_logprob`, up to rounding, from all logits [n, V] at once."""
    logits = (hidden @ weight.T).float()
    logs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, target[:, None])[:, 0], entropy


def sft_step(shape: str, side: str, config: TrainingBench) -> Callable[[], object]:
    """Return one step of fine-tuning."""
    model, optimizer = in_training(new_model(shape, config), config)
    step = SFTStep(model, optimizer, token_budget=config.token_budget)
    examples = random_examples(shape, config)
    return lambda: step.step(examples, 0, 1e-6)


def grpo_step(shape: str, side: str, config: TrainingBench) -> Callable[[], object]:
    """Return one policy step on a group of episodes, half of them right."""
    start = new_model(shape, config)
    reference = start if config.lora else new_model(shape, config).requires_grad_(False)
    model, optimizer = in_training(start, config)
    step = PolicyStep(
        model,
        reference,
        optimizer,
        config.sequences,
        token_budget=config.token_budget,
    )
    examples = random_examples(shape, config)
    prompt = examples[0].prompt
    episodes = []
    for i, example in enumerate(examples):
        logprobs = [-5.0] * config.response
        completion = Completion(0, i, example.response, logprobs, logprobs, "", "eos")
        rewards = {"accuracy": i % 2, "total": i % 2}
        episodes.append(Episode(Problem("0", "", ""), prompt, completion, rewards))
    return lambda: step.step(episodes, 0, 1e-6)


def score_step(shape: str, side: str, config: TrainingBench) -> Callable[[], object]:
    """Return the last states of one question's solutions; ours computes the question once."""
    model = new_model(shape, config)
    examples = random_examples(shape, config)
    question = examples[0].prompt
    examples = [Example(question, example.response) for example in examples]
    if side == "plain":
        examples = [Example([], question + example.response) for example in examples]
    places = [[config.prompt + config.response - 1]] * len(examples)
    return lambda: list(batches.states_at(model, examples, places, config.token_budget))


def logprob_step(shape: str, side: str, config: TrainingBench) -> Callable[[], object]:
    """Return the logprobs of random states with the shape's vocabulary, forward and backward."""
    options = {"device": config.device, "dtype": getattr(torch, config.dtype)}
    vocabulary = SHAPES[shape].vocab_size
    width = SHAPES[shape].hidden_size
    hidden = torch.randn(config.tokens, width, **options).requires_grad_()
    weight = torch.empty(vocabulary, width, **options).normal_(std=0.02).requires_grad_()
    target = torch.randint(vocabulary, (config.tokens,), device=config.device)
    return lambda: batches.linear_logprob(hidden, weight, target)[0].mean().backward()


STEPS = {"sft": sft_step, "grpo": grpo_step, "score": score_step, "logprob": logprob_step}


def new_model(shape: str, config: TrainingBench) -> Transformer:
    """Return a model of random weights."""
    model = Transformer(SHAPES[shape]).init_weights(0)
    model.to(config.device, getattr(torch, config.dtype))
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def in_training(model: Transformer, config: TrainingBench) -> tuple[Transformer, Optimizer]:
    """Return the model, or it with adapters, and AdamW of what is trained."""
    lora = LoRA(model, config.lora, 32.0, LINEAR_LAYERS) if config.lora else None
    optimizer = Optimizer(lora or model, 0.0, (0.9, 0.95), 1e-8, 1.0)
    return (lora.applied_to(model) if lora else model), optimizer


def random_examples(shape: str, config: TrainingBench) -> list[Example]:
    """Return random prompts and responses for one step."""
    generator = torch.Generator().manual_seed(0)
    size = (config.sequences, config.prompt + config.response)
    tokens = torch.randint(SHAPES[shape].vocab_size, size, generator=generator).tolist()
    return [Example(row[: config.prompt], row[config.prompt :]) for row in tokens]
