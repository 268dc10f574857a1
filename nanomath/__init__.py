"""nanomath: teaching small language models mathematics, from scratch and in the open.

    model = nanomath.load_model("runs/tiny-sft")
    tokenizer = nanomath.load_tokenizer("runs/tiny-sft")
    out = nanomath.Sampler(model, tokenizer).generate([tokenizer.encode("1+1=")], n=8)

The names below are loaded when first used, so that `import nanomath` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_model": "nanomath.models",
    "save_model": "nanomath.models",
    "load_tokenizer": "nanomath.models",
    "Sampler": "nanomath.rollout",
    "Completion": "nanomath.rollout",
    "extract_answer": "nanomath.rewards",
    "answers_equal": "nanomath.rewards",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nanomath' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
