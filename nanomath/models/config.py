"""The shape of a model, from a Hugging Face config.json and back: Llama 1-3.x, Mistral, Qwen2/2.5
and Qwen3.

What differs between the families is five fields of `ModelConfig`: a bias on q, k, v (Qwen2),
RMSNorm on the heads of q and k (Qwen3), a sliding window (Mistral), tied embeddings, and the
scaling of the rotary frequencies (Llama 3). A config.json that asks for anything else is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanomath.models.stored import (
    LARGEST_COUNT,
    LARGEST_SIZE,
    flag,
    number,
    table,
    whole,
)

# What a config.json of each family leaves out where it is as in transformers' own.
FAMILIES = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
# A model of a million layers takes hours to be built before its files can contradict it.
MOST_LAYERS = 1024
ROPE_SCALINGS = {  # each with the settings it needs, and what reads them
    "default": {},
    "linear": {"factor": number},
    "llama3": {
        "factor": number,
        "low_freq_factor": number,
        "high_freq_factor": number,
        "original_max_position_embeddings": whole,
    },
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    `from_hf` and `to_hf` translate it from and to a Hugging Face config.json.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    model_type: str = "llama"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    rope_scaling: dict[str, Any] | None = None
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # keys older than so many positions are not seen

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value "
                "heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}: rotary positions need an even head dimension"
            )
        if self.num_heads * self.head_dim > LARGEST_SIZE:
            raise ValueError(
                f"{self.num_heads} heads of {self.head_dim} are more than {LARGEST_SIZE} rows"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """Read a config.json.

        ValueError names a key whose value is not implemented or cannot be read; nothing
        else is computed in its place. KeyError names a key that has no value.
        """
        family = hf.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(
                f"unsupported model_type {family!r:.60}: nanomath has {', '.join(FAMILIES)}"
            )
        hf = {**FAMILIES[family], **hf}
        _refuse_unsupported(hf, family)
        rope_theta, rope_scaling = _rope(hf)
        heads = whole(hf["num_attention_heads"], "num_attention_heads")
        layers = whole(hf["num_hidden_layers"], "num_hidden_layers", most=MOST_LAYERS)
        width = whole(hf["hidden_size"], "hidden_size")
        return cls(
            model_type=family,
            vocab_size=whole(hf["vocab_size"], "vocab_size"),
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=whole(
                _given(hf, "num_key_value_heads", heads), "num_key_value_heads"
            ),
            head_dim=whole(_given(hf, "head_dim", width / heads), "head_dim"),
            intermediate_size=whole(hf["intermediate_size"], "intermediate_size"),
            max_positions=whole(
                hf["max_position_embeddings"],
                "max_position_embeddings",
                most=LARGEST_COUNT,
            ),
            norm_eps=number(_given(hf, "rms_norm_eps", 1e-6), "rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_embeddings=flag(
                _given(hf, "tie_word_embeddings", False), "tie_word_embeddings"
            ),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            sliding_window=_sliding_window(hf, family, layers),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json that transformers (4 and 5) reads back as this model."""
        hf: dict[str, Any] = {
            "architectures": FAMILIES[self.model_type]["architectures"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling and dict(self.rope_scaling),
            "tie_word_embeddings": self.tie_embeddings,
        }
        if self.model_type != "llama":
            hf["sliding_window"] = self.sliding_window
        if self.model_type.startswith("qwen"):
            hf["use_sliding_window"] = self.sliding_window is not None
            hf["max_window_layers"] = 0 if self.sliding_window else self.num_layers
        if self.model_type == "qwen3":
            hf["attention_bias"] = False
        return hf


def _given(hf: dict[str, Any], key: str, default: Any) -> Any:
    """Return what is stored under `key`, or the default where there is nothing or null."""
    value = hf.get(key)
    return default if value is None else value


def _rope_table(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary positions, which have a new name and an old one."""
    return table(hf.get("rope_parameters"), "rope_parameters") or table(
        hf.get("rope_scaling"), "rope_scaling"
    )


def _refuse_unsupported(hf: dict[str, Any], family: str) -> None:
    """Raise a ValueError for a config.json that asks for arithmetic that transformer.py
    does not have.
    """
    hf = {**_rope_table(hf), **hf}
    wanted = {
        "hidden_act": ("silu", None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1.0, None),
    }
    wanted["attention_bias"] = (
        (True, False, None) if family == "qwen2" else (False, None)
    )
    for key, accepted in wanted.items():
        if hf.get(key) not in accepted:
            raise ValueError(
                f"unsupported {key} = {hf[key]!r:.60}: nanomath has {accepted[0]!r} for {family}"
            )
    if hf.get("quantization_config"):
        raise ValueError(
            "unsupported quantization_config: nanomath reads float32, bfloat16 and float16 weights"
        )


def _rope(hf: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return the base of the rotary frequencies and their scaling, None where they are not
    scaled.
    """
    rope = _rope_table(hf)
    kind = _given(rope, "rope_type", _given(rope, "type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise ValueError(
            f"unsupported RoPE scaling {kind!r:.60}: nanomath has {', '.join(ROPE_SCALINGS)}"
        )
    if lacking := [key for key in ROPE_SCALINGS[kind] if key not in rope]:
        raise ValueError(f"RoPE scaling {kind!r} lacks {', '.join(lacking)}")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(
            f"unsupported RoPE settings for {nested[0]!r:.60} alone: nanomath has one kind "
            "in a model"
        )
    theta = number(
        _given(rope, "rope_theta", _given(hf, "rope_theta", 10000.0)), "rope_theta"
    )
    if kind == "default":
        return theta, None
    scaling = {key: read(rope[key], key) for key, read in ROPE_SCALINGS[kind].items()}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        raise ValueError(
            f"low_freq_factor = {low} must be less than high_freq_factor = {high}"
        )
    return theta, {"rope_type": kind, **scaling}


def _sliding_window(hf: dict[str, Any], family: str, layers: int) -> int | None:
    """Return the window of all layers, None where they see everything before them.

    Qwen has a window only where it is switched on, from layer `max_window_layers` upwards.
    """
    full = layers
    if family == "mistral":
        full = 0
    elif family.startswith("qwen") and flag(
        _given(hf, "use_sliding_window", False), "use_sliding_window"
    ):
        full = whole(
            _given(hf, "max_window_layers", 28),
            "max_window_layers",
            least=0,
            most=LARGEST_COUNT,
        )
    kinds = {"full_attention"} if full else set()
    kinds |= {"sliding_attention"} if full < layers else set()
    if (types := hf.get("layer_types")) is not None:
        if (
            not isinstance(types, list)
            or len(types) != layers
            or not all(isinstance(kind, str) for kind in types)
        ):
            raise ValueError(
                f"layer_types = {types!r:.60} must name the kind of each of the {layers} layers"
            )
        kinds = set(types)
    if kinds not in ({"full_attention"}, {"sliding_attention"}):
        raise ValueError(
            f"unsupported mixture of layers ({', '.join(sorted(kinds)):.60}): nanomath has "
            "one kind in a model"
        )
    window = hf.get("sliding_window")
    if window is None or kinds == {"full_attention"}:
        return None
    return whole(window, "sliding_window", most=LARGEST_COUNT)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Return the rotary frequencies theta^(-2i/E), float32 [E/2], scaled by
    `config.rope_scaling`.

    `linear` divides all of them by `factor` (positions are interpolated). `llama3` leaves
    wavelengths shorter than original/high_freq_factor alone, divides those longer than
    original/low_freq_factor, and blends between (Llama 3.1's public reference code).
    """
    exponent = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
        / config.head_dim
    )
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    # Divided as there: one ulp is seen at position 3000.
    turns = scaling["original_max_position_embeddings"] / wavelengths
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * frequencies + (1 - blend) * frequencies / scaling["factor"]
