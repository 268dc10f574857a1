"""The sampler: batched generation with a KV cache, fixed slots, and each prompt computed once for its group.

The weights are the model's own tensors, so there is nothing to synchronise after an optimizer step. The samples form a
known queue in prompt-major order. A prompt is prefilled (all of it but its last token) once for its n samples and
copied into a slot as each of them starts; from then on one loop feeds the last token of every live slot and draws the
next. A finished slot is refilled from the queue; when that is empty the live slots move together, so that finished rows
cost nothing.

Noise is keyed by (seed, prompt, sample, position) with a counter-based generator: a sample is the same whatever the
number of slots and the order of the prompts. (When one prompt is given twice, its second copy continues the sample
numbers of the first; ranks that share prompts out are told where each continues.)

Everything per token stays on the model's device. The host looks at the done flags every `check_every` steps, because
each look makes it wait for the device.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.philox import uniform
from nanomath.models.tokenizer import Tokenizer
from nanomath.models.transformer import Transformer
from nanomath.rollout.cache import PromptCache, SlotCache
from nanomath.rollout.sampling import SamplingParams, sample_tokens

PREFILL_TOKENS = 8192  # padded prompt tokens computed in one forward pass, to bound its memory

Progress = Callable[[int, int], None]  # finished samples, tokens drawn so far


@dataclass(frozen=True)
class Completion:
    """One sample. `tokens` include the eos, or the token that completed the stop string, that ended them.

    `logprobs` are under the full distribution at the sampling temperature (what a trainer computes),
    `sampling_logprobs` under the truncated one actually sampled from: the same numbers when top-k, top-p and min-p are
    off. `text` leaves out the eos and everything from the stop string on.
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
        """Number of tokens, the eos included."""
        return len(self.tokens)

    @property
    def finished(self) -> bool:
        """Whether it ended by itself, rather than at the length limit."""
        return self.finish_reason != "length"


class Sampler:
    """Draws completions from a model. `slots` sequences are decoded side by side."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, slots: int = 64) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}: at least one sequence must fit")
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.check_every = 1 if model.device.type == "cpu" else 8

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        progress: Progress | None = None,
        first: Sequence[int] | None = None,
    ) -> list[Completion]:
        """`n` completions of every prompt, in prompt-major order. ValueError for a prompt that does not fit,
        FloatingPointError when the model gives logits that are not numbers.

        A completion ends with an eos, with a stop string, after `max_new_tokens`, or where the model's context ends.
        `first`: which of its samples each prompt begins with, for prompts that are part of a longer list; by default
        `first_samples` of these.
        """
        params = SamplingParams(temperature, top_k, top_p, min_p)
        self._check(prompts, n, max_new_tokens, stop)
        first = first_samples(prompts, n) if first is None else first
        run = _Run(self, prompts, n, max_new_tokens, params, tuple(stop), seed, first)
        for finished, drawn in run.steps():
            if progress is not None:
                progress(finished, drawn)
        return run.completions()

    @torch.no_grad()
    def stream(
        self, prompt: list[int], max_new_tokens: int = 256, stop: Sequence[str] = (), seed: int = 0, **sampling: float
    ) -> Iterator[str]:
        """The text of one completion, piece by piece as it is drawn; arguments as in `generate`."""
        self._check([prompt], 1, max_new_tokens, stop)
        run = _Run(self, [prompt], 1, max_new_tokens, SamplingParams(**sampling), tuple(stop), seed, [0])
        held_back = max(map(len, stop), default=1) - 1  # may turn out to begin a stop string
        shown = 0
        for _ in run.steps():
            text = run.text(0)
            safe = len(text) - held_back
            if safe > shown and not text.endswith("\ufffd"):  # else the last character's bytes are not all there yet
                yield text[shown:safe]
                shown = safe
        yield run.text(0)[shown:]

    def _check(self, prompts: Sequence[list[int]], n: int, max_new_tokens: int, stop: Sequence[str]) -> None:
        """ValueError for arguments that cannot be sampled from."""
        if n < 1:
            raise ValueError(f"n is {n}: at least one completion per prompt must be asked for")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop is {stop!r}: it must be a list of strings, none of them empty")
        context, vocabulary = self.model.config.max_positions, self.model.config.vocab_size
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty: the first token needs something to follow")
            if len(prompt) >= context:
                raise ValueError(f"prompt {index} has {len(prompt)} tokens: the model's context holds {context}")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise ValueError(f"prompt {index} has a token outside the model's vocabulary of {vocabulary}")


class _Run:
    """One call of `generate`: the queue of samples, the slots, and the output buffers.

    Slot tensors, of which the first `live` rows count: `sample` (which sample), `token` (its last token), `position`
    (where that token stands). Output tensors have a row for every sample and a spare last column, into which slots
    that are done write until the host next looks.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[list[int]],
        n: int,
        max_new_tokens: int,
        params: SamplingParams,
        stop: tuple[str, ...],
        seed: int,
        first: Sequence[int],
    ) -> None:
        self.model, self.tokenizer, self.check_every = sampler.model, sampler.tokenizer, sampler.check_every
        self.prompts, self.n, self.params, self.stop, self.seed = prompts, n, params, stop, seed
        self.device, context = self.model.device, self.model.config.max_positions
        self.samples = len(prompts) * n
        limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts for _ in range(n)]
        self.width = max(limits, default=0)
        self.limit = self._tensor(limits)
        self.prompt_length = self._tensor([len(prompt) for prompt in prompts for _ in range(n)])
        self.last_token = self._tensor([prompt[-1] for prompt in prompts for _ in range(n)])
        self.noise_key = self._tensor(noise_keys(prompts, n, first))  # [samples, 3]
        self.eos = self._tensor(sampler.tokenizer.eos_ids)

        self.slots = min(sampler.slots, self.samples)
        self.positions = max((len(prompt) for prompt in prompts), default=0) + self.width
        self.cache = SlotCache(self.model.config, self.slots, self.positions, self.device, self.model.dtype)
        self.live, self.next_sample = 0, 0
        self.prefilled, self.prefilled_from, self.prefilled_to = PromptCache(None), 0, 0  # of the queue's samples
        self.sample, self.token, self.position = (self._tensor([0] * self.slots) for _ in range(3))

        self.tokens = torch.zeros(self.samples, self.width + 1, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(self.samples, self.width + 1, device=self.device)
        self.sampling_logprobs = torch.zeros_like(self.logprobs)
        self.noise = torch.zeros_like(self.logprobs)
        self.count = torch.zeros(self.samples, dtype=torch.int64, device=self.device)
        self.done = torch.zeros(self.samples, dtype=torch.bool, device=self.device)
        self.stopped: dict[int, str] = {}  # sample -> its text, for those that a stop string ended

    def _tensor(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    # The loop: refill -> decode -> retire.

    def steps(self) -> Iterator[tuple[int, int]]:
        """Run to the end; after each look at the flags, yield the finished samples and the tokens drawn so far."""
        self.live = self.refill(torch.arange(self.slots, device=self.device))
        while self.live:
            longest = int(self.position[: self.live].max()) + 1
            for step in range(self.check_every):
                self.decode(min(longest + step, self.positions))
            self.retire()
            yield int(self.done.sum()), int(self.count.sum())

    def decode(self, length: int) -> None:
        """Draw the next token of every live slot; their last tokens all stand below `length`."""
        sample, position = self.sample[: self.live], self.position[: self.live]
        attend = self.cache.attend_at(position, length)
        hidden = self.model.hidden(self.token[: self.live, None], position[:, None], attend)[:, 0]
        count, was_done = self.count[sample], self.done[sample]
        token, logprob, sampling = sample_tokens(self.model.logits(hidden), self.noise[sample, count], self.params)

        column = torch.where(was_done, self.width, count)
        self.tokens[sample, column] = token
        self.logprobs[sample, column] = logprob
        self.sampling_logprobs[sample, column] = sampling
        self.count[sample] = count + ~was_done
        self.done[sample] = was_done | torch.isin(token, self.eos) | (count + 1 >= self.limit[sample])
        self.token[: self.live] = token
        self.position[: self.live] = (position + 1).clamp(max=self.positions - 1)

    def retire(self) -> None:
        """Free the slots of finished samples; start the next ones there, or close the gaps if there are none."""
        if self.stop:
            self.find_stop_strings()
        free = self.done[self.sample[: self.live]].nonzero()[:, 0]
        if len(free):
            started = self.refill(free)
            self.close_gaps(free[started:])

    def refill(self, rows: Tensor) -> int:
        """Start the next samples of the queue in free slots `rows`; returns how many there were."""
        started = 0
        while started < len(rows) and self.next_sample < self.samples:
            if self.next_sample == self.prefilled_to:
                self.prefill()
            count = min(len(rows) - started, self.prefilled_to - self.next_sample)
            self.start(rows[started : started + count])
            started += count
        return started

    def prefill(self) -> None:
        """Compute the next prompts of the queue, as many as fill the slots, and draw their noise."""
        first = self.next_sample // self.n
        wanted = self.prompts[first : first + -(-self.slots // self.n)]
        while len(wanted) > 1 and len(wanted) * max(map(len, wanted)) > PREFILL_TOKENS:
            wanted = wanted[:-1]
        self.prefilled = PromptCache(self.model.config.sliding_window)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(p[:-1], dtype=torch.int64) for p in wanted], True)
        if padded.shape[1]:  # a prompt of one token has nothing before its last
            self.model.hidden(padded.to(self.device), attend=self.prefilled.attend)
        self.prefilled_from, self.prefilled_to = self.next_sample, self.next_sample + len(wanted) * self.n
        key = self.noise_key[self.prefilled_from : self.prefilled_to, :, None]
        place = torch.arange(self.width + 1, device=self.device)
        self.noise[self.prefilled_from : self.prefilled_to] = uniform(self.seed, place, *key.unbind(1))

    def start(self, rows: Tensor) -> None:
        """Put the next len(rows) samples, whose prompts are prefilled, into slots `rows`."""
        sample = torch.arange(self.next_sample, self.next_sample + len(rows), device=self.device)
        self.cache.fill(rows, self.prefilled, (sample - self.prefilled_from) // self.n)
        self.sample[rows] = sample
        self.token[rows] = self.last_token[sample]
        self.position[rows] = self.prompt_length[sample] - 1
        self.next_sample += len(rows)

    def close_gaps(self, free: Tensor) -> None:
        """Move the last live slots into the `free` ones, so that the live ones are the first rows again."""
        taken = torch.ones(self.live, dtype=torch.bool, device=self.device)
        taken[free] = False
        self.live -= len(free)
        target, source = free[free < self.live], taken[self.live :].nonzero()[:, 0] + self.live
        if len(target):
            self.cache.move(source, target, int(self.position[source].max()))
        for state in (self.sample, self.token, self.position):
            state[target] = state[source]

    # Stop strings, on the host.

    def find_stop_strings(self) -> None:
        """End the live samples whose newest tokens completed a stop string, and cut tokens and logprobs there."""
        for sample in self.sample[: self.live].tolist():
            count = int(self.count[sample])
            for kept in range(max(1, count - self.check_every + 1), count + 1):
                text = self.text_before_stop(self.tokens[sample, :kept].tolist())
                if text is not None:
                    self.stopped[sample] = text
                    self.count[sample], self.done[sample] = kept, True
                    break

    def text_before_stop(self, tokens: list[int]) -> str | None:
        """The decoded text up to its first stop string, or None. Only the tail is decoded when that shows none."""
        tail = 4 * max(map(len, self.stop)) + 4  # a character has at most four bytes, a token at least one
        if not any(stop in self.tokenizer.decode(tokens[-tail:]) for stop in self.stop):
            return None
        text = self.tokenizer.decode(tokens)
        ends = [text.find(stop) for stop in self.stop if stop in text]
        return text[: min(ends)] if ends else None

    # The results.

    def text(self, sample: int) -> str:
        """The text of a sample so far."""
        return self.completion(sample, self.tokens[sample, : int(self.count[sample])].tolist()).text

    def completion(self, sample: int, tokens: list[int], logprobs=(), sampling_logprobs=()) -> Completion:
        """The record of one sample."""
        ended = bool(tokens) and tokens[-1] in self.tokenizer.eos_ids
        reason = "stop" if sample in self.stopped else "eos" if ended else "length"
        text = self.stopped.get(sample)
        if text is None:
            text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
        prompt, number = divmod(sample, self.n)
        return Completion(prompt, number, tokens, list(logprobs), list(sampling_logprobs), text, reason)

    def completions(self) -> list[Completion]:
        """All samples in prompt-major order."""
        counts = self.count.tolist()
        columns = [matrix.cpu() for matrix in (self.tokens, self.logprobs, self.sampling_logprobs)]
        self.check_finite(columns[1])
        return [
            self.completion(sample, *(column[sample, :count].tolist() for column in columns))
            for sample, count in enumerate(counts)
        ]

    def check_finite(self, logprobs: Tensor) -> None:
        """FloatingPointError for the first sample that was drawn from logits that are not numbers."""
        bad = (~logprobs[:, : self.width].isfinite()).nonzero()
        if len(bad):
            (prompt, number), token = divmod(int(bad[0, 0]), self.n), int(bad[0, 1])
            raise FloatingPointError(
                f"the logprob of token {token} of sample {number} of prompt {prompt} is {logprobs[*bad[0]].item()}"
            )


def first_samples(prompts: Sequence[list[int]], n: int) -> list[int]:
    """The number of each prompt's first sample: 0, and n more for every time that the same prompt came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    first = []
    for prompt in map(tuple, prompts):
        first.append(seen[prompt])
        seen[prompt] += n
    return first


def noise_keys(prompts: Sequence[list[int]], n: int, first: Sequence[int]) -> list[list[int]]:
    """For every sample the counter words that key its noise: its number among its prompt's samples, and the prompt's
    64-bit hash in two halves.
    """
    keys = []
    for prompt, start in zip(prompts, first, strict=True):
        digest = hashlib.blake2b(repr(list(prompt)).encode(), digest_size=8).digest()
        low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        keys += [[number, low, high] for number in range(start, start + n)]
    return keys
