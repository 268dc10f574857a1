"""`python -m nanomath bench`: what it measures, prints and saves, and what it refuses."""

from __future__ import annotations

import json
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nanomath.config
from kernels import linear_logprob as linear_logprob_module
from kernels.linear_logprob import linear_logprob
from nanomath import settings
from nanomath.__main__ import main
from nanomath.commands import bench
from nanomath.commands.bench import every, kernels, measure, rollout, training
from nanomath.commands.bench.kernels import CASES, OF_TOKENS, Setting
from nanomath.commands.bench.rollout import NoText, Point
from nanomath.commands.bench.stages import STAGES, stage_of
from nanomath.models import batches
from nanomath.rollout.floor import Machine

CONFIGS = Path(__file__).parents[2] / "configs"
TARGETS = "rollout, kernels, training, all"
SMALL = (
    *("device=cpu", "dtype=float32", "threads=1", "repeats=1", "sequences=2"),
    *("prompt=3", "response=4", "tokens=500"),
)


# --- training --------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_processes_measure_that_chunks_need_less_memory(call, tmp_path):
    save = tmp_path / "bench.json"
    words = (
        *SMALL[:-1],
        "tokens=4000",
        "shapes=smollm2",
        "steps=logprob",
        f"save={save}",
    )
    outcome = call(main, "bench", "training", *words)
    assert outcome.code == 0, outcome.err
    report = json.loads(save.read_text(encoding="utf-8"))
    assert report["torch"] == torch.__version__ and report["config"]["tokens"] == 4000
    assert report["command"].startswith("python -m nanomath bench training device=cpu")
    (row,) = report["rows"]
    assert row["step"] == "logprob" and min(row["seconds"].values()) > 0
    logits = 4000 * 49152 * 4
    assert row["bytes"]["ours"] < logits < 2 * logits < row["bytes"]["plain"]
    cells, *_ = training.table_row(row, "ours", "plain")
    assert cells in [line.split() for line in outcome.out.splitlines()]


def small(*words: str) -> training.TrainingBench:
    config = nanomath.config.load(training.TrainingBench, None, (*SMALL, *words))
    training.choose_steps(config)
    return config


@pytest.fixture
def patched(monkeypatch):
    """Undo what a measured process replaces."""
    for owner, name in (
        *((batches, "linear_logprob"), (training.policy_step, "make_batch")),
        *((training.policy_step, "response_states"), (torch.Tensor, "backward")),
        *((training.policy_step, "states_logprobs"), (training.Optimizer, "step")),
        *((training.sft, "response_states"), (training.sft, "states_logprobs")),
        (training.Sampler, "generate"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


OF_TRAINING = {"forward", "backward", "optimizer", "rest"}
STAGES_OF = {
    "sft": OF_TRAINING,
    "grpo": {"reference pass", *OF_TRAINING},
    "score": {"rest"},
    "logprob": {"backward", "rest"},
}


@pytest.mark.parametrize("step", list(training.STEPS))
@pytest.mark.parametrize("side", ["ours", "plain"])
def test_a_step_is_measured(step, side, patched):
    """In this process: the numbers mean little, but the steps are made."""
    found = training.measure("tiny", step, side, small())
    assert found["bytes"] >= 0 and set(found["stages"]) == STAGES_OF[step]
    assert sum(found["stages"].values()) == pytest.approx(found["seconds"], rel=1e-9)
    assert min(found["stages"].values()) > 0
    assert (batches.linear_logprob is training.materialised_logprob) == (side == "plain")


@pytest.mark.parametrize("step", ["sft", "grpo"])
def test_a_step_of_adapters_is_measured(patched, step):
    config = small("lora=2")
    assert training.measure("tiny", step, "ours", config)["seconds"] > 0
    model, optimizer = training.in_training(training.new_model("tiny", config), config)
    assert not any(p.requires_grad for p in model.parameters())
    assert {tuple(w.parameter.shape) for w in optimizer.weights.values()} >= {(2, 128)}
    assert all(2 in w.parameter.shape for w in optimizer.weights.values())


def test_stages_are_clocked_where_they_are_spent(patched, monkeypatch):
    spent = {"reference": 0.01, "policy": 0.02, "trained": 0.04, "optimizer": 0.08}
    monkeypatch.setattr(
        training, "seconds_of", lambda run, _: run() or spent[active[-1]]
    )
    active: list[str] = []
    monkeypatch.setattr(
        training.policy_step,
        "response_states",
        lambda *_: active.append(now) or "states",
    )
    monkeypatch.setattr(
        training.Optimizer, "step", lambda *_: active.append("optimizer")
    )
    stages = training.clocked_stages(torch.device("cpu"))
    model = training.new_model("tiny", small())
    now = "trained"
    assert training.policy_step.response_states(model, "batch") == "states"
    now = "policy"
    with torch.no_grad():
        training.policy_step.response_states(model, "batch")
        now = "reference"
        for _ in range(2):
            training.policy_step.response_states(model.requires_grad_(False), "batch")
    training.Optimizer.step(None, 0.1)
    assert stages == pytest.approx(
        {
            "forward": 0.04,
            "old logprobs": 0.02,
            "reference pass": 0.02,
            "optimizer": 0.08,
        }
    )


@pytest.mark.parametrize("words", [(), ("token_budget=40",)], ids=["whole", "cut"])
@pytest.mark.parametrize("step", list(training.STEPS))
def test_the_floor_has_the_products_that_a_step_makes(step, words):
    """By a count of all products as PyTorch makes them, but for those inside attention."""
    config = small("sequences=6", "groups=3", "prompt=9", "response=7", *words)
    assert made_in(step, config) == needed_by(step, config) > 0


def made_in(step: str, config: training.TrainingBench) -> int:
    run = training.STEPS[step]("tiny", "ours", config)
    aten = torch.ops.aten
    # PyTorch's counter does not know it.
    added = {aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=added) as counter:
        run()
    made = counter.get_flop_counts()["Global"]
    return sum(made.get(kind, 0) for kind in (aten.mm, aten.addmm, aten.addmm_))


def needed_by(step: str, config: training.TrainingBench) -> int:
    return sum(
        2 * rows * out * width * times * (1 if way == "forward" else 2)
        for (way, rows, out, width), times in training.products(
            "tiny", step, config
        ).items()
    )


def test_what_is_computed_again_is_not_in_the_floor(monkeypatch):
    config = small("sequences=6", "prompt=9", "response=7")
    config.gradient_checkpointing = True
    again = made_in("grpo", config) - needed_by("grpo", config)
    # The layers go forward twice, but for their last product: nothing needs its result.
    assert again == needed_by("score", config) - 3 * 2 * (9 + 6 * 7) * 128 * 352
    monkeypatch.setattr(linear_logprob_module, "CHUNK_LOGITS", 1)  # 64 tokens at a time
    config = small("tokens=65")
    again = made_in("logprob", config) - needed_by("logprob", config)
    assert again == 2 * 65 * 1024 * 128


def test_the_floor_is_the_time_of_its_products(monkeypatch):
    made = []

    def pretend(product, device, seconds):
        made.append(tuple(product().shape))
        return 10.0 ** (len(made) - 1)

    monkeypatch.setattr(training, "fastest", pretend)
    needed = {("forward", 3, 5, 7): 2, ("backward", 3, 5, 7): 4}
    assert training.floor_of(needed, small()) == 2 + 4 * (10 + 100)
    assert made == [(3, 5), (3, 7), (5, 7)]


def test_prompts_are_those_of_groups():
    config = small("sequences=6", "groups=3", "prompt=9", "response=7")
    prompts = [tuple(e.prompt) for e in training.random_examples("tiny", config, 3)]
    assert len(set(prompts)) == 2 and prompts == [prompts[0]] * 3 + [prompts[3]] * 3


def test_trl_makes_the_same_step(patched, monkeypatch):
    """The gradient has the same norm, at once and in micro-batches."""
    pytest.importorskip("trl")
    from accelerate import Accelerator

    norms = []
    clip = Accelerator.clip_grad_norm_

    def noted(*arguments):
        norms.append(float(clip(*arguments)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", noted)
    for words in (), ("token_budget=40",):
        config = small("sequences=6", "groups=3", "prompt=9", "response=7", *words)
        found = training.measure("tiny", "grpo", "trl", config)
        assert found["seconds"] > 0 and found["bytes"] >= 0
        ours = training.STEPS["grpo"]("tiny", "ours", config)()
        assert norms[0] == pytest.approx(ours["grad_norm"], rel=1e-4)
        norms.clear()


def test_a_step_may_begin_by_sampling(patched, monkeypatch):
    drawn = []
    generate = training.Sampler.generate

    def noted(*arguments, **options):
        drawn.append(generate(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(training.Sampler, "generate", noted)
    sizes = "sequences=6", "groups=3", "prompt=9", "response=7"
    found = training.measure(
        "tiny", "grpo", "ours", small("against=trl", "sampled=true", *sizes)
    )
    assert found["stages"]["sampling"] > 0
    assert {len(c.tokens) for c in drawn[0]} == {7} and len(drawn[0]) == 6
    known = training.measure("tiny", "grpo", "ours", small(*sizes))
    assert "sampling" not in known["stages"]
    with pytest.raises(ValueError, match="sampled=true needs against=trl"):
        small("sampled=true")


def test_both_sides_compute_the_same():
    hidden, weight = (torch.randn(n, 6, requires_grad=True) for n in (9, 40))
    target = torch.randint(40, (9,))
    results = []
    for function in linear_logprob, training.materialised_logprob:
        found, entropy = function(hidden, weight, target, 0.7)
        results.append(
            (found, entropy, *torch.autograd.grad(found.sum(), (hidden, weight)))
        )
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5)


def test_sides_take_turns_and_failing_is_a_result(call, monkeypatch, tmp_path):
    order = []

    class Pool:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, function, shape, step, side, config):
            order.append((step, side))
            return self

        def result(self) -> dict[str, float]:
            if order[-1] == ("logprob", "plain"):
                raise BrokenProcessPool("killed")
            if order[-1] == ("score", "ours"):
                raise RuntimeError("out of luck\nand more")
            if order[-1][1] == "floor":
                return {"seconds": 0.5 / len(order)}
            stages = {"forward": 0.75 / len(order), "rest": 0.25 / len(order)}
            found = {"seconds": 1.0 / len(order), "bytes": 5_000_000 + len(order)}
            return {**found, "stages": stages if "sft" in order[-1] else {"rest": 1.0}}

    monkeypatch.setattr(measure, "ProcessPoolExecutor", Pool)
    save = tmp_path / "bench.json"
    words = (
        "shapes=tiny",
        "steps=logprob,score,sft",
        "repeats=2",
        "device=cpu",
        f"save={save}",
    )
    outcome = call(main, "bench", "training", *words)
    assert outcome.code == 1
    assert order == [
        (step, side)
        for step in ("logprob", "score", "sft")
        for _ in range(2)
        for side in ("ours", "plain", "floor", *["expected"] * (step == "sft"))
    ]
    lines = outcome.out.splitlines()[-7:]
    cells = ["tiny", "logprob", "250.0", "-", "-", "5", "-", "-", "83.3", "0.33"]
    assert lines[0].split() == cells
    assert lines[1] == "    plain: no memory"
    assert lines[2].split()[-2:] == ["41.7", "-"]
    assert lines[3] == "    ours: RuntimeError: out of luck"
    cells = ["tiny", "sft", "58.8", "55.6", "1.06", "5", "5", "1.00", "26.3", "0.45"]
    assert lines[4].split() == cells
    assert lines[5] == "    stages, ms: forward 44.1 (75%), rest 14.7 (25%)"
    assert lines[6] == "    expected: 50.0 ms (0.85 of ours), 5 MB (1.00)"
    assert len(json.loads(save.read_text(encoding="utf-8"))["rows"]) == 3


def test_the_tiny_shape_is_that_of_the_configs(tokenizer):
    model = nanomath.config.load(
        settings.SFTConfig, CONFIGS / "tiny" / "sft.toml"
    ).model.new
    shape = measure.SHAPES["tiny"]
    assert shape.vocab_size == tokenizer.vocab_size
    assert (
        shape.hidden_size,
        shape.num_layers,
        shape.num_heads,
        shape.num_kv_heads,
        shape.intermediate_size,
    ) == (
        *(
            model.hidden_size,
            model.layers,
            model.heads,
            model.kv_heads,
            model.intermediate_size,
        ),
    )


# --- rollout ---------------------------------------------------------------------------------


def setup(**changes) -> rollout.RolloutBench:
    options = {"model": "tiny", "device": "cpu", "dtype": "float32", "threads": 1}
    return rollout.RolloutBench(**{**options, "scored": 3, "batches": [2, 4], **changes})


def point(rows: int = 4, group: int = 2, response: int = 5) -> Point:
    generator = torch.Generator().manual_seed(0)
    return Point(
        rows, group, response, torch.randint(1024, (2, 6), generator=generator).tolist()
    )


@pytest.mark.slow
def test_real_processes_measure_the_sampler(call, tmp_path):
    save = tmp_path / "rollout.json"
    words = (
        "tiny",
        "rows=2,4",
        "groups=2",
        "prompt=6",
        "response=20",
        "repeats=1",
        "threads=1",
        "device=cpu",
    )
    outcome = call(main, "bench", "rollout", *words, "against=unshared", f"save={save}")
    assert outcome.code == 0, outcome.err
    report = json.loads(save.read_text(encoding="utf-8"))
    assert report["command"].startswith("python -m nanomath bench rollout tiny rows=2,4")
    assert min(report["machine"].values()) > 1e8
    assert [
        (row["rows"], row["group"], row["prompt"], row["response"])
        for row in report["rows"]
    ] == [*((2, 2, 6, 20), (4, 2, 6, 20))]
    for row in report["rows"]:
        assert min(row[side]["tokens_per_s"] for side in ("nanomath", "unshared")) > 0
        assert (
            row["context"] == 6 + (8 + 16) / 2
        )  # from the first look to the last one before the end
        assert row["share"] == pytest.approx(
            sum(row["floor_s"].values()) / row["nanomath"]["step_s"]
        )
        assert set(row["stages"]) == {*STAGES, "other"}
        assert sum(row["stages"].values()) == pytest.approx(1)
        assert 0 < row["gap_max"] < 1e-5
        assert row["effective_samples"] == pytest.approx(1, abs=1e-5)
        cells, *notes = rollout.table_row(row)
        assert all(note in outcome.out for note in notes) and len(notes) == 2
        assert cells in [line.split() for line in outcome.out.splitlines()]


def test_a_model_with_eos_is_measured_on_real_prompts(model_directory, tmp_path):
    questions = tmp_path / "questions.jsonl"
    lines = [
        json.dumps({"question": f"What is {n} + {n}?", "answer": str(2 * n)})
        for n in (1, 22)
    ]
    questions.write_text("\n".join(lines), encoding="utf-8")
    config = setup(
        model=str(model_directory),
        problems=str(questions),
        refills=1,
        rows=[4],
        groups=[2],
        response=[20],
    )
    (asked,) = rollout.new_points(config, rollout.model_shape(config.model))
    first, second, *again = asked.prompts
    assert len(first) < len(second) and again == [first, second]
    assert "What is 22 + 22?" in nanomath.load_tokenizer(model_directory).decode(second)
    assert asked.prompt == (len(first) + len(second)) / 2
    found = rollout.measure_sampler(config, asked, True)
    assert found["tokens_per_s"] > 0
    assert found["live"] == 4  # the step is timed without eos and without refills
    found = rollout.inspect_sampler(config, asked)
    assert found["gap_max"] < 1e-4 and set(found["stages"]) == {*STAGES, "other"}


def test_the_step_is_timed_while_the_batch_is_full():
    looks = [
        (10.0, 0, 8, 8),
        (10.5, 0, 16, 8),
        (11.5, 0, 40, 8),
        (99.0, 3, 64, 8),
        (200.0, 8, 64, 0),
    ]
    assert rollout.step_time(looks) == {"step_s": 1.5 / 4, "drawn": 3.0, "live": 8}
    assert rollout.step_time(looks[:1] + looks[3:]) == {}
    assert rollout.step_time([]) == {}


def test_speed_is_tokens_by_time(monkeypatch):
    """With a sampler that takes a second for each step and half of one for the rest."""
    clock = SimpleNamespace(now=0.0)

    class Slow:
        def __init__(self, *arguments: object, **options: object) -> None: ...
        def release(self) -> None: ...
        def generate(self, prompts, n, tokens, progress):
            samples = len(prompts) * n
            clock.now += 0.5
            for step in range(1, tokens + 1):
                clock.now += 1.0
                progress(
                    samples * (step == tokens), samples * step, samples * (step < tokens)
                )
            return [SimpleNamespace(length=tokens)] * samples

    monkeypatch.setattr(rollout, "Sampler", Slow)
    monkeypatch.setattr(rollout.time, "perf_counter", lambda: clock.now)
    found = rollout.measure_sampler(setup(), point(), True)
    assert found["tokens_per_s"] == pytest.approx(20 / 5.5) and found[
        "step_s"
    ] == pytest.approx(1.0)
    assert (found["drawn"], found["live"]) == (2.5, 4)


def test_the_gap_is_that_of_the_trainer():
    model, _ = rollout.build(setup(dtype="float64"))
    drawn = point()
    tokens = [[5, 9, 2], [7], [1, 0, 3]]
    exact = [
        model(torch.tensor([[*drawn.prompts[i // 2], *row]]))
        .log_softmax(-1)[0, 5:-1]
        .double()
        .gather(1, torch.tensor(row)[:, None])
        for i, row in enumerate(tokens)
    ]
    shift = [[0.1, 0.0, -0.3], [0.0], [0.0, 0.2, 0.0]]
    completions = [
        SimpleNamespace(
            prompt_index=i // 2,
            tokens=row,
            length=len(row),
            logprobs=(e[:, 0] - torch.tensor(d)).tolist(),
        )
        for i, (row, e, d) in enumerate(zip(tokens, exact, shift, strict=True))
    ]
    found = rollout.gap(model, drawn, completions)
    w = torch.tensor([x for row in shift for x in row]).double().exp()
    assert found["gap_mean"] == pytest.approx(0.6 / 7, abs=1e-6) and found[
        "gap_max"
    ] == pytest.approx(0.3, abs=1e-6)
    assert found["effective_samples"] == pytest.approx(
        float(w.sum() ** 2 / (7 * (w * w).sum())), abs=1e-6
    )


@pytest.mark.parametrize(
    ("name", "shapes", "stage"),
    [
        ("mkldnn::_linear_pointwise", [[16, 128], [320, 128], []], "projections"),
        ("aten::addmm", [[320], [16, 128], [128, 320]], "projections"),
        ("aten::mm", [[16, 128], [128, 1000]], "lm_head"),
        ("mkldnn::_linear_pointwise", [[16, 128], [1000, 128], []], "lm_head"),
        ("aten::bmm", [[32, 4, 32], [32, 32, 64]], "attention"),
        ("aten::index_copy_", [[900, 32], [], [32], [32, 32]], "elementwise"),
        ("aten::exp", [[16, 1000]], "sampling"),
        ("aten::sum", [[16, 8, 128], []], "sampling"),
        ("aten::gather", [[16, 1024], [], [16, 128]], "sampling"),
        ("aten::silu", [[16, 352]], "elementwise"),
        ("aten::rms_norm", [[16, 128]], "elementwise"),
        ("aten::empty", [[]], "other"),
        ("attend", [], "attention"),
        ("decode", [], "all in one"),
        ("linear 128 960 576", [], "projections"),
        ("linear 128 1000 576", [], "lm_head"),
        ("lm_head 3 128 1000", [], "sampling"),
    ],
)
def test_operators_belong_to_stages(name, shapes, stage):
    assert stage_of(name, shapes, vocabulary=1000) == stage


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("_split_kernel", "attention"),
        ("_rope_write_kernel", "attention"),
        ("_blocks_kernel", "lm_head"),
        ("_add_rms_norm_kernel", "elementwise"),
        ("_swiglu_kernel", "elementwise"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "projections"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "projections"),
        ("_linear_kernel", "projections"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("Memcpy DtoH (Device -> Pinned)", "other"),
    ],
)
def test_kernels_belong_to_stages(name, stage):
    assert stage_of(name, (), 1000) == stage


@pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed"
)
def test_transformers_is_measured_on_the_same_model():
    found = rollout.measure_transformers(setup(), point())
    assert found["tokens_per_s"] > 0 and found["bytes"] >= 0


def test_tokens_of_transformers_count_up_to_their_eos():
    class Theirs:
        device = torch.device("cpu")

        def generate(self, padded, attention_mask, **options):
            assert padded.tolist() == [[0, 7], [8, 9]] and attention_mask.tolist() == [
                [0, 1],
                [1, 1],
            ]
            assert options["do_sample"] and (
                options["temperature"],
                options["top_k"],
                options["top_p"],
            ) == (1, 0, 1)
            assert options["max_new_tokens"] == 4
            return torch.tensor([[0, 7, 5, 3, 5, 3], [8, 9, 1, 1, 1, 1]])

    tokenizer = NoText()
    assert rollout.generate(Theirs(), tokenizer, [(7,), (8, 9)], 4) == 8
    tokenizer.eos_ids = (3, 2)
    assert rollout.generate(Theirs(), tokenizer, [(7,), (8, 9)], 4) == 2 + 4


def test_the_best_of_each_side_counts(monkeypatch):
    order = []

    def pretend(threads, function, *arguments):
        order.append((function.__name__, *arguments[2:]))
        speed = {1: 50.0, 4: 70.0, 5: 90.0}.get(len(order), 10.0)
        if function is rollout.measure_transformers:
            return {"failed": "no memory"}
        if function is rollout.inspect_sampler:
            return {"stages": {"attention": 1.0}}
        step = {"step_s": 1 / speed, "drawn": 2.0, "live": 4}
        return {"tokens_per_s": speed, "bytes": 100 * len(order), **step}

    monkeypatch.setattr(measure, "in_new_process", pretend)
    monkeypatch.setattr(rollout, "in_new_process", pretend)
    config = setup(against=["unshared", "transformers"], repeats=2)
    row = rollout.measure_point(
        config, measure.SHAPES["tiny"], point(), Machine(1e9, 1e9)
    )
    turn = [
        ("measure_sampler", True),
        ("measure_sampler", False),
        ("measure_transformers",),
    ]
    assert order == [*turn, *turn, ("inspect_sampler",)]
    assert [row[side].get("tokens_per_s") for side in ("nanomath", "unshared")] == [
        70.0,
        90.0,
    ]
    assert [row[side].get("bytes") for side in ("nanomath", "unshared")] == [400, 500]
    assert row["nanomath"]["step_s"] == pytest.approx(1 / 70)
    cells, *notes = rollout.table_row(row)
    assert cells[:5] == ["4", "6", "5", "2", "70.0"] and cells[-2:] == ["0.78", "-"]
    assert notes == ["stages: attention 100%", "failed: transformers: no memory"]


# --- kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [name for name in CASES if name not in OF_TOKENS])
def test_both_forms_of_a_kernel_compute_the_same_in_the_benchmark(kernel, kernel_device):
    torch.manual_seed(0)
    grouped = (
        kernel == "grouped_attention"
    )  # which float32 is not computed in: two groups in float16
    rows, dtype, tolerance = (
        (32, torch.float16, 2e-3) if grouped else (16, torch.float32, 2e-4)
    )
    case = CASES[kernel](
        Setting(measure.SHAPES["tiny"], rows, 300, 8, kernel_device, dtype)
    )
    results = [form(*case.arguments) for form in (case.kernel, case.reference)]
    for mine, plain in zip(
        *(r if isinstance(r, tuple) else (r,) for r in results), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_real_processes_measure_kernels_and_references(call, tmp_path):
    save = tmp_path / "kernels.json"
    words = (
        "device=cpu",
        "threads=1",
        "kernels=swiglu",
        "shapes=tiny",
        "rows=16,32",
        f"save={save}",
    )
    outcome = call(main, "bench", "kernels", *words)
    assert outcome.code == 0, outcome.err
    rows = json.loads(save.read_text(encoding="utf-8"))["rows"]
    assert [(row["kernel"], row["shape"], row["rows"]) for row in rows] == [
        *(("swiglu", "tiny", 16), ("swiglu", "tiny", 32))
    ]
    assert all(
        row[name] > 0 for row in rows for name in ("kernel_s", "reference_s", "floor_s")
    )
    assert rows[1]["floor_s"] == pytest.approx(2 * rows[0]["floor_s"])


def test_a_kernel_that_fails_is_a_result(monkeypatch):
    def broken(setting: Setting) -> None:
        raise RuntimeError("an illegal memory access was encountered\nmore")

    monkeypatch.setitem(CASES, "swiglu", broken)
    config = kernels.KernelBench(
        shapes=["tiny"], rows=[16, 32], device="cpu", dtype="float32"
    )
    (row,) = kernels.measure("swiglu", config, Machine(1e9, 1e9))["rows"]
    assert row["failed"] == "RuntimeError: an illegal memory access was encountered"
    assert kernels.table_row(row)[1] == f"failed: {row['failed']}"


def test_check_runs_the_kernels_tests(call, monkeypatch):
    ran = []

    def pretend(command, cwd, check):
        ran.append((command[1:], cwd))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(kernels.subprocess, "run", pretend)
    assert call(main, "bench", "kernels", "--check").code == 1
    ((command, root),) = ran
    assert command == [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/kernels",
        "tests/gpu",
    ]
    assert (root / "tests/kernels/test_philox.py").is_file() and (
        root / "tests/gpu/conftest.py"
    ).is_file()


def test_check_says_what_is_missing(call, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert (
        call(main, "bench", "kernels", "--check").err
        == "error: --check needs pytest: pip install pytest hypothesis\n"
    )
    monkeypatch.setattr(
        kernels.nanomath, "__file__", str(tmp_path / "nanomath" / "__init__.py")
    )
    outcome = call(main, "bench", "kernels", "--check")
    assert outcome.code == 2 and outcome.err == (
        "error: --check runs the repository's tests/kernels and tests/gpu, "
        f"and {tmp_path} has none\n"
    )


# --- everything ------------------------------------------------------------------------------


def read(directory: Path) -> tuple[dict, str]:
    page = (directory / "bench.md").read_text(encoding="utf-8")
    return json.loads((directory / "bench.json").read_text(encoding="utf-8")), page


def test_all_goes_on_after_a_failure_and_names_what_needs_a_gpu(
    call, monkeypatch, tmp_path
):
    commands = []

    def pretend(command, **_):
        if command[0] == "git":
            return SimpleNamespace(stdout="c0ffee")
        words = command[2:]
        commands.append(words)
        for place in (
            word.removeprefix("save=") for word in words if word[:5] == "save="
        ):
            Path(place).write_text(
                json.dumps({"rows": [len(commands)]}), encoding="utf-8"
            )
        if len(commands) == 3:
            read(tmp_path)  # what the first two found is there
            raise KeyboardInterrupt
        return SimpleNamespace(
            returncode=len(commands) - 1, stdout=f"said {len(commands)}\n"
        )

    monkeypatch.setattr(every.subprocess, "run", pretend)
    words = (
        "device=cpu",
        f"out={tmp_path}",
        "parts=check,rollout-1.5b,kernels,training",
    )
    outcome = call(main, "bench", "all", *words)
    assert outcome.code == 1 and outcome.err == "error: interrupted\n"
    results, page = read(tmp_path)
    parts = results["parts"]
    assert [part["outcome"] for part in parts.values()] == [
        "done",
        "needs a GPU",
        "failed",
    ]
    assert (
        parts["kernels"]["report"] == {"rows": [2]} and parts["check"]["report"] is None
    )
    assert results["torch"] == torch.__version__ and results["commit"] == "c0ffee"
    assert commands[0] == ["nanomath", "bench", "kernels", "--check"]
    assert "| rollout-1.5b | needs a GPU | 0 |" in page
    assert "said 2" in page and "said 3" not in page
    results["parts"]["check"]["output"] = (
        f"{Path(pytest.__file__).parents[1]}/a.py:3: odd"
    )
    assert "\na.py:3: odd\n" in every.page(results)  # wherever packages are


def test_all_records_what_a_command_says_and_its_failure(tmp_path):
    config = every.AllBench(device="cpu", dtype="float32")
    part = every.run_part(["rollout", "smolm2"], config, tmp_path / "part.json")
    assert part["outcome"] == "failed" and part["report"] is None
    assert part["output"].startswith("error: unknown model 'smolm2'")


@pytest.mark.parametrize("commands", [every.CPU, every.GPU], ids=["cpu", "gpu"])
def test_every_part_is_a_command_that_its_target_understands(commands):
    configs = {
        "rollout": rollout.RolloutBench,
        "kernels": kernels.KernelBench,
        "training": training.TrainingBench,
    }
    for command in commands.values():
        target, *words = command.split()
        config = nanomath.config.load(
            configs[target], None, [w for w in words if "=" in w]
        )
        if target == "rollout":
            config.model = words[0]
            assert rollout.new_points(config, rollout.model_shape(config.model))


# --- usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], f"bench needs a target: expected one of {TARGETS}"),
        (["trainning"], f"unknown target 'trainning': expected one of {TARGETS}"),
        (["training", "shapes=smollm"], "shapes"),
        (["training", "repeats=0"], "repeats"),
        (["training", "groups=3"], "groups of 3 do not make 8 sequences"),
        (["training", "speed=1"], "speed"),
        (
            ["training", "save=missing/bench.json"],
            "there is no directory to write missing/bench.json to",
        ),
        (["training", "device=tpu9"], "tpu9"),
        (
            ["rollout", "smolm2"],
            "unknown model 'smolm2': expected a directory, a hub id, or one of tiny, smollm2",
        ),
        (
            ["rollout", "tiny", "prompt=500", "response=13"],
            "500 tokens and a response of 13 do not fit",
        ),
        (["rollout", "tiny", "rows=16", "groups=3"], "groups of 3 do not fill 16 rows"),
        (
            ["rollout", "tiny", "save=missing/bench.json"],
            "there is no directory to write missing/bench.json to",
        ),
        (["rollout", "tiny", "problems=world.jsonl"], "tiny has random weights"),
        (["rollout", "tiny", "against=vllm"], "unshared, transformers"),
        (["rollout", "missing.toml"], "config file not found: missing.toml"),
        (["kernels", "kernels=softmax"], "kernels"),
        (["kernels", "shapes=llama"], "shapes"),
        (["kernels", "rows=40"], "grouped_attention needs multiples of 16"),
        (["kernels", "--chek"], "did you mean --check?"),
        (
            ["kernels", "save=missing/bench.json"],
            "there is no directory to write missing/bench.json to",
        ),
        (["all", "parts=rest"], "parts"),
        (["all", "minutes=5"], "minutes"),
    ],
)
def test_bad_input_is_one_line(call, words, said):
    outcome = call(main, "bench", *words)
    assert outcome.code == 2 and outcome.out == ""
    assert (
        outcome.err.startswith("error: ")
        and outcome.err.count("\n") == 1
        and said in outcome.err
    )


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
    said = "error: against=trl compares steps=grpo alone, not sft,grpo\n"
    assert outcome.code == 2 and outcome.err == said
    assert small("against=trl").steps == ["grpo"]


def test_help(call):
    page = call(main, "bench", "--help").out
    assert page.startswith("Measure time and memory") and all(
        f"\n  {target} " in page for target in bench.TARGETS
    )
    classes = (
        rollout.RolloutBench,
        kernels.KernelBench,
        training.TrainingBench,
        every.AllBench,
    )
    for target, cls in zip(bench.TARGETS, classes, strict=True):
        keys = call(main, "bench", target, "-h").out
        assert all(f"  {key}=" in keys for key in vars(cls()))
    assert "  --check " in call(main, "bench", "kernels", "-h").out
