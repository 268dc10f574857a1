"""What users get wrong: exit code 2, one line that says what and where, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import train_grpo
import train_sft
from nanomath import Sampler, load_model, load_tokenizer, save_model
from nanomath import settings as sections
from nanomath.__main__ import main
from nanomath.models.lora import LoRA
from nanomath.training.build import new_model

GOOD = {
    "question": "What is 1 + 1?",
    "answer": "2",
    "solution": r"1 + 1 = 2, so \boxed{2}.",
}
WORKED = "Tom has 3 boxes with 4 pens each. 3 * 4 = 12. He gives 2 of them away, so 10 pens remain."
CHOSEN = {"completions": [{"text": "So.", "rating": 1}], "chosen_completion": 3}
TINY = (
    *(
        "model.new.hidden_size=32",
        "model.new.layers=1",
        "model.new.heads=2",
        "model.new.kv_heads=1",
        "model.new.intermediate_size=64",
    ),
    *(
        "train.limit=8",
        "heldout.limit=4",
        "train.world.difficulty=1,1",
        "heldout.world.difficulty=1,1",
        "run.steps=2",
    ),
    *("sampling.max_new_tokens=4", "evaluation.samples=2", "model.device=cpu"),
)

FILES = {
    "broken.jsonl": json.dumps(GOOD) + '\n{"question": "What is\n',
    "unanswered.jsonl": json.dumps(GOOD)
    + "\n"
    + json.dumps({"question": "Why?", "answer": " "})
    + "\n",
    "unlabelled.jsonl": json.dumps(GOOD)
    + "\n"
    + json.dumps({"question": "Why?"})
    + "\n",
    "unsolved.jsonl": json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n",
    "empty.jsonl": "\n",
    "long.jsonl": json.dumps({**GOOD, "question": "one two three " * 200}) + "\n",
    "wordy.jsonl": json.dumps({**GOOD, "solution": "one two three " * 200}) + "\n",
    "lengthy.jsonl": json.dumps(
        {**GOOD, "solution": "one two three " * 60 + "\n\nFour."}
    )
    + "\n",
    "half.jsonl": json.dumps(GOOD)
    + "\n"
    + json.dumps({**GOOD, "question": "What is \ud800?"})
    + "\n",
    "told.jsonl": json.dumps(GOOD)
    + "\n"
    + json.dumps({**GOOD, "answer": WORKED})
    + "\n",
    "twice.csv": "question,answer,answer\nWhy?,1,2\n",
    "deep.json": "[" * 100_000,
    "labels.jsonl": json.dumps(
        {"prompt": "Why?", "completions": ["So."], "labels": ["?"]}
    )
    + "\n",
    "chosen.jsonl": json.dumps(
        {"question": {"problem": "Why?"}, "label": {"steps": [CHOSEN]}}
    )
    + "\n",
    "mixed.jsonl": json.dumps(GOOD)
    + "\n"
    + json.dumps({**GOOD, "question": "one two three " * 200})
    + "\n",
    "good.jsonl": json.dumps(GOOD) + "\n",
    "list.txt": "What is 1 + 1?\n",
    "misspelt.toml": "[optim]\nlr = 1e-3\nweigth_decay = 0.1\n",
    "mistyped.toml": '[run]\nname = "x"\n\n[optim]\nlr = "fast"\n',
    "torn.toml": "[optim\nlr = 1\n",
    "contrary.toml": '[algorithm]\nmethod = "dapo"\nkeep_groups = "all"\n',
}


@pytest.fixture
def place(tmp_path, model_directory) -> Path:
    """A directory with broken files and broken models; the good model is at models/good."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    models = {
        name: tmp_path / "models" / name
        for name in ("good", "headless", "truncated", "unreadable", "short")
    }
    for copy in models.values():
        shutil.copytree(model_directory, copy)
    (models["headless"] / "config.json").unlink()
    for name, base in ("baseless", "/no/such"), ("nameless", None):
        LoRA(load_model(models["good"]), 2, 4.0, ["q_proj"], base=base).save(
            tmp_path / "models" / name
        )
    weights = models["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (models["unreadable"] / "tokenizer.json").write_text("{}")
    tokenizer = load_tokenizer(models["short"])
    shape = sections.NewModel(
        hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=64
    )
    save_model(
        new_model(shape, tokenizer.vocab_size - 5, seed=0), tokenizer, models["short"]
    )
    return tmp_path


def spelt(value: object) -> str | None:
    """A case is called by its command line."""
    if isinstance(value, list):
        return " ".join(value)[:60].strip() or "nothing"
    return getattr(value, "__name__", "")


def contents(place: Path) -> list[tuple[Path, bytes]]:
    return [
        (path, path.read_bytes() if path.is_file() else b"")
        for path in sorted(place.rglob("*"))
    ]


def refuse(call, place: Path, command, *words: object) -> str:
    """The one line that the command says; everything on disk is as it was."""
    before = contents(place)
    outcome = call(command, *words)
    assert outcome.code == 2 and outcome.out == ""
    assert (
        outcome.err.startswith("error: ")
        and outcome.err.endswith("\n")
        and outcome.err.count("\n") == 1
    )
    assert "Traceback" not in outcome.err and "Errno" not in outcome.err
    assert contents(place) == before
    return outcome.err


COMMANDS = [
    (["evla"], "unknown command 'evla': expected one of eval, sample, "),
    (["--resume"], "unknown command '--resume'"),
    (
        ["eval"],
        "eval needs a model and a problem set: python -m nanomath eval MODEL DATA",
    ),
    (["eval", "models/good"], "eval needs a model and a problem set"),
    (["eval", "", "world"], "eval needs a model and a problem set"),
    (
        ["eval", "models/good", "world", "--by=difficulty"],
        "unknown flag '--by=difficulty'; a key is set without dashes",
    ),
    (
        ["eval", "models/good", "world", "missing.toml"],
        "config file not found: missing.toml",
    ),
    (["eval", "models/good", "world", "torn.toml"], "torn.toml: not valid TOML"),
    (
        ["eval", "models/good", "world", "a.toml", "b.toml"],
        "the config file is a.toml already",
    ),
    (
        ["eval", "models/good", "no/such/file.jsonl"],
        "problem set not found: no/such/file.jsonl",
    ),
    (["eval", "models/good", "broken.jsonl"], "broken.jsonl:2: not valid JSON"),
    (
        ["eval", "models/good", "unanswered.jsonl"],
        "unanswered.jsonl:2: the answer is empty",
    ),
    (
        ["eval", "models/good", "unlabelled.jsonl"],
        "unlabelled.jsonl:2: no answer field",
    ),
    (["eval", "models/good", "empty.jsonl"], "empty.jsonl: no problems"),
    (
        ["eval", "models/good", "good.jsonl", "problems.file.skip=1"],
        "good.jsonl: no problems after the first 1",
    ),
    (["eval", "models/good", "list.txt"], "list.txt: unknown format; expected .jsonl"),
    (
        ["eval", "models/good", "long.jsonl"],
        "problem long-0 has 1202 tokens: the model's context holds 192; max_tokens of a problem "
        "set leaves out what is",
    ),
    (
        ["eval", "models/good", "long.jsonl", "problems.max_tokens=100"],
        "max_tokens = 100 leaves no problem: the short",
    ),
    (
        ["eval", "models/good", "half.jsonl"],
        "half.jsonl:2: half a surrogate pair",
    ),
    (
        ["eval", "models/good", "told.jsonl"],
        "told.jsonl:2: field 'answer' is a worked solution without a marked",
    ),
    (
        ["eval", "models/good", "twice.csv"],
        "twice.csv:1: the field 'answer' is there twice",
    ),
    (["eval", "models/good", "deep.json"], "deep.json: JSON that is nested too deeply"),
    (
        ["eval", "models/good", "good.jsonl", "prompt.template={question} {levle}"],
        "the template '{question} {levle}' has {levle}, but problem 'good-0' no such field: it "
        "has question, answer,",
    ),
    (
        ["eval", "models/good", "good.jsonl", "problems.file.answer=meta.gold"],
        "no answer field (expected meta.gold)",
    ),
    (
        ["prm", "eval", "length", "labels.jsonl"],
        "labels.jsonl:1: the label '?' is neither a number from 0 to 1",
    ),
    (
        ["prm", "eval", "length", "chosen.jsonl"],
        "chosen.jsonl:1: chosen_completion = 3 must be a whole number from 0 to 0",
    ),
    (
        ["eval", "models/good", "world", "problems.world.families=[]"],
        "families is empty",
    ),
    (
        ["eval", "models/good", "world", "problems.world.families=geometry"],
        "problems.world.families: expected one of maths, ",
    ),
    (["eval", "models/good", "world", "problems.split=tets"], "unknown split 'tets'"),
    (
        ["eval", "models/good", "world", "problems.world.difficulty=3,1"],
        "expected [least, greatest]",
    ),
    (
        ["eval", "models/good", "world", "evaluation.by=dificulty"],
        "metadata key 'dificulty'; there are: ",
    ),
    (
        ["eval", "models/good", "world", "evaluation.samples=0"],
        "evaluation.samples: expected a number at least 1, got 0",
    ),
    (
        ["eval", "models/good", "world", "evaluation.k=1,8"],
        "pass@8 needs at least 8 samples",
    ),
    (
        ["eval", "models/good", "world", "sampling.temperature=-1"],
        "sampling.temperature: expected a number at least 0",
    ),
    (
        ["eval", "models/good", "world", "sampling.temperature=nan"],
        "sampling.temperature: expected a number at least 0",
    ),
    (
        ["eval", "models/good", "world", "sampling.temprature=1"],
        "unknown key; did you mean sampling.temperature?",
    ),
    (
        ["eval", "models/good", "world", "prompt.template=hello"],
        "must contain {question}",
    ),
    (
        ["eval", "models/good", "world", "model.device=tpu9"],
        "device 'tpu9' is not to be had here",
    ),
    (
        ["eval", "models/good", "world", "model.device=cuda:99"],
        "device 'cuda:99' is not to be had here",
    ),
    (["eval", "models/headless", "world"], "no config.json in models/headless"),
    (
        ["eval", "models/truncated", "world"],
        "model.safetensors is not a readable safetensors file",
    ),
    (
        ["eval", "models/unreadable", "world"],
        "tokenizer.json is not a readable tokenizer",
    ),
    (
        ["eval", "models/short", "world"],
        "tokenizer does not match the model's vocabulary",
    ),
    (
        ["eval", "good.jsonl", "world"],
        "good.jsonl is a file: name the model's directory",
    ),
    (["eval", "no/such/model", "world"], "no such model directory: no/such/model"),
    (
        ["sample"],
        'sample needs a model and a question: python -m nanomath sample MODEL "QUESTION"',
    ),
    (["sample", "models/good"], "sample needs a model and a question"),
    (["sample", "models/good", " "], "the question is empty"),
    (["sample", "", "How many?"], "sample needs a model and a question"),
    (
        ["sample", "models/good", "one two three " * 200],
        "the model's context holds 192",
    ),
    (["sample", "models/good", "How many?", "--greedy"], "unknown flag '--greedy'"),
    (
        ["eval", "models/baseless", "world"],
        "is an adapter, and its base is not there: no such",
    ),
    (
        ["eval", "models/nameless", "world"],
        "names no base_model_name_or_path: set model.base",
    ),
    (["merge", "models/good"], "merge needs a model and a new directory"),
    (
        ["merge", "models/good", "models/short"],
        "models/short exists: name a new directory",
    ),
    (
        ["merge", "models/baseless", "out"],
        "is an adapter, and its base is not there: no such",
    ),
    (["config", "--all"], "config takes no arguments, got '--all'"),
]


@pytest.mark.parametrize(("words", "said"), COMMANDS, ids=spelt)
def test_commands(call, place, words, said):
    assert said in refuse(call, place, main, *words)


def test_problems_that_are_too_long_can_be_left_out(call, place):
    """In eval by the prompt, in fine-tuning with the solution; how many is said once for each
    set.
    """
    words = [
        "problems.max_tokens=100",
        "sampling.max_new_tokens=4",
        "evaluation.samples=1",
        "model.device=cpu",
    ]
    outcome = call(main, "eval", "models/good", "mixed.jsonl", *words)
    said = "1 of 2 problems have more than max_tokens = 100 tokens and are left out"
    assert (
        outcome.code == 0
        and outcome.err.count(said) == 1
        and "mixed.jsonl: 1 problems x 1 " in outcome.out
    )
    sets = (
        "train.source=mixed.jsonl",
        "heldout.source=mixed.jsonl",
        "train.max_tokens=40",
        "heldout.max_tokens=100",
    )
    outcome = call(train_sft.main, *TINY, *sets, "run.steps=1")
    assert outcome.code == 0 and outcome.err.count("left out") == 2
    assert outcome.err.count(said) == outcome.err.count(said.replace("100", "40")) == 1


SCRIPTS = [
    (train_sft, ["missing.toml"], "config file not found: missing.toml"),
    (
        train_sft,
        ["misspelt.toml"],
        "misspelt.toml:3: optim.weigth_decay: unknown key; did you mean optim.weight_decay?",
    ),
    (
        train_sft,
        ["mistyped.toml"],
        "mistyped.toml:5: optim.lr: expected a number, got 'fast'",
    ),
    (train_sft, ["optim.lr"], "config file not found: optim.lr"),
    (train_sft, ["--resume"], "runs/run holds no run to resume"),
    (train_sft, ["--resmue"], "unknown flag '--resmue'; did you mean --resume?"),
    (train_sft, ["run.steps=0"], "run.steps: expected a number at least 1, got 0"),
    (train_sft, ["lora.rank=-1"], "lora.rank: expected a number at least 0, got -1"),
    (
        train_sft,
        ["lora.targets=[q_proj,w_proj]"],
        "lora.targets: expected one of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj, got 'w_proj'",
    ),
    (train_sft, ["lora.targets=[]"], "[lora] targets is empty"),
    (train_sft, ["lora.rank=4"], "lora.rank = 4, but model.path is empty"),
    (
        train_sft,
        ["lora.rank=4", "model.path=models/good", "model.sharded=true"],
        "lora.rank = 4, but model.sharded: adapters are only trained on whole weights",
    ),
    (
        train_grpo,
        ["lora.rank=4", "model.path=models/good", "sampling.exact=true"],
        "lora.rank = 4, but sampling.exact: the sampler runs merged weights",
    ),
    (train_sft, ["run.steps=2.5"], "run.steps: expected an integer, got 2.5"),
    (
        train_sft,
        ["model.new.heads=3"],
        "[model.new] 3 heads do not divide hidden_size = 32",
    ),
    (
        train_sft,
        ["model.new.heads=4", "model.new.kv_heads=3"],
        "4 query heads cannot share 3 key/value heads",
    ),
    (
        train_sft,
        ["model.dtype=int8"],
        "model.dtype: expected one of auto, float32, bfloat16, float16, got 'int8'",
    ),
    (train_sft, ["model.device=gpu"], "device 'gpu' is not to be had here"),
    (
        train_sft,
        ["model.path=models/truncated"],
        "models/truncated/model.safetensors is not a readable safetensors",
    ),
    (
        train_sft,
        ["model.path=models/short"],
        "tokenizer does not match the model's vocabulary",
    ),
    (train_sft, ["train.source=broken.jsonl"], "broken.jsonl:2: not valid JSON"),
    (
        train_sft,
        ["train.source=unsolved.jsonl"],
        "has no solution, which the template '{solution}' needs",
    ),
    (train_sft, ["train.source=wordy.jsonl"], "the model's context holds 512"),
    (train_sft, ["heldout.source=empty.jsonl"], "empty.jsonl: no problems"),
    (train_sft, ["heldout.source=long.jsonl"], "the model's context holds 512"),
    (
        train_sft,
        ["heldout.source=good.jsonl", "heldout.file.skip=1"],
        "good.jsonl: no problems after the first 1",
    ),
    (
        train_sft,
        ["evaluation.k=4"],
        "pass@4 needs at least 4 samples of each problem, not 2",
    ),
    (
        train_sft,
        ["evaluation.by=level"],
        "no problem has the metadata key 'level'; there are: ",
    ),
    (train_grpo, [], "model.path is empty: reinforcement needs a model to start from"),
    (train_grpo, ["model.path=models/headless"], "no config.json in models/headless"),
    (
        train_grpo,
        ["model.path=models/good", "sampling.temperature=0"],
        "sampling.temperature is 0: greedy samples",
    ),
    (
        train_grpo,
        ["model.path=models/good", "grpo.group_size=0"],
        "grpo.group_size: expected a number at least 1, got 0",
    ),
    (
        train_grpo,
        ["model.path=models/good", "grpo.group_size=1"],
        "grpo.group_size = 1, but algorithm.baseline = 'group' compares the samples of a problem",
    ),
    (
        train_grpo,
        ["model.path=models/good", "grpo.group_size=1", "algorithm.method=rloo"],
        "grpo.group_size = 1, but algorithm.baseline = 'leave_one_out' compares the samples of a "
        "problem",
    ),
    (
        train_grpo,
        ["contrary.toml", "model.path=models/good"],
        "contrary.toml and command line: [algorithm] refills replace dropped groups, but "
        'keep_groups = "all"',
    ),
    (
        train_grpo,
        ["model.path=models/good", "reward.weights.acuracy=1"],
        "unknown reward: 'acuracy'; did you mean accuracy?",
    ),
    (
        train_grpo,
        [
            "model.path=models/good",
            "reward.weights.cosine=1",
            "reward.params={cosine = {width = 1}}",
        ],
        "unknown parameter of the reward 'cosine'",
    ),
    (
        train_grpo,
        ["model.path=models/good", "grpo.reference_device=cuda:99"],
        "device 'cuda:99' is not to be had here",
    ),
    (
        train_grpo,
        ["model.path=models/good", "algorithm.old_logprobs=both"],
        "algorithm.old_logprobs: expected one of trainer, sampler, got 'both'",
    ),
    (
        train_grpo,
        ["model.path=models/good", "heldout.source=no/such/file.json"],
        "problem set not found",
    ),
    (
        train_grpo,
        ["model.path=models/good", "evaluation.k=4"],
        "pass@4 needs at least 4 samples",
    ),
    (
        train_grpo,
        ["model.path=models/good", "hints.chooser=oracle"],
        "hints.chooser: expected one of off, ladder, schedule, controller, learned, got 'oracle'",
    ),
    (
        train_grpo,
        ["model.path=models/good", "hints.chooser=ladder", "hints.levels=[0.5,1.5]"],
        "hints.levels: expected a number at least 0 and at most 1, got 1.5",
    ),
    (
        train_grpo,
        ["model.path=models/good", "hints.chooser=controller", "hints.most=-0.5"],
        "hints.most: expected a number at least 0 and at most 1, got -0.5",
    ),
    (
        train_grpo,
        ["model.path=models/good", "hints.chooser=controller", "hints.levels=[0.5]"],
        "[hints] levels are for the other choosers: the controller goes from 0 to `most`",
    ),
    (
        train_grpo,
        ["model.path=models/good", "hints.chooser=learned", "hints.levels=[0.5]"],
        "[hints] levels has one entry: the upper policy has nothing to choose",
    ),
    (
        train_grpo,
        ["model.path=models/good", "hints.chooser=ladder", "hints.template=Look!"],
        "[hints] template is 'Look!': it must contain {hint}",
    ),
    (
        train_grpo,
        ["model.path=models/good", "hints.chooser=ladder", "hints.score=bare"],
        '[hints] score = "bare" with place = "assistant": what follows a beginning means nothing',
    ),
    (
        train_grpo,
        [
            "model.path=models/good",
            "hints.chooser=ladder",
            "hints.score=bare",
            "hints.place=user",
        ],
        'hints.score = "bare" trains pi(y|q) / pi(y|q,h), whose lower part only the sampler knows: '
        'set algorithm.old_logprobs = "sampler"',
    ),
    (
        train_grpo,
        [
            "model.path=models/good",
            "hints.chooser=ladder",
            "hints.score=bare",
            "hints.place=user",
            "algorithm.method=rloo",
            "algorithm.ratio=token",
            "algorithm.old_logprobs=sampler",
        ],
        'algorithm.kl_in = "reward" needs samples of the policy, but of hints.score = "bare" they',
    ),
    (
        train_grpo,
        [
            "model.path=models/good",
            "hints.chooser=ladder",
            "train.source=unsolved.jsonl",
        ],
        "hints.chooser = 'ladder', but problem 'unsolved-0' has no solution to take a hint from",
    ),
    (
        train_grpo,
        ["model.path=models/good", "hints.chooser=schedule", "train.source=good.jsonl"],
        "hints.chooser = 'schedule', but no problem has a solution of two steps (process.steps = "
        "'blank_line') that could be begun",
    ),
    (
        train_grpo,
        [
            "model.path=models/good",
            "hints.chooser=ladder",
            "train.source=lengthy.jsonl",
        ],
        "with a hint of level 0.75 has a prompt of 3",
    ),
    (
        train_grpo,
        [
            "model.path=models/good",
            "hints.chooser=ladder",
            "hints.place=user",
            "train.source=lengthy.jsonl",
        ],
        "with a hint of level 0.75 has a prompt of 3",
    ),
]


@pytest.mark.parametrize(("script", "words", "said"), SCRIPTS, ids=spelt)
def test_scripts(call, place, script, words, said):
    files, words = (
        [w for w in words if w.endswith(".toml")],
        [w for w in words if not w.endswith(".toml")],
    )
    assert said in refuse(call, place, script.main, *files, *TINY, *words)


CONTRADICTIONS = [
    (
        ["baseline=off"],
        "scale = 'group' divides by the spread of group rewards, but baseline = 'off'",
    ),
    (
        ["baseline=value", "scale=off", "components=apart"],
        "normalises each reward within the group, but baseline =",
    ),
    (
        ["method=ppo", "keep_groups=mixed"],
        "keep_groups = 'mixed' drops groups without spread, but with baseline =",
    ),
    (
        ["refills=2"],
        'refills replace dropped groups, but keep_groups = "all" drops none',
    ),
    (
        ["method=gspo", "minibatches=1"],
        'ratio = "sequence" with one update per rollout is always 1',
    ),
    (
        ["method=rloo", "epochs=2"],
        'ratio = "off" takes no account of how far the policy has moved',
    ),
    (["ratio=off"], "clip = 'ppo' bounds a ratio, but ratio = \"off\" has none"),
    (
        ["clip=dual", "dual_clip=1.1"],
        "dual_clip = 1.1 must be above 1 + clip_high = 1.2",
    ),
    (
        ["sampler_correction=mask", "old_logprobs=sampler"],
        "sampler_correction would count them twice",
    ),
    (
        ["sampler_correction=truncate", "correction_high=0.5"],
        "must have 1 between them",
    ),
    (
        ["kl_estimator=k1"],
        'kl_estimator = "k1" in the loss has an expected gradient of zero',
    ),
    (
        ["kl_estimator=k2", "kl_correction=ratio"],
        "kl_estimator = 'k2' has the right gradient by itself",
    ),
    (
        ["kl_in=reward"],
        "kl_estimator = 'k3' in the reward does not give the gradient of the KL",
    ),
    (
        ["method=rloo", "kl_correction=weight"],
        "kl_correction = 'weight' is for the KL in the loss",
    ),
    (
        ["components=apart", "kl_in=reward", "kl_estimator=k1"],
        "the KL in the reward is none of them",
    ),
    (
        ["method=ppo", "value_coef=0"],
        'baseline = "value" needs a value model that learns',
    ),
]


@pytest.mark.parametrize(("choices", "reason"), CONTRADICTIONS, ids=spelt)
def test_choices_that_contradict_one_another(call, tmp_path, choices, reason):
    words = [f"algorithm.{choice}" for choice in choices]
    error = refuse(call, tmp_path, train_grpo.main, "model.path=no/such/model", *words)
    assert error.startswith("error: command line: [algorithm] ") and reason in error


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            ["method=grop"],
            "algorithm.method: expected one of grpo, dr_grpo, dapo, gspo, ",
        ),
        (["method="], "algorithm.method: expected one of grpo, dr_grpo, dapo, gspo, "),
        (
            ["baseline=mean"],
            "algorithm.baseline: expected one of group, leave_one_out, off, value, got 'mean'",
        ),
        (
            ["clip=hard"],
            "algorithm.clip: expected one of ppo, dual, cispo, off, got 'hard'",
        ),
        (
            ["kl_estimator=k4"],
            "algorithm.kl_estimator: expected one of k1, k2, k3, k3+, got 'k4'",
        ),
        (
            ["top_entropy=0"],
            "algorithm.top_entropy: expected a number above 0 and at most 1, got 0.0",
        ),
        (
            ["minibatches=0"],
            "algorithm.minibatches: expected a number at least 1, got 0",
        ),
        (["PRESET=grpo"], "algorithm.PRESET: unknown key"),
    ],
    ids=spelt,
)
def test_choices_that_there_are_not(call, tmp_path, choices, said):
    words = [f"algorithm.{choice}" for choice in choices]
    assert f"error: command line: {said}" in refuse(
        call, tmp_path, train_grpo.main, *words
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": -1},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 2.0},
    ],
)
def test_the_sampler_refuses_what_makes_no_sense(model_directory, wrong):
    sampler = Sampler(load_model(model_directory), load_tokenizer(model_directory))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sampler.generate([[1, 2, 3]], **wrong)
