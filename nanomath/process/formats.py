"""The published formats of process reward models: how a question and steps become tokens, and
where the scores stand.

    math_shepherd         "question Step 1: .. ки\\nStep 2: .. ки"; logits of "-" and "+" at each ки
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from nanomath.models.tokenizer import Tokenizer
from nanomath.models.transformer import ModelConfig, Transformer

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # what Qwen's was trained with
LABELS = {
    "id2label": {"0": "wrong", "1": "right"},
    "label2id": {"wrong": 0, "right": 1},
    "num_labels": 2,
}


class Format(Protocol):
    """`lay_out` and `logits` of a kind of PRM, and what stands in its files."""

    def check(self, tokenizer: Tokenizer) -> None:
        """ValueError where the tokenizer lacks what the format needs."""

    def lay_out(
        self, tokenizer: Tokenizer, question: str, steps: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        """Tokens, and the places among them of the steps' scores."""

    def head(self, config: ModelConfig) -> nn.Module | None:
        """What stands in place of the lm_head, with fresh weights; None where that is used
        itself.
        """

    def logits(self, model: Transformer, tokenizer: Tokenizer, states: Tensor) -> Tensor:
        """[n, 2] of "wrong" and "right", float32, from the states [n, D] at the places."""

    def config_keys(self, architecture: str) -> dict[str, Any]:
        """What config.json says of it; `architecture` is the family's name, as "Llama"."""


@dataclass(frozen=True)
class MathShepherd:
    """A causal language model that says "+" or "-" after each step."""

    marker: str = "ки"
    right: str = "+"
    wrong: str = "-"

    def check(self, tokenizer: Tokenizer) -> None:
        wrong, right = self._signs(tokenizer)
        if wrong == right:
            raise ValueError(
                f"the tokenizer has no tokens of their own for {self.right!r} and {self.wrong!r}"
            )

    def lay_out(
        self, tokenizer: Tokenizer, question: str, steps: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        text = f"{question} "
        ends = []
        for number, step in enumerate(steps, start=1):
            step = step.replace(self.marker, "").strip()
            numbered = (
                step if re.match(rf"Step {number}\b", step) else f"Step {number}: {step}"
            )
            text += f"{numbered} {self.marker}"
            ends.append(len(text))
            text += "\n" * (number < len(steps))
        ids, spans = tokenizer.offsets(text)
        start = beginning(tokenizer)
        crossing = [
            max(i for i, (begin, _) in enumerate(spans) if begin < end) for end in ends
        ]
        return start + ids, [len(start) + i for i in crossing]

    def head(self, config: ModelConfig) -> None:
        return None

    def logits(self, model: Transformer, tokenizer: Tokenizer, states: Tensor) -> Tensor:
        weight = model.lm_head.weight[self._signs(tokenizer)]
        return nn.functional.linear(states, weight).float()

    def config_keys(self, architecture: str) -> dict[str, Any]:
        return {"prm_format": "math_shepherd"}

    def _signs(self, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.encode(f"a {sign}")[-1] for sign in (self.wrong, self.right)]


@dataclass(frozen=True)
class Qwen:
    """A two-layer head at a special token after each step of a chat's answer."""

    marker: str = "<extra_0>"

    def check(self, tokenizer: Tokenizer) -> None:
        if tokenizer.backend.token_to_id(self.marker) is None:
            raise ValueError(
                f"the tokenizer has no token {self.marker!r}, which ends a step in this format"
            )

    def lay_out(
        self, tokenizer: Tokenizer, question: str, steps: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        answer = "".join(step.replace(self.marker, "").strip() + self.marker for step in steps)
        question = question.replace(self.marker, "")
        if tokenizer.chat_template is None:
            ids = tokenizer.encode(f"{question}\n{answer}", add_special_tokens=True)
        else:
            chat = [("system", SYSTEM), ("user", question), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in chat]
            ids = tokenizer.encode(
                tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            )
        marker = tokenizer.backend.token_to_id(self.marker)
        return ids, [i for i, token in enumerate(ids) if token == marker]

    def head(self, config: ModelConfig) -> nn.Module:
        width = config.hidden_size
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def logits(self, model: Transformer, tokenizer: Tokenizer, states: Tensor) -> Tensor:
        return model.score(states).float()

    def config_keys(self, architecture: str) -> dict[str, Any]:
        return {
            "architectures": [f"{architecture}ForProcessRewardModel"],
            "prm_format": "qwen",
            **LABELS,
        }


@dataclass(frozen=True)
class TokenClassification:
    """A linear head at the end of a separator after each step."""

    separator: str = "\n"

    def check(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.encode(self.separator):
            raise ValueError(
                f"the tokenizer makes no token of the separator {self.separator!r}"
            )

    def lay_out(
        self, tokenizer: Tokenizer, question: str, steps: Sequence[str]
    ) -> tuple[list[int], list[int]]:
        ids = beginning(tokenizer) + tokenizer.encode(question)
        places = []
        for step in steps:
            ids += tokenizer.encode(step.strip()) + tokenizer.encode(self.separator)
            places.append(len(ids) - 1)
        return ids, places

    def head(self, config: ModelConfig) -> nn.Module:
        return nn.Linear(config.hidden_size, 2)

    def logits(self, model: Transformer, tokenizer: Tokenizer, states: Tensor) -> Tensor:
        return model.score(states).float()

    def config_keys(self, architecture: str) -> dict[str, Any]:
        kind = {
            "architectures": [f"{architecture}ForTokenClassification"],
            "prm_format": "token_classification",
        }
        return {**kind, "prm_separator": self.separator, **LABELS}


FORMATS = {
    "math_shepherd": MathShepherd,
    "qwen": Qwen,
    "token_classification": TokenClassification,
}


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before plain text: the beginning-of-sequence token of Llama,
    nothing for Qwen.
    """
    return [
        token
        for token in tokenizer.encode("", add_special_tokens=True)
        if token not in tokenizer.eos_ids
    ]
