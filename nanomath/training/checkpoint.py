"""Checkpoints: everything a run needs to go on, in one directory that transformers can load as
a model, or peft as an adapter.

checkpoints/step-N/ is the model after N optimizer steps in Hugging Face layout, or the adapter
that is trained in its place in peft's, with trainer.safetensors (Adam's moments, float32
masters) and trainer.json beside it. It is written under another name and renamed when complete.
Nothing else has to be saved: every random draw of a run is a function of its seed and the step.
checkpoints/best is a link to the best of them, for runs that keep it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanomath.data.files import replacing
from nanomath.models.directory import complete_steps
from nanomath.models.hf import save_model
from nanomath.models.lora import LoRA
from nanomath.models.tokenizer import Tokenizer
from nanomath.models.transformer import Transformer
from nanomath.training import ranks
from nanomath.training.optimizer import Optimizer
from nanomath.training.sharding import whole


def save_checkpoint(
    directory: Path,
    step: int,
    model: Transformer | LoRA,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    others: Mapping[str, Optimizer] | None = None,
    **facts: Any,
) -> Path:
    """Write checkpoint step-`step` into `directory`, and return its path.

    `facts` are kept in trainer.json. others: by name, the optimizers of other modules in
    training, made to keep their weights. All ranks must call it together, to put sharded
    weights together; one of them writes.
    """
    target = directory / f"step-{step}"
    tensors = optimizer.state()
    for name, other in (others or {}).items():
        tensors |= {f"{name}/{key}": tensor for key, tensor in other.state().items()}
    with whole(model):
        if ranks.is_main():
            with replacing(target) as scratch:
                if isinstance(model, LoRA):
                    model.save(scratch)
                else:
                    save_model(model, tokenizer, scratch)
                save_file(
                    {name: t.contiguous() for name, t in tensors.items()},
                    scratch / "trainer.safetensors",
                )
                text = json.dumps({"step": step, **facts}, indent=2) + "\n"
                (scratch / "trainer.json").write_text(text, encoding="utf-8")
    return target


def load_checkpoint(
    directory: Path, optimizer: Optimizer, name: str = ""
) -> dict[str, Any]:
    """Put the optimizer, or the one saved beside it as `name`, where the checkpoint left
    it.

    Returns the content of trainer.json. ValueError when a file is damaged or the state of
    another model.
    """
    prefix = f"{name}/" if name else ""
    try:
        facts = json.loads((directory / "trainer.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "trainer.safetensors")
        optimizer.load_state(
            {
                key.removeprefix(prefix): t
                for key, t in tensors.items()
                if key.startswith(prefix)
            }
        )
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory}: damaged trainer state: {error}") from None
    return facts


def checkpoint_steps(directory: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run by their step, in rising order."""
    return complete_steps(directory, "trainer.json")


def prune_checkpoints(directory: Path, keep_last: int, best: int | None = None) -> None:
    """Delete all but the newest `keep_last` checkpoints and step-`best`; 0 keeps them all."""
    steps = checkpoint_steps(directory)
    for step in list(steps)[:-keep_last] if keep_last > 0 else ():
        # Renamed first: half a checkpoint must not look like one if we are killed meanwhile.
        if step != best:
            shutil.rmtree(
                steps[step].rename(directory / f".step-{step}.{os.getpid()}.old"),
                ignore_errors=True,
            )


def link_best(directory: Path, step: int) -> None:
    """Point the link `directory`/best to step-`step`; it is replaced in one moment."""
    scratch = directory / ".best.new"
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(f"step-{step}")
    scratch.replace(directory / "best")
