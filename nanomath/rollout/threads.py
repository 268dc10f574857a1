"""How many CPU threads a decoding step takes: tried out on the first steps, not guessed.

A thread more costs a barrier in every operation, which with few rows can be more than the work it takes over, and far
more where another program wants the core. The bits of the result do not depend on the choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

TRIALS = 3  # steps with each number of threads; the fastest counts


class Threads:
    """Runs steps with the best of one thread, half of torch's and all of them, found for each doubling of the rows."""

    def __init__(self) -> None:
        self.most = 0
        self.seconds: dict[int, dict[int, list[float]]] = {}  # size of the step -> threads -> what trials took

    def trying(self, rows: int) -> bool:
        """Whether the next step of so many rows is a trial."""
        trials = self.seconds.get(rows.bit_length(), {0: []})
        return torch.get_num_threads() > 1 and any(len(took) < TRIALS for took in trials.values())

    def run(self, rows: int, step: Callable[[], None]) -> None:
        """step(), which works on so many rows."""
        if self.most != (most := torch.get_num_threads()):
            self.most, self.seconds = most, {}
        if most == 1:
            return step()
        trials = self.seconds.setdefault(rows.bit_length(), {n: [] for n in sorted({1, most // 2, most})})
        threads = next((n for n, took in trials.items() if len(took) < TRIALS), 0)
        began, trying = time.perf_counter(), threads > 0
        torch.set_num_threads(threads or min(trials, key=lambda n: min(trials[n])))
        try:
            step()
        finally:
            torch.set_num_threads(most)
        if trying:
            trials[threads].append(time.perf_counter() - began)
