"""A progress bar for sampling: completions, tokens a second, samples in flight, share of the
machine's floor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from nanomath.rollout.floor import Machine, measure_machine, step_floor
from nanomath.rollout.sampler import Progress, Sampler

# Seconds for each of the two measurements of the machine that the floor needs.
MEASURED = 0.1


@contextmanager
def meter(sampler: Sampler, total: int) -> Iterator[Progress | None]:
    """Yield what to pass to `generate` as `progress`: on a terminal a progress bar for `total`
    completions, None elsewhere.
    """
    with tqdm(total=total, unit="completion", disable=None, leave=False) as bar:
        yield None if bar.disable else _Meter(sampler, bar).show


class _Meter:
    machine: Machine | None = None  # measured once

    def __init__(self, sampler: Sampler, bar: tqdm) -> None:
        self.sampler = sampler
        self.bar = bar
        self.began = time.perf_counter()
        self.drawn = 0
        self.floor = 0.0
        _Meter.machine = _Meter.machine or measure_machine(
            sampler.model.device, sampler.decoder.dtype, MEASURED
        )

    def show(self, finished: int, drawn: int, live: int, context: float) -> None:
        if live:
            config = self.sampler.model.config
            dtype = self.sampler.decoder.dtype
            step = sum(step_floor(config, live, context, dtype, self.machine).values())
            self.floor += (drawn - self.drawn) / live * step
        self.drawn = drawn
        seconds = time.perf_counter() - self.began
        speed = (
            f"{drawn / seconds:.0f} tokens/s, {self.floor / seconds:.0%} of the floor"
        )
        self.bar.set_postfix_str(f"{speed}, {live} in flight", refresh=False)
        self.bar.update(finished - self.bar.n)
