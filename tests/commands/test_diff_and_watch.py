"""`diff` and `watch` on real runs: two that are equal, a resumed one, and some that are not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import train_grpo
from nanomath.__main__ import main
from nanomath.commands import watch


@pytest.fixture
def train(call, model_directory):
    """train(NAME, *words): a GRPO run of three steps."""

    def train(name: str, *words: str, steps: int = 3) -> None:
        small = (
            *(
                "run.directory=runs",
                f"run.name={name}",
                f"run.steps={steps}",
                "run.threads=1",
            ),
            *("grpo.prompts=2", "grpo.group_size=2", "sampling.max_new_tokens=8"),
            *(
                "train.limit=8",
                "heldout.limit=2",
                "evaluation.samples=1",
                "optim.lr=1e-3",
            ),
            *("optim.schedule=constant", "run.save_every=1", "model.dtype=float32"),
        )
        out = call(train_grpo.main, *small, f"model.path={model_directory}", *words)
        assert out.code == 0, out.err

    return train


def test_where_runs_part(call, train):
    train("a", "reward.weights.random=1")
    assert call(main, "diff", "runs/a", "runs/a")[:2] == (
        0,
        "equal: 5 lines of metrics, 12 episodes\n",
    )
    train("resumed", "reward.weights.random=1")
    # As if killed before it was written
    shutil.rmtree("runs/resumed/checkpoints/step-3")
    train("resumed", "reward.weights.random=1", "--resume")
    assert len(json.loads(Path("runs/resumed/run.json").read_text())) == 2
    assert call(main, "diff", "runs/a", "runs/resumed").code == 0
    train("slots", "reward.weights.random=1", "sampling.slots=1")
    code, out, _ = call(main, "diff", "runs/a", "runs/slots")
    assert code == 1 and "config: sampling.slots is 64 in A, 1 in B" in out
    train("budget", "reward.weights.random=1", "grpo.token_budget=70")
    code, out, _ = call(main, "diff", "runs/a", "runs/budget")
    assert code == 1 and "config: grpo.token_budget is 16384 in A, 70 in B" in out
    train("beta", "reward.weights.random=1", "algorithm.kl_coef=1")
    code, out, _ = call(main, "diff", "runs/a", "runs/beta")
    assert "config: algorithm.kl_coef is 0.04 in A, 1.0 in B" in out
    assert "metrics: step " in out and code == 1


def test_a_weight_moved_by_one_ulp_is_seen_where_it_happened(call, train, monkeypatch):
    import torch

    from nanomath.training.policy_step import PolicyStep

    train("a", "reward.weights.random=1")
    plain = PolicyStep.step

    def step(self, episodes, number, lr):
        if number == 1:  # before the update of the second step
            weight = self.model.model.embed_tokens.weight.data
            weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))
        return plain(self, episodes, number, lr)

    monkeypatch.setattr(PolicyStep, "step", step)
    train("b", "reward.weights.random=1")
    code, out, _ = call(main, "diff", "runs/a", "runs/b")
    assert code == 1 and "metrics: step 2 is the first that differs" in out


def test_a_run_explains_what_it_was_made_with(call, train):
    train("a", steps=2)
    train("a", "--resume")
    sittings = json.loads(Path("runs/a/run.json").read_text())
    assert [(s["from_step"], s["to_step"]) for s in sittings] == [(0, 2), (2, 3)]
    assert all(s["versions"]["torch"] and s["machine"]["cores"] for s in sittings)
    assert all(s["minutes"] >= 0 and s["peak_memory_gib"] > 0 for s in sittings)


def test_watching(call, train, monkeypatch):
    train("a")
    out = call(main, "watch", "runs/a").out
    assert out.startswith("runs/a: step 3 of 3\n") and "tokens_per_second" in out
    rounds = iter([None])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        if next(rounds, "over"):
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert watch.main(["runs/a", "every=0.5"]) == 0


def test_a_small_curve():
    assert watch.sparkline([0, 1, 2, 7]) == "▁▂▃█" and watch.sparkline([5.0]) == "▁"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["diff", "a"], "diff needs two run directories"),
        (["diff", "a", "b"], "a is no run"),
        (["watch"], "watch needs one run directory"),
        (["watch", "a"], "a is no run"),
        (["watch", "a", "every=0"], "every is '0': expected seconds"),
        (["watch", "a", "every=soon"], "every is 'soon': expected seconds"),
        (["report", "a"], "a is no run"),
    ],
)
def test_bad_input_is_one_line(call, words, message):
    code, _, err = call(main, *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_tensorboard(call, train):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    track = 'run.track=["tensorboard"]'
    train("a", track, steps=2)
    train("a", track, "--resume")
    events = accumulator.EventAccumulator("runs/a/tensorboard").Reload()
    lines = [
        json.loads(line)
        for line in Path("runs/a/metrics.jsonl").read_text().splitlines()
    ]
    logged = {line["step"]: line["reward"] for line in lines if "reward" in line}
    assert {e.step: e.value for e in events.Scalars("reward")} == pytest.approx(logged)
