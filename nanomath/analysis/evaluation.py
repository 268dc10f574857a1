"""Measuring a model on problems: pass@1, pass@k, maj@k, each with a bootstrap interval.

With c of n samples right, the unbiased estimate of pass@k is  1 - C(n-c, k) / C(n, k)  (arXiv
2107.03374). maj@k is the chance that the answer most frequent among k of the samples is right
(arXiv 2203.11171), ties shared out evenly; samples without an answer do not vote. With a score
for every sample, best@k is the chance that the one of highest score is right (arXiv
2305.20050), and wmaj@k that of the answer whose scores add up to most (arXiv 2206.02336).
Intervals resample the problems, the unit a benchmark draws from.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from math import comb
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nanomath.data.language import is_mixed, language_metrics, language_of_script
from nanomath.data.problem import Problem
from nanomath.models.batches import Example
from nanomath.models.scores import response_scores
from nanomath.models.transformer import Transformer
from nanomath.rewards import extract_answer
from nanomath.rewards.extraction import REASONING_ENDS
from nanomath.rewards.functions import is_right
from nanomath.rollout.episodes import in_groups
from nanomath.rollout.sampler import Completion, Progress, Sampler

SUBSETS = 500  # of k samples, taken to estimate maj@k where there are more
RESAMPLES = 2000
AT_ONCE = 100  # resamples, which bounds the memory that many problems take


def interval(low: float, high: float, form: str) -> str:
    """Return the bounds of a bootstrap as text. Where every draw is the same there is none: it
    cannot say how different other problems would have been.
    """
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):
        return "no interval: all are the same"
    return f"95% interval {low:{form}} to {high:{form}}"


@dataclass(frozen=True)
class Score:
    """A mean over problems, and the bounds of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}% ({interval(100 * self.low, 100 * self.high, '.1f')})"


@dataclass(frozen=True)
class Graded:
    """A problem with its n completions, the answer found in each (None: none), whether it is
    right, and the scores that they were given, if any.
    """

    problem: Problem
    completions: list[Completion]
    answers: list[str | None]
    right: list[bool]
    scores: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The measurement of one model on one problem set; `scores` is keyed "pass@1", "pass@4",
    "maj@4", ..., and `kl`, that to another model, "" and "/KEY=VALUE".
    """

    graded: list[Graded]
    scores: dict[str, Score]
    breakdown: dict[str, Score]
    kl: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """What a training run logs of it."""
        completions = [c for item in self.graded for c in item.completions]
        answers = [answer for item in self.graded for answer in item.answers]
        language = language_metrics(
            (item.problem.question, c.text)
            for item in self.graded
            for c in item.completions
        )
        return {
            **{f"heldout/{name}": score.mean for name, score in self.scores.items()},
            **{
                f"heldout/pass@1/{name}": score.mean
                for name, score in self.breakdown.items()
            },
            "heldout/pass@1_low": self.scores["pass@1"].low,
            "heldout/pass@1_high": self.scores["pass@1"].high,
            "heldout/length": fmean(c.length for c in completions),
            "heldout/truncated": fmean(not c.finished for c in completions),
            "heldout/no_answer": fmean(answer is None for answer in answers),
            **{f"heldout/{name}": share for name, share in language.items()},
            **{f"heldout/kl{name}": mean for name, mean in self.kl.items()},
        }

    def records(self, ids: bool = False) -> Iterable[dict[str, Any]]:
        """One JSON object per completion, with its tokens' ids if they are asked for."""
        for item in self.graded:
            for number, (completion, answer, right) in enumerate(
                zip(item.completions, item.answers, item.right, strict=True)
            ):
                yield {
                    "problem": item.problem.id,
                    "question": item.problem.question,
                    "gold": item.problem.answer,
                    "labels": item.problem.labels,
                    "sample": completion.sample_index,
                    "text": completion.text,
                    "answer": answer,
                    "right": right,
                    "finish_reason": completion.finish_reason,
                    "tokens": completion.length,
                    "language": language_of_script(completion.text),
                    "mixed": is_mixed(completion.text),
                    **({"score": item.scores[number]} if item.scores else {}),
                    **({"ids": completion.tokens} if ids else {}),
                }


def evaluate(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    samples: int,
    k: Sequence[int] = (1,),
    by: Sequence[str] = (),
    seed: int = 0,
    lenient: bool = False,
    progress: Progress | None = None,
    score_all: Callable[[Sequence[tuple[Problem, Completion]]], list[float]]
    | None = None,
    reasoning_ends: Sequence[str] = REASONING_ENDS,
    start: Transformer | None = None,
    **sampling: Any,
) -> Report:
    """Draw `samples` completions of each problem's prompt, grade them, and score pass@k and
    maj@k for every k; with `score_all`, which gives each completion a score, best@k and wmaj@k
    as well; with `start`, the KL to that model a token, sum_t (log pi - log pi_start) / tokens
    of all completions together: a mean of their means can be below 0.
    """
    check_measurement(problems, samples, k, by)
    completions = sampler.generate(
        prompts, n=samples, seed=seed, progress=progress, **sampling
    )
    groups = in_groups(completions, samples)
    graded = [
        grade(problem, group, lenient, reasoning_ends)
        for problem, group in zip(problems, groups, strict=True)
    ]
    if score_all is not None:
        given = score_all(
            [(item.problem, c) for item in graded for c in item.completions]
        )
        graded = [
            replace(item, scores=row)
            for item, row in zip(graded, in_groups(given, samples), strict=True)
        ]
    values = {}
    for size in sorted({1, *k}):
        values[f"pass@{size}"] = [
            pass_at_k(samples, sum(g.right), size) for g in graded
        ]
        if size > 1:
            values[f"maj@{size}"] = [
                maj_at_k(g.answers, g.right, size, seed) for g in graded
            ]
        if size > 1 and score_all is not None:
            values[f"best@{size}"] = [
                best_at_k(g.scores, g.right, size) for g in graded
            ]
            values[f"wmaj@{size}"] = [
                maj_at_k(g.answers, g.right, size, seed, g.scores) for g in graded
            ]
    scores = {name: mean_score(column, seed) for name, column in values.items()}
    kinds = in_kinds(problems, by) if by else {}
    right = [fmean(item.right) for item in graded]
    breakdown = {
        name: mean_score([right[i] for i in rows], seed) for name, rows in kinds.items()
    }
    kl = {}
    if start is not None:
        gaps = moved(start, prompts, groups, sampling.get("temperature", 1.0))
        tokens = [sum(c.length for c in group) for group in groups]
        among = {"": range(len(groups)), **{f"/{n}": rows for n, rows in kinds.items()}}
        kl = {
            name: sum(gaps[i] for i in rows) / sum(tokens[i] for i in rows)
            for name, rows in among.items()
        }
    return Report(graded, scores, breakdown, kl)


def moved(
    start: Transformer,
    prompts: Sequence[list[int]],
    groups: Sequence[Sequence[Completion]],
    temperature: float = 1.0,
) -> list[float]:
    """Return for each prompt sum_t (log pi - log pi_start) of its completions in all."""
    examples = examples_of(prompts, groups)
    logprobs, _ = response_scores(start, examples, temperature=temperature)
    totals = iter(logprobs.sum(1).tolist())
    return [sum(sum(c.logprobs) - next(totals) for c in group) for group in groups]


def examples_of(
    prompts: Sequence[list[int]], groups: Sequence[Sequence[Completion]]
) -> list[Example]:
    """Return what a model is asked to score: the completions of each prompt, in their order."""
    return [
        Example(prompt, completion.tokens)
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]


def check_measurement(
    problems: Sequence[Problem],
    samples: int,
    k: Sequence[int] = (1,),
    by: Sequence[str] = (),
) -> None:
    """ValueError for what `evaluate` could not report: better before the sampling than after
    it.
    """
    if (largest := max(k, default=1)) > samples:
        raise ValueError(
            f"pass@{largest} needs at least {largest} samples of each problem, not {samples}"
        )
    known = sorted({name for problem in problems for name in problem.metadata})
    for key in by:
        if key not in known:
            raise ValueError(
                f"no problem has the metadata key {key!r}; there are: {', '.join(known) or 'none'}"
            )


def grade(
    problem: Problem,
    completions: list[Completion],
    lenient: bool = False,
    reasoning_ends: Sequence[str] = REASONING_ENDS,
) -> Graded:
    """Find and check the answer of every completion of a problem."""
    answers = [
        extract_answer(c.text, lenient=lenient, reasoning_ends=reasoning_ends)
        for c in completions
    ]
    return Graded(
        problem, completions, answers, [is_right(problem, answer) for answer in answers]
    )


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k samples, drawn without replacement from these, is right."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def best_at_k(scores: Sequence[float], right: Sequence[bool], k: int) -> float:
    """Chance that the sample of highest score among k of these is right, ties shared out
    evenly: exactly, by counting the subsets whose highest score each value is.
    """
    chance = 0.0
    below = 0
    for value in sorted(set(scores)):
        hits = [ok for one, ok in zip(scores, right, strict=True) if one == value]
        upto = below + len(hits)
        chance += (
            (comb(upto, k) - comb(below, k))
            / comb(len(scores), k)
            * sum(hits)
            / len(hits)
        )
        below = upto
    return chance


def maj_at_k(
    answers: Sequence[str | None],
    right: Sequence[bool],
    k: int,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> float:
    """Chance that the most frequent answer among k of the samples is right; all right answers
    are one answer. A sample has one vote, or `weights` of it.
    """
    names = [
        "right" if ok else None if answer is None else f"wrong: {answer}"
        for answer, ok in zip(answers, right, strict=True)
    ]
    votes = list(zip(names, weights or [1.0] * len(names), strict=True))
    total = comb(len(votes), k)
    if total <= SUBSETS:
        subsets = combinations(votes, k)
    else:
        generator = np.random.default_rng(seed)
        subsets = (
            [votes[i] for i in generator.permutation(len(votes))[:k]]
            for _ in range(SUBSETS)
        )
    return float(
        np.mean([_share_of_right(subset) for subset in islice(subsets, SUBSETS)])
    )


def _share_of_right(votes: Iterable[tuple[str | None, float]]) -> float:
    """1 if "right" has the most votes, shared with those that have as many."""
    counts: Counter[str] = Counter()
    for name, weight in votes:
        if name is not None:
            counts[name] += weight
    most = max(counts.values(), default=0)
    return (
        0.0
        if most == 0 or counts["right"] < most
        else 1 / sum(count == most for count in counts.values())
    )


def mean_score(
    values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None
) -> Score:
    """Mean of one value per problem, with a percentile bootstrap interval over the problems; a
    problem counts by its weight, where there are weights.
    """
    values = np.asarray(values, dtype=np.float64)
    share = None if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = generator.integers(len(values), size=(AT_ONCE, len(values)))
        weights_drawn = None if share is None else share[drawn]
        means.extend(np.average(values[drawn], axis=1, weights=weights_drawn))
    return with_percentiles(np.average(values, weights=share), means)


def with_percentiles(value: float, draws: ArrayLike) -> Score:
    """A number with the 95% interval of what a bootstrap drew."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return Score(float(value), float(low), float(high))


def in_kinds(problems: Sequence[Problem], keys: Sequence[str]) -> dict[str, list[int]]:
    """Which problems share their values of the metadata `keys`, by "KEY=VALUE,..."; those that
    lack one are left out.
    """
    groups = defaultdict(list)
    for i, problem in enumerate(problems):
        labels = problem.metadata
        if labels.keys() >= set(keys):
            groups[",".join(f"{key}={labels[key]}" for key in keys)].append(i)
    return dict(sorted(groups.items()))
