"""What a sampler is asked for, and the choice of the next token: temperature, top-k, top-p,
min-p, greedy.

The choice is the inverse of the cumulative distribution at two uniform numbers a token
(kernels/lm_head.py), which are cheap to key by (seed, sample, position). n rows, V vocabulary.

Prompts and stop strings may have any form that can mean one thing only; everything else, and
a number out of range, is a ValueError of one line that says what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from kernels import lm_head
from kernels.truncation import truncated_sample
from nanomath.models.tokenizer import Tokenizer
from nanomath.rollout.decoder import Decoder

COUNT = (int, lambda n: n >= 1, "an integer, at least 1")
# By the name of an argument: what type it has, which values are right, and that in words.
REQUIREMENTS = {
    "slots": COUNT,
    "n": (*COUNT[:2], COUNT[2] + ": completions of each prompt"),
    "max_new_tokens": COUNT,
    "seed": (int, lambda seed: 0 <= seed < 2**64, "an integer from 0 to 2^64 - 1"),
    "temperature": (
        float,
        lambda t: 0 <= t < math.inf,
        "0 (greedy) or a positive number",
    ),
    "top_k": (int, lambda k: k >= 0, "0 (off) or a positive integer"),
    "top_p": (float, lambda p: 0 < p <= 1, "above 0 and at most 1 (off)"),
    "min_p": (float, lambda p: 0 <= p <= 1, "between 0 (off) and 1"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    ValueError for a number that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            # Frozen, but not yet.
            object.__setattr__(self, name, checked(name, value))

    @property
    def cuts(self) -> bool:
        """Whether some of the probability mass is cut off before sampling."""
        return self.temperature > 0 and (
            self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        )


def next_tokens(
    decoder: Decoder, states: Tensor, u: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the next tokens [n] of states [n, D] at uniform numbers u [n, 2] in [0, 1).

    Returns tokens, their logprobs under the full distribution, and their logprobs under the
    distribution that was sampled from. The full one is softmax(logits / temperature), at
    temperature 1 when greedy; the other one lacks what top-k, top-p and min-p cut off, and
    is renormalised.
    """
    if decoder.on_gpu and not params.cuts:
        token, logprob, _ = lm_head.sample(
            states, decoder.lm_head, u, params.temperature
        )
        return token, logprob, under_sampling(logprob, params)
    logits = decoder.logits(states)
    token, logprob, sampling = sample_tokens(logits, u, params)
    # By the kernel that the trainer's logprobs come from
    if decoder.exact and params.cuts:
        kept = sampling - logprob
        if decoder.on_gpu:
            logprob = lm_head.logprobs_triton(
                states, decoder.lm_head, token, params.temperature
            )[0]
        else:
            logprob = lm_head.statistics(logits, token, params.temperature)[0]
        sampling = logprob + kept
    return token, logprob, sampling


def sample_tokens(
    logits: Tensor, u: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw as `next_tokens`, from logits [n, V]."""
    if params.cuts:
        options = params.top_k, params.top_p, params.min_p
        return truncated_sample(logits, u, params.temperature, *options)[:3]
    token, logprob, _ = lm_head.sample_logits(logits, u, params.temperature)
    return token, logprob, under_sampling(logprob, params)


def under_sampling(logprob: Tensor, params: SamplingParams) -> Tensor:
    """Return the logprobs under the distribution sampled from, where nothing is cut off: 0
    for a greedy choice, which is certain.
    """
    return logprob if params.temperature else torch.zeros_like(logprob)


# --- Arguments --------------------------------------------------------------------------------


def checked(name: str, value: Any) -> Any:
    """Return the argument `name` as the int or the float that it must be; NumPy's numbers are
    converted.

    ValueError where it is no such number (a bool is none), or out of range.
    """
    kind, holds, expected = REQUIREMENTS[name]
    known = isinstance(value, Integral if kind is int else Real) and not isinstance(
        value, bool
    )
    try:
        number = kind(value) if known else None
    except OverflowError:  # an integer beyond any float
        number = None
    if number is None or not holds(number):
        raise ValueError(f"{name} is {_shown(value)}: it must be {expected}")
    return number


def stop_strings(stop: Any) -> tuple[str, ...]:
    """Return the stop strings as a tuple: a single string stands for itself, None for no
    string.

    ValueError for anything else, and for an empty string.
    """
    alone = isinstance(stop, str) or not isinstance(stop, Iterable)
    strings = () if stop is None else (stop,) if alone else tuple(stop)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(
            f"stop is {_shown(stop)}: it must be a string or a list of strings, none of them empty"
        )
    return strings


def token_lists(
    prompts: Any, tokenizer: Tokenizer, vocabulary: int, context: int
) -> list[list[int]]:
    """Return the token ids of every prompt.

    A prompt is a text, which `tokenizer.encode` encodes, or its ids in a list, a tuple, a
    tensor or an array; a prompt that is given alone is a list of one. ValueError for a
    prompt that is empty, has an id outside [0, vocabulary), or does not leave room for a
    token in `context`.
    """
    prompts = _plain(prompts)
    if isinstance(prompts, str) or (
        isinstance(prompts, list) and prompts and {int}.issuperset(map(type, prompts))
    ):
        prompts = [prompts]
    if not isinstance(prompts, list):
        raise ValueError(
            f"prompts is {_shown(prompts)}: it must be a list of texts or of lists of token ids"
        )
    return [
        _ids(prompt, index, tokenizer, vocabulary, context)
        for index, prompt in enumerate(prompts)
    ]


def _ids(
    prompt: Any, index: int, tokenizer: Tokenizer, vocabulary: int, context: int
) -> list[int]:
    if isinstance(prompt, str):
        try:
            ids = tokenizer.encode(prompt)
        except (
            TypeError,
            ValueError,
        ):  # what the library says of half a surrogate pair
            raise ValueError(
                f"prompt {index} is {_shown(prompt)}: it is no valid Unicode text"
            ) from None
    else:
        ids = _plain(prompt)
    if not isinstance(ids, list) or not {int}.issuperset(map(type, ids)):
        raise ValueError(
            f"prompt {index} is {_shown(prompt)}: it must be a text or a list of token ids"
        )
    if not ids:
        raise ValueError(
            f"prompt {index} is empty: the first token needs something to follow"
        )
    if len(ids) >= context:
        raise ValueError(
            f"prompt {index} has {len(ids)} tokens: the model's context holds {context}"
        )
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(
            f"prompt {index} has a token outside the model's vocabulary of {vocabulary}"
        )
    return ids


def _plain(values: Any) -> Any:
    """Turn a tensor, an array, a tuple or an iterator into a list, and its scalars into
    ints.
    """
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        return values
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def _shown(value: Any) -> str:
    """Return the beginning of the value's repr on one line."""
    return " ".join(f"{value!r:.60}".split())
