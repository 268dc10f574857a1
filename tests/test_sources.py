"""Samples of a teacher or of a file, and losses without rewards, through the scripts."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_grpo
import train_sft
from nanomath import load_tokenizer, settings
from nanomath.commands.main import run_main
from nanomath.config import load
from nanomath.data.world import CHAT_TEMPLATE
from nanomath.models import Tokenizer, save_model
from nanomath.training.build import build_model, build_problems
from nanomath.training.runlog import read_jsonl

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "nanomath" / "algorithms" / "README.md").read_text(encoding="utf-8")
SHAPE = {
    "hidden_size": 32,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "intermediate_size": 64,
    "max_positions": 256,
}
DATA = (
    "train.limit=6",
    "train.world.difficulty=1,1",
    "heldout.limit=1",
    "evaluation.samples=1",
    "model.device=cpu",
    "sampling.max_new_tokens=8",
    "optim.lr=0.003",
    "optim.schedule=constant",
    "run.steps=2",
)
GRPO = (*DATA, "grpo.prompts=2", "grpo.group_size=4", "grpo.logged_groups=2")
TIMES = {"seconds", "tokens_per_second", "sampling_seconds"}
RIGHT = ("grpo.solutions=true",)  # a model this small is never right by itself
SHOWN = ("teacher.shows=solution", "algorithm.method=opd")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two models of one tokenizer, and samples of the problems: a right one and four others."""
    place = tmp_path_factory.mktemp("sources")
    section = settings.Model(device="cpu", new=settings.NewModel(**SHAPE))
    for seed, name in enumerate(("policy", "teacher")):
        save_model(*build_model(section, seed), place / name)
    world = settings.World(difficulty=[1, 1])
    problems = build_problems(settings.Problems(limit=6, world=world))
    texts = [(p, text) for p in problems for text in (p.solution, "1", "2", "3", "4")]
    rows = [{"question": p.question, "gold": p.answer, "text": t} for p, t in texts]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "samples.jsonl").write_text(text, encoding="utf-8")
    return place


@pytest.fixture
def train(place, tmp_path, monkeypatch) -> Callable[..., Path]:
    """train(name, *words): the directory of a run that went well; {} is the directory of the
    models.
    """
    monkeypatch.chdir(place)

    def train(name: str, *words: str, script=train_grpo) -> Path:
        base = GRPO if script is train_grpo else (*DATA, "sft.batch_size=3")
        start = "model.path=policy", f"run.directory={tmp_path}", f"run.name={name}"
        assert script.main([*base, *start, *words]) == 0
        return tmp_path / name

    return train


def metrics(run: Path) -> list[dict]:
    rows = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def steps(run: Path) -> list[dict]:
    return [row for row in metrics(run) if "loss" in row]


def state(run: Path, step: int = 2) -> dict[str, bytes]:
    here = run / "checkpoints" / f"step-{step}"
    return {path.name: path.read_bytes() for path in sorted(here.glob("*.safetensors"))}


CELLS = {
    "on-policy SFT": ("algorithm.method=sft", *RIGHT),
    "off-policy SFT": (
        "algorithm.method=sft",
        "grpo.source=teacher",
        "teacher.path=teacher",
        *RIGHT,
    ),
    "off-policy RL": (
        "grpo.source=teacher",
        "teacher.path=teacher",
        "reward.weights.random=1",
    ),
    "importance weights": (
        "grpo.source=teacher",
        "teacher.path=teacher",
        "reward.weights.random=1",
        "algorithm.old_logprobs=sampler",
    ),
    "a file": ("grpo.source=samples.jsonl",),
    "a file, the best": (
        "grpo.source=samples.jsonl",
        "algorithm.samples=best",
        "algorithm.epochs=2",
    ),
    "mixed": (*RIGHT,),
    "process rewards": (*RIGHT, "algorithm.method=process_grpo", "process.prm=random"),
    "DPO": ("algorithm.method=dpo", *RIGHT, "algorithm.preference_beta=0.5"),
    "distillation": ("algorithm.method=opd", "teacher.path=teacher"),
    "distillation, whole": (
        "algorithm.method=opd",
        "algorithm.advantage=teacher_full",
        "teacher.path=teacher",
    ),
    "self-distillation": (*SHOWN, "teacher.path=policy"),
    "start as the teacher": (*SHOWN, "teacher.path=start"),
    "sibling": (
        "algorithm.method=opd",
        "teacher.path=policy",
        "teacher.shows=sibling",
        *RIGHT,
    ),
}


@pytest.mark.slow
def test_every_cell_trains_and_differs(train):
    """Two steps of each, a file of weights of its own, and the metrics that belong to it."""
    found = {}
    for number, (name, words) in enumerate(CELLS.items()):
        run = train(str(number), *words)
        found.setdefault(state(run)["model.safetensors"], []).append(name)
        for row in steps(run):
            assert row["grad_norm"] > 0 and all(map(math.isfinite, row.values())), name
            assert ("teacher_kl" in row) == ("algorithm.method=opd" in words)
            if "DPO" in name:
                assert row["pairs"] == 1 and row["taught"] == 0.5
            if "SFT" in name:
                assert row["taught"] == row["pass@1"] == 0.25 and row["nll"] > 1
    same = [names for names in found.values() if len(names) > 1]
    assert same == [["on-policy SFT", "off-policy SFT"]]  # the solution alone is right
    right = steps(train("sibling", *CELLS["sibling"]))[0]
    assert right["demonstrated"] == 0.75  # the right one itself has no other


@pytest.mark.parametrize(
    "words",
    [("optim.l2_start=0.1",), ("sft.kl_coef=0.5",), ("sft.kl_coef=0.5", "lora.rank=2")],
)
def test_sft_near_its_start(train, words):
    plain = train("plain", script=train_sft)
    held = train("held", *words, script=train_sft)
    assert state(held).keys() and state(held) != state(plain)
    name = "start_distance" if "l2" in words[0] else "kl"
    assert steps(held)[1][name] > 0 and name not in steps(plain)[1]


def test_what_is_switched_off_changes_no_bit(train):
    plain = train("plain", script=train_sft)
    off = train("off", "optim.l2_start=0", "sft.kl_coef=0", script=train_sft)
    assert state(off) == state(plain) and metrics(off) == metrics(plain)


def test_a_teacher_that_is_the_policy_draws_what_the_policy_draws(train):
    one = ("run.steps=1", "reward.weights.random=1", "run.eval_every=0")
    plain = train("plain", *one)
    for name, path in ("same", "policy"), ("copy", "./policy"), ("start", "start"):
        run = train(name, *one, "grpo.source=teacher", f"teacher.path={path}")
        assert state(run, 1) == state(plain, 1) and metrics(run) == metrics(plain)


def test_samples_that_are_written_down_teach_what_they_taught(train, place):
    """rollouts.jsonl has the tokens, and logprobs to six decimals."""
    every = ("run.steps=1", "reward.weights.random=1", "grpo.prompts=6")
    plain = train("plain", *every, "grpo.logged_groups=6")
    again = train(
        "again", *every, "grpo.logged_groups=6", f"grpo.source={plain}/rollouts.jsonl"
    )
    drawn, read = (
        sorted((r["problem"], r["tokens"]) for r in read_jsonl(run / "rollouts.jsonl"))
        for run in (plain, again)
    )
    assert drawn == read
    assert steps(again)[0]["gap_max"] < 1e-5
    assert steps(again)[0]["grad_norm/norm"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ("grpo.source=samples.jsonl", "algorithm.minibatches=2", *RIGHT),
        ("algorithm.method=dpo", *RIGHT),
        (*SHOWN, "teacher.path=policy", "grpo.token_budget=60"),
        ("algorithm.method=opd", "teacher.path=teacher", "lora.rank=2"),
        ("optim.l2_start=0.1", *RIGHT),
    ],
    ids=" ".join,
)
def test_resuming_is_going_on(train, words):
    whole = train("whole", *words)
    train("parts", "run.steps=1", *words)
    parts = train("parts", "--resume", *words)
    assert state(parts) == state(whole)
    assert steps(parts) == steps(whole)


def test_resuming_sft_near_its_start(train):
    words = ("optim.l2_start=0.1", "sft.kl_coef=0.3", "model.dtype=bfloat16")
    whole = train("whole", *words, script=train_sft)
    train("parts", "run.steps=1", *words, script=train_sft)
    parts = train("parts", "--resume", *words, script=train_sft)
    assert state(parts) == state(whole) and steps(parts) == steps(whole)


@pytest.mark.parametrize("name", ["self-distillation", "distillation, whole", "DPO"])
def test_no_gradient_depends_on_the_cut(train, name):
    words = (*CELLS[name], "run.steps=1")
    whole, *cut = (
        steps(train(f"{b}", *words, f"grpo.token_budget={b}"))[0] for b in (0, 1, 120)
    )
    for found in cut:
        assert found["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        assert found["loss"] == pytest.approx(whole["loss"], rel=1e-4, abs=1e-6)


def test_the_words_of_the_page_are_accepted():
    table = PAGE.split("## SFT, RL and distillation")[1].split("\n- **")[0]
    cells = [row.split("|")[-2] for row in table.splitlines() if row.startswith("| ")]
    lines = [words for cell in cells for words in re.findall("`([^`]*)`", cell)]
    assert len(lines) == 15
    for line in lines[1:]:
        words = [word for word in line.split() if "=" in word]
        sft = line.startswith("python train_sft.py")
        kind, file = (
            (settings.SFTConfig, "sft") if sft else (settings.GRPOConfig, "grpo")
        )
        load(kind, ROOT / f"configs/tiny/{file}.toml", words)


# --- what is refused -------------------------------------------------------------------------

TAUGHT = ("algorithm.method=opd",)
BARE = ("hints.chooser=ladder", "hints.place=user", "hints.score=bare")
REFUSED = [
    (TAUGHT, "algorithm.advantage = 'teacher', but teacher.path is empty"),
    (("grpo.source=teacher",), 'grpo.source = "teacher", but teacher.path is empty'),
    (("grpo.source=",), "grpo.source is empty: policy, teacher, or a .jsonl file"),
    (("teacher.path=teacher",), "teacher.path = 'teacher', but nothing asks it"),
    (
        ("grpo.source=teacher", "teacher.path=teacher", "teacher.shows=solution"),
        "teacher.shows = 'solution' is for scoring",
    ),
    (
        (*TAUGHT, "teacher.path=policy"),
        "scores as the policy does: every advantage is 0",
    ),
    (
        (*SHOWN, "teacher.path=policy", "teacher.template={question}"),
        "teacher.template lacks {demonstration}",
    ),
    (
        ("sampling.exact=true", *RIGHT),
        "sampling.exact, but of grpo.solutions = true the samples are not",
    ),
    (
        ("grpo.source=samples.jsonl", "algorithm.method=rloo"),
        'algorithm.kl_in = "reward" needs samples of the policy, but of grpo.source = \'sampl',
    ),
    (
        ("grpo.source=samples.jsonl", *RIGHT, "hints.chooser=ladder"),
        "but of grpo.source = 'samples.jsonl' and grpo.solutions = true the samples are not",
    ),
    (
        (*SHOWN, "teacher.path=start", "algorithm.old_logprobs=sampler", *RIGHT),
        "with which the teacher is compared, but of grpo.solutions = true it is another",
    ),
    (
        ("hints.chooser=ladder", "hints.place=user", "hints.score=bare"),
        'hints.score = "bare" trains pi(y|q) / pi(y|q,h), whose lower part only the sampler',
    ),
    (
        (*BARE, "algorithm.method=sft", "sampling.exact=true"),
        'sampling.exact, but of hints.score = "bare" the samples are not the policy\'s',
    ),
    (
        (*BARE, "algorithm.method=reinforce_pp", "algorithm.old_logprobs=sampler"),
        'needs samples of the policy, but of hints.score = "bare" they are not',
    ),
    (
        ("grpo.source=told.jsonl",),
        "told.jsonl:1: the sample was told a hint, which the",
    ),
    (
        ("grpo.group_size=1", "algorithm.method=dpo"),
        'algorithm.samples = "pair" takes two: take at least 2',
    ),
    (
        ("optim.l2_start=1", "lora.rank=2"),
        "lora.rank = 2, but optim.l2_start: optim.weight",
    ),
    (("grpo.source=none.jsonl",), "there is no file of samples none.jsonl"),
    (("grpo.source=list.txt",), "list.txt: unknown format; expected .jsonl"),
    (
        ("grpo.source=samples.jsonl", "grpo.group_size=6"),
        "samples.jsonl has 5 samples of problem maths-en-",
    ),
    (
        ("grpo.source=samples.jsonl", "train.limit=7"),
        "samples.jsonl has 0 samples of problem maths-en-",
    ),
    (
        ("grpo.source=samples.jsonl", "algorithm.old_logprobs=sampler"),
        "samples.jsonl:1: no logprobs of this tokenizer's tokens",
    ),
    (
        ("grpo.source=wrong.jsonl",),
        "wrong.jsonl:2: a sample needs the texts `question`",
    ),
    (
        (*TAUGHT, "teacher.path=foreign"),
        "teacher.path = 'foreign' has another tokenizer than the policy",
    ),
    ((*TAUGHT, "teacher.path=nowhere"), "nowhere"),
    (
        (*TAUGHT, "teacher.path=small"),
        "tokens: sampling.max_new_tokens leaves 12 of its context of 20",
    ),
    (
        (*RIGHT, "train.source=unsolved.jsonl", "prompt.chat=false"),
        "problem 'unsolved-0' has no solution, which the template",
    ),
    (
        (*SHOWN, "teacher.path=policy", "train.source=unsolved.jsonl"),
        "problem 'unsolved-0' has no solution, which the template",
    ),
    (
        (*SHOWN, "teacher.path=policy", "sampling.max_new_tokens=240"),
        "tokens with its solution: sampling.max_new_tokens leaves 16 of its context of 256",
    ),
    (
        (*RIGHT, "train.source=long.jsonl"),
        "problem long-0 with a sample has ",
    ),
]


@pytest.mark.parametrize(
    ("words", "said"), REFUSED, ids=lambda value: " ".join(value)[:70]
)
def test_what_cannot_be_is_refused_in_one_line(
    place, tmp_path, monkeypatch, capsys, words, said
):
    monkeypatch.chdir(place)
    good = (place / "samples.jsonl").read_text().splitlines()[0]
    asked = {"question": "What is 1 + 1?", "answer": "2"}
    solved = {**asked, "solution": "one two three " * 200}
    files = {
        "wrong.jsonl": good + '\n{"question": "Why?", "text": 3}\n',
        "unsolved.jsonl": json.dumps(asked) + "\n",
        "long.jsonl": json.dumps(solved) + "\n",
        "list.txt": "1\n",
        "told.jsonl": json.dumps(json.loads(good) | {"hint": "so", "level": 0.5})
        + "\n",
    }
    for name, text in files.items():
        (place / name).write_text(text)
    small = place / "small"
    shutil.copytree(place / "policy", small, dirs_exist_ok=True)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 20})
    )
    if not (place / "foreign").exists():
        backend = load_tokenizer(place / "policy").backend
        backend.add_tokens(["surplus"])
        tokenizer = Tokenizer(backend, CHAT_TEMPLATE, eos_token="<|endoftext|>")
        section = settings.Model(device="cpu", new=settings.NewModel(**SHAPE))
        model = build_model(section, 0)[0]
        rows = torch.nn.functional.pad(model.lm_head.weight.detach(), (0, 0, 0, 8))
        model.config = type(model.config)(
            **{**vars(model.config), "vocab_size": len(rows)}
        )
        model.model.embed_tokens.weight = model.lm_head.weight = torch.nn.Parameter(
            rows
        )
        save_model(model, tokenizer, place / "foreign")
    with pytest.raises(SystemExit) as exited:
        run_main(
            train_grpo.main,
            [*GRPO, "model.path=policy", f"run.directory={tmp_path}", *words],
        )
    error = capsys.readouterr().err
    assert (
        exited.value.code == 2
        and error.count("\n") == 1
        and error.startswith("error: ")
    )
    assert said in error and not list(tmp_path.iterdir())
