"""Time and memory of training steps and of scoring, as nanomath does them against the plain
way.

    python -m nanomath bench training [CONFIG.toml] [key=value ...]

    python -m nanomath bench training                            every case, minutes
    python -m nanomath bench training cases=logprob threads=1 save=bench.json
    python -m nanomath bench training cases=smollm2-sft,smollm2-grpo gradient_checkpointing=true

Ours makes the logits in chunks, and computes a question once for all of its solutions; the
plain way makes all logits at once, and computes the question with every solution. Each number
comes from a process of its own, and the two sides of a ratio from processes that took turns. A
step is forward and backward passes and the optimizer, in GRPO also the reference model's pass;
scoring is the states of one question's solutions. Memory is what is needed at the peak beyond
weights and optimizer state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanomath.commands.bench.machine import (
    SHAPES,
    by_turns,
    new_report,
    peak_memory,
    place,
    save_report,
    use_threads,
)
from nanomath.config import option, parse_arguments
from nanomath.data.problem import Problem
from nanomath.models import Transformer
from nanomath.models.batches import Example
from nanomath.models.shared_prefix import states_at
from nanomath.rollout import Completion, Episode
from nanomath.training import logprobs
from nanomath.training.build import choose_device
from nanomath.training.optimizer import Optimizer
from nanomath.training.policy_step import PolicyStep
from nanomath.training.sft_step import SFTStep

CASES = (
    "tiny-sft",
    "tiny-grpo",
    "tiny-score",
    "smollm2-sft",
    "smollm2-grpo",
    "smollm2-score",
    "logprob",
)
CALLS = {
    "tiny": 5,
    "smollm2": 2,
    "logprob": 1,
}  # in one process; the first may be slow, the fastest counts
VARIANTS = ("ours", "plain")


@dataclass
class TrainingBench:
    """What to measure, and its sizes."""

    cases: list[str] = option(list(CASES), "what to measure", choices=CASES)
    repeats: int = option(2, "processes for each number; the fastest counts", minimum=1)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = option(
        "float32", "what the models compute in", choices=("float32", "bfloat16")
    )
    threads: int = option(0, "CPU threads, 0: let torch decide", minimum=0)
    gradient_checkpointing: bool = option(False, "recompute each layer in the backward pass")
    tiny: int = option(
        32, "sequences in a step of the tiny model; in GRPO they are one group", minimum=2
    )
    smollm2: int = option(8, "sequences in a step of SmolLM2's shape", minimum=2)
    prompt: int = option(32, "tokens of a prompt", minimum=1)
    response: int = option(96, "tokens of a response", minimum=1)
    token_budget: int = option(
        0, "padded tokens of a step computed at once, 0: all", minimum=0
    )
    tokens: int = option(4096, "logprob: tokens", minimum=1)
    vocabulary: int = option(151936, "logprob: size of the vocabulary (Qwen2.5's)", minimum=2)
    width: int = option(896, "logprob: width of the states (Qwen2.5-0.5B's)", minimum=1)
    save: str = option(
        "", "write the numbers, with what they were measured on, to this JSON file"
    )


def main(argv: list[str]) -> int:
    """Measure every case, print a table, and save it after each row."""
    config, _ = parse_arguments(TrainingBench, argv, __doc__)
    config.device = str(choose_device(config.device))
    report = new_report("training", argv, config)
    print(table_head(report))
    with tqdm(
        total=len(config.cases) * config.repeats * 2, unit="process", disable=None, leave=False
    ) as bar:
        for case in config.cases:
            report["rows"].append(compare(case, config, bar))
            bar.write(table_row(report["rows"][-1]))
            save_report(report, config.save)
    return 0


# --- one row ---------------------------------------------------------------------------------


def compare(case: str, config: TrainingBench, bar: tqdm) -> dict[str, Any]:
    """Seconds and bytes of a case our way and the plain way, by turns; None where memory ran
    out.
    """
    found = by_turns(
        {variant: [(measure, case, variant, config)] * config.repeats for variant in VARIANTS},
        bar,
    )
    best = {
        variant: [min(column) for column in zip(*runs, strict=True)]
        for variant, runs in found.items()
    }
    seconds, peaks = (
        {variant: (best[variant] or (None, None))[i] for variant in VARIANTS} for i in (0, 1)
    )
    return {"case": case, "seconds": seconds, "bytes": peaks}


def table_head(report: dict[str, Any]) -> str:
    """What was measured where, and the names of the columns."""
    config = report["config"]
    names = "".join(f"{name:>10}" for name in (*VARIANTS, "ratio") * 2)
    where = f"{place(report)}, {config['dtype']}"
    return f"{where}; best of {config['repeats']}\n{'':14}{'seconds':>30}{'MB at the peak':>30}\n{'':14}{names}"


def table_row(row: dict[str, Any]) -> str:
    """The case, and for time and memory both numbers and how many times the second the first
    is.
    """
    cells = [f"{row['case']:14}"]
    for numbers, unit, digits in (row["seconds"], 1, 3), (row["bytes"], 1e6, 0):
        known = [numbers[variant] for variant in VARIANTS]
        cells += [
            "no memory".rjust(10) if number is None else f"{number / unit:10.{digits}f}"
            for number in known
        ]
        cells.append(" " * 10 if None in known else f"{known[0] / known[1]:10.2f}")
    return "".join(cells).rstrip()


# --- in the measured process -----------------------------------------------------------------


def measure(case: str, variant: str, config: TrainingBench) -> tuple[float, int]:
    """Seconds of the fastest call, and bytes at the peak of all calls beyond what there was
    before the first.
    """
    use_threads(config.threads)
    if variant == "plain":
        logprobs.linear_logprob = materialised_logprob
    device = torch.device(config.device)
    (shape, _, step) = case.partition("-")
    scored = partial(score_steps, shared=variant == "ours")
    run = {"sft": sft_step, "grpo": grpo_step, "score": scored, "": bare_logprob}[step](
        shape, config
    )
    before = peak_memory(device, restart=True)
    seconds = []
    for _ in range(CALLS[shape]):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds), peak_memory(device) - before


def materialised_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same numbers as `linear_logprob`, but for the bits of `exact`, from all logits [n,
    V] at once.
    """
    logits = (hidden @ weight.T).float()
    logs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, target[:, None])[:, 0], entropy


# --- what is measured ------------------------------------------------------------------------


def sft_step(shape: str, config: TrainingBench) -> Callable[[], object]:
    """One step of fine-tuning."""
    model = new_model(shape, config)
    step = SFTStep(model, new_optimizer(model), token_budget=config.token_budget)
    examples = [Example(*pair) for pair in token_pairs(shape, config)]
    return lambda: step.step(examples, 0, 1e-6)


def grpo_step(shape: str, config: TrainingBench) -> Callable[[], object]:
    """One policy step on a group of episodes, half of them right."""
    model = new_model(shape, config)
    reference = new_model(shape, config).requires_grad_(False)
    pairs = token_pairs(shape, config)
    step = PolicyStep(
        model, reference, new_optimizer(model), len(pairs), token_budget=config.token_budget
    )
    episodes = []
    for i, (prompt, response) in enumerate(pairs):
        sampled = [-5.0] * len(response)
        completion = Completion(0, i, response, sampled, sampled, "", "eos")
        episodes.append(
            Episode(
                Problem("0", "", ""), prompt, completion, {"accuracy": i % 2, "total": i % 2}
            )
        )
    return lambda: step.step(episodes, 0, 1e-6)


def score_steps(shape: str, config: TrainingBench, shared: bool) -> Callable[[], object]:
    """The last states of the solutions of one question, which is computed once if it is
    `shared`.
    """
    model = new_model(shape, config)
    pairs = token_pairs(shape, config)
    sequences = [pairs[0][0] + response for _, response in pairs]
    groups = [0 if shared else i for i in range(len(pairs))]
    places = [[len(tokens) - 1] for tokens in sequences]
    return lambda: list(states_at(model, sequences, places, groups, config.token_budget))


def bare_logprob(shape: str, config: TrainingBench) -> Callable[[], object]:
    """Logprobs of random states, forward and backward."""
    options = {"device": config.device, "dtype": getattr(torch, config.dtype)}
    hidden = torch.randn(config.tokens, config.width, **options).requires_grad_()
    weight = (
        torch.empty(config.vocabulary, config.width, **options)
        .normal_(std=0.02)
        .requires_grad_()
    )
    target = torch.randint(config.vocabulary, (config.tokens,), device=config.device)
    return lambda: logprobs.linear_logprob(hidden, weight, target)[0].mean().backward()


def new_model(shape: str, config: TrainingBench) -> Transformer:
    model = (
        Transformer(SHAPES[shape])
        .init_weights(0)
        .to(config.device, getattr(torch, config.dtype))
    )
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def new_optimizer(model: Transformer) -> Optimizer:
    return Optimizer(model, 0.0, (0.9, 0.95), 1e-8, 1.0)


def token_pairs(shape: str, config: TrainingBench) -> list[tuple[list[int], list[int]]]:
    """Random prompts and responses for a step of the model."""
    generator = torch.Generator().manual_seed(0)
    sizes = (config.prompt, config.response)
    tokens = torch.randint(
        SHAPES[shape].vocab_size, (getattr(config, shape), sum(sizes)), generator=generator
    )
    return [tuple(part.tolist() for part in row.split(sizes)) for row in tokens]
