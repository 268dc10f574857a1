"""`python -m nanomath bench`: what its numbers mean, what it prints and saves, what it refuses."""

from __future__ import annotations

import json
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import nanomath.config
from kernels import linear_logprob
from nanomath import settings
from nanomath.__main__ import main
from nanomath.commands import bench
from nanomath.commands.bench import all as everything
from nanomath.commands.bench import kernels, measure, rollout, training
from nanomath.commands.bench.kernels import CASES, Setting
from nanomath.models import batches
from nanomath.rollout.floor import Machine

CONFIGS = Path(__file__).parents[2] / "configs"
TARGETS = "rollout, kernels, training, all"
SMALL = (
    *("device=cpu", "dtype=float32", "threads=1", "repeats=1"),
    *("sequences=6", "groups=3", "prompt=9", "response=7"),
)


def small(*words: str) -> training.TrainingBench:
    config = nanomath.config.load(training.TrainingBench, None, (*SMALL, *words))
    training.settle(config)
    return config


# --- what every target shares ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing", "why", "code"),
    [
        ("theirs", "no memory", 0),
        ("theirs", "OSError: lost", 1),
        ("ours", "no memory", 1),
    ],
)
def test_sides_take_turns_the_fastest_counts_and_failing_is_a_result(
    failing, why, code, monkeypatch, tmp_path, capsys
):
    calls = []

    def pretend(config, function, case):
        calls.append((case["step"], function.__name__))
        if calls[-1] == ("sft", failing):
            return {"failed": why}
        return {"ms": {1: 8.0, 3: 4.0}.get(len(calls), 10.0), "stages": {"rest": 0.125}}

    def ours(): ...
    def theirs(): ...

    monkeypatch.setattr(measure, "in_new_process", pretend)
    config = small("repeats=2", f"save={tmp_path / 'bench.json'}")
    cases = [{"step": "grpo"}, {"step": "sft"}]
    sides = {"ours": ours, "theirs": theirs}
    assert measure.report(["training", "repeats=2"], config, cases, sides) == code
    turns = [
        (step, side) for step in ("grpo", "sft") for side in 2 * ("ours", "theirs")
    ]
    assert calls == turns
    saved = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    first, second = saved["rows"]
    assert first["ours"] == {"ms": 4, "stages": {"rest": 0.125}}
    assert first["theirs"]["ratio"] == 2.5
    assert second[failing] == {"failed": why}
    assert saved["command"] == "python -m nanomath bench training repeats=2"
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["config"]["repeats"] == 2
    said = capsys.readouterr().out.splitlines()
    assert said[-6:-3] == [
        "step grpo",
        "  ours          ms 4  stages rest 0.125",
        "  theirs        ms 10  stages rest 0.125  ratio 2.5",
    ]
    assert said[-1 if failing == "theirs" else -2] == f"  {failing:13} failed {why}"


def raise_an_error(config: object) -> None:
    raise RuntimeError(f"an illegal memory access, {torch.get_num_threads()}\nmore")


def be_ended(config: object) -> None:
    os._exit(9)


def test_a_process_that_fails_says_why():
    config = SimpleNamespace(threads=1)
    found = measure.in_new_process(config, raise_an_error, {})
    assert found == {"failed": "RuntimeError: an illegal memory access, 1"}
    assert measure.in_new_process(config, be_ended, {}) == {"failed": "no memory"}


def test_the_tiny_shape_is_that_of_the_configs(tokenizer):
    path = CONFIGS / "tiny" / "sft.toml"
    model = nanomath.config.load(settings.SFTConfig, path).model.new
    shape = measure.SHAPES["tiny"]
    assert shape.vocab_size == tokenizer.vocab_size
    assert (shape.hidden_size, shape.num_layers) == (model.hidden_size, model.layers)
    assert (shape.num_heads, shape.num_kv_heads) == (model.heads, model.kv_heads)
    assert shape.intermediate_size == model.intermediate_size


# --- training --------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_processes_measure_a_step(call, tmp_path):
    save = tmp_path / "bench.json"
    words = *SMALL, "shapes=tiny", "steps=grpo", f"save={save}"
    outcome = call(main, "bench", "training", *words)
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(save.read_text(encoding="utf-8"))["rows"]
    assert list(row)[2:] == ["ours", "plain", "floor", "expected"]
    assert min(row[side]["ms"] for side in list(row)[2:]) > 0


@pytest.mark.slow
def test_real_processes_measure_that_chunks_need_less_memory(call, tmp_path):
    save = tmp_path / "bench.json"
    common = "device=cpu", "dtype=float32", "threads=1", f"save={save}"
    words = "kernels=linear_logprob", "shapes=smollm2", "tokens=4000"
    outcome = call(main, "bench", "kernels", *common, *words)
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(save.read_text(encoding="utf-8"))["rows"]
    assert row["kernel"]["ms"] > 0 and row["PyTorch"]["ratio"] > 0
    logits = 4000 * 49152 * 4 / 1e6
    assert row["kernel"]["MB"] < logits < 2 * logits < row["PyTorch"]["MB"]


@pytest.fixture
def patched(monkeypatch):
    """Undo what a measured process replaces."""
    for owner, name in (
        *((batches, "linear_logprob"), (training.policy_step, "make_batch")),
        *((training.policy_step, "response_states"), (torch.Tensor, "backward")),
        *((training.policy_step, "states_logprobs"), (training.Optimizer, "step")),
        *((training.sft_step, "response_states"), (training.Sampler, "generate")),
        (training.sft_step, "states_logprobs"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.parametrize("side", [training.measure_step, training.measure_plain])
@pytest.mark.parametrize("step", list(training.FORWARD))
def test_stages_sum_to_the_step(step, side, patched):
    found = side(small(), "tiny", step)
    stages = found["stages, ms"]
    expected = {"forward", "backward", "optimizer", "rest"}
    assert set(stages) == expected | ({"reference pass"} if step == "grpo" else set())
    assert min(stages.values()) > 0 and found["MB"] >= 0
    assert sum(stages.values()) == pytest.approx(found["ms"], rel=1e-9)
    plain = side is training.measure_plain
    used = batches.linear_logprob
    assert (used is linear_logprob.linear_logprob_reference) == plain


def test_stages_are_clocked_where_they_are_spent(patched, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def spend(seconds, *_):
        clock.now += seconds

    monkeypatch.setattr(measure, "now", lambda device: clock.now)
    monkeypatch.setattr(training.policy_step, "response_states", partial(spend, 0.001))
    monkeypatch.setattr(training.Optimizer, "step", partial(spend, 0.008))
    stages = training.clocked_stages(torch.device("cpu"))
    training.policy_step.response_states("model")
    with torch.no_grad():
        training.policy_step.response_states("model")
        training.policy_step.response_states("model")
    training.Optimizer.step()
    assert stages == pytest.approx({"forward": 1, "reference pass": 2, "optimizer": 8})


def floor_flops(monkeypatch, config, step) -> float:
    """The floor of a machine that makes one FLOP a second."""
    monkeypatch.setattr(training.products, "library_is_slow", lambda: False)
    monkeypatch.setattr(training, "fastest", lambda run, *_: flops_of(run))
    return training.floor(config, "tiny", step)["ms"] / 1e3


def made_flops(config, step) -> int:
    return flops_of(training.new_step(config, "tiny", step))


def flops_of(run) -> int:
    """The products of a call, made by PyTorch wherever they are, but for those of attention."""
    aten = torch.ops.aten
    added = {
        aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]
    }  # not known to it
    by_torch = patch.object(training.products, "library_is_slow", lambda: False)
    counted = FlopCounterMode(display=False, custom_mapping=added)
    with by_torch, counted as counter:
        run()
    made = counter.get_flop_counts().get("Global", {})
    return sum(made.get(kind, 0) for kind in (aten.mm, aten.addmm, aten.addmm_))


@pytest.mark.parametrize("words", [(), ("token_budget=40",)], ids=["whole", "cut"])
@pytest.mark.parametrize("step", list(training.FORWARD))
def test_the_floor_has_the_products_that_a_step_makes(monkeypatch, step, words):
    config = small(*words)
    assert made_flops(config, step) == floor_flops(monkeypatch, config, step) > 0


def test_what_is_computed_again_is_not_in_the_floor(monkeypatch):
    config = small()
    least = floor_flops(monkeypatch, config, "sft")
    again = made_flops(small("gradient_checkpointing=true"), "sft") - least
    # The layers go forward twice, but for their last product: nothing needs its result.
    tokens = 6 * (9 + 7 - 1) + 6  # the last one is computed as well
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 352
    assert again == 3 * 2 * tokens * (layer - 128 * 352)
    # With adapters no weight gets a gradient: two products of three in grpo's four.
    full, few = (
        floor_flops(monkeypatch, small(*words), "grpo") for words in ((), ("lora=2",))
    )
    assert few == pytest.approx(full * 3 / 4)


def test_what_is_expected_has_the_passes_of_the_step(monkeypatch):
    told = []
    monkeypatch.setattr(training.plan, "step_bytes", lambda *_: 3e6)
    monkeypatch.setattr(
        training.plan, "step_seconds", lambda *args: told.append(args) or 2.0
    )
    for step in training.FORWARD:
        assert training.expected(small(), "tiny", step) == {"ms": 2000, "MB": 3}
    assert [passes for *_, passes, _ in told] == [(0, 1), (1, 1)]
    monkeypatch.setattr(
        training.plan, "sampling_seconds", lambda *args: told.append(args) or 0.5
    )
    config = small("sampled=true")
    assert training.expected(config, "tiny", "grpo") == {"ms": 2500, "MB": 3}
    sampler, drawing, _ = told[-1]
    assert sampler.slots == drawing.total == config.sequences
    assert (drawing.longest, drawing.completion) == (9, 7)


def test_adapters_are_trained_alone(patched):
    config = small("lora=2")
    assert training.measure_step(config, "tiny", "grpo")["ms"] > 0
    model, optimizer = training.in_training(config, "tiny")
    assert not any(p.requires_grad for p in model.parameters())
    assert all(2 in w.parameter.shape for w in optimizer.weights.values())


def test_prompts_are_those_of_groups():
    for step, different in ("grpo", 2), ("sft", 6):
        examples = training.random_examples(small(), "tiny", step)
        assert len({tuple(e.prompt) for e in examples}) == different
        assert {(len(e.prompt), len(e.response)) for e in examples} == {(9, 7)}


def test_a_step_may_begin_by_sampling(patched, monkeypatch):
    drawn = []
    generate = training.Sampler.generate

    def noted(*arguments, **options):
        drawn.append(generate(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(training.Sampler, "generate", noted)
    found = training.measure_step(small("sampled=true"), "tiny", "grpo")
    assert found["stages, ms"]["sampling"] > 0
    assert [len(c.tokens) for c in drawn[0]] == [7] * 6
    assert [c.prompt_index for c in drawn[0]] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("words", [(), ("token_budget=40",)], ids=["whole", "cut"])
def test_trl_makes_the_same_step(patched, monkeypatch, words):
    """The gradient has the same norm, at once and in micro-batches."""
    pytest.importorskip("trl")
    from accelerate import Accelerator

    norms = []
    clip = Accelerator.clip_grad_norm_

    def noted(*arguments):
        norms.append(float(clip(*arguments)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", noted)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # pytest goes on
    found = training.measure_trl(small(*words), "tiny", "grpo")
    assert found["ms"] > 0 and found["MB"] >= 0 and len(norms) == training.CALLS
    ours = training.new_step(small(*words), "tiny", "grpo")()
    assert norms[0] == pytest.approx(ours["grad_norm"], rel=1e-4)


def test_both_sides_compute_the_same():
    hidden, weight = (torch.randn(n, 6, requires_grad=True) for n in (9, 40))
    target = torch.randint(40, (9,))
    results = []
    for name in "linear_logprob", "linear_logprob_reference":
        found, entropy = getattr(linear_logprob, name)(hidden, weight, target, 0.7)
        gradients = torch.autograd.grad(found.sum(), (hidden, weight))
        results.append((found, entropy, *gradients))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5)


# --- rollout ---------------------------------------------------------------------------------


def sampling(**changes) -> rollout.RolloutBench:
    options = {"model": "tiny", "device": "cpu", "dtype": "float32", "threads": 1}
    sizes = {"groups": 2, "prompt": 6, "response": 5}
    return rollout.RolloutBench(**{**options, **sizes, **changes})


@pytest.mark.parametrize("exact", [False, True])
def test_the_sampler_is_measured(exact, monkeypatch):
    """Really: a response ends with its last token, and the exact mode has no gap."""
    monkeypatch.setattr(rollout, "measure_machine", lambda *_: Machine(1e9, 1e9))
    found = rollout.measure_sampler(sampling(response=24, exact=exact), 4)
    assert found["tokens/s"] * found["ms"] == pytest.approx(1e3 * 4 * 24)
    assert found["of floor"] == pytest.approx(found["floor, ms"] / found["ms/step"])
    assert (found["gap_max"] == 0) == exact and found["gap_max"] < 1e-5
    assert found["MB"] >= 0 and found["GB/s"] == 1


def test_numbers_are_those_of_the_clock_and_of_the_floor_by_hand(monkeypatch):
    """With a sampler that takes a second for each step and half of one for the rest."""
    clock = SimpleNamespace(now=0.0)

    class Slow:
        def __init__(self, model, tokenizer, *_: object) -> None:
            assert tokenizer.eos_ids == ()  # no token ends a response

        def release(self) -> None: ...
        def generate(self, prompts, n, tokens, progress=lambda *_: None):
            samples = len(prompts) * n
            clock.now += 0.5
            for step in range(1, tokens + 1):
                clock.now += 1.0
                done = samples * (step == tokens)
                progress(done, samples * step, samples - done, 0.0)
            return [SimpleNamespace(length=tokens)] * samples

    monkeypatch.setattr(rollout, "Sampler", Slow)
    monkeypatch.setattr(rollout, "gap", lambda *_: {})
    monkeypatch.setattr(rollout.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(rollout, "measure_machine", lambda *_: Machine(1e9, 1e12))
    found = rollout.measure_sampler(sampling(), 4)
    assert found["ms"] == pytest.approx(5500) and found["ms/step"] == pytest.approx(
        1000
    )
    assert found["tokens/s"] == pytest.approx(20 / 5.5)
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 352
    weights = 3 * layer + 1024 * 128
    seen = 2 * 6 + 4 * 2.5  # prompts once for their group, tokens drawn in the mean
    numbers = weights + seen * 3 * 2 * 64
    assert found["floor, ms"] == pytest.approx(1e3 * 4 * numbers / 1e9)


def test_the_step_is_timed_while_the_batch_is_full():
    looks = [
        *((10.0, 0, 8, 8, 0), (10.5, 0, 16, 8, 0), (11.5, 0, 40, 8, 0)),
        *((99.0, 3, 64, 8, 0), (200.0, 8, 64, 0, 0)),
    ]
    assert rollout.step_time(looks) == (1.5 / 4, 8, 3.0)
    assert all(number != number for number in rollout.step_time(looks[:1] + looks[3:]))


def test_the_gap_is_to_the_trainers_logprobs():
    config = sampling(dtype="float64")
    model, prompts = rollout.build(config, 4)
    shift = torch.tensor([[0.1, -0.3], [0.0, 0.0], [0.0, 0.2]], dtype=torch.float64)
    tokens = [[5, 9], [7, 1], [1, 0]]
    exact = [
        model(torch.tensor([[*prompts[i // 2], *row]]))
        .log_softmax(-1)[0, 5:-1]
        .gather(1, torch.tensor(row)[:, None])[:, 0]
        for i, row in enumerate(tokens)
    ]

    def gap(shift):
        drawn = [
            SimpleNamespace(
                prompt_index=i // 2, tokens=row, length=2, logprobs=logprobs.tolist()
            )
            for i, (row, logprobs) in enumerate(
                zip(tokens, torch.stack(exact) - shift, strict=True)
            )
        ]
        return rollout.gap(model, prompts, drawn)

    own = gap(0 * shift)
    assert own["gap_max"] < 1e-6 and own["effective_samples"] == pytest.approx(1)
    found = gap(shift)
    assert found["gap_mean"] == pytest.approx(0.6 / 6, abs=1e-6)
    assert found["gap_max"] == pytest.approx(0.3, abs=1e-6)
    w = shift.exp()
    size = float(w.sum() ** 2 / (6 * (w * w).sum()))
    assert found["effective_samples"] == pytest.approx(size, abs=1e-6)


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is missing")
def test_transformers_draws_as_many_tokens():
    """Of a real model, and no eos ends a response."""
    import transformers

    generate = transformers.GenerationMixin.generate

    def noted(self, asked, **options):
        assert asked.shape == (4, 6) and options["eos_token_id"] is None
        return generate(self, asked, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", noted)
        found = rollout.measure_transformers(sampling(), 4)
    assert found["tokens/s"] * found["ms"] == pytest.approx(1e3 * 4 * 5)


def test_a_model_of_a_directory_is_measured(model_directory):
    config = sampling(model=str(model_directory))
    assert rollout.model_shape(config.model) == rollout.build(config, 4)[0].config


# --- kernels ---------------------------------------------------------------------------------


@pytest.fixture
def device(kernel_device):
    torch.set_default_device(kernel_device)
    yield kernel_device
    torch.set_default_device(None)


def setting(rows: int, dtype: torch.dtype, context: int = 300) -> Setting:
    shape = vars(measure.SHAPES["tiny"])
    return Setting(**shape, rows=rows, context=context, dtype=dtype)


@pytest.mark.parametrize("kernel", CASES)
def test_both_forms_of_a_kernel_compute_the_same(kernel, device):
    torch.manual_seed(0)
    grouped = kernel == "grouped_attention"  # not computed in float32 on a GPU
    dtype, tolerance = (torch.float16, 2e-3) if grouped else (torch.float32, 2e-4)
    case = CASES[kernel](setting(32, dtype))
    results = [form(*case.arguments) for form in (case.kernel, case.reference)]
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True)
    for mine, plain in pairs:
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


A_TOKEN = 4 * 2 * 2 * 32  # bytes of its keys and values
FLOORS = {  # bytes and FLOPs by hand: 16 rows, 64 tokens of context
    "add_rms_norm": (4 * (4 * 16 * 128 + 128), 0),
    "rope_write": (4 * 2 * 16 * (4 + 2 + 2) * 32, 0),
    "paged_attention": (4 * 2 * 16 * 128 + 16 * 64 * A_TOKEN, 4 * 64 * 16 * 128),
    "swiglu": (4 * 3 * 16 * 352, 0),
    "invariant_linear": (4 * (16 * (128 + 704) + 128 * 704), 2 * 16 * 128 * 704),
    "linear": (4 * 2 * (16 * 128 + 704 * 128), 6 * 16 * 128 * 704),
    "causal_attention": (
        4 * (2 * 16 * 256 + 2 * 16 * 32),
        7 * 16 * 16 * 128,
    ),
    "linear_logprob": (0, 8 * 16 * 128 * 1024),
}


@pytest.mark.parametrize("kernel", FLOORS)
def test_the_floor_of_a_kernel_is_the_one_by_hand(kernel, monkeypatch):
    moved, flops = FLOORS[kernel]
    config = kernels.KernelBench(device="cpu", dtype="float32", context=64)
    monkeypatch.setattr(kernels, "MEASURED", 0.001)
    for machine, least in (Machine(1e9, 1e30), moved), (Machine(1e30, 1e9), flops):
        monkeypatch.setattr(kernels, "measure_machine", lambda *_, m=machine: m)
        found = kernels.measure_call(config, kernel, "tiny", 16)
        if least:
            assert found["floor, ms"] == pytest.approx(1e3 * least / 1e9)
            assert found["of floor"] == pytest.approx(found["floor, ms"] / found["ms"])
    reference = kernels.measure_call(config, kernel, "tiny", 16, ours=False)
    assert reference["ms"] > 0 and set(reference) == {"ms", "MB"}


def test_no_default_device_slows_the_calls(monkeypatch):
    """With one every operation of PyTorch passes through Python first."""
    modes = []

    def call() -> None:
        modes.append(_get_current_function_mode_stack())

    monkeypatch.setitem(CASES, "swiglu", lambda s: kernels.Case(call, call, ()))
    monkeypatch.setattr(kernels, "MEASURED", 0.001)
    config = kernels.KernelBench(device="cpu", dtype="float32")
    kernels.measure_call(config, "swiglu", "tiny", 16, ours=False)
    assert modes and not any(modes)


def test_a_group_reads_its_prompt_once(device):
    page = kernels.attention.page_size(torch.device(device))
    alone, grouped = (
        CASES[name](setting(32, torch.float32, 4 * page)).moved
        for name in ("paged_attention", "grouped_attention")
    )
    assert alone - grouped == (32 - 2) * 3 * page * A_TOKEN


def test_check_runs_the_kernels_tests(call, monkeypatch, tmp_path):
    ran = []

    def pretend(command, cwd):
        ran.append((command[1:], cwd))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(kernels.subprocess, "run", pretend)
    assert call(main, "bench", "kernels", "--check").code == 1
    ((command, root),) = ran
    tests = "tests/kernels", "tests/gpu"
    assert command == ["-mpytest", "-p", "no:cacheprovider", *tests]
    assert all((root / name).is_dir() for name in tests)
    package = str(tmp_path / "nanomath" / "__init__.py")
    monkeypatch.setattr(kernels.nanomath, "__file__", package)
    outcome = call(main, "bench", "kernels", "--check")
    said = f"error: --check runs a clone's tests: none in {tmp_path}\n"
    assert outcome.code == 2 and outcome.err == said


# --- everything ------------------------------------------------------------------------------


def test_all_records_each_part_and_goes_on_after_a_failure(call, monkeypatch, tmp_path):
    commands = []

    def read() -> tuple[dict, str]:
        text = (tmp_path / "bench.json").read_text(encoding="utf-8")
        return json.loads(text), (tmp_path / "bench.md").read_text(encoding="utf-8")

    def pretend(command, **_):
        commands.append(command[2:])
        if len(commands) == 3:
            read()  # what the first two found is there
            raise KeyboardInterrupt
        for word in command:
            if word.startswith("save="):
                Path(word[5:]).write_text('{"rows": [2]}', encoding="utf-8")
        code = len(commands) - 1
        return SimpleNamespace(returncode=code, stdout=f"said {len(commands)}\n")

    monkeypatch.setattr(everything.subprocess, "run", pretend)
    monkeypatch.setattr(measure.sittings, "commit", lambda: "c0ffee")
    words = "device=cpu", f"out={tmp_path}", "parts=check,kernels,training"
    outcome = call(main, "bench", "all", *words)
    assert outcome.code == 1 and outcome.err == "error: interrupted\n"
    results, page = read()
    parts = results["parts"]
    assert {name: p["outcome"] for name, p in parts.items()} == {
        "check": "done",
        "kernels": "failed",
    }
    assert (
        parts["kernels"]["report"] == {"rows": [2]} and parts["check"]["report"] == {}
    )
    assert results["commit"] == "c0ffee" and results["versions"]["torch"]
    assert commands[0] == ["nanomath", "bench", "kernels", "--check"]
    assert {"device=cpu", "dtype=float32", "threads=0"} < set(commands[1])
    assert (
        "| kernels | failed | 0 | `python -m nanomath bench kernels tokens=64" in page
    )
    assert "said 2" in page and "said 3" not in page


def test_all_without_transformers_measures_the_rest(monkeypatch, tmp_path):
    """Here a command that fails: it is recorded with what it said."""
    monkeypatch.setattr(everything, "find_spec", lambda name: None)
    config = everything.AllBench(device="cpu", dtype="float32")
    words = ["rollout", "smolm2", "against=transformers"]
    part = everything.run_part(words, config, tmp_path / "part.json")
    assert part["outcome"] == "failed" and "against" not in part["command"]
    assert part["output"].startswith("error: model=smolm2: no directory")


COMMANDS = {*everything.CPU.values(), *everything.GPU.values()}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_part_is_a_command_that_its_target_understands(command, monkeypatch):
    """Up to the first process: what is to be measured is settled by then."""
    reached = []
    monkeypatch.setattr(measure, "report", lambda *given: reached.append(given) or 0)
    monkeypatch.setattr(measure, "need", lambda package: None)
    monkeypatch.setattr(
        kernels.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0)
    )
    assert bench.main(command.split()) == 0
    assert reached or command == "kernels --check"


# --- usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], f"bench needs a target: expected one of {TARGETS}"),
        (["trainning"], f"unknown target 'trainning': expected one of {TARGETS}"),
        (["training", "shapes=smollm"], "shapes"),
        (["training", "repeats=0"], "repeats"),
        (["training", "groups=3"], "8 sequences: no groups of 3"),
        (["training", "speed=1"], "speed"),
        (
            ["training", "save=missing/b.json"],
            "no directory to write missing/b.json to",
        ),
        (["training", "device=tpu9"], "tpu9"),
        (
            ["rollout", "smolm2"],
            "model=smolm2: no directory, hub id, or one of tiny",
        ),
        (
            ["rollout", "tiny", "prompt=500", "response=13"],
            "prompt + response is 513: a context is 512",
        ),
        (["rollout", "tiny", "groups=3"], "rows=[64]: no multiples of groups=3"),
        (["rollout", "tiny", "save=missing/b.json"], "no directory to write missing"),
        (["rollout", "tiny", "against=vllm"], "transformers"),
        (["rollout", "missing.toml"], "config file not found: missing.toml"),
        (["kernels", "kernels=softmax"], "kernels"),
        (["kernels", "shapes=llama"], "shapes"),
        (["kernels", "rows=40"], "groups need multiples of 16"),
        (["kernels", "--chek"], "did you mean --check?"),
        (["kernels", "save=missing/b.json"], "no directory to write missing/b.json to"),
        (["all", "parts=rest"], "parts"),
        (["all", "minutes=5"], "minutes"),
        (["all", f"out={__file__}"], "test_bench.py"),
    ],
)
def test_bad_input_is_one_line(call, words, said):
    outcome = call(main, "bench", *words)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert said in outcome.err


@pytest.mark.parametrize(
    ("words", "package"),
    [(("rollout", "tiny"), "transformers"), (("training",), "trl")],
)
def test_what_is_compared_with_may_be_missing(words, package, call, monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    outcome = call(main, "bench", *words, f"against={package}", "device=cpu")
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err == f"error: against={package} needs it: pip install {package}\n"


def test_trl_is_compared_in_grpo_alone(call, monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: name)
    outcome = call(main, "bench", "training", "against=trl", "steps=sft,grpo")
    assert outcome.err == "error: against=trl compares steps=grpo alone\n"
    assert outcome.code == 2 and small("against=trl").steps == ["grpo"]


def test_help(call):
    page = call(main, "bench", "--help").out
    assert page.startswith("Measure time and memory")
    assert all(f"\n  {target} " in page for target in bench.TARGETS)
    classes = (
        *(rollout.RolloutBench, kernels.KernelBench),
        *(training.TrainingBench, everything.AllBench),
    )
    for target, cls in zip(bench.TARGETS, classes, strict=True):
        keys = call(main, "bench", target, "-h").out
        assert all(f"  {key}=" in keys for key in vars(cls()))
    assert "  --check " in call(main, "bench", "kernels", "-h").out
