"""The loop that every kind of training shares: step, log, evaluate, save, show, and stop cleanly when asked to.

Steps are counted by the updates done: metrics line N and checkpoint step-N belong to the model after N updates; what is
measured before the first is line 0.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from nanomath.training.runlog import RunLog

Metrics = dict[str, float]
BAR = {"disable": None, "dynamic_ncols": True, "bar_format": "{l_bar}{bar:10}{r_bar}"}  # None: on terminals only


@dataclass
class Loop:
    """`run(start)` makes updates start+1 ... steps.

    step(i) makes update i+1 and returns its metrics; evaluate() measures the model as it is (None: never); save(n)
    writes checkpoint step-n. Both happen every so many steps (0: never) and at the end. `show` names the metrics worth
    a place on the progress bar, each with the text it is shown as.
    """

    log: RunLog
    steps: int
    step: Callable[[int], Metrics]
    save: Callable[[int], None]
    evaluate: Callable[[], Metrics] | None = None
    eval_every: int = 0
    save_every: int = 0
    show: dict[str, str] | None = None

    def run(self, start: int = 0) -> bool:
        """True when all steps are done, False when a signal stopped it; either way the last step is saved."""
        latest: Metrics = self._evaluate(0) if start == 0 else {}
        with asked_to_stop() as stop, tqdm(total=self.steps, initial=start, **BAR) as bar:
            for done in range(start + 1, self.steps + 1):
                latest |= self._update(done)
                if _due(self.eval_every, done) or done == self.steps:
                    latest |= self._evaluate(done)
                last = done == self.steps or stop.asked  # asked once: a signal from here on is for the next step
                if _due(self.save_every, done) or last:
                    self.save(done)
                self._display(bar, done, latest)
                if last:
                    return done == self.steps
        return True

    def _update(self, done: int) -> Metrics:
        began = time.perf_counter()
        try:
            metrics = self.step(done - 1)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {done}: {error}; the checkpoints written before it are intact") from None
        except ValueError as error:  # no mistake of the user's by now, but of the code: show where
            raise RuntimeError(f"step {done} failed: {error}") from error
        self.log.metrics(done, **metrics, seconds=round(time.perf_counter() - began, 3))
        return metrics

    def _evaluate(self, done: int) -> Metrics:
        if self.evaluate is None:
            return {}
        metrics = self.evaluate()
        self.log.metrics(done, **metrics)
        return metrics

    def _display(self, bar: tqdm, done: int, metrics: Metrics) -> None:
        """The bar on a terminal; elsewhere a line every tenth of the way."""
        shown = "  ".join(text.format(metrics[name]) for name, text in (self.show or {}).items() if name in metrics)
        if not bar.disable:
            bar.set_postfix_str(shown, refresh=False)
            bar.update()
        elif done % max(1, self.steps // 10) == 0 or done == self.steps:
            print(f"step {done}/{self.steps}  {shown}", file=sys.stderr, flush=True)


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


@dataclass
class Stop:
    """Whether a signal has asked the run to stop."""

    asked: bool = False


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the current step; the second one interrupts."""
    stop = Stop()

    def note(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print(f"\n{signal.Signals(number).name}: stopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
