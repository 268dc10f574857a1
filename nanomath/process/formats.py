"""The published formats of process reward models: how a question and steps become tokens, and
where the scores stand.

    math_shepherd         "question Step 1: .. ки\\nStep 2: .. ки"; logits of "-" and "+" at
                          each ки
    qwen                  a chat's answer, <extra_0> after each step; there a head of two layers
    token_classification  question, then each step and a separator; at its end a linear head

Math-Shepherd: arXiv 2312.08935. Qwen2.5-Math-PRM: arXiv 2501.07301. The last is what trl's
PRMTrainer writes and any `..ForTokenClassification` reads. Every format gives two logits for
each step, of "wrong" and of "right", and p = softmax[right].

A marker that a policy writes into its own solution is taken out: it would be scored as a step
that is not there.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from nanomath.models.tokenizer import Tokenizer
from nanomath.models.transformer import ModelConfig, Transformer

# What Qwen's was trained with.
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


# The tokens of a solution, and the places among them of the steps' scores.
LaidOut = tuple[list[int], list[int]]


class Format:
    """What the kinds of PRM differ in; what stands here holds for those with a head of their own.

    name: the format's key in FORMATS. architecture: what the architecture's name in
    config.json ends with, after that of the family, such as "Llama".
    """

    name: ClassVar[str]
    architecture: ClassVar[str]

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise a ValueError where the tokenizer lacks what the format needs."""
        raise NotImplementedError

    def lay_out(
        self, tokenizer: Tokenizer, question: str, steps: Sequence[str]
    ) -> LaidOut:
        """Return the tokens of a solution, and where among them the scores stand."""
        raise NotImplementedError

    def head(self, config: ModelConfig) -> nn.Module | None:
        """Return what stands in place of the lm_head; None where the lm_head itself is used."""
        raise NotImplementedError

    def logits(
        self, model: Transformer, tokenizer: Tokenizer, states: Tensor
    ) -> Tensor:
        """Return [n, 2] of "wrong" and "right", float32, from the states [n, D] at the places."""
        return model.score(states).float()

    def config_keys(self, family: str) -> dict[str, Any]:
        """Return what config.json says of the format; `family` is a name such as "Llama"."""
        return {
            "architectures": [family + self.architecture],
            "prm_format": self.name,
            "id2label": {"0": "wrong", "1": "right"},
            "label2id": {"wrong": 0, "right": 1},
            "num_labels": 2,
        }


@dataclass(frozen=True)
class MathShepherd(Format):
    """A causal language model that says "+" or "-" after each step."""

    name = "math_shepherd"
    architecture = "ForCausalLM"
    marker: str = "ки"
    right: str = "+"
    wrong: str = "-"

    def check(self, tokenizer: Tokenizer) -> None:
        if len(set(self._signs(tokenizer))) == 1:
            raise ValueError(
                f"the tokenizer has no tokens of their own for {self.right!r} and {self.wrong!r}"
            )

    def lay_out(
        self, tokenizer: Tokenizer, question: str, steps: Sequence[str]
    ) -> LaidOut:
        text = f"{question} "
        ends = []
        for number, step in enumerate(steps, start=1):
            step = step.replace(self.marker, "").strip()
            if not re.match(rf"Step {number}\b", step):
                step = f"Step {number}: {step}"
            text += f"{step} {self.marker}"
            ends.append(len(text))
            text += "\n" * (number < len(steps))
        ids, spans = tokenizer.offsets(text)
        start = beginning(tokenizer)
        begins = [begin for begin, _ in spans]
        return start + ids, [len(start) + bisect_left(begins, end) - 1 for end in ends]

    def head(self, config: ModelConfig) -> None:
        return None

    def logits(
        self, model: Transformer, tokenizer: Tokenizer, states: Tensor
    ) -> Tensor:
        weight = model.lm_head.weight[self._signs(tokenizer)]
        return nn.functional.linear(states, weight).float()

    def config_keys(self, family: str) -> dict[str, Any]:
        return {"prm_format": self.name}

    def _signs(self, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.encode(f"a {sign}")[-1] for sign in (self.wrong, self.right)]


@dataclass(frozen=True)
class Qwen(Format):
    """A two-layer head at a special token after each step of a chat's answer."""

    name = "qwen"
    architecture = "ForProcessRewardModel"
    marker: str = "<extra_0>"

    def check(self, tokenizer: Tokenizer) -> None:
        if tokenizer.backend.token_to_id(self.marker) is None:
            raise ValueError(
                f"the tokenizer has no token {self.marker!r}, which ends a step in this format"
            )

    def lay_out(
        self, tokenizer: Tokenizer, question: str, steps: Sequence[str]
    ) -> LaidOut:
        answer = "".join(
            step.replace(self.marker, "").strip() + self.marker for step in steps
        )
        question = question.replace(self.marker, "")
        if tokenizer.chat_template is None:
            ids = tokenizer.encode(f"{question}\n{answer}", add_special_tokens=True)
        else:
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            chat = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            ids = tokenizer.encode(chat)
        marker = tokenizer.backend.token_to_id(self.marker)
        return ids, [i for i, token in enumerate(ids) if token == marker]

    def head(self, config: ModelConfig) -> nn.Module:
        width = config.hidden_size
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


@dataclass(frozen=True)
class TokenClassification(Format):
    """A linear head at the end of a separator after each step."""

    name = "token_classification"
    architecture = "ForTokenClassification"
    separator: str = "\n"

    def check(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.encode(self.separator):
            raise ValueError(
                f"the tokenizer makes no token of the separator {self.separator!r}"
            )

    def lay_out(
        self, tokenizer: Tokenizer, question: str, steps: Sequence[str]
    ) -> LaidOut:
        ids = beginning(tokenizer) + tokenizer.encode(question)
        places = []
        for step in steps:
            ids += tokenizer.encode(step.strip()) + tokenizer.encode(self.separator)
            places.append(len(ids) - 1)
        return ids, places

    def head(self, config: ModelConfig) -> nn.Module:
        return nn.Linear(config.hidden_size, 2)

    def config_keys(self, family: str) -> dict[str, Any]:
        return {**super().config_keys(family), "prm_separator": self.separator}


def beginning(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer puts before plain text: Llama's first token, nothing for Qwen."""
    special = tokenizer.encode("", add_special_tokens=True)
    return [token for token in special if token not in tokenizer.eos_ids]


FORMATS = {format.name: format for format in (MathShepherd, Qwen, TokenClassification)}
