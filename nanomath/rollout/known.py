"""Completions that are known before a run, in place of those of its policy: samples of a file, and
worked solutions.

`Known` gives them as a sampler gives what it draws, so that all that follows (rewards, groups,
ranks) is the same. What a file tells of a sample that the tokenizer spells with the same tokens is
kept, its logprobs included; any other text is encoded again. A text of which no logprobs are known
was not drawn at all: its tokens have the logprob 0, that of what is certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nanomath.data.order import generator_of
from nanomath.data.problem_sets import read_records
from nanomath.models.tokenizer import Tokenizer
from nanomath.rollout.episodes import in_groups
from nanomath.rollout.sampler import Completion, Sampler, first_samples

REASONS = ("eos", "stop", "length")


@dataclass
class Known:
    """`generate` gives known completions of each prompt, and others that `sampler` draws.

    completions: by the tokens of the prompt. last: how many of a prompt's completions are known
    ones, after those that are drawn; 0: all of them, and nothing is drawn.
    """

    completions: Mapping[tuple[int, ...], Sequence[Completion]]
    sampler: Sampler | Known
    last: int = 0

    @property
    def longest(self) -> int:
        """The length in tokens of the longest known completion."""
        return max(c.length for found in self.completions.values() for c in found)

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int = 1,
        *,
        seed: int = 0,
        **sampling: Any,
    ) -> list[Completion]:
        """Return n completions of every prompt, in prompt-major order, as `Sampler.generate`.

        Which of the known ones of a prompt they are is a function of the seed and of the number
        of its first sample.
        """
        first = first_samples(prompts, n)
        known = self.last or n
        groups: list[list[Completion]] = [[] for _ in prompts]
        if known < n:
            drawn = self.sampler.generate(prompts, n=n - known, seed=seed, **sampling)
            groups = in_groups(drawn, n - known)
        for prompt, start, group in zip(prompts, first, groups, strict=True):
            choice = self.completions[tuple(prompt)]
            order = torch.randperm(len(choice), generator=generator_of(seed)).tolist()
            group += [choice[order[(start + k) % len(order)]] for k in range(known)]
        return [
            replace(completion, prompt_index=index, sample_index=first[index] + number)
            for index, group in enumerate(groups)
            for number, completion in enumerate(group)
        ]


def read_samples(
    path: str | Path, tokenizer: Tokenizer, need_logprobs: bool = False
) -> dict[str, list[Completion]]:
    """Return the samples of a file by their question, in the order of the file.

    The rows are those of rollouts.jsonl or of what eval saves: `question` and `text`, and where
    they are known `tokens` (`ids` in the latter), `logprobs` and `finish_reason`. ValueError
    names the row that lacks what is needed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of samples {path}")
    samples: dict[str, list[Completion]] = {}
    for place, record in read_records(Path(path)):
        try:
            question, completion = _sample(record, tokenizer, need_logprobs)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        samples.setdefault(question.strip(), []).append(completion)
    return samples


def _sample(
    record: Any, tokenizer: Tokenizer, need_logprobs: bool
) -> tuple[str, Completion]:
    fields = record if isinstance(record, dict) else {}
    question, text = (fields.get(name) for name in ("question", "text"))
    reason = fields.get("finish_reason", "eos")
    if not (isinstance(question, str) and isinstance(text, str) and reason in REASONS):
        raise ValueError(
            "a sample needs the texts `question` and `text`, and `finish_reason` is one of "
            f"{', '.join(REASONS)}"
        )
    if "hint" in fields:
        raise ValueError(
            "the sample was told a hint, which the question alone does not have: leave out the "
            "rows with `hint`"
        )
    completion = certain(text, tokenizer, reason)
    tokens = fields.get("ids", fields.get("tokens"))
    logprobs = fields.get("logprobs")
    if spells(tokenizer, tokens, text, reason):
        completion = replace(completion, tokens=tokens)
    else:
        logprobs = None
    tokens = completion.tokens
    if not tokens:
        raise ValueError("the sample is empty")
    if isinstance(logprobs, list) and len(logprobs) == len(tokens):
        known = list(map(float, logprobs))
    elif need_logprobs:
        raise ValueError(
            "no logprobs of this tokenizer's tokens, which algorithm.old_logprobs = "
            '"sampler" and sampler_correction need'
        )
    else:
        known = [0.0] * len(tokens)
    return question, replace(completion, logprobs=known, sampling_logprobs=known)


def spells(tokenizer: Tokenizer, tokens: Any, text: str, reason: str) -> bool:
    """Return whether the tokens of a sample are this tokenizer's: whether they make its text."""
    known = range(tokenizer.vocab_size)
    if not isinstance(tokens, list) or not all(
        type(token) is int and token in known for token in tokens
    ):
        return False
    decoded = tokenizer.decode(tokens)
    return decoded.startswith(text) if reason == "stop" else decoded == text


def certain(text: str, tokenizer: Tokenizer, finish_reason: str = "eos") -> Completion:
    """Return a text as a completion that ends with the eos, or was cut off ("length")."""
    tokens = encode_response(tokenizer, text)
    if finish_reason != "length":
        tokens = [*tokens, tokenizer.eos_id]
    logprobs = [0.0] * len(tokens)
    return Completion(0, 0, tokens, logprobs, logprobs, text, finish_reason)


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text that goes on after a prompt.

    Tokenizers of SentencePiece's kind put a space before a text, which within a text is not
    there: these are the tokens that the text has on a line of its own, if they spell it, or
    after a stop, as a text does that begins with a line end.
    """
    alone = tokenizer.encode(text)
    for before in ("\n", ".") if _adds_space(tokenizer) else ():
        after = _after(before, tokenizer, text)
        if tokenizer.decode(after) == tokenizer.decode(alone):
            return after
    return alone


@lru_cache(maxsize=4)
def _adds_space(tokenizer: Tokenizer) -> bool:
    return _after("\n", tokenizer, "a") != tokenizer.encode("a")


def _after(before: str, tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(before + text)[len(tokenizer.encode(before)) :]
