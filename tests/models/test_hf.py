"""Checkpoints: what is saved is what is loaded, by us and by transformers; what is broken is
named.
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from nanomath.models import (
    ModelConfig,
    Tokenizer,
    Transformer,
    check_vocabulary,
    hf,
    load_model,
    load_tokenizer,
    resolve_model_dir,
    save_model,
)
from nanomath.models.hf_names import hf_slices

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "max_positions": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ModelConfig(**SHAPE, rope_scaling=LLAMA3),
    "mistral": ModelConfig(
        **SHAPE, model_type="mistral", tie_embeddings=False, sliding_window=3
    ),
    "qwen2": ModelConfig(**SHAPE, model_type="qwen2", qkv_bias=True, rope_theta=1e6),
    "qwen3": ModelConfig(
        **SHAPE, model_type="qwen3", qk_norm=True, tie_embeddings=False, norm_eps=1e-6
    ),
}
TOKENS = torch.arange(22).reshape(2, 11) % 11


def fresh(family: str = "llama", seed: int = 0) -> Transformer:
    """A model whose every parameter is random, norms and biases too."""
    model = Transformer(MODELS[family])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1.0, 1.0, generator=generator)
    return model


def words(count: int = 10) -> Tokenizer:
    """A tokenizer of `count` words and an end token."""
    vocabulary = {**{f"w{number}": number for number in range(count)}, "<eos>": count}
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="w0")
    )
    return Tokenizer(backend, eos_token="<eos>", eos_ids=(3,))


def assert_same_bits(one: Transformer, other: Transformer) -> None:
    assert one.config == other.config
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_gives_the_same_bits(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = fresh(family).to(dtype)
    save_model(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype=dtype)
    assert_same_bits(model, loaded)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert (
        loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ) == model.config.tie_embeddings


@pytest.mark.parametrize("family", MODELS)
def test_transformers_loads_what_is_saved(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = fresh(family)
    save_model(model, words(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            model(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5
        )
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == [10, 3]


def test_a_trained_model_is_saved_as_it_is_now(tmp_path: Path) -> None:
    model = fresh()
    model(TOKENS).logsumexp(-1).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    save_model(model, None, tmp_path / "model")
    assert_same_bits(model, load_model(tmp_path / "model"))


def test_dtype_is_that_asked_for(tmp_path: Path) -> None:
    save_model(fresh(), None, tmp_path / "model", dtype=torch.bfloat16)
    assert {
        tensor.dtype
        for tensor in load_file(tmp_path / "model/model.safetensors").values()
    } == {torch.bfloat16}
    assert (
        json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"]
        == "bfloat16"
    )
    loaded = load_model(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(
        loaded.model.norm.weight, fresh().model.norm.weight.bfloat16().float()
    )


def test_tensors_are_stored_one_by_one_under_their_usual_names(tmp_path: Path) -> None:
    model = fresh("mistral")
    save_model(model, None, tmp_path / "model")
    stored = load_file(tmp_path / "model/model.safetensors")
    attention = "model.layers.1.self_attn"
    fused = torch.cat([stored[f"{attention}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(fused, model.get_parameter(f"{attention}.qkv_proj.weight"))
    gate_up = torch.cat(
        [stored[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    )
    assert torch.equal(
        gate_up, model.get_parameter("model.layers.0.mlp.gate_up_proj.weight")
    )


def test_shards_of_ours_load_here_and_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh("qwen2")
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 3000)
    save_model(model, None, tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    # 2000 for the header
    assert all(file.stat().st_size < 3000 + 2000 for file in shards)
    assert_same_bits(model, load_model(tmp_path))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            model(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5
        )


def test_shards_of_transformers_load(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = fresh("qwen3")
    save_model(model, None, tmp_path / "one")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="3KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same_bits(model, load_model(tmp_path / "many"))


def test_loading_holds_one_stored_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(fresh(), None, tmp_path / "model")
    alive: list[weakref.ref] = []
    original = hf._open_safetensors

    class Watched:
        def __init__(self, stored) -> None:
            self.keys, self.offset_keys, self.get_slice = (
                stored.keys,
                stored.offset_keys,
                stored.get_slice,
            )
            self.stored = stored

        def get_tensor(self, name: str) -> torch.Tensor:
            assert not [reference for reference in alive if reference() is not None]
            tensor = self.stored.get_tensor(name)
            alive.append(weakref.ref(tensor))
            return tensor

    @hf.contextmanager
    def watched(file: Path):
        with original(file) as stored:
            yield Watched(stored)

    monkeypatch.setattr(hf, "_open_safetensors", watched)
    assert_same_bits(load_model(tmp_path / "model"), fresh())
    assert len(alive) == sum(1 for _ in hf_slices(fresh()))


def test_tolerated_extras(tmp_path: Path) -> None:
    save_model(fresh("llama"), None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_bits(load_model(tmp_path), fresh("llama"))


def store(
    directory: Path, tied: bool, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    """A saved model whose config.json says that of its tie, and whose tensors are changed."""
    save_model(fresh(), None, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": tied})
    )
    with_tensors(change)(directory)


EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# what is done to the tensors of a tied model, and whether it is tied once it is loaded
STORED_HEADS = {
    "another": (
        lambda t: t.update({LM_HEAD: t[EMBEDDING].flip(0).contiguous()}),
        False,
    ),
    "the same": (lambda t: t.update({LM_HEAD: t[EMBEDDING].clone()}), True),
    "the same in bfloat16 only": (
        lambda t: t.update({LM_HEAD: t[EMBEDDING].bfloat16()}),
        False,
    ),
    "alone": (lambda t: t.update({LM_HEAD: t.pop(EMBEDDING)}), True),
    "none": (lambda t: None, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", STORED_HEADS)
def test_a_stored_head_is_used_as_in_transformers(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    change, tied = STORED_HEADS[case]
    tied = tied or (dtype == torch.bfloat16 and case != "another")
    store(tmp_path, True, change)
    model = load_model(tmp_path, dtype=dtype)
    assert (
        model.config.tie_embeddings
        == tied
        == (model.lm_head.weight is model.model.embed_tokens.weight)
    )
    save_model(model, None, tmp_path / "again")
    assert_same_bits(load_model(tmp_path / "again", dtype=dtype), model)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(
        model.model.embed_tokens.weight, theirs.model.embed_tokens.weight
    )
    if dtype == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(
                model(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5
            )


def test_a_head_of_another_kind_needs_no_lm_head(tmp_path: Path) -> None:
    head = {"score.weight": torch.ones(2, 16)}
    store(
        tmp_path,
        True,
        lambda t: t.update({LM_HEAD: t[EMBEDDING].flip(0).contiguous(), **head}),
    )
    model = load_model(
        tmp_path, head=lambda config: torch.nn.Linear(config.hidden_size, 2, bias=False)
    )
    assert model.config.tie_embeddings
    assert not hasattr(model, "lm_head")
    assert torch.equal(
        model.model.embed_tokens.weight, fresh().model.embed_tokens.weight
    )


def test_a_missing_head_is_not_made_up(tmp_path: Path) -> None:
    store(tmp_path, False, lambda t: None)
    with pytest.raises(
        ValueError,
        match="lack 1 tensors: lm_head.weight: config.json says tie_word_embeddings = fal",
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_a_dtype_may_be_a_name(name: str, tmp_path: Path) -> None:
    save_model(fresh(), None, tmp_path / "model")
    for dtype in (name, f"torch.{name}", getattr(torch, name)):
        assert load_model(tmp_path / "model", dtype=dtype).dtype == getattr(torch, name)
    save_model(fresh(), None, tmp_path / "model", dtype=name)
    assert load_file(tmp_path / "model/model.safetensors")[EMBEDDING].dtype == getattr(
        torch, name
    )


@pytest.mark.parametrize(
    "dtype", ["int8", "bf16", "auto", "", "nn", torch.int8, torch.complex64, None, 16]
)
def test_another_dtype_is_one_line(dtype: object, tmp_path: Path) -> None:
    save_model(fresh(), None, tmp_path / "model")
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path / "model", dtype=dtype)
    assert (
        str(caught.value)
        == f"dtype = {dtype!r}: models are float32, bfloat16, float16, float64"
    )


def without(*names: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return damage


def with_tensors(
    change: Callable[[dict[str, torch.Tensor]], None],
) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def with_config(text: str) -> Callable[[Path], None]:
    return lambda directory: (
        (directory / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        and None
    )


def with_value(key: str, value: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, key: value}))

    return damage


def with_index(index: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / hf.INDEX_FILE).write_text(json.dumps(index))

    return damage


def with_directory(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return damage


def twice(directory: Path) -> None:
    names = ("one.safetensors", "two.safetensors")
    for name in names:
        shutil.copy(directory / "model.safetensors", directory / name)
    with_index({"weight_map": dict(zip("ab", names, strict=True))})(directory)


def truncate(directory: Path) -> None:
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


INDEX = hf.INDEX_FILE
NORM, O_PROJ = "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DAMAGES = {
    "no config": (without("config.json"), FileNotFoundError, "no config.json in {}"),
    "no weights": (
        without("model.safetensors"),
        FileNotFoundError,
        "no model.safetensors and no model.safetensors.i",
    ),
    "pickle": (
        pickle_only,
        FileNotFoundError,
        "pytorch_model.bin is a pickle, which is never loaded",
    ),
    "lost shard": (
        with_index({"weight_map": {"a": "model-00001-of-00002.safetensors"}}),
        FileNotFoundError,
        "{}/model-00001-of-00002.safetensors is missing",
    ),
    "empty index": (
        with_index({}),
        ValueError,
        "the safetensors files of {} lack 20 tensors: ",
    ),
    "truncated": (
        truncate,
        ValueError,
        "{}/model.safetensors is not a readable safetensors file",
    ),
    "missing": (
        with_tensors(lambda t: (t.pop(NORM), t.pop(O_PROJ))),
        ValueError,
        f"lack 2 tensors: {O_PROJ}, {NORM}",
    ),
    "unknown": (
        with_tensors(
            lambda t: t.update({f"score.{i}": torch.zeros(2) for i in range(5)})
        ),
        ValueError,
        "hold unknown 5 tensors: score.0, score.1, score.2, ...",
    ),
    "wrong shape": (
        with_tensors(lambda t: t.update({Q_PROJ: torch.zeros(16, 24)})),
        ValueError,
        f"{{}}/model.safetensors: {Q_PROJ} has shape (16, 24), config.json means (24, 16)",
    ),
    "twice": (
        twice,
        ValueError,
        "{}/two.safetensors holds model.embed_tokens.weight, which is in one.safetensors as w",
    ),
    "integers": (
        with_tensors(lambda t: t.update({NORM: torch.ones(16, dtype=torch.int8)})),
        ValueError,
        f"{{}}/model.safetensors: {NORM} is stored as I8, not as F32, BF16, F16, F64",
    ),
    "a name of two lines": (
        with_tensors(lambda t: t.update({"a\nb": torch.ones(1)})),
        ValueError,
        "1 tensors: a b",
    ),
    "empty weights": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        ValueError,
        "{}/model.safetensors is not a",
    ),
    "a directory of weights": (
        with_directory("model.safetensors"),
        FileNotFoundError,
        "no model.safetensors and no mod",
    ),
    "a directory of settings": (
        with_directory("config.json"),
        FileNotFoundError,
        "no config.json in {}",
    ),
    "index of a list": (
        with_index({"weight_map": ["a"]}),
        ValueError,
        f"{{}}/{INDEX}: weight_map has ['a'], which is no",
    ),
    "index of numbers": (
        with_index({"weight_map": {"a": 1}}),
        ValueError,
        f"{{}}/{INDEX}: weight_map has 1, which is no",
    ),
    "index of a name too long": (
        with_index({"weight_map": {"a": "1" * 244 + ".safetensors"}}),
        ValueError,
        f"{{}}/{INDEX}: weight_map has '{'1' * 59}, which is no safetensors file beside it",
    ),
    "index elsewhere": (
        with_index({"weight_map": {"a": "../a.safetensors"}}),
        ValueError,
        f"{{}}/{INDEX}: weight_map has '../a.safetensors', which is no safetensors file beside it",
    ),
    "a larger model": (
        with_value("hidden_size", 2**24),
        ValueError,
        "has shape (11, 16), config.json means (11, 16777216)",
    ),
    "empty config": (with_config(""), ValueError, "{}/config.json:1: not valid JSON"),
    "no UTF-8": (
        with_config('{"a": "\udcff"}'),
        ValueError,
        "{}/config.json: not UTF-8 text (byte 7)",
    ),
    "half a pair": (
        with_config('{"a": "\\ud800"}'),
        ValueError,
        "{}/config.json: half a surrogate pair",
    ),
    "deep": (
        with_config("[" * 100000),
        ValueError,
        "{}/config.json: JSON that is nested too deeply",
    ),
    "a key twice": (
        with_config('{"a": 1, "a": 1}'),
        ValueError,
        "{}/config.json: the field 'a' is there twice",
    ),
    "a wrong value": (
        with_value("hidden_size", "16"),
        ValueError,
        "{}/config.json: hidden_size = '16' must be a whole num",
    ),
    "bad JSON": (with_config("{"), ValueError, "{}/config.json:1: not valid JSON"),
    "not an object": (
        with_config("[]"),
        ValueError,
        "{}/config.json must hold a JSON object, not list",
    ),
    "missing key": (
        with_config('{"model_type": "llama", "num_hidden_layers": 1}'),
        ValueError,
        "{}/config.json lacks the key 'num_attention_heads'",
    ),
    "architecture": (
        with_config('{"model_type": "gpt2"}'),
        ValueError,
        "{}/config.json: unsupported model_type 'gpt2': nanomath has llama, mistral, qwen2, qwen3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_line(damage: str, tmp_path: Path) -> None:
    harm, kind, message = DAMAGES[damage]
    save_model(fresh(), None, tmp_path)
    harm(tmp_path)
    with pytest.raises(kind) as caught:
        load_model(tmp_path)
    assert message.format(tmp_path) in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", [16.0, 16])
def test_a_whole_number_with_a_point_is_one(whole: float, tmp_path: Path) -> None:
    save_model(fresh(), None, tmp_path)
    with_value("hidden_size", whole)(tmp_path)
    assert_same_bits(load_model(tmp_path), fresh())
    assert type(load_model(tmp_path).config.hidden_size) is int


def test_a_run_gives_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save_model(fresh(seed=step), words(), tmp_path / f"run/checkpoints/step-{step}")
    (tmp_path / "run/checkpoints/step-11").mkdir()  # cut off before it was complete
    (tmp_path / "run/checkpoints/best").mkdir()
    newest = tmp_path / "run/checkpoints/step-10"
    assert resolve_model_dir(tmp_path / "run") == newest
    assert resolve_model_dir(tmp_path / "run/checkpoints") == newest
    assert resolve_model_dir(str(tmp_path / "run/checkpoints/step-2")).name == "step-2"
    assert_same_bits(load_model(tmp_path / "run"), fresh(seed=10))
    assert load_tokenizer(tmp_path / "run").eos_ids == (10, 3)


def test_a_run_without_a_complete_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step-1").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match="no complete checkpoint .* in .*checkpoints"
    ):
        load_model(tmp_path / "run")
    with pytest.raises(
        FileNotFoundError, match="no complete checkpoint .* in .*checkpoints"
    ):
        load_model(tmp_path / "run/checkpoints")


def test_a_place_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="no such model directory: .*/nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="file is a file: name the model's directory"):
        load_model(tmp_path / "file")


def test_the_hub_is_asked_for_safe_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(fresh(), words(), tmp_path)
    asked = {}

    def download(name: str, allow_patterns: list[str], **options: object) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same_bits(load_model("someone/a-model"), fresh())
    load_tokenizer("someone/a-tokenizer")
    assert asked == {
        "someone/a-model": ["*.json", "*.jinja", "*.safetensors"],
        "someone/a-tokenizer": ["*.json", "*.jinja"],
    }


def test_a_hub_that_cannot_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args, **kwargs) -> str:
        raise ConnectionError("name or service not known\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError) as caught:
        load_model("someone/a-model")
    assert str(caught.value) == (
        "no someone/a-model here, nor can the hub give it (ConnectionError: name or service "
        "not known)"
    )


def test_a_model_is_replaced_whole(tmp_path: Path) -> None:
    save_model(fresh(seed=0), words(), tmp_path / "model")
    (tmp_path / "model/optimizer.safetensors").touch()
    save_model(fresh(seed=1), None, tmp_path / "model")
    assert_same_bits(load_model(tmp_path / "model"), fresh(seed=1))
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_former_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(fresh(seed=0), words(), tmp_path / "model")

    def fail(*args) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(fresh(seed=1), None, tmp_path / "model")
    assert_same_bits(load_model(tmp_path / "model"), fresh(seed=0))
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    for end in ("new", "old"):
        (tmp_path / f".model.{os.getpid()}.{end}").mkdir()
        (tmp_path / f".model.{os.getpid()}.{end}/left.json").touch()
    for seed in (0, 1):
        save_model(fresh(seed=seed), None, tmp_path / "model")
    assert_same_bits(load_model(tmp_path / "model"), fresh(seed=1))
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_directory_that_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists and is not a model directory"):
        save_model(fresh(), None, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_weights_are_as_readable_as_the_other_files(tmp_path: Path) -> None:
    save_model(fresh(), None, tmp_path / "model")
    modes = {file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_a_scratch_directory_of_a_dead_process_is_no_checkpoint(tmp_path: Path) -> None:
    save_model(fresh(), None, tmp_path / "checkpoints/step-1")
    shutil.copytree(
        tmp_path / "checkpoints/step-1", tmp_path / "checkpoints/.step-2.99.new"
    )
    assert resolve_model_dir(tmp_path).name == "step-1"


@pytest.mark.parametrize(("count", "matches"), [(9, True), (10, True), (11, False)])
def test_the_vocabulary_is_checked(count: int, matches: bool) -> None:
    model = fresh()
    if matches:
        check_vocabulary(model, words(count))
    else:
        with pytest.raises(
            ValueError, match="largest token id is 11, the model has ids 0 to 10"
        ):
            check_vocabulary(model, words(count))
