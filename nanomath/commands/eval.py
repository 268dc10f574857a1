"""Measures a model on a problem set: pass@1, pass@k, maj@k, with 95% intervals; with a PRM
also the best of k.

    python -m nanomath eval MODEL DATA [CONFIG.toml] [key=value ...]
    python -m nanomath eval MODEL general [CONFIG.toml] [key=value ...]

    python -m nanomath eval runs/tiny-grpo world evaluation.by=difficulty
    python -m nanomath eval runs/tiny-grpo world evaluation.samples=16 evaluation.k=4,16
    python -m nanomath eval runs/tiny-grpo world evaluation.samples=16 process.prm=runs/tiny-prm
    python -m nanomath eval HuggingFaceTB/SmolLM2-135M-Instruct gsm8k/test.jsonl save=all.jsonl

MODEL is a Hugging Face directory, a run directory or a hub id; DATA is "world", a file or a
hub dataset. A model that was trained with a prompt of its own needs the same [prompt] keys
here. "general" runs benchmarks of much else, and has keys of its own
(python -m nanomath eval MODEL general --help).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nanomath import settings
from nanomath.analysis.evaluation import Report, evaluate
from nanomath.commands import general
from nanomath.config import parse_arguments
from nanomath.data.problem import Problem
from nanomath.models import Tokenizer
from nanomath.process.rewards import AGGREGATES
from nanomath.rollout import Completion
from nanomath.rollout.meter import meter
from nanomath.training.build import (
    build_model,
    build_problems,
    build_sampler,
    build_template,
    build_watcher,
    fitting_prompts,
    sampling_options,
    settle_dtypes,
)


def main(argv: list[str]) -> int:
    words = [word for word in argv if not word.startswith("-") and "=" not in word]
    if not {"-h", "--help"} & set(argv) and (len(words) < 2 or "" in words[:2]):
        raise ValueError(
            "eval needs a model and a problem set: python -m nanomath eval MODEL DATA "
            "[key=value ...]"
        )
    for word in words[:2]:
        argv.remove(word)
    if words[1:2] == ["general"]:
        return general.main(argv, words[0])
    given = (
        [f"model.path={words[0]}", f"problems.source={words[1]}"]
        if len(words) >= 2
        else []
    )
    config, _ = parse_arguments(settings.EvalConfig, [*given, *argv], __doc__)
    measure = config.evaluation
    if config.sampling.temperature == 0 and measure.samples > 1:
        measure.samples = 1  # greedy samples are all alike

    if config.save and not Path(config.save).absolute().parent.is_dir():
        raise FileNotFoundError(f"save: there is no directory to write {config.save} to")
    problems = build_problems(config.problems)
    settle_dtypes(config)
    model, tokenizer = build_model(config.model, measure.seed)
    template = build_template(config.prompt)
    context = model.config.max_positions
    problems, prompts = fitting_prompts(
        problems, template, tokenizer, context, config.problems.max_tokens
    )
    sampler = build_sampler(config.sampling, model, tokenizer)
    with meter(sampler, len(problems) * measure.samples) as progress:
        report = evaluate(
            sampler,
            problems,
            prompts,
            measure.samples,
            measure.k,
            measure.by,
            measure.seed,
            config.lenient,
            progress,
            score_completions(config, tokenizer, problems),
            config.prompt.reasoning_ends,
            **sampling_options(config.sampling),
        )
    if config.save:
        with open(Path(config.save), "w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(record, ensure_ascii=False) + "\n"
                for record in report.records()
            )
    print_report(report, config)
    return 0


def score_completions(
    config: settings.EvalConfig, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> Callable[[Sequence[tuple[Problem, Completion]]], list[float]] | None:
    """Return a function that gives completions the scores of process.prm, None where it is
    empty.
    """
    if not config.process.prm:
        return None
    watcher = build_watcher(
        config.process, tokenizer, problems, config.model, config.evaluation.seed
    )
    one = AGGREGATES[config.aggregate]
    return lambda pairs: [
        one(s)
        for _, s in watcher.score([(problem.question, c.tokens) for problem, c in pairs])
    ]


def print_report(report: Report, config: settings.EvalConfig) -> None:
    """Print the scores as a table, then what may explain them."""
    metrics = report.metrics()
    sampling = config.sampling
    print(
        f"{config.model.path} on {config.problems.source}: {len(report.graded)} problems x "
        f"{config.evaluation.samples} "
        f"samples at temperature {sampling.temperature:g}"
    )
    for name, score in {**report.scores, **report.breakdown}.items():
        print(f"  {name:16} {score}")
    print(
        f"  {metrics['heldout/length']:.0f} tokens a completion; "
        f"{metrics['heldout/truncated']:.1%} cut at "
        f"{sampling.max_new_tokens} tokens; no answer found in {metrics['heldout/no_answer']:.1%}"
    )
    if metrics["heldout/no_answer"] == 1:
        print(
            "  no completion has a marked answer: look at them with save=FILE, or try lenient=true",
            file=sys.stderr,
        )
