"""How many CPU threads a decoding step takes: tried out on the first steps, not guessed.

A thread more costs a barrier in every operation, which with few rows can be more than the work
it takes over, and far more where another program wants the core. The bits of a run must not
depend on the choice: where they do (products by oneDNN, see kernels/packed.py) there is none,
and all threads are taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

TRIALS = 3  # steps with each number of threads; the fastest counts
HOPELESS = 1.3  # times the best number's time: no further trial

Trials = dict[int, list[float]]  # threads -> what steps with so many took


class Threads:
    """Runs steps with the best of all of torch's threads, half of them and one, found for each
    doubling of the rows; with all of them if it may not `choose`.
    """

    def __init__(self, choose: bool = True) -> None:
        self.choose = choose
        self.most = 0
        self.seconds: dict[int, Trials] = {}  # by the size of the step

    def trying(self, rows: int) -> bool:
        """Whether the next step of so many rows is a trial."""
        return (
            self.choose
            and torch.get_num_threads() > 1
            and _to_try(self.seconds.get(rows.bit_length(), {1: []})) > 0
        )

    def run(self, rows: int, step: Callable[[], None]) -> None:
        """step(), which works on so many rows."""
        if self.most != (most := torch.get_num_threads()):
            self.most = most
            self.seconds = {}
        if most == 1 or not self.choose:
            return step()
        trials = self.seconds.setdefault(
            rows.bit_length(), {n: [] for n in (most, most // 2, 1)}
        )
        threads = _to_try(trials)
        began = time.perf_counter()
        torch.set_num_threads(
            threads or min((n for n in trials if trials[n]), key=lambda n: min(trials[n]))
        )
        try:
            step()
        finally:
            torch.set_num_threads(most)
        if threads:
            trials[threads].append(time.perf_counter() - began)


def _to_try(trials: Trials) -> int:
    """A number of threads that may still turn out to be the best, 0 when none may."""
    best = min((min(took) for took in trials.values() if took), default=0.0)
    for threads, took in trials.items():
        if not took or (len(took) < TRIALS and min(took) <= HOPELESS * best):
            return threads
    return 0
