"""What is said of runs, healthy and sick: of each rule one that breaks it, one that does not."""

from __future__ import annotations

import pytest
from made_run import answers, episode, write_run

from nanomath.analysis.diagnosis import diagnose
from nanomath.analysis.runs import read_run

HEALTHY = {
    "reward": 0.5,
    "pass@1": 0.5,
    "flat_groups": 0.2,
    "all_right": 0.1,
    "all_wrong": 0.1,
    "kl": 0.01,
    "entropy": 0.5,
    "length": 30.0,
    "truncated": 0.0,
    "update_ratio": 0.001,
    "gap_mean": 1e-6,
    "effective_samples": 0.999,
}


def lines(steps: int = 30, **last) -> list[dict]:
    """Metrics that rise a little, with `last` from the last third on."""
    return [
        {
            "step": n + 1,
            **HEALTHY,
            "pass@1": 0.5 + 0.001 * n,
            **(last if 3 * n > 2 * steps else {}),
        }
        for n in range(steps)
    ]


def said(tmp_path, **files) -> dict[str, str]:
    """The sentences about a run, each with its level."""
    run = read_run(write_run(tmp_path / "a", **{"metrics": lines(), **files}))
    return {finding.text: finding.level for finding in diagnose(run)}


def one(found: dict[str, str], words: str) -> str:
    (level,) = [level for text, level in found.items() if words in text]
    return level


def test_a_healthy_run_has_nothing_bad(tmp_path):
    groups = [episode(step, 0, k) for step in (1, 2) for k in range(4)]
    found = said(tmp_path, rollouts=groups)
    assert set(found.values()) == {"note"}


def test_nothing_logged(tmp_path):
    assert said(tmp_path, metrics=[]) == {"Nothing has been logged yet.": "note"}


@pytest.mark.parametrize(
    ("after", "level", "words"),
    [
        ([True] * 30 + [False] * 10, "good", "it learned"),
        ([False] * 40, "bad", "it got worse"),
        ([True] * 11 + [False] * 29, "warning", "no change can be seen"),
    ],
)
def test_learning_is_claimed_by_pairs(tmp_path, after, level, words):
    before = [True] * 10 + [False] * 30
    measured = [
        {"step": 0, "heldout/pass@1": 0.25},
        *lines(),
        {"step": 30, "heldout/pass@1": sum(after) / 40},
    ]
    found = said(
        tmp_path, metrics=measured, heldout=answers(0, before) + answers(30, after)
    )
    assert one(found, words) == level


def test_without_answers_no_interval(tmp_path):
    measured = [{"step": n, "heldout/pass@1": n / 30} for n in (0, 30)]
    assert (
        one(said(tmp_path, metrics=[*measured, *lines()]), "so no interval") == "note"
    )


def test_advantages_that_point_the_wrong_way(tmp_path):
    rows = [episode(step, 0, k) for step in (1, 2, 3) for k in range(4)]
    turned = [{**row, "advantages": [-x for x in row["advantages"]]} for row in rows]
    found = said(tmp_path, rollouts=turned)
    assert (
        one(found, "Advantages point the wrong way: in 3 of 3 logged groups") == "bad"
    )


@pytest.mark.parametrize(
    ("last", "words", "level"),
    [
        ({"update_ratio": 0.08}, "is too high", "bad"),
        ({"effective_samples": 0.4}, "counted as 40% of their number", "warning"),
        ({"gap_mean": 0.02}, "in float32 that is no rounding", "bad"),
        ({"flat_groups": 0.8, "all_right": 0.7}, "problems are too easy", "warning"),
        ({"flat_groups": 0.8, "all_wrong": 0.7}, "problems are too hard", "warning"),
        (
            {"flat_groups": 0.8, "all_wrong": 0.7, "truncated": 0.5},
            "problems are too long (45% of the completions were cut)",
            "warning",
        ),
        ({"entropy": 0.01}, "hardly explores", "warning"),
        ({"entropy": 2.0}, "came apart", "bad"),
        ({"truncated": 0.3}, "30% of the training completions were cut", "warning"),
        ({"kl": 9.0}, "ended at 9.000 nats", "bad"),
    ],
)
def test_what_the_numbers_say(tmp_path, last, words, level):
    config = {"model.dtype": "float32", "model.path": "runs/tiny-sft"}
    found = said(tmp_path, metrics=lines(**last), config=config)
    assert one(found, words) == level


@pytest.mark.parametrize(
    ("config", "said_so"),
    [
        ({"grpo.source": "policy", "grpo.solutions": False}, True),
        ({"grpo.source": "teacher", "grpo.solutions": False}, False),
        ({"grpo.source": "policy", "grpo.solutions": True}, False),
    ],
)
def test_samples_may_be_meant_to_be_of_another(tmp_path, config, said_so):
    numbers = lines(gap_mean=0.02, effective_samples=0.4)
    found = said(tmp_path, metrics=numbers, config={"model.dtype": "float32"} | config)
    assert ("in float32 that is no rounding" in str(found)) == said_so
    assert ("counted as 40%" in str(found)) == said_so


@pytest.mark.parametrize(
    ("baseline", "samples", "said_so"),
    [
        ("group", "all", True),
        ("off", "right", False),
        ("value", "all", False),
        ("off", "pair", True),
    ],
)
def test_groups_that_nothing_is_compared_in(tmp_path, baseline, samples, said_so):
    numbers = lines(flat_groups=0.8, all_right=0.7)
    config = {"algorithm.baseline": baseline, "algorithm.samples": samples}
    found = said(tmp_path, metrics=numbers, config=config)
    assert ("of the groups taught nothing" in str(found)) == said_so


@pytest.mark.parametrize(
    ("moved", "after", "said_so"),
    [
        (0.013, [False] * 40, True),
        (0.002, [False] * 40, False),
        (0.013, [True] * 20 + [False] * 20, False),  # it learned
    ],
)
def test_a_rate_at_which_it_got_worse_is_named(tmp_path, moved, after, said_so):
    measured = [
        {"step": 0, "heldout/pass@1": 0.25},
        *lines(update_ratio=moved),
        {"step": 30, "heldout/pass@1": sum(after) / 40},
    ]
    found = said(
        tmp_path,
        metrics=measured,
        heldout=answers(0, [True] * 10 + [False] * 30) + answers(30, after),
        config={"model.path": "runs/tiny-sft", "optim.lr": 1.5e-3},
    )
    words = (
        "moved the weights by 1.3% of their size (step 22; 0.1% is usual): try a tenth"
    )
    assert any(f"{words} of optim.lr = 0.0015." in text for text in found) == said_so


def test_completions_that_learned_to_fit_the_limit(tmp_path):
    tight = {"sampling.max_new_tokens": 36}
    first = {**HEALTHY, "step": 0, "truncated": 0.48, "length": 33.0}
    found = said(tmp_path / "1", metrics=[first, *lines(length=12.0)], config=tight)
    assert (
        one(found, "At first 48% of the completions were cut, now 0%, and") == "warning"
    )
    assert any("sampling.max_new_tokens = 36 was rewarded" in text for text in found)
    for name, last in (
        ("2", {"length": 30.0}),
        ("3", {"length": 9.0, "truncated": 0.1}),
    ):
        found = said(tmp_path / name, metrics=[first, *lines(**last)], config=tight)
        assert not any("At first" in text for text in found)


def test_another_language_than_before(tmp_path):
    measured = [
        {"step": 0, "heldout/language/ja": 0.95, "heldout/language/mixed": 0.0},
        *lines(),
        {"step": 30, "heldout/language/ja": 0.4, "heldout/language/mixed": 0.1},
    ]
    found = [text for text in said(tmp_path, metrics=measured) if "share of" in text]
    assert found == [
        "The share of held-out completions in Japanese went from 95% to 40%."
    ]


def test_answers_that_lost_their_mark(tmp_path):
    measured = [
        {"step": 0, "heldout/no_answer": 0.0},
        *lines(),
        {"step": 30, "heldout/no_answer": 0.6},
    ]
    for lenient in (True, False):
        found = said(
            tmp_path / str(lenient),
            metrics=measured,
            config={"reward.lenient": lenient},
        )
        words = "went from 0% to 60%: reward.lenient pays for them"
        assert any(words in text for text in found) == lenient


def test_samples_of_a_cut_distribution(tmp_path):
    cut = {"sampling.top_k": 50, "algorithm.sampler_correction": "off"}
    assert (
        one(said(tmp_path / "1", config=cut), "drawn with sampling.top_k = 50") == "bad"
    )
    corrected = cut | {"algorithm.sampler_correction": "truncate"}
    assert not [t for t in said(tmp_path / "2", config=corrected) if "drawn with" in t]


def test_alarms_are_repeated_and_a_hacked_prm_is_shown(tmp_path):
    alarm = {
        "step": 20,
        "alarm": "hacked",
        "text": "PRM reward rises while accuracy falls",
    }
    steps = {"step_ends": [2, 5], "step_scores": [0.9, 0.8]}
    rows = [episode(9, 1, k, **steps, step_rewards=[0.1 * k, 0.2]) for k in range(4)]
    run = read_run(
        write_run(tmp_path / "a", metrics=lines(), alarms=[alarm], rollouts=rows)
    )
    found = diagnose(run)
    assert any("The PRM was hacked" in f.text and f.step == 20 for f in found)
    (shown,) = [f for f in found if f.episode]
    assert shown.episode == (9, 1, 3) and "paid 0.50 for 2 steps" in shown.text


def test_it_says_when_learning_ended(tmp_path):
    rising = [
        {**line, "pass@1": min(0.8, 0.2 + 0.03 * n)} for n, line in enumerate(lines(60))
    ]
    (text,) = [t for t in said(tmp_path, metrics=rising) if "stopped rising" in t]
    assert 15 <= int(text.split()[-1].rstrip(".")) <= 30


def test_overfitting(tmp_path):
    measured = [
        {"step": n, "nll": 3 - 0.1 * n, "heldout/loss": 1 + 0.1 * abs(n - 5)}
        for n in range(12)
    ]
    assert one(said(tmp_path, metrics=measured), "lowest after step 5") == "warning"


@pytest.mark.parametrize(("auc", "level"), [(0.9, "good"), (0.55, "warning")])
def test_a_process_reward_model(tmp_path, auc, level):
    measured = [
        {"step": n, "heldout/auc": a, "heldout/f1": a - 0.3}
        for n, a in ((0, 0.5), (9, auc))
    ]
    words = f"AUC went from 0.50 to {auc:.2f} (0.5 is chance)"
    assert one(said(tmp_path, metrics=measured), words) == level


def test_the_worst_comes_first(tmp_path):
    run = read_run(
        write_run(tmp_path / "a", metrics=lines(update_ratio=0.5, truncated=0.5))
    )
    levels = [finding.level for finding in diagnose(run)]
    order = {"bad": 0, "warning": 1, "good": 2, "note": 3}
    assert levels == sorted(levels, key=order.get) and levels[0] == "bad"
