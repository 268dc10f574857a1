"""`torchrun --nproc_per_node 2` trains what one process trains: metrics, rollouts,
checkpoints; and resumes it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = "model.new.layers=2 model.new.hidden_size=64 model.new.intermediate_size=96 "
TINY += "train.limit=60 heldout.limit=6 run.steps=3"
SFT = (
    f"train_sft.py configs/tiny/sft.toml {TINY} sft.batch_size=7 "
    "sampling.max_new_tokens=8 optim.schedule=constant"
)
GRPO = (
    f"train_grpo.py configs/tiny/grpo.toml {TINY} model.path=DIRECTORY/one "
    "sampling.max_new_tokens=8 grpo.prompts=3 "
    "grpo.group_size=4 grpo.token_budget=300 optim.schedule=constant "
    "reward.weights={repetition=1.0,random=0.5}"
)
PRM = (
    "-m nanomath prm train configs/tiny/prm.toml model.path=DIRECTORY/one "
    "prm.train=DIRECTORY/labelled.jsonl prm.heldout=DIRECTORY/labelled.jsonl "
    "run.steps=3 prm.batch_size=9 prm.token_budget=300 optim.schedule=constant"
)


def start(
    directory: Path, command: str, name: str, processes: int
) -> subprocess.Popen[str]:
    """A training script in as many processes."""
    words = [
        *command.replace("DIRECTORY", str(directory)).split(),
        f"run.directory={directory}",
        f"run.name={name}",
    ]
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ] * (processes > 1)
    return subprocess.Popen(
        [sys.executable, *torchrun, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(directory: Path, command: str, name: str, processes: int) -> Path:
    """Run a training script to its end and return its run directory."""
    process = start(directory, command, name, processes)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return directory / name


def assert_same_run(found: Path, expected: Path, tolerance: float = 1e-4) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        if (expected / name).exists():
            pairs = zip(
                *((path / name).read_text().splitlines() for path in (found, expected)),
                strict=True,
            )
            for a, b in pairs:
                assert_same(json.loads(a), json.loads(b), tolerance)
    files = sorted((expected / "checkpoints" / "step-3").glob("*.safetensors"))
    assert len(files) == 2  # of the model or its adapter, and of the trainer
    for file in files:
        tensors = [
            load_file(path) for path in (found / file.relative_to(expected), file)
        ]
        assert tensors[0].keys() == tensors[1].keys()
        for key, tensor in tensors[1].items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(
                tensors[0][key], tensor, rtol=0, atol=tolerance * scale
            )


def assert_same(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        numbers = isinstance(value, float) or (
            isinstance(value, list) and all(isinstance(x, float) for x in value)
        )
        # Of tokens, all but logprobs have three decimals, which may be rounded otherwise.
        rounded = isinstance(value, list) and name != "logprobs"
        near = tolerance + 1e-3 * rounded
        if "second" not in name:  # times differ, and tokens per second
            assert found[name] == (
                pytest.approx(value, abs=near) if numbers else value
            ), name


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("torchrun")
    train(directory, SFT, "one", 1)
    return directory


def test_sft_begun_sharded_by_two_and_ended_by_one(directory):
    train(directory, f"{SFT} run.steps=2 model.sharded=true", "two", 2)
    found = train(directory, f"{SFT} --resume", "two", 1)
    kept = [
        line
        for line in (found / "metrics.jsonl").read_text().splitlines()
        if not line.startswith('{"step":2,"heldout')
    ]  # but for what was measured at the end of the first half
    (found / "metrics.jsonl").write_text("\n".join(kept))
    assert_same_run(found, directory / "one")


def test_grpo(directory):
    expected = train(directory, GRPO, "grpo-one", 1)
    assert_same_run(train(directory, GRPO, "grpo-two", 2), expected)


@pytest.mark.parametrize("chooser", ["ladder", "learned"])
def test_hints(directory, chooser):
    command = f"{GRPO} hints.chooser={chooser} hints.levels=[0.5,1] process.prm=random"
    expected = train(directory, command, f"{chooser}-one", 1)
    found = train(directory, command, f"{chooser}-two", 2)
    assert_same_run(found, expected)
    lines = (found / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("hints/rate") for line in lines)


KNOWN = (
    "grpo.solutions=true reward.weights.accuracy=1 ",
    "grpo.source=teacher teacher.path=start lora.rank=2 optim.lr=0.003 grpo.solutions=true",
    "grpo.source=DIRECTORY/samples.jsonl grpo.group_size=2 algorithm.old_logprobs=sampler",
    "algorithm.method=opd teacher.path=policy teacher.shows=sibling grpo.solutions=true",
)


@pytest.mark.parametrize("number", range(len(KNOWN)))
def test_samples_of_others(directory, number):
    """What is known is given on every rank, the rest drawn by all of them together."""
    command = f"{GRPO} grpo.logged_groups=3"
    if "samples.jsonl" in KNOWN[number]:
        drawn = train(directory, f"{command} train.limit=3", "drawn", 1)
        rows = (drawn / "rollouts.jsonl").read_text().splitlines()
        first = [row for row in rows if json.loads(row)["step"] == 1]
        (directory / "samples.jsonl").write_text("\n".join(first) + "\n")
        command += " train.limit=3"
    command = f"{command} {KNOWN[number]}"
    expected = train(directory, command, f"known-one-{number}", 1)
    found = train(directory, command, f"known-two-{number}", 2)
    assert_same_run(found, expected)
    rows = map(json.loads, (found / "rollouts.jsonl").read_text().splitlines())
    certain = [row["sample"] for row in rows if not any(row["logprobs"])]
    assert certain == [3] * 9 if "solutions" in command else not certain


@pytest.mark.parametrize("command", [SFT, GRPO], ids=["sft", "grpo"])
def test_adapters(directory, command):
    command = f"{command} model.path=DIRECTORY/one lora.rank=4 optim.lr=0.003"
    expected = train(directory, command, f"adapters-one-{len(command)}", 1)
    found = train(directory, command, f"adapters-two-{len(command)}", 2)
    assert (expected / "checkpoints/step-3/adapter_model.safetensors").is_file()
    assert_same_run(found, expected)


def test_prm(directory):
    """Copied, with a head that learns first; sharded, where that is refused; and in the
    rewards of a policy.
    """
    rows = [
        {
            "prompt": f"{n} + 1?",
            "completions": ["Well.", "So it is" + " so" * (n % 5), f"{n + 1}"],
            "labels": [1, 0, n % 2],
        }
        for n in range(21)
    ]
    (directory / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = train(directory, f"{PRM} prm.head_steps=2", "prm-one", 1)
    assert_same_run(train(directory, f"{PRM} prm.head_steps=2", "prm-two", 2), expected)
    expected = train(directory, f"{PRM} prm.head_steps=0", "prm-whole", 1)
    assert_same_run(
        train(
            directory, f"{PRM} prm.head_steps=0 model.sharded=true", "prm-sharded", 2
        ),
        expected,
    )
    process = start(
        directory, f"{PRM} prm.head_steps=2 model.sharded=true", "prm-refused", 2
    )
    assert (
        "error: prm.head_steps freezes weights for a while"
        in process.communicate(timeout=300)[1]
    )
    assert process.returncode

    command = f"{GRPO} process.prm=DIRECTORY/prm-whole algorithm.method=pure"
    expected = train(directory, command, "pure-one", 1)
    assert_same_run(train(directory, command, "pure-two", 2), expected)


def test_ctrl_c_saves_once_and_says_so_once(directory):
    """torchrun passes the signal on to every rank; all end at one step, and none before it is
    written.
    """
    process = start(directory, f"{SFT} run.steps=100000", "stopped", 2)
    metrics = directory / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline, (
            "no step was made"
        )
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    (checkpoint,) = (directory / "stopped" / "checkpoints").iterdir()
    said = f"stopped after step {checkpoint.name.removeprefix('step-')}, which is saved"
    assert (
        errors.count(said) == errors.count("stopping after this step") == 1
        and "error:" not in errors
    )
