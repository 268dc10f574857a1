"""Time and memory of training steps and of scoring: against their floor, the plain way and trl.

    python -m nanomath bench training [CONFIG.toml] [key=value ...]

    python -m nanomath bench training                                   tiny and smollm2, minutes
    python -m nanomath bench training shapes=smollm2 steps=sft,grpo gradient_checkpointing=true
    python -m nanomath bench training shapes=smollm2 steps=sft,grpo lora=8
    python -m nanomath bench training shapes=qwen2.5-0.5b steps=logprob threads=1 save=bench.json
    python -m nanomath bench training shapes=tiny sequences=64 groups=8 against=trl sampled=true

Steps: sft and grpo are forward and backward passes and the optimizer, in grpo also the
reference model's pass; score is the states of one question's solutions; logprob is the logprobs
of random states alone, forward and backward. Ours makes the logits in chunks and computes a
question once for all of its solutions. The plain way makes all logits at once (sft, grpo,
logprob) and computes the question with every solution (grpo, score). trl is its GRPOTrainer on
the same weights, prompts, completions and rewards, without logs, and without sampling unless
`sampled`. The floor is the
time of the products with the weights of linear layers, as this machine makes them on their own:

    x W^T forward,   dy W and dy^T x backward,   x [n, in], W [out, in], dy [n, out]

n are the tokens that differ, a prompt counting once for its group, and those of responses at
the lm_head; what is computed again is not in it, nor are attention and all else that is no such
product. Every number is of the fastest of `repeats` processes, which take turns; memory is the
peak beyond weights and optimizer state. Of sft and grpo it is also told what a run would have said
before its first step (nanomath/training/plan.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanomath.commands.bench.measure import (
    SHAPES,
    Bench,
    Found,
    Report,
    best,
    by_turns,
    goes_on,
    need,
    number,
    peak_memory,
    ratio,
)
from nanomath.commands.bench.rollout import NoText
from nanomath.commands.bench.trl import measure_trl
from nanomath.config import option, parse_arguments
from nanomath.data.problem import Problem
from nanomath.models import Transformer, batches
from nanomath.models.batches import Example
from nanomath.models.lora import LoRA
from nanomath.process.states import states_at
from nanomath.rollout import Completion, Episode, Sampler
from nanomath.rollout.floor import fastest, seconds_of
from nanomath.settings import LINEAR_LAYERS
from nanomath.training import plan, policy_step
from nanomath.training import sft_step as sft
from nanomath.training.optimizer import Optimizer
from nanomath.training.policy_step import PolicyStep
from nanomath.training.sft_step import SFTStep

PASSES = {  # that a step makes over its tokens
    "sft": ("forward", "backward"),
    "grpo": ("forward", "forward", "backward"),
    "score": ("forward",),
    "logprob": ("forward", "backward"),
}
PRODUCT_SECONDS = 0.1  # of which a product's fastest call counts for the floor


@dataclass
class TrainingBench(Bench):
    """Which steps of which models to measure, and their sizes."""

    steps: list[str] = option(
        [], "what to measure; empty: all, against trl grpo", choices=tuple(PASSES)
    )
    shapes: list[str] = option(["tiny", "smollm2"], "models", choices=tuple(SHAPES))
    against: str = option(
        "plain", "what ours is compared with", choices=("plain", "trl")
    )
    sequences: int = option(8, "sequences in a step", minimum=2)
    groups: int = option(
        0, "samples of each prompt in grpo, 0: all sequences are of one", minimum=0
    )
    prompt: int = option(32, "tokens of a prompt", minimum=1)
    response: int = option(96, "tokens of a response", minimum=1)
    tokens: int = option(4096, "tokens of logprob", minimum=1)
    token_budget: int = option(0, "tokens computed at once, 0: all", minimum=0)
    sampled: bool = option(
        False, "grpo: a step begins by sampling its responses (against=trl)"
    )
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
    if config.against == "trl":
        need("trl")
    config.choose_machine()
    choose_steps(config)
    report = Report("training", argv, config)
    sides = ("ours", config.against)
    columns = [f"{side}, {unit}" for unit in ("ms", "MB") for side in sides]
    report.head(
        f"best of {config.repeats}; ratio: ours / {config.against}, below 1 is better; "
        "of floor: floor / ours",
        columns=["shape    ", "step", *columns[:2], "ratio", *columns[2:], "ratio"]
        + ["floor, ms", "of floor"],
    )
    for shape in config.shapes:
        for step in config.steps:
            row = {"shape": shape, "step": step, **compare(shape, step, config)}
            report.add(row, *table_row(row, *sides))
    return int(report.failed)


def choose_steps(config: TrainingBench) -> None:
    """Put in what is left to be chosen. ValueError for what does not go together."""
    trl = config.against == "trl"
    config.steps = config.steps or (["grpo"] if trl else list(PASSES))
    config.groups = config.groups or config.sequences
    if trl and config.steps != ["grpo"]:
        raise ValueError(
            f"against=trl compares steps=grpo alone, not {','.join(config.steps)}"
        )
    if config.sampled and not trl:
        raise ValueError("sampled=true needs against=trl: the plain way samples nothing")
    if config.sequences % config.groups:
        raise ValueError(
            f"groups of {config.groups} do not make {config.sequences} sequences: "
            "sequences must be a multiple of groups"
        )


def compare(shape: str, step: str, config: TrainingBench) -> Found:
    """Return seconds and bytes of each side, and the seconds of each stage of ours.

    "failed" says which side failed and why.
    """
    sides = ["ours", config.against, "floor"]
    if step in ("sft", "grpo"):
        sides.append("expected")
    calls = {side: (measure, shape, step, side, config) for side in sides}
    found = by_turns(config.threads, config.repeats, calls)
    numbers = {side: best(runs) for side, runs in found.items()}
    row: Found = {
        name: {side: run.get(name) for side, run in numbers.items()}
        for name in ("seconds", "bytes")
    }
    row["stages"] = numbers["ours"].get("stages", {})
    if failed := [
        f"{s}: {run['failed']}" for s, run in numbers.items() if "failed" in run
    ]:
        row["failed"] = "; ".join(failed)
    return row


def table_row(row: Found, ours: str, theirs: str) -> tuple[Any, ...]:
    """Return the cells of a row; its stages and what failed as notes."""
    cells = [row["shape"], row["step"]]
    for name, scale, digits in ("seconds", 1e3, 1), ("bytes", 1e-6, 0):
        pair = [row[name][side] for side in (ours, theirs)]
        cells += [*(number(value, digits, scale) for value in pair), ratio(*pair)]
    seconds = row["seconds"]
    cells += [number(seconds["floor"], 1, 1e3), ratio(seconds["floor"], seconds[ours])]
    notes = []
    if len(row["stages"]) > 1:
        stages = (
            f"{stage} {1e3 * spent:.1f} ({spent / seconds[ours]:.0%})"
            for stage, spent in row["stages"].items()
        )
        notes.append(f"stages, ms: {', '.join(stages)}")
    if "expected" in seconds:
        found = [
            (row[name]["expected"], row[name][ours]) for name in ("seconds", "bytes")
        ]
        (ms, of_time), (mb, of_memory) = (
            (number(pair[0], digits, scale), ratio(*pair))
            for pair, digits, scale in zip(found, (1, 0), (1e3, 1e-6), strict=True)
        )
        notes.append(f"expected: {ms} ms ({of_time} of ours), {mb} MB ({of_memory})")
    return cells, *notes, *([row["failed"]] if "failed" in row else [])


# --- in the measured process -----------------------------------------------------------------


def measure(shape: str, step: str, side: str, config: TrainingBench) -> Found:
    """Return seconds of the fastest call and of its stages, and bytes at the peak beyond what
    there was before.
    """
    if side == "expected":
        return expected(shape, step, config)
    if side == "floor":
        return {"seconds": floor_of(products(shape, step, config), config)}
    if side == "trl":
        examples = random_examples(shape, config, config.groups)
        return measure_trl(new_model(shape, config), examples, config)
    if side == "plain":
        batches.linear_logprob = materialised_logprob
        policy_step.make_batch = partial(batches.make_batch, share=False)
    device = torch.device(config.device)
    run = STEPS[step](shape, side, config)
    stages = clocked_stages(device)
    before = peak_memory(device, restart=True)
    calls: list[tuple[float, Found]] = []
    while goes_on([seconds for seconds, _ in calls]):
        stages.clear()
        seconds = seconds_of(run, device)
        rest = seconds - sum(stages.values())
        calls.append((seconds, {**stages, "rest": rest}))
    seconds, stages = min(calls, key=lambda call: call[0])
    most = max(0, peak_memory(device) - before)
    return {"seconds": seconds, "bytes": most, "stages": stages}


def clocked_stages(device: torch.device) -> Counter[str]:
    """Return the seconds of the stages of all steps from now on, which are added up as they go."""
    seconds: Counter[str] = Counter()

    def clock(owner: Any, name: str, stage: Callable[..., str]) -> None:
        function = getattr(owner, name)

        def clocked(*arguments: Any, **options: Any) -> Any:
            results: list[Any] = []
            spent = seconds_of(
                lambda: results.append(function(*arguments, **options)), device
            )
            seconds[stage(*arguments)] += spent
            return results[0]

        setattr(owner, name, clocked)

    for module in (policy_step, sft):
        clock(module, "response_states", stage_of_pass)
        clock(module, "states_logprobs", stage_of_pass)
    clock(Tensor, "backward", lambda *_: "backward")
    clock(Optimizer, "step", lambda *_: "optimizer")
    clock(Sampler, "generate", lambda *_: "sampling")
    return seconds


def stage_of_pass(model: Transformer, *_: object) -> str:
    """Return which pass over its tokens a model makes now."""
    if torch.is_grad_enabled():
        return "forward"
    return "old logprobs" if model.lm_head.weight.requires_grad else "reference pass"


# --- the floor -------------------------------------------------------------------------------


def products(
    shape: str, step: str, config: TrainingBench
) -> Counter[tuple[str, int, int, int]]:
    """Return how often a step needs (pass, rows, out, in): what a linear layer's pass multiplies.

    A forward pass is one product, a backward pass two, of 2 rows out in FLOPs each.
    """
    with torch.device("meta"):
        model = Transformer(SHAPES[shape])
    examples = random_examples(shape, config, group_of(step, config))
    sizes = [(0, config.tokens)]  # of all tokens, and at the lm_head, by micro-batch
    if step != "logprob":
        cut = batches.micro_batches(examples, config.token_budget)
        made = [batches.make_batch([examples[i] for i in rows]) for rows in cut]
        sizes = [
            (b.layout.tokens.numel(), len(b.target) * (step != "score")) for b in made
        ]
    return Counter(
        (way, rows[module is model.lm_head], *module.weight.shape)
        for way in PASSES[step]
        for rows in sizes
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def floor_of(needed: Counter[tuple[str, int, int, int]], config: TrainingBench) -> float:
    """Return the seconds of so many products, each as fast as the device has made it."""
    device = torch.device(config.device)
    options = {"device": device, "dtype": getattr(torch, config.dtype)}
    total = 0.0
    for (way, rows, out, width), times in needed.items():
        x, weight, dy = (
            torch.randn(size, **options)
            for size in ((rows, width), (out, width), (rows, out))
        )
        forward = partial(torch.matmul, x, weight.T)
        backward = (partial(torch.matmul, dy, weight), partial(torch.matmul, dy.T, x))
        for product in (forward,) if way == "forward" else backward:
            total += times * fastest(product, device, PRODUCT_SECONDS)
    return total


def expected(shape: str, step: str, config: TrainingBench) -> Found:
    """Return the seconds and bytes that a run says it expects of such a step."""
    model, optimizer = in_training(new_model(shape, config), config)
    examples = random_examples(shape, config, group_of(step, config))
    passes = (PASSES[step].count("forward") - 1, 1)
    machine = plan.machine_of(model, model.dtype)
    told = model, optimizer, examples, config.token_budget, passes, machine
    cut = plan.batches_of(model, examples, config.token_budget)
    return {
        "seconds": plan.step_seconds(*told),
        "bytes": plan.step_bytes(model, optimizer, cut),
    }


# --- the steps -------------------------------------------------------------------------------


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
    examples = random_examples(shape, config, group_of("sft", config))
    return lambda: step.step(examples, 0, 1e-6)


def grpo_step(shape: str, side: str, config: TrainingBench) -> Callable[[], object]:
    """Return one policy step on groups of episodes, half of them right."""
    start = new_model(shape, config)
    reference = start if config.lora else new_model(shape, config).requires_grad_(False)
    model, optimizer = in_training(start, config)
    step = PolicyStep(
        model,
        reference,
        optimizer,
        config.groups,
        token_budget=config.token_budget,
    )
    examples = random_examples(shape, config, config.groups)

    def episodes_of(completions: Iterable[Completion]) -> list[Episode]:
        return [
            Episode(
                Problem(str(i // config.groups), "", ""),
                example.prompt,
                completion,
                {"accuracy": i % 2, "total": i % 2},
            )
            for i, (example, completion) in enumerate(
                zip(examples, completions, strict=True)
            )
        ]

    if config.sampled:
        sampler = Sampler(model, NoText(), slots=len(examples))
        prompts = [example.prompt for example in examples[:: config.groups]]
        length = config.response

        def whole_step() -> Found:
            drawn = sampler.generate(prompts, config.groups, max_new_tokens=length)
            return step.step(episodes_of(drawn), 0, 1e-6)

        return whole_step
    logprobs = [-5.0] * config.response
    known = episodes_of(
        Completion(0, i, example.response, logprobs, logprobs, "", "eos")
        for i, example in enumerate(examples)
    )
    return lambda: step.step(known, 0, 1e-6)


def score_step(shape: str, side: str, config: TrainingBench) -> Callable[[], object]:
    """Return the last states of one question's solutions; ours computes the question once."""
    model = new_model(shape, config)
    examples = random_examples(shape, config, group_of("score", config))
    if side == "plain":
        examples = [
            Example([], example.prompt + example.response) for example in examples
        ]
    places = [[config.prompt + config.response - 1]] * len(examples)
    return lambda: list(states_at(model, examples, places, config.token_budget))


def logprob_step(shape: str, side: str, config: TrainingBench) -> Callable[[], object]:
    """Return the logprobs of random states with the shape's vocabulary, forward and backward."""
    options = {"device": config.device, "dtype": getattr(torch, config.dtype)}
    vocabulary = SHAPES[shape].vocab_size
    width = SHAPES[shape].hidden_size
    hidden = torch.randn(config.tokens, width, **options).requires_grad_()
    weight = torch.empty(vocabulary, width, **options).normal_(std=0.02).requires_grad_()
    target = torch.randint(vocabulary, (config.tokens,), device=config.device)
    return lambda: batches.linear_logprob(hidden, weight, target)[0].mean().backward()


STEPS = {
    "sft": sft_step,
    "grpo": grpo_step,
    "score": score_step,
    "logprob": logprob_step,
}


def new_model(shape: str, config: TrainingBench) -> Transformer:
    """Return a model of random weights."""
    model = Transformer(SHAPES[shape]).init_weights(0)
    model.to(config.device, getattr(torch, config.dtype))
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def in_training(
    model: Transformer, config: TrainingBench
) -> tuple[Transformer, Optimizer]:
    """Return the model, or it with adapters, and AdamW of what is trained."""
    lora = LoRA(model, config.lora, 32.0, LINEAR_LAYERS) if config.lora else None
    optimizer = Optimizer(lora or model, 0.0, (0.9, 0.95), 1e-8, 1.0)
    return (lora.applied_to(model) if lora else model), optimizer


def group_of(step: str, config: TrainingBench) -> int:
    """Return how many sequences of a step have one prompt."""
    return {"grpo": config.groups, "score": config.sequences}.get(step, 1)


def random_examples(shape: str, config: TrainingBench, group: int) -> list[Example]:
    """Return random responses for one step, and random prompts for each group of them."""
    generator = torch.Generator().manual_seed(0)
    size = (config.sequences, config.prompt + config.response)
    rows = torch.randint(SHAPES[shape].vocab_size, size, generator=generator).tolist()
    return [
        Example(rows[i - i % group][: config.prompt], row[config.prompt :])
        for i, row in enumerate(rows)
    ]
