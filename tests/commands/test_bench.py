"""`python -m nanomath bench`: what it measures, prints and saves, and what it refuses."""

from __future__ import annotations

import json
import time
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import nanomath.config
from kernels.linear_logprob import linear_logprob
from nanomath import settings
from nanomath.__main__ import main
from nanomath.commands import bench
from nanomath.commands.bench import everything, kernels, machine, rollout, sides, training
from nanomath.commands.bench.kernel_cases import CASES, OF_TOKENS, Setting
from nanomath.commands.bench.sides import NoText, Point, Setup
from nanomath.commands.bench.stages import STAGES, kernel_stage, operator_stage
from nanomath.rollout.floor import Machine
from nanomath.training import logprobs

CONFIGS = Path(__file__).parents[2] / "configs"
TARGETS = "training, rollout, kernels, all"
SMALL = (
    "device=cpu",
    "threads=1",
    "repeats=1",
    "tiny=2",
    "prompt=3",
    "response=4",
    "tokens=2500",
    "vocabulary=8000",
)


# --- training --------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_processes_measure_that_chunks_need_less_memory(call, tmp_path):
    save = tmp_path / "bench.json"
    outcome = call(
        main, "bench", "training", *SMALL, "cases=logprob", "width=8", f"save={save}"
    )
    assert outcome.code == 0, outcome.err
    report = json.loads(save.read_text(encoding="utf-8"))
    assert report["torch"] == torch.__version__ and report["config"]["width"] == 8
    assert report["command"].startswith("python -m nanomath bench training device=cpu")
    (row,) = report["rows"]
    assert row["case"] == "logprob" and min(row["seconds"].values()) > 0
    logits = 2500 * 8000 * 4
    assert (
        logits < row["bytes"]["ours"] < 3 * logits < row["bytes"]["plain"]
    )  # a single chunk: z and its softmax
    assert training.table_row(row) == outcome.out.splitlines()[-1]


@pytest.mark.parametrize("case", ["tiny-sft", "tiny-grpo", "tiny-score"])
@pytest.mark.parametrize("variant", training.VARIANTS)
def test_a_step_is_measured(case, variant, monkeypatch):
    """In this process: the numbers mean little, but the steps are made."""
    monkeypatch.setattr(
        logprobs, "linear_logprob", linear_logprob
    )  # put back what "plain" puts in its place
    config = nanomath.config.load(training.TrainingBench, None, SMALL)
    seconds, peak = training.measure(case, variant, config)
    assert seconds > 0 and peak >= 0
    assert (logprobs.linear_logprob is training.materialised_logprob) == (variant == "plain")


def test_both_sides_compute_the_same():
    hidden, weight = (torch.randn(n, 6, requires_grad=True) for n in (9, 40))
    target = torch.randint(40, (9,))
    results = []
    for function in linear_logprob, training.materialised_logprob:
        found, entropy = function(hidden, weight, target, 0.7)
        results.append((found, entropy, *torch.autograd.grad(found.sum(), (hidden, weight))))
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5)


def test_sides_take_turns_and_running_out_of_memory_is_a_result(call, monkeypatch):
    order = []

    class Pool:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, function, case, variant, config):
            order.append((case, variant))
            return self

        def result(self) -> tuple[float, int]:
            if order[-1][1] == "plain":
                raise BrokenProcessPool("killed")
            return 1.0 / len(order), 5_000_000 + len(order)

    monkeypatch.setattr(machine, "ProcessPoolExecutor", Pool)
    outcome = call(
        main, "bench", "training", "device=cpu", "cases=logprob,tiny-sft", "repeats=2"
    )
    assert order == [
        (case, side)
        for case in ("logprob", "tiny-sft")
        for _ in range(2)
        for side in training.VARIANTS
    ]
    rows = [line.split() for line in outcome.out.splitlines()[-2:]]
    assert rows[0] == ["logprob", "0.333", "no", "memory", "5", "no", "memory"]
    assert rows[1][:2] == ["tiny-sft", "0.143"]


def test_the_tiny_shape_is_that_of_the_configs(tokenizer):
    model = nanomath.config.load(settings.SFTConfig, CONFIGS / "tiny" / "sft.toml").model.new
    shape = machine.SHAPES["tiny"]
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


def setup(**changes) -> Setup:
    options = {
        "model": "tiny",
        "device": "cpu",
        "dtype": torch.float32,
        "model_dtype": torch.float32,
        "exact": False,
    }
    return Setup(**{**options, "threads": 1, "scored": 3, "batches": (2, 4), **changes})


def point(
    rows: int = 4, group: int = 2, response: int = 5, prompts: int = 2, length: int = 6
) -> Point:
    tokens = torch.randint(
        1024, (prompts, length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return Point(rows, group, response, tuple(map(tuple, tokens)))


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
        (row["rows"], row["group"], row["prompt"], row["response"]) for row in report["rows"]
    ] == [*((2, 2, 6, 20), (4, 2, 6, 20))]
    for row in report["rows"]:
        assert (
            set(row["tokens_per_s"]) == {"nanomath", "unshared"}
            and min(row["tokens_per_s"].values()) > 0
        )
        assert (
            row["context"] == 6 + (8 + 16) / 2
        )  # from the first look to the last one before the end
        assert row["share"] == pytest.approx(
            sum(row["floor_ms"].values()) / row["step_ms"]["nanomath"]
        )
        assert set(row["stages"]) == set(STAGES) and sum(
            row["stages"].values()
        ) == pytest.approx(1)
        assert 0 < row["gap"]["max"] < 1e-5 and row["gap"][
            "effective_samples"
        ] == pytest.approx(1, abs=1e-5)
        assert rollout.table_row(row) in outcome.out


def test_a_model_with_eos_is_measured_on_real_prompts(model_directory, tmp_path):
    questions = tmp_path / "questions.jsonl"
    lines = [
        json.dumps({"question": f"What is {n} + {n}?", "answer": str(2 * n)}) for n in (1, 22)
    ]
    questions.write_text("\n".join(lines), encoding="utf-8")
    config = rollout.RolloutBench(
        model=str(model_directory), problems=str(questions), refills=1, device="cpu"
    )
    rollout.resolve(config)
    asked = rollout.new_point(config, rollout.model_shape(config.model), 4, 20, 2, 0)
    first, second, *again = asked.prompts
    assert len(first) < len(second) and again == [first, second]
    assert "What is 22 + 22?" in nanomath.load_tokenizer(model_directory).decode(second)
    assert (asked.samples, asked.prompt) == (8, (len(first) + len(second)) / 2)
    found = sides.measure_sampler(setup(model=config.model), asked, True, details=True)
    assert (
        found["tokens_per_s"] > 0 and found["live"] == 4
    )  # the step is timed without eos and without refills
    assert found["gap"]["max"] < 1e-4


def test_the_step_is_timed_while_the_batch_is_full():
    looks = [
        (10.0, 0, 8, 8),
        (10.5, 0, 16, 8),
        (11.5, 0, 40, 8),
        (99.0, 3, 64, 8),
        (200.0, 8, 64, 0),
    ]
    assert sides.step_time(looks) == {"step_s": 1.5 / 4, "drawn": 3.0, "live": 8}
    assert sides.step_time(looks[:1] + looks[3:]) == {}
    assert sides.step_time([]) == {}


def test_speed_is_tokens_by_time(monkeypatch):
    """With a sampler that takes a second for each step and half of one for the rest."""
    clock = SimpleNamespace(now=0.0)

    class Slow:
        def __init__(self, *arguments: object) -> None: ...
        def release(self) -> None: ...
        def generate(self, prompts, n, tokens, progress):
            samples = len(prompts) * n
            clock.now += 0.5
            for step in range(1, tokens + 1):
                clock.now += 1.0
                progress(samples * (step == tokens), samples * step, samples * (step < tokens))
            return [SimpleNamespace(length=tokens)] * samples

    monkeypatch.setattr(sides, "Sampler", Slow)
    monkeypatch.setattr(sides.time, "perf_counter", lambda: clock.now)
    found = sides.measure_sampler(setup(), point(), True, details=False)
    assert found["tokens_per_s"] == pytest.approx(20 / 5.5) and found[
        "step_s"
    ] == pytest.approx(1.0)
    assert (found["drawn"], found["live"]) == (2.5, 4)


def test_the_gap_is_that_of_the_trainer():
    model, _ = sides.build(setup(), torch.float64)
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
    found = sides.gap(model, drawn, completions)
    w = torch.tensor([x for row in shift for x in row]).double().exp()
    assert found["mean"] == pytest.approx(0.6 / 7, abs=1e-6) and found["max"] == pytest.approx(
        0.3, abs=1e-6
    )
    assert found["effective_samples"] == pytest.approx(
        float(w.sum() ** 2 / (7 * (w * w).sum())), abs=1e-6
    )
    assert sides.gap(model, drawn, []) == {}


@pytest.mark.parametrize(
    ("name", "shapes", "stage"),
    [
        ("mkldnn::_linear_pointwise", [[16, 128], [320, 128], []], "projections"),
        ("aten::addmm", [[320], [16, 128], [128, 320]], "projections"),
        ("aten::mm", [[16, 128], [128, 1000]], "lm_head"),
        ("mkldnn::_linear_pointwise", [[16, 128], [1000, 128], []], "lm_head"),
        ("aten::bmm", [[32, 4, 32], [32, 32, 64]], "attention"),
        ("aten::exp_", [[16, 2, 4, 64]], "attention"),
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
    assert operator_stage(name, shapes, vocabulary=1000) == stage


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
    assert kernel_stage(name) == stage


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_is_measured_on_the_same_model():
    found = sides.measure_transformers(setup(), point())
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
    assert sides.generate(Theirs(), tokenizer, [(7,), (8, 9)], 4) == 8
    tokenizer.eos_ids = (3, 2)
    assert sides.generate(Theirs(), tokenizer, [(7,), (8, 9)], 4) == 2 + 4


def test_sides_take_turns_and_the_best_of_each_counts(monkeypatch):
    order = []

    def pretend(function, *arguments):
        order.append((function.__name__, *arguments[2:]))
        speed = {1: 50.0, 4: 70.0, 5: 90.0}.get(len(order), 10.0)
        if function is sides.measure_transformers:
            return []  # out of memory
        step = {"step_s": 1 / speed, "drawn": 2.0, "live": 4}
        return [
            {"tokens_per_s": speed, "bytes": 100 * len(order), **step}
            | ({"gap": {}} if arguments[3] else {})
        ]

    monkeypatch.setattr(machine, "in_new_process", pretend)
    config = rollout.RolloutBench(
        model="tiny",
        against=["unshared", "transformers"],
        repeats=2,
        device="cpu",
        dtype="float32",
    )
    config.model_dtype = "float32"
    row = rollout.measure_point(
        config, machine.SHAPES["tiny"], point(), Machine(1e9, 1e9), tqdm(disable=True)
    )
    assert order == [
        *(
            ("measure_sampler", True, True),
            ("measure_sampler", False, False),
            ("measure_transformers",),
        ),
        *(
            ("measure_sampler", True, False),
            ("measure_sampler", False, False),
            ("measure_transformers",),
        ),
    ]
    assert row["tokens_per_s"] == {"nanomath": 70.0, "unshared": 90.0, "transformers": None}
    assert row["bytes"] == {"nanomath": 100, "unshared": 200, "transformers": None}
    assert row["step_ms"]["nanomath"] == pytest.approx(1000 / 70) and row["gap"] == {}
    cells = rollout.table_row(row).split()
    assert cells[:5] == ["4", "6", "5", "2", "70.0"] and cells[-2:] == ["0.78", "-"]


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
    case = CASES[kernel](Setting(machine.SHAPES["tiny"], rows, 300, 8, kernel_device, dtype))
    results = [form() for form in (case.kernel, case.reference)]
    for mine, plain in zip(
        *(r if isinstance(r, tuple) else (r,) for r in results), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_real_processes_measure_references_and_name_what_needs_a_gpu(call, tmp_path):
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
    assert outcome.out.endswith(
        "the Triton forms of swiglu need a GPU: the CPU forms were measured\n"
    )
    outcome = call(
        main,
        "bench",
        "kernels",
        "kernels=record",
        "rows=2",
        "context=4",
        "device=cpu",
        "calls=1",
    )
    assert outcome.out.endswith("record: no CPU form, PyTorch was measured twice\n")
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
    config = kernels.KernelBench(shapes=["tiny"], rows=[16, 32], device="cpu", dtype="float32")
    (row,) = kernels.measure("swiglu", config, Machine(1e9, 1e9))
    assert row["failed"] == "RuntimeError: an illegal memory access was encountered"
    assert row["failed"] in kernels.table_row(row)


def test_check_runs_the_kernels_tests(call, monkeypatch):
    ran = []

    def pretend(command, cwd, check):
        ran.append((command[1:], cwd))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(kernels.subprocess, "run", pretend)
    assert call(main, "bench", "kernels", "--check").code == 1
    ((command, root),) = ran
    assert command == ["-m", "pytest", "-p", "no:cacheprovider", "tests/kernels", "tests/gpu"]
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
        f"error: --check runs the repository's tests/kernels and tests/gpu, and {tmp_path} has none\n"
    )


# --- everything ------------------------------------------------------------------------------


def read(directory: Path) -> tuple[dict, str]:
    page = (directory / "bench.md").read_text(encoding="utf-8")
    return json.loads((directory / "bench.json").read_text(encoding="utf-8")), page


def test_all_goes_on_after_a_failure_and_names_what_needs_a_gpu(call, monkeypatch, tmp_path):
    commands = []

    def pretend(words, seconds):
        commands.append(words)
        place = next(
            (word.removeprefix("save=") for word in words if word.startswith("save=")), None
        )
        if place:
            Path(place).write_text(json.dumps({"rows": [len(commands)]}), encoding="utf-8")
        if len(commands) == 3:
            read(tmp_path)  # what the first two found is there
            raise KeyboardInterrupt
        return len(commands) - 1, f"said {len(commands)}\n"

    monkeypatch.setattr(everything, "run", pretend)
    words = ("device=cpu", f"out={tmp_path}", "parts=check,rollout-1.5b,kernels,training")
    outcome = call(main, "bench", "all", *words)
    assert outcome.code == 1 and outcome.err == "error: interrupted\n"
    results, page = read(tmp_path)
    assert [everything.outcome(part) for part in results["parts"].values()] == [
        "done",
        "needs a GPU",
        "failed",
    ]
    assert (
        results["parts"]["kernels"]["report"] == {"rows": [2]}
        and results["parts"]["check"]["report"] is None
    )
    assert results["torch"] == torch.__version__ and results["commit"] == everything.commit()
    assert (
        not (everything.ROOT / ".git").exists()
        or len(results["commit"].removesuffix("-dirty")) == 40
    )
    assert commands[0] == ["-m", "nanomath", "bench", "kernels", "--check"]
    assert (
        "| rollout-1.5b | needs a GPU | 0 |" in page
        and "said 2" in page
        and "said 3" not in page
    )
    assert {line["met"] for line in results["targets"]} == {None} and "not measured" in page


def test_every_part_is_a_command_that_its_target_understands():
    configs = {
        "rollout": rollout.RolloutBench,
        "kernels": kernels.KernelBench,
        "training": training.TrainingBench,
    }
    for part in everything.PARTS.values():
        for gpu in (True, False):
            target, *words = part.words(gpu) or ["kernels"]
            keys = [word for word in words if "=" in word]
            config = nanomath.config.load(configs[target], None, keys)
            if target == "rollout":
                config.model = words[0]
                config.device, shape = "cpu", rollout.model_shape(config.model)
                assert all(
                    rollout.new_point(config, shape, *sizes)
                    for sizes in rollout.combinations(config)
                )


def test_targets_are_met_or_missed():
    stages = {"lm_head": 0.08, "sampling": 0.02}
    rows = [
        {"rows": 64, "share": 0.4},
        {
            "rows": 256,
            "share": 0.7,
            "stages": stages,
            "step_ms": {"nanomath": 2.0},
            "floor_ms": {"lm_head": 0.12},
        },
    ]
    groups = [
        {
            "rows": 1024,
            "tokens_per_s": {"nanomath": 60.0, "unshared": 40.0, "transformers": None},
        }
    ]
    logprob = [
        {"rows": 262144, "kernel_s": 1.5, "floor_s": 1.0, "bytes": 4 * 262144 * 1519.36}
    ]
    parts = {"rollout-1.5b": rows, "rollout-0.5b": rows, "groups": groups, "logprob": logprob}
    found = everything.targets(
        {"parts": {name: {"report": {"rows": r}} for name, r in parts.items()}}
    )
    values = [0.7, 0.7, 0.4, 0.04, 1.5, None, 1.5, 0.01]
    assert [line["found"] for line in found] == [
        None if v is None else pytest.approx(v) for v in values
    ]
    assert [line["met"] for line in found] == [
        True,
        True,
        False,
        True,
        True,
        None,
        False,
        True,
    ]


def test_what_takes_too_long_is_stopped_with_all_that_it_began(tmp_path):
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    assert everything.run(["-c", parent], 1.0) == (None, "begun\n")
    assert time.monotonic() - began < 2.5
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()
    assert everything.run(
        ["-c", "import sys; print('x', file=sys.stderr); sys.exit(3)"], 60
    ) == (3, "x\n")


# --- usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], f"bench needs a target: expected one of {TARGETS}"),
        (["trainning"], f"unknown target 'trainning': expected one of {TARGETS}"),
        (["training", "cases=smollm"], "cases"),
        (["training", "repeats=0"], "repeats"),
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
        (["all", "minutes=0"], "minutes"),
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


def test_transformers_may_be_missing(call, monkeypatch):
    monkeypatch.setattr(rollout, "find_spec", lambda name: None)
    outcome = call(main, "bench", "rollout", "tiny", "against=transformers", "device=cpu")
    assert (
        outcome.code == 2
        and outcome.err == "error: against=transformers needs it: pip install transformers\n"
    )


def test_help(call):
    page = call(main, "bench", "--help").out
    assert page.startswith("Measure time and memory") and all(
        f"\n  {target} " in page for target in bench.TARGETS
    )
    classes = (
        training.TrainingBench,
        rollout.RolloutBench,
        kernels.KernelBench,
        everything.AllBench,
    )
    for target, cls in zip(bench.TARGETS, classes, strict=True):
        keys = call(main, "bench", target, "-h").out
        assert all(f"  {key}=" in keys for key in vars(cls()))
    assert "  --check " in call(main, "bench", "kernels", "-h").out
