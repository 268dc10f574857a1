"""Studies: what their files may say, which cells they have, that nothing stops them for good."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import re
import shutil
import signal
import textwrap
import threading
import time
import tomllib
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanomath.__main__ import main
from nanomath.analysis import figures, statistics
from nanomath.analysis import pool as pools
from nanomath.analysis.cells import Late, in_order, make_cells
from nanomath.analysis.compare import mcnemar
from nanomath.analysis.late import found
from nanomath.analysis.measures import less, measured, run_of
from nanomath.analysis.pool import Pool
from nanomath.analysis.results import as_json, as_table, collect, warnings
from nanomath.analysis.runs import read_run
from nanomath.analysis.study import RUNS, read_study, study_of
from nanomath.commands import study as command
from nanomath.commands.study import check_measures, check_room, sight

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
TABLE = {
    "question": "Does it?",
    "baseline": "with",
    "seeds": [0, 1],
    "measures": ["grpo.heldout/pass@1"],
    "stages": {
        "sft": {"run": "train_sft.py", "seeded": False},
        "grpo": {"run": "train_grpo.py", "keys": {"model.path": "{sft}"}},
    },
    "arms": {"with": {}, "without": {"grpo.algorithm.kl_coef": 0.0}},
}
STAGES = {
    "sft": TABLE["stages"]["sft"],
    "grpo": {
        **TABLE["stages"]["grpo"],
        "keys": {"model.path": "{sft}", "run.eval_every": 1},
        "checkpoint": {"measure": "heldout/pass@1", "reach": 0.1},
    },
    "after": {"run": "train_grpo.py", "keys": {"model.path": "{grpo}"}},
}
BEST = {
    "key": "grpo.optim.lr",
    "values": [1e-5, 0.3, 0.9],
    "measure": "grpo.heldout/pass@1",
    "seeds": [7, 8],
}

EVENT = {"alarm": "grpo.collapse"}


def study(**changed):
    return study_of("test", {**TABLE, **changed})


# --- the file --------------------------------------------------------------------------------


WHOLE = """
question = "Does it?"
baseline = "with"
seeds = [0, 1]
measures = ["grpo.heldout/pass@1"]
event = { alarm = "grpo.collapse" }
[stages.sft]
run = "train_sft.py"
seeded = false
[stages.grpo]
run = "train_grpo.py"
keys = { "model.path" = "{sft}", "optim.lr" = 1e-5 }
[axes]
"grpo.algorithm.kl_coef" = [0.0, 0.04]
"""
ALIKE = """
like = "one.toml"
baseline = "low"
[stages.grpo.keys]
"optim.lr" = 2e-5
[stages.more]
run = "train_sft.py"
[arms]
low = { "grpo.optim.eps" = 1e-6 }
"""


def test_a_study_like_another_says_only_what_differs(tmp_path):
    for name, text in ("one", WHOLE), ("other", ALIKE):
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    other = read_study(tmp_path / "other.toml")
    assert (other.name, other.question, other.seeds) == ("other", "Does it?", (0, 1))
    assert other.event["alarm"] == "grpo.collapse" and list(other.arms) == ["low"]
    assert list(other.stages) == ["sft", "grpo", "more"]
    assert (
        not other.stages["sft"].seeded and other.stages["grpo"].run == "train_grpo.py"
    )
    assert other.stages["grpo"].keys == {"model.path": "{sft}", "optim.lr": 2e-5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('like = "two.toml"', "like = 'two.toml': expected a study file in"),
        ("like = 1", "like = 1: expected a study file in"),
        (
            'like = "other.toml"',
            "'other.toml': expected a whole study, and that is like",
        ),
        ('like = "one.toml"\nseed = 1', "unknown key: 'seed'"),
        (
            'like = "one.toml"\n[stages.grpo]\nkey = 1',
            "unknown key of the stage 'grpo': 'key'",
        ),
    ],
)
def test_what_a_study_can_be_like(text, said, tmp_path):
    texts = {"one": WHOLE, "other": ALIKE, "this": text}
    for name, written in texts.items():
        (tmp_path / f"{name}.toml").write_text(written, encoding="utf-8")
    with pytest.raises(ValueError, match="this.toml: ") as error:
        read_study(tmp_path / "this.toml")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_arms_share_is_run_once(tmp_path):
    chains = make_cells(study(), tmp_path)
    cells = in_order(chains)
    assert [c.stage.name for c in cells.values()] == ["sft"] + ["grpo"] * 4
    (sft,) = {chain["sft"].name for chain in chains.values()}
    for (arm, seed), chain in chains.items():
        config = chain["grpo"].config
        assert config["model.path"] == str(tmp_path / sft)
        assert (config["run.seed"], config["run.threads"]) == (seed, 1)
        assert (config["algorithm.kl_coef"] == 0.0) == (arm == "without")
        assert config["run.name"] == chain["grpo"].name and chain["grpo"].parents == (
            chain["sft"],
        )


def test_a_cell_is_its_config_wherever_it_is_kept(tmp_path):
    here = in_order(make_cells(study(), tmp_path / "a"))
    there = in_order(
        make_cells(study(question="Or not?", seeds=[0, 1, 2]), tmp_path / "b")
    )
    assert set(here) < set(there)
    rate = {
        "sft": {**TABLE["stages"]["sft"], "keys": {"optim.lr": 1e-9}},
        "grpo": TABLE["stages"]["grpo"],
    }
    assert not set(here) & set(in_order(make_cells(study(stages=rate), tmp_path / "a")))


def test_a_directory_of_cells_changes_no_other_text(monkeypatch, tmp_path):
    """Its name may be a piece of a number: rates of 1.5 and 15 are not the same."""
    monkeypatch.chdir(tmp_path)
    rates = {"with": {"grpo.optim.lr": 0.15}, "ten": {"grpo.optim.lr": 0.015}}
    far = in_order(make_cells(study(arms=rates), tmp_path))
    for place in (Path("."), Path("0"), Path("cells")):
        assert set(in_order(make_cells(study(arms=rates), place))) == set(far)


def test_axes_and_leaving_one_out():
    axes = {k: v for k, v in TABLE.items() if k != "arms"}
    axes["axes"] = {"grpo.optim.lr": [1e-4, 2e-4], "grpo.algorithm.kl_coef": [0.0, 0.1]}
    axes["baseline"] = "lr=0.0001_kl_coef=0.0"
    assert len(study_of("x", axes).arms) == 4
    places = {
        "k3": {"grpo.algorithm.kl_in": "loss"},
        "k1": {"grpo": {"algorithm": {"kl_in": "reward"}}},
    }
    axes["axes"] = {"grpo.optim.lr": [1e-4, 2e-4], "place": places}
    axes["baseline"] = "lr=0.0001_k3"
    made = study_of("x", axes)
    assert made.arms["lr=0.0002_k1"] == {
        "grpo.optim.lr": 2e-4,
        "grpo.algorithm.kl_in": "reward",
    }
    assert made.levels["lr=0.0002_k1"] == {"grpo.optim.lr": "lr=0.0002", "place": "k1"}
    for wrong in (3, {"k1": 3}):
        with pytest.raises(ValueError, match="axis 'place': expected a list of values"):
            study_of("x", {**axes, "axes": {"place": wrong}})
    recipe = {k: v for k, v in TABLE.items() if k != "arms"}
    recipe |= {
        "baseline": "all",
        "leave_one_out": {"kl": {"grpo.algorithm.kl_coef": 0.0}},
    }
    assert study_of("x", recipe).arms == {
        "all": {},
        "kl": {"grpo.algorithm.kl_coef": 0.0},
    }


def test_equal_updates(tmp_path):
    arms = {
        "with": {},
        "four": {"grpo.algorithm.minibatches": 2, "grpo.algorithm.epochs": 2},
    }
    chains = make_cells(study(arms=arms, budget="updates"), tmp_path)
    assert [chains[arm, 0]["grpo"].config["run.steps"] for arm in arms] == [100, 25]
    arms["four"] = {"grpo.grpo.prompts": 4}
    chains = make_cells(study(arms=arms, budget="samples"), tmp_path)
    assert [chains[arm, 0]["grpo"].config["run.steps"] for arm in arms] == [100, 400]
    with pytest.raises(ValueError, match="an arm would need 33.3333 steps"):
        arms["four"] = {"grpo.algorithm.epochs": 3}
        make_cells(study(arms=arms, budget="updates"), tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"question": ""}, "question is missing"),
        ({"sedes": [1]}, "unknown key: 'sedes'; did you mean seeds"),
        ({"seeds": [0, 1, 0]}, "one is there twice"),
        ({"seeds": [0.5]}, "seeds.: expected an integer, got 0.5"),
        ({"baseline": "wiht"}, "baseline = 'wiht': expected one of with, without"),
        ({"measures": ["pass@1"]}, "measure 'pass@1': expected STAGE.METRIC"),
        ({"measures": ["prm.auc"]}, "with a stage of"),
        ({"measures": ["grpo.loss:best"]}, "NAME, NAME:area or NAME:to=NUMBER"),
        ({"measures": ["grpo.loss:to=1.2.3"]}, "NAME, NAME:area or NAME:to=NUMBER"),
        (
            {"measures": ["grpo.pass@1"]},
            "which answers. grpo.heldout/pass@1 is of the held",
        ),
        ({"measures": "grpo.loss"}, "key 'measures': expected a list, got 'grpo.loss'"),
        ({"measures": [1]}, "key 'measures': expected a string, got 1"),
        ({"seeds": 5}, "key 'seeds': expected a list, got 5"),
        ({"seeds": [-1]}, "seeds = .-1.: expected none below 0"),
        ({"last": 0}, "last of at least 1"),
        ({"stages": {"a": 1}}, "key 'stages': expected a table, got 1"),
        ({"arms": []}, "key 'arms': expected a table"),
        ({"arms": {"with": {}, "b": {"grpo": 1}}}, "'b': grpo: expected STAGE.KEY"),
        (
            {"stages": {"a": {"run": "eval", "keys": 5}}},
            "stage 'a' 'keys': expected a tab",
        ),
        (
            {"best": {**BEST, "values": 5}},
            "key of best 'values': expected a list, got 5",
        ),
        ({"best": {**BEST, "key": "grpo"}}, "key = 'grpo': expected STAGE.KEY"),
        (
            {"event": {}},
            "event: alarm = None: expected STAGE.ALARM, with a training of",
        ),
        (
            {"event": {"alarm": "grpo.fall"}},
            "and an alarm of collapse, flat, format, kl",
        ),
        ({"event": {"alarm": "eval.collapse"}}, "with a training of .'sft', 'grpo'"),
        (
            {"event": {**EVENT, "ahaed": 5}},
            "unknown key of event: 'ahaed'; did you mean ahead",
        ),
        ({"event": {**EVENT, "ahead": 0}}, "ahead = 0: expected at least 1 step"),
        (
            {"event": {**EVENT, "announce": ["alarm/kll"]}},
            "announce 'alarm/kll': expected an alarm of collapse",
        ),
        ({"event": {**EVENT, "announce": "kl"}}, "'announce': expected a list"),
        (
            {"budget": "luck"},
            "budget = 'luck': expected one of updates, samples, tokens",
        ),
        ({"arms": {"with": {}, "b": {"kl_coef": 1}}}, "kl_coef: expected STAGE.KEY"),
        ({"arms": {"with": {}, "a b": {"grpo.run.steps": 1}}}, "letters, digits"),
        (
            {"arms": {"with": {}, "_b": {"grpo.run.steps": 1}}},
            "first a letter or digit",
        ),
        (
            {"axes": {"grpo.run.steps": [1]}},
            "expected one of arms, axes, leave_one_out",
        ),
        ({"stages": {"a": {"run": "rm"}}}, "run = 'rm': expected one of train_sft.py"),
        (
            {"stages": {"a": {"run": "eval", "arguments": ["x"]}}},
            "run = 'eval': expected",
        ),
        ({"best": {"key": "grpo.optim.lr"}}, "best: values is missing"),
        ({"best": {**BEST, "key": "lr"}}, "key = 'lr': expected STAGE.KEY"),
        (
            {"best": {**BEST, "measure": "sft.loss"}},
            "with a stage of .'sft'., which sft.loss",
        ),
        ({"best": {**BEST, "kye": 1}}, "unknown key of best: 'kye'; did you mean key"),
        (
            {"best": {**BEST, "key": "grpo.algorithm.kl_coef", "measure": "grpo.loss"}},
            "but the arm 'without' sets it",
        ),
        (
            {"best": {**BEST, "measure": "grpo.loss"}, "budget": "tokens"},
            "choose first, in a",
        ),
        *(
            (
                {"stages": {**STAGES, "grpo": {**STAGES["grpo"], "checkpoint": rule}}},
                "stage 'grpo': checkpoint = {.*}: expected",
            )
            for rule in ({"reach": 1}, {"measure": "kl", "near": "after"})
        ),
        *(
            ({"measures": [f"grpo.heldout/pass@1 - {other}"]}, message)
            for other, message in (
                ("grpo.kl", "expected a difference of two, both of answers or both"),
                ("grpo.heldout/pass@2 - sft.heldout/pass@2", "a difference of two"),
                ("kl", "measure 'kl': expected STAGE.METRIC"),
            )
        ),
        ({"best": {**BEST, "measure": "grpo.kl - sft.nll"}}, "best: a difference"),
        *(
            ({"doses": doses}, message)
            for doses, message in (
                ({"with": 0, "wthout": 1}, "doses: 'wthout' is no arm"),
                ({"with": 0}, "expected two amounts or more"),
                ({"with": 1, "without": 0}, "from the least on"),
                ({"with": -1, "without": 0}, "none below 0"),
                ({"with": 0, "without": "x"}, "key 'doses': "),
                ({"with": 0, "without": math.inf}, "from the least on"),
                ({"with": 0, "without": math.nan}, "from the least on"),
            )
        ),
        *(
            ({"against": against}, message)
            for against, message in (
                ("kl", "measure 'kl': expected STAGE.METRIC"),
                ("grpo.kl:sum", "expected NAME, NAME:area or"),
                (7, "key 'against': "),
            )
        ),
        (
            {
                "against": "eval.kl",
                "stages": {**TABLE["stages"], "eval": {"run": "eval"}},
            },
            "against = 'eval.kl': expected a measure of a training",
        ),
        (
            {"stages": {"a": {"run": "eval", "kyes": {}}}},
            "unknown key of the stage 'a': 'kyes'",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(changed, message):
    with pytest.raises(ValueError, match=message) as error:
        study(**changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"grpo.run.steps": [1, 1]},
            "axis 'grpo.run.steps': .1, 1.: one is there twice",
        ),
        ({"grpo.run.name": ["1", 1]}, "one is there twice"),
        ({"grpo.run.name": ["<b>"]}, "arm 'name=<b>': expected letters"),
        (
            {"$x$": {"a": {}, "b": {"grpo.run.steps": 1}}},
            "axis '.x.': expected letters",
        ),
        ({"arm": {"a": {}, "b": {"grpo.run.steps": 1}}}, "axis 'arm': that is what"),
        ({"x": {"_a": {}, "b": {"grpo.run.steps": 1}}}, "level '_a': expected letters"),
        (
            {
                "x": {"p": {}, "p_q": {"grpo.run.steps": 1}},
                "y": {"q_r": {}, "r": {"grpo.optim.lr": 1.0}},
            },
            "two arms would have the name 'p_q_r'",
        ),
    ],
)
def test_axes_whose_names_do_not_serve(axes, message):
    table = {k: v for k, v in TABLE.items() if k != "arms"}
    with pytest.raises(ValueError, match=message):
        study_of("x", {**table, "axes": axes})


def test_no_run_is_watched_twice_for_an_event(tmp_path):
    """Runs that arms or seeds share are one run each: a test would take them for several."""
    arms = {"with": {}, "longer": {"grpo.run.steps": 9}}
    with pytest.raises(ValueError, match="event: arms or seeds share runs of .* 'sft'"):
        make_cells(study(arms=arms, event={"alarm": "sft.flat"}), tmp_path)
    assert make_cells(study(arms=arms, event=EVENT), tmp_path)


def test_a_stage_is_run_for_its_event_alone(tmp_path):
    """The headline is of the first stage; the second is watched."""
    watched = study(measures=["sft.loss"], event=EVENT)
    assert watched.event == {**EVENT, "announce": [], "ahead": 20}
    stages = {
        cell.stage.name for cell in in_order(make_cells(watched, tmp_path)).values()
    }
    assert stages == {"sft", "grpo"}


def test_arms_that_cannot_be_resolved(tmp_path):
    unknown = {"with": {}, "b": {"grpo.algorithm.kl_cof": 1}}
    with pytest.raises(
        ValueError, match="stage 'grpo': .*algorithm.kl_cof.*did you mean"
    ):
        make_cells(study(arms=unknown), tmp_path)
    same = {"with": {}, "b": {"grpo.algorithm.kl_coef": 0.04}}
    with pytest.raises(ValueError, match="'with' and 'b' resolve to the same config"):
        make_cells(study(arms=same), tmp_path)


def test_stages_that_do_not_chain(tmp_path):
    def stages(**keys):
        return {**TABLE["stages"], "grpo": {"run": "train_grpo.py", "keys": keys}}

    for keys, message in (
        (
            {"model.path": "{stf}"},
            "stage 'grpo': model.path: {stf} is no earlier stage",
        ),
        ({"model.path": "{grpo}"}, "{grpo} is no earlier stage"),
        ({}, "stage 'grpo': model.path is empty: name an earlier stage"),
    ):
        with pytest.raises(ValueError, match=message):
            make_cells(study(stages=stages(**keys)), tmp_path)
    alone = {"a": {"run": "eval"}}
    with pytest.raises(ValueError, match="stage 'a': model.path is empty"):
        make_cells(
            study(stages=alone, measures=["a.pass@1"], arms={"with": {}}), tmp_path
        )
    measured_only = make_cells(
        study(stages=stages(**{"model.path": "elsewhere"})), tmp_path
    )
    assert {cell.stage.name for cell in in_order(measured_only).values()} == {"grpo"}
    keys = {"model.path": "x", "run.on_collapse": "stop"}
    with pytest.raises(ValueError, match="'grpo': run.on_collapse = stop leaves a run"):
        make_cells(study(stages=stages(**keys)), tmp_path)
    assert make_cells(
        study(stages=stages(**{**keys, "run.on_collapse": "end"})), tmp_path
    )
    never = {**STAGES, "grpo": {**STAGES["grpo"], "keys": {"model.path": "{sft}"}}}
    with pytest.raises(
        ValueError, match="chooses among measurements, but run.eval_every"
    ):
        make_cells(study(stages=never), tmp_path)


def test_the_command_refuses_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="study file not found"):
        main(["study", "absent.toml"])
    with monkeypatch.context() as without:
        without.setattr(command, "find_spec", lambda name: None)
        with pytest.raises(
            ModuleNotFoundError, match="a study needs scipy: pip install"
        ):
            main(["study", "absent.toml"])
    Path("a.toml").write_text("question = 'x'\n[")
    with pytest.raises(ValueError, match="a.toml: "):
        main(["study", "a.toml"])
    for words, message in (
        ([], "study needs one file"),
        (["a.toml", "minute=3"], "unknown word minute="),
    ):
        with pytest.raises(ValueError, match=message):
            main(["study", *words])
    assert not Path("studies").exists()


@pytest.mark.parametrize(
    "path", sorted(Path("configs/studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_studies_that_we_ship_can_be_resolved(path, tmp_path, capsys):
    words = [f"out={tmp_path}", f"cells={tmp_path}", "workers=0.5"]
    assert main(["study", str(path), "--plan", *words]) == 0
    said = capsys.readouterr().out
    assert "can be seen" in said and "1 at a time" in said


@pytest.mark.parametrize("page", ["README.md", "docs/studies.md"])
def test_the_studies_on_pages_can_be_resolved(page, tmp_path):
    text = Path(page).read_text("utf-8")
    shown = re.findall(r"```toml\n(question = .*?)```", text, re.DOTALL)
    assert shown
    for one in shown:
        assert make_cells(study_of("shown", tomllib.loads(one)), tmp_path)


# --- running ---------------------------------------------------------------------------------

# Stands in for a training: six steps of PACE seconds, or as many as run.tokens allow at
# prompts / 4 each, a state after each, and numbers that are a function of the config. It goes on
# from its state.
STANDIN = """
import hashlib, json, pathlib, re, signal, sys, time, tomllib
print("began", flush=True)
(text,) = (pathlib.Path(word).read_text() for word in sys.argv if word.endswith("study.toml"))
config = tomllib.loads(text)
for word in sys.argv:
    if word.startswith(("run.", "optim.")):
        key, value = word.split("=")
        section, name = key.split(".")
        config[section][name] = float(value)
        text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
place = pathlib.Path(config["run"]["directory"]) / config["run"]["name"]
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
(place / "config.toml").write_text(text)
tokens = config["grpo"]["prompts"] / 4 if "grpo" in config else 4.0
steps = int(-(-config["run"]["tokens"] // tokens)) or 6
if config["optim"]["lr"] == 0.5:
    sys.exit("error: it came apart")
state = place / "state"
done = int(state.read_text() or 0) if state.exists() else 0
end = place / f"checkpoints/step-{steps if config['run']['tokens'] else config['run']['steps']}"
if end.exists():
    sys.exit("error: it has done its steps")
for step in range(done, steps):
    time.sleep(PACE)
    known = f"{config['optim']['lr']} {config['run']['seed']} {step}"
    digest = hashlib.sha256(known.encode()).digest()
    lines = (place / "metrics.jsonl").read_text().splitlines() if step else []
    line = {"step": step + 1, "loss": digest[0] / 256, "tokens": tokens, "seconds": 0.02}
    if step % 2:
        line["far"] = digest[1] / 256
    if config["run"]["save_every"]:
        saved = place / f"checkpoints/step-{step + 1}"
        saved.mkdir(parents=True, exist_ok=True)
        (saved / "trainer.json").write_text("{}")
        line["heldout/pass@1"] = (step + 1) * tokens / 100
    lines = lines[:step] + [json.dumps(line)]
    (place / "metrics.jsonl").write_text("".join(line + "\\n" for line in lines))
    scratch = place / "scratch"
    scratch.write_text(str(step + 1))
    scratch.rename(state)
    if asked and step < steps - 1:
        sys.exit("stopped")
known = f"{config['optim']['lr']} {config['run']['seed']}"
digest = hashlib.sha256(known.encode()).digest()
empty = dict.fromkeys(("question", "gold", "text", "answer"), "")
rows = [{**empty, "step": steps, "problem": f"p{i}", "labels": {"family": i % 3}, "sample": 0,
         "right": digest[1 + i] > 100 + 99 * config["optim"]["lr"]} for i in range(30)]
(place / "heldout.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
end.mkdir(parents=True, exist_ok=True)
(end / "trainer.json").write_text("{}")
time.sleep(2.5 * PACE)
if asked:
    sys.exit("stopped")
"""


PACE = 0.02  # of those that are interrupted


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Studies of stand-ins: stand_in(**changed) -> (study, cells, pool)."""
    script = tmp_path / "train.py"
    script.write_text(STANDIN.replace("PACE", "0"))
    for name in ("train_sft.py", "train_grpo.py"):
        program = RUNS[name]._replace(words=(str(script),))
        monkeypatch.setitem(RUNS, name, program)
    monkeypatch.setattr(pools, "PAUSE", 0.01)

    def make(place: str = "cells", workers: int = 2, pace: float = 0.0, **changed):
        if pace:
            script.write_text(STANDIN.replace("PACE", str(pace)))
        arms = {
            "with": {},
            "low": {"grpo.optim.lr": 1e-5},
            "high": {"grpo.optim.lr": 0.9},
        }
        made = study(**{"seeds": [0, 1, 2], "arms": arms, **changed})
        directory = tmp_path / place
        said: list[str] = []
        return (
            made,
            make_cells(made, directory),
            Pool(directory, workers, said.append),
            said,
        )

    return make


def results_of(made, chains, pool) -> str:
    # The names of cells do not depend on the place, nor do any numbers.
    return as_json(collect(made, chains, pool))


def test_a_study_runs_by_itself(stand_in):
    made, chains, pool, said = stand_in()
    pool.run(in_order(chains))
    assert all(map(pool.is_done, in_order(chains).values())) and len(said) == 10
    assert said[-1].startswith("[10/10] grpo-") and "0 running" in said[-1]
    table = json.loads(results_of(made, chains, pool))
    assert set(table["measures"]["grpo.heldout/pass@1"]["differences"]) == {
        "low",
        "high",
    }
    assert table["cells"]["low, seed 2"]["grpo"]["state"] == "done"
    before = {p: p.stat().st_mtime_ns for p in pool.directory.rglob("state")}
    pool.run(in_order(chains))
    assert {p: p.stat().st_mtime_ns for p in pool.directory.rglob("state")} == before


def test_a_failed_cell_stays_in_the_table_and_stops_nothing(stand_in):
    arms = {"with": {}, "broken": {"grpo.optim.lr": 0.5}}
    made, chains, pool, said = stand_in(arms=arms)
    pool.run(in_order(chains))
    results = collect(made, chains, pool)
    assert "failed: it came apart" in "".join(said)
    assert "| broken | 0 | – |" in as_table(results) and "it came apart" in as_table(
        results
    )
    assert len(results.scores["grpo.heldout/pass@1"]) == 3


def test_a_failed_parent_ends_its_children(stand_in):
    stages = {
        **TABLE["stages"],
        "sft": {"run": "train_sft.py", "keys": {"optim.lr": 0.5}},
    }
    made, chains, pool, said = stand_in(stages=stages)
    pool.run(in_order(chains))
    states = collect(made, chains, pool).states
    assert {s["state"] for s in states.values()} == {"failed"}
    assert any(s["reason"].endswith(" failed") for s in states.values())


def test_interrupted_at_random_moments_it_ends_with_the_same_bytes(stand_in):
    made, chains, pool, _ = stand_in("whole", pace=PACE)
    pool.run(in_order(chains))
    whole = results_of(made, chains, pool)
    made, chains, pool, _ = stand_in("parts", pace=PACE)
    rng = random.Random(0)
    for _ in range(10):
        timer = threading.Timer(
            rng.uniform(0.05, 0.4), signal.raise_signal, [signal.SIGINT]
        )
        timer.start()
        try:
            pool.run(in_order(chains))
        except KeyboardInterrupt:
            continue
        finally:
            timer.cancel()
    pool.run(in_order(chains))
    assert results_of(made, chains, pool) == whole


def test_a_cell_of_a_runner_that_is_gone_is_not_started_twice(stand_in, monkeypatch):
    made, chains, pool, _ = stand_in(workers=1, pace=PACE)
    cell = next(iter(in_order(chains).values()))
    monkeypatch.setattr(pools, "die_with_parent", lambda: None)
    (orphan,) = pool._start(cell)
    assert not pool._start(cell)
    orphan.process.wait()
    pools.os.close(orphan.lock)
    assert not pool._start(cell) and pool.is_done(cell)  # all was there but its exit
    again = next(c for c in in_order(chains).values() if c is not cell)
    (second,) = pool._start(again)
    second.process.wait()
    pool._end(second)
    assert pool.is_done(again)


def test_it_ends_in_time(stand_in):
    made, chains, pool, _ = stand_in(workers=1, pace=PACE)
    pool.deadline = time.monotonic() + 0.5
    pool.run(in_order(chains))
    assert time.monotonic() < pool.deadline + 5
    states = [pool.state(cell) for cell in in_order(chains).values()]
    assert {} in states  # some are left
    pool.deadline = math.inf
    pool.run(in_order(chains))
    assert all(map(pool.is_done, in_order(chains).values()))


def test_more_seeds_cost_only_themselves(stand_in):
    made, chains, pool, said = stand_in(seeds=[0, 1])
    pool.run(in_order(chains))
    made, chains, pool, said = stand_in(seeds=[0, 1, 2])
    pool.run(in_order(chains))
    assert len(said) == 3


# --- cells that wait for others -------------------------------------------------------------


def test_equal_tokens(stand_in):
    """The arms go on until they have sampled what the baseline's run of their seed has."""
    arms = {
        "with": {},
        "half": {"grpo.grpo.prompts": 8},
        "much": {"grpo.grpo.prompts": 40},
    }
    made, chains, pool, _ = stand_in(arms=arms, seeds=[0, 1], budget="tokens")
    pool.run(in_order(chains))
    results = collect(made, chains, pool)
    assert results.costs["with"]["tokens sampled"] == 24  # six steps of four
    assert (
        results.costs["half"] | {"tokens sampled": 24, "updates": 12}
        == results.costs["half"]
    )
    # A step is the least that can be added
    assert results.costs["much"]["tokens sampled"] == 30
    assert list(warnings(results)) == [
        "not the updates of with: half (x 2.00), much (x 0.50)",
        "not the tokens sampled of with: much (x 1.25)",
    ]
    table = as_table(results)
    assert re.search(r"half: run.tokens = 24, as grpo-\w+ \(seed 0\)", table)
    assert "24 (x 1.00) |" in table and "30 (x 1.25) |" in table
    names = {name: pool.state(cell) for name, cell in in_order(chains).items()}
    again = make_cells(made, pool.directory)
    assert names.keys() == in_order(again).keys()


def test_a_run_that_tokens_ended_was_about_to_end(stand_in):
    arms = {"with": {}, "half": {"grpo.grpo.prompts": 8}}
    made, chains, pool, _ = stand_in(arms=arms, seeds=[0], budget="tokens")
    pool.run(in_order(chains))
    before = results_of(made, chains, pool)
    cell = chains["half", 0]["grpo"]
    (
        pool.directory / cell.name / "cell.json"
    ).unlink()  # it was killed before it was noted
    pool = Pool(pool.directory, 1, print)
    pool.run(in_order(chains))
    assert results_of(made, chains, pool) == before


def test_later_stages_start_where_a_score_was_reached(stand_in):
    """Four tokens a step are 0.04 a step: 0.1 after three steps; twice as many, after two."""
    arms = {
        "with": {},
        "fast": {"grpo.grpo.prompts": 32},
        "slow": {"grpo.grpo.prompts": 4},
    }
    again = {**STAGES["after"], "keys": {"model.path": "{grpo}", "optim.lr": 1e-5}}
    made, chains, pool, _ = stand_in(
        arms=arms,
        seeds=[0],
        stages={**STAGES, "again": again},
        measures=["after.heldout/pass@1", "again.heldout/pass@1"],
    )
    pool.run(in_order(chains))
    started = {
        arm: read_run(pool.directory / chains[arm, 0]["after"].name).config[
            "model.path"
        ]
        for arm in ("with", "fast")
    }
    assert started["with"].endswith("/checkpoints/step-3")
    assert started["fast"].endswith("/checkpoints/step-2")
    table = as_table(collect(made, chains, pool))
    assert re.search(
        r"with: step 3 of grpo-\w+, heldout/pass@1 0.12 for 0.1 \(seed 0\)", table
    )
    assert "never reached 0.1: its best was 0.06, after step 6" in table


def test_later_stages_start_as_near_to_the_baseline_as_can_be(stand_in):
    arms = {"with": {}, "fast": {"grpo.grpo.prompts": 20}}
    rule = {"measure": "heldout/pass@1", "near": "grpo"}
    stages = {**STAGES, "grpo": {**STAGES["grpo"], "checkpoint": rule}}
    made, chains, pool, _ = stand_in(
        arms=arms, seeds=[0], stages=stages, measures=["after.heldout/pass@1"]
    )
    pool.run(in_order(chains))
    for arm, step in (("with", 6), ("fast", 5)):  # 0.25 for 0.24
        config = read_run(pool.directory / chains[arm, 0]["after"].name).config
        assert config["model.path"].endswith(f"/checkpoints/step-{step}")


@pytest.mark.parametrize(
    ("scores", "last", "step"), [([0.1, 0.3, 0.3], 0.3, 3), ([0.5, 0.2, 0.8], 0.4, 1)]
)
def test_the_nearest_checkpoint(tmp_path, scores, last, step):
    """Of equally near ones the last; none that was not saved."""
    for name, values in (("run", scores), ("base", [0.9, last])):
        place = tmp_path / name
        for n, value in enumerate(values, 1):
            (place / f"checkpoints/step-{n}").mkdir(parents=True)
            (place / f"checkpoints/step-{n}/trainer.json").write_text("{}")
            with open(place / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": n, "heldout/pass@1": value}) + "\n")
        (place / "config.toml").write_text("[grpo]\n")
    cells = tuple(types.SimpleNamespace(name=name) for name in ("run", "base"))
    rule = {"measure": "heldout/pass@1", "near": "base"}
    assert found(Late("checkpoint", "", cells, rule), tmp_path)[0] == step
    (tmp_path / f"run/checkpoints/step-{step}/trainer.json").unlink()
    assert found(Late("checkpoint", "", cells, rule), tmp_path)[0] == 2


def test_every_arm_has_its_own_best(stand_in):
    """Of rates that the stand-in solves fewer problems with, the lowest; runs of other seeds."""
    stages = {**TABLE["stages"], "last": {"run": "train_grpo.py"}}
    stages["last"]["keys"] = {"model.path": "{grpo}", "heldout.split": "test"}
    arms = {"with": {}, "many": {"grpo.grpo.prompts": 32}}
    made, chains, pool, _ = stand_in(
        arms=arms, seeds=[0], stages=stages, best=BEST, measures=["last.heldout/pass@1"]
    )
    cells = in_order(chains)
    assert sum(cell.stage.name == "grpo" for cell in cells.values()) == 2 * (1 + 3 * 2)
    pool.run(cells)
    table = as_table(collect(made, chains, pool))
    for arm in arms:
        rate = read_run(pool.directory / chains[arm, 0]["grpo"].name).config["optim.lr"]
        shown = re.search(
            rf"{arm}: optim.lr = (\S+) of 1e-05: (\S+), 0.3: (\S+), 0.9: (\S+) ", table
        )
        means = [float(text) for text in shown.groups()[1:]]
        assert rate == float(shown[1]) == BEST["values"][means.index(max(means))]
    assert ("the last one tried" in table) == ("optim.lr = 0.3 of" not in table)


def test_what_chooses_is_not_what_is_reported(tmp_path):
    with pytest.raises(ValueError, match="seed 7 is one of the study's"):
        study(best=BEST, seeds=[7], measures=["sft.loss"])
    with pytest.raises(ValueError, match="by the headline 'grpo.heldout/pass@1'"):
        study(best=BEST)
    same = {**BEST, "measure": "grpo.heldout/pass@1/family=maths"}
    with pytest.raises(ValueError, match="on the problems of the headline"):
        make_cells(study(best=same), tmp_path)


def test_a_command_and_what_it_wrote(stand_in, tmp_path, monkeypatch):
    """Any command of nanomath may be a stage: its numbers are read from its JSON files."""
    script = tmp_path / "drift.py"
    script.write_text(
        "import json, sys\n"
        "base, tuned, out, top = sys.argv[-4:]\n"
        "found = {'kl': {'maths': [0.25, len(base.split('sft-'))]}, 'top': top}\n"
        "found['odd'] = None if '/grpo-' not in tuned else float('nan')\n"
        "open(out.removeprefix('out='), 'w').write(json.dumps(found))\n"
    )
    monkeypatch.setattr(pools, "NANOMATH", (str(script),))
    drift = {
        "run": "drift",
        "arguments": ["{sft}", "{grpo}", "out={here}/drift.json"],
        "keys": {"top": 5},
    }
    stages = {**TABLE["stages"], "drift": drift}
    made, chains, pool, _ = stand_in(
        stages=stages,
        seeds=[0],
        measures=["drift.kl.maths.0", "drift.kl.maths.1", "drift.odd"],
    )
    pool.run(in_order(chains))
    scores = collect(made, chains, pool).scores
    assert scores["drift.kl.maths.0"]["with", 0] == {"": 0.25}
    assert scores["drift.kl.maths.1"]["low", 0] == {"": 2.0}
    assert scores["drift.odd"] == {}
    assert "| low | 0 | – |" in as_table(collect(made, chains, pool))
    with pytest.raises(ValueError, match="no number 'kl'.*mean kl.maths.[01], kl.ma"):
        measured(run_of(pool.directory / chains["with", 0]["drift"].name), "kl")


# --- several runners, and what goes wrong ---------------------------------------------------


def test_two_runners_share_the_cells(stand_in):
    """Each starts what the other has not, none is run twice, and both end with all of it."""
    made, chains, pool, _ = stand_in(workers=1, pace=PACE)
    cells = in_order(chains)
    other = multiprocessing.get_context("fork").Process(target=pool.run, args=(cells,))
    other.start()
    pool.run(cells)
    other.join()
    assert other.exitcode == 0 and all(map(pool.is_done, cells.values()))
    for name in cells:
        assert (pool.directory / name / "log.txt").read_text().count("began") == 1


def test_a_run_that_a_collapse_ended_was_about_to_end(tmp_path):
    """Its runner was killed before it could write down that the run is done."""
    cell = types.SimpleNamespace(name="grpo-1")
    place = tmp_path / cell.name
    (place / "checkpoints/step-60").mkdir(parents=True)
    (place / "checkpoints/step-60/trainer.json").write_text("{}")
    lines = [
        {"step": n, "pass@1": 0.5 * (n < 30), "kl": 0.02 + 0.2 * (n >= 30)}
        for n in range(1, 61)
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for how, done in (("end", True), ("warn", False)):
        (place / "config.toml").write_text(
            f'[run]\nsteps = 99\non_collapse = "{how}"\n[grpo]\n'
        )
        assert Pool(tmp_path, 1, print)._was_about_to_end(cell) == done


def test_a_study_goes_on_with_what_another_runner_left(stand_in, monkeypatch):
    """Of a runner that is gone the cell is free again."""
    made, chains, pool, _ = stand_in(workers=1, pace=PACE, seeds=[0])
    cells = in_order(chains)
    sft = next(iter(cells.values()))
    (theirs,) = pool._start(sft)
    timer = threading.Timer(0.05, theirs.process.kill)
    timer.start()
    monkeypatch.setattr(pools.os, "close", closed_too(theirs.lock, pools.os.close))
    Pool(pool.directory, 1, print).run(cells)
    assert all(map(pool.is_done, cells.values()))


def closed_too(lock: int, close):
    """The close of files, which at first closes the lock of a runner that is gone."""
    left = [lock]
    return lambda file: [close(one) for one in (file, *[left.pop() for _ in left[:1]])]


def test_a_full_disk_stops_the_study_and_what_runs(stand_in, monkeypatch):
    made, chains, pool, _ = stand_in(pace=PACE)

    def full(path, text):
        if path.name == "cell.json":
            raise OSError(28, "No space left on device", str(path))
        path.write_text(text)

    monkeypatch.setattr(pools, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        pool.run(in_order(chains))
    monkeypatch.undo()
    assert not any(pool.state(cell) for cell in in_order(chains).values())


def test_a_measure_that_no_stage_makes_is_found_with_the_first_cell(stand_in):
    made, chains, pool, said = stand_in(measures=["grpo.lost"])
    pool.check = lambda cell: check_measures(made, cell, pool.directory)
    with pytest.raises(ValueError, match="no metric 'lost' in .*did you mean loss, "):
        pool.run(in_order(chains))
    assert len(said) < 5


def test_a_disk_that_is_too_small(stand_in, monkeypatch):
    made, chains, pool, _ = stand_in()
    pool.directory.mkdir()
    few = types.SimpleNamespace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: few)
    with pytest.raises(
        OSError, match="the cells need about .* MB, .*cells has 0 MB left"
    ):
        check_room(in_order(chains), pool)


# --- what it found ---------------------------------------------------------------------------


def test_arms_that_cost_more_are_named(stand_in):
    arms = {"with": {}, "four": {"grpo.algorithm.epochs": 4}}
    made, chains, pool, _ = stand_in(arms=arms)
    pool.run(in_order(chains))
    results = collect(made, chains, pool)
    assert list(warnings(results)) == ["not the updates of with: four (x 4.00)"]
    assert "with: four (x 4.00)" in as_table(results)


@pytest.mark.parametrize(("wanted", "there"), [(1, 1), (2, 2), (5, 2), (3, 3)])
def test_few_seeds_are_said_to_be_few(stand_in, wanted, there):
    """Of a study that is half done, too."""
    made, chains, pool, _ = stand_in(seeds=list(range(wanted)))
    pool.run(in_order({key: chain for key, chain in chains.items() if key[1] < there}))
    table = as_table(collect(made, chains, pool))
    few = "With fewer than 3 seeds an arm says nothing about the method"
    assert (few in table) == (there < 3)
    assert ("Bands of arms" in table) == (there >= 3)


def test_numbers_of_whole_runs(stand_in):
    measures = [
        "grpo.loss",
        "grpo.loss:area",
        "grpo.loss:to=0.9",
        "grpo.heldout/pass@1",
    ]
    made, chains, pool, _ = stand_in(measures=measures, cluster="family")
    pool.run(in_order(chains))
    results = collect(made, chains, pool)
    run = read_run(pool.directory / chains["low", 1]["grpo"].name)
    values = run.series["loss"][1]
    assert results.scores["grpo.loss"]["low", 1] == {"": values[-1]}
    assert results.scores["grpo.loss:area"]["low", 1][""] == pytest.approx(
        sum(values) / 6
    )
    reached = next((i for i, v in enumerate(values, 1) if v >= 0.9), 7)
    assert results.scores["grpo.loss:to=0.9"]["low", 1][""] == reached
    assert {labels["family"] for labels in results.labels.values()} == {0, 1, 2}
    table = as_table(results)
    assert table.count("on new seeds from one sft, by numbers of whole runs") == 3
    assert table.count("on new problems and new seeds from one sft. Apart") == 1
    assert table.count("these runs on new problems") == 2  # a line each arm, of pass@1
    with pytest.raises(ValueError, match="no metric 'lost' in .*did you mean loss, "):
        measured(run, "lost")


def test_measures_of_answers(tmp_path):
    """pass@k, maj@k, and those of the problems with a label, problem by problem."""
    right = {"a": [1, 1, 0], "b": [0, 0, 1], "c": [0, 0, 0]}
    rows = [
        {"step": step, "problem": p, "labels": {"family": p < "b", "n": 1}, "sample": i}
        | {"right": bool(ok and step), "answer": "right" if ok else f"wrong {p}"}
        for step in (0, 4)
        for p, every in right.items()
        for i, ok in enumerate(every)
    ]
    (tmp_path / "heldout.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )

    def scores(metric):
        return pytest.approx(measured(run_of(tmp_path), metric)[0])

    assert scores("pass@1") == {"a": 2 / 3, "b": 1 / 3, "c": 0}
    assert scores("heldout/pass@2") == {"a": 1, "b": 2 / 3, "c": 0}
    assert scores("maj@3") == {"a": 1, "b": 0, "c": 0}
    assert scores("pass@1/family=False,n=1") == {"b": 1 / 3, "c": 0}
    for metric, message in (
        (
            "pass@1/family=maybe",
            "no problem of .* is such a one; labels are: family, n",
        ),
        ("pass@4", "has 3 samples of a problem"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(run_of(tmp_path), metric)


def test_a_difference_of_two_stages(stand_in):
    """Problem by problem; numbers of whole runs seed by seed."""
    stages = {**TABLE["stages"], "after": STAGES["after"]}
    pairs = ["after.heldout/pass@1 - grpo.heldout/pass@1", "after.loss - grpo.loss"]
    arms = {"with": {}, "low": {"after.optim.lr": 1e-5}}
    made, chains, pool, _ = stand_in(stages=stages, measures=pairs, arms=arms)
    pool.run(in_order(chains))
    results = collect(made, chains, pool)
    for pair, metric in zip(pairs, ("heldout/pass@1", "loss"), strict=True):
        for (arm, seed), chain in chains.items():
            after, before = (
                measured(run_of(pool.directory / chain[stage].name), metric)[0]
                for stage in ("after", "grpo")
            )
            assert results.scores[pair][arm, seed] == {
                name: after[name] - before[name] for name in after
            }
    answers = results.scores[pairs[0]]
    own = statistics.compare(
        np.array([list(answers["low", seed].values()) for seed in range(3)])
    )
    assert results.itself(pairs[0])["low"] == own
    text = as_json(results)
    assert json.loads(text)["measures"][pairs[0]]["itself"]["low"]["mean"] == own.mean
    assert '"itself"' not in results_of(*stand_in()[:3])
    half = own.both
    said = f"({100 * half.low:+.1f} to {100 * half.high:+.1f})"
    assert f"| low | 3 | {100 * own.mean:+.1f} {said} |" in as_table(results)
    assert "what can be seen depends" in sight(
        made, chains["low", 0]["after"], "heldout/pass@1 - grpo.heldout/pass@1"
    )


def test_twins_are_paired_by_their_cluster():
    """Two problems of one twin count once, by their mean; what has no twin is left out."""
    english = (
        {"e1": 1.0, "e2": 0.5, "e3": 0.0, "e4": 1.0},
        {"e1": {"twin": "t"}, "e2": {"twin": "t"}, "e3": {"twin": "u"}, "e4": {}},
    )
    japanese = (
        {"j1": 0.25, "j2": 1.0, "j3": 0.5},
        {"j1": {"twin": "t"}, "j2": {"twin": "u"}, "j3": {"twin": "v"}},
    )
    assert less(english, japanese, "twin") == (
        {"t": 0.5, "u": -1.0},
        {"t": {"twin": "t"}, "u": {"twin": "u"}},
    )
    assert less(english, english, "twin")[0] == dict.fromkeys(english[0], 0.0)
    for cluster in ("", "family"):
        with pytest.raises(ValueError, match='expected cluster = "twin"'):
            less(english, japanese, cluster)
    assert less(({}, {}), ({"": 1.0}, {}), "") == ({}, {})  # a number without a value


def test_a_difference_of_one_stage_is_checked_with_its_first_cell(tmp_path):
    pair = ["grpo.heldout/pass@1/family=a - grpo.heldout/pass@1/family=b"]
    cell = make_cells(study(measures=pair), tmp_path)["with", 0]["grpo"]
    place = tmp_path / cell.name
    place.mkdir()
    (place / "config.toml").write_text(cell.text)
    empty = {"question": "", "gold": "", "text": "", "answer": "", "right": True}
    rows = [
        {**empty, "step": 1, "problem": one, "sample": 0, "labels": {"family": one}}
        for one in "ab"
    ]
    (place / "heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match="no cluster in common"):
        check_measures(study(measures=pair), cell, tmp_path)
    (place / "heldout.jsonl").write_text(
        "".join(
            json.dumps({**r, "labels": {**r["labels"], "twin": "t"}}) + "\n"
            for r in rows
        )
    )
    check_measures(study(measures=pair, cluster="twin"), cell, tmp_path)


def test_the_dose_that_halves_the_headline(stand_in):
    doses = {"with": 0, "low": 4, "high": 64}
    made, chains, pool, _ = stand_in(doses=doses)
    pool.run(in_order(chains))
    results = collect(made, chains, pool)
    measure = made.measures[0]
    curves = np.array(
        [
            [np.mean(list(results.scores[measure][a, s].values())) for a in doses]
            for s in range(3)
        ]
    )
    assert results.halving() == statistics.halving_dose([0, 4, 64], curves)
    assert f"{measure} is half of what it is at the least dose at" in as_table(results)
    assert json.loads(as_json(results))["halved at"]["mean"] == results.halving().mean
    assert np.array(results.over_doses()) == pytest.approx(curves)
    drawn = figures.draw(results, pool.directory, pool.directory.parent)
    assert drawn[-2].name == "doses.png"
    assert collect(*stand_in()[:3]).halving() is None
    few = stand_in(doses=doses, seeds=[0, 1])
    assert "How much halves it" not in as_table(collect(*few[:3]))


def test_measures_are_drawn_against_another_at_the_same_steps(stand_in):
    measures = ["grpo.heldout/pass@1", "grpo.loss:area", "grpo.far"]
    made, chains, pool, _ = stand_in(against="grpo.far", measures=measures)
    pool.run(in_order(chains))
    results = collect(made, chains, pool)
    assert results.paths.keys() == {"grpo.loss:area"}  # not of answers, nor itself
    points = {seed: [] for seed in made.seeds}
    for (arm, seed), path in results.paths["grpo.loss:area"].items():
        place = pool.directory / chains[arm, seed]["grpo"].name / "metrics.jsonl"
        lines = [json.loads(line) for line in place.read_text().splitlines()]
        both = [(line["far"], line["loss"]) for line in lines if "far" in line]
        assert path.T.tolist() == [list(pair) for pair in both] and len(both) == 3
        points[seed] += both
    rho = [ranks_agree(*zip(*points[seed], strict=True)) for seed in made.seeds]
    found = results.rank_correlation("grpo.loss:area")
    assert found.mean == pytest.approx(np.mean(rho), abs=1e-12)
    half = 4.302653 * np.std(rho, ddof=1) / math.sqrt(3)  # t of two degrees of freedom
    assert found.headline.high - found.mean == pytest.approx(half, rel=1e-6)
    said = (
        f"rank correlation with grpo.far over all arms and steps is {found.mean:.2f} ("
    )
    assert as_table(results).count(said) == 1
    drawn = figures.draw(results, pool.directory, pool.directory.parent)
    assert {"grpo.loss-area-paths.svg"} < {path.name for path in drawn}
    assert sum("paths" in path.name for path in drawn) == 2
    assert collect(*stand_in(place="other")[:3]).paths == {}
    # No measure is of it.
    unseen = {**TABLE["stages"], "aside": {"run": "train_sft.py"}}
    assert collect(*stand_in(against="aside.nll", stages=unseen)[:3]).paths == {}
    few = stand_in(against="grpo.far", measures=measures, seeds=[0, 1])
    assert "rank correlation" not in as_table(collect(*few[:3]))


def ranks_agree(a, b) -> float:
    """Spearman's correlation of numbers without ties, by its definition."""
    places = [np.argsort(np.argsort(numbers)) for numbers in (a, b)]
    n = len(a)
    return 1 - 6 * float(((places[0] - places[1]) ** 2).sum()) / (n * (n * n - 1))


def test_what_cannot_be_compared_leaves_the_rest(stand_in):
    """One cluster, or no problem in common, gives no interval; all else is written."""
    made, chains, pool, _ = stand_in(measures=["grpo.heldout/pass@1", "grpo.loss"])
    pool.run(in_order(chains))
    found = collect(replace(made, cluster="all"), chains, pool)
    for labels in found.labels.values():
        labels["all"] = "one"
    other = collect(made, chains, pool)
    scores = other.scores["grpo.heldout/pass@1"]
    for (arm, seed), old in list(scores.items()):
        if arm != "with":
            scores[arm, seed] = {f"other {name}": score for name, score in old.items()}
    for results in (found, other):
        assert results.differences("grpo.heldout/pass@1") == {}
        assert set(results.differences("grpo.loss")) == {"low", "high"}
        page = as_table(results)
        assert "and two problems, or clusters, that all runs have." in page


def test_one_answer_a_problem_is_tested_exactly(stand_in):
    """McNemar's test for one seed; with several, seeds are what is tested over."""
    made, chains, pool, _ = stand_in(seeds=[0])
    pool.run(in_order(chains))
    results = collect(made, chains, pool)
    scores = results.scores["grpo.heldout/pass@1"]
    pairs = [(scores["high", 0][p], scores["with", 0][p]) for p in scores["with", 0]]
    only = [pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))]
    exact = mcnemar(*only)
    assert results.differences("grpo.heldout/pass@1")["high"].p == exact < 0.9


def test_over_tasks_only_with_tasks_and_seeds(stand_in):
    for seeds, there in ((range(5), True), (range(3), False)):
        made, chains, pool, _ = stand_in(seeds=list(seeds), tasks="family")
        pool.run(in_order(chains))
        table = as_table(collect(made, chains, pool))
        assert ("Over 3 tasks (label family)" in table) == there
        assert ("P(arm > with)" in table) == there


def test_the_command_writes_its_pages(stand_in, tmp_path, monkeypatch, capsys):
    text = textwrap.dedent(
        """
        question = "Does it?"
        baseline = "with"
        seeds = [0, 1, 2]
        measures = ["grpo.heldout/pass@1", "grpo.loss"]
        [stages.sft]
        run = "train_sft.py"
        seeded = false
        [stages.grpo]
        run = "train_grpo.py"
        keys = { "model.path" = "{sft}" }
        [arms.with]
        [arms.low]
        "grpo.optim.lr" = 1e-5
        [arms.high]
        "grpo.optim.lr" = 0.9
        """
    )
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(text)
    assert main(["study", "mine.toml", "--plan"]) == 0
    assert "10 cells, 10 of them to run" in (before := capsys.readouterr().out)
    assert "unknown until a cell is done" in before
    assert main(["study", "mine.toml", "only=low", "seeds=0"]) == 0
    assert "says nothing about the method" in capsys.readouterr().out
    assert main(["study", "mine.toml"]) == 0
    out = Path("studies/mine")
    for name in (
        "results.json",
        "table.md",
        "study.html",
        "grpo.heldout-pass@1-differences.svg",
    ):
        assert (out / name).stat().st_size > 0
    assert (out / "grpo.loss-curves.png").exists()
    assert "Bands of arms not told apart" in (out / "table.md").read_text()
    assert (
        main(["study", "mine.toml", "minutes=0.0001", "out=other", "cells=others"]) == 1
    )
    assert "are left, the same command goes on" in capsys.readouterr().out
