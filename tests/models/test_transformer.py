"""The transformer against transformers' own models: the same weights must give the same logits
in every family.
"""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.models import ModelConfig, load_model

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}

CASES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama one kv head": (
        "Llama",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 6},
    ),
    "llama without groups": ("Llama", {"num_key_value_heads": 4}),
    "llama head_dim 24": ("Llama", {"head_dim": 24}),
    "llama llama3 scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "llama linear scaling": ("Llama", {"rope_parameters": LINEAR}),
    "llama large theta": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "mistral without window": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2", SLIDING),
    "qwen2 window above the top layer": ("Qwen2", {**SLIDING, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 window": ("Qwen3", {"head_dim": 16, **SLIDING}),
}


def oracle(family: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A transformers model with weights large enough that the logits, and any mistake, are of
    order 1 to 10.
    """
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gain = (
                    2.0
                    if any(
                        part in name
                        for part in ("embed", "lm_head", "q_proj", "k_proj")
                    )
                    else 1.0
                )
                parameter.normal_(
                    0.0, gain / parameter.shape[1] ** 0.5, generator=generator
                )
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def assert_same_logits(
    reference: transformers.PreTrainedModel, length: int, batch: int = 2
) -> None:
    """Save with transformers, load with nanomath, compare on random tokens."""
    tokens = torch.randint(
        reference.config.vocab_size,
        (batch, length),
        generator=torch.Generator().manual_seed(1),
    )
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        reference.save_pretrained(directory)
        logits, expected = load_model(directory)(tokens), reference(tokens).logits
    assert logits.dtype == torch.float32
    assert expected.std() > 0.5, "the oracle's logits are too flat to show a mistake"
    assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    family, changes = CASES[case]
    assert_same_logits(oracle(family, **changes), length=40)


@pytest.mark.parametrize("scaling", [LLAMA3, LINEAR])
def test_scaled_positions_far_beyond_the_original_context(scaling: dict) -> None:
    reference = oracle(
        "Llama",
        num_hidden_layers=1,
        max_position_embeddings=4096,
        rope_parameters=scaling,
    )
    assert_same_logits(reference, length=3000, batch=1)


@settings(deadline=None, max_examples=10)
@given(
    family=st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    half_head=st.integers(1, 9),
    layers=st.integers(1, 3),
    intermediate=st.integers(1, 50),
    tied=st.booleans(),
    length=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    family, kv_heads, group, half_head, layers, intermediate, tied, length, seed
) -> None:
    heads, head_dim = kv_heads * group, 2 * half_head
    reference = oracle(
        family,
        seed,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
    )
    assert_same_logits(reference, length)


@pytest.mark.parametrize("case", CASES)
def test_config_survives_the_round_trip(case: str) -> None:
    family, changes = CASES[case]
    theirs = getattr(transformers, f"{family}Config")(
        **{**SMALL, **changes}, architectures=[f"{family}ForCausalLM"]
    )
    config = ModelConfig.from_hf(theirs.to_dict())
    assert ModelConfig.from_hf(config.to_hf()) == config
    reread = type(theirs)(**config.to_hf())
    assert ModelConfig.from_hf(reread.to_dict()) == config


MINIMAL = {
    key: SMALL[key]
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
}


@pytest.mark.parametrize(
    "change", [{}, {"use_sliding_window": True, "max_window_layers": 0}], ids=str
)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_a_config_leaves_out_is_as_in_transformers(
    family: str, change: dict
) -> None:
    given = {**MINIMAL, "num_attention_heads": 32, "hidden_size": 64, **change}
    theirs = getattr(transformers, f"{family}Config")(**given)
    config = ModelConfig.from_hf({**given, "model_type": family.lower()})
    assert config == ModelConfig.from_hf(
        {**theirs.to_dict(), "model_type": family.lower()}
    )
    assert (config.num_kv_heads, config.max_positions) == (
        theirs.num_key_value_heads,
        theirs.max_position_embeddings,
    )
    assert config.sliding_window == getattr(theirs, "sliding_window", None)
    assert config.head_dim == (128 if family == "Qwen3" else 2)


WHOLE = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
]
WHOLE += [
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
]
NO_WHOLE = ["12", 0, -1, 2.5, True, [2], {}, 2**31, 10**400, float("nan"), float("inf")]
NO_NUMBER = ["1e-6", 0, -1.0, True, [1], {}, 10**400, float("nan"), float("inf")]
NO_FLAG = ["true", 0, 1, [], "", 0.0]
WRONG = [
    (key, value, "a whole number from 1 to") for key in WHOLE for value in NO_WHOLE
]
WRONG += [
    (key, None, "a whole number from 1 to")
    for key in (*WHOLE[:5], "max_position_embeddings")
]
WRONG += [
    (key, value, "a number from")
    for key in ("rms_norm_eps", "rope_theta")
    for value in NO_NUMBER
]
WRONG += [
    (key, value, "true or false")
    for key in ("tie_word_embeddings", "use_sliding_window")
    for value in NO_FLAG
]
WRONG += [("rope_scaling", value, "an object") for value in ("linear", 1, [{}])]
WRONG += [
    ("max_window_layers", value, "a whole number from 0 to") for value in (-1, "1", 0.5)
]
WRONG += [
    ("layer_types", value, "the kind of each of the 2 layers")
    for value in ("full", ["full_attention"], [1, 2])
]


@pytest.mark.parametrize(
    ("key", "value", "right"), WRONG, ids=lambda value: repr(value)[:30]
)
def test_a_value_of_another_kind_is_named(key: str, value: object, right: str) -> None:
    good = {**SMALL, "model_type": "qwen2", **SLIDING}
    assert ModelConfig.from_hf(good).num_heads == 4
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf({**good, key: value})
    assert str(caught.value).startswith(f"{key} = ")
    assert right in str(caught.value)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("key", WHOLE[:5])
def test_a_value_that_is_not_there_is_named(key: str) -> None:
    with pytest.raises(KeyError, match=key):
        ModelConfig.from_hf(
            {
                "model_type": "llama",
                **{name: SMALL[name] for name in WHOLE[:5] if name != key},
            }
        )


def test_whole_numbers_may_have_a_point() -> None:
    good = {**SMALL, "model_type": "llama"}
    pointed = {
        key: float(value) if isinstance(value, int) else value
        for key, value in good.items()
    }
    assert repr(ModelConfig.from_hf(pointed)) == repr(ModelConfig.from_hf(good))


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        (
            "gpt2",
            {},
            "unsupported model_type 'gpt2': nanomath has llama, mistral, qwen2, qwen3",
        ),
        (None, {}, "unsupported model_type None"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "unsupported RoPE scaling 'yarn'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "unsupported RoPE scaling 'dynamic'",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}},
            "RoPE scaling 'linear' lacks factor",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "lacks low_freq_factor, high_freq_factor, ",
        ),
        ("llama", {"attention_bias": True}, "unsupported attention_bias = True"),
        ("qwen3", {"attention_bias": True}, "unsupported attention_bias = True"),
        ("llama", {"mlp_bias": True}, "unsupported mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "unsupported hidden_act = 'gelu'"),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            "unsupported partial_rotary_factor = 0.5",
        ),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "unsupported partial_rotary_factor = 0.5",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1},
            "unsupported mixture of layers",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "unsupported mixture of layers",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq"}},
            "unsupported quantization_config",
        ),
        (
            "llama",
            {"rope_scaling": {**LLAMA3, "factor": "8"}},
            "factor = '8' must be a number from",
        ),
        (
            "llama",
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor = 4.0 must be less than high",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": LINEAR}},
            "unsupported RoPE settings for 'full_attention' alo",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": ["linear"]}},
            "unsupported RoPE scaling ['linear']",
        ),
        (["llama"], {}, "unsupported model_type ['llama']"),
        ("llama", {"hidden_size": 50}, "head_dim = 12.5 must be a whole number"),
        (
            "llama",
            {"num_attention_heads": 2**20, "num_key_value_heads": 1, "head_dim": 32},
            "heads of 32 are more than",
        ),
        (
            "llama",
            {"num_hidden_layers": 1025},
            "num_hidden_layers = 1025 must be a whole number from 1 to 1024",
        ),
        ("llama", {"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ("llama", {"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_what_is_not_implemented_is_refused(
    model_type: str | None, change: dict, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf(
            {**SMALL, "sliding_window": 8, "model_type": model_type, **change}
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
