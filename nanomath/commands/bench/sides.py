"""The measured processes of `bench rollout`: nanomath's sampler, and transformers' `generate`
on the same model.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nanomath.commands.bench.machine import SHAPES, peak_memory, use_threads
from nanomath.commands.bench.stages import LOOKS, stage_shares
from nanomath.models import Tokenizer, Transformer, load_model, load_tokenizer, save_model
from nanomath.models.batches import Example, response_scores
from nanomath.rollout import Completion, Sampler
from nanomath.rollout.engine import LOOK_EVERY
from nanomath.training.policy_metrics import sampler_gap

SCORED_TOKENS = 4096  # padded tokens that the trainer's logprobs are computed for at once
WARM_UP = 12  # tokens on a CPU: the first steps find the best number of threads; a GPU captures graphs in a whole run
Look = tuple[float, int, int, int, float]  # when, and what `Progress` is called with


@dataclass(frozen=True)
class Point:
    """What is drawn: `group` samples of every prompt, `rows` at a time, each of `response`
    tokens or up to an eos.
    """

    rows: int
    group: int
    response: int
    prompts: tuple[tuple[int, ...], ...]

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt."""
        return fmean(map(len, self.prompts))

    @property
    def samples(self) -> int:
        return len(self.prompts) * self.group


@dataclass(frozen=True)
class Setup:
    """The model, and how it is run."""

    model: str
    device: str
    dtype: torch.dtype  # what is computed in
    model_dtype: torch.dtype  # what the model is held in, and the trainer computes in
    exact: bool
    threads: int
    scored: int
    batches: tuple[int, ...]  # of transformers


class NoText:
    """In place of a tokenizer: no token ends a completion, and none has a text."""

    eos_ids: tuple[int, ...] = ()

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def build(setup: Setup, dtype: torch.dtype) -> tuple[Transformer, Tokenizer | NoText]:
    """The model at a path or hub id with its tokenizer, or one of random weights, which never
    draws an eos.
    """
    use_threads(setup.threads)
    if setup.model not in SHAPES:
        return load_model(setup.model, setup.device, dtype), load_tokenizer(setup.model)
    with torch.device("meta"):
        model = Transformer(SHAPES[setup.model])
    model.to(dtype).to_empty(device=setup.device)
    model.lm_head.weight = (
        model.model.embed_tokens.weight
    )  # to_empty gives every module a parameter of its own
    return model.init_weights(0), NoText()


# --- nanomath --------------------------------------------------------------------------------


def measure_sampler(
    setup: Setup, point: Point, share_prompts: bool, details: bool
) -> dict[str, Any]:
    """Tokens a second, seconds of a decoding step and the context in it, bytes at the peak
    beyond the weights; with `details` also the gap to the trainer and the stages' shares.
    """
    model, tokenizer = build(setup, setup.model_dtype)
    before = peak_memory(model.device, restart=True)

    def new_sampler(tokenizer: Tokenizer | NoText) -> Sampler:
        return Sampler(model, tokenizer, point.rows, setup.exact, setup.dtype, share_prompts)

    sampler = new_sampler(tokenizer)
    draw(
        sampler,
        point,
        point.response if model.device.type == "cuda" else min(point.response, WARM_UP),
    )
    began = time.perf_counter()
    completions, looks = draw(sampler, point, point.response)
    seconds = time.perf_counter() - began
    peak = peak_memory(model.device) - before
    endless = tokenizer if isinstance(tokenizer, NoText) else NoText()
    full = Point(
        point.rows, point.group, point.response, point.prompts[: point.rows // point.group]
    )
    if (
        endless is not tokenizer or full != point
    ):  # some rows ended before others: no full batch to time
        sampler.release()
        sampler = new_sampler(endless)
        _, looks = draw(sampler, full, point.response)
    found = {"tokens_per_s": sum(c.length for c in completions) / seconds, "bytes": peak}
    found |= step_time(looks)
    if details:
        gpu = model.device.type == "cuda"
        tokens = min(point.response, (LOOKS + 2) * LOOK_EVERY)
        found["stages"] = stage_shares(
            lambda tell: draw(sampler, full, tokens, tell), model.config.vocab_size, gpu
        )
        sampler.release()
        model.exact = setup.exact
        found["gap"] = gap(model, point, completions[: setup.scored])
    return found


def draw(
    sampler: Sampler, point: Point, tokens: int, tell: Callable[..., None] | None = None
) -> tuple[list[Completion], list[Look]]:
    """The point's completions of at most `tokens` tokens, and what was there when the host
    looked at them.
    """
    looks: list[Look] = []

    def progress(*now: float) -> None:
        looks.append((time.perf_counter(), *now))
        if tell is not None:
            tell(*now)

    prompts = [list(prompt) for prompt in point.prompts]
    return sampler.generate(prompts, point.group, tokens, progress=progress), looks


def step_time(looks: list[Look]) -> dict[str, float]:
    """Seconds of a step of a full batch, its rows, and how many tokens of each row had been
    drawn in the mean: from the first look, after the prefill, to the last one before a sample
    finished. Empty when there are not two of these.
    """
    full = [look for look in looks if look[1] == 0]
    if len(full) < 2:
        return {}
    (began, _, before, live, *_) = full[0]
    (ended, _, after, *_) = full[-1]
    return {
        "step_s": (ended - began) * live / (after - before),
        "drawn": (before + after) / 2 / live,
        "live": live,
    }


def gap(model: Transformer, point: Point, completions: list[Completion]) -> dict[str, float]:
    """Sampler against trainer, as in a training run's log."""
    if not completions:
        return {}
    examples = [Example(list(point.prompts[c.prompt_index]), c.tokens) for c in completions]
    scored, _ = response_scores(model, examples, SCORED_TOKENS)
    trainer = torch.cat(
        [row[: c.length] for row, c in zip(scored, completions, strict=True)]
    ).double()
    sampled = torch.tensor([x for c in completions for x in c.logprobs], dtype=torch.float64)
    found = sampler_gap(trainer, sampled, sampled)
    return {name.removeprefix("gap_"): value for name, value in found.items()}


# --- transformers ----------------------------------------------------------------------------


def measure_transformers(setup: Setup, point: Point) -> dict[str, Any]:
    """Tokens a second of transformers' `generate` at the batch size that is best, and bytes at
    the peak.
    """
    model, tokenizer = build(setup, setup.dtype)
    transformers = importlib.import_module(
        "transformers"
    )  # only an oracle: nanomath runs without it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with TemporaryDirectory() as directory:
        save_model(model, None, directory)
        del model
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=setup.dtype
        ).to(setup.device)
    before = peak_memory(theirs.device, restart=True)
    samples = [prompt for prompt in point.prompts for _ in range(point.group)]
    generate(theirs, tokenizer, samples[: max(setup.batches)], 2)
    best = 0.0
    for batch in setup.batches:
        began = time.perf_counter()
        tokens = 0
        for first in range(0, len(samples), batch):
            tokens += generate(
                theirs, tokenizer, samples[first : first + batch], point.response
            )
        best = max(best, tokens / (time.perf_counter() - began))
    return {"tokens_per_s": best, "bytes": peak_memory(theirs.device) - before}


def generate(
    model: Any, tokenizer: Tokenizer | NoText, prompts: Sequence[Sequence[int]], response: int
) -> int:
    """Draw a batch of completions with transformers; how many tokens they have up to their
    eos.
    """
    longest = max(map(len, prompts))
    padded = torch.tensor(
        [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts],
        device=model.device,
    )
    real = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts],
        device=model.device,
    )
    sampling = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": response,
    }
    eos = list(tokenizer.eos_ids)
    with torch.no_grad():
        out = model.generate(
            padded, attention_mask=real, pad_token_id=0, eos_token_id=eos or None, **sampling
        )
    new = out[:, longest:]
    ended = torch.isin(new, torch.tensor(eos, dtype=torch.int64, device=model.device))
    before = ended.cumsum(1) - ended.long()  # eos before this token
    return int((before == 0).sum())
