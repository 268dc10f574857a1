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

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanomath import settings
from nanomath.analysis import figures
from nanomath.analysis.budget import by_budget
from nanomath.analysis.evaluation import Report, check_measurement, evaluate
from nanomath.analysis.saved import (
    as_lines,
    problems_json,
    read_completions,
    shortest_right,
)
from nanomath.analysis.selective import check_confidence, measure_confidence
from nanomath.commands import general
from nanomath.commands.main import operands
from nanomath.config import parse_arguments
from nanomath.data.files import as_json, check_directory, check_file
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
from nanomath.training.runlog import write_atomically


def main(argv: list[str]) -> int:
    (path, source), words = operands(
        argv,
        "eval needs a model and a problem set: python -m nanomath eval MODEL DATA "
        "[key=value ...]",
    )
    if source == "general":
        return general.main(words, path)
    given = [f"model.path={path}", f"problems.source={source}"]
    config, _ = parse_arguments(settings.EvalConfig, [*given, *words], __doc__)
    measure = config.evaluation
    if config.sampling.temperature == 0 and measure.samples > 1:
        measure.samples = 1  # greedy samples are all alike

    check_places(config)
    problems = build_problems(config.problems)
    settle_dtypes(config)
    model, tokenizer = build_model(config.model, measure.seed)
    template = build_template(config.prompt)
    context = model.config.max_positions
    problems, prompts = fitting_prompts(
        problems, template, tokenizer, context, config.problems.max_tokens
    )
    sampler = build_sampler(config.sampling, model, tokenizer)
    saved = None
    if config.saved:
        saved = read_completions(config.saved, problems, tokenizer)
        measure.samples = saved.samples
    check_measurement(problems, measure.samples, measure.k, measure.by)
    check_confidence(config, model, tokenizer, problems, prompts, saved)
    with meter(sampler, len(problems) * measure.samples) as progress:
        report = evaluate(
            saved or sampler,
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
        write_atomically(Path(config.save), as_lines(report.records(ids=True)))
    if config.solutions:
        write_atomically(
            Path(config.solutions), as_lines(shortest_right(report.graded))
        )
    print_report(report, config)
    numbers = summary(report, config) if config.out or config.budgets else {}
    if config.confidence.measures:
        numbers |= measure_confidence(config, model, tokenizer, report.graded, prompts)
    if config.out:
        write_summary(numbers, Path(config.out))
    return 0


def check_places(config: settings.EvalConfig) -> None:
    """OSError for what could not be written after the sampling."""
    places = {
        "save": config.save,
        "solutions": config.solutions,
        "confidence.handoff": config.confidence.handoff,
    }
    for key, place in places.items():
        if place:
            check_file(key, place)
    if config.out:
        out = Path(config.out)
        directory = out.parent if out.suffix == ".json" else out
        check_directory("out", directory)
        directory.mkdir(parents=True, exist_ok=True)


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
        for _, s in watcher.score(
            [(problem.question, c.tokens) for problem, c in pairs]
        )
    ]


def print_report(report: Report, config: settings.EvalConfig) -> None:
    """Print the scores as a table, then what may explain them."""
    metrics = report.metrics()
    sampling = config.sampling
    origin = f"at temperature {sampling.temperature:g}"
    if config.saved:
        origin = f"of {config.saved}"
    print(
        f"{config.model.path} on {config.problems.source}: {len(report.graded)} problems x "
        f"{config.evaluation.samples} "
        f"samples {origin}"
    )
    for name, score in {**report.scores, **report.breakdown}.items():
        print(f"  {name:16} {score}")
    print(
        f"  {metrics['heldout/length']:.0f} tokens a completion; "
        f"{metrics['heldout/truncated']:.1%} cut at "
        f"{sampling.max_new_tokens} tokens; no answer found in {metrics['heldout/no_answer']:.1%}"
    )
    print(
        f"  {metrics['heldout/language/en']:.1%} in English, {metrics['heldout/language/ja']:.1%} "
        f"in Japanese, {metrics['heldout/language/mixed']:.1%} in both"
    )
    if metrics["heldout/no_answer"] == 1:
        print(
            "  no completion has a marked answer: look at them with save=FILE, or try lenient=true",
            file=sys.stderr,
        )


def summary(report: Report, config: settings.EvalConfig) -> dict[str, Any]:
    """What eval.json holds of every measurement; prints the accuracy at the budgets asked for."""
    measure = config.evaluation
    problems = problems_json(report.graded, config.confidence.cluster)
    longest = max(n for problem in problems.values() for n in problem["tokens"])
    budget = by_budget(
        problems,
        max(config.sampling.max_new_tokens, longest),
        config.budgets,
        measure.seed,
    )
    for tokens, score in budget.at.items():
        print(f"  {'within ' + tokens:16} {score}")
    if budget.at:
        print(f"  {'area':16} {budget.area}, up to {budget.limit} tokens")
    return {
        "model": config.model.path,
        "source": config.problems.source,
        "samples": measure.samples,
        "scores": {**report.scores, **report.breakdown},
        **{
            name.removeprefix("heldout/"): x
            for name, x in report.metrics().items()
            if "@" not in name
        },
        "budget": budget,
        "problems": problems,
    }


def write_summary(numbers: dict[str, Any], out: Path) -> None:
    """Write eval.json, and into a directory pictures too, where they can be drawn."""
    alone = out.suffix == ".json"
    write_atomically(out if alone else out / "eval.json", as_json(numbers))
    if alone:
        return
    try:
        figures.prepare()
    except ModuleNotFoundError as error:
        print(f"  {error}", file=sys.stderr)
        return
    figures.save(figures.accuracy_by_budget(numbers["budget"]), out / "budget")
    if curves := numbers.get("risk"):
        figures.save(figures.risk_coverage(curves), out / "risk-coverage")
