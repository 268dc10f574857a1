"""Two runs paired, and where two runs part."""

from __future__ import annotations

import random
from itertools import product

import pytest
from made_run import answers, episode, write_run

from nanomath.analysis.compare import (
    differences,
    last_measured,
    mcnemar,
    measured_at,
    paired,
)
from nanomath.analysis.runs import read_run


def test_mcnemar_counts_coins():
    """The chance that n fair coins are at least as uneven, by trying all of them."""
    for b, c in ((0, 0), (1, 0), (3, 1), (2, 5), (6, 6)):
        n = b + c
        sums = [sum(coins) for coins in product((0, 1), repeat=n)]
        uneven = sum(abs(2 * s - n) >= abs(b - c) for s in sums) / 2**n
        assert mcnemar(b, c) == pytest.approx(min(1.0, uneven))


def test_two_runs_on_the_same_problems(tmp_path):
    one = [True, True, False, False, True, False]
    other = [True, False, True, True, True, False]
    a = read_run(
        write_run(tmp_path / "a", heldout=answers(0, other, 2) + answers(5, one, 2))
    )
    b = read_run(write_run(tmp_path / "b", heldout=answers(5, other, 2)))
    result = paired(last_measured(a), last_measured(b))
    assert (result.both, result.only_a, result.only_b, result.neither) == (2, 1, 2, 1)
    assert result.p == mcnemar(1, 2) and result.difference.mean == pytest.approx(1 / 6)
    assert result.difference.low < 0 < result.difference.high
    assert [x["problem"] for x, _ in result.flips] == ["h1", "h2", "h3"]
    assert len(measured_at(a, 0)) == 6 and measured_at(a, 3) == {}


def test_nothing_in_common_is_no_comparison(tmp_path):
    a = answers(0, [True])
    b = [{**record, "problem": "other"} for record in a]
    assert paired({"h0": a}, {"other": b}) is None


METRICS = [{"step": 0, "heldout/pass@1": 0.25}] + [
    {"step": n, "kl": n / 8, "seconds": random.random()} for n in range(1, 5)
]


def two(tmp_path, **changed) -> list[str]:
    """What is said of a run and of one that is the same but for `changed`."""
    whole = {
        "metrics": METRICS,
        "rollouts": [episode(step, 0, k) for step in (1, 2) for k in (0, 1)],
        "heldout": answers(0, [True, False]),
    }
    slower = [{**line, "seconds": 9.0} for line in METRICS]
    one = read_run(write_run(tmp_path / "a", **whole))
    other = read_run(
        write_run(tmp_path / "b", **{**whole, "metrics": slower, **changed})
    )
    return list(differences(one, other))


def test_equal_runs_are_equal_whatever_the_time(tmp_path):
    assert two(tmp_path) == []


def test_config_and_metrics_are_named_first(tmp_path):
    changed = [dict(line) for line in METRICS]
    changed[3]["kl"] += 2**-50
    found = two(tmp_path, config={"algorithm.kl_coef": 0.5}, metrics=changed)
    assert (
        found[0].startswith("config: algorithm.kl_coef is") and "0.5 in B" in found[0]
    )
    assert found[1].startswith(
        "metrics: step 3 is the first that differs: kl 0.375 in A"
    )
    assert len(found) == 2


@pytest.mark.parametrize("shorter", ["metrics", "rollouts"])
def test_a_run_that_ends_before_the_other(tmp_path, shorter):
    whole = {"metrics": METRICS, "rollouts": [episode(1), episode(2)]}
    cut = {"metrics": METRICS[:2], "rollouts": whole["rollouts"][:1]}
    a = read_run(write_run(tmp_path / "a", **whole))
    b = read_run(write_run(tmp_path / "b", **{**whole, shorter: cut[shorter]}))
    assert list(differences(a, b)) == [f"{shorter}: B ends before step 2"]
    assert list(differences(b, a)) == [f"{shorter}: A ends before step 2"]


def test_a_held_out_answer(tmp_path):
    (found,) = two(tmp_path, heldout=answers(0, [True, True]))
    assert found.startswith(
        "held-out: step 0, problem h1, sample 0 is the first that differs"
    )


def test_a_held_out_answer_that_one_run_lacks(tmp_path):
    every = [*answers(0, [True, False]), *answers(2, [True, True])]
    a = read_run(write_run(tmp_path / "a", heldout=every))
    b = read_run(write_run(tmp_path / "b", heldout=every[:2]))
    assert list(differences(a, b)) == ["held-out: B ends before step 2"]
    assert list(differences(b, a)) == ["held-out: A ends before step 2"]


def rollouts_with(record: dict, **changed) -> list[dict]:
    rows = [episode(step, 0, k) for step in (1, 2) for k in (0, 1)]
    return [{**row, **changed} if row == record else row for row in rows]


def test_the_same_tokens_with_other_logprobs(tmp_path):
    record = episode(2, 0, 0)
    ulp = [*record["logprobs"]]
    ulp[3] += 6e-8
    (found,) = two(tmp_path, rollouts=rollouts_with(record, logprobs=ulp))
    assert "step 2, prompt 0, sample 0" in found and "from token 3 on" in found
    assert found.endswith("rounding")
    ulp[3] += 0.5
    (found,) = two(tmp_path / "more", rollouts=rollouts_with(record, logprobs=ulp))
    assert found.endswith("other weights")


def test_the_first_token_with_the_probability_each_run_gave(tmp_path):
    record = episode(2, 0, 1)
    tokens = [*record["tokens"]]
    tokens[4] = record["tokens"][5]
    (found,) = two(tmp_path, rollouts=rollouts_with(record, tokens=tokens))
    assert "token 4: A drew " in found and "with probability 0.7788" in found
    assert found.endswith("a draw near a boundary")
    moved = [x - 0.1 for x in record["logprobs"]]
    (found,) = two(
        tmp_path / "more", rollouts=rollouts_with(record, tokens=tokens, logprobs=moved)
    )
    assert found.endswith("other weights")


def test_what_else_can_differ_in_an_episode(tmp_path):
    record = episode(1, 0, 0)
    rewarded = {"accuracy": 0.0, "total": 0.0}
    (found,) = two(tmp_path / "1", rollouts=rollouts_with(record, rewards=rewarded))
    assert "what differs: rewards" in found
    (found,) = two(tmp_path / "2", rollouts=rollouts_with(record, prompt_tokens=[9]))
    assert "other problems or another prompt" in found
    short = {name: record[name][:6] for name in ("tokens", "logprobs")}
    (found,) = two(tmp_path / "3", rollouts=rollouts_with(record, **short))
    assert "token 6: one of the two ends there" in found
