"""The sampler: batched generation with a KV cache, fixed slots, and each prompt computed once
for its group.

The samples form a known queue in prompt-major order. A prompt is prefilled (all of it but its
last token) once for its n samples, which share its keys and values; from then on one loop
feeds the last token of every live slot and draws the next. A finished slot is refilled from
the queue; when that is empty the live slots move together, so that finished rows cost nothing.
All keys and values are dropped at the end: no prompt can be stale after an optimizer step.

Noise is keyed by (seed, prompt, sample, position) with a counter-based generator: a sample is
the same whatever the number of slots and the order of the prompts, up to rounding of its
logits, and with `exact` to the last bit. (When one prompt is given twice, its second copy
continues the sample numbers of the first; ranks that share prompts out are told where each
continues.)

The host looks at the done flags every `check_every` steps, because each look makes it wait for
the device. A small model on a CPU does so many steps in one call.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.exact_attention import check_rows
from kernels.packed import forget_packed, in_panels
from kernels.philox import uniform_pair
from nanomath.models.tokenizer import Tokenizer
from nanomath.models.transformer import Transformer
from nanomath.rollout.cache import Cache, free_memory
from nanomath.rollout.decoder import Decoder
from nanomath.rollout.engine import Engine, Threads
from nanomath.rollout.sampling import SamplingParams, checked, stop_strings, token_lists
from nanomath.rollout.stops import text_before_stop

# Padded prompt tokens computed in one forward pass, to bound its memory.
PREFILL_TOKENS = 8192
MEMORY_SHARE = 0.8  # of the free memory that keys and values may take

# Called with the samples that finished, the tokens drawn so far, the samples in flight, and
# the mean length of those that were in flight before.
Progress = Callable[[int, int, int, float], None]


@dataclass(frozen=True)
class Completion:
    """One sample.

    `tokens` include the last one: the eos, or the token that completed a stop string.
    `logprobs` are those of the full distribution at the sampling temperature, which a
    trainer computes. `sampling_logprobs` are those of the truncated distribution that the
    tokens were drawn from: the same numbers when top-k, top-p and min-p are off. `text`
    leaves out the eos, and everything from the stop string on.
    """

    prompt_index: int
    sample_index: int
    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    text: str
    finish_reason: str  # "eos", "stop" or "length"

    @property
    def length(self) -> int:
        """The number of tokens, the eos included."""
        return len(self.tokens)

    @property
    def finished(self) -> bool:
        """Whether the completion ended by itself, and not at the length limit."""
        return self.finish_reason != "length"


class Sampler:
    """Draws completions from a model.

    slots: how many sequences are decoded side by side; fewer where memory is short. exact:
    logprobs are bit for bit those of the model's forward pass with `model.exact`, whatever
    the slots and the order of the prompts. dtype: what the sampler computes in, by default
    the model's dtype. share_prompts: whether the samples of a prompt share its keys and
    values. keep: whether a GPU's cache and captured graphs are kept between calls.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        slots: int = 64,
        exact: bool = False,
        dtype: torch.dtype | None = None,
        share_prompts: bool = True,
        keep: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.slots = checked("slots", slots)
        self.share_prompts = share_prompts
        self.decoder = Decoder(model, dtype or model.dtype, exact)
        self.keep = keep and self.decoder.on_gpu
        choose = True
        if not self.decoder.on_gpu:
            if exact:
                layer = model.model.layers[0].parameters()
                check_rows([p for p in layer if p.dim() == 2], self.decoder.dtype)
            else:
                matrices = [p for p in model.parameters() if p.dim() == 2]
                choose = all(
                    in_panels(matrix, self.decoder.dtype) for matrix in matrices
                )
        self.threads = Threads(choose)
        self.check_every: int | None = None  # None: what suits the engine
        self._engine: Engine | None = None

    def release(self) -> None:
        """Free the memory that is kept between calls: on a GPU the cache and the captured
        graphs.
        """
        self._engine = None
        if self.decoder.on_gpu:
            torch.cuda.empty_cache()

    def slots_that_fit(self, longest: int, width: int) -> int:
        """Return `slots`, or with a warning as many as have room for keys and values in
        free memory.

        MemoryError where there is no room for one.
        """
        device = self.decoder.device
        each = Cache.bytes_per_slot(self.decoder, longest + width, longest)
        free = free_memory(device) + (
            self._engine.sizes[0] * each if self._engine else 0
        )
        fit = int(MEMORY_SHARE * free) // each
        if fit < 1:
            raise MemoryError(
                f"a sequence of {longest + width} tokens needs {each / 2**30:.2f} GiB of "
                f"keys and values, and {device} "
                f"has {free / 2**30:.2f} GiB free: take a lower max_new_tokens or shorter prompts"
            )
        if fit < self.slots:
            warnings.warn(
                f"{fit} of {self.slots} slots fit into the memory that is free",
                stacklevel=2,
            )
        return min(fit, self.slots)

    def engine(self, *sizes: int) -> Engine:
        """Return an engine of at least these sizes (see `Engine`); on a GPU the last one is
        used again if it is large enough.
        """
        self.decoder.refresh()
        if self._engine is not None and all(map(int.__ge__, self._engine.sizes, sizes)):
            self._engine.clear()
            return self._engine
        self.release()
        self._engine = Engine(
            self.decoder,
            self.tokenizer.eos_ids,
            self.threads,
            sizes,
            self.share_prompts,
        )
        return self._engine

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int] | str],
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] | str = (),
        seed: int = 0,
        progress: Progress | None = None,
        first: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Draw `n` completions of every prompt, and return them in prompt-major order.

        A prompt is a list of token ids, or a text that is encoded. A completion ends with
        an eos, with a stop string, after `max_new_tokens`, or where the model's context
        ends. A stop string may be, or contain, the text of a special token. `first`: the
        number of each prompt's first sample, for prompts that are part of a longer list; by
        default that of `first_samples`. ValueError for a prompt that does not fit,
        FloatingPointError when the model gives logits that are not numbers.
        """
        params = SamplingParams(temperature, top_k, top_p, min_p)
        run = _Run(self, prompts, n, max_new_tokens, params, stop, seed, first)
        for now in run.steps():
            if progress is not None:
                progress(*now)
        if not self.keep:
            self.release()
        return run.completions()

    @torch.no_grad()
    def stream(
        self,
        prompt: Sequence[int] | str,
        max_new_tokens: int = 256,
        stop: Sequence[str] | str = (),
        seed: int = 0,
        **sampling: float,
    ) -> Iterator[str]:
        """Yield the text of one completion piece by piece, as it is drawn; the arguments
        are those of `generate`.
        """
        run = _Run(
            self, [prompt], 1, max_new_tokens, SamplingParams(**sampling), stop, seed
        )
        # May turn out to begin a stop string.
        held_back = max(map(len, run.stop), default=1) - 1
        shown = 0
        for _ in run.steps():
            text = run.completion(
                0, run.slots.tokens[0, : run.slots.count[0]].tolist()
            ).text
            safe = len(text) - held_back
            # Else the last character's bytes are not all there yet.
            if safe > shown and not text.endswith("\ufffd"):
                yield text[shown:safe]
                shown = safe
        if not self.keep:
            self.release()
        yield run.completions()[0].text[shown:]


class _Run:
    """One call of `generate`: the queue of samples, the samples in flight, and the results."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Sequence[int] | str],
        n: int,
        max_new_tokens: int,
        params: SamplingParams,
        stop: Sequence[str] | str,
        seed: int,
        first: Sequence[int] | None = None,
    ) -> None:
        self.tokenizer = sampler.tokenizer
        self.params = params
        self.device = sampler.decoder.device
        self.n = checked("n", n)
        max_new_tokens = checked("max_new_tokens", max_new_tokens)
        self.seed = checked("seed", seed)
        self.stop = stop_strings(stop)
        config = sampler.model.config
        context = config.max_positions
        prompts = token_lists(prompts, self.tokenizer, config.vocab_size, context)
        self.prompts = prompts
        self.samples = len(prompts) * self.n
        limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        # Of each prompt.
        self.limit = self._tensor(limits)
        self.length = self._tensor([len(prompt) for prompt in prompts])
        self.last_token = self._tensor([prompt[-1] for prompt in prompts])
        self.first = self._tensor(
            first_samples(prompts, self.n) if first is None else first
        )
        self.noise_key = self._tensor([noise_key(prompt) for prompt in prompts])
        self.left = [self.n] * len(prompts)  # samples that have not finished
        # Of the queue.
        self.live = 0
        self.next_sample = 0
        self.prefilled_to = 0
        longest = max(map(len, prompts), default=1)
        width = max(limits, default=0)
        self.rows = min(sampler.slots_that_fit(longest, width), self.samples)
        # Prompts that are held: one for each sample in flight at most, and those of the next
        # refill.
        held = self.rows + -(-self.rows // self.n)
        self.engine = sampler.engine(self.rows, width, longest, held)
        self.slots = self.engine.slots
        self.check_every = sampler.check_every or self.engine.look_every(params)
        self.stopped: dict[
            int, str
        ] = {}  # texts of the samples that a stop string ended
        self.results: dict[int, Completion] = {}  # by the number of the sample

    def _tensor(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    # The loop: refill -> step -> keep the results -> refill; then gaps are closed.

    def steps(self) -> Iterator[tuple[int, int, int, float]]:
        """Run until all samples are done; after each look at the done flags, yield the
        arguments that `Progress` is called with.
        """
        # drawn: tokens of samples that finished
        finished = 0
        drawn = 0
        s = self.slots
        self.live = self.refill(torch.arange(self.rows, device=self.device))
        try:
            while self.live:
                self.engine.advance(self.live, self.check_every, self.params)
                if self.stop:
                    self.find_stop_strings()
                look = torch.stack(
                    [
                        state[: self.live].long()
                        for state in (s.done, s.count, s.position)
                    ]
                )
                # All at once: the host waits for the device here.
                done, count, position = look.cpu()
                so_far = drawn + int(count.sum())
                length = float(position.double().mean())
                finished = finished + int(done.sum())
                drawn = drawn + int(count @ done)
                if done.any():
                    free = done.nonzero()[:, 0].to(self.device)
                    self.keep_results(free)
                    started = self.refill(free)
                    self.close_gaps(free[started:])
                yield finished, so_far, self.live, length
        finally:
            forget_packed()

    def keep_results(self, rows: Tensor) -> None:
        """Make the completions of finished slots, and forget prompts of which no sample is
        left.
        """
        s = self.slots
        state = (s.sample, s.count, s.tokens, s.logprobs, s.sampling_logprobs)
        finished = (x[rows].tolist() for x in state)
        for sample, count, *columns in zip(*finished, strict=True):
            self.results[sample] = self.completion(
                sample, *(x[:count] for x in columns)
            )
            prompt = sample // self.n
            self.left[prompt] -= 1
            if not self.left[prompt]:
                self.engine.cache.forget(prompt)

    def refill(self, rows: Tensor) -> int:
        """Start the next samples of the queue in the free slots `rows`, and return how many
        there were.
        """
        started = 0
        while started < len(rows) and self.next_sample < self.samples:
            if self.next_sample == self.prefilled_to:
                self.prefill()
            count = min(len(rows) - started, self.prefilled_to - self.next_sample)
            self.start(rows[started : started + count])
            started += count
        return started

    def prefill(self) -> None:
        """Prefill the next prompts of the queue, as many as fill the slots."""
        first = self.next_sample // self.n
        wanted = self.prompts[first : first + -(-self.rows // self.n)]
        while len(wanted) > 1 and len(wanted) * max(map(len, wanted)) > PREFILL_TOKENS:
            wanted = wanted[:-1]
        self.engine.cache.prefill(dict(enumerate(wanted, first)))
        self.prefilled_to += len(wanted) * self.n

    def start(self, rows: Tensor) -> None:
        """Put the next len(rows) samples, whose prompts are prefilled, into slots `rows`."""
        s = self.slots
        sample = torch.arange(
            self.next_sample, self.next_sample + len(rows), device=self.device
        )
        prompt = sample // self.n
        length = self.length[prompt]
        self.engine.cache.begin(rows, prompt.tolist(), length)
        s.sample[rows] = sample
        s.limit[rows] = self.limit[prompt]
        s.token[rows] = self.last_token[prompt]
        s.position[rows] = (length - 1).int()
        s.count[rows] = 0
        s.done[rows] = False
        number = self.first[prompt] + sample % self.n
        key = (number[:, None], *self.noise_key[prompt][:, :, None].unbind(1))
        place = torch.arange(s.width + 1, device=self.device)
        s.noise[rows] = uniform_pair(self.seed, place, *key)
        self.next_sample += len(rows)

    def close_gaps(self, free: Tensor) -> None:
        """Move the last live slots into the `free` ones, so that the live slots are the
        first rows again.
        """
        taken = torch.ones(self.live, dtype=torch.bool, device=self.device)
        taken[free] = False
        self.live -= len(free)
        target = free[free < self.live]
        source = taken[self.live :].nonzero()[:, 0] + self.live
        if len(target):
            self.engine.cache.move(source, target)
            self.slots.move(source, target)
        self.slots.clear(slice(self.live, self.live + len(free)))

    # Stop strings, on the host.

    def find_stop_strings(self) -> None:
        """End the live samples whose newest tokens completed a stop string, and cut their
        tokens and logprobs there.
        """
        s = self.slots
        states = (state[: self.live].tolist() for state in (s.sample, s.count))
        for row, (sample, count) in enumerate(zip(*states, strict=True)):
            for kept in range(max(1, count - self.check_every + 1), count + 1):
                tokens = s.tokens[row, :kept].tolist()
                text = text_before_stop(self.tokenizer, self.stop, tokens)
                if text is not None:
                    self.stopped[sample] = text
                    s.count[row] = kept
                    s.done[row] = True
                    break

    # The results.

    def completion(
        self, sample: int, tokens: list[int], logprobs=(), sampling_logprobs=()
    ) -> Completion:
        """Return the completion of one sample."""
        ended = bool(tokens) and tokens[-1] in self.tokenizer.eos_ids
        reason = "eos" if ended else "stop" if sample in self.stopped else "length"
        text = self.stopped.get(sample)
        if text is None:
            text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
        prompt, number = divmod(sample, self.n)
        return Completion(
            prompt,
            number,
            tokens,
            list(logprobs),
            list(sampling_logprobs),
            text,
            reason,
        )

    def completions(self) -> list[Completion]:
        """Return all completions in prompt-major order.

        FloatingPointError for the first one that was drawn from logits that are not numbers.
        """
        found = [self.results[sample] for sample in range(self.samples)]
        for c in found:
            for token, logprob in enumerate(c.logprobs):
                if not math.isfinite(logprob):
                    raise FloatingPointError(
                        f"the logprob of token {token} of sample {c.sample_index} of prompt "
                        f"{c.prompt_index} is {logprob}"
                    )
        return found


def first_samples(prompts: Sequence[list[int]], n: int) -> list[int]:
    """Return the number of each prompt's first sample: 0, and n more for each earlier copy
    of the same prompt.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    first = []
    for prompt in map(tuple, prompts):
        first.append(seen[prompt])
        seen[prompt] += n
    return first


def noise_key(prompt: list[int]) -> list[int]:
    """Return the counter words that key a prompt's noise beside the number of the sample:
    the two halves of the prompt's 64-bit hash.
    """
    digest = hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest()
    return [int.from_bytes(half, "little") for half in (digest[:4], digest[4:])]
