"""Process reward models: label solutions, train a model on them, measure it.

    python -m nanomath prm label [CONFIG.toml] [key=value ...]
    python -m nanomath prm train [CONFIG.toml] [key=value ...]
    python -m nanomath prm eval PRM DATA [key=value ...]

    python -m nanomath prm label configs/tiny/prm-label.toml
    python -m nanomath prm label configs/tiny/prm-label.toml label.by=monte_carlo
    python -m nanomath prm train configs/tiny/prm.toml
    python -m nanomath prm eval runs/tiny-prm processbench/gsm8k.json

`label` draws solutions and writes them with a label for each step: the embedded world's oracle
says whether it is right, or continuations of it are drawn and counted (arXiv 2312.08935). It
goes on where it was stopped. `train` makes a PRM of any causal language model. `eval` takes a
PRM's directory, or the controls "random" and "length", and a file of labelled solutions in the
format of trl, Math-Shepherd, PRM800K or ProcessBench.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from nanomath import settings
from nanomath.commands.main import operands
from nanomath.config import parse_arguments
from nanomath.data.files import check_file, json_line
from nanomath.data.order import step_indices
from nanomath.data.problem import Problem
from nanomath.models import Tokenizer, Transformer
from nanomath.models.batches import Example
from nanomath.models.stored import naming
from nanomath.process.formats import FORMATS
from nanomath.process.labelled import Labelled, load_labelled, write
from nanomath.process.measures import measure_scores
from nanomath.process.montecarlo import monte_carlo
from nanomath.process.prm import (
    PRM,
    StepScorer,
    is_prm,
    load_prm,
    new_prm,
    oracle_scores,
    random_scores,
)
from nanomath.process.steps import steps_of, texts_of
from nanomath.rollout import Sampler
from nanomath.training import ranks
from nanomath.training.build import (
    build_model,
    build_problems,
    build_sampler,
    build_scorer,
    build_template,
    choose_device,
    fitting_prompts,
    sampling_options,
    settle_dtypes,
)
from nanomath.training.loop import Metrics, say
from nanomath.training.planning import settle_budget
from nanomath.training.prm_step import PRMStep, balancing_weights
from nanomath.training.sharding import whole
from nanomath.training.trainer import RUN_FLAGS, Trainer

PROBLEMS_AT_ONCE = 256  # labelled between two writes of the file
SHOW = {
    "heldout/auc": "held-out AUC {:.3f}",
    "heldout/f1": "F1 {:.3f}",
    "loss": "loss {:.3f}",
    "grad_norm": "norm {:.2f}",
    "lr": "lr {:.1e}",
}


def main(argv: list[str]) -> int:
    commands = {"label": label, "train": train, "eval": evaluate}
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if not argv or argv[0] not in commands:
        raise ValueError(
            f"prm needs one of {', '.join(commands)}: python -m nanomath prm --help"
        )
    return commands[argv[0]](argv[1:])


# --- label -----------------------------------------------------------------------------------


def label(argv: list[str]) -> int:
    config, _ = parse_arguments(settings.LabelConfig, argv, __doc__)
    options = config.label
    if not options.save:
        raise ValueError(
            "label.save is empty: name the JSONL file that labelled solutions are written to"
        )
    save = Path(options.save)
    problems = build_problems(config.problems)
    if options.by == "oracle" and any(
        "family" not in problem.metadata for problem in problems
    ):
        raise ValueError(
            'label.by = "oracle" knows the embedded world alone: take label.by=monte_carlo for '
            "other problems"
        )
    left = problems
    if save.is_file() and save.stat().st_size:
        known = {s.question for s in load_labelled(save)}
        left = [problem for problem in problems if problem.question not in known]
        say(
            f"{save} has solutions of {len(problems) - len(left)} of the {len(problems)} "
            "problems already"
        )
    settle_dtypes(config)
    model, tokenizer = build_model(config.model, options.seed)
    left, prompts = fitting_prompts(
        left,
        build_template(config.prompt),
        tokenizer,
        model.config.max_positions,
        config.problems.max_tokens,
    )
    sampler = build_sampler(config.sampling, model, tokenizer)
    save.parent.mkdir(parents=True, exist_ok=True)
    compared: list[tuple[list[bool], float]] = []
    starts = range(0, len(left), PROBLEMS_AT_ONCE)
    for start in tqdm(starts, disable=None, dynamic_ncols=True):
        some = slice(start, start + PROBLEMS_AT_ONCE)
        write(save, label_some(config, sampler, left[some], prompts[some], compared))
    everything = load_labelled(save)
    labels = [y for s in everything for y in s.labels if y is not None]
    asked = {s.question for s in everything}
    print(f"{save}: {len(everything)} solutions of {len(asked)} problems")
    print(f"  {len(labels)} steps, {sum(labels) / len(labels):.1%} right")
    print_agreement(compared, options.rollouts)
    return 0


def label_some(
    config: settings.LabelConfig,
    sampler: Sampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    compared: list[tuple[list[bool], float]],
) -> list[Labelled]:
    """Draw and label solutions of some problems, without empty and repeated ones.

    Where the oracle knows the truth of Monte-Carlo labels, `compared` gets both of every step.
    """
    options = config.label
    sampling = sampling_options(config.sampling)
    drawn = sampler.generate(prompts, n=options.samples, seed=options.seed, **sampling)
    different = {(c.prompt_index, text): c for c in drawn if (text := c.text.strip())}
    completions = list(different.values())
    steps = [steps_of(sampler.tokenizer, c.tokens, options.steps) for c in completions]
    solutions = []
    for c, its_steps in zip(completions, steps, strict=True):
        texts = texts_of(sampler.tokenizer, c.tokens, its_steps)
        question = problems[c.prompt_index].question
        solutions.append((question, tuple(text.strip() for text in texts)))
    exact = (
        oracle_scores(problems, solutions) if "family" in problems[0].metadata else None
    )
    if options.by == "oracle":
        labels = exact
    else:
        verdicts = monte_carlo(
            sampler,
            problems,
            prompts,
            completions,
            steps,
            options.rollouts,
            options.seed + 1,
            config.prompt.reasoning_ends,
            **sampling,
        )
        of_step = any if options.hard else fmean
        labels = [[float(of_step(row)) for row in rows] for rows in verdicts]
        if exact is not None:
            for rows, truths in zip(verdicts, exact, strict=True):
                compared += zip(rows[:-1], truths[:-1], strict=True)
    return [
        Labelled(*solution, tuple(y))
        for solution, y in zip(solutions, labels, strict=True)
    ]


def print_agreement(
    compared: Sequence[tuple[list[bool], float]], rollouts: int
) -> None:
    """Print how often Monte-Carlo labels say what the oracle says, as their number grows.

    compared: the verdicts on the continuations of a step, and the truth; of all steps but the
    last of a solution, which has no continuation. Soft labels count as right from 1/2 on.
    """
    for n in (2**i for i in range(rollouts.bit_length() if compared else 0)):
        hard = fmean(any(row[:n]) == bool(truth) for row, truth in compared)
        soft = fmean((2 * sum(row[:n]) >= n) == bool(truth) for row, truth in compared)
        print(
            f"  N = {n:2}: agrees with the oracle on {hard:.1%} (hard), {soft:.1%} (soft) "
            f"of {len(compared)} steps"
        )


# --- train -----------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    config, flags = parse_arguments(settings.PRMConfig, argv, __doc__, RUN_FLAGS)
    section = config.prm
    seed = config.run.seed
    if not section.train or not section.heldout:
        raise ValueError(
            "prm.train and prm.heldout must name files of labelled solutions: see nanomath "
            "prm label"
        )
    if not config.model.path:
        raise ValueError(
            "model.path is empty: a PRM is made of a language model, such as runs/tiny-sft"
        )
    solutions = load_labelled(section.train, section.neutral)
    heldout = load_labelled(section.heldout, section.neutral, section.limit)
    weights = balancing_weights(solutions) if section.balance else (1.0, 1.0)

    use = (
        f"measure it: python -m nanomath prm eval RUN {section.heldout}",
        "use it: process.prm=RUN",
    )
    build = partial(build_prm, section.format)
    trainer = Trainer(config, "--resume" in flags, use, build, "heldout/auc")
    prm = PRM(trainer.model, trainer.tokenizer, FORMATS[section.format]())
    check_lengths(prm, [*solutions, *heldout])

    def batch(step: int) -> list[Labelled]:
        chosen = step_indices(len(solutions), section.batch_size, step, seed)
        return [solutions[i] for i in chosen]

    def laid_out(step: int) -> list[Example]:
        rows = [
            prm.lay_out(i, s.question, s.steps)[0] for i, s in enumerate(batch(step))
        ]
        return [Example(tokens[:-1], tokens[-1:]) for tokens in rows]

    if section.token_budget == "auto":
        settle_budget(trainer, "prm", laid_out)
    budget = prm.token_budget = section.token_budget
    training = PRMStep(prm, trainer.optimizer, weights, section.head_steps, budget)

    def measure(done: int) -> Metrics:
        with whole(prm.model):  # no rank has as many passes to make as another
            found = measure_scores(heldout, score_shared(prm, heldout))
        return {f"heldout/{name}": value for name, value in found.items()}

    with trainer.running(measure, SHOW) as steps:
        for step in steps:
            lr = trainer.learning_rate(step)
            metrics = training.step(batch(step), step, lr)
            steps.record({**metrics, "lr": lr})
    return trainer.exit_code


def build_prm(
    format: str, section: settings.Model, seed: int, path: str = ""
) -> tuple[Transformer, Tokenizer]:
    """Return the PRM at `path` (default: the section's), or a new one made of the language model
    that is there.
    """
    if is_prm(place := path or section.path):
        prm = load_prm(
            place, choose_device(section.device), getattr(torch, section.dtype)
        )
        if not isinstance(prm.format, FORMATS[format]):
            raise ValueError(
                f"{place} is a PRM of the format {type(prm.format).__name__}, not "
                f"prm.format = {format!r}"
            )
    else:
        prm = new_prm(*build_model(section, seed, path), FORMATS[format](), seed)
    prm.model.gradient_checkpointing = section.gradient_checkpointing
    return prm.model, prm.tokenizer


def check_lengths(prm: PRM, solutions: Sequence[Labelled]) -> None:
    """Raise a ValueError for the first solution that does not fit, before anything is computed."""
    for s in solutions:
        with naming(s.place):
            prm.lay_out(0, s.question, s.steps)


# --- eval ------------------------------------------------------------------------------------


def evaluate(argv: list[str]) -> int:
    (path, data), words = operands(
        argv,
        "prm eval needs a PRM and a file: python -m nanomath prm eval PRM DATA "
        "[key=value ...]",
    )
    given = f"model.path={path}"
    config, _ = parse_arguments(settings.PRMEvalConfig, [given, *words], __doc__)
    if config.save:
        check_file("save", config.save)
    solutions = load_labelled(data, config.neutral, config.limit)
    scorer = build_scorer(config.model.path, config.model)
    if isinstance(scorer, PRM):
        check_lengths(scorer, solutions)
    scores = score_shared(scorer, solutions)
    if config.save:
        with open(config.save, "w", encoding="utf-8") as file:
            for s, row in zip(solutions, scores, strict=True):
                line = dict(
                    question=s.question, steps=s.steps, labels=s.labels, scores=row
                )
                file.write(json_line(line))
    print(f"{path} on {data}: {len(solutions)} solutions")
    names = "auc", "accuracy", "calibration_error", "f1", "f1_wrong", "f1_right"
    print(" " * 18 + "".join(f"{name:>18}" for name in names))
    rows = {
        "it": scores,
        "always right": [[1.0] * len(s.steps) for s in solutions],
        "random": score_shared(random_scores, solutions),
    }
    for who, row in rows.items():
        found = measure_scores(solutions, row, config.threshold)
        cells = [f"{found[name]:.3f}" if name in found else "-" for name in names]
        print(f"  {who:16}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"  {found['steps']} labelled steps, {found['right']:.1%} of them right")
    return 0


def score_shared(
    scorer: StepScorer, solutions: Sequence[Labelled]
) -> list[list[float]]:
    """Return the scores of all steps; every rank scores its share."""
    mine = scorer([(s.question, s.steps) for s in ranks.share(solutions)])
    return ranks.gather(mine)
