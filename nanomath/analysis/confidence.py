"""How sure a model is of its answers, and when to ask a person instead.

A problem's proposed answer is the most frequent of its samples, of equal ones the first seen.
Greater means surer; nothing here sees the gold answer but to say what was right.

    majority         the share of the samples that give the answer
    mean_logprob     1/n sum_t log p(y_t)
    deepconf_*       C_t = -1/k sum_{v in top k} log p_v: high where the distribution is peaked;
                     mean over the tokens, over the last `window` of them (tail), of the lowest
                     window (lowest), or over the lowest 10% of windows (bottom)   arXiv 2508.15260
    self_certainty   -1/(n V) sum_t sum_v log(V p_v) = mean KL(uniform || p)       arXiv 2502.18581
    prm              scores of the steps, aggregated                               arXiv 2305.20050
    p_true           P(A) / (P(A) + P(B)), asked whether the answer is right       arXiv 2207.05221

p is the model's distribution at temperature 1 over all V tokens, at the n tokens of a completion,
its eos included. What is of a completion counts for an answer as the mean over the completions
that give it. Without an answer the confidence is -inf: a person sees the problem.

    risk(j)  = share of wrong answers among the j surest       coverage j / n
    AURC     = 1/n sum_j risk(j), equally sure ones in random order (the mean over orders)
    excess   = AURC - AURC of the order that puts all right answers first   arXiv 1805.08206
    coverage = the greatest share of problems, by a threshold, of which `target` are right
    AUROC    = P(a right answer is surer than a wrong one)
    ECE      = gap between confidence and accuracy in ten bins, only where confidence is itself a
               probability; the other measures are on scales of their own and are not calibrated

That coverage is of the best threshold for these very problems, which flatters. So a threshold is
also chosen on some of them (validation) and its coverage and accuracy are measured on the others
(test). Intervals draw clusters of problems anew, the threshold staying as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nanomath.analysis.evaluation import Graded, Score, maj_at_k
from nanomath.analysis.runs import Record
from nanomath.analysis.statistics import cluster_bootstrap, numbered
from nanomath.data.problem import Problem
from nanomath.models.batches import Example, make_batch, micro_batches, response_states
from nanomath.models.transformer import Transformer
from nanomath.process.judge import Judge
from nanomath.process.measures import BINS
from nanomath.rewards import answers_equal

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
OF_TOKENS = (
    *("mean_logprob", "self_certainty"),
    *("deepconf_mean", "deepconf_tail", "deepconf_lowest", "deepconf_bottom"),
)
PROBABILITIES = ("majority", "prm", "p_true")
BOTTOM = 0.1  # of the windows
KEPT = (1.0, 0.9, 0.1)  # of the traces that vote
LONGEST = 100  # characters of an answer that the model is asked about
CHUNK = 256  # tokens whose distributions are there at once
TOKEN_BUDGET = 16384


# --- measures of completions -----------------------------------------------------------------


@torch.no_grad()
def token_measures(
    model: Transformer, examples: Sequence[Example], top: int, window: int
) -> dict[str, list[float]]:
    """The measures OF_TOKENS of every response, by one pass over all of them."""
    found = {name: [0.0] * len(examples) for name in OF_TOKENS}
    for rows in micro_batches(examples, TOKEN_BUDGET):
        batch = make_batch([examples[i] for i in rows]).to(model.device)
        states = response_states(model, batch).split(CHUNK)
        parts = zip(states, batch.target.split(CHUNK), strict=True)
        columns = torch.cat(
            [of_distributions(model.logits(s), t, top) for s, t in parts]
        )
        lengths = batch.lengths.tolist()
        for i, own in zip(rows, columns.double().cpu().split(lengths), strict=True):
            logprobs, certainty, confidence = own.T.numpy()
            of_response = {
                "mean_logprob": float(logprobs.mean()),
                "self_certainty": float(certainty.mean()),
                **deepconf(confidence, window),
            }
            for name, value in of_response.items():
                found[name][i] = value
    return found


def of_distributions(
    logits: torch.Tensor, target: torch.Tensor, top: int
) -> torch.Tensor:
    """[n, 3] of logits [n, V]: log p of the target, KL(uniform || p) and DeepConf's C."""
    logprobs = logits.float().log_softmax(dim=1)
    size = logprobs.shape[1]
    own = logprobs.gather(1, target[:, None])[:, 0]
    certainty = -logprobs.mean(dim=1) - np.log(size)
    confidence = -logprobs.topk(min(top, size), dim=1).values.mean(dim=1)
    return torch.stack((own, certainty, confidence), dim=1)


def deepconf(confidence: Array, window: int) -> dict[str, float]:
    """The four measures of a trace from the C [n] of its tokens; one that is shorter than a window
    is one window.
    """
    size = min(window, len(confidence))
    windows = np.convolve(confidence, np.ones(size) / size, mode="valid")
    lowest = np.sort(windows)[: max(1, int(BOTTOM * len(windows)))]
    return {
        "deepconf_mean": float(confidence.mean()),
        "deepconf_tail": float(confidence[-size:].mean()),
        "deepconf_lowest": float(windows.min()),
        "deepconf_bottom": float(lowest.mean()),
    }


# --- confidence in answers -------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """The answer proposed to a problem (None: there is none), whether it is right, the samples
    that give it, and their share.
    """

    answer: str | None
    right: bool
    samples: list[int]
    share: float


def propose(item: Graded) -> Proposal:
    """The most frequent answer. Which are equal is told without the gold answer, which would make
    one of all right answers but not of all wrong ones.
    """
    classes: list[list[int]] = []
    for i, answer in enumerate(item.answers):
        if answer is not None:
            alike = [c for c in classes if equal(item.answers[c[0]] or "", answer)]
            if alike:
                alike[0].append(i)
            else:
                classes.append([i])
    if not classes:
        return Proposal(None, False, [], 0.0)
    most = max(classes, key=len)
    first = most[0]
    share = len(most) / len(item.answers)
    return Proposal(item.answers[first], item.right[first], most, share)


def equal(one: str, other: str) -> bool:
    """Whether two answers are the same; a blank one is the same as itself alone."""
    return one == other or bool(one.strip()) and answers_equal(one, other)


def p_true(
    judge: Judge, graded: Sequence[Graded], proposals: Sequence[Proposal], ask: str
) -> tuple[list[float], float]:
    """P(True) of every proposal, and the mean probability of A and B together: where it is below
    LEAST_MASS, the model does not answer the question.
    """
    asked = [
        (item.problem.question, proposal.answer)
        for item, proposal in zip(graded, proposals, strict=True)
        if proposal.answer is not None
    ]
    prompts = [filled(ask, question, answer) for question, answer in asked]
    judge.masses.clear()
    found = judge.probabilities(
        prompts, ("A", "B"), [question for question, _ in asked]
    )
    chances = iter(found[:, 0].tolist())
    values = [-np.inf if p.answer is None else next(chances) for p in proposals]
    return values, float(np.mean(judge.masses)) if asked else 1.0


def check_p_true(judge: Judge, problems: Sequence[Problem], ask: str) -> None:
    """ValueError where the longest question does not fit the context with a long answer."""
    question = max((problem.question for problem in problems), key=len)
    judge.probabilities([filled(ask, question, "0" * LONGEST)], ("A", "B"), [question])


def filled(ask: str, question: str, answer: str) -> str:
    """The question to the model, in one pass: braces that an answer writes stay as they are."""
    fields = {"question": question, "answer": answer[:LONGEST]}
    return re.sub(r"\{(question|answer)\}", lambda field: fields[field[1]], ask)


def of_answers(
    proposals: Sequence[Proposal], traces: Sequence[Sequence[float]]
) -> Array:
    """What a measure of completions, traces [n][samples], says of the proposals: [n]."""
    return np.array(
        [
            np.mean([row[i] for i in p.samples]) if p.samples else -np.inf
            for p, row in zip(proposals, traces, strict=True)
        ]
    )


# --- how much a confidence is worth ----------------------------------------------------------


def levels(confidence: Array, right: Flags) -> tuple[Array, Array, Array]:
    """The values that the confidence has, the greatest first, how many problems have each, and of
    how many of these the answer is wrong.
    """
    values, which, counts = np.unique(
        -confidence, return_inverse=True, return_counts=True
    )
    return -values, counts, np.bincount(which, weights=~right)


def risks(counts: Array, wrong: Array) -> Array:
    """The risk at coverages 1/n, 2/n, ... 1 from `levels`: [n]."""
    ends = np.concatenate(([0], counts.cumsum()))
    places = np.arange(1, ends[-1] + 1)
    return np.interp(places, ends, np.concatenate(([0], wrong.cumsum()))) / places


def threshold(values: Array, counts: Array, wrong: Array, target: float) -> float:
    """The lowest confidence from which on `target` of the answers are right; inf if there is none.
    A problem without an answer is never above it.
    """
    accuracy = (counts - wrong).cumsum() / counts.cumsum()
    fits = values[(accuracy >= target) & (values > -np.inf)]
    return float(fits[-1]) if len(fits) else np.inf


def worth(
    confidence: Array, right: Flags, target: float, probability: bool
) -> list[float]:
    """The numbers WORTH of one confidence; NaN for one that there is nothing to take from."""
    values, counts, wrong = levels(confidence, right)
    hits = counts - wrong
    aurc = risks(counts, wrong).mean()
    best = risks(np.array([hits.sum(), wrong.sum()]), np.array([0, wrong.sum()])).mean()
    pairs = hits.sum() * wrong.sum()
    above = (hits * (wrong.sum() - wrong.cumsum() + wrong / 2)).sum()
    limit = threshold(values, counts, wrong, target)
    known = confidence > -np.inf
    return [
        aurc,
        aurc - best,
        above / pairs if pairs else np.nan,
        calibration(np.maximum(confidence, 0), right) if probability else np.nan,
        float(np.mean(confidence >= limit)),
        mean(confidence[right & known]),
        mean(confidence[~right & known]),
    ]


def calibration(confidence: Array, right: Flags) -> float:
    """ECE, as process/measures.py has it, of thousands of draws."""
    bins = np.minimum(BINS - 1, (confidence * BINS).astype(int))
    return float(
        np.abs(np.bincount(bins, weights=confidence - right)).sum() / len(right)
    )


WORTH = ("aurc", "excess", "auroc", "ece", "coverage", "when_right", "when_wrong")


def mean(values: Array) -> float:
    """NaN where there are none."""
    return float(values.mean()) if len(values) else np.nan


def measure_all(
    confidences: Mapping[str, Array],
    right: Flags,
    clusters: Sequence[object],
    target: float = 0.95,
    share: float = 0.5,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Score]], dict[str, float], Flags]:
    """For every confidence [n] the numbers WORTH, and "test_coverage" and "test_accuracy" by its
    threshold; the thresholds; and which problems [n] chose them (`share` of all).

    ValueError where all problems are one cluster.
    """
    labels = numbered(clusters)
    chosen = validation(labels, share, seed)
    limits = {
        name: threshold(*levels(c[chosen], right[chosen]), target)
        for name, c in confidences.items()
    }

    def of_all(drawn: NDArray[np.int64]) -> list[float]:
        return [
            number
            for name, c in confidences.items()
            for number in worth(c[drawn], right[drawn], target, name in PROBABILITIES)
        ]

    test = np.flatnonzero(~chosen)

    def of_test(drawn: NDArray[np.int64]) -> list[float]:
        found = []
        for name, c in confidences.items():
            kept = c[test[drawn]] >= limits[name]
            found += [kept.mean(), mean(right[test[drawn]][kept])]
        return found

    numbers = iter(cluster_bootstrap(of_all, labels, seed))
    tested = iter(cluster_bootstrap(of_test, numbered(labels[test]), seed))
    return (
        {
            name: {
                **{what: next(numbers) for what in WORTH},
                "test_coverage": next(tested),
                "test_accuracy": next(tested),
            }
            for name in confidences
        },
        limits,
        chosen,
    )


def validation(labels: NDArray[np.int64], share: float, seed: int) -> Flags:
    """Which problems choose thresholds: clusters in random order until `share` of the problems are
    there, at least one, and not all.
    """
    sizes = np.bincount(labels)
    if len(sizes) < 2:
        raise ValueError(
            "all problems are one cluster: none would be left to test a threshold on"
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    enough = np.searchsorted(sizes[order].cumsum(), share * len(labels)) + 1
    return np.isin(labels, order[: min(enough, len(sizes) - 1)])


# --- votes -----------------------------------------------------------------------------------


def votes(
    graded: Sequence[Graded],
    traces: Mapping[str, Sequence[Sequence[float]]],
    labels: NDArray[np.int64],
    seed: int = 0,
) -> dict[str, tuple[Score, Score]]:
    """The accuracy of weighted votes of all samples, keyed "MEASURE", or "MEASURE, top 10%" where
    only the surest of those with an answer vote (DeepConf), and each one's difference to the plain
    vote, "majority", on the same problems.
    """
    rows = {"majority": [maj_at_k(g.answers, g.right, len(g.answers)) for g in graded]}
    for name, values in traces.items():
        for share in KEPT:
            key = name if share == 1 else f"{name}, top {share:.0%}"
            rows[key] = [
                filtered_vote(item, weights(name, row), share)
                for item, row in zip(graded, values, strict=True)
            ]
    matrix = np.array(list(rows.values()))
    both = np.concatenate((matrix, matrix - matrix[0]))
    found = cluster_bootstrap(lambda drawn: both[:, drawn].mean(axis=1), labels, seed)
    return dict(zip(rows, zip(found, found[len(rows) :], strict=False), strict=True))


def weights(name: str, values: Sequence[float]) -> Array:
    """Votes of traces: their measures, and of logprobs the geometric mean of the probabilities."""
    return np.exp(values) if name == "mean_logprob" else np.asarray(values)


def filtered_vote(item: Graded, weight: Array, share: float) -> float:
    """The vote of the `share` of the samples with an answer that have the greatest weight."""
    voters = [i for i, answer in enumerate(item.answers) if answer is not None]
    if not voters:
        return 0.0
    least = np.percentile(weight[voters], 100 * (1 - share))
    kept = [i for i in voters if weight[i] >= least]
    answers, right = (
        [column[i] for i in kept] for column in (item.answers, item.right)
    )
    return maj_at_k(answers, right, len(kept), weights=weight[kept].tolist())


# --- what a person should see ----------------------------------------------------------------


def handoff(
    graded: Sequence[Graded],
    proposals: Sequence[Proposal],
    confidences: Mapping[str, Array],
    limits: Mapping[str, float],
    chosen: Flags,
    target: float,
) -> Iterator[Record]:
    """The answers of the test that the first confidence does not let through, with reasons."""
    name, limit = next(iter(limits.items()))
    for i, (item, proposal) in enumerate(zip(graded, proposals, strict=True)):
        if chosen[i] or confidences[name][i] >= limit:
            continue
        values = {key: number(column[i]) for key, column in confidences.items()}
        yield {
            "id": item.problem.id,
            "question": item.problem.question,
            "answer": proposal.answer,
            "confidence": values,
            "measure": name,
            "threshold": number(limit),
            "reason": reason(name, values[name], number(limit), target),
        }


def reason(name: str, value: float | None, limit: float | None, target: float) -> str:
    """Why a person should see an answer, in a sentence."""
    if value is None:
        return "No sample gives an answer."
    if limit is None:
        return (
            f"No {name} is so high that {100 * target:g}% of the answers to validation problems "
            "are right from there on."
        )
    return (
        f"{name} is {value:.4g}: only from {limit:.4g} on are {100 * target:g}% of the answers to "
        "validation problems right."
    )


def number(value: float) -> float | None:
    """The value as JSON has it: None for what is no finite number."""
    return float(value) if np.isfinite(value) else None
