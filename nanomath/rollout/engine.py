"""One decoding step for all live slots, and the state it works on.

    states = decoder(last tokens);  next tokens ~ softmax(states W^T / temperature)
    done if eos or at the limit

Everything per token stays on the model's device, in tensors that never move. On a GPU the
whole step is one CUDA graph for each number of rows: it is captured once, stays valid when an
optimizer step changes the weights in place, and the host only looks at the done flags now and
then.

On a CPU the number of threads of a step is tried out on the first steps, not guessed. A thread
more costs a barrier in every operation, which with few rows can be more than the work it takes
over, and far more where another program wants the core. The bits of a run must not depend on
the choice: where they do (products by oneDNN, see kernels/packed.py) there is none, and all
threads are taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kernels.record import record
from nanomath.rollout.cache import Cache
from nanomath.rollout.decoder import Decoder
from nanomath.rollout.sampling import SamplingParams, next_tokens

LOOK_EVERY = 8  # steps between two looks at the flags, where steps run without the host
TRIALS = 3  # steps with each number of threads; the fastest counts
HOPELESS = 1.3  # times the best number's time: no further trial

Trials = dict[int, list[float]]  # threads -> what steps with so many took


class Slots:
    """The state of the samples in flight, one row for each slot.

    Tensors with `width` + 1 columns have a spare last one: slots that are done write there
    until the host next looks. An empty slot counts as done and stands at position -1.
    """

    def __init__(self, slots: int, width: int, device: torch.device) -> None:
        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.width = width
        self.sample = integers(slots)
        self.count = integers(slots)
        self.limit = integers(slots)
        self.token = integers(slots)  # the last token, and where it stands
        self.position = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        self.noise = torch.zeros(slots, width + 1, 2, device=device)
        self.tokens = integers(slots, width + 1)
        self.logprobs, self.sampling_logprobs = torch.zeros(
            2, slots, width + 1, device=device
        )

    def state(self, rows: int) -> tuple[Tensor, ...]:
        """Return the state of the first `rows` slots that the end of a step reads and
        writes, in the order of `record`.
        """
        written = self.tokens, self.logprobs, self.sampling_logprobs
        return tuple(
            x[:rows]
            for x in (
                self.token,
                self.position,
                self.count,
                self.limit,
                self.done,
                *written,
            )
        )

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the state of slots `source` to slots `target`."""
        for state in vars(self).values():
            if isinstance(state, Tensor):
                state[target] = state[source]

    def clear(self, rows: slice) -> None:
        """Mark the slots as empty."""
        self.done[rows] = True
        self.position[rows] = -1


class Engine:
    """Steps a decoder, a cache and slots: `advance(live, steps)` draws the next tokens of
    the first `live` slots.

    sizes: how many slots there are, the most tokens of a completion, the most of a prompt,
    and how many prompts are held at a time. share: as of `Cache`.
    """

    def __init__(
        self,
        decoder: Decoder,
        eos_ids: Sequence[int],
        threads: Threads,
        sizes: tuple[int, int, int, int],
        share: bool,
    ) -> None:
        self.decoder = decoder
        self.eos = torch.tensor(eos_ids, dtype=torch.int64, device=decoder.device)
        self.threads = threads
        self.sizes = sizes
        slots, width, longest, prompts = sizes
        self.positions = longest + width
        self.slots = Slots(slots, width, decoder.device)
        self.cache = Cache(decoder, slots, self.positions, longest - 1, prompts, share)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.weights = decoder.addresses()  # that the graphs read

    def clear(self) -> None:
        """Forget all samples and prompts; keep the graphs if the weights still lie where
        they lay.
        """
        self.slots.clear(slice(None))
        self.cache.clear()
        if self.weights != (now := self.decoder.addresses()):
            self.graphs = {}
            self.weights = now

    def advance(self, live: int, steps: int, params: SamplingParams) -> None:
        """Draw up to `steps` tokens for each of the first `live` slots; slots that are done
        earlier wait.
        """
        if not self.decoder.on_gpu:
            while steps:
                at_once = (
                    steps
                    if self.in_one_call(params) and not self.threads.trying(live)
                    else 1
                )
                self.threads.run(live, partial(self._on_cpu, live, at_once, params))
                steps -= at_once
            return
        tiles = self.cache.arrange(live)
        key = (
            *(bucket(number, len(self.slots.token)) for number in (live, tiles)),
            params,
        )
        if key not in self.graphs:
            self.graphs[key] = self._capture(*key)
            steps -= 1
        for _ in range(steps):
            self.graphs[key].replay()

    def in_one_call(self, params: SamplingParams) -> bool:
        """Return whether kernels/small_model.py makes the steps."""
        return self.decoder.small is not None and not params.cuts

    def look_every(self, params: SamplingParams) -> int:
        """Return after how many steps the host looks at the done flags.

        A look makes the host wait, and a step that ended samples take part in is wasted on
        them.
        """
        return LOOK_EVERY if self.decoder.on_gpu or self.in_one_call(params) else 1

    def _on_cpu(self, rows: int, steps: int, params: SamplingParams) -> None:
        """Make so many steps in one call of the small model, or else one step."""
        if not self.in_one_call(params):
            return self.step(rows, self.cache.arrange(rows), params)
        state = self.slots.state(rows)
        noise = self.slots.noise
        rope = self.decoder.rope(self.positions)
        self.decoder.small.advance(
            steps, state, noise, self.eos, rope, self.cache.pages, params.temperature
        )

    def step(self, rows: int, tiles: int, params: SamplingParams) -> None:
        """Advance the first `rows` slots by one token."""
        s = self.slots
        self.cache.prepare(s.position[:rows], tiles)
        states = self.decoder.states(s.token[:rows], self.cache.attend, self.positions)
        place = s.count[:rows, None, None].expand(-1, 1, 2)
        drawn = next_tokens(
            self.decoder, states, s.noise[:rows].gather(1, place)[:, 0], params
        )
        record(drawn, s.state(rows), self.eos)

    def _capture(
        self, rows: int, tiles: int, params: SamplingParams
    ) -> torch.cuda.CUDAGraph:
        """Make one step, which compiles the kernels, and capture the next one as a CUDA
        graph.
        """
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.step(rows, tiles, params)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=next((g.pool() for g in self.graphs.values()), None)
        ):
            self.step(rows, tiles, params)
        return graph


def bucket(number: int, most: int) -> int:
    """Return the least of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below `number`,
    but no more than `most`.
    """
    if number < 2:
        return number
    power = 1 << (number - 1).bit_length()
    return min(power if number > power * 3 // 4 else power * 3 // 4, most)


# --- CPU threads ------------------------------------------------------------------------------


class Threads:
    """Runs steps with the number of threads that was fastest when it was tried.

    All of torch's threads, half of them and one are tried for each doubling of the rows. If
    it may not `choose`, all threads run every step.
    """

    def __init__(self, choose: bool = True) -> None:
        self.choose = choose
        self.most = 0
        self.seconds: dict[int, Trials] = {}  # by the size of the step

    def trying(self, rows: int) -> bool:
        """Return whether the next step of so many rows is a trial."""
        return (
            self.choose
            and torch.get_num_threads() > 1
            and _to_try(self.seconds.get(rows.bit_length(), {1: []})) > 0
        )

    def run(self, rows: int, step: Callable[[], None]) -> None:
        """Call step(), which works on so many rows, with the number of threads for it."""
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
            threads
            or min((n for n in trials if trials[n]), key=lambda n: min(trials[n]))
        )
        try:
            step()
        finally:
            torch.set_num_threads(most)
        if threads:
            trials[threads].append(time.perf_counter() - began)


def _to_try(trials: Trials) -> int:
    """Return a number of threads that may still turn out to be the fastest, 0 when there is
    none.
    """
    best = min((min(took) for took in trials.values() if took), default=0.0)
    for threads, took in trials.items():
        if not took or (len(took) < TRIALS and min(took) <= HOPELESS * best):
            return threads
    return 0
