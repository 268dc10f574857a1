"""Run directories made by hand: what a training would have logged, with whatever texts and numbers
a test wants.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanomath import settings
from nanomath.config import to_toml
from nanomath.data.world import world_tokenizer

TOKENIZER = world_tokenizer()
TEXTS = ("1+1=2. The answer is \\boxed{2}.", "1+1=3. The answer is \\boxed{3}.")


def write_run(directory: Path, kind: type = settings.GRPOConfig, **files: Any) -> Path:
    """A run directory with its config, its tokenizer and FILE.jsonl for each keyword."""
    config = kind()
    config.run.name = directory.name
    for key, value in files.pop("config", {}).items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(to_toml(config), "utf-8")
    for name, records in files.items():
        write_lines(directory / f"{name}.jsonl", records)
    checkpoint = directory / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    TOKENIZER.save(str(checkpoint / "tokenizer.json"))
    return directory


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    # A surrogate by itself cannot be written as UTF-8, but can as an escape.
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text, "ascii")


def episode(
    step: int = 1, prompt: int = 0, sample: int = 0, **changed: Any
) -> dict[str, Any]:
    """One line of rollouts.jsonl: right where the sample's number is even."""
    text = changed.get("text", TEXTS[sample % 2])
    tokens = TOKENIZER.encode(
        text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False
    ).ids
    right = float(sample % 2 == 0)
    n = len(tokens)
    return {
        "step": step,
        "prompt": prompt,
        "problem": f"p{prompt}",
        "question": "What is 1+1?",
        "answer": "2",
        "sample": sample,
        "text": text,
        "finish_reason": "eos",
        "rewards": {"accuracy": right, "total": right},
        "prompt_tokens": [5, 6],
        "tokens": tokens,
        "advantages": [1.0 if right else -1.0] * n,
        "logprobs": [-0.25] * n,
        "gap": 0.0,
        "kl": 0.25,
        "entropy": [0.75] * n,
        "found": "2" if right else "3",
        **changed,
    }


def answers(step: int, right: list[bool], samples: int = 1) -> list[dict[str, Any]]:
    """Lines of heldout.jsonl."""
    return [
        {
            "step": step,
            "problem": f"h{i}",
            "question": "What is 1+1?",
            "gold": "2",
            "labels": {"difficulty": 1 + i % 2},
            "sample": k,
            "text": TEXTS[not ok],
            "answer": "2" if ok else "3",
            "right": ok,
            "finish_reason": "eos",
            "tokens": 9,
        }
        for i, ok in enumerate(right)
        for k in range(samples)
    ]


def drift_found(text: str = " so", reason: str = "weights: the shapes differ") -> dict:
    """A drift.json with one moved token and one layer."""
    number = {"mean": 0.125, "stderr": 0.01, "low": 0.0625, "high": 0.25}
    layer = {
        "layer": "embedding",
        "cka": 0.75,
        "distance": 3.0,
        "relative_distance": 0.5,
    }
    token = {"token": 7, "text": text, "kind": "logical", "count": 3}
    row = {"weights": 1024, "change": 0.01, "changed": 0.5, "effective_rank": 2.5}
    return {
        "asked": {"base": "runs/before", "tuned": "runs/after"},
        "meaning": {"k1": "an estimate", "cka": "alike", "change": "of weights"},
        "groups": {
            "all": {"responses": 4, "texts": 5, "k1": number, "cka": {"mean": 0.75}}
            | {"layers": [layer]},
            "kind=a": {"texts": 3, "cka": {"mean": 0.875}},
        },
        "moved": {
            "shares": {"logical": 1.0, "content": 0.0},
            "tokens": [token | {"mean_shift": 2.0, "score": 6.0}],
        },
        "weights": {"all": row, "layers": {"0": row}, "kinds": {"q_proj": row}},
        "refused": [reason],
    }
