"""Benchmarks: the layouts of their rows, where their files are found, and rows of other kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_rows import (
    BBH,
    FIVE,
    QUESTIONS,
    TRUTHS,
    as_by_its_makers,
    as_by_llm_adapters,
    as_on_the_hub,
    lines,
    write_benchmarks,
)

from nanomath.data.benchmarks import (
    BENCHMARKS,
    GROUPS,
    TRUTHFULQA_PRESET,
    as_letter_question,
    load_benchmark,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"


def load(tmp_path, name: str, rows: list, limit: int = 0):
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(rows), encoding="utf-8")
    return load_benchmark(name, "", {name: str(file)}, limit)[1]


@pytest.mark.parametrize(
    "layout", [as_on_the_hub, as_by_its_makers, as_by_llm_adapters]
)
def test_arc(tmp_path, layout):
    problems = load(
        tmp_path, "arc_challenge", [layout(*question) for question in QUESTIONS]
    )
    for problem, (question, texts, right) in zip(problems, QUESTIONS, strict=True):
        assert problem.question == f"Question: {question}\nAnswer:"
        assert (
            problem.metadata["choices"] == texts and problem.metadata["right"] == right
        )
        assert problem.answer == texts[right]


@pytest.mark.parametrize("layout", [as_on_the_hub, as_by_its_makers])
def test_commonsenseqa(tmp_path, layout):
    (problem, _) = load(
        tmp_path, "commonsenseqa", [layout(*question) for question in FIVE]
    )
    assert problem.question == (
        "Question: Where does a fish live?\nA. tree\nB. desert\nC. lake\nD. sky\nE. attic\nAnswer:"
    )
    assert (
        problem.metadata["choices"] == list("ABCDE") and problem.metadata["right"] == 2
    )


def test_truthfulqa_of_its_makers_is_that_of_the_hub(tmp_path):
    hub = [
        {
            "question": row["question"],
            **{
                key: {"choices": list(row[key]), "labels": list(row[key].values())}
                for key in ("mc1_targets", "mc2_targets")
            },
        }
        for row in TRUTHS
    ]
    problems = load(tmp_path, "truthfulqa", TRUTHS)
    assert problems == load(tmp_path, "truthfulqa", hub)
    told = problems[0].metadata
    assert problems[0].question == f"{TRUTHFULQA_PRESET}Q: What colour is grass?\nA:"
    assert told["choices"] == ["Green", "Blue", "It has none", "Mostly green"]
    assert told["mc1"] == [[0, 1], [1, 0], [2, 0]]
    assert told["mc2"] == [[0, 1], [3, 1], [1, 0], [2, 0]]


def test_a_letter_tells_nothing_of_the_truth(tmp_path):
    """The true choice comes first in the files, so that A would always be right."""
    asked = [as_letter_question(p) for p in load(tmp_path, "truthfulqa", TRUTHS)]
    assert [problem.answer for problem in asked] == ["B", "A"]
    assert "A. Blue\nB. Green\nC. It has none" in asked[0].question


def test_ifeval_leaves_out_what_is_not_given(tmp_path):
    rows = [
        {
            "key": 7,
            "prompt": "Write.",
            "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
            "kwargs": [{"end_phrase": None}, {"end_phrase": "Yes", "num_words": None}],
        }
    ]
    (problem,) = load(tmp_path, "ifeval", rows)
    assert (problem.id, problem.question) == ("ifeval-7", "Write.")
    assert problem.metadata["instructions"] == [
        ["punctuation:no_comma", {}],
        ["startend:end_checker", {"end_phrase": "Yes"}],
    ]


def test_all_benchmarks_are_found_in_a_directory(tmp_path):
    data = str(write_benchmarks(tmp_path))
    for name, benchmark in BENCHMARKS.items():
        source, problems = load_benchmark(name, data, {}, 0)
        assert source.startswith(data) and problems and benchmark.group in GROUPS
    assert problems[0].answer == "2"
    bbh = load_benchmark("bbh_navigate", data, {}, 0)[1][0]
    asked = BBH["navigate"][0]
    assert bbh.question.startswith("Given a series of navigation instructions, ")
    assert bbh.question.endswith(f"starting point.\n\nQ: {asked}\nA:")
    assert len(load_benchmark("arc_challenge", data, {}, 2)[1]) == 2


def test_the_hub_is_asked_where_no_directory_is_given(monkeypatch):
    asked = []

    def from_hub(name, kind, files):
        asked.append((name, kind))
        raise FileNotFoundError(f"no {name} here")

    monkeypatch.setattr("nanomath.data.problem_sets.from_hub", from_hub)
    for name in BENCHMARKS:
        with pytest.raises(FileNotFoundError):
            load_benchmark(name, "", {}, 0)
    assert len(asked) == len(BENCHMARKS) and asked[0] == ("allenai/ai2_arc", "dataset")


def test_mgsm_of_the_hub_has_its_answer_in_a_field_of_its_own(tmp_path):
    row = {
        "question": "1 + 1?",
        "answer": None,
        "answer_number": 2,
        "equation_solution": None,
    }
    assert load(tmp_path, "mgsm_en", [row])[0].answer == "2"


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        (
            "arc_challenge",
            {"question": "x"},
            "no row of arc as it is known (KeyError: 'choices')",
        ),
        ("arc_challenge", {"instruction": "x"}, "no row of arc"),
        (
            "arc_challenge",
            {**as_on_the_hub(*QUESTIONS[0]), "answerKey": "Z"},
            "'Z' is not in",
        ),
        ("commonsenseqa", [1], "there is: list"),
        (
            "truthfulqa",
            {**TRUTHS[0], "mc2_targets": {"x": 1}},
            "true and false choices",
        ),
        (
            "ifeval",
            {"key": 1, "prompt": "x", "instruction_id_list": [], "kwargs": []},
            "empty",
        ),
        ("svamp", {"Body": "x"}, "no question field"),
    ],
)
def test_rows_of_another_kind(tmp_path, name, row, says):
    with pytest.raises(ValueError) as error:
        load(tmp_path, name, [row])
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:1: ") and says in str(
        error.value
    )


def test_a_file_that_is_not_there_or_there_twice(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="holds no svamp .looked for svamp/test.jsonl"
    ):
        load_benchmark("svamp", str(tmp_path), {}, 0)
    for place in "ab":
        (tmp_path / place).mkdir()
        (tmp_path / place / "mgsm_en.tsv").write_text("1 + 1?\t2\n")
    with pytest.raises(ValueError, match="several files of mgsm_en: .*sources.mgsm_en"):
        load_benchmark("mgsm_en", str(tmp_path), {}, 0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl: no problems"):
        load_benchmark("ifeval", "", {"ifeval": str(tmp_path / "empty.jsonl")}, 0)


@pytest.mark.slow
@pytest.mark.skipif(
    not SHARED.is_dir(), reason="there are no real files beside the clone"
)
def test_the_real_files():
    from nanomath.rewards.instructions import INSTRUCTIONS

    counts = {}
    for name in BENCHMARKS:
        _, problems = load_benchmark(name, str(SHARED), {}, 0)
        counts[name] = len(problems)
        for problem in problems:
            json.dumps(problem.metadata)
            if options := problem.metadata.get("options"):
                assert len(set(options)) >= 2  # one question says one of them twice
            for kind, _ in problem.metadata.get("instructions", []):
                assert kind in INSTRUCTIONS
    del counts["svamp"]  # 300 problems or all 1000
    assert counts == {
        "arc_challenge": 1172,
        "commonsenseqa": 1221,
        "truthfulqa": 790,
        **{f"bbh_{task}": 250 for task in BBH},
        "ifeval": 541,
        "mgsm_en": 250,
        "mgsm_ja": 250,
        "gsm8k": 1319,
    }
