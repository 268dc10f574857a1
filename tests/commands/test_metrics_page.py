"""docs/metrics.md names every number that a run logs, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nanomath.__main__ import main
from nanomath.data.problem import Problem
from nanomath.process.judge import JudgeReward
from nanomath.rollout import Completion, Episode

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
GENERAL = {  # a name on the page that stands for many -> what they look like
    "reward/NAME": r"reward/\w+",
    "grad_norm/PART": r"grad_norm/(layers\.\d+|\w+)",
    "update_ratio/PART": r"update_ratio/(layers\.\d+|\w+)",
    "heldout/pass@K": r"heldout/pass@[2-9]\d*",
    "heldout/maj@K": r"heldout/maj@\d+",
    "hints/rate/LOW-HIGH": r"hints/rate/[\d.]+-[\d.]+",
    "hints/level/LOW-HIGH": r"hints/level/[\d.]+-[\d.]+",
    "language/own/LANGUAGE": r"language/own/\w+",
    "heldout/language/own/LANGUAGE": r"heldout/language/own/\w+",
    "heldout/pass@1/KEY=VALUE": r"heldout/pass@1/\w+=.+",
    "heldout/kl/KEY=VALUE": r"heldout/kl/\w+=.+",
}
LABELLED = [
    {"prompt": "1 + 1?", "completions": ["1 + 1 = 2", "so 3"], "labels": [1, 0]},
    {"prompt": "2 + 1?", "completions": ["2 + 1 = 3", "so 3"], "labels": [1, 1]},
]


class FakeJudge:
    masses = [0.9]

    def compare(self, pairs):
        return [(float(len(one) > len(other)),) * 2 for _, one, other in pairs]


def metrics_of_a_judge() -> set[str]:
    group = [
        Episode(
            Problem("p", "q", "a"),
            [5],
            Completion(0, i, [1] * n, [0.0] * n, [0.0] * n, "x" * n, "eos"),
            rewards,
        )
        for i, (n, rewards) in enumerate(
            [(2, {"accuracy": 1.0, "total": 1.0}), (5, {"accuracy": 0.0, "total": 0.0})]
        )
    ]
    judge = JudgeReward(FakeJudge(), 0.3, 1)
    judge([group])
    return set(judge.metrics([group]))


@pytest.fixture
def logged(call, model_directory, tmp_path) -> set[str]:
    """Every name in the logs of runs of each kind."""
    import train_grpo
    import train_sft

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in LABELLED))
    small = (f"model.path={model_directory}", "run.directory=runs", "run.steps=2")
    data = (
        "train.limit=16",
        "heldout.limit=3",
        "train.world.difficulty=1,1",
        "heldout.world.difficulty=1,1",
    )
    measured = (
        "evaluation.samples=2",
        "evaluation.k=1,2",
        "evaluation.by=difficulty",
        "sampling.max_new_tokens=24",
    )
    runs = {
        "sft": (
            train_sft.main,
            (*small, *data, *measured, "sft.batch_size=4", "optim.l2_start=1"),
        ),
        "dpo": (
            train_grpo.main,
            (
                *(*small, *data, *measured, "grpo.prompts=4"),
                *("algorithm.method=dpo", "grpo.solutions=true"),
            ),
        ),
        "opd": (
            train_grpo.main,
            (
                *(*small, *data, *measured, "grpo.prompts=4", "algorithm.method=opd"),
                *("teacher.path=policy", "teacher.shows=sibling"),
            ),
        ),
        "prm": (
            main,
            (
                "prm",
                "train",
                *small,
                f"prm.train={rows}",
                f"prm.heldout={rows}",
                "prm.batch_size=2",
            ),
        ),
        "grpo": (
            train_grpo.main,
            (
                *(*small, *data, *measured, "grpo.prompts=4", "process.prm=oracle"),
                *("train.world.languages=en,ja", "heldout.world.languages=en,ja"),
            ),
        ),
        "hints": (  # who is told the whole solution is right
            train_grpo.main,
            (
                *(*small, *data, *measured, "grpo.prompts=4"),
                *("hints.chooser=learned", "hints.levels=[0,1]"),
            ),
        ),
    }
    options = (
        "algorithm.method=ppo",
        "algorithm.minibatches=1",
        "algorithm.credit=sum",
        "reward.weights.format=1",
    )
    found = metrics_of_a_judge()
    for name, (command, words) in runs.items():
        outcome = call(
            command, *words, f"run.name={name}", *(options if name == "grpo" else ())
        )
        assert outcome.code == 0, outcome.err
        found |= {
            key
            for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()
            for key in json.loads(line)
        }
    return found


def test_the_page_names_what_is_logged(logged):
    if not PAGE.exists():
        pytest.skip(f"{PAGE} is not here")
    rows = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    named = {
        name for row in rows for name in re.findall("`([^`]+)`", row.split("|")[1])
    }
    places = {
        place for row in rows for place in re.findall("`([^`]+)`", row.split("|")[3])
    }
    root = PAGE.parents[1]
    assert not [p for p in places if not [*root.glob(p), *root.glob(f"nanomath/{p}")]]

    def name_of(key: str) -> str:
        return next(
            (general for general, shape in GENERAL.items() if re.fullmatch(shape, key)),
            key,
        )

    assert {name_of(key) for key in logged} - named == set()
    rare = {
        "prm/auc",
        "length/right",
        "heldout/f1",
    }  # a model this small is never right
    assert named - {name_of(key) for key in logged} <= rare
