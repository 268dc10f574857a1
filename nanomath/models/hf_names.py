"""Where the tensors of a Hugging Face checkpoint are in a model, which fuses some of them."""

from __future__ import annotations

from collections.abc import Iterator

from nanomath.models.transformer import Transformer


def hf_slices(model: Transformer) -> Iterator[tuple[str, str, int, int]]:
    """Yield (Hugging Face name, our parameter name, first row, last row + 1) of every tensor
    of a checkpoint.
    """
    c = model.config
    keys = c.num_kv_heads * c.head_dim
    width = c.intermediate_size
    fused = {
        "qkv_proj": {
            "q_proj": c.num_heads * c.head_dim,
            "k_proj": keys,
            "v_proj": keys,
        },
        "gate_up_proj": {"gate_proj": width, "up_proj": width},
    }
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        start = 0
        for part, rows in fused.get(module, {module: len(parameter)}).items():
            yield name.replace(module, part), name, start, start + rows
            start += rows
