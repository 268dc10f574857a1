"""The sampler against the machine's floor, the trainer's logprobs and transformers.

    python -m nanomath bench rollout [MODEL] [CONFIG.toml] [key=value ...]
    python -m nanomath bench rollout qwen2.5-1.5b rows=64,256 prompt=960 response=128 save=r.json
    python -m nanomath bench rollout runs/tiny-grpo groups=8 against=transformers

MODEL is a directory, a hub id, or a shape with random weights. Prompts are random tokens, and no
eos ends a response: every row does the same work on both sides. ms and tokens/s are with the
prefill, ms/step is of decoding. The floor is the time in which this machine, at the GB/s and
GFLOP/s measured just after, can read and multiply what a step does (nanomath/rollout/floor.py).
MB: the peak beyond the weights; gap: to the trainer's logprobs. transformers draws as much, all
rows in one batch; ratio: its time / ours. Of `repeats` processes, by turns, the fastest counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch

import nanomath
from nanomath.commands.bench import measure
from nanomath.config import option, parse_arguments, positional
from nanomath.data.files import read_json
from nanomath.models import ModelConfig, Transformer, resolve_model_dir
from nanomath.models.batches import Example
from nanomath.models.scores import response_scores
from nanomath.rollout import Completion, Sampler
from nanomath.rollout.floor import measure_machine, step_floor
from nanomath.training.policy_metrics import sampler_gap
from nanomath.training.sittings import peak_memory

SHAPES = ", ".join(measure.SHAPES)
# In place of a tokenizer: no token ends a completion, and none has a text.
NO_TEXT = SimpleNamespace(eos_ids=(), decode=lambda ids: "")
WARM_UP = 12  # tokens on a CPU: the first steps try out numbers of threads


@dataclass
class RolloutBench(measure.Bench):
    """What to sample, and how."""

    model: str = option("smollm2", f"a directory, a hub id, or one of {SHAPES}")
    rows: list[int] = option([64], "sequences decoded side by side", minimum=1)
    prompt: int = option(128, "tokens of a prompt", minimum=1)
    response: int = option(64, "tokens of a response", minimum=1)
    groups: int = option(1, "samples of each prompt", minimum=1)
    exact: bool = option(False, "the sampler's exact mode")
    repeats: int = option(2, "processes for each number; the best counts", minimum=1)
    against: str = option("", "compare with its generate", choices=("", "transformers"))


def main(argv: list[str]) -> int:
    """Measure every number of rows; 1 if one of them failed."""
    models = {word for word in positional(argv) if not word.endswith(".toml")}
    words = [f"model={word}" if word in models else word for word in argv]
    config, _ = parse_arguments(RolloutBench, words, __doc__)
    sides = {"ours": measure_sampler}
    if config.against:
        measure.need(config.against)
        sides[config.against] = measure_transformers
    config.prepare()
    check_sizes(config, model_shape(config.model))
    cases = [{"rows": rows} for rows in config.rows]
    return measure.report(["rollout", *argv], config, cases, sides)


def model_shape(model: str) -> ModelConfig:
    """Return the shape of that name, or of the model in a directory or on the hub."""
    if model in measure.SHAPES:
        return measure.SHAPES[model]
    if not Path(model).exists() and "/" not in model:
        raise ValueError(f"model={model}: no directory, hub id, or one of {SHAPES}")
    return ModelConfig.from_hf(read_json(resolve_model_dir(model) / "config.json"))


def check_sizes(config: RolloutBench, shape: ModelConfig) -> None:
    """ValueError when the numbers do not go together."""
    if any(rows % config.groups for rows in config.rows):
        raise ValueError(f"rows={config.rows}: no multiples of groups={config.groups}")
    size = config.prompt + config.response
    if size > shape.max_positions:
        raise ValueError(
            f"prompt + response is {size}: a context is {shape.max_positions}"
        )


def build(config: RolloutBench, rows: int) -> tuple[Transformer, list]:
    """Return the model, or one of random weights, and random prompts for so many rows."""
    if config.model in measure.SHAPES:
        model = measure.new_model(config, config.model)
    else:
        model = nanomath.load_model(config.model, config.device, config.torch_dtype)
    size = rows // config.groups, config.prompt
    return model, torch.randint(model.config.vocab_size, size).tolist()


def measure_sampler(config: RolloutBench, rows: int) -> dict:
    """Return time, memory, a step and its floor, and the gap."""
    model, prompts = build(config, rows)
    before = peak_memory(config.place, restart=True)
    sampler = Sampler(model, NO_TEXT, rows, config.exact)
    # a GPU captures the graphs of all numbers of rows in a whole run
    few = config.response if config.on_gpu else WARM_UP
    sampler.generate(prompts, config.groups, few)
    looks = []
    asked = prompts, config.groups, config.response
    began = time.perf_counter()
    drawn = sampler.generate(
        *asked, progress=lambda *now: looks.append((time.perf_counter(), *now))
    )
    seconds = time.perf_counter() - began
    peak = peak_memory(config.place) - before
    sampler.release()
    machine = measure_machine(config.place, config.torch_dtype)
    step, live, context = step_time(looks)
    sizes = live, config.prompt + context, config.torch_dtype, machine
    stages = step_floor(model.config, *sizes, config.prompt, config.groups).values()
    model.exact = config.exact
    return {
        "ms": 1e3 * seconds,
        "tokens/s": sum(completion.length for completion in drawn) / seconds,
        "ms/step": 1e3 * step,
        "floor, ms": 1e3 * sum(stages),
        "of floor": sum(stages) / step,
        "MB": peak / 1e6,
        **gap(model, prompts, drawn),
        "GB/s": machine.copy_bytes_per_s / 1e9,
        "GFLOP/s": machine.gemm_flops_per_s / 1e9,
    }


def step_time(looks: list[tuple]) -> tuple:
    """Return seconds of a step of a full batch, its rows, and the tokens drawn in the mean.

    looks: when, and what `Progress` is called with. The step is taken from the first one, after
    the prefill, to the last one before a sample finished; nan when there are not two of these.
    """
    full = [look for look in looks if look[1] == 0]
    if len(full) < 2:
        return nan, nan, nan
    (began, _, before, live, _), (ended, _, after, *_) = full[0], full[-1]
    return (ended - began) * live / (after - before), live, (before + after) / 2 / live


def gap(model: Transformer, prompts: list[list[int]], drawn: list[Completion]) -> dict:
    """Return how far the sampler is from the trainer, as in a training run's log."""
    examples = [Example(prompts[c.prompt_index], c.tokens) for c in drawn]
    scored = torch.stack(list(response_scores(model, examples)[0]))
    sampled = torch.tensor([c.logprobs for c in drawn], dtype=torch.float64).flatten()
    return sampler_gap(scored.flatten().double(), sampled, sampled)


def measure_transformers(config: RolloutBench, rows: int) -> dict:
    """Return milliseconds and tokens a second of transformers' `generate`."""
    transformers = import_module("transformers")  # nanomath runs without it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ours, prompts = build(config, rows)
    with TemporaryDirectory() as directory:
        nanomath.save_model(ours, None, directory)
        del ours
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=config.torch_dtype
        ).to(config.device)
    asked = torch.tensor(prompts).repeat_interleave(config.groups, 0).to(config.device)
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(asked)
    model.generate(asked, max_new_tokens=2, **options)
    began = measure.now(config.place)
    drawn = model.generate(asked, max_new_tokens=config.response, **options)
    seconds = measure.now(config.place) - began
    tokens = drawn.numel() - asked.numel()
    return {"ms": 1e3 * seconds, "tokens/s": tokens / seconds}
