"""The sampler against what the machine allows, against the trainer's logprobs, and against
transformers.

    python -m nanomath bench rollout [MODEL] [CONFIG.toml] [key=value ...]

    python -m nanomath bench rollout                                        SmolLM2-135M's shape
    python -m nanomath bench rollout qwen2.5-1.5b rows=64,256 prompt=960 response=128 save=rollout.json
    python -m nanomath bench rollout models/SmolLM2-135M-Instruct problems=gsm8k/test.jsonl groups=8
    python -m nanomath bench rollout smollm2 groups=8 prompt=512 against=unshared,transformers

MODEL is a directory, a hub id, or a shape with random weights, which never draw an eos. A
point is a combination of rows, prompt, response and groups. For each one: tokens a second,
prefill included; the milliseconds of a decoding step of a full batch, and its floor: the time
in which this machine, as measured just before, can read what a step reads and multiply what it
multiplies; memory at the peak beyond the weights; how the step divides into stages; and how
far the logprobs are from the trainer's. Each number is the best of `repeats` processes, the
sides taking turns.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanomath.commands.bench.machine import (
    SHAPES,
    Call,
    by_turns,
    new_report,
    place,
    save_report,
    this_machine,
)
from nanomath.commands.bench.sides import Point, Setup, measure_sampler, measure_transformers
from nanomath.config import option, parse_arguments
from nanomath.data.files import read_json
from nanomath.data.problem_sets import load_problems
from nanomath.data.prompts import PromptTemplate
from nanomath.models import ModelConfig, load_tokenizer, resolve_model_dir
from nanomath.rollout.floor import Machine, step_floor
from nanomath.training.build import choose_device, encode_prompts

OURS = "nanomath"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class RolloutBench:
    """What to sample, and how."""

    model: str = option(
        "smollm2",
        f"a directory, a hub id, or a shape with random weights: {', '.join(SHAPES)}",
    )
    rows: list[int] = option(
        [], "sequences decoded side by side; empty: 64, on a GPU 64 and 256", minimum=1
    )
    prompt: list[int] = option([128], "tokens of a prompt", minimum=1)
    response: list[int] = option(
        [64], "tokens of a response, unless an eos ends it", minimum=1
    )
    groups: list[int] = option([1], "samples of each prompt", minimum=1)
    refills: int = option(0, "further samples for each row, begun as others end", minimum=0)
    problems: str = option(
        "", "take the questions of this problem set as prompts, instead of random tokens"
    )
    dtype: str = option(
        "auto",
        "what the sampler computes in; auto: bfloat16 on a GPU, else float32",
        choices=DTYPES,
    )
    model_dtype: str = option(
        "auto",
        "of the model's weights and the trainer's logprobs; auto: dtype",
        choices=DTYPES,
    )
    exact: bool = option(False, "the sampler's exact mode")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    threads: int = option(0, "CPU threads, 0: let torch decide", minimum=0)
    repeats: int = option(2, "processes for each number; the best counts", minimum=1)
    against: list[str] = option(
        [],
        "also measure: the sampler without shared prompts, transformers",
        choices=("unshared", "transformers"),
    )
    batches: list[int] = option(
        [], "batch sizes of transformers, the best counts; empty: rows, 1/2, 1/4", minimum=1
    )
    scored: int = option(16, "completions to compare with the trainer's logprobs", minimum=0)
    save: str = option(
        "", "write the numbers, with what they were measured on, to this JSON file"
    )


def main(argv: list[str]) -> int:
    """Measure every point, print what was found, and save it after each one."""
    named = (
        bool(argv)
        and "=" not in argv[0]
        and not argv[0].startswith("-")
        and not argv[0].endswith(".toml")
    )
    words = [f"model={argv[0]}", *argv[1:]] if named else argv
    config, _ = parse_arguments(RolloutBench, words, __doc__)
    resolve(config)
    shape = model_shape(config.model)
    points = [new_point(config, shape, *values) for values in combinations(config)]
    report = new_report("rollout", argv, config)
    measured = this_machine(config)
    report["machine"] = asdict(measured)
    print(table_head(report))
    turns = config.repeats * (1 + len(config.against))
    with tqdm(total=len(points) * turns, unit="process", disable=None, leave=False) as bar:
        for point in points:
            report["rows"].append(measure_point(config, shape, point, measured, bar))
            bar.write(table_row(report["rows"][-1]))
            save_report(report, config.save)
    return 0


# --- what to measure -------------------------------------------------------------------------


def resolve(config: RolloutBench) -> None:
    """Put in what is left to be chosen. ImportError when transformers is asked for and
    missing.
    """
    config.device = str(choose_device(config.device))
    gpu = config.device.startswith("cuda")
    config.rows = config.rows or ([64, 256] if gpu else [64])
    if config.dtype == "auto":
        config.dtype = "bfloat16" if gpu else "float32"
    if config.model_dtype == "auto":
        config.model_dtype = config.dtype
    if "transformers" in config.against and find_spec("transformers") is None:
        raise ImportError("against=transformers needs it: pip install transformers")


def model_shape(model: str) -> ModelConfig:
    """The shape by that name, or of the model in a directory or on the hub."""
    if model in SHAPES:
        return SHAPES[model]
    if not Path(model).expanduser().exists() and "/" not in model:
        raise ValueError(
            f"unknown model {model!r}: expected a directory, a hub id, or one of {', '.join(SHAPES)}"
        )
    return ModelConfig.from_hf(read_json(resolve_model_dir(model) / "config.json"))


def combinations(config: RolloutBench) -> itertools.product:
    """(rows, response, group, tokens of a prompt) of every point; problems bring prompts of
    their own.
    """
    return itertools.product(
        config.rows, config.response, config.groups, [0] if config.problems else config.prompt
    )


def new_point(
    config: RolloutBench, shape: ModelConfig, rows: int, response: int, group: int, prompt: int
) -> Point:
    """A point with its prompts. ValueError when the numbers do not go together."""
    if rows % group:
        raise ValueError(
            f"groups of {group} do not fill {rows} rows: rows must be a multiple of groups"
        )
    count = rows * (1 + config.refills) // group
    if config.problems:
        prompts = asked(config, shape, count)
    else:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(
            shape.vocab_size, (count, prompt), generator=generator
        ).tolist()
    longest = max(map(len, prompts))
    if longest + response > shape.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and a response of {response} do not fit: the context of {config.model} is "
            f"{shape.max_positions} tokens"
        )
    return Point(rows, group, response, tuple(map(tuple, prompts)))


def asked(config: RolloutBench, shape: ModelConfig, count: int) -> list[list[int]]:
    """`count` prompts of the problem set, from its beginning again where it is shorter."""
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
    config: RolloutBench, shape: ModelConfig, point: Point, machine: Machine, bar: tqdm
) -> dict[str, Any]:
    """The row of a point; a side whose numbers are None ran out of memory."""
    found = by_turns(sides(config, point), bar)
    row = {
        "rows": point.rows,
        "prompt": point.prompt,
        "response": point.response,
        "group": point.group,
    }
    best = {
        side: max(runs, key=lambda run: run["tokens_per_s"], default={})
        for side, runs in found.items()
    }
    row["tokens_per_s"] = {side: run.get("tokens_per_s") for side, run in best.items()}
    row["bytes"] = {
        side: min((run["bytes"] for run in runs), default=None) for side, runs in found.items()
    }
    timed = {side: [run for run in runs if "step_s" in run] for side, runs in found.items()}
    steps = {
        side: min(runs, key=lambda run: run["step_s"]) for side, runs in timed.items() if runs
    }
    row["step_ms"] = {side: 1e3 * run["step_s"] for side, run in steps.items()}
    if OURS in steps:
        context = point.prompt + steps[OURS]["drawn"]
        dtype = getattr(torch, config.dtype)
        floor = step_floor(
            shape, steps[OURS]["live"], context, dtype, machine, point.prompt, point.group
        )
        # fewer than the rows where memory has no room
        row["context"] = context
        row["live"] = steps[OURS]["live"]
        row["floor_ms"] = {stage: 1e3 * seconds for stage, seconds in floor.items()}
        row["share"] = sum(floor.values()) / steps[OURS]["step_s"]
    for run in found[OURS]:
        row |= {name: run[name] for name in ("stages", "gap") if name in run}
    return row


def sides(config: RolloutBench, point: Point) -> dict[str, list[Call]]:
    """The calls of each side, one for each of the repeats; the first of ours also finds the
    gap and the stages.
    """
    setup = Setup(
        model=config.model,
        device=config.device,
        dtype=getattr(torch, config.dtype),
        model_dtype=getattr(torch, config.model_dtype),
        exact=config.exact,
        threads=config.threads,
        scored=config.scored,
        batches=tuple(
            config.batches or sorted({max(1, point.rows // part) for part in (1, 2, 4)})
        ),
    )
    calls = {
        OURS: [
            (measure_sampler, setup, point, True, number == 0)
            for number in range(config.repeats)
        ],
        "unshared": [(measure_sampler, setup, point, False, False)] * config.repeats,
        "transformers": [(measure_transformers, setup, point)] * config.repeats,
    }
    return {side: calls[side] for side in (OURS, *config.against)}


# --- the table -------------------------------------------------------------------------------


def table_head(report: dict[str, Any]) -> str:
    """What was measured where, and the names of the columns."""
    config = report["config"]
    measured = report["machine"]
    names = "".join(
        f"{name:>10}"
        for name in ("rows", "prompt", "response", "group", "tokens/s", "ms/step", "floor")
    )
    names += "".join(f"{name:>10}" for name in ("of it", "MB")) + "".join(
        f"{'x ' + s:>16}" for s in config["against"]
    )
    mode = f"{config['dtype']}{', exact' * config['exact']}"
    return (
        f"{config['model']}, {mode}; {place(report)}; best of {config['repeats']}\n"
        f"this machine copies {measured['copy_bytes_per_s'] / 1e9:.0f} GB/s and multiplies at "
        f"{measured['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s\n{names}"
    )


def table_row(row: dict[str, Any]) -> str:
    """The numbers of a point, then its stages and its gap on lines of their own."""
    ours = row["tokens_per_s"][OURS]
    cells = [f"{row['rows']}", f"{row['prompt']:.0f}", f"{row['response']}", f"{row['group']}"]
    cells.append("no memory" if ours is None else f"{ours:.1f}")
    if "share" in row:
        step = row["step_ms"][OURS]
        floor = sum(row["floor_ms"].values())
        cells += [f"{step:.3f}", f"{floor:.3f}", f"{row['share']:.0%}"]
    else:
        cells += ["-"] * 3
    cells.append("-" if row["bytes"][OURS] is None else f"{row['bytes'][OURS] / 1e6:.0f}")
    others = [speed for side, speed in row["tokens_per_s"].items() if side != OURS]
    ratios = ["-" if None in (ours, other) else f"{ours / other:.2f}" for other in others]
    lines = [
        "".join(f"{cell:>10}" for cell in cells) + "".join(f"{ratio:>16}" for ratio in ratios)
    ]
    if row.get("stages"):
        shares = [f"{stage} {share:.0%}" for stage, share in row["stages"].items() if share]
        lines.append(f"    stages: {', '.join(shares)}")
    if gap := row.get("gap"):
        lines.append(
            f"    against the trainer: |dlogprob| {gap['mean']:.2g} in the mean, {gap['max']:.2g} at most; effective "
            f"sample size {gap['effective_samples']:.2%}"
        )
    return "\n".join(lines)
