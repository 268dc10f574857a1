"""What a run says before its first step, and the micro-batch of token_budget = "auto"."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_grpo
import train_sft
from nanomath import settings
from nanomath.config import load
from nanomath.models import ModelConfig, Transformer
from nanomath.models.batches import Example, make_batch
from nanomath.models.scores import response_logprobs
from nanomath.rollout.cache import rooms
from nanomath.rollout.sampler import Sampler
from nanomath.training import plan
from nanomath.training.optimizer import Optimizer
from nanomath.training.plan import Drawing, choose_budget

ROOT = Path(__file__).parents[2]
SHAPE = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=88,
    max_positions=256,
)
ALONE = [Example([i, 2, 3], [5] * (12 + i)) for i in range(6)]
GROUPS = [Example([i // 4] * 16, [5] * 12) for i in range(8)]
SMALL = [
    *("train.limit=8", "heldout.limit=1", "evaluation.samples=1", "run.steps=1"),
    *("model.new.hidden_size=32", "model.new.layers=1", "model.new.heads=2"),
    *("model.new.kv_heads=1", "model.new.intermediate_size=32"),
    "sampling.max_new_tokens=4",
]


@pytest.fixture
def tiny_sampler(new_model, tokenizer) -> Sampler:
    return Sampler(new_model(0), tokenizer, slots=64)


def drawing(prompts: int, samples: int, completion: int) -> Drawing:
    """Of prompts of 10 tokens at most."""
    return Drawing([[5] * 10, *[[5] * 9] * (prompts - 1)], samples, completion)


@pytest.mark.parametrize(
    ("room", "fast", "budget"),
    [
        (1e9, 2048, 2048),  # no more than is fast
        (2048, 2048, 2048),
        (2047, 2048, 1024),
        (600, 2048, 512),
        (0, 2048, plan.LEAST),  # it is warned of
        (0, 300, 300),
    ],
)
def test_the_largest_micro_batch_that_fits(room, fast, budget):
    assert choose_budget(lambda tokens: tokens, room, fast) == budget


# --- memory ----------------------------------------------------------------------------------


def kept_for_backward(
    shape: ModelConfig, dtype: torch.dtype, examples, **switches
) -> int:
    """Bytes that autograd keeps of a forward pass, without the parameters."""
    model = Transformer(shape).init_weights(0).to(dtype)
    for name, value in switches.items():
        setattr(model, name, value)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        response_logprobs(model, make_batch(examples))
    return sum(
        t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters
    )


@pytest.mark.parametrize("examples", [ALONE, GROUPS], ids=["alone", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [2, 4])
def test_a_layer_keeps_what_autograd_keeps(examples, dtype, heads):
    shape = replace(SHAPE, num_kv_heads=heads)
    one, two = (
        kept_for_backward(replace(shape, num_layers=n), dtype, examples) for n in (1, 2)
    )
    expected = plan.layer_bytes(shape, make_batch(examples), dtype.itemsize)
    assert two - one == pytest.approx(expected, rel=0.04)


def test_checkpointing_keeps_the_states_between_layers():
    batch = make_batch(ALONE)
    model = Transformer(SHAPE).init_weights(0)
    whole = plan.batch_bytes(model, batch, kept=1.5)
    model.gradient_checkpointing = True
    one, two = (
        kept_for_backward(
            replace(SHAPE, num_layers=n),
            torch.float32,
            ALONE,
            gradient_checkpointing=True,
        )
        for n in (1, 2)
    )
    states = 4 * batch.layout.tokens.numel() * SHAPE.hidden_size
    layer = plan.layer_bytes(SHAPE, batch, 4)
    saved = 1.5 * (layer - 2 * states)
    assert two - one == pytest.approx(states, rel=0.01)
    assert whole - plan.batch_bytes(model, batch, kept=1.5) == pytest.approx(saved)


PEAK = """
import json, sys, torch
from nanomath.models import ModelConfig, Transformer
from nanomath.models.batches import Example
from nanomath.training import plan
from nanomath.training.optimizer import Optimizer
from nanomath.training.sft_step import SFTStep
from nanomath.training.sittings import peak_memory

torch.set_num_threads(1)
vocabulary, width, layers, inner, count, length, budget = map(int, sys.argv[1:])
config = ModelConfig(vocabulary, width, layers, 4, 2, width // 4, inner, 512)
model = Transformer(config).init_weights(0)
optimizer = Optimizer(model, 0.0, (0.9, 0.95), 1e-8, 1.0)
step = SFTStep(model, optimizer, token_budget=budget)
step.step([Example([1], [2, 3])], 0, 1e-6)  # what is loaded once
examples = [Example([1, i], [3] * length) for i in range(count)]
before = peak_memory(model.device, restart=True)
step.step(examples, 1, 1e-6)
found = peak_memory(model.device) - before
cut = plan.batches_of(model, examples, budget)
print(json.dumps([found, plan.step_bytes(model, optimizer, cut)]))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peak memory is measured on Linux",
)
@pytest.mark.parametrize(
    "sizes",
    [
        (64, 128, 6, 512, 40, 128, 0),  # layers are nearly all
        (90_000, 256, 1, 256, 6, 128, 700),  # logits, gradients, and the lm_head's own
    ],
    ids=["layers", "vocabulary"],
)
def test_the_peak_of_a_step(sizes):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, sizes)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout)
    assert found > 1e8
    assert 0.82 < expected / found < 1.3


def test_the_sampler_needs_its_cache_and_packed_weights(tiny_sampler):
    c = tiny_sampler.model.config
    few, more, long = (
        plan.sampling_bytes(tiny_sampler, drawing(prompts, 2, completion))
        for prompts, completion in ((1, 20), (2, 20), (2, 21))
    )
    token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4
    assert long - more == 4 * token
    assert more - few == 2 * (25 * token + 8 * c.vocab_size)
    matrices = sum(p.nbytes for p in tiny_sampler.model.parameters() if p.dim() == 2)
    assert few - (more - few) == matrices
    tiny_sampler.slots = 3
    assert plan.sampling_bytes(tiny_sampler, drawing(9, 9, 20)) == matrices + 3 * (
        token * (20 + 10 / 9) + 8 * c.vocab_size
    )


def test_what_control_groups_leave(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    root = tmp_path / "fs"
    limits = {"": ("max", 9), "a": ("1000", 700), "a/b": ("5000", 100)}
    for name, (most, used) in limits.items():
        here = root / name
        here.mkdir(parents=True, exist_ok=True)
        (here / "memory.max").write_text(f"{most}\n")
        (here / "memory.current").write_text(f"{used}\n")
        (here / "memory.stat").write_text("anon 3\ninactive_file 50\n")
    assert min(rooms(root, own)) == 1000 - 700 + 50
    own.write_text("0::/\n")
    assert min(rooms(root, own)) == sys.maxsize == min(rooms(root, tmp_path / "none"))
    old = root / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("800\n")
    (old / "memory.usage_in_bytes").write_text("900\n")
    (old / "memory.stat").write_text("cache 3\n")
    own.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n")
    assert min(rooms(root, own)) == 0
    (old / "memory.stat").unlink()
    assert min(rooms(root, own)) == sys.maxsize


# --- seconds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tried", [1, 2, 5])
def test_seconds_of_a_step_are_those_of_its_layers_and_tokens(monkeypatch, tried):
    """Of a token a pass costs 3 seconds, with a gradient 7, and a layer of it 0.1 and 1."""
    model = Transformer(replace(SHAPE, num_layers=5)).init_weights(0)
    optimizer = Optimizer(model, 0.0, (0.9, 0.95), 1e-8, 1.0)
    trials = []

    def pass_seconds(trained, parameters, batch, layers):
        assert trained is model and len(parameters) == len(optimizer.weights)
        trials.append((batch.layout.tokens.numel(), layers))
        return tuple(trials[-1][0] * (a + b * layers) for a, b in ((3, 0.1), (7, 1)))

    tokens = sum(map(len, ALONE))
    few = len(ALONE[-1])  # no two go together
    layer, _ = plan.flops_of_a_token(SHAPE)
    monkeypatch.setattr(plan, "pass_seconds", pass_seconds)
    monkeypatch.setattr(plan, "TRIAL_FLOPS", {"cpu": few * layer * (tried - 0.9)})
    found = plan.step_seconds(model, optimizer, ALONE, 20, (2, 3), 1e6)
    assert trials == [(few, 0), (few, tried)]
    passes = tokens * (2 * (3 + 5 * 0.1) + 3 * (7 + 5 * 1))
    passes += (2 + 3) * len(ALONE) * plan.SEQUENCE_SECONDS
    numbers = sum(p.numel() for p in model.parameters())
    assert found == pytest.approx(passes + 3 * 4 * plan.MOVED * numbers / 1e6)


def test_the_flops_of_a_layer_are_those_of_its_matrices():
    layer, head = plan.flops_of_a_token(SHAPE)
    model = Transformer(SHAPE)
    matrices = [p for p in model.model.layers[0].parameters() if p.dim() == 2]
    assert layer == 6 * sum(p.numel() for p in matrices)
    assert head == 6 * model.lm_head.weight.numel()


def test_a_trial_is_a_pass_through_the_first_layers(monkeypatch):
    model = Transformer(SHAPE).init_weights(0)
    layers = model.model.layers
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ran = []
    hidden = Transformer.hidden

    def counted(model, **inputs):
        ran.append((len(model.model.layers), torch.is_grad_enabled()))
        return hidden(model, **inputs)

    monkeypatch.setattr(Transformer, "hidden", counted)
    monkeypatch.setattr(plan, "TRIAL_SECONDS", {"cpu": 0.0})
    for count in (0, 1):
        found = plan.pass_seconds(
            model, list(model.parameters()), make_batch(ALONE), count
        )
        assert len(found) == 2 and min(found) > 0
        assert set(ran) == {(count, False), (count, True)}
        ran.clear()
    frozen = [p.requires_grad_(False) for p in model.parameters()]  # of adapters
    assert min(plan.pass_seconds(model, frozen[:0], make_batch(ALONE), 0)) > 0
    assert model.model.layers is layers
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_trial_leaves_model_and_gradients_as_they_were():
    model = Transformer(SHAPE).init_weights(0)
    optimizer = Optimizer(model, 0.0, (0.9, 0.95), 1e-8, 1.0)
    before = torch.get_rng_state()
    found = plan.step_seconds(model, optimizer, GROUPS, 0, (1, 1), 1e9)
    assert found > 0
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_models_trial_is_short():
    """A run of a few steps starts at once."""
    model = Transformer(SHAPE).init_weights(0)
    optimizer = Optimizer(model, 0.0, (0.9, 0.95), 1e-8, 1.0)
    began = time.process_time()
    speed = plan.bytes_per_s(model)
    plan.step_seconds(model, optimizer, GROUPS, 0, (1, 1), speed)
    assert time.process_time() - began < 0.25


def test_seconds_of_sampling_are_those_of_its_first_tokens(tiny_sampler, monkeypatch):
    """A prompt costs 5 seconds here, and a token of all samples in flight 2."""
    tiny_sampler.slots = 8
    asked = []

    def generate(sampler, prompts, n, tokens):
        assert sampler is tiny_sampler
        asked.append((len(prompts), n, tokens))
        return 5.0 * len(prompts) + 2.0 * tokens

    monkeypatch.setattr(Sampler, "generate", generate)
    monkeypatch.setattr(plan, "fastest", lambda run, *_, **__: run())
    c = tiny_sampler.model.config
    for prompts, samples, tried, rounds in ((4, 2, (4, 2), 1), (8, 3, (2, 3), 4)):
        one = drawing(prompts, samples, 16)
        found = plan.sampling_seconds(tiny_sampler, one, 1e9)
        rows = min(8, prompts * samples)
        read = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4 * rows * (16 - 4) / 2
        each = 5.0 * tried[0] + 16 * 2.0 + 15 * read / 1e9
        python = plan.SEQUENCE_SECONDS * prompts * samples
        assert found == pytest.approx(rounds * each + python)
        assert asked[-2:] == [(*tried, 1 + plan.TRIAL_STEPS), (*tried, 1)]


def test_a_trial_of_sampling_leaves_the_draws_as_they_were(tiny_sampler):
    prompts = drawing(4, 2, 16).prompts
    before = tiny_sampler.generate(prompts, 2, 16)
    found = plan.sampling_seconds(tiny_sampler, drawing(4, 2, 16), 1e12)
    assert 0 < found < 60
    assert tiny_sampler.generate(prompts, 2, 16) == before


# --- runs ------------------------------------------------------------------------------------


def test_ranks_agree_and_share_memory(monkeypatch):
    model = Transformer(SHAPE).init_weights(0)
    optimizer = Optimizer(model, 0.0, (0.9, 0.95), 1e-8, 1.0)
    assert plan.settle_budget(model, optimizer, ALONE, 0.0) == plan.FAST["cpu"]
    monkeypatch.setattr(plan.ranks, "gather", lambda mine: [*mine, 512])
    assert plan.settle_budget(model, optimizer, ALONE, 0.0) == 512
    monkeypatch.setattr(plan, "free_memory", lambda device: 900)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert plan.room(model.device) == 300


def budget_of(run: Path) -> int:
    return load(settings.SFTConfig, run / "config.toml").sft.token_budget


def test_a_run_says_what_it_needs_and_keeps_its_budget(monkeypatch, tmp_path, capsys):
    words = [*SMALL, "sft.token_budget=auto", f"run.directory={tmp_path}"]
    train_sft.main(words)
    assert budget_of(tmp_path / "run") == plan.FAST["cpu"]
    said = capsys.readouterr().err
    assert said.count("expected: at most ") == 1 and " GiB resident (loaded " in said
    assert f"sft.token_budget = {plan.FAST['cpu']}\n" in said
    assert "it may not fit" not in said
    monkeypatch.setitem(plan.FAST, "cpu", 512)
    monkeypatch.setattr(plan, "free_memory", lambda device: 1 << 10)
    train_sft.main([*words, "run.steps=2", "--resume"])
    assert budget_of(tmp_path / "run") == 1024  # as it began
    said = capsys.readouterr().err
    assert said.count("it may not fit: ") == 1
    for key in ("sft.token_budget", "model.gradient_checkpointing", "sampling.slots"):
        assert key in said


def test_reinforcement_says_what_it_assumes(tmp_path, capsys):
    train_sft.main([*SMALL, f"run.directory={tmp_path}"])
    capsys.readouterr()
    small = [word for word in SMALL if not word.startswith("model.new")]
    words = [
        *(*small, f"model.path={tmp_path / 'run'}", f"run.directory={tmp_path}"),
        *("run.name=grpo", "grpo.prompts=2", "grpo.group_size=2"),
        "grpo.token_budget=auto",
    ]
    train_grpo.main(words)
    said = capsys.readouterr().err
    assert "with completions of 4 tokens, grpo.token_budget = 1024\n" in said
    metrics = tmp_path / "grpo" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    newest = [line["length"] for line in lines if "length" in line][-1]
    train_grpo.main([*words, "run.steps=2", "--resume"])
    assert f"with completions of {round(newest)} tokens" in capsys.readouterr().err
    solved = ["run.name=solved", "grpo.solutions=true", "algorithm.method=sft"]
    train_grpo.main([*words, *solved, "grpo.group_size=1"])  # nothing is drawn
    said = capsys.readouterr().err.split("expected: ")[1].splitlines()[0]
    assert "), with grpo.token_budget = " in said and said.count("sampling") == 1
