"""What `eval` does with [confidence]: it refuses what could not be measured, measures, prints, and
writes what a person should see (nanomath/analysis/confidence.py has the formulas).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nanomath import settings
from nanomath.analysis.confidence import (
    OF_TOKENS,
    check_p_true,
    handoff,
    levels,
    measure_all,
    of_answers,
    p_true,
    propose,
    risks,
    token_measures,
    validation,
    votes,
)
from nanomath.analysis.evaluation import Graded, Score, examples_of
from nanomath.analysis.saved import Saved, as_lines, cluster_of
from nanomath.analysis.statistics import numbered
from nanomath.data.problem import Problem
from nanomath.models import Tokenizer, Transformer
from nanomath.process.judge import LEAST_MASS, Judge
from nanomath.rollout.episodes import in_groups
from nanomath.training.runlog import write_atomically


def check_confidence(
    config: settings.EvalConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    saved: Saved | None,
) -> None:
    """ValueError for a confidence that could not be measured: better before the sampling."""
    sure = config.confidence
    if not sure.measures:
        return
    if "majority" in sure.measures and config.evaluation.samples < 2:
        raise ValueError(
            "the majority of one sample is no confidence: take evaluation.samples of at least 2, "
            "at a temperature above 0"
        )
    if "p_true" in sure.measures:
        check_p_true(Judge(model, tokenizer), problems, sure.ask)
    labels = numbered(cluster_of(problem, sure.cluster) for problem in problems)
    validation(labels, sure.validation, config.evaluation.seed)
    needed = [name for name in sure.measures if name in OF_TOKENS]
    if saved and needed:
        if not saved.known:
            raise ValueError(
                f"{config.saved}: {needed[0]} needs logprobs of tokens, and the file has no ids of "
                "them: write it with save=FILE, or ask for majority, prm or p_true"
            )
        sizes = [len(prompts[c.prompt_index]) + c.length for c in saved.completions]
        if max(sizes) > model.config.max_positions:
            raise ValueError(
                f"{config.saved}: a prompt and its completion have {max(sizes)} tokens: "
                f"the model's context holds {model.config.max_positions}"
            )


def measure_confidence(
    config: settings.EvalConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    graded: Sequence[Graded],
    prompts: Sequence[list[int]],
) -> dict[str, Any]:
    """Measure and print what the confidences are worth, and the votes; write what a person should
    see. Returns what eval.json holds of it.
    """
    sure = config.confidence
    seed = config.evaluation.seed
    proposals = [propose(item) for item in graded]
    right = np.array([proposal.right for proposal in proposals])
    traces = trace_measures(sure, model, graded, prompts)
    found = {name: of_answers(proposals, rows) for name, rows in traces.items()}
    if "majority" in sure.measures:
        found["majority"] = of_answers(
            proposals, [[p.share] * config.evaluation.samples for p in proposals]
        )
    if "p_true" in sure.measures:
        values, mass = p_true(Judge(model, tokenizer), graded, proposals, sure.ask)
        found["p_true"] = np.array(values)
        if mass < LEAST_MASS:
            print(
                f"  p_true: the model gives A and B {mass:.2%} of the probability: it does not "
                "answer the question",
                file=sys.stderr,
            )
    confidences = {name: found[name] for name in sure.measures}
    clusters = [cluster_of(item.problem, sure.cluster) for item in graded]
    scores, limits, chosen = measure_all(
        confidences, right, clusters, sure.target, sure.validation, seed
    )
    print_confidence(scores, limits, chosen, right, sure.target)
    voted = votes(graded, traces, numbered(clusters), seed) if traces else {}
    if config.evaluation.samples > 1:
        print_votes(voted)
    if sure.handoff:
        rows = handoff(graded, proposals, confidences, limits, chosen, sure.target)
        lines = as_lines(rows)
        write_atomically(Path(sure.handoff), lines)
        count = lines.count("\n")
        print(f"  a person should see {count} of the {(~chosen).sum()}: {sure.handoff}")
    return {
        "confidence": {
            name: {**scores[name], "threshold": limits[name]} for name in confidences
        },
        "votes": {
            name: {**asdict(score), "difference": difference}
            for name, (score, difference) in voted.items()
        },
        "risk": {
            name: risks(*levels(c, right)[1:]).tolist()
            for name, c in confidences.items()
        },
    }


def trace_measures(
    sure: settings.Confidence,
    model: Transformer,
    graded: Sequence[Graded],
    prompts: Sequence[list[int]],
) -> dict[str, list[list[float]]]:
    """The measures asked for that are of completions, [n][samples] each."""
    found = {}
    wanted = [name for name in sure.measures if name in OF_TOKENS]
    if wanted:
        examples = examples_of(prompts, [item.completions for item in graded])
        every = token_measures(model, examples, sure.top, sure.window)
        samples = len(graded[0].completions)
        found = {name: in_groups(every[name], samples) for name in wanted}
    if "prm" in sure.measures:
        found["prm"] = [item.scores for item in graded]
    return found


def print_confidence(
    scores: dict[str, dict[str, Score]],
    limits: dict[str, float],
    chosen: np.ndarray,
    right: np.ndarray,
    target: float,
) -> None:
    """Print a line for each confidence."""
    print(
        f"  the most frequent answer is right in {right.mean():.1%} of {len(right)}; confidence in "
        f"it, with 95% intervals over problems; thresholds for {100 * target:g}% right are of "
        f"{chosen.sum()} problems, their test is on the other {(~chosen).sum()}:"
    )
    print(
        f"  {'':16} {'AURC':22} {'excess':7} {'AUROC':22} {'ECE':6} {'best':6} "
        f"{'test: coverage':22} {'accuracy':22} sure when right, wrong"
    )
    for name, found in scores.items():
        cells = [
            f"{interval(found['aurc']):22}",
            f"{shown(found['excess'].mean):7}",
            f"{interval(found['auroc']):22}",
            f"{shown(found['ece'].mean):6}",
            f"{shown(found['coverage'].mean):6}",
            f"{interval(found['test_coverage']):22}",
            f"{interval(found['test_accuracy']):22}",
            f"{shown(found['when_right'].mean)}, {shown(found['when_wrong'].mean)}",
        ]
        print(f"  {name:16} {' '.join(cells)}")
        if not np.isfinite(limits[name]):
            print(f"  {'':16} no threshold: a person sees every answer")


def interval(score: Score) -> str:
    """A number and its interval."""
    if np.isnan(score.mean):
        return "-"
    return f"{score.mean:.3f} ({score.low:.3f}, {score.high:.3f})"


def shown(value: float) -> str:
    """A number, or a dash for none."""
    return "-" if np.isnan(value) else f"{value:.3f}"


def print_votes(voted: dict[str, tuple[Score, Score]]) -> None:
    """Print the votes, and their differences to the plain one in points."""
    for name, (score, difference) in voted.items():
        less = [100 * getattr(difference, end) for end in ("mean", "low", "high")]
        against = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*less)
        print(f"  vote by {name:24} {score}" + f", {against}" * (name != "majority"))
