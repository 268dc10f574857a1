"""`python -m nanomath bench`: what it measures, prints and saves, and what it refuses."""

from __future__ import annotations

import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

import nanomath.config
from kernels.linear_logprob import linear_logprob
from nanomath import settings
from nanomath.__main__ import main
from nanomath.commands import bench
from nanomath.training import logprobs

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ("device=cpu", "threads=1", "repeats=1", "tiny=2", "prompt=3", "response=4", "tokens=2500", "vocabulary=8000")


def test_real_processes_measure_that_chunks_need_less_memory(call, tmp_path):
    save = tmp_path / "bench.json"
    outcome = call(main, "bench", "training", *SMALL, "cases=logprob", "width=8", f"save={save}")
    assert outcome.code == 0, outcome.err
    report = json.loads(save.read_text(encoding="utf-8"))
    assert report["torch"] == torch.__version__ and report["config"]["width"] == 8
    assert report["command"].startswith("python -m nanomath bench training device=cpu")
    (row,) = report["rows"]
    assert row["case"] == "logprob" and min(row["seconds"].values()) > 0
    logits = 2500 * 8000 * 4
    assert logits < row["bytes"]["chunks"] < 3 * logits < row["bytes"]["at once"]  # a single chunk: z and its softmax
    assert bench.table_row(row) == outcome.out.splitlines()[-1]


@pytest.mark.parametrize("case", ["tiny-sft", "tiny-grpo"])
@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_a_step_is_measured(case, variant, monkeypatch):
    """In this process: the numbers mean little, but the steps are made."""
    monkeypatch.setattr(logprobs, "linear_logprob", linear_logprob)  # put back what "at once" puts in its place
    config = nanomath.config.load(bench.TrainingBench, None, SMALL)
    seconds, peak = bench.measure(case, variant, config)
    assert seconds > 0 and peak >= 0
    assert (logprobs.linear_logprob is bench.materialised_logprob) == (variant == "at once")


def test_both_sides_compute_the_same():
    hidden, weight = (torch.randn(n, 6, requires_grad=True) for n in (9, 40))
    target = torch.randint(40, (9,))
    results = []
    for function in linear_logprob, bench.materialised_logprob:
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
            if order[-1][1] == "at once":
                raise BrokenProcessPool("killed")
            return 1.0 / len(order), 5_000_000 + len(order)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    outcome = call(main, "bench", "training", "device=cpu", "cases=logprob,tiny-sft", "repeats=2")
    assert order == [(case, side) for case in ("logprob", "tiny-sft") for _ in range(2) for side in bench.VARIANTS]
    rows = [line.split() for line in outcome.out.splitlines()[-2:]]
    assert rows[0] == ["logprob", "0.333", "no", "memory", "5", "no", "memory"]
    assert rows[1][:2] == ["tiny-sft", "0.143"]


def test_the_tiny_shape_is_that_of_the_configs(tokenizer):
    model = nanomath.config.load(settings.SFTConfig, CONFIGS / "tiny" / "sft.toml").model
    shape = bench.SHAPES["tiny"]
    assert shape.vocab_size == tokenizer.vocab_size
    assert (shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.intermediate_size) == (
        *(model.hidden_size, model.layers, model.heads, model.kv_heads, model.intermediate_size),
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "bench needs a target: expected one of training"),
        (["trainning"], "unknown target 'trainning': expected one of training"),
        (["training", "cases=smollm"], "cases"),
        (["training", "repeats=0"], "repeats"),
        (["training", "speed=1"], "speed"),
        (["training", "save=missing/bench.json"], "there is no directory to write missing/bench.json to"),
        (["training", "device=tpu9"], "tpu9"),
    ],
)
def test_bad_input_is_one_line(call, words, said):
    outcome = call(main, "bench", *words)
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and said in outcome.err


def test_help(call):
    assert call(main, "bench", "--help").out.startswith("Measure time and memory")
    keys = call(main, "bench", "training", "-h").out
    assert all(f"  {key}=" in keys for key in vars(bench.TrainingBench()))
