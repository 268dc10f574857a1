"""The sampler against the machine's floor, the trainer's logprobs and transformers.

    python -m nanomath bench rollout [MODEL] [CONFIG.toml] [key=value ...]

    python -m nanomath bench rollout                                        SmolLM2-135M's shape
    python -m nanomath bench rollout qwen2.5-1.5b rows=64,256 prompt=960 response=128 save=r.json
    python -m nanomath bench rollout models/SmolLM2-135M-Instruct problems=gsm8k/test.jsonl groups=8
    python -m nanomath bench rollout smollm2 groups=8 prompt=512 against=unshared,transformers

MODEL is a directory, a hub id, or a shape with random weights, which never draw an eos. A point
is a combination of rows, prompt, response and groups. For each one: tokens a second, prefill
included; the milliseconds of a decoding step of a full batch and its floor, the time in which
this machine, as measured just before, can read what a step reads and multiply what it
multiplies; peak memory beyond the weights; how the step divides into stages; and how far the
logprobs are from the trainer's. The numbers are those of the fastest of `repeats` processes, the
sides by turns.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from nanomath.commands.bench.measure import (
    SHAPES,
    Bench,
    Found,
    Report,
    best,
    by_turns,
    in_new_process,
    need,
    number,
    peak_memory,
    ratio,
    this_machine,
)
from nanomath.commands.bench.stages import stage_shares
from nanomath.config import option, parse_arguments
from nanomath.data.files import read_json
from nanomath.data.problem_sets import load_problems
from nanomath.data.prompts import PromptTemplate
from nanomath.models import (
    ModelConfig,
    Tokenizer,
    Transformer,
    load_model,
    load_tokenizer,
    resolve_model_dir,
    save_model,
)
from nanomath.models.batches import Example
from nanomath.models.scores import response_scores
from nanomath.rollout import Completion, Sampler
from nanomath.rollout.floor import Machine, step_floor
from nanomath.training.build import encode_prompts
from nanomath.training.policy_metrics import sampler_gap

SCORED_TOKENS = 4096  # tokens that the trainer's logprobs are computed for at once
WARM_UP = 12  # tokens on a CPU: the first steps try out numbers of threads
PROFILED = 64  # tokens: of each stage's share
Look = tuple[float, int, int, int, float]  # when, and what `Progress` is called with


@dataclass
class RolloutBench(Bench):
    """What to sample, and how."""

    model: str = option(
        "smollm2", f"a directory, a hub id, or one of {', '.join(SHAPES)}"
    )
    rows: list[int] = option(
        [], "sequences decoded side by side; empty: 64, on a GPU 64 and 256", minimum=1
    )
    prompt: list[int] = option([128], "tokens of a prompt", minimum=1)
    response: list[int] = option(
        [64], "tokens of a response, or up to an eos", minimum=1
    )
    groups: list[int] = option([1], "samples of each prompt", minimum=1)
    refills: int = option(
        0, "further samples for each row, begun as others end", minimum=0
    )
    problems: str = option("", "take the questions of this problem set as prompts")
    exact: bool = option(False, "the sampler's exact mode")
    repeats: int = option(2, "processes for each number; the best counts", minimum=1)
    against: list[str] = option(
        [],
        "also measure: the sampler without shared prompts, transformers' generate",
        choices=("unshared", "transformers"),
    )
    batches: list[int] = option(
        [],
        "batch sizes of transformers, the best counts; empty: rows, 1/2, 1/4",
        minimum=1,
    )
    scored: int = option(
        16, "completions to compare with the trainer's logprobs", minimum=0
    )


@dataclass(frozen=True)
class Point:
    """What is drawn: `group` samples of every prompt, `rows` at a time."""

    rows: int
    group: int
    response: int  # tokens, or up to an eos
    prompts: list[list[int]]

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt."""
        return fmean(map(len, self.prompts))


class NoText:
    """In place of a tokenizer: no token ends a completion, and none has a text."""

    eos_ids: tuple[int, ...] = ()

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def main(argv: list[str]) -> int:
    """Measure every point; 1 if one of them failed."""
    words = list(argv)
    if (
        words
        and "=" not in words[0]
        and words[0][:1] != "-"
        and words[0][-5:] != ".toml"
    ):
        words[0] = f"model={words[0]}"
    config, _ = parse_arguments(RolloutBench, words, __doc__)
    if "transformers" in config.against:
        need("transformers")
    config.choose_machine()
    shape = model_shape(config.model)
    points = new_points(config, shape)
    report = Report("rollout", argv, config)
    machine = this_machine(config)
    report.content["machine"] = asdict(machine)
    sides = [f"x {side}" for side in config.against]
    report.head(
        f"{config.model}{', exact' * config.exact}; best of {config.repeats}; this machine copies "
        f"{machine.copy_bytes_per_s / 1e9:.0f} GB/s and multiplies at "
        f"{machine.gemm_flops_per_s / 1e9:.0f} GFLOP/s",
        "floor: ms that a step takes at these rates; x: our tokens/s / theirs, above 1 is better",
        columns=["rows", "prompt", "response", "group", "tokens/s", "ms/step"]
        + ["floor, ms", "of floor", "peak MB", *sides],
    )
    for point in points:
        row = measure_point(config, shape, point, machine)
        report.add(row, *table_row(row))
    return int(report.failed)


# --- what to measure -------------------------------------------------------------------------


def model_shape(model: str) -> ModelConfig:
    """Return the shape of that name, or of the model in a directory or on the hub."""
    if model in SHAPES:
        return SHAPES[model]
    if not Path(model).expanduser().exists() and "/" not in model:
        known = ", ".join(SHAPES)
        raise ValueError(
            f"unknown model {model!r}: expected a directory, a hub id, or one of {known}"
        )
    return ModelConfig.from_hf(read_json(resolve_model_dir(model) / "config.json"))


def new_points(config: RolloutBench, shape: ModelConfig) -> list[Point]:
    """Return every point with its prompts. ValueError when the numbers do not go together."""
    config.rows = config.rows or ([64, 256] if config.on_gpu else [64])
    lengths = (
        [0] if config.problems else config.prompt
    )  # problems have lengths of their own
    points = []
    for rows, response, group, length in itertools.product(
        config.rows, config.response, config.groups, lengths
    ):
        if rows % group:
            raise ValueError(
                f"groups of {group} do not fill {rows} rows: rows must be a multiple of groups"
            )
        count = rows * (1 + config.refills) // group
        prompts = new_prompts(config, shape, count, length)
        longest = max(map(len, prompts))
        if longest + response > shape.max_positions:
            raise ValueError(
                f"a prompt of {longest} tokens and a response of {response} do not fit: "
                f"the context of {config.model} is {shape.max_positions} tokens"
            )
        points.append(Point(rows, group, response, prompts))
    return points


def new_prompts(
    config: RolloutBench, shape: ModelConfig, count: int, length: int
) -> list[list[int]]:
    """Return random prompts, or those of the problem set, again from its beginning if short."""
    if not config.problems:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(
            shape.vocab_size, (count, length), generator=generator
        ).tolist()
    if config.model in SHAPES:
        raise ValueError(
            f"problems needs a model with a tokenizer: {config.model} has random weights"
        )
    problems = load_problems(config.problems, limit=count)
    tokenizer = load_tokenizer(config.model)
    template = PromptTemplate(chat=tokenizer.chat_template is not None)
    prompts = encode_prompts(problems, template, tokenizer, shape.max_positions)
    return list(itertools.islice(itertools.cycle(prompts), count))


# --- one row ---------------------------------------------------------------------------------


def measure_point(
    config: RolloutBench, shape: ModelConfig, point: Point, machine: Machine
) -> Found:
    """Return the row of a point."""
    calls = {
        "nanomath": (measure_sampler, config, point, True),
        "unshared": (measure_sampler, config, point, False),
        "transformers": (measure_transformers, config, point),
    }
    sides = {side: calls[side] for side in ("nanomath", *config.against)}
    found = by_turns(config.threads, config.repeats, sides)
    row: Found = {side: best(runs) for side, runs in found.items()}
    ours = row["nanomath"]
    row |= {"rows": point.rows, "prompt": point.prompt, "response": point.response}
    row["group"] = point.group
    if "step_s" in ours:
        row["context"] = point.prompt + ours["drawn"]
        dtype = getattr(torch, config.dtype)
        row["floor_s"] = step_floor(
            shape,
            ours["live"],  # fewer than the rows where memory has no room
            row["context"],
            dtype,
            machine,
            point.prompt,
            point.group,
        )
        row["share"] = sum(row["floor_s"].values()) / ours["step_s"]
    row |= in_new_process(config.threads, inspect_sampler, config, point)
    if failed := [
        f"{side}: {row[side]['failed']}" for side in sides if "failed" in row[side]
    ]:
        row["failed"] = "; ".join(failed)
    return row


def table_row(row: Found) -> tuple[Any, ...]:
    """Return the cells of a row; its stages, its gap and what failed as notes."""
    ours = row["nanomath"]
    speed = ours.get("tokens_per_s")
    floor = sum(row["floor_s"].values()) if "floor_s" in row else None
    cells = [
        f"{row['rows']}",
        number(row["prompt"]),
        f"{row['response']}",
        f"{row['group']}",
    ]
    cells += [
        number(speed, 1),
        number(ours.get("step_s"), 3, 1e3),
        number(floor, 3, 1e3),
    ]
    cells += [f"{row['share']:.0%}" if "share" in row else "-"]
    cells += [number(ours.get("bytes"), 0, 1e-6)]
    for side in ("unshared", "transformers"):
        if side in row:
            cells.append(ratio(speed, row[side].get("tokens_per_s")))
    notes = []
    if stages := row.get("stages"):
        shares = (f"{stage} {share:.0%}" for stage, share in stages.items() if share)
        notes.append(f"stages: {', '.join(shares)}")
    if "gap_mean" in row:
        notes.append(
            f"against the trainer: |dlogprob| {row['gap_mean']:.2g} in the mean, "
            f"{row['gap_max']:.2g} at most; effective sample size {row['effective_samples']:.2%}"
        )
    if "failed" in row:
        notes.append(f"failed: {row['failed']}")
    return cells, *notes


# --- in the measured process: nanomath -------------------------------------------------------


def build(config: RolloutBench) -> tuple[Transformer, Tokenizer | NoText]:
    """Return the model with its tokenizer, or one of random weights."""
    dtype = getattr(torch, config.dtype)
    if config.model not in SHAPES:
        model = load_model(config.model, config.device, dtype)
        return model, load_tokenizer(config.model)
    with torch.device("meta"):
        model = Transformer(SHAPES[config.model])
    model.to(dtype).to_empty(device=config.device)
    model.lm_head.weight = model.model.embed_tokens.weight  # to_empty has untied them
    return model.init_weights(0), NoText()


def measure_sampler(config: RolloutBench, point: Point, share_prompts: bool) -> Found:
    """Return tokens a second, bytes at the peak beyond the weights, and `step_time`."""
    model, tokenizer = build(config)
    before = peak_memory(model.device, restart=True)
    sampler = Sampler(
        model, tokenizer, point.rows, config.exact, share_prompts=share_prompts
    )
    # a GPU captures the graphs of all numbers of rows in a whole run
    draw(
        sampler, point, point.response if config.on_gpu else min(point.response, WARM_UP)
    )
    began = time.perf_counter()
    completions, looks = draw(sampler, point, point.response)
    seconds = time.perf_counter() - began
    peak = peak_memory(model.device) - before
    full = full_batch(point)
    if full != point or not isinstance(
        tokenizer, NoText
    ):  # some rows ended before others
        sampler.release()
        sampler = Sampler(
            model, NoText(), point.rows, config.exact, share_prompts=share_prompts
        )
        _, looks = draw(sampler, full, point.response)
    tokens = sum(completion.length for completion in completions)
    return {"tokens_per_s": tokens / seconds, "bytes": peak, **step_time(looks)}


def full_batch(point: Point) -> Point:
    """Return the point without refills."""
    prompts = point.prompts[: point.rows // point.group]
    return Point(point.rows, point.group, point.response, prompts)


def draw(
    sampler: Sampler, point: Point, tokens: int, tell: Callable[..., None] | None = None
) -> tuple[list[Completion], list[Look]]:
    """Return the completions of at most `tokens` tokens, and what the host saw at each look."""
    looks: list[Look] = []

    def progress(*now: float) -> None:
        looks.append((time.perf_counter(), *now))
        if tell is not None:
            tell(*now)

    return sampler.generate(point.prompts, point.group, tokens, progress=progress), looks


def step_time(looks: list[Look]) -> dict[str, float]:
    """Return seconds of a step of a full batch, its rows, and the tokens drawn in the mean.

    It is taken from the first look, after the prefill, to the last one before a sample
    finished. Empty when there are not two of these.
    """
    full = [look for look in looks if look[1] == 0]
    if len(full) < 2:
        return {}
    began, _, before, live, *_ = full[0]
    ended, _, after, *_ = full[-1]
    seconds = (ended - began) * live / (after - before)
    return {"step_s": seconds, "drawn": (before + after) / 2 / live, "live": live}


def inspect_sampler(config: RolloutBench, point: Point) -> Found:
    """Return the shares of the stages, and the gap to the trainer's logprobs."""
    model, tokenizer = build(config)
    found: Found = {}
    if config.scored:
        sampler = Sampler(model, tokenizer, point.rows, config.exact)
        completions, _ = draw(sampler, point, point.response)
        sampler.release()
        model.exact = config.exact
        found = gap(model, point, completions[: config.scored])
        model.exact = False
    sampler = Sampler(model, NoText(), point.rows, config.exact)
    tokens = min(point.response, PROFILED)
    found["stages"] = stage_shares(
        lambda tell: draw(sampler, full_batch(point), tokens, tell),
        model.config.vocab_size,
        config.on_gpu,
    )
    return found


def gap(
    model: Transformer, point: Point, completions: list[Completion]
) -> dict[str, float]:
    """Return how far the sampler is from the trainer, as in a training run's log."""
    examples = [Example(point.prompts[c.prompt_index], c.tokens) for c in completions]
    scored, _ = response_scores(model, examples, SCORED_TOKENS)
    rows = [row[: c.length] for row, c in zip(scored, completions, strict=True)]
    sampled = torch.tensor(
        [x for c in completions for x in c.logprobs], dtype=torch.float64
    )
    return sampler_gap(torch.cat(rows).double(), sampled, sampled)


# --- in the measured process: transformers ---------------------------------------------------


def measure_transformers(config: RolloutBench, point: Point) -> Found:
    """Return tokens a second of `generate` at the best batch size, and bytes at the peak."""
    model, tokenizer = build(config)
    transformers = importlib.import_module("transformers")  # nanomath runs without it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with TemporaryDirectory() as directory:
        save_model(model, None, directory)
        del model
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, config.dtype)
        ).to(config.device)
    before = peak_memory(theirs.device, restart=True)
    samples = [prompt for prompt in point.prompts for _ in range(point.group)]
    sizes = config.batches or sorted({max(1, point.rows // part) for part in (1, 2, 4)})
    generate(theirs, tokenizer, samples[: max(sizes)], 2)
    speed = 0.0
    for size in sizes:
        began = time.perf_counter()
        tokens = sum(
            generate(theirs, tokenizer, samples[first : first + size], point.response)
            for first in range(0, len(samples), size)
        )
        speed = max(speed, tokens / (time.perf_counter() - began))
    return {"tokens_per_s": speed, "bytes": peak_memory(theirs.device) - before}


def generate(
    model: Any,
    tokenizer: Tokenizer | NoText,
    prompts: Sequence[Sequence[int]],
    response: int,
) -> int:
    """Draw a batch of completions with transformers; return their tokens up to the eos."""
    rows = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    ones = [torch.ones_like(row) for row in rows]
    padded = pad_sequence(rows, batch_first=True, padding_side="left")
    real = pad_sequence(ones, batch_first=True, padding_side="left")
    eos = list(tokenizer.eos_ids)
    with torch.no_grad():
        out = model.generate(
            padded,
            attention_mask=real,
            pad_token_id=0,
            eos_token_id=eos or None,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=response,
        )
    new = out[:, padded.shape[1] :]
    ended = torch.isin(new, torch.tensor(eos, dtype=torch.int64, device=model.device))
    before = ended.cumsum(1) - ended.long()  # eos before this token
    return int((before == 0).sum())
