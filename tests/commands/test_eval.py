"""`python -m nanomath eval`: what it measures, prints and writes."""

from __future__ import annotations

import json
import re

import pytest

from nanomath.__main__ import main
from nanomath.commands import eval as command
from nanomath.process.rewards import AGGREGATES
from nanomath.rollout import Completion
from nanomath.settings import EvalConfig

QUICK = (
    "problems.limit=6",
    "problems.world.difficulty=1,1",
    "sampling.max_new_tokens=8",
    "evaluation.samples=2",
)
QUESTIONS = [
    {"id": "a", "question": "What is 1 + 1?", "answer": "2", "subject": "sums"},
    {"id": "b", "question": "What is 3 * 5?", "answer": "15", "subject": "products"},
    {"id": "c", "question": "What is 3 + 5?", "answer": "8", "subject": "sums"},
]


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "".join(json.dumps(record) + "\n" for record in QUESTIONS), encoding="utf-8"
    )
    return file


class Knowing:
    """A sampler that answers 2 to everything with its even samples, and nothing with the odd
    ones.
    """

    def __init__(self, section, model, tokenizer) -> None:
        pass

    def generate(self, prompts, n, seed, progress, **sampling) -> list[Completion]:
        assert progress is None  # no terminal
        texts = [r"\boxed{2}" if s % 2 == 0 else "" for s in range(n)]
        return [
            Completion(
                p, s, [3] * 5, [-1.0] * 5, [-1.0] * 5, text, "eos" if text else "length"
            )
            for p in range(len(prompts))
            for s, text in enumerate(texts)
        ]


def test_the_world(call, model_directory):
    outcome = call(
        main, "eval", model_directory, "world", "evaluation.by=difficulty", *QUICK
    )
    assert (outcome.code, outcome.err.partition("no completion")[0].strip()) == (0, "")
    assert outcome.out.startswith(
        f"{model_directory} on world: 6 problems x 2 samples at temperature 1\n"
    )
    assert re.search(
        r"^  pass@1 +\d+\.\d% \(95% interval \d+\.\d to \d+\.\d\)$",
        outcome.out,
        re.MULTILINE,
    )
    assert re.search(r"^  difficulty=1 +\d+\.\d% ", outcome.out, re.MULTILINE)
    assert re.search(
        r"^  \d+ tokens a completion; \d+\.\d% cut at 8 tokens; ",
        outcome.out,
        re.MULTILINE,
    )


def test_known_completions_of_a_file(call, model_directory, questions, monkeypatch):
    monkeypatch.setattr(command, "build_sampler", Knowing)
    outcome = call(
        main, "eval", model_directory, questions, "evaluation.k=4", "evaluation.by=subject"
    )
    assert outcome.code == 0 and outcome.err == ""
    assert re.sub(r" \(.*\)", "", outcome.out).splitlines()[1:] == [
        "  pass@1           16.7%",
        "  pass@4           33.3%",
        "  maj@4            33.3%",
        "  subject=products 0.0%",
        "  subject=sums     25.0%",
        "  5 tokens a completion; 50.0% cut at 256 tokens; no answer found in 50.0%",
    ]


def test_every_completion_is_saved(
    call, model_directory, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "build_sampler", Knowing)
    assert (
        call(main, "eval", model_directory, questions, "save=completions.jsonl").code == 0
    )
    records = [
        json.loads(line)
        for line in (tmp_path / "completions.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert [(r["problem"], r["sample"], r["right"]) for r in records] == [
        (name, sample, name == "a" and sample in (0, 2))
        for name in "abc"
        for sample in range(4)
    ]
    assert (records[0]["gold"], records[0]["answer"], records[1]["answer"]) == (
        "2",
        "2",
        None,
    )


def test_a_file_that_cannot_be_saved_is_refused_before_the_sampling(
    call, model_directory, questions, monkeypatch
):
    monkeypatch.setattr(command, "build_sampler", None)
    outcome = call(
        main, "eval", model_directory, questions, "save=nowhere/completions.jsonl"
    )
    assert outcome.code == 2 and outcome.err == (
        "error: save: there is no directory to write nowhere/completions.jsonl to\n"
    )


def test_greedy_samples_are_drawn_once_and_repeat(
    call, model_directory, questions, tmp_path
):
    words = (
        "eval",
        model_directory,
        questions,
        "sampling.temperature=0",
        "sampling.max_new_tokens=8",
    )
    first, again = (
        call(main, *words, f"save={name}.jsonl", "evaluation.seed=" + name)
        for name in "12"
    )
    assert (
        first.out == again.out and "3 problems x 1 samples at temperature 0" in first.out
    )
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()


def test_the_seed_decides(call, model_directory, questions, tmp_path):
    words = ("eval", model_directory, questions, "sampling.max_new_tokens=8")
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        assert (
            call(main, *words, f"save={name}.jsonl", f"evaluation.seed={seed}").code == 0
        )
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_a_config_file_and_keys_may_stand_anywhere(
    call, model_directory, questions, tmp_path
):
    (tmp_path / "eval.toml").write_text(
        "[sampling]\nmax_new_tokens = 5\n[evaluation]\nsamples = 3\n"
    )
    outcome = call(
        main, "eval", "evaluation.samples=2", model_directory, questions, "eval.toml"
    )
    assert (
        outcome.code == 0
        and "3 problems x 2 samples" in outcome.out
        and "cut at 5 tokens" in outcome.out
    )


def test_no_answer_at_all_brings_a_hint(call, model_directory, questions):
    outcome = call(main, "eval", model_directory, questions, "sampling.max_new_tokens=1")
    assert outcome.code == 0 and "lenient=true" in outcome.err


@pytest.mark.parametrize("prm", ["oracle", "length"])
def test_the_best_of_k(call, model_directory, prm, tmp_path):
    words = (
        *QUICK,
        f"process.prm={prm}",
        "evaluation.samples=4",
        "evaluation.k=2,4",
        "save=all.jsonl",
    )
    outcome = call(main, "eval", model_directory, "world", *words)
    assert outcome.code == 0, outcome.err
    for name in ("best@2", "wmaj@2", "best@4", "wmaj@4"):
        assert re.search(rf"^  {name} +\d+\.\d% ", outcome.out, re.MULTILINE), outcome.out
    records = [
        json.loads(line)
        for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(records) == 24 and all(0 <= record["score"] <= 1 for record in records)


def test_every_aggregate_can_be_asked_for():
    for name in AGGREGATES:
        EvalConfig(aggregate=name)
    assert EvalConfig().aggregate in AGGREGATES
