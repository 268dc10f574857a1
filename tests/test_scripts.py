"""train_sft.py and train_grpo.py from end to end, on a model so small that every run takes a
moment.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_grpo
import train_sft
from nanomath import load_model, load_tokenizer, settings
from nanomath.__main__ import main as nanomath_main
from nanomath.algorithms import PRESETS
from nanomath.commands.main import run_main
from nanomath.config import load
from nanomath.rewards import extract_answer
from nanomath.training.runlog import read_jsonl

ROOT = Path(__file__).parents[1]
SHAPE = (
    "model.new.hidden_size=32",
    "model.new.layers=1",
    "model.new.heads=2",
    "model.new.kv_heads=1",
    "model.new.intermediate_size=64",
)
DATA = (
    "train.limit=64",
    "heldout.limit=4",
    "train.world.difficulty=1,1",
    "heldout.world.difficulty=1,1",
)
QUICK = ("model.device=cpu", "sampling.max_new_tokens=12", "evaluation.samples=2")
SFT = (
    *SHAPE,
    *DATA,
    *QUICK,
    "sft.batch_size=8",
    "optim.lr=0.01",
    "optim.schedule=constant",
)
GRPO = (
    *DATA,
    *QUICK,
    *(
        "grpo.prompts=3",
        "grpo.group_size=4",
        "optim.lr=0.003",
        "optim.schedule=constant",
    ),
    *(
        "reward.weights.random=1",
        "reward.weights.repetition=0.5",
    ),  # a model this small is never right
)
TIMES = {"seconds", "tokens_per_second", "sampling_seconds"}


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [
        {key: v for key, v in line.items() if key not in TIMES}
        for line in read_jsonl(run / name)
    ]


def weights(run: Path, step: int) -> dict[str, bytes]:
    """The model, the value model where there is one, and the state of the optimizers, byte for
    byte.
    """
    place = run / "checkpoints" / f"step-{step}"
    return {
        path.name: path.read_bytes() for path in sorted(place.glob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory) -> Path:
    """Six steps of SFT, measured and saved every second one."""
    directory = tmp_path_factory.mktemp("sft")
    often = ("run.eval_every=2", "run.save_every=2", "run.keep_last=0")
    assert (
        train_sft.main(
            [f"run.directory={directory}", "run.name=base", "run.steps=6", *often, *SFT]
        )
        == 0
    )
    return directory / "base"


@pytest.fixture
def train(tmp_path) -> Callable[..., Path]:
    """train(script, name, *words): the directory of a run that went well."""

    def train(script, name: str, *words: str) -> Path:
        base = SFT if script is train_sft else GRPO
        assert (
            script.main(
                [*base, f"run.directory={tmp_path}", f"run.name={name}", *words]
            )
            == 0
        )
        return tmp_path / name

    return train


# --- supervised fine-tuning ------------------------------------------------------------------


def test_sft_logs_every_step(sft_run):
    metrics = lines(sft_run)
    assert [line["step"] for line in metrics] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [line["step"] for line in metrics if "heldout/pass@1" in line] == [
        0,
        2,
        4,
        6,
    ]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    steps = [line for line in metrics if "loss" in line]
    assert {"loss", "nll", "entropy", "grad_norm", "tokens", "lr"} <= steps[0].keys()
    assert [line["lr"] for line in steps] == [0.01] * 6


def test_sft_learns(sft_run):
    metrics = lines(sft_run)
    losses = [line["loss"] for line in metrics if "loss" in line]
    heldout = [line["heldout/loss"] for line in metrics if "heldout/loss" in line]
    vocabulary = load_tokenizer(sft_run).vocab_size
    assert losses[0] == pytest.approx(math.log(vocabulary), rel=0.1)
    assert losses[-1] < losses[0] - 0.5 and heldout == sorted(heldout, reverse=True)


def test_sft_writes_the_config_it_ran_with(sft_run, train):
    config = load(settings.SFTConfig, sft_run / "config.toml")
    assert (config.run.steps, config.optim.lr, config.train.world.difficulty) == (
        6,
        0.01,
        [1, 1],
    )
    again = train(train_sft, "again", f"{sft_run}/config.toml")
    assert weights(again, 6) == weights(sft_run, 6) and lines(again) == lines(sft_run)


def test_a_checkpoint_is_a_model_for_transformers(sft_run):
    transformers = pytest.importorskip("transformers")
    assert sorted(path.name for path in (sft_run / "checkpoints").iterdir()) == [
        "step-2",
        "step-4",
        "step-6",
    ]
    tokens = torch.tensor(
        [load_tokenizer(sft_run).encode("Mia has 12 apples. She buys 7 more.")]
    )
    seen = []
    for step in 2, 4, 6:
        place = sft_run / "checkpoints" / f"step-{step}"
        with torch.no_grad():
            ours = load_model(place)(tokens)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32
            )(tokens).logits
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert json.loads((place / "trainer.json").read_text())["step"] == step
        seen.append(ours)
    assert not torch.allclose(seen[0], seen[1], atol=1e-2) and not torch.allclose(
        seen[1], seen[2], atol=1e-2
    )
    with torch.no_grad():
        # A run is its newest checkpoint
        assert torch.equal(load_model(sft_run)(tokens), seen[-1])


def test_old_checkpoints_are_dropped(train):
    run = train(
        train_sft,
        "run",
        "run.steps=3",
        "run.save_every=1",
        "run.keep_last=1",
        "heldout.limit=1",
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.parametrize(
    "words",
    [
        ("model.dtype=bfloat16",),
        ("sft.dft=true",),
        ("sft.neftune_alpha=5",),
        ("sft.aggregation=sequence", "sft.token_budget=300"),
        (
            "model.gradient_checkpointing=true",
            "prompt.chat=false",
            "optim.schedule=cosine",
            "optim.warmup=1",
        ),
        (
            "train.world.families=[maths,sorting]",
            "train.world.languages=[en,ja]",
            "prompt.system=Solve it.",
            "optim.weight_decay=0.1",
        ),
    ],
    ids=" ".join,
)
def test_kinds_of_sft(train, words):
    run = train(
        train_sft,
        "run",
        "run.steps=3",
        "heldout.limit=2",
        "evaluation.by=difficulty",
        *words,
    )
    metrics = lines(run)
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert len(losses) == 3 and metrics[-1]["heldout/loss"] < metrics[0]["heldout/loss"]
    assert "heldout/pass@1/difficulty=1" in metrics[-1]


def test_a_problem_file_is_trained_on(train, tmp_path):
    record = {
        "problem": "What is 3 + 4?",
        "answer": 7,
        "solution": r"3 + 4 = 7. \boxed{7}",
        "level": "easy",
    }
    (tmp_path / "set.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    words = [f"{part}.source={tmp_path}/set.jsonl" for part in ("train", "heldout")]
    run = train(
        train_sft,
        "run",
        "run.steps=40",
        "optim.lr=0.03",
        "sampling.max_new_tokens=32",
        *words,
    )
    first, last = (line for line in lines(run) if "heldout/pass@1" in line)
    assert (first["heldout/pass@1"], last["heldout/pass@1"]) == (0, 1)


# --- reinforcement ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo_run(sft_run, tmp_path_factory) -> Path:
    """Two steps of GRPO, with a KL penalty."""
    words = [
        *GRPO,
        f"run.directory={tmp_path_factory.mktemp('grpo')}",
        "run.name=base",
        "run.steps=2",
    ]
    assert (
        train_grpo.main([*words, f"model.path={sft_run}", "algorithm.kl_coef=0.1"]) == 0
    )
    return Path(words[len(GRPO)].removeprefix("run.directory=")) / "base"


def test_grpo_logs_every_step(grpo_run):
    metrics = lines(grpo_run)
    assert [line["step"] for line in metrics] == [0, 1, 2, 2]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    first, second = (line for line in metrics if "reward" in line)
    # The sampler's logprobs are the trainer's
    assert first["gap_max"] < 1e-4 and second["gap_max"] < 1e-4
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-5
    assert first["grad_norm"] > 0


def test_rewards_are_logged_apart(grpo_run):
    for line in (line for line in lines(grpo_run) if "reward" in line):
        total = (
            line["reward/accuracy"]
            + line["reward/random"]
            + 0.5 * line["reward/repetition"]
        )
        assert line["reward"] == pytest.approx(total)
        assert line["pass@1"] == line["reward/accuracy"]


def test_rollouts_hold_whole_groups(grpo_run):
    records = lines(grpo_run, "rollouts.jsonl")
    assert [r["step"] for r in records] == [1] * 8 + [
        2
    ] * 8  # two of the three groups of four
    for record in records:
        assert len(record["tokens"]) == len(record["logprobs"]) > 0
        assert all(logprob <= 0 for logprob in record["logprobs"])
        parts = record["rewards"]
        assert parts["total"] == pytest.approx(
            parts["accuracy"] + parts["random"] + 0.5 * parts["repetition"]
        )
        assert {
            "problem",
            "question",
            "answer",
            "text",
            "finish_reason",
            "prompt_tokens",
            "gap",
            "kl",
            "entropy",
        } <= record.keys()
        assert record["found"] == extract_answer(record["text"])
    for group in (records[i : i + 4] for i in range(0, 16, 4)):
        assert len({r["problem"] for r in group}) == 1
        totals = torch.tensor(
            [r["rewards"]["total"] for r in group], dtype=torch.float64
        )
        expected = (totals - totals.mean()) / (totals.std() + 1e-4)
        assert torch.allclose(
            torch.tensor([r["advantages"] for r in group]).double(), expected, atol=1e-3
        )
    groups = lines(grpo_run, "groups.jsonl")
    assert [(g["step"], len(g["problems"]), g["samples"]) for g in groups] == [
        (1, 3, 4),
        (2, 3, 4),
    ]
    assert groups[0]["problems"][1] == records[4]["problem"]
    assert groups[0]["right"][1] == sum(r["rewards"]["accuracy"] for r in records[4:8])


def test_the_logprobs_of_the_first_rollout_are_those_of_the_starting_model(
    grpo_run, sft_run
):
    model, tokenizer = load_model(sft_run), load_tokenizer(sft_run)
    for record in lines(grpo_run, "rollouts.jsonl")[:8]:
        prompt, tokens = record["prompt_tokens"], record["tokens"]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + tokens]))[0].log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        expected = logprobs[places, torch.tensor(tokens)]
        assert torch.allclose(torch.tensor(record["logprobs"]), expected, atol=1e-4)
        entropy = -(logprobs.exp() * logprobs).sum(-1)[places]
        assert torch.allclose(torch.tensor(record["entropy"]), entropy, atol=1e-3)
        assert record["gap"] == record["kl"] == 0.0  # to three decimals
        assert record["question"] in tokenizer.decode(prompt)
        assert record["text"] == tokenizer.decode(
            [t for t in tokens if t not in tokenizer.eos_ids]
        )


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm.kl_coef=0", "algorithm.epochs=2", "algorithm.minibatches=2"),
        (
            "algorithm.old_logprobs=sampler",
            "algorithm.kl_estimator=k2",
            "algorithm.aggregation=token",
        ),
        (
            "grpo.reference_device=cpu",
            "algorithm.aggregation=constant",
            "algorithm.scale=off",
            "grpo.token_budget=200",
        ),
        (
            "algorithm.scale=batch",
            "sampling.top_k=20",
            "sampling.top_p=0.9",
            "sampling.temperature=0.7",
        ),
        (
            "model.dtype=bfloat16",
            "model.gradient_checkpointing=true",
            "algorithm.kl_estimator=k2",
            "sampling.stop=[.]",
        ),
        (
            "optim.state_dtype=bfloat16",
            "algorithm.method=reinforce_pp",
            "algorithm.kl_coef=0.1",
        ),
    ],
    ids=" ".join,
)
def test_kinds_of_grpo(train, sft_run, words):
    run = train(
        train_grpo,
        "run",
        "run.steps=2",
        "heldout.limit=1",
        f"model.path={sft_run}",
        *words,
    )
    metrics = lines(run)
    steps = [line for line in metrics if "reward" in line]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert len(steps) == 2 and all(line["grad_norm"] > 0 for line in steps)
    assert steps[-1]["kl"] > 0


def test_without_a_signal_and_without_a_penalty_nothing_moves(train, sft_run):
    still = (
        "reward.weights={accuracy = 1}",
        "algorithm.kl_coef=0",
        "sampling.max_new_tokens=2",
        "run.steps=1",
    )
    run = train(train_grpo, "run", f"model.path={sft_run}", *still)
    (line,) = (line for line in lines(run) if "reward" in line)
    assert (line["flat_groups"], line["all_wrong"], line["grad_norm"]) == (1, 1, 0)
    assert (
        weights(run, 1)["model.safetensors"] == weights(sft_run, 6)["model.safetensors"]
    )


def test_every_step_has_new_problems_and_new_samples(train, sft_run):
    still = ("optim.lr=1e-12", "heldout.limit=1", "run.steps=4")
    losses = [
        line["loss"]
        for line in lines(train(train_sft, "sft", *still))
        if "loss" in line
    ]
    assert len(set(losses)) == 4  # eight epochs' worth of problems are left
    epochs = [
        line["loss"]
        for line in lines(train(train_sft, "one", *still, "train.limit=8"))
        if "loss" in line
    ]
    # The same eight in each step
    assert epochs == pytest.approx([epochs[0]] * 4, rel=1e-5)

    run = train(
        train_grpo,
        "grpo",
        *still,
        "train.limit=1",
        "grpo.prompts=1",
        f"model.path={sft_run}",
    )
    drawn = [tuple(record["tokens"]) for record in lines(run, "rollouts.jsonl")]
    assert len(drawn) == len(set(drawn)) == 16  # of one problem, in four steps


# --- every key does something ----------------------------------------------------------------

SHORT = (
    "run.steps=2",
    "heldout.limit=1",
    "evaluation.samples=1",
    "sampling.max_new_tokens=6",
)
SFT_KEYS = [
    ("run.seed=1",),
    ("optim.lr=0.02",),
    ("optim.schedule=linear",),
    ("optim.schedule=linear", "optim.final=0.5"),
    ("optim.warmup=2",),
    ("optim.weight_decay=0.5",),
    ("optim.beta1=0.5",),
    ("optim.beta2=0.5",),
    ("optim.eps=0.01",),
    ("optim.max_norm=0.01",),
    ("optim.state_dtype=bfloat16",),
    ("sft.batch_size=4",),
    ("sft.aggregation=sequence",),
    ("sft.dft=true",),
    ("sft.neftune_alpha=5",),
    ("sft.kl_coef=5",),
    ("optim.l2_start=5",),
    ("model.dtype=bfloat16",),
    ("model.new.kv_heads=2",),
    ("train.world.difficulty=2,2",),
    ("train.world.families=sorting",),
    ("train.world.languages=ja",),
    ("train.limit=9",),
    ("prompt.system=Think.",),
    ("prompt.template=Solve: {question}",),
    ("prompt.response={solution} Done.",),
    ("prompt.few_shot=[{question = '1+1?', solution = '2'}]",),
    ("prompt.chat=false",),
]
FAR = ("algorithm.epochs=3", "optim.lr=0.1")  # far enough for a ratio to double
TWICE = (
    "algorithm.epochs=2",
    "optim.lr=0.03",
)  # or the ratio stays at 1 and nothing is clipped
TRUNCATED = ("sampling.top_k=3", "algorithm.kl_coef=0")
VALUE = ("algorithm.baseline=value", "algorithm.scale=off")
SCORED = ("process.prm=random",)
SOLVED = ("grpo.solutions=true",)
SHOWN = ("teacher.path=policy", "teacher.shows=solution")
STEPS = {"process_grpo": SCORED, "pure": SCORED}  # what a method needs beside its name
STEPS |= {"sft": SOLVED, "dpo": SOLVED, "opd": SHOWN}
BEGUN = ("train.world.difficulty=[4,4]",)  # solutions of several steps
HINTED = (*BEGUN, "hints.chooser=schedule")
GRPO_KEYS = [
    ("run.seed=1",),
    ("grpo.prompts=2",),
    ("grpo.group_size=3",),
    ("algorithm.scale=batch",),
    ("algorithm.scale=off",),
    ("algorithm.aggregation=token", "sampling.stop=[e]"),
    ("algorithm.aggregation=constant", "sampling.stop=[e]"),
    ("algorithm.epochs=2",),
    TWICE,
    ("algorithm.clip_low=0", *TWICE),
    ("algorithm.clip_high=0", *TWICE),
    ("algorithm.clip=off", *TWICE),
    ("algorithm.clip=cispo", *TWICE),
    ("algorithm.clip=dual", "algorithm.dual_clip=1.21", *FAR),
    ("algorithm.clip=dual", "algorithm.dual_clip=1.3", *FAR),
    ("algorithm.ratio=sequence", *TWICE),
    ("algorithm.minibatches=2",),
    ("algorithm.kl_coef=0",),
    ("algorithm.kl_coef=0.5",),
    ("algorithm.kl_estimator=k2",),
    ("algorithm.kl_in=reward", "algorithm.kl_estimator=k1"),
    ("algorithm.kl_correction=weight", *TWICE),
    ("algorithm.kl_correction=ratio", *TWICE),
    ("algorithm.old_logprobs=sampler",),
    ("algorithm.sampler_correction=truncate", *TRUNCATED),
    ("algorithm.sampler_correction=mask", *TRUNCATED),
    ("algorithm.sampler_correction=mask", "algorithm.correction_low=0.1", *TRUNCATED),
    ("algorithm.baseline=leave_one_out",),
    ("algorithm.whiten=true",),
    ("algorithm.components=apart", "reward.weights.cosine=1"),
    *(
        (f"algorithm.baseline={b}", "algorithm.scale=off")
        for b in ("leave_one_out", "off", "value")
    ),
    ("algorithm.baseline=off", "algorithm.scale=off", "algorithm.gamma=0.5"),
    (*VALUE, "algorithm.lam=0.5"),
    (*VALUE, "algorithm.gamma=0.5"),
    (*VALUE, "algorithm.value_coef=2"),
    (*VALUE, "algorithm.value_lr=0.1"),
    (*VALUE, "algorithm.value_lr=0.1", "algorithm.epochs=2"),
    (
        *VALUE,
        "algorithm.value_lr=0.1",
        "algorithm.epochs=2",
        "algorithm.value_clip=0.001",
    ),
    (*VALUE, "algorithm.value_trunk=shared"),
    ("algorithm.overlong_filter=true", "sampling.stop=[e]"),
    ("algorithm.keep_groups=mixed", "algorithm.refills=1"),
    ("algorithm.keep_groups=mixed", "algorithm.refills=2"),
    ("algorithm.covariance=clip",),
    ("algorithm.covariance=clip", "algorithm.covariance_share=0.5"),
    ("algorithm.covariance=kl", *TWICE),
    ("algorithm.covariance=kl", "algorithm.covariance_coef=5", *TWICE),
    ("algorithm.top_entropy=0.2",),
    ("optim.l2_start=5",),
    ("grpo.sampling_seed=1",),
    *((*BEGUN, f"hints.chooser={chooser}") for chooser in ("off", "ladder", "learned")),
    (*BEGUN, "hints.chooser=ladder", "hints.levels=[1]"),
    (*BEGUN, "hints.chooser=controller"),
    (*BEGUN, "hints.chooser=controller", "hints.gain=1.5"),
    (*BEGUN, "hints.chooser=controller", "hints.gain=1.5", "hints.most=0.5"),
    HINTED,
    (*HINTED, "hints.levels=[1]"),
    (*HINTED, "hints.levels=[1]", "hints.start=1"),
    (*HINTED, "hints.place=user"),
    (*HINTED, "hints.place=user", "hints.below=0.4"),
    (*HINTED, "hints.place=user", "hints.template= So: {hint}"),
    (*HINTED, "hints.place=user", "hints.score=bare", "algorithm.old_logprobs=sampler"),
    SOLVED,
    (*SOLVED, "algorithm.samples=right"),
    (*SOLVED, "algorithm.samples=best"),
    (*SOLVED, "algorithm.samples=pair"),
    (*SOLVED, "algorithm.method=dpo", "algorithm.preference_beta=2"),
    ("algorithm.method=opd", *SHOWN, "teacher.template={demonstration} {question}"),
    ("algorithm.method=opd", *SHOWN, "teacher.path=start"),
    ("algorithm.method=opd", *SHOWN, "algorithm.advantage=teacher_full"),
    ("algorithm.method=opd", *SHOWN, "algorithm.clip=cispo", *TWICE),
    ("algorithm.method=opd", *SOLVED, "teacher.path=policy", "teacher.shows=sibling"),
    *(
        (f"algorithm.method={method}", *STEPS.get(method, ()))
        for method in PRESETS
        if method not in ("grpo", "gdpo")
    ),
    ("algorithm.method=process_grpo", *SCORED, "process.weight=2"),
    (
        "algorithm.method=process_grpo",
        *SCORED,
        "reward.weights.accuracy=0",
        "reward.weights.cosine=1",
    ),
    ("algorithm.credit=clip", *SCORED),
    ("algorithm.credit=clip", "algorithm.credit_eta=0.8", *SCORED),
    ("algorithm.credit=clip", "process.prm=length"),
    (*VALUE, "algorithm.credit=sum", *SCORED),
    (*VALUE, "algorithm.credit=sum", *SCORED, "process.weight=2"),
    ("algorithm.method=gdpo", "reward.weights.cosine=1"),  # it is for several rewards
    ("sampling.temperature=0.5",),
    ("sampling.top_k=3",),
    ("sampling.top_p=0.3",),
    ("sampling.min_p=0.5",),
    ("sampling.stop=[e]",),
    ("sampling.max_new_tokens=4",),
    ("reward.weights.cosine=1",),
    ("reward.weights.cosine=1", "reward.params={cosine = {max_length = 20}}"),
    ("reward.params.random={seed = 1}",),
]


def test_another_sampling_seed_draws_other_samples_of_the_same_problems(train, sft_run):
    start = (*SHORT, f"model.path={sft_run}")
    one, other = (
        lines(
            train(train_grpo, f"seed-{n}", *start, f"grpo.sampling_seed={n}"),
            "rollouts.jsonl",
        )
        for n in (0, 1)
    )
    assert [r["question"] for r in one] == [r["question"] for r in other]
    assert [r["tokens"] for r in one] != [r["tokens"] for r in other]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "kinds"),
    [(train_sft, SFT_KEYS), (train_grpo, GRPO_KEYS)],
    ids=["sft", "grpo"],
)
def test_no_key_is_ignored(train, sft_run, script, kinds):
    """Each set of words leads to weights of its own."""
    start = () if script is train_sft else (f"model.path={sft_run}",)
    results = {}
    for number, words in enumerate([(), *kinds]):
        run = train(script, str(number), *SHORT, *start, *words)
        results.setdefault(weights(run, 2)["model.safetensors"], []).append(words)
    ignored = [same for same in results.values() if len(same) > 1]
    assert not ignored, "\n".join(map(str, ignored))


HARMLESS = [
    ("model.sharded=true",),  # one rank has nothing to share
    ("optim.device=cpu",),  # where the model is
    ("model.gradient_checkpointing=true",),
    (
        "algorithm.ratio=off",
        "algorithm.clip=off",
    ),  # with one update per rollout it is the gradient of a ratio of 1
    ("algorithm.keep_groups=uneven",),  # random rewards are
    SCORED,  # without credit steps are only watched
]


def test_what_changes_nothing(train, sft_run):
    """To the last bit. What only changes anything elsewhere (k3+, correction_high) is in
    test_policy_step.
    """
    start = (
        *SHORT,
        f"model.path={sft_run}",
        "run.seed=5",
    )  # a seed of which no group is flat
    plain = weights(train(train_grpo, "plain", *start), 2)
    for number, words in enumerate(HARMLESS):
        assert weights(train(train_grpo, str(number), *start, *words), 2) == plain, (
            words
        )


def test_without_its_kl_a_run_needs_no_starting_model(train, sft_run):
    start = (*SHORT, f"model.path={sft_run}", "run.seed=5", "grpo.logged_groups=1")
    free = (*start, "algorithm.kl_coef=0")
    measured, bare = (
        train(train_grpo, f"kl-{value}", *free, f"grpo.measure_kl={value}")
        for value in ("true", "false")
    )
    assert weights(bare, 2) == weights(measured, 2)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert "kl" in lines(measured, name)[-2] and "kl" not in lines(bare, name)[-2]


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm.kl_coef=0.1",),
        ("algorithm.method=dpo",),
        (*VALUE, "algorithm.kl_coef=0"),
        ("algorithm.method=opd", "teacher.path=start"),
    ],
    ids=["kl", "dpo", "value", "teacher"],
)
def test_a_loss_that_needs_the_starting_model_has_it(train, sft_run, words):
    start = (*SHORT, "run.steps=1", f"model.path={sft_run}", "grpo.measure_kl=false")
    assert "kl" in lines(train(train_grpo, "kept", *start, *words))[1]


@pytest.mark.parametrize("script", [train_sft, train_grpo], ids=["sft", "grpo"])
def test_watching_changes_nothing(train, sft_run, script):
    start = (
        () if script is train_sft else (f"model.path={sft_run}", "grpo.logged_groups=0")
    )
    watched = (
        "run.eval_every=1",
        "run.save_every=1",
        "evaluation.seed=3",
        "evaluation.by=difficulty",
        "heldout.limit=4",
    )
    plain = train(script, "plain", *SHORT, *start)
    watched = train(script, "watched", *SHORT, *start, *watched)
    assert weights(plain, 2) == weights(watched, 2)


def test_rewards_are_made_as_the_config_says(sft_run, tmp_path, monkeypatch):
    def note(weights, params, lenient, reasoning_ends):
        raise ValueError(f"{weights} {params} {lenient}")

    monkeypatch.setattr("nanomath.training.build.RewardSet", note)
    words = (
        "reward.weights={cosine = 2}",
        "reward.params={cosine = {max_length = 9}}",
        "reward.lenient=true",
    )
    with pytest.raises(
        ValueError,
        match=r"^\{'cosine': 2.0\} \{'cosine': \{'max_length': 9.0\}\} True$",
    ):
        train_grpo.main(
            [*GRPO, f"run.directory={tmp_path}", f"model.path={sft_run}", *words]
        )


# --- stopping and resuming -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "dtype"),
    [
        (train_sft, "float32"),
        (train_grpo, "bfloat16"),
        pytest.param(train_sft, "bfloat16", marks=pytest.mark.slow),
        pytest.param(train_grpo, "float32", marks=pytest.mark.slow),
    ],
    ids=["sft-float32", "grpo-bfloat16", "sft-bfloat16", "grpo-float32"],
)
def test_a_resumed_run_is_the_unbroken_one(train, sft_run, script, dtype):
    words = [
        f"model.dtype={dtype}",
        "run.eval_every=1",
        "heldout.limit=2",
        "evaluation.samples=1",
    ]
    if script is train_grpo:
        words += [
            f"model.path={sft_run}",
            "algorithm.epochs=2",
            "algorithm.minibatches=2",
        ]
    else:
        words += ["sft.neftune_alpha=5"]
    whole = train(script, "whole", "run.steps=4", *words)
    train(script, "parts", "run.steps=2", *words)
    parts = train(script, "parts", "run.steps=4", "--resume", *words)
    assert weights(parts, 4) == weights(whole, 4)
    assert lines(parts) == lines(whole)
    if script is train_grpo:
        assert lines(parts, "rollouts.jsonl") == lines(whole, "rollouts.jsonl")


# --- adapters --------------------------------------------------------------------------------

LORA = ("lora.rank=4", "optim.lr=0.02", "heldout.limit=2", "evaluation.samples=1")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("script", [train_sft, train_grpo], ids=["sft", "grpo"])
def test_a_resumed_run_of_adapters_is_the_unbroken_one(train, sft_run, script, dtype):
    words = [*LORA, f"model.path={sft_run}", f"model.dtype={dtype}", "run.eval_every=1"]
    if script is train_grpo:
        words += ["algorithm.epochs=2", "algorithm.minibatches=2"]
    whole = train(script, "whole", "run.steps=4", *words)
    train(script, "parts", "run.steps=2", *words)
    parts = train(script, "parts", "run.steps=4", "--resume", *words)
    assert weights(parts, 4) == weights(whole, 4) and lines(parts) == lines(whole)
    assert set(weights(parts, 4)) == {
        "adapter_model.safetensors",
        "trainer.safetensors",
    }
    assert (
        weights(parts, 2)["adapter_model.safetensors"]
        != weights(parts, 4)["adapter_model.safetensors"]
    )


def test_adapters_learn_and_leave_the_model_as_it_was(train, sft_run, tmp_path):
    before = {path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()}
    start = (*LORA, "run.steps=12", f"model.path={sft_run}")
    metrics = lines(train(train_sft, "sft", *start))
    assert metrics[-1]["heldout/loss"] < metrics[0]["heldout/loss"] - 0.3
    tuned = f"model.path={tmp_path}/sft"
    assert (
        train_sft.main(
            [
                *SFT,
                *LORA,
                tuned,
                f"run.directory={tmp_path}",
                "run.name=on",
                "run.steps=1",
            ]
        )
        == 0
    )  # on from the merged model, with adapters of its own
    assert lines(tmp_path / "on")[0]["heldout/loss"] == pytest.approx(
        metrics[-1]["heldout/loss"], abs=1e-5
    )
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_of_adapters_is_a_model_and_merges_into_one(
    train, sft_run, tmp_path, capsys
):
    run = train(train_sft, "sft", *LORA, "run.steps=2", f"model.path={sft_run}")
    quick = ("problems.limit=2", "evaluation.samples=1", "sampling.max_new_tokens=4")
    assert nanomath_main(["eval", str(run), "world", "model.device=cpu", *quick]) == 0
    assert nanomath_main(["merge", str(run), str(tmp_path / "merged")]) == 0
    assert f"{tmp_path}/merged holds the weights of {run}" in capsys.readouterr().out
    ours, merged, base = map(load_model, (run, tmp_path / "merged", sft_run))
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, ours.get_parameter(name))
    assert not torch.equal(
        merged.model.layers[0].mlp.down_proj.weight,
        base.model.layers[0].mlp.down_proj.weight,
    )
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="float32"
    )
    tokens = torch.arange(12)[None] + 300
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-4
        )


def test_the_reference_of_adapters_is_the_starting_model(train, sft_run):
    """Which is loaded once more where it is to be elsewhere: to the same bits."""
    words = (*LORA, "run.steps=3", f"model.path={sft_run}", "algorithm.kl_coef=0.5")
    here = train(train_grpo, "here", *words)
    elsewhere = train(train_grpo, "elsewhere", *words, "grpo.reference_device=cpu")
    assert weights(here, 3) == weights(elsewhere, 3) and lines(here) == lines(elsewhere)
    steps = [line for line in lines(here) if "kl" in line]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[2]["kl"] > 1e-3
    assert all(line["gap_max"] < 1e-4 for line in steps)


@pytest.mark.slow
def test_no_key_of_adapters_is_ignored(train, sft_run):
    kinds = [
        (),
        ("lora.rank=3",),
        ("lora.alpha=8",),
        ("lora.targets=q_proj",),
        ("lora.targets=[q_proj,down_proj]",),
        ("run.seed=1",),
    ]
    found = {
        weights(
            train(
                train_sft, str(n), *LORA, f"model.path={sft_run}", "run.steps=1", *kind
            ),
            1,
        )["adapter_model.safetensors"]
        for n, kind in enumerate(kinds)
    }
    assert len(found) == len(kinds)


@pytest.mark.parametrize(
    ("run", "words", "said"),
    [
        ("adapted", ["lora.rank=5"], "has shape [4, 32], expected [5, 32]"),
        ("adapted", ["lora.alpha=7"], "lora_alpha is 32, but the run has 7"),
        (
            "adapted",
            ["lora.targets=q_proj"],
            "holds base_model.model.model.layers.0.mlp.down_",
        ),
        (
            "adapted",
            ["lora.rank=0"],
            "the checkpoint's optimizer state lacks step.model.",
        ),
        ("plain", [], "no adapter_config.json in"),
    ],
)
def test_a_run_goes_on_with_the_adapters_it_had(
    train, sft_run, tmp_path, capsys, run, words, said
):
    start = [*LORA, f"model.path={sft_run}", "run.steps=1"]
    train(train_sft, run, *start, *(["lora.rank=0"] if run == "plain" else []))
    with pytest.raises(SystemExit) as exited:
        again = [*SFT, *start, f"run.directory={tmp_path}", f"run.name={run}", *words]
        run_main(train_sft.main, [*again, "run.steps=2", "--resume"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exited.value.code == 2 and error.startswith("error: ") and said in error


# --- every method ----------------------------------------------------------------------------


# Those with parts of their own; the others differ in formulas, which have tests of their own.
SPECIAL = ("grpo", "dapo", "gspo", "ppo", "process_grpo", "kl_cov")


@pytest.mark.parametrize(
    "method",
    [m if m in SPECIAL else pytest.param(m, marks=pytest.mark.slow) for m in PRESETS],
)
def test_every_method_trains_and_resumes(train, sft_run, method):
    """To the same bits: with its value model (ppo), with groups that were sampled again
    (dapo), within an epoch.
    """
    half, steps = (2, 4) if method in ("dapo", "gspo", "ppo") else (1, 2)
    words = [
        f"model.path={sft_run}",
        f"algorithm.method={method}",
        "heldout.limit=1",
        "evaluation.samples=1",
    ]
    words += STEPS.get(method, ())
    words += [
        "sampling.max_new_tokens=6",
        "sampling.stop=[e]",
        f"run.eval_every={half}",
    ]
    whole = train(train_grpo, "whole", f"run.steps={steps}", *words)
    train(train_grpo, "parts", f"run.steps={half}", *words)
    parts = train(train_grpo, "parts", f"run.steps={steps}", "--resume", *words)
    assert weights(parts, steps) == weights(whole, steps) and lines(parts) == lines(
        whole
    )
    assert lines(parts, "rollouts.jsonl") == lines(whole, "rollouts.jsonl")
    metrics = [line for line in lines(whole) if "reward" in line]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert all(line["grad_norm"] > 0 for line in metrics)
    assert ("explained_variance" in metrics[0]) == (method == "ppo")
    if method == "dapo":  # nothing is ever right: all refills are drawn
        assert all(
            (line["groups"], line["groups_sampled"]) == (3, 12) for line in metrics
        )


def test_refills_bring_other_problems_and_no_sample_twice(train, sft_run):
    """The rollouts of step s and refill k are number 3 s + k of one sequence; what was left
    out is sampled no more.
    """
    words = (
        "algorithm.keep_groups=mixed",
        "algorithm.refills=2",
        "heldout.limit=1",
        "run.steps=2",
        "optim.lr=1e-12",
    )
    run = train(
        train_grpo, "refilled", f"model.path={sft_run}", "grpo.logged_groups=3", *words
    )
    plain = train(
        train_grpo,
        "plain",
        f"model.path={sft_run}",
        "grpo.logged_groups=3",
        "run.steps=6",
        *words[2:3],
        *words[4:],
    )
    drawn = {step: [] for step in range(1, 7)}
    for record in lines(plain, "rollouts.jsonl"):
        drawn[record["step"]].append((record["problem"], record["tokens"]))
    kept = {step: [] for step in (1, 2)}
    for record in lines(run, "rollouts.jsonl"):
        kept[record["step"]].append((record["problem"], record["tokens"]))
    assert (kept[1], kept[2]) == (
        drawn[3],
        drawn[6],
    )  # the last refill's, as none was worth keeping
    assert len({problem for groups in drawn.values() for problem, _ in groups}) == 18


def test_resuming_forgets_what_was_logged_after_the_checkpoint(
    train, sft_run, tmp_path
):
    """As after a crash: lines of steps that were not saved, and the last one cut short."""
    shutil.copytree(sft_run, tmp_path / "run")
    for step in 4, 6:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}")
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')
    often = ("run.eval_every=2", "run.save_every=2", "run.keep_last=0")
    run = train(train_sft, "run", "run.steps=6", *often, "--resume")
    assert lines(run) == lines(sft_run) and weights(run, 6) == weights(sft_run, 6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            (),
            "already holds a run: add --resume to go on with it, or choose another run.name",
        ),
        (("--resume",), "has done its 6 steps: a larger run.steps goes on"),
    ],
    ids=["again", "resume"],
)
def test_a_run_is_never_written_over(sft_run, capsys, words, said):
    before = {path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exited:
        run_main(
            train_sft.main,
            [
                *SFT,
                f"run.directory={sft_run.parent}",
                "run.name=base",
                "run.steps=6",
                *words,
            ],
        )
    output = capsys.readouterr()
    assert exited.value.code == 2 and output.out == ""
    assert output.err == f"error: {sft_run} {said}\n"
    assert before == {
        path: path.read_bytes() for path in sft_run.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    "damage", ["trainer.safetensors", "model.safetensors", "trainer.json"]
)
def test_a_damaged_checkpoint_is_named(sft_run, tmp_path, capsys, damage):
    shutil.copytree(sft_run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-6" / damage
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SystemExit) as exited:
        run_main(
            train_sft.main,
            [*SFT, f"run.directory={tmp_path}", "run.steps=8", "--resume"],
        )
    error = capsys.readouterr().err
    assert (
        exited.value.code == 2 and error.count("\n") == 1 and str(file.parent) in error
    )


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(
    tmp_path, capsys
):
    words = (
        *SFT,
        f"run.directory={tmp_path}",
        "optim.lr=1e15",
        "run.steps=9",
        "run.save_every=1",
        "heldout.limit=1",
    )
    with pytest.raises(SystemExit) as exited:
        run_main(train_sft.main, list(words))
    error = capsys.readouterr().err.splitlines()[-1]
    assert exited.value.code == 1
    assert (
        error.startswith("error: step ")
        and "the checkpoints written before it are intact" in error
    )
    assert load_model(tmp_path / "run").config.hidden_size == 32


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_stops(tmp_path, capsys, number):
    script = train_sft if number == signal.SIGINT else train_grpo
    words = [f"run.directory={tmp_path}", "run.name=run", "heldout.limit=1", *SFT]
    if script is train_grpo:
        base = [*words, "run.name=base", "run.steps=1"]
        assert train_sft.main(base) == 0
        words = [
            *GRPO,
            f"run.directory={tmp_path}",
            "run.name=run",
            "heldout.limit=1",
            f"model.path={tmp_path}/base",
        ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script.__file__, *words, "run.steps=1000000"]
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(
        lambda: (
            (tmp_path / "run/metrics.jsonl").exists()
            and len(lines(tmp_path / "run")) > 2
        ),
        process,
    )
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert process.returncode == 1 and out == "" and "Traceback" not in err
    assert (
        err.splitlines()[-1]
        == f"stopped after step {step}, which is saved: the same command with --resume goes on"
    )
    assert lines(tmp_path / "run")[-1]["step"] == step

    capsys.readouterr()
    assert script.main([*words, f"run.steps={step + 1}", "--resume"]) == 0
    assert f"checkpoints/step-{step + 1}" in capsys.readouterr().out


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until the condition holds; an error if the process ends before or a minute passes."""
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the run did not start within a minute")


def test_the_summary_says_where_everything_is(train, capsys):
    run = train(train_sft, "run", "run.steps=1")
    out = capsys.readouterr().out
    first, last = (line for line in lines(run) if "heldout/pass@1" in line)
    assert (
        f"before {100 * first['heldout/pass@1']:5.1f}%" in out
        and f"after  {100 * last['heldout/pass@1']:5.1f}%" in out
    )
    assert (
        f"{run}/checkpoints/step-1" in out and (run / "checkpoints" / "step-1").is_dir()
    )
    assert f"python -m nanomath eval {run} world" in out
