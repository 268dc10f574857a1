"""`python -m nanomath drift`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from nanomath import load_model, load_tokenizer, save_model, settings
from nanomath.__main__ import main
from nanomath.analysis.measures import number_of
from nanomath.config import to_toml
from nanomath.models import Tokenizer
from nanomath.models.lora import LoRA
from nanomath.training.build import new_model

ROOT = Path(__file__).parents[2]
QUICK = (
    "drift.responses=3",
    "drift.texts=4",
    "problems.limit=12",
    "problems.world.difficulty=1,2",
    "sampling.max_new_tokens=6",
)
NUMBERS = ("k1", "forward_kl", "reverse_kl", "rank_shift", "moved")
STATES = ("distance", "relative_distance", "cka")


@pytest.fixture
def base(model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(base, tmp_path):
    """The base with noise on every matrix."""
    model = load_model(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    save_model(model, load_tokenizer(base), tmp_path / "tuned")
    return tmp_path / "tuned"


def measured(directory) -> dict:
    return json.loads((directory / "drift.json").read_text("utf-8"))


def test_a_table_numbers_and_pictures(call, base, tuned, tmp_path):
    outcome = call(main, "drift", base, tuned, "drift.by=difficulty", *QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    first, *lines = outcome.out.splitlines()
    assert first == f"{tuned} against {base}: 6 responses, 8 texts"
    assert re.match(r"  forward_kl +\S+ \(95% interval \S+ to \S+\)$", lines[1])
    assert any(re.match(r"  difficulty=2 +\S+ +\S+", line) for line in lines)
    found = measured(tmp_path / "drift")
    assert found["asked"]["base"] == str(base) and found["refused"] == []
    assert list(found["groups"]) == ["all", "difficulty=1", "difficulty=2"]
    for numbers in found["groups"].values():
        assert numbers.keys() >= {*NUMBERS, *STATES, "layers"}
        assert all(numbers[name]["mean"] != 0 for name in (*NUMBERS, *STATES))
        assert numbers["forward_kl"]["low"] <= numbers["forward_kl"]["mean"]
    assert found["groups"]["difficulty=1"]["responses"] == 3
    known = {*found["groups"]["all"], *found["weights"]["all"]}
    assert found["meaning"].keys() >= known - {
        "layers",
        "texts",
        "responses",
        "weights",
    }
    pictures = sorted(path.name for path in (tmp_path / "drift").iterdir())
    forms = [
        f"drift-{name}.{form}"
        for name in ("layers", "tokens")
        for form in ("png", "svg")
    ]
    assert pictures == sorted([*forms, "drift.json"])


@pytest.mark.filterwarnings("error")
def test_a_model_and_itself(call, base, tuned, tmp_path):
    assert call(main, "drift", base, tuned, *QUICK, "out=drift").code == 0
    assert list((tmp_path / "drift").glob("drift-tokens.*"))
    assert call(main, "drift", base, base, *QUICK).code == 0
    found = measured(tmp_path / "drift")
    numbers = found["groups"]["all"]
    assert all(numbers[name]["mean"] == 0 for name in (*NUMBERS, "distance"))
    assert numbers["cka"]["mean"] == 1
    assert found["weights"]["all"]["change"] == 0
    assert not list((tmp_path / "drift").glob("drift-tokens.*"))


def test_adapters_are_merged(call, base, tmp_path):
    adapters = LoRA(load_model(base), 2, 4.0, ["q_proj", "down_proj"], base=str(base))
    with torch.no_grad():
        for p in adapters.parameters():
            p.fill_(0.25)
    adapters.save(tmp_path / "adapter")
    assert call(main, "drift", base, tmp_path / "adapter", *QUICK).code == 0
    rows = measured(tmp_path / "drift")["weights"]["matrices"]
    changed = {row["kind"]: row for row in rows if row["change"]}
    assert changed.keys() == {"q_proj", "down_proj"}
    # alpha / r B A = 2 x 2 x 1/16 everywhere, of rank one, up to the rounding of W + B A.
    row = changed["down_proj"]
    assert row["norm_of_change"] == pytest.approx(
        0.25 * row["weights"] ** 0.5, rel=1e-5
    )
    assert row["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_where_it_is_written(call, base, tuned, tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(settings.GRPOConfig()), "utf-8")
    shutil.copytree(tuned, run / "checkpoints" / "step-3")
    assert call(main, "drift", base, run, tuned, base, *QUICK).code == 0
    places = {path.parent for path in tmp_path.rglob("drift.json")}
    assert places == {run, tmp_path / "drift" / "tuned", tmp_path / "drift" / "base"}
    assert measured(run)["weights"] == measured(tmp_path / "drift" / "tuned")["weights"]
    assert call(main, "drift", base, run, *QUICK, "out=elsewhere").code == 0
    assert (tmp_path / "elsewhere" / "drift.json").is_file()
    report = call(main, "report", run)
    assert report.code == 0 and "how far" in (run / "report.html").read_text("utf-8")


def words_model(directory, base) -> None:
    """A model of the same shape whose tokens are words."""
    texts = (
        "what is how many has have the answer so 0 1 2 3 4 5 6 7 8 9 + - = ? . , \\ { }"
    )
    names = ["<unk>", "<|endoftext|>", *texts.split()]
    backend = Backend(WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    own = Tokenizer(
        backend, load_tokenizer(base).chat_template, eos_token="<|endoftext|>"
    )
    shape = settings.NewModel(
        hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=64
    )
    save_model(new_model(shape, own.vocab_size, seed=0), own, directory)


def test_other_tokens_are_scored_by_the_text(call, base, tmp_path):
    words_model(tmp_path / "words", base)
    outcome = call(main, "drift", base, tmp_path / "words", *QUICK)
    assert outcome.code == 0
    assert "not measured: KL and ranks: the tokenizers differ" in outcome.out
    assert "not measured: weights: lm_head" not in outcome.out
    assert "not measured: weights: model.embed_tokens.weight is " in outcome.out
    found = measured(tmp_path / "drift")["groups"]["all"]
    assert found["text"]["mean"] != 0 and "k1" not in found
    assert found["relative_distance"]["mean"] > 0  # of equal widths


def test_another_shape_keeps_what_is_defined(call, base, tmp_path):
    tokenizer = load_tokenizer(base)
    shape = settings.NewModel(
        hidden_size=48, layers=2, heads=2, kv_heads=1, intermediate_size=64
    )
    save_model(
        new_model(shape, tokenizer.vocab_size, seed=0), tokenizer, tmp_path / "wide"
    )
    outcome = call(main, "drift", base, tmp_path / "wide", *QUICK)
    assert outcome.code == 0
    assert (
        "not measured: states of all: distance: the widths are 32 and 48" in outcome.out
    )
    assert "not measured: weights: " in outcome.out
    found = measured(tmp_path / "drift")["groups"]["all"]
    assert found.keys() >= {*NUMBERS, "cka"} and "distance" not in found


RECORDS = [
    {"question": "What is 1 + 1?", "answer": "2", "kind": "a"},
    {"question": "What is 1 + 2?", "answer": "3", "kind": "a"},
    {"question": "What is 1 + 3?", "answer": "4", "kind": "a"},
    {"question": "What is 1 + 4?", "answer": "5", "kind": "b"},
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base"], "drift needs a base and a tuned model"),
        ([], "drift needs a base and a tuned model"),
        (["base", ""], "drift needs a base and a tuned model"),
        (["base", "nowhere"], "no config.json in nowhere"),
        (["base", "no/such/model"], "no such model directory"),
        (
            ["base", "base", "drift.by=colour"],
            "no problem has the metadata key 'colour'",
        ),
        (
            ["base", "base", "problems.source=some.jsonl", "drift.by=kind"],
            "group kind=b has 1",
        ),
        (["base", "base", "problems.limit=2"], "the group of all problems has 2"),
        (["base", "base", "out=some.jsonl"], "some.jsonl is a file"),
        (["base", "base", "out=some.jsonl/below"], "some.jsonl is a file"),
        (["base", "base", "other/base"], "2 models of one name"),
        (["base", "base", "drift.texts=2"], "expected a number at least 3"),
        (["base", "base", "evaluation.by=kind"], "unknown key; did you mean drift.by"),
        (
            ["base", "base", "problems.source=long.jsonl"],
            "the model's context holds 192",
        ),
    ],
)
def test_what_is_refused(call, base, tmp_path, words, message):
    shutil.copytree(base, tmp_path / "other" / "base")
    (tmp_path / "nowhere").mkdir()
    long = [{**r, "question": f"{r['question']} {'so ' * 300}"} for r in RECORDS]
    for name, records in ("some", RECORDS), ("long", long):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text, "utf-8")
    before = sorted(tmp_path.rglob("*"))
    outcome = call(main, "drift", *words)
    if "long" in str(words):  # what could be measured is kept, and the rest named
        assert (
            outcome.code == 0 and "not measured: tokens: the prompt of" in outcome.out
        )
        assert (
            message in outcome.out
            and "cka" in measured(tmp_path / "drift")["groups"]["all"]
        )
        return
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err and "Errno" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_no_numbers_are_refused(call, base, tuned, tmp_path):
    model = load_model(tuned)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    save_model(model, load_tokenizer(base), tmp_path / "broken")
    outcome = call(main, "drift", base, tuned, tmp_path / "broken", *QUICK)
    assert outcome.code == 2
    assert "broken: model.norm.weight has entries that are not finite" in outcome.err
    assert (tmp_path / "drift" / "tuned" / "drift.json").is_file()  # it came before


@pytest.mark.parametrize(
    "change", [{"groups": {}}, {"groups": []}, {"meaning": 3}, {"refused": 3}]
)
def test_a_report_refuses_another_drift(call, tmp_path, change):
    (tmp_path / "config.toml").write_text(to_toml(settings.GRPOConfig()), "utf-8")
    sound = {"asked": {}, "meaning": {}, "groups": {"all": {}}, "refused": []}
    (tmp_path / "drift.json").write_text(json.dumps(sound | change), "utf-8")
    outcome = call(main, "report", tmp_path)
    assert outcome.code == 2 and "drift.json is not what drift writes" in outcome.err


def test_a_study_finds_the_numbers_that_it_measures(call, base, tuned, tmp_path):
    study = tomllib.loads((ROOT / "configs/studies/transfer.toml").read_text("utf-8"))
    keys = {"drift.by": study["stages"]["drift"]["keys"]["drift.by"]}
    words = [f"{key}={value}" for key, value in keys.items()]
    families = "problems.world.families=maths,grid,copying"
    assert call(main, "drift", base, tuned, *QUICK, families, *words).code == 0
    # Of the layers, those that these models have.
    layers = [f"drift.groups.all.layers.{i}." for i in (0, 1)]
    there = ("drift.groups.group=", *layers)
    wanted = [m for m in study["measures"] if m.startswith(there)]
    values = [number_of(tmp_path / "drift", m.removeprefix("drift.")) for m in wanted]
    assert len(values) == 5 and all(value > 0 for value in values)


def test_help_says_where_it_writes(call):
    outcome = call(main, "drift", "--help")
    assert outcome.code == 0
    assert "into TUNED where that is a run directory" in " ".join(outcome.out.split())
    assert "drift.by=" in outcome.out
