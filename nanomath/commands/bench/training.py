"""Time and memory of training steps: against their floor, the plain way and trl.

    python -m nanomath bench training [CONFIG.toml] [key=value ...]
    python -m nanomath bench training shapes=smollm2 steps=sft,grpo lora=8
    python -m nanomath bench training shapes=tiny sequences=64 groups=8 against=trl sampled=true

A step is forward and backward passes and the optimizer, in grpo also the reference model's pass.
Ours makes the logits in chunks and computes a question once for all of its solutions; plain
makes all logits at once and computes the question with every solution; trl (1.16) is its
GRPOTrainer on the same weights, prompts, completions and rewards, without logs. The floor is the
time of the products with the weights of linear layers, as this machine makes them alone:

    x W^T forward,   dy W and dy^T x backward,   x [n, in], W [out, in], dy [n, out]

n are the tokens that differ, a prompt counting once for its group, and those of responses at the
lm_head; what is computed again is not in it, nor attention, nor with adapters these and dy^T x.
Expected: what a run would have said. ratio: to our time; MB: the peak beyond weights and
optimizer state. Of `repeats` processes, by turns, the fastest counts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import nanomath
from kernels import products
from kernels.linear_logprob import linear_logprob_reference
from nanomath.commands.bench import measure
from nanomath.commands.bench.rollout import NO_TEXT
from nanomath.config import option, parse_arguments
from nanomath.data.problem import Problem
from nanomath.models import Transformer, batches
from nanomath.models.batches import Example
from nanomath.models.lora import LoRA
from nanomath.rollout import Completion, Episode, Sampler
from nanomath.rollout.floor import fastest
from nanomath.settings import LINEAR_LAYERS
from nanomath.training import plan, policy_step, sft_step
from nanomath.training.optimizer import Optimizer
from nanomath.training.sittings import peak_memory

CALLS = 3  # in a process, the fastest counts: the first may be slow
FORWARD = {"sft": 1, "grpo": 2}  # passes of a step, beside the backward pass
PRODUCT_SECONDS = 0.1  # of which a product's fastest call counts for the floor


@dataclass
class TrainingBench(measure.Bench):
    """Which steps of which models to measure, and their sizes."""

    steps: list[str] = option(
        [], "empty: all, against trl grpo", choices=tuple(FORWARD)
    )
    shapes: list[str] = option(["tiny", "smollm2"], "models", choices=measure.SHAPES)
    against: str = option("plain", "what to compare with", choices=("plain", "trl"))
    sequences: int = option(8, "sequences in a step", minimum=2)
    groups: int = option(0, "samples of a prompt in grpo, 0: all sequences", minimum=0)
    prompt: int = option(32, "tokens of a prompt", minimum=1)
    response: int = option(96, "tokens of a response", minimum=1)
    token_budget: int = option(0, "tokens computed at once, 0: all", minimum=0)
    sampled: bool = option(False, "grpo: a step begins by sampling its responses")
    gradient_checkpointing: bool = option(
        False, "recompute layers in the backward pass"
    )
    lora: int = option(0, "rank of adapters to train, 0: the weights", minimum=0)
    repeats: int = option(2, "processes for each number; the best counts", minimum=1)


def main(argv: list[str]) -> int:
    """Measure every step of every shape; 1 if one of them failed."""
    config, _ = parse_arguments(TrainingBench, argv, __doc__)
    if config.against == "trl":
        measure.need("trl")
    config.prepare()
    settle(config)
    steps = product(config.shapes, config.steps)
    cases = [{"shape": shape, "step": step} for shape, step in steps]
    theirs = measure_trl if config.against == "trl" else measure_plain
    sides = {"ours": measure_step, config.against: theirs, "floor": floor}
    sides["expected"] = expected
    return measure.report(["training", *argv], config, cases, sides)


def settle(config: TrainingBench) -> None:
    """Put in what is left to be chosen. ValueError for what does not go together."""
    trl = config.against == "trl"
    config.steps = config.steps or list(FORWARD)[trl:]
    config.groups = config.groups or config.sequences
    if trl and "sft" in config.steps:
        raise ValueError("against=trl compares steps=grpo alone")
    if config.sequences % config.groups:
        raise ValueError(f"{config.sequences} sequences: no groups of {config.groups}")


def measure_plain(config: TrainingBench, shape: str, step: str) -> dict:
    """Measure a step with all logits at once, and every prompt with each of its responses."""
    batches.linear_logprob = linear_logprob_reference
    policy_step.make_batch = partial(batches.make_batch, share=False)
    return measure_step(config, shape, step)


def measure_step(config: TrainingBench, shape: str, step: str) -> dict:
    """Return the numbers of the fastest of some calls: its time and its stages', and the peak."""
    device = config.place
    run = new_step(config, shape, step)
    stages = clocked_stages(device)
    before = peak_memory(device, restart=True)
    calls = []
    for _ in range(CALLS):
        stages.clear()
        began = measure.now(device)
        run()
        ms = 1e3 * (measure.now(device) - began)
        calls.append({"ms": ms, "stages, ms": {**stages, "rest": ms - stages.total()}})
    best = min(calls, key=lambda call: call["ms"])
    return {**best, "MB": (peak_memory(device) - before) / 1e6}


def clocked_stages(device: torch.device) -> Counter:
    """Return the milliseconds of the stages of all steps from now on, which add up as they go."""
    ms = Counter()

    def clock(owner: Any, name: str, stage: str) -> None:
        function = getattr(owner, name)

        def clocked(*arguments, **options):
            began = measure.now(device)
            result = function(*arguments, **options)
            scored = stage == "forward" and not torch.is_grad_enabled()
            spent = 1e3 * (measure.now(device) - began)
            ms["reference pass" if scored else stage] += spent
            return result

        setattr(owner, name, clocked)

    for module in policy_step, sft_step:
        clock(module, "response_states", "forward")
        clock(module, "states_logprobs", "forward")
    clock(Tensor, "backward", "backward")
    clock(Optimizer, "step", "optimizer")
    clock(Sampler, "generate", "sampling")
    return ms


def new_step(config: TrainingBench, shape: str, step: str) -> Callable:
    """Return what makes one step, in grpo on groups of episodes, half of them right."""
    model, optimizer = in_training(config, shape)
    examples = random_examples(config, shape, step)
    budget = {"token_budget": config.token_budget}
    if step == "sft":
        sft = sft_step.SFTStep(model, optimizer, **budget)
        return lambda: sft.step(examples, 0, 1e-6)
    reference = measure.new_model(config, shape).requires_grad_(False)
    groups = config.groups
    grpo = policy_step.PolicyStep(model, reference, optimizer, groups, **budget)

    def step_on(completions: list[Completion]) -> dict:
        episodes = [
            Episode(
                Problem(str(completion.prompt_index), "", ""),
                example.prompt,
                completion,
                dict.fromkeys(("accuracy", "total"), completion.sample_index % 2),
            )
            for example, completion in zip(examples, completions, strict=True)
        ]
        return grpo.step(episodes, 0, 1e-6)

    if config.sampled:
        sampler = Sampler(model, NO_TEXT, slots=len(examples))
        prompts = [example.prompt for example in examples[::groups]]
        return lambda: step_on(sampler.generate(prompts, groups, config.response))
    logprobs = [-5.0] * config.response
    known = [
        Completion(i // groups, i % groups, e.response, logprobs, logprobs, "", "eos")
        for i, e in enumerate(examples)
    ]
    return lambda: step_on(known)


def in_training(config: TrainingBench, shape: str) -> tuple:
    """Return a model, or it with adapters, and AdamW of what is trained."""
    model = measure.new_model(config, shape)
    model.gradient_checkpointing = config.gradient_checkpointing
    lora = LoRA(model, config.lora, 32.0, LINEAR_LAYERS) if config.lora else None
    optimizer = Optimizer(lora or model, 0.0, (0.9, 0.95), 1e-8, 1.0)
    return (lora.applied_to(model) if lora else model), optimizer


def random_examples(config: TrainingBench, shape: str, step: str) -> list[Example]:
    """Return random responses, and random prompts, in grpo one for each group."""
    group = config.groups if step == "grpo" else 1
    size = config.sequences, config.prompt + config.response
    seeded = torch.Generator().manual_seed(0)
    vocabulary = measure.SHAPES[shape].vocab_size
    rows = torch.randint(vocabulary, size, generator=seeded).tolist()
    return [
        Example(rows[i - i % group][: config.prompt], row[config.prompt :])
        for i, row in enumerate(rows)
    ]


def floor(config: TrainingBench, shape: str, step: str) -> dict:
    """Return the time of a step's products, each as fast as the device has made it."""
    with torch.device("meta"):
        model = Transformer(measure.SHAPES[shape])
    examples = random_examples(config, shape, step)
    needed = Counter()
    for b in plan.batches_of(model, examples, config.token_budget):
        for layer in filter(lambda m: isinstance(m, nn.Linear), model.modules()):
            tokens = b.target if layer is model.lm_head else b.layout.tokens
            needed[tokens.numel(), *layer.weight.shape] += 1
    random = partial(torch.randn, device=config.place, dtype=config.torch_dtype)
    seconds = 0.0
    for (rows, out, width), times in needed.items():
        x, weight, dy = random(rows, width), random(out, width), random(rows, out)
        ways = [
            (FORWARD[step], products.linear, x, weight),
            (1, products.times(weight), dy),
            (not config.lora, products.add_outer, torch.zeros_like(weight), dy, x),
        ]
        for count, *run in ways:
            run = partial(*run)
            seconds += times * count * fastest(run, config.place, PRODUCT_SECONDS)
    return {"ms": 1e3 * seconds}


def expected(config: TrainingBench, shape: str, step: str) -> dict:
    """Return the time and memory that a run says it expects of such a step."""
    model, optimizer = in_training(config, shape)
    examples = random_examples(config, shape, step)
    speed = plan.bytes_per_s(model)
    cut = plan.batches_of(model, examples, config.token_budget)
    told = model, optimizer, examples, config.token_budget, (FORWARD[step] - 1, 1)
    seconds = plan.step_seconds(*told, speed)
    if config.sampled:
        asked = [example.prompt for example in examples[:: config.groups]]
        seconds += plan.sampling_seconds(
            Sampler(model, NO_TEXT, slots=len(examples)),
            plan.Drawing(asked, config.groups, config.response),
            speed,
        )
    return {"ms": 1e3 * seconds, "MB": plan.step_bytes(model, optimizer, cut) / 1e6}


def measure_trl(config: TrainingBench, shape: str, step: str) -> dict:
    """Return the time of the fastest step, by the trainer's own word, and the peak."""
    transformers = import_module("transformers")  # nanomath runs without it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries write, even from C++
    device = config.place
    ms = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.began = measure.now(device)

        def on_step_end(self, *_, **__) -> None:
            ms.append(1e3 * (measure.now(device) - self.began))

    with TemporaryDirectory() as directory:
        nanomath.save_model(measure.new_model(config, shape), None, directory)
        trainer = new_trainer(config, shape, directory)
        trainer.add_callback(Clock())
        moments = 2 * sum(weight.nbytes for weight in trainer.model.parameters())
        before = peak_memory(device, restart=True) + moments
        trainer.train()
    return {"ms": min(ms), "MB": max(0, peak_memory(device) - before) / 1e6}


def new_trainer(config: TrainingBench, shape: str, directory: str) -> Any:
    """Return the trainer of the model in a directory, with the settings of our own step."""
    datasets, tokenizers, transformers, trl = map(
        import_module, ("datasets", "tokenizers", "transformers", "trl")
    )
    numbers = {str(i): i for i in range(measure.SHAPES[shape].vocab_size)}
    # Prompts are texts of numbers; completions are handed out, or with `sampled` drawn.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    examples = random_examples(config, shape, "grpo")
    asked = [" ".join(map(str, e.prompt)) for e in examples[:: config.groups]]
    count = len(examples)
    budget = max(config.token_budget or count * len(examples[0]), len(examples[0]))
    fitting = range(1, min(budget // len(examples[0]), count) + 1)
    micro = max(n for n in fitting if count % n == 0)
    known = {
        "prompt_ids": [example.prompt for example in examples],
        "completion_ids": [example.response for example in examples],
        "logprobs": [[-5.0] * config.response] * count,
    }
    text = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0")
    options = {
        "model_init_kwargs": {"dtype": config.dtype},
        "generation_kwargs": {"min_new_tokens": config.response},
        "max_completion_length": config.response,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": count // micro,
        "gradient_checkpointing": config.gradient_checkpointing,
        "num_generations": config.groups,
        "max_steps": CALLS,
        "use_cpu": not config.on_gpu,
    }
    options |= {"logging_strategy": "no", "save_strategy": "no"}
    options |= {"loss_type": "grpo", "beta": 0.04, "bf16": False}
    return trl.GRPOTrainer(
        directory,
        lambda prompts, **_: [i % config.groups % 2 for i in range(len(prompts))],
        trl.GRPOConfig(directory, **options),
        datasets.Dataset.from_dict({"prompt": asked}),
        processing_class=text,
        rollout_func=None if config.sampled else lambda *_: known,
    )
