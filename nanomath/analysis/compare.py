"""Two runs on the same held-out problems, paired; and where two runs that should be equal part.

Pairs take away what makes one problem harder than another, which is most of the spread: the
interval of the mean difference is a percentile bootstrap over problems. For one sample a problem
the exact test of McNemar (Psychometrika 12, 1947) asks whether, of the b + c problems that only
one of the two solves, the share that A solves could be a fair coin's: p = 2 P(X <= min(b, c)),
X ~ Binomial(b + c, 1/2).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from math import comb
from statistics import fmean
from typing import Any

from nanomath.analysis.evaluation import Score, mean_score
from nanomath.analysis.runs import Record, Run, config_differences

TIMES = ("seconds", "sampling_seconds", "tokens_per_second")  # never the same twice
# Nats: logprobs of one token that are nearer than this differ by rounding
ROUNDING = 1e-4


@dataclass(frozen=True)
class Paired:
    """A and B on the problems both were asked, by the first sample of each: how many both
    solve, only A, only B, neither; McNemar's p; the mean of B - A over all samples.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float
    difference: Score
    flips: list[tuple[Record, Record]]


def last_measured(run: Run) -> dict[str, list[Record]]:
    """The answers of the newest measurement, by problem."""
    return measured_at(run, max((record["step"] for record in run.heldout), default=0))


def measured_at(run: Run, step: int) -> dict[str, list[Record]]:
    """The answers to held-out problems after `step` updates, by problem."""
    found: dict[str, list[Record]] = {}
    for record in run.heldout:
        if record["step"] == step:
            found.setdefault(record["problem"], []).append(record)
    return found


def paired(a: dict[str, list[Record]], b: dict[str, list[Record]]) -> Paired | None:
    """Compare two measurements on the problems that they share; None where there are none."""
    shared = [problem for problem in a if problem in b]
    if not shared:
        return None
    firsts = [(a[problem][0], b[problem][0]) for problem in shared]
    counts = Counter((bool(x["right"]), bool(y["right"])) for x, y in firsts)
    differences = [
        right_share(b[problem]) - right_share(a[problem]) for problem in shared
    ]
    only_a = counts[True, False]
    only_b = counts[False, True]
    return Paired(
        both=counts[True, True],
        only_a=only_a,
        only_b=only_b,
        neither=counts[False, False],
        p=mcnemar(only_a, only_b),
        difference=mean_score(differences),
        flips=[pair for pair in firsts if pair[0]["right"] != pair[1]["right"]],
    )


def mcnemar(b: int, c: int) -> float:
    """The two-sided exact p of b against c discordant pairs; 1 where there are none."""
    n = b + c
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(b, c) + 1)) / 2**n)


def right_share(records: Sequence[Record]) -> float:
    """The share of answers that are right."""
    return fmean(bool(record["right"]) for record in records)


# --- the first difference --------------------------------------------------------------------


def differences(a: Run, b: Run) -> Iterator[str]:
    """What differs between two runs, a sentence each: keys of the config, the first line of
    metrics, the first held-out answer, the first episode and token. None for equal runs.
    """
    for key, (one, other) in config_differences([a, b]).items():
        if key not in ("run.name", "run.directory"):
            yield f"config: {key} is {one!r} in A, {other!r} in B"
    for one, other in _first_unequal(_untimed(a.lines), _untimed(b.lines)):
        yield f"metrics: {_ended(one, other) or _metrics_differ(one, other)}"
    for one, other in _first_unequal(a.heldout, b.heldout):
        yield f"held-out: {_ended(one, other) or _answers_differ(one, other)}"
    for one, other in _first_unequal(a.rollouts, b.rollouts):
        yield f"rollouts: {_ended(one, other) or _episodes_differ(a, b, one, other)}"


def _first_unequal(
    a: Iterable[Record], b: Iterable[Record]
) -> Iterator[tuple[Record | None, Record | None]]:
    """The first two records that differ, if any do; None for one where a run has ended."""
    return islice((pair for pair in zip_longest(a, b) if pair[0] != pair[1]), 1)


def _metrics_differ(one: Record, other: Record) -> str:
    """What differs between two lines of metrics.jsonl."""
    names = _unequal(one, other)
    shown = [f"{n} {one.get(n)!r} in A, {other.get(n)!r} in B" for n in names[:3]]
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"step {one['step']} is the first that differs: {'; '.join(shown)}{more}"


def _ended(one: Record | None, other: Record | None) -> str:
    """Which of two runs has no more records where the other goes on, "" where both have one."""
    if one and other:
        return ""
    shorter, longer = ("A", other) if one is None else ("B", one)
    return f"{shorter} ends before step {longer['step']}"


def _unequal(one: Record, other: Record) -> list[str]:
    """The names of what differs between two records."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _untimed(lines: Sequence[Record]) -> Iterator[Record]:
    for line in lines:
        yield {name: value for name, value in line.items() if name not in TIMES}


def _answers_differ(one: Record, other: Record) -> str:
    """What differs between two answers to a held-out problem."""
    return (
        f"step {one['step']}, problem {one['problem']}, sample {one['sample']} is the first that "
        f"differs, in {', '.join(_unequal(one, other))}"
    )


def _episodes_differ(a: Run, b: Run, one: Record, other: Record) -> str:
    """Where two episodes differ, and why."""
    why = "other problems or another prompt"
    if one.get("prompt_tokens") == other.get("prompt_tokens"):
        why = first_token(a, b, one, other)
    return (
        f"step {one['step']}, prompt {one['prompt']}, sample {one['sample']} is the first that "
        f"differs: {why}"
    )


def first_token(a: Run, b: Run, one: Record, other: Record) -> str:
    """Where two samples of one prompt part, and whether by rounding, by a draw or by weights."""
    tokens = list(zip(one["tokens"], other["tokens"], strict=False))
    at = next((i for i, (x, y) in enumerate(tokens) if x != y), len(tokens))
    logprobs = zip(one["logprobs"][:at], other["logprobs"][:at], strict=True)
    gap = max((abs(x - y) for x, y in logprobs), default=0.0)
    before = f"logprobs of the {at} tokens before differ by at most {gap:.1e}"
    if at == len(tokens) and len(one["tokens"]) == len(other["tokens"]):
        return _same_tokens(one, other, gap)
    if at == len(tokens):
        return f"token {at}: one of the two ends there; {before}"
    names = [
        f"{name} drew {_text(run, record['tokens'][at])} with probability "
        f"{math.exp(record['logprobs'][at]):.4f}"
        for name, run, record in (("A", a, one), ("B", b, other))
    ]
    why = "a draw near a boundary" if gap < ROUNDING else "other weights"
    return f"token {at}: {', '.join(names)}; {before}: {why}"


def _same_tokens(one: Record, other: Record, gap: float) -> str:
    """What differs where two samples have the same tokens."""
    names = _unequal(one, other)
    if "logprobs" not in names:
        return f"the tokens and their logprobs are the same; what differs: {', '.join(names)}"
    at = next(
        i
        for i, pair in enumerate(zip(one["logprobs"], other["logprobs"], strict=True))
        if pair[0] != pair[1]
    )
    why = "rounding" if gap < ROUNDING else "other weights"
    return (
        f"the tokens are the same, logprobs differ from token {at} on "
        f"({one['logprobs'][at]} in A, {other['logprobs'][at]} in B; at most {gap:.1e}): {why}"
    )


def _text(run: Run, token: int) -> str:
    pieces: dict[int, Any] = run.pieces([token]) or {}
    return repr(pieces[token]) if token in pieces else f"token {token}"
