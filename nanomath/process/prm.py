"""Process reward models: a number in [0, 1] for every step of a solution, given the question
and the steps before.

    p_k = P(step k is right | question, steps 1 .. k)

Steps go in as text, so the policy's tokenizer and the PRM's need not agree. All steps of a
solution are scored in one forward pass, because a causal model's state after step k has seen
nothing later; solutions are batched by length, and the question of several is computed once.

A scorer is any function from solutions to the scores of their steps: a `PRM`, the exact oracle
of the embedded world, or a control. A result that a control also gets says nothing about the
PRM.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from nanomath.data.files import read_optional
from nanomath.data.problem import Problem
from nanomath.data.world import check_steps
from nanomath.models.batches import (
    Example,
    lay_out,
    layout_states,
)
from nanomath.models.directory import resolve_model_dir
from nanomath.models.hf import load_model, replace_head
from nanomath.models.tokenizer import Tokenizer, load_tokenizer
from nanomath.models.transformer import Transformer
from nanomath.process.formats import (
    FORMATS,
    Format,
    LaidOut,
    MathShepherd,
    TokenClassification,
)
from nanomath.process.states import states_at, with_common_prompts

Solution = tuple[str, Sequence[str]]  # a question and the steps of a solution, as text
# A number in [0, 1] for each step.
StepScorer = Callable[[Sequence[Solution]], list[list[float]]]


@dataclass
class PRM:
    """A model with the head of its format; `prm(solutions)` scores steps.

    token_budget: tokens that are computed at once.
    """

    model: Transformer
    tokenizer: Tokenizer
    format: Format
    token_budget: int = 16384

    def __post_init__(self) -> None:
        self.format.check(self.tokenizer)
        architecture = self.model.config.to_hf()["architectures"][0]
        family = architecture.removesuffix("ForCausalLM")
        self.model.hf_keys = self.format.config_keys(family)

    def __call__(self, solutions: Sequence[Solution]) -> list[list[float]]:
        """Return the scores of all steps, 0 for a step that ends beyond the context.

        ValueError where a solution has no steps.
        """
        scores = [[0.0] * len(steps) for _, steps in solutions]
        read = []  # by solution with a step that fits: its scores, question, tokens, places
        for number, (question, steps) in enumerate(solutions):
            tokens, places = self.lay_out(number, question, steps, whole=False)
            if places:
                read.append((scores[number], question, tokens, places))
        if not read:
            return scores
        mine, questions, tokens, places = zip(*read, strict=True)
        examples = with_common_prompts(tokens, places, questions)
        for rows, states in states_at(self.model, examples, places, self.token_budget):
            logits = self.format.logits(self.model, self.tokenizer, states)
            right = logits.softmax(dim=1)[:, 1].split([len(places[i]) for i in rows])
            for i, found in zip(rows, right, strict=True):
                mine[i][: len(found)] = found.tolist()
        return scores

    def lay_out(
        self, number: int, question: str, steps: Sequence[str], whole: bool = True
    ) -> LaidOut:
        """Return the tokens and the places of solution `number`.

        A solution that is longer than the context is a ValueError; if it need not be `whole`,
        the function returns what fits and warns.
        """
        name = f"solution {number} of {question[:40]!r}"
        if not steps:
            raise ValueError(f"{name} is empty: there is no step to score")
        tokens, places = self.format.lay_out(self.tokenizer, question, steps)
        if len(places) != len(steps):
            raise ValueError(f"{name}: {len(steps)} steps gave {len(places)} scores")
        context = self.model.config.max_positions
        if len(tokens) <= context:
            return tokens, places
        if whole:
            raise ValueError(
                f"{name} has {len(tokens)} tokens: the PRM's context holds {context}"
            )
        warnings.warn(
            f"steps that end beyond the {context} tokens of the PRM's context score 0",
            stacklevel=2,
        )
        return tokens[:context], [place for place in places if place < context]

    def logits(
        self, examples: Sequence[Example], places: Sequence[list[int]]
    ) -> Tensor:
        """Return [n, 2] of the n steps of some solutions in order, with gradient."""
        layout, where = lay_out(examples)
        at = torch.cat([w[own] for w, own in zip(where, places, strict=True)])
        states = layout_states(self.model, layout.to(self.model.device))
        return self.format.logits(
            self.model, self.tokenizer, states[at.to(states.device)]
        )


def is_prm(path_or_hub_id: str | PathLike[str]) -> bool:
    """Return whether a model has a head for scores in place of one for tokens."""
    kind = _kind_of(read_optional(resolve_model_dir(path_or_hub_id) / "config.json"))
    return kind not in (None, MathShepherd)


def load_prm(
    path_or_hub_id: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PRM:
    """Load the PRM in a Hugging Face directory, whose config.json tells its format.

    A causal language model is a PRM of Math-Shepherd's format. FileNotFoundError when a file is
    not there, ValueError when the model is no PRM or lacks its head.
    """
    directory = resolve_model_dir(path_or_hub_id)
    format = _format_of(read_optional(directory / "config.json"), str(directory))
    head = None if isinstance(format, MathShepherd) else format.head
    return PRM(
        load_model(directory, device, dtype, head), load_tokenizer(directory), format
    )


def _kind_of(config: dict) -> type[Format] | None:
    kinds = [
        kind
        for kind in FORMATS.values()
        if _architecture(config).endswith(kind.architecture)
    ]
    return kinds[0] if kinds else None


def _architecture(config: dict) -> str:
    return (config.get("architectures") or [""])[0]


def _format_of(config: dict, where: str) -> Format:
    kind = _kind_of(config)
    if kind is None:
        endings = ", ".join(f"..{kind.architecture}" for kind in FORMATS.values())
        raise ValueError(
            f"{where}: {_architecture(config)!r} is no PRM: one of {endings}"
        )
    labels = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    if kind is not MathShepherd and labels != 2:
        raise ValueError(
            f"{where}: the head has {labels} labels, a PRM's has two: wrong and right"
        )
    if kind is TokenClassification:
        return TokenClassification(config.get("prm_separator", "\n"))
    return kind()


def new_prm(
    model: Transformer, tokenizer: Tokenizer, format: Format, seed: int = 0
) -> PRM:
    """Make a PRM to be trained of any causal language model.

    The last layer of its fresh head is zero, so that p = 1/2.
    """
    head = format.head(model.config)
    if head is not None:
        generator = torch.Generator().manual_seed(seed)
        layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
        for layer in layers:
            nn.init.normal_(layer.weight, 0.0, layer.in_features**-0.5, generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(layers[-1].weight)
        replace_head(model, head.to(model.device, model.dtype))
    return PRM(model, tokenizer, format)


# --- The oracle, and controls ----------------------------------------------------------------


def oracle_scores(
    problems: Iterable[Problem], solutions: Sequence[Solution]
) -> list[list[float]]:
    """Score right steps 1 and wrong ones 0, for problems of the embedded world.

    A step may be made of several of the oracle's: it is right if all of them are. ValueError
    for a question that none of the `problems` asks.
    """
    known = {problem.question: problem for problem in problems}
    found = []
    for question, steps in solutions:
        if question not in known:
            raise ValueError(f"the oracle knows no problem that asks {question[:40]!r}")
        scores = []
        text = ""
        for step in steps:
            text += step.strip() + "\n\n"
            verdicts = check_steps(known[question], text)
            scores.append(float(bool(verdicts) and all(verdicts)))
        found.append(scores)
    return found


def random_scores(solutions: Sequence[Solution], seed: int = 0) -> list[list[float]]:
    """Score uniformly at random, a fixed function of seed, question and the steps so far: a
    control.
    """

    found = []
    for question, steps in solutions:
        text = f"{seed}\0{question}"
        scores = []
        for step in steps:
            text += f"\0{step}"
            digest = hashlib.blake2b(
                text.encode("utf-8", "surrogatepass"), digest_size=8
            )
            scores.append(int(digest.hexdigest(), 16) / 2**64)
        found.append(scores)
    return found


def length_scores(
    solutions: Sequence[Solution], longest: int = 80
) -> list[list[float]]:
    """Score a step by its share of `longest` characters, whatever it says: a control."""
    return [
        [min(1.0, len(step.strip()) / longest) for step in steps]
        for _, steps in solutions
    ]
