"""`python -m nanomath eval MODEL general` and `transfer`: what they print, write and refuse."""

from __future__ import annotations

import json
import sys

import pytest
from benchmark_rows import BBH, QUESTIONS, write_benchmarks

from nanomath.__main__ import main
from nanomath.data.benchmarks import BENCHMARKS

# All that a context of 192 tokens holds: the preset of TruthfulQA is longer.
TASKS = ",".join(name for name in BENCHMARKS if name != "truthfulqa")
QUICK = ("data=data", "max_new_tokens=4", f"tasks={TASKS}")


@pytest.fixture
def data(tmp_path):
    return write_benchmarks(tmp_path / "data")


def test_all_benchmarks_and_the_index(call, model_directory, data, tmp_path):
    for name in "ab":
        outcome = call(
            main, "eval", model_directory, "general", *QUICK, f"save={name}.json"
        )
        assert outcome.code == 0, outcome.err
    assert "arc_challenge: 3 problems; the likeliest choice" in outcome.out
    assert "  instruction_loose   " in outcome.out and "(95% interval " in outcome.out
    a, b = (json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in "ab")
    assert a["tasks"] == b["tasks"] and list(a["tasks"]) == TASKS.split(",")
    assert a["model"] == str(model_directory) and {
        "command",
        "commit",
        "versions",
    } <= set(a)
    arc = a["tasks"]["arc_challenge"]
    assert arc["source"] == "data/arc_challenge/test.json" and arc["problems"] == 3
    assert set(arc["scores"]) == {"acc", "acc_norm", "acc_bytes"}
    assert [len(r["logprobs"]) for r in arc["records"]] == [
        len(q[1]) for q in QUESTIONS
    ]
    assert set(a["tasks"]["ifeval"]["records"][0]) == {
        *("problem", "prompt_strict", "prompt_loose", "instruction_strict"),
        *("instruction_loose", "text", "tokens", "finish_reason"),
    }
    assert all(len(a["tasks"][f"bbh_{task}"]["records"]) == 1 for task in BBH)

    outcome = call(main, "transfer", "a.json", "b.json", "picture=t")
    assert outcome.code == 0, outcome.err
    assert "maths: svamp, mgsm_en, mgsm_ja, gsm8k" in outcome.out
    assert "index undefined: the weighted gain in maths, +0.00" in outcome.out
    report = json.loads((tmp_path / "transfer.json").read_text("utf-8"))
    assert report["base"] == "a.json" and set(report["models"]) == {"b.json"}
    assert (tmp_path / "t.png").stat().st_size > 1000 and (tmp_path / "t.svg").exists()


def test_choices_by_generation(call, model_directory, data, tmp_path):
    words = (
        "data=data",
        "tasks=arc_challenge,commonsenseqa",
        "choices=generation",
        "limit=2",
    )
    outcome = call(main, "eval", model_directory, "general", *words)
    assert outcome.code == 0, outcome.err
    tasks = json.loads((tmp_path / "general.json").read_text("utf-8"))["tasks"]
    assert [task["metric"] for task in tasks.values()] == ["acc", "acc"]
    assert all(
        task["problems"] == 2 and "letter" in task["protocol"]
        for task in tasks.values()
    )


def test_what_was_measured_stays_when_a_later_benchmark_fails(
    call, model_directory, data, tmp_path, monkeypatch
):
    from nanomath.analysis import general

    monkeypatch.setattr(general, "exact_match", None)
    words = ("data=data", "tasks=arc_challenge,bbh_navigate", "max_new_tokens=2")
    with pytest.raises(TypeError):
        call(main, "eval", model_directory, "general", *words)
    written = json.loads((tmp_path / "general.json").read_text("utf-8"))
    assert list(written["tasks"]) == ["arc_challenge"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tasks=arc"], "tasks: expected one of arc_challenge, commonsenseqa"),
        (["data=nowhere"], "data: nowhere is no directory"),
        (
            ["data=data", "sources.arc=x"],
            "sources.arc: no such benchmark; there are: arc_ch",
        ),
        (["data=data", "sources.svamp=x.jsonl", "tasks=svamp"], "not found: x.jsonl"),
        (
            ["data=data", "save=nowhere/x.json"],
            "save: there is no directory to write nowhere",
        ),
        (
            ["data=data", "tasks=truthfulqa"],
            "the model's context holds 192; leave the benchmark",
        ),
        (["data=data", "save=data"], "save: data is no file, and would be replaced"),
        (["data=data/gsm8k", "tasks=svamp"], "data/gsm8k holds no svamp"),
        (["data=data", "problems.limit=3"], "problems.limit: unknown key"),
    ],
)
def test_bad_input(call, model_directory, data, words, says):
    outcome = call(main, "eval", model_directory, "general", *words)
    assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1


def test_ifeval_needs_langdetect_before_anything_is_computed(
    call, model_directory, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    row = {
        "key": 1,
        "prompt": "WRITE",
        "instruction_id_list": ["change_case:english_capital"],
    }
    (tmp_path / "caps.jsonl").write_text(json.dumps({**row, "kwargs": [{}]}) + "\n")
    words = ("data=data", "tasks=arc_challenge,ifeval", "sources.ifeval=caps.jsonl")
    outcome = call(main, "eval", model_directory, "general", *words)
    assert (
        outcome.code == 2 and "needs langdetect: pip install langdetect" in outcome.err
    )
    assert not (tmp_path / "general.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "got 0 evaluations"),
        (["a.json"], "no evaluation here: a.json"),
        (["x.json"], "got 1 evaluations"),
        (["x.json", "x.json"], "x.json is there twice"),
        (["x.json", "y.json"], "the group maths is empty"),
        (["x.json", "y.json", "sigma=2"], "sigma: expected one of pooled, paper"),
        (
            ["x.json", "y.json", "groups.x=art"],
            "groups.x: expected one of maths, other",
        ),
        (["x.json", "y.json", "save=no/t.json"], "save: there is no directory"),
        (["x.json", "y.json", "save=full"], "save: full is no file, and would be"),
        (["x.json", "y.json", "picture=no/t"], "picture: there is no directory"),
    ],
)
def test_bad_input_of_transfer(call, tmp_path, words, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    for name in "xy":
        (tmp_path / f"{name}.json").write_text('{"tasks": {}}')
    outcome = call(main, "transfer", *words)
    assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1
    assert (tmp_path / "full" / "kept").exists()


def test_families_of_the_world(call, model_directory, tmp_path):
    for name in "ab":
        words = (
            "problems.limit=21",
            "problems.world.difficulty=1,1",
            f"save={name}.jsonl",
        )
        families = "problems.world.families=maths,grid,copying"
        quick = ("sampling.max_new_tokens=4", "evaluation.samples=2", families)
        assert call(main, "eval", model_directory, "world", *words, *quick).code == 0
    outcome = call(main, "transfer", "a.jsonl", "b.jsonl", "save=")
    assert outcome.code == 0, outcome.err
    assert "non_reasoning: copying" in outcome.out
