"""The run directory: one run each, resumable after any kind of death."""

from __future__ import annotations

import json
import os

import pytest

from nanomath.training import runlog
from nanomath.training.runlog import RunLog, read_jsonl, write_atomically


@pytest.fixture
def log(tmp_path) -> RunLog:
    """A run of four steps, with a rollout in Japanese at each."""
    log = RunLog(tmp_path / "run", resume=False)
    log.begin("lr = 1\n", 0)
    log.metrics(0, accuracy=0.1)
    for step in range(1, 5):
        log.metrics(step, loss=1 / step)
        log.add("rollouts", step, [{"text": f"答え {step}"}, {"text": "b"}])
    return log


def steps(log: RunLog, name: str = "metrics.jsonl") -> list[int]:
    return [record["step"] for record in read_jsonl(log.directory / name)]


def test_lines_are_on_disk_at_once(log):
    assert steps(log) == [0, 1, 2, 3, 4] and steps(log, "rollouts.jsonl") == [
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    assert "答え" in (log.directory / "rollouts.jsonl").read_text(encoding="utf-8")
    assert (log.directory / "config.toml").read_text() == "lr = 1\n"


def test_an_occupied_directory_is_refused(log):
    with pytest.raises(
        FileExistsError, match=r"already holds a run: add --resume[^\n]*$"
    ):
        RunLog(log.directory, resume=False)
    assert steps(log) == [0, 1, 2, 3, 4]


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        RunLog(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_what_other_commands_wrote_stays(log):
    path = log.directory / "handoff.jsonl"
    path.write_text('{"id": "a"}\n')
    for step in (2, 0):
        RunLog(log.directory, resume=True).begin("lr = 1\n", step)
        assert path.read_text() == '{"id":"a"}\n'


@pytest.mark.parametrize(
    ("start", "left"), [(0, []), (2, [0, 1, 2]), (4, [0, 1, 2, 3, 4])]
)
def test_resuming_forgets_what_will_be_computed_again(log, start, left):
    again = RunLog(log.directory, resume=True)
    assert steps(log) == [0, 1, 2, 3, 4], "nothing changes before begin"
    again.begin("lr = 2\n", start)
    assert steps(again) == left
    assert steps(again, "rollouts.jsonl") == [
        step for step in left if step for _ in range(2)
    ]
    assert (log.directory / "config.toml").read_text() == "lr = 2\n"
    assert not list(log.directory.glob("*.tmp"))


@pytest.mark.parametrize("cut", range(1, 28))
def test_a_last_line_cut_short_is_dropped(log, cut):
    """Wherever it was cut, in the middle of a character too."""
    path = log.directory / "rollouts.jsonl"
    log.add("rollouts", 5, [{"text": "答え"}])
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(log, "rollouts.jsonl")[:8] == [1, 1, 2, 2, 3, 3, 4, 4]
    RunLog(log.directory, resume=True).begin("", 4)
    log.add("rollouts", 5, [{"text": "again"}])
    assert steps(log, "rollouts.jsonl") == [1, 1, 2, 2, 3, 3, 4, 4, 5]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: not valid JSON"):
        list(read_jsonl(path))
    path.write_text('{"step": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected a JSON object"):
        list(read_jsonl(path))


def test_line_separators_inside_strings_are_no_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": "a\u2028b\u0085c\n"}, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    assert list(read_jsonl(path)) == [{"text": "a\u2028b\u0085c\n"}]


def test_alarms_are_resumed_like_the_rest(log):
    log.add("alarms", 2, [{"alarm": "flat", "text": "too easy"}, {"alarm": "kl"}])
    log.add("alarms", 4, [{"alarm": "collapse"}])
    assert log.read("alarms.jsonl")[0] == {
        "step": 2,
        "alarm": "flat",
        "text": "too easy",
    }
    RunLog(log.directory, resume=True).begin("", 3)
    assert [line["alarm"] for line in log.read("alarms.jsonl")] == [
        "flat",
        "kl",
    ] and log.read("absent.jsonl") == []


def test_of_several_processes_one_writes(log, tmp_path):
    before = {path: path.read_bytes() for path in log.directory.iterdir()}
    other = RunLog(log.directory, resume=True, writes=False)
    other.begin("lr = 3\n", 1)
    other.metrics(9, loss=1.0)
    other.add("rollouts", 9, [{"text": "x"}])
    other.sync()
    assert {path: path.read_bytes() for path in log.directory.iterdir()} == before
    assert other.read("metrics.jsonl") == log.read("metrics.jsonl")


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_file_that_cannot_be_written_is_named(log, name):
    (log.directory / name).unlink()
    (log.directory / name).mkdir()
    with pytest.raises(
        OSError, match=rf"{log.directory}/{name} could not be written: Is a directory$"
    ):
        log.add(name.removesuffix(".jsonl"), 5, [{"loss": 1}])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runlog.os, "fsync", fail)
    with pytest.raises(
        OSError, match=r"config\.toml could not be written: No space left on device"
    ):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.toml"]


def test_the_log_can_be_put_on_the_disk(log, monkeypatch):
    synced = []
    monkeypatch.setattr(
        runlog.os,
        "fsync",
        lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")),
    )
    log.sync()
    assert sorted(synced) == [
        str(log.directory / name) for name in ("metrics.jsonl", "rollouts.jsonl")
    ]
