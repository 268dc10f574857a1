"""The loop that every kind of training shares: step, log, evaluate, save, show, and stop
cleanly when asked to.

Steps are counted by the updates done: metrics line N and checkpoint step-N belong to the model
after N updates; what is measured before the first is line 0.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

from nanomath.training import ranks
from nanomath.training.alarms import History, lasts, new_alarms
from nanomath.training.failure import check_finite, failing
from nanomath.training.runlog import RunLog

Metrics = dict[str, float]
ENDING = ("collapse", "hacked")  # the alarms that may end a run
BAR = {"dynamic_ncols": True, "bar_format": "{l_bar}{bar:10}{r_bar}"}


@dataclass
class Loop:
    """Goes through the steps of a run, from wherever it stands:

        with loop.running(start):
            for step in loop:
                loop.record({"loss": ...})  # of update step + 1

    evaluate(n) measures the model after n updates (None: never); save(n) writes checkpoint
    step-n. Both happen every so many steps (0: never) and at the end. keep(n, measured)
    says whether the model after n updates deserves a checkpoint of its own, given what was
    measured of it. `show` has the metrics of the progress bar, each with the text it is
    shown as. The run ends, saved, before `minutes` have passed (0: no limit) by the `clock`
    (in seconds), and with `stop_on_collapse` when the alarm of a collapse or of a hacked
    PRM sounds. It is done before its `steps` once the metrics named in `limits` add up to
    that much (0: no limit), or with limits["collapse"] once such an alarm lasts. All ranks go
    through the same steps and end at the same one; `log` and `save` know which of them writes.
    """

    log: RunLog
    steps: int
    save: Callable[[int], None]
    evaluate: Callable[[int], Metrics] | None = None
    eval_every: int = 0
    save_every: int = 0
    show: dict[str, str] | None = None
    keep: Callable[[int, Metrics], bool] | None = None
    minutes: float = 0.0
    stop_on_collapse: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    @contextmanager
    def running(self, start: int = 0) -> Iterator[Loop]:
        """Set up what the steps need around them: signals, the progress bar, errors in one
        line.

        RunFailed when something went wrong and nothing was saved since; KeyboardInterrupt
        when asked twice to stop, or once before there is anything to save.
        """
        self.done = start
        self._budget = TimeBudget(self.minutes, self.clock)
        self._history = self.log.read("metrics.jsonl")
        self.used = ranks.from_main(share_used(self._history, self.limits))
        self._said = {
            line["alarm"]: line["step"] for line in self.log.read("alarms.jsonl")
        }
        self._latest: Metrics = {}
        hidden = None if ranks.is_main() else True  # None: but on a terminal
        with (
            asked_to_stop() as stop,
            tqdm(total=self.steps, initial=start, disable=hidden, **BAR) as bar,
        ):
            self._stop = stop
            self._bar = bar
            with failing(lambda: f"step {self.done + 1}"):
                yield self

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the updates to make, from 0.

        Between them, and after the last, the run is measured and saved. It ends early,
        saved, when it is asked to stop.
        """
        if self.done == 0:
            self._before_the_first()
        ended = False
        while self.done < self.steps and not ended:
            self._began = self.clock()
            yield self.done
            self.done += 1
            ended = self._after(self.done)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or all that may be used is used."""
        return self.done == self.steps or self.used >= 1

    def record(self, metrics: Metrics) -> None:
        """Log the metrics of the step that ends now. FloatingPointError for one that is not
        finite.
        """
        check_finite(metrics)
        seconds = self.clock() - self._began
        metrics = {**metrics, "seconds": round(seconds, 3)}
        self.log.metrics(self.done + 1, **metrics)
        self._budget.took("step", self.clock() - self._began)
        self._history.append({"step": self.done + 1, **metrics})
        if any(self.limits.values()):  # each rank has a clock of its own
            self.used = ranks.from_main(share_used(self._history, self.limits))
        self._latest |= metrics

    def _before_the_first(self) -> None:
        """Measure what the run starts from.

        There is nothing to save yet, so a request to stop is obeyed at once.
        """
        self._stop.at_once = True
        measured = self._measure(0)
        if self._keeps(0, measured):
            self._save(0)
        self._stop.at_once = False

    def _after(self, done: int) -> bool:
        """Measure, save and show the model after `done` updates; return whether the run
        ends there.
        """
        measured = self._measure(done) if self._measures(done) else {}
        keep = self._keeps(done, measured)
        # Asked once: a signal from here on is for the next step
        last = self._ends(done)
        if last or keep or _due(self.save_every, done):
            self._save(done)
        self._display(done)
        return last

    def _measure(self, done: int) -> Metrics:
        if self.evaluate is None:
            return {}
        with failing(f"measuring after step {done}"), self._budget.timed("measurement"):
            # A grader's timeout must not tell ranks apart.
            metrics = ranks.from_main(self.evaluate(done))
            check_finite(metrics)
            self.log.metrics(done, **metrics)
        self._latest |= metrics
        return metrics

    def _save(self, done: int) -> None:
        with (
            failing(f"checkpoint step-{done} could not be written"),
            self._budget.timed("save"),
        ):
            self.save(done)

    def _measures(self, done: int) -> bool:
        return self.evaluate is not None and (
            _due(self.eval_every, done) or self.finished
        )

    def _keeps(self, done: int, measured: Metrics) -> bool:
        return bool(measured) and self.keep is not None and self.keep(done, measured)

    def _ends(self, done: int) -> bool:
        """Return whether the run ends with this step.

        This is the one place where that is decided, for all ranks together.
        """
        collapsed = self._sound_alarms(done)
        with failing(f"after step {done}"):
            if self.finished and done < self.steps:
                say(f"step {done}: done before step {self.steps}, as the config asks")
            return self.finished or ranks.any_rank(
                self._stop.asked or collapsed or self._out_of_time(done)
            )

    def _sound_alarms(self, done: int) -> bool:
        """Say and log the alarms that begin with this step; return whether one of them ends
        the run.
        """
        with failing(f"step {done}"):
            if (
                texts := new_alarms(self._history, self._said)
                if ranks.is_main()
                else {}
            ):
                records = [
                    {"alarm": name, "text": text} for name, text in texts.items()
                ]
                self.log.add("alarms", done, records)
        self._said |= dict.fromkeys(texts, done)
        ending = set(ENDING) & set(texts) if self.stop_on_collapse else set()
        for name, text in texts.items():
            say(f"step {done}: {text}" + "; run.on_collapse = stop" * (name in ending))
        return bool(ending)

    def _out_of_time(self, done: int) -> bool:
        """Return whether the next step, what follows it and the saves around it might not
        end in time.
        """
        ahead = [
            "step",
            "save",
            *["save"] * _due(self.save_every, done),
            *["measurement"] * self._measures(done + 1),
        ]
        if self._budget.allows(ahead):
            return False
        say(
            f"step {done}: another one might not end within run.minutes = {self.minutes:g}"
        )
        return True

    def _display(self, done: int) -> None:
        """Update the progress bar on a terminal; elsewhere print a line every tenth of the
        way.
        """
        bar = self._bar
        metrics = self._latest
        shown = "  ".join(
            text.format(metrics[name])
            for name, text in (self.show or {}).items()
            if name in metrics
        )
        if not bar.disable:
            bar.set_postfix_str(shown, refresh=False)
            bar.update()
        elif ranks.is_main() and (
            done % max(1, self.steps // 10) == 0 or self.finished
        ):
            print(f"step {done}/{self.steps}  {shown}", file=sys.stderr, flush=True)


def share_used(lines: History, limits: Mapping[str, float]) -> float:
    """How much of its limits a run with these lines of metrics has used: the largest share; all
    of them once a collapse lasts, where limits["collapse"] says that this ends it.
    """
    if limits.get("collapse") and any(lasts(lines, name) for name in ENDING):
        return 1.0
    shares = [
        sum(line.get(name, 0) for line in lines) / limit
        for name, limit in limits.items()
        if limit
    ]
    return max(shares, default=0.0)


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def say(text: str) -> None:
    """Print a line above the progress bar, from one of the ranks."""
    if ranks.is_main():
        tqdm.write(text, file=sys.stderr)


@dataclass
class TimeBudget:
    """Remembers how long each part of a step took at most, and tells whether more of them
    fit into the `minutes` that are left.
    """

    minutes: float
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.longest: dict[str, float] = defaultdict(float)
        self.began = self.clock()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        began = self.clock()
        yield
        self.took(part, self.clock() - began)

    def took(self, part: str, seconds: float) -> None:
        self.longest[part] = max(self.longest[part], seconds)

    def allows(self, parts: list[str]) -> bool:
        """Return whether these parts would end in time if each took the longest it ever
        did.
        """
        needed = sum(self.longest[part] for part in parts)
        return (
            not self.minutes or self.clock() - self.began + needed <= 60 * self.minutes
        )


@dataclass
class Stop:
    """Whether a signal has asked the run to stop, and whether it need not wait for the step
    to end.
    """

    asked: bool = False
    at_once: bool = False


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the current step; the
    second one interrupts.
    """
    stop = Stop()

    def note(number: int, frame: object) -> None:
        if stop.asked or stop.at_once:
            raise KeyboardInterrupt
        stop.asked = True
        if ranks.is_main():
            name = signal.Signals(number).name
            print(
                f"\n{name}: stopping after this step; once more to stop at once",
                file=sys.stderr,
            )

    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
