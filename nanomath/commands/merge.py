"""Write a model as a Hugging Face directory: an adapter is merged into its base,
W + (alpha / r) B A.

    python -m nanomath merge MODEL DIRECTORY [key=value ...]

    python -m nanomath merge runs/tiny-grpo-lora models/tiny-grpo
    python -m nanomath merge downloads/adapter models/merged model.base=Qwen/Qwen2.5-0.5B-Instruct

MODEL is what model.path may be anywhere: a run, an adapter that nanomath or peft saved, a hub
id. The weights are written in model.dtype, float32 unless it is set: in bfloat16 most of a small
update is rounded away.
"""

from __future__ import annotations

from pathlib import Path

from nanomath import settings
from nanomath.commands.main import operands
from nanomath.config import parse_arguments
from nanomath.models import save_model
from nanomath.training.build import build_model


def main(argv: list[str]) -> int:
    (path, directory), words = operands(
        argv,
        "merge needs a model and a new directory: python -m nanomath merge MODEL DIRECTORY",
    )
    words = [f"model.path={path}", *words]
    config, _ = parse_arguments(settings.MergeConfig, words, __doc__)
    target = Path(directory)
    if target.exists():
        raise FileExistsError(f"{target} exists: name a new directory")
    save_model(*build_model(config.model, seed=0), target)
    print(f"{target} holds the weights of {config.model.path}")
    return 0
