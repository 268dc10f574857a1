"""`python -m nanomath eval`: what it measures, prints and writes."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from nanomath.__main__ import main
from nanomath.analysis.cells import in_order, make_cells
from nanomath.analysis.measures import measured, run_of, terms
from nanomath.analysis.study import read_study, study_of
from nanomath.commands import eval as command
from nanomath.process.rewards import AGGREGATES
from nanomath.rewards import extract_answer
from nanomath.rollout import Completion, Sampler
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
        r"^  pass@1 +\d+\.\d% \((95% interval \d+\.\d to \d+\.\d|no interval: .*)\)$",
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
        main,
        "eval",
        model_directory,
        questions,
        "evaluation.k=4",
        "evaluation.by=subject",
    )
    assert outcome.code == 0 and outcome.err == ""
    assert re.sub(r" \(.*\)", "", outcome.out).splitlines()[1:] == [
        "  pass@1           16.7%",
        "  pass@4           33.3%",
        "  maj@4            33.3%",
        "  subject=products 0.0%",
        "  subject=sums     25.0%",
        "  5 tokens a completion; 50.0% cut at 256 tokens; no answer found in 50.0%",
        "  0.0% in English, 0.0% in Japanese, 0.0% in both",
    ]


def test_every_completion_is_saved(
    call, model_directory, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "build_sampler", Knowing)
    assert (
        call(main, "eval", model_directory, questions, "save=completions.jsonl").code
        == 0
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
        first.out == again.out
        and "3 problems x 1 samples at temperature 0" in first.out
    )
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()


def test_the_seed_decides(call, model_directory, questions, tmp_path):
    words = ("eval", model_directory, questions, "sampling.max_new_tokens=8")
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        assert (
            call(main, *words, f"save={name}.jsonl", f"evaluation.seed={seed}").code
            == 0
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
    outcome = call(
        main, "eval", model_directory, questions, "sampling.max_new_tokens=1"
    )
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
        assert re.search(rf"^  {name} +\d+\.\d% ", outcome.out, re.MULTILINE), (
            outcome.out
        )
    records = [
        json.loads(line)
        for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(records) == 24 and all(0 <= record["score"] <= 1 for record in records)


def test_every_aggregate_can_be_asked_for():
    for name in AGGREGATES:
        EvalConfig(aggregate=name)
    assert EvalConfig().aggregate in AGGREGATES


# --- confidences, budgets, pass rates --------------------------------------------------------

ROOT = Path(__file__).parents[2]
STUDIES = sorted(ROOT.glob("configs/studies/*.toml"))
PAGE = ROOT / "docs" / "studies.md"
ALL = "majority,mean_logprob,deepconf_lowest,self_certainty,prm,p_true"
ASK = "confidence.ask={question} {answer}?"
SURE = (
    *("problems.limit=8", "evaluation.samples=4", "sampling.max_new_tokens=24"),
    *("problems.world.difficulty=1,1", "lenient=true", ASK),
)


def test_confidences_of_the_world(call, model_directory, tmp_path):
    words = (
        *SURE,
        *(f"confidence.measures={ALL}", "process.prm=length", "save=all.jsonl"),
        *("budgets=8,24", "out=first", "confidence.handoff=person.jsonl"),
    )
    outcome = call(main, "eval", model_directory, "world", *words)
    assert outcome.code == 0, outcome.err
    first = json.loads((tmp_path / "first" / "eval.json").read_text("utf-8"))
    assert list(first["confidence"]) == ALL.split(",")
    numbers = first["confidence"]["majority"]
    assert 0 <= numbers["aurc"]["low"] <= numbers["aurc"]["mean"] <= 1
    assert first["confidence"]["mean_logprob"]["ece"]["mean"] is None
    assert {"majority", "prm, top 10%", "deepconf_lowest"} <= set(first["votes"])
    assert "p_true" not in first["votes"]
    assert first["budget"]["at"]["24"]["mean"] == first["scores"]["pass@1"]["mean"]
    assert len(first["problems"]) == 8 and len(first["risk"]["prm"]) == 8
    pictures = {path.name for path in (tmp_path / "first").glob("*.png")}
    assert pictures == {"budget.png", "risk-coverage.png"}
    rows = [
        json.loads(line)
        for line in (tmp_path / "person.jsonl").read_text().splitlines()
    ]
    assert all(set(row["confidence"]) == set(ALL.split(",")) for row in rows)
    assert f"a person should see {len(rows)} of the " in outcome.out

    words = (
        *SURE,
        f"confidence.measures={ALL}",
        "process.prm=length",
        "saved=all.jsonl",
    )
    again = call(main, "eval", model_directory, "world", *words, "out=second")
    assert again.code == 0, again.err
    second = json.loads((tmp_path / "second" / "eval.json").read_text("utf-8"))
    assert "8 problems x 4 samples of all.jsonl" in again.out
    for part in ("scores", "confidence", "votes", "problems"):
        assert first[part] == second[part]


def test_what_studies_measure_of_answers_is_found(call, model_directory, tmp_path):
    """Of every stage `eval` of the studies: by the config of its cell, on other problems."""
    shown = re.findall(
        r"```toml\n(question = .*?)```", PAGE.read_text("utf-8"), re.DOTALL
    )
    on_page = [study_of("page", tomllib.loads(text)) for text in shown]
    found = 0
    for study in [*map(read_study, STUDIES), *on_page]:
        for stage in study.stages.values():
            every = (term for measure in study.measures for term in terms(measure))
            names = list(dict.fromkeys(name for of, name in every if of == stage.name))
            if stage.run != "eval" or not names:
                continue
            keys = {**stage.keys, "problems.limit": 14, "problems.world.shots": 0}
            keys |= {"sampling.max_new_tokens": 8, "evaluation.samples": 2}
            keys |= {"evaluation.k": [1], "model.path": str(model_directory)}
            keys |= {
                "confidence.ask": "{question} {answer}?",
                "prompt.template": "{question}",
            }
            path = str(ROOT / stage.config) if stage.config else ""
            alone = replace(stage, keys=keys, config=path)
            one = replace(
                study,
                stages={stage.name: alone},
                measures=[f"{stage.name}.{n}" for n in names],
                arms={study.baseline: {}},
                seeds=(0,),
                event={},
            )
            (cell,) = in_order(make_cells(one, tmp_path / study.name)).values()
            place = tmp_path / study.name / cell.name
            place.mkdir(parents=True)
            (place / "study.toml").write_text(cell.text, "utf-8")
            words = (model_directory, "world", place / "study.toml")
            outcome = call(main, "eval", *words)
            assert outcome.code == 0, outcome.err
            files = {path.name for path in place.iterdir()}
            assert files == {"study.toml", "eval.json", "heldout.jsonl"}
            for measure in names:
                # Of an untrained model not all
                found += bool(measured(run_of(place), measure)[0])
    assert found > 15
    with pytest.raises(
        ValueError, match="no number 'lenght'.* did you mean length, "
    ) as e:
        measured(run_of(place), "lenght")
    assert len(str(e.value)) < 400


def test_mean_logprob_is_the_samplers(call, model_directory, monkeypatch):
    """At temperature 1 the scoring pass sees the distribution that the sampler drew from."""
    drawn = []
    generate = Sampler.generate

    def kept(self, *arguments, **options):
        drawn.append(generate(self, *arguments, **options))
        return drawn[0]

    monkeypatch.setattr(Sampler, "generate", kept)
    words = (
        *SURE,
        "confidence.measures=mean_logprob",
        "evaluation.samples=1",
        "out=out",
    )
    outcome = call(main, "eval", model_directory, "world", *words)
    assert outcome.code == 0, outcome.err
    found = json.loads(Path("out/eval.json").read_text("utf-8"))["confidence"][
        "mean_logprob"
    ]
    means = [
        (sum(c.logprobs) / c.length, found_answer(c))
        for c in drawn[0]
        if found_answer(c)
    ]
    seen = [found[name]["mean"] for name in ("when_right", "when_wrong")]
    known = [value for value in seen if value is not None]
    assert min(m for m, _ in means) - 1e-4 <= min(known)
    assert max(m for m, _ in means) + 1e-4 >= max(known)
    if seen[0] is None:
        assert seen[1] == pytest.approx(sum(m for m, _ in means) / len(means), abs=1e-4)


def found_answer(completion):
    return extract_answer(completion.text, lenient=True)


def test_solutions_and_pass_rates(
    call, model_directory, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "build_sampler", Knowing)
    words = ("out=out", "solutions=right.jsonl")
    assert call(main, "eval", model_directory, questions, *words).code == 0
    (line,) = (tmp_path / "right.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == {**QUESTIONS[0], "solution": r"\boxed{2}"}
    rates = "problems.pass_rates=out/eval.json"
    outcome = call(
        main, "eval", model_directory, questions, rates, "problems.pass_rate=0.1,0.9"
    )
    assert outcome.code == 0 and "1 problems x 4 samples" in outcome.out
    assert (
        "1 of 3 problems have a pass rate from 0.1 to 0.9" in outcome.out + outcome.err
    )


def measured_file(path, pairs):
    rows = {
        name: {"question": "?", "cluster": name, "right": right, "tokens": tokens}
        for name, (right, tokens) in pairs.items()
    }
    path.write_text(json.dumps({"problems": rows}), "utf-8")
    return path.name


def test_two_evaluations_are_compared_by_problem(call, tmp_path):
    before = {"a": ([0, 0], [9, 9]), "b": ([1, 0], [5, 7])}
    after = {"a": ([1, 1], [3, 3]), "b": ([1, 0], [5, 7])}
    a, b = (
        measured_file(tmp_path / f"{n}.json", p)
        for n, p in (("a", before), ("b", after))
    )
    outcome = call(main, "diff", a, b, "out=ways")
    assert outcome.code == 1
    assert "2 problems  accuracy 25.0% -> 75.0% (+50.0" in outcome.out
    assert {path.name for path in tmp_path.glob("ways.*")} == {"ways.png", "ways.svg"}
    assert call(main, "diff", a, a).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("confidence.measures=sure",), "expected one of majority, mean_logprob"),
        (("confidence.measures=prm",), "process.prm is empty"),
        (("confidence.measures=prm,prm", "process.prm=length"), "one is there twice"),
        (
            ("confidence.measures=majority", "evaluation.samples=1"),
            "samples of at least 2",
        ),
        (
            ("confidence.measures=majority", "sampling.temperature=0"),
            "temperature above 0",
        ),
        (("confidence.handoff=person.jsonl",), "set measures"),
        (
            ("confidence.measures=majority", "confidence.handoff=nowhere/person.jsonl"),
            "no directory to write nowhere/person.jsonl to",
        ),
        (
            ("confidence.measures=majority", "confidence.handoff=."),
            "is no file, and would be replaced",
        ),
        (
            ("confidence.measures=p_true", "confidence.ask={question}?"),
            "ask lacks {answer}",
        ),
        (
            (
                "confidence.measures=p_true",
                "confidence.ask={question} {answer}" + " ten" * 200,
            ),
            "its context holds 192",
        ),
        (("confidence.measures=majority", "confidence.cluster=subject2"), ""),
        (("confidence.validation=1",), "below 1"),
        (("budgets=0",), "at least 1"),
        (("budgets=9",), "cut at sampling.max_new_tokens = 8"),
        (("problems.pass_rates=many.json",), "no eval.json"),
        (("out=questions.jsonl/x.json",), "is a file: name a directory"),
        (("out=questions.jsonl/x",), "is a file: name a directory"),
        (("saved=nowhere.jsonl",), "no file nowhere.jsonl"),
        (("saved=questions.jsonl",), "expected what save=FILE writes"),
        (("out=questions.jsonl",), "is a file"),
        (("solutions=nowhere/a.jsonl",), "no directory to write nowhere/a.jsonl to"),
        (("problems.pass_rate=0.9,0.1",), "expected [least, greatest]"),
        (("problems.pass_rate=0.5,1.5",), "at most 1"),
        (("problems.pass_rate=0.1,0.9",), "pass_rates names no file"),
        (("problems.pass_rates=nowhere.json",), "no such file"),
        (("problems.pass_rates=other.json",), "'a' is not in it"),
        (("problems.pass_rates=changed.json",), "'a' asks something else in it"),
        (("problems.pass_rates=odd.json",), "no eval.json"),
        (("problems.pass_rates=own.json", "problems.pass_rate=0.6,1"), "none of 3"),
    ],
)
def test_what_cannot_be_measured(
    call, model_directory, questions, tmp_path, words, message
):
    measured_file(tmp_path / "other.json", {"z": ([1], [1])})
    measured_file(tmp_path / "changed.json", {"a": ([1], [1])})
    (tmp_path / "odd.json").write_text('{"problems": {"a": {"right": 3}}}', "utf-8")
    measured_file(tmp_path / "many.json", {"a": ([7], [1])})
    own = {r["id"]: {"question": r["question"], "cluster": "c"} for r in QUESTIONS}
    own = {
        name: {**row, "right": [1, 0], "tokens": [1, 1]} for name, row in own.items()
    }
    (tmp_path / "own.json").write_text(json.dumps({"problems": own}), "utf-8")
    short = "sampling.max_new_tokens=8"
    outcome = call(main, "eval", model_directory, questions, short, *words)
    if message:
        assert outcome.code == 2 and message in outcome.err
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    else:  # a label that no problem has: each is a cluster by itself
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda r: r.pop("ids"), ("confidence.measures=mean_logprob",), "has no ids"),
        (lambda r: r.pop("ids"), ("confidence.measures=majority",), ""),
        (lambda r: r.pop("text"), (), "expected what save=FILE writes"),
        (lambda r: r.update(ids=[]), (), "at least one"),
        (lambda r: r.update(ids=[10**6]), (), "of another tokenizer"),
        (lambda r: r.update(text="another"), (), "of another tokenizer"),
        (lambda r: r.update(problem="z"), (), "completions of other problems: 'a'"),
        (lambda r: r.update(question="?"), (), "asks something else"),
        (
            lambda r: r.update(ids=r["ids"] * 40, text="", finish_reason="stop"),
            ("confidence.measures=mean_logprob",),
            "context holds 192",
        ),
    ],
)
def test_a_saved_file_that_does_not_fit(
    call, model_directory, questions, tmp_path, change, words, message
):
    quick = ("sampling.max_new_tokens=8", "evaluation.samples=2", "save=a.jsonl")
    assert call(main, "eval", model_directory, questions, *quick).code == 0
    rows = [
        json.loads(line) for line in Path("a.jsonl").read_text("utf-8").splitlines()
    ]
    for row in rows[:2]:
        change(row)
    Path("a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    outcome = call(main, "eval", model_directory, questions, "saved=a.jsonl", *words)
    assert outcome.code == (2 if message else 0) and message in outcome.err


def test_a_saved_file_with_unequal_numbers_of_samples(call, model_directory, questions):
    quick = ("sampling.max_new_tokens=4", "evaluation.samples=2", "save=a.jsonl")
    assert call(main, "eval", model_directory, questions, *quick).code == 0
    lines = Path("a.jsonl").read_text("utf-8").splitlines(keepends=True)
    Path("a.jsonl").write_text("".join(lines[1:]), "utf-8")
    outcome = call(main, "eval", model_directory, questions, "saved=a.jsonl")
    assert outcome.code == 2 and "'a' has 1 completions, another has 2" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a.json",), "two run directories, or two eval.json"),
        (("a.json", "runs/b"), "two run directories, or two eval.json"),
        (("runs/a", "runs/b", "out=x"), "two run directories, or two eval.json"),
        (("a.json", "b.json"), "no such file"),
        (
            ("a.json", "a.json", "out=nowhere/x"),
            "no directory to write nowhere/x.png to",
        ),
        (("a.json", "other.json"), "no problem in common"),
    ],
)
def test_what_cannot_be_compared(call, tmp_path, words, message):
    measured_file(tmp_path / "a.json", {"a": ([1], [1])})
    measured_file(tmp_path / "other.json", {"z": ([1], [1])})
    outcome = call(main, "diff", *words)
    assert outcome.code == 2 and message in outcome.err
