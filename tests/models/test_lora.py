"""LoRA: the arithmetic against dense weights, that the base stays as it is, and peft's files
both ways.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomath import load_model, load_tokenizer, save_model
from nanomath.models.hf_names import hf_slices
from nanomath.models.lora import WEIGHTS, LoRA, linear_layers, load_lora
from nanomath.settings import LINEAR_LAYERS
from nanomath.training.optimizer import Optimizer

TOKENS = torch.arange(60).reshape(3, 20) * 7 % 50


def bits(model) -> dict[str, bytes]:
    return {
        name: p.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, p in model.named_parameters()
    }


def moved(lora: LoRA, seed: int = 1) -> LoRA:
    """The adapters with B no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in lora.values():
        adapter.B.data.normal_(0, 0.3, generator=generator)
    return lora


def loss_of(model) -> torch.Tensor:
    logits = model(TOKENS)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_logits_are_the_base_s_bit_for_bit(
    new_model, family_shape, dtype
):
    base = new_model(dtype=dtype, **family_shape)
    lora = LoRA(base, 4, 8.0, LINEAR_LAYERS)
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    model = lora.applied_to(base)
    assert torch.equal(model(TOKENS), base(TOKENS))
    moved(lora)
    assert not torch.equal(model(TOKENS), base(TOKENS))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "targets", [LINEAR_LAYERS, ("k_proj", "down_proj"), ("up_proj",)]
)
def test_gradients_are_those_of_the_chain_rule(
    new_model, family_shape, targets, checkpointing
):
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, with dL/dW of a model of plain weights."""
    base = new_model(dtype=torch.float64, **family_shape)
    lora = moved(LoRA(base, 3, 6.0, targets))
    model = lora.applied_to(base)
    model.gradient_checkpointing = checkpointing
    plain = lora.merged(base, torch.float64)
    loss_of(model).backward()
    plain.requires_grad_(True)
    dense = loss_of(plain)
    assert torch.allclose(loss_of(model), dense, atol=1e-12)
    for parameter in plain.parameters():  # of which some are the base's own
        parameter.grad = None
    dense.backward()
    gradients = {}
    parameters = dict(plain.named_parameters())
    for name, ours, start, stop in hf_slices(plain):
        gradients[name.removesuffix(".weight")] = parameters[ours].grad[start:stop]
    assert len(lora) == 2 * len(targets)
    for key, adapter in lora.items():
        dw = gradients[key.replace("/", ".")]
        assert adapter.A.grad.abs().max() > 1e-4 and adapter.B.grad.abs().max() > 1e-4
        torch.testing.assert_close(
            adapter.A.grad, 2 * adapter.B.T @ dw, rtol=0, atol=1e-10
        )
        torch.testing.assert_close(
            adapter.B.grad, 2 * dw @ adapter.A.T, rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_moves_the_adapters_alone(new_model, family_shape, dtype):
    base = new_model(dtype=dtype, **family_shape)
    before, logits = bits(base), base(TOKENS)
    lora = LoRA(base, 2, 4.0, LINEAR_LAYERS)
    start = bits(lora)
    model = lora.applied_to(base)
    optimizer = Optimizer(lora, 0.0, (0.9, 0.95), 1e-8, 1.0)
    losses = []
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        optimizer.step(0.02)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(bits(lora)[name] != start[name] for name in start)
    assert bits(base) == before and torch.equal(base(TOKENS), logits)
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    state = sum(t.numel() for t in optimizer.state().values())
    adapters = sum(p.numel() for p in lora.parameters())
    # Two moments, and the step counts
    assert state == 2 * adapters + len(optimizer.weights)


def test_the_models_share_what_they_can(new_model):
    base = new_model()
    lora = LoRA(base, 2, 4.0, ["q_proj"])
    places = {name: p.data_ptr() for name, p in base.named_parameters()}
    model, merged = lora.applied_to(base), lora.merged(base, base.dtype)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    own = {
        name for name, p in merged.named_parameters() if p.data_ptr() != places[name]
    }
    assert own == {f"model.layers.{i}.self_attn.qkv_proj.weight" for i in (0, 1)}
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("targets", [LINEAR_LAYERS, ("v_proj", "gate_proj")])
def test_merged_weights_compute_the_same_and_never_drift(
    new_model, family_shape, targets
):
    base = new_model(**family_shape)
    lora = LoRA(base, 4, 8.0, targets)
    model, merged = lora.applied_to(base), lora.merged(base, torch.float32)
    before, places = bits(base), [p.data_ptr() for p in merged.parameters()]
    assert bits(merged) == before
    for seed in range(50):
        moved(lora, seed)
        lora.merge(base, merged)
    assert torch.allclose(merged(TOKENS), model(TOKENS), atol=2e-4)
    assert not torch.allclose(merged(TOKENS), base(TOKENS), atol=0.1)
    assert (
        bits(merged) == bits(lora.merged(base, torch.float32)) and bits(base) == before
    )
    assert [p.data_ptr() for p in merged.parameters()] == places
    for adapter in lora.values():
        adapter.B.data.zero_()
    lora.merge(base, merged)
    assert bits(merged) == before


def test_a_merged_weight_is_rounded_once(new_model):
    base = new_model(dtype=torch.bfloat16)
    lora = moved(LoRA(base, 4, 8.0, LINEAR_LAYERS))
    merged = dict(linear_layers(lora.merged(base, torch.bfloat16)))
    exact = dict(linear_layers(lora.merged(base, torch.float32)))
    for name, weight in linear_layers(base):
        assert torch.equal(exact[name], weight.float() + lora.of(name).product())
        assert torch.equal(merged[name], exact[name].bfloat16())


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def saved(new_model, tokenizer, tmp_path):
    """saved(targets, **shape): a base and an adapter of it in tmp_path, and the model itself."""

    def save(targets=LINEAR_LAYERS, **shape):
        base = new_model(**shape)
        save_model(base, tokenizer, tmp_path / "base")
        lora = moved(LoRA(base, 4, 6.0, targets, base=str(tmp_path / "base")))
        lora.save(tmp_path / "adapter")
        return lora.applied_to(base), lora

    return save


def test_what_is_saved_is_loaded(saved, family_shape, tmp_path):
    model, lora = saved(**family_shape)
    again = load_lora(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert bits(again) == bits(lora)
    merged = load_model(tmp_path / "adapter")
    assert torch.allclose(merged(TOKENS), model(TOKENS), atol=2e-4)
    assert load_tokenizer(tmp_path / "adapter").encode("1 + 1") == load_tokenizer(
        tmp_path / "base"
    ).encode("1 + 1")


def test_the_base_is_found_beside_the_adapter_or_where_one_says(
    saved, tmp_path, monkeypatch
):
    saved()
    expected = load_model(tmp_path / "adapter")(TOKENS)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    assert torch.equal(load_model(tmp_path / "adapter")(TOKENS), expected)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match="is an adapter, and its base is not there: no "
    ):
        load_model(tmp_path / "adapter")
    moved_base = str(tmp_path / "moved")
    assert torch.equal(
        load_model(tmp_path / "adapter", base=moved_base)(TOKENS), expected
    )
    assert load_tokenizer(tmp_path / "adapter", moved_base).vocab_size > 0


def test_an_adapter_of_an_adapter(saved, tmp_path):
    saved()
    base = load_model(tmp_path / "adapter")
    lora = moved(LoRA(base, 2, 4.0, ["o_proj"], base=str(tmp_path / "adapter")), seed=5)
    lora.save(tmp_path / "second")
    expected = lora.merged(base, torch.float32)
    assert bits(load_model(tmp_path / "second")) == bits(expected)


@pytest.mark.parametrize("targets", [LINEAR_LAYERS, ("q_proj", "v_proj")])
def test_peft_computes_the_same_with_what_is_saved_here(
    saved, family_shape, targets, tmp_path
):
    peft = pytest.importorskip("peft")
    model, _ = saved(targets, **family_shape)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype="float32"
    )
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(TOKENS).logits, model(TOKENS), rtol=0, atol=2e-4
        )


@pytest.mark.parametrize(
    "targets", [list(LINEAR_LAYERS), ["q_proj", "v_proj"], "all-linear"]
)
def test_what_peft_saves_is_loaded_here(saved, family_shape, targets, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    saved(**family_shape)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype="float32"
    )
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    plain = load_model(tmp_path / "base")
    lora = load_lora(plain, tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert not torch.allclose(expected, plain(TOKENS), atol=0.1)
        for ours in lora.applied_to(plain), load_model(tmp_path / "theirs"):
            torch.testing.assert_close(ours(TOKENS), expected, rtol=1e-4, atol=1e-3)


BROKEN = {
    "use_dora = True is not supported: expected False": {"use_dora": True},
    "use_rslora = True is not supported": {"use_rslora": True},
    "peft_type = 'LOHA' is not supported: expected 'LORA'": {"peft_type": "LOHA"},
    "bias = 'all' is not supported": {"bias": "all"},
    "alpha_pattern = ": {"alpha_pattern": {"q_proj": 3}},
    "modules_to_save = ['lm_head'] is not supported": {"modules_to_save": ["lm_head"]},
    "r = 0 must be a whole number": {"r": 0},
    "lora_alpha = None must be a number": {"lora_alpha": None},
    "has shape [4, 32], expected [5, 32]": {"r": 5},
    "names no base_model_name_or_path: set model.base": {
        "base_model_name_or_path": None
    },
    "the adapter is named as its own base": {"base_model_name_or_path": "."},
    "is not there: no such model directory: /no/such": {
        "base_model_name_or_path": "/no/such"
    },
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_config_that_means_something_else_is_refused(saved, tmp_path, said):
    saved()
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **BROKEN[said]}))
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_model(tmp_path / "adapter")
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert str(tmp_path / "adapter") in str(raised.value)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME), f"lacks {NAME}"),
        (
            lambda t: t.update({NAME.replace("q_proj", "z_proj"): t[NAME].clone()}),
            "holds base_model",
        ),
        (
            lambda t: t.update(
                {"base_model.model.lm_head.lora_A.weight": t[NAME].clone()}
            ),
            "lm_head",
        ),
        (
            lambda t: t.update({NAME: t[NAME][:, :-1].clone()}),
            "has shape [4, 31], expected [4, 32]",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(saved, tmp_path, change, said):
    saved()
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(ValueError) as raised:
        load_model(tmp_path / "adapter")
    assert said in str(raised.value) and str(tmp_path / "adapter") in str(raised.value)


def test_damaged_files_are_named(saved, tmp_path):
    saved()
    weights = tmp_path / "adapter" / WEIGHTS
    shutil.copy(weights, tmp_path / "whole")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=f"{WEIGHTS} is not a readable safetensors file"
    ):
        load_model(tmp_path / "adapter")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS} in "):
        load_model(tmp_path / "adapter")
