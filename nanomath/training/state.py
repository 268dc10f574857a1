"""Checkpoints: everything a run needs to go on, in one directory that transformers can load as a model.

checkpoints/step-N/ is the model after N optimizer steps in Hugging Face layout, with trainer.safetensors (Adam's
moments, float32 masters) and trainer.json beside it. It is written under another name and renamed when complete.
Nothing else has to be saved: every random draw of a run is a function of its seed and the step.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanomath.models.checkpoint import replace_directory, save_model
from nanomath.models.tokenizer import Tokenizer
from nanomath.models.transformer import Transformer
from nanomath.training.optimizer import Optimizer


def save_checkpoint(
    directory: Path, step: int, model: Transformer, tokenizer: Tokenizer, optimizer: Optimizer, **facts: Any
) -> Path:
    """Write step-`step` into `directory`; `facts` are kept in trainer.json. Returns its path."""
    target = directory / f"step-{step}"
    with replace_directory(target) as scratch:
        save_model(model, tokenizer, scratch)
        save_file({name: t.contiguous() for name, t in optimizer.state().items()}, scratch / "trainer.safetensors")
        (scratch / "trainer.json").write_text(json.dumps({"step": step, **facts}, indent=2) + "\n", encoding="utf-8")
    return target


def load_checkpoint(directory: Path, optimizer: Optimizer) -> dict[str, Any]:
    """Put the optimizer where the checkpoint left it; returns trainer.json. ValueError when a file is damaged."""
    try:
        facts = json.loads((directory / "trainer.json").read_text(encoding="utf-8"))
        optimizer.load_state(load_file(directory / "trainer.safetensors"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory}: damaged trainer state: {error}") from None
    return facts


def checkpoint_steps(directory: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their step, in rising order."""
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in directory.glob("step-*"))
    steps = {int(match[1]): path for match, path in found if match and (path / "trainer.json").is_file()}
    return dict(sorted(steps.items()))


def prune_checkpoints(directory: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; 0 keeps them all."""
    if keep_last > 0:
        for path in list(checkpoint_steps(directory).values())[:-keep_last]:
            shutil.rmtree(path)
