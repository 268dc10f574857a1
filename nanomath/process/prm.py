"""Process reward models: a number in [0, 1] for every step of a solution, given the question
and the steps before.

    p_k = P(step k is right | question, steps 1 .. k)

Steps go in as text, so the policy's tokenizer and the PRM's need not agree. All steps of a
solution are scored in one forward pass, because a causal model's state after step k has seen
nothing later; solutions are batched by length, and the question of several is computed once.

A scorer is anything with `score_all(solutions)`, a list of scores for each (question, steps):
a `PRM`, the exact oracle of the embedded world, or a control. A result that a control also
gets says nothing about the PRM.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Protocol

import torch
from torch import Tensor, nn

from nanomath.data.files import read_json
from nanomath.data.problem import Problem
from nanomath.data.world import check_steps
from nanomath.models.directory import resolve_model_dir
from nanomath.models.hf import load_model, replace_head
from nanomath.models.shared_prefix import padded, states_at
from nanomath.models.tokenizer import Tokenizer, load_tokenizer
from nanomath.models.transformer import Transformer
from nanomath.process.formats import FORMATS, Format, MathShepherd, TokenClassification

Solution = tuple[str, Sequence[str]]  # a question and the steps of a solution, as text


class StepScorer(Protocol):
    """Scores steps; `PRM` and the classes at the end of this file."""

    def score_all(self, solutions: Sequence[Solution]) -> list[list[float]]:
        """A number in [0, 1] for each step of each solution."""


@dataclass
class PRM:
    """A model with the head of its format. token_budget: padded tokens that are computed at
    once.
    """

    model: Transformer
    tokenizer: Tokenizer
    format: Format
    token_budget: int = 16384

    def __post_init__(self) -> None:
        self.format.check(self.tokenizer)
        architecture = self.model.config.to_hf()["architectures"][0].removesuffix(
            "ForCausalLM"
        )
        self.model.hf_keys = self.format.config_keys(architecture)

    def score_all(self, solutions: Sequence[Solution]) -> list[list[float]]:
        """All steps of all solutions, 0 for one that ends beyond the context. ValueError where
        there are no steps.
        """
        laid_out = [
            self.lay_out(number, *solution, whole=False)
            for number, solution in enumerate(solutions)
        ]
        read = [i for i, (_, places) in enumerate(laid_out) if places]
        tokens = [laid_out[i][0] for i in read]
        places = [laid_out[i][1] for i in read]
        questions = [solutions[i][0] for i in read]
        scores = [[0.0] * len(steps) for _, steps in solutions]
        for rows, states in states_at(
            self.model, tokens, places, questions, self.token_budget
        ):
            found = (
                self.format.logits(self.model, self.tokenizer, states)
                .softmax(dim=1)[:, 1]
                .tolist()
            )
            for i in rows:
                count = len(places[i])
                scores[read[i]][:count] = found[:count]
                found = found[count:]
        return scores

    def lay_out(
        self, number: int, question: str, steps: Sequence[str], whole: bool = True
    ) -> tuple[list[int], list[int]]:
        """Tokens and places of solution `number`; of one that is longer than the context, a
        ValueError, or if it need not be `whole` what fits, and a warning.
        """
        if not steps:
            raise ValueError(
                f"solution {number} of {question[:40]!r} is empty: there is no step to score"
            )
        tokens, places = self.format.lay_out(self.tokenizer, question, steps)
        if len(places) != len(steps):
            raise ValueError(
                f"solution {number} of {question[:40]!r}: {len(steps)} steps gave {len(places)} scores"
            )
        if len(tokens) <= (context := self.model.config.max_positions):
            return tokens, places
        if whole:
            raise ValueError(
                f"solution {number} of {question[:40]!r} has {len(tokens)} tokens: the PRM's context holds {context}"
            )
        warnings.warn(
            f"steps that end beyond the {context} tokens of the PRM's context score 0",
            stacklevel=2,
        )
        return tokens[:context], [place for place in places if place < context]

    def logits(self, laid_out: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """[n, 2] of the n steps of some solutions in order, with gradient."""
        tokens = padded([tokens for tokens, _ in laid_out], self.model.device)
        row = [i for i, (_, places) in enumerate(laid_out) for _ in places]
        column = [place for _, places in laid_out for place in places]
        return self.format.logits(
            self.model, self.tokenizer, self.model.hidden(tokens)[row, column]
        )


KINDS = {  # what the name of an architecture ends with
    "ForCausalLM": "math_shepherd",
    "ForProcessRewardModel": "qwen",
    "ForTokenClassification": "token_classification",
}


def is_prm(path_or_hub_id: str | PathLike[str]) -> bool:
    """Whether a model has a head for scores in place of one for tokens."""
    architecture = _architecture(read_json(resolve_model_dir(path_or_hub_id) / "config.json"))
    return architecture.endswith(tuple(set(KINDS) - {"ForCausalLM"}))


def load_prm(
    path_or_hub_id: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PRM:
    """The PRM in a Hugging Face directory, whose config.json tells its format: a causal
    language model is one as Math-Shepherd's. FileNotFoundError when a file is not there,
    ValueError when it is no PRM or lacks its head.
    """
    directory = resolve_model_dir(path_or_hub_id)
    format = _format_of(read_json(directory / "config.json"), str(directory))
    head = None if isinstance(format, MathShepherd) else format.head
    return PRM(load_model(directory, device, dtype, head), load_tokenizer(directory), format)


def _format_of(config: dict, where: str) -> Format:
    architecture = _architecture(config)
    name = next(
        (kind for suffix, kind in KINDS.items() if architecture.endswith(suffix)), None
    )
    if name is None:
        raise ValueError(
            f"{where}: {architecture!r} is no PRM: one of {', '.join('..' + suffix for suffix in KINDS)}"
        )
    if (
        name != "math_shepherd"
        and (labels := len(config.get("id2label") or ()) or config.get("num_labels", 2)) != 2
    ):
        raise ValueError(
            f"{where}: the head has {labels} labels, a PRM's has two: wrong and right"
        )
    return (
        TokenClassification(config.get("prm_separator", "\n"))
        if name == "token_classification"
        else FORMATS[name]()
    )


def _architecture(config: dict) -> str:
    return (config.get("architectures") or [""])[0]


def new_prm(model: Transformer, tokenizer: Tokenizer, format: Format, seed: int = 0) -> PRM:
    """A PRM to be trained, from any causal language model: a fresh head whose last layer is
    zero, so that p = 1/2.
    """
    head = format.head(model.config)
    if head is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            *hidden, last = (layer for layer in head.modules() if isinstance(layer, nn.Linear))
            for layer in hidden:
                layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
            last.weight.zero_(), last.bias.zero_()
        replace_head(model, head.to(model.device, model.dtype))
    return PRM(model, tokenizer, format)


# --- The oracle, and controls ----------------------------------------------------------------


class Oracle:
    """1 for a right step and 0 for a wrong one, of problems of the embedded world, which it
    knows by their question.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = {problem.question: problem for problem in problems}

    def score_all(self, solutions: Sequence[Solution]) -> list[list[float]]:
        return [self._score(question, steps) for question, steps in solutions]

    def _score(self, question: str, steps: Sequence[str]) -> list[float]:
        """What a step is made of may be several of the oracle's: it is right if all of them
        are.
        """
        if question not in self.problems:
            raise ValueError(f"the oracle knows no problem that asks {question[:40]!r}")
        scores = []
        text = ""
        for step in steps:
            text += step.strip() + "\n\n"
            verdicts = check_steps(self.problems[question], text)
            scores.append(float(bool(verdicts) and all(verdicts)))
        return scores


class RandomScores:
    """A control: uniform numbers, a fixed function of seed, question and the steps so far."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score_all(self, solutions: Sequence[Solution]) -> list[list[float]]:
        return [
            [self._draw(question, steps[: k + 1]) for k in range(len(steps))]
            for question, steps in solutions
        ]

    def _draw(self, question: str, steps: Sequence[str]) -> float:
        key = "\0".join((str(self.seed), question, *steps)).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


class LengthScores:
    """A control: a step is worth its share of `longest` characters, whatever it says."""

    def __init__(self, longest: int = 80) -> None:
        self.longest = longest

    def score_all(self, solutions: Sequence[Solution]) -> list[list[float]]:
        return [
            [min(1.0, len(step.strip()) / self.longest) for step in steps]
            for _, steps in solutions
        ]
