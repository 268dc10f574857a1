"""Reading run directories, whatever state they are in."""

from __future__ import annotations

import pytest
from made_run import TOKENIZER, episode, write_run

from nanomath import settings
from nanomath.analysis.runs import arms, config_differences, read_run


def test_what_is_no_run_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="is no run: it holds no config.toml"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="absent is no run"):
        read_run(tmp_path / "absent")
    (tmp_path / "config.toml").write_text("[a")
    with pytest.raises(ValueError, match="config.toml cannot be read"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text("[problems]\nsource = 'world'\n")
    with pytest.raises(
        ValueError, match="is no training config: it has none of grpo, sft, prm"
    ):
        read_run(tmp_path)


def test_a_run_that_is_still_being_written(tmp_path):
    path = write_run(
        tmp_path / "a", metrics=[{"step": 0, "kl": 0.0}, {"step": 1, "kl": 0.5}]
    )
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "kl"')
    run = read_run(path)
    assert run.series == {"kl": ([0, 1], [0.0, 0.5])}
    assert (run.rollouts, run.heldout, run.sittings) == ([], [], [])
    (path / "run.json").write_text("[{")
    assert read_run(path).sittings == []


def test_what_differs_from_the_defaults(tmp_path):
    run = read_run(write_run(tmp_path / "a", config={"algorithm.kl_coef": 0.5}))
    default = settings.GRPOConfig().algorithm.kl_coef
    assert run.changed() == {
        "run.name": ("run", "a"),
        "algorithm.kl_coef": (default, 0.5),
    }


def test_older_logs_have_their_places_by_order(tmp_path):
    old = [
        episode(step, prompt) for step in (1, 2) for prompt in (0, 1) for _ in range(2)
    ]
    for record in old:
        del record["prompt"], record["sample"]
    run = read_run(write_run(tmp_path / "a", rollouts=old))
    places = [(r["step"], r["prompt"], r["sample"]) for r in run.rollouts]
    assert places == [(s, p, k) for s in (1, 2) for p in (0, 1) for k in (0, 1)]


def test_tokens_have_their_text(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    text = "Leo has 12 coins.\n\n"
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    pieces = run.pieces(ids)
    assert "".join(pieces[i] for i in ids) == text
    (run.directory / "checkpoints/step-1/tokenizer.json").unlink()
    assert run.pieces(ids) is None


def test_seeds_of_one_method_are_one_arm(tmp_path):
    runs = [
        read_run(
            write_run(
                tmp_path / f"{beta}-{seed}",
                config={"algorithm.kl_coef": beta, "run.seed": seed},
            )
        )
        for beta in (0.0, 0.1)
        for seed in (0, 1)
    ]
    assert {name: len(seeds) for name, seeds in arms(runs).items()} == {
        "kl_coef=0.0": 2,
        "kl_coef=0.1": 2,
    }
    assert list(arms(runs[:1])) == ["0.0-0"] and list(arms(runs[::2])) == [
        "0.0-0",
        "0.1-0",
    ]
    assert set(config_differences(runs)) == {
        "algorithm.kl_coef",
        "run.name",
        "run.seed",
    }
    assert list(map(len, arms([runs[0], runs[0]]).values())) == [2]
