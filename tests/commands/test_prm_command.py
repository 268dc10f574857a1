"""`python -m nanomath prm`: labels to a file, a PRM from it, and what it measures; and every
kind of bad input.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nanomath.__main__ import main
from nanomath.commands import prm
from nanomath.process.labelled import load_labelled

LABEL = (
    "problems.limit=6",
    "problems.world.difficulty=1,1",
    "sampling.max_new_tokens=8",
    "label.samples=2",
)
ROWS = [
    {"prompt": "1 + 1?", "completions": ["1 + 1 = 2", "so 3"], "labels": [1, 0]},
    {"prompt": "2 + 1?", "completions": ["2 + 1 = 3", "so 3"], "labels": [1, 1]},
    {"prompt": "2 + 2?", "completions": ["2 + 2 = 5"], "labels": [0]},
] * 2
TRAIN = "prm train model.path=MODEL"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("by", ["oracle", "monte_carlo"])
def test_label_and_go_on(call, model_directory, by, tmp_path, monkeypatch):
    monkeypatch.setattr(prm, "PROBLEMS_AT_ONCE", 4)
    words = (
        "prm",
        "label",
        f"model.path={model_directory}",
        *LABEL,
        f"label.by={by}",
        "label.rollouts=4",
    )
    words = (*words, "label.save=out/labels.jsonl")
    outcome = call(main, *words)
    assert outcome.code == 0, outcome.err
    solutions = load_labelled(tmp_path / "out" / "labels.jsonl")
    assert 6 <= len(solutions) <= 12 and len({s.question for s in solutions}) == 6
    assert outcome.out.startswith(
        f"out/labels.jsonl: {len(solutions)} solutions of 6 problems\n"
    )
    assert all(0 <= y <= 1 for s in solutions for y in s.labels)
    again = call(main, *words, "problems.limit=8")
    assert "has solutions of 6 of the 8 problems already" in again.err
    more = load_labelled(tmp_path / "out" / "labels.jsonl")
    assert more[: len(solutions)] == solutions and len({s.question for s in more}) == 8


def lines_of(path: str) -> list[dict]:
    return [
        json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()
    ]


def test_train_resume_and_evaluate(call, model_directory, rows):
    words = (
        "prm",
        "train",
        f"model.path={model_directory}",
        f"prm.train={rows}",
        f"prm.heldout={rows}",
    )
    words = (
        *words,
        "run.directory=runs",
        "run.name=p",
        "optim.lr=0.01",
        "optim.schedule=constant",
        "prm.head_steps=1",
        "prm.token_budget=auto",
    )
    outcome = call(main, *words, "run.steps=3")
    assert outcome.code == 0, outcome.err
    assert re.search(
        r"^runs/p: held-out auc\n  before  50\.0%\n  after  +\d+\.\d%\n", outcome.out
    )
    assert "use it: process.prm=runs/p" in outcome.out
    assert "token_budget = 1024\n" in Path("runs/p/config.toml").read_text("utf-8")
    assert call(main, *words, "run.steps=40", "--resume").code == 0
    metrics = lines_of("runs/p/metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 41))
    assert metrics[-1]["heldout/auc"] == 1.0
    outcome = call(main, "prm", "eval", "runs/p", rows, "save=scores.jsonl")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == f"runs/p on {rows}: 6 solutions" and lines[1].split()[0] == "auc"
    found = {line[:16].strip(): line[16:].split() for line in lines[2:5]}
    assert list(found) == ["it", "always right", "random"]
    assert found["it"][0] == "1.000" and found["always right"][3:] == [
        "0.000",
        "0.000",
        "1.000",
    ]
    assert lines[5] == "  10 labelled steps, 60.0% of them right"
    saved = lines_of("scores.jsonl")
    assert [len(row["scores"]) for row in saved] == [
        len(row["completions"]) for row in ROWS
    ]


@pytest.mark.parametrize("control", ["random", "length"])
def test_controls_are_measured(call, rows, control):
    outcome = call(main, "prm", "eval", control, rows)
    assert outcome.code == 0 and outcome.out.startswith(
        f"{control} on {rows}: 6 solutions"
    )


def test_a_policy_is_trained_with_it(call, model_directory, rows):
    from train_grpo import main as grpo

    train = (
        "prm",
        "train",
        f"model.path={model_directory}",
        f"prm.train={rows}",
        f"prm.heldout={rows}",
        "run.steps=2",
    )
    assert call(main, *train, "run.directory=runs", "run.name=p").code == 0
    words = (
        f"model.path={model_directory}",
        "run.directory=runs",
        "run.steps=2",
        "train.limit=20",
        "heldout.limit=3",
    )
    words = (
        *words,
        "train.world.difficulty=1,1",
        "heldout.world.difficulty=1,1",
        "sampling.max_new_tokens=8",
        "grpo.prompts=2",
    )
    words = (
        *words,
        "grpo.group_size=2",
        "process.prm=runs/p",
        "reward.weights.accuracy=0",
    )
    for method in ("process_grpo", "pure", "ppo"):
        options = (
            f"algorithm.method={method}",
            f"run.name={method}",
            *(["algorithm.credit=sum"] * (method == "ppo")),
        )
        outcome = call(grpo, *words, *options)
        assert outcome.code == 0, outcome.err
        first = next(
            line for line in lines_of(f"runs/{method}/metrics.jsonl") if "loss" in line
        )
        assert {"reward/prm", "prm/step", "prm/probes", "steps", "step_length"} <= set(
            first
        )
        assert (
            "step_scores" in lines_of(f"runs/{method}/rollouts.jsonl")[0]
            and first["grad_norm"] > 0
        )


def test_a_judge_that_answers_nonsense(call, model_directory):
    from train_grpo import main as grpo

    words = (
        f"model.path={model_directory}",
        f"judge.path={model_directory}",
        "train.limit=8",
        "heldout.limit=2",
    )
    outcome = call(
        grpo, *words, "run.directory=runs", "judge.template={question} {first}"
    )
    assert (outcome.code, outcome.err) == (2, "error: judge.template lacks {second}\n")
    outcome = call(grpo, *words, "judge.opponents=0", "judge.template={question}")
    assert (outcome.code, outcome.err) == (2, "error: judge.template lacks {first}\n")
    outcome = call(grpo, *words, "run.directory=runs", "process.prm=oracle")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert (
        "the judge gives A and B" in outcome.err
        or "its context holds 192" in outcome.err
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prm", "prm needs one of label, train, eval"),
        ("prm score", "prm needs one of label, train, eval"),
        ("prm label model.path=MODEL", "label.save is empty"),
        (
            "prm label model.path=MODEL label.save=x problems.source=ROWS",
            "no answer field",
        ),
        (
            "prm train model.path=MODEL",
            "prm.train and prm.heldout must name files of labelled",
        ),
        ("prm train prm.train=ROWS prm.heldout=ROWS", "model.path is empty"),
        (f"{TRAIN} prm.train=ROWS prm.heldout=none", "no such file of labelled"),
        (f"{TRAIN} prm.train=BAD prm.heldout=ROWS", "bad.jsonl:2: 1 steps, but 2"),
        (f"{TRAIN} prm.train=LONG prm.heldout=ROWS", "long.jsonl:1: solution 0 of"),
        (
            "prm train prm.format=math_shepherd prm.head_steps=3",
            "head_steps trains a new head",
        ),
        (f"{TRAIN} prm.train=ROWS prm.heldout=ROWS prm.format=qwen", "<extra_0>"),
        ("prm eval MODEL", "prm eval needs a PRM and a file"),
        ("prm eval none ROWS", "none"),
        ("prm eval random ROWS save=no/where.jsonl", "there is no directory to write"),
    ],
)
def test_bad_input_is_one_line(call, model_directory, rows, tmp_path, line, message):
    good = json.dumps(ROWS[0]) + "\n"
    (tmp_path / "bad.jsonl").write_text(
        good + json.dumps({"prompt": "q", "completions": ["a"], "labels": [1, 0]})
    )
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"prompt": "q", "completions": ["a b c " * 99], "labels": [1]})
        + "\n"
        + good
    )
    places = {
        "MODEL": model_directory,
        "ROWS": rows,
        "BAD": tmp_path / "bad.jsonl",
        "LONG": tmp_path / "long.jsonl",
    }
    for name, place in places.items():
        line = line.replace(name, str(place))
    outcome = call(main, *line.split())
    assert (
        outcome.code == 2
        and message in outcome.err
        and len(outcome.err.strip().splitlines()) == 1
    ), outcome.err
