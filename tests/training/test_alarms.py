"""Alarms: they sound when a curve goes wrong, and hardly ever when it only wavers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.training.alarms import (
    QUIET,
    WINDOW,
    collapse,
    flat_groups,
    hacked,
    kl_jump,
    lasting,
    lasts,
    new_alarms,
    no_format,
    sounding,
)

Curve = Callable[[int], float]


def lines(steps: int, **curves: Curve) -> list[dict[str, float]]:
    """Metrics lines of steps 1, 2, ... from functions of the step; names are spelt as in the
    log.
    """
    names = {"accuracy": "pass@1", "format": "reward/format", "prm": "reward/prm"}
    return [
        {"step": n, **{names.get(k, k): curve(n) for k, curve in curves.items()}}
        for n in range(1, steps + 1)
    ]


def ramp(*corners: tuple[int, float]) -> Curve:
    return lambda n: float(np.interp(n, *zip(*corners, strict=True)))


def sampled(rng: np.random.Generator, samples: int, rate: Curve) -> Curve:
    """What is measured of a rate with so many samples a step."""
    return lambda n: rng.binomial(samples, rate(n)) / samples


def noisy(rng: np.random.Generator, width: float, curve: Curve) -> Curve:
    return lambda n: curve(n) * rng.lognormal(0, width)


def said(history: list[dict]) -> list[tuple[int, str]]:
    """Every alarm of a run, with the step it began at, as the loop hears them."""
    last: dict[str, int] = {}
    heard = []
    for n in range(1, len(history) + 1):
        new = new_alarms(history[:n], last)
        last |= dict.fromkeys(new, n)
        heard += [(n, name) for name in new]
    return heard


# --- collapse --------------------------------------------------------------------------------

FALL = ramp((1, 0.15), (60, 0.30), (80, 0.05), (120, 0.05))


def test_one_unlikely_token_hides_no_collapse():
    """The k3 estimate of one step, in the best window, may be a million times any other."""
    rise = ramp((1, 0.0), (60, 0.05), (80, 0.6))
    history = lines(120, accuracy=FALL, kl=lambda n: 2534.2 if n == 58 else rise(n))
    assert collapse(history).endswith("while kl rose from 0.047 to 0.600")
    assert 62 < lasting(history, "collapse") < 75 and lasts(history, "collapse")
    assert lasting(history[:60], "collapse") is None and not lasts([], "collapse")


@pytest.mark.parametrize("samples", [16, 128, 512])
@pytest.mark.parametrize("rises", ["kl", "repetition"])
def test_a_collapse_is_heard_once_and_while_it_lasts(samples, rises):
    rise = ramp((1, 0.0), (60, 0.05), (80, 0.6), (120, 0.6))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        history = lines(
            120, accuracy=sampled(rng, samples, FALL), **{rises: noisy(rng, 0.2, rise)}
        )
        ((step, name),) = (alarm for alarm in said(history) if alarm[1] == "collapse")
        assert 62 < step <= 105


def test_the_words():
    history = lines(
        60,
        accuracy=ramp((40, 0.3), (41, 0.1)),
        kl=ramp((40, 0.02), (41, 0.2)),
        repetition=lambda n: 0.1,
    )
    fall = "collapse: accuracy fell from 30.0% (best, step 10) to 10.0%"
    assert collapse(history) == f"{fall} while kl rose from 0.020 to 0.200"


@pytest.mark.parametrize(
    "curves",
    [
        {
            "accuracy": FALL,
            "kl": lambda n: 0.05,
        },  # harder problems, perhaps: the policy is where it was
        {
            "accuracy": FALL,
            "kl": ramp((1, 1e-4), (120, 5e-3)),
        },  # it has risen, and is still nothing
        {
            "accuracy": ramp((1, 0.2), (120, 0.6)),
            "kl": ramp((1, 0.001), (120, 2.0)),
        },  # the price of learning
        {
            "accuracy": ramp((1, 0.6), (120, 0.5)),
            "kl": ramp((1, 0.001), (120, 2.0)),
        },  # a little less
        {"accuracy": FALL},  # nothing else is known
        {"kl": ramp((1, 0.001), (120, 2.0))},
        {"nll": ramp((1, 2.0), (120, 1.0))},
    ],
)
def test_no_collapse(curves):
    history = lines(120, **curves)
    assert [collapse(history[:n]) for n in range(121) if collapse(history[:n])] == []


def test_noise_is_no_collapse():
    """60 runs of 200 steps that keep their accuracy, or gain, while the KL grows a
    hundredfold.

    With 16 samples a step or 512, independent or all samples of a problem alike, one run in
    800 raised the alarm.
    """
    rng = np.random.default_rng(0)
    rates = (lambda n: 0.3), ramp((1, 0.1), (200, 0.6)), lambda n: 0.03
    alarms = 0
    for run in range(60):
        samples, alike = ((16, 1), (128, 1), (512, 16))[run % 3]
        accuracy = sampled(rng, samples // alike, rates[run // 3 % 3])
        history = lines(200, accuracy=accuracy, kl=noisy(rng, 0.3, lambda n: n / 500))
        alarms += any(collapse(history[:n]) for n in range(2 * WINDOW, 201, 3))
    assert alarms <= 1


def test_a_scorer_that_is_hacked():
    """The alarm of a score that rises while accuracy falls, at the step where noise can no
    longer explain it.
    """
    fall, rise = ramp((30, 0.5), (60, 0.2)), ramp((1, 0.3), (60, 0.9))
    history = lines(60, accuracy=fall, prm=rise)
    ((step, name),) = (alarm for alarm in said(history) if alarm[1] == "hacked")
    assert 30 < step <= 50
    text = hacked(
        lines(60, accuracy=ramp((40, 0.5), (41, 0.1)), prm=ramp((40, 0.25), (41, 0.75)))
    )
    assert text == (
        "PRM reward rises while accuracy falls: reward/prm from 0.250 to 0.750, accuracy "
        "from 50.0% to 10.0% since "
        "step 10"
    )


@pytest.mark.parametrize("paid", ["prm/return", "prm/step", "reward/prm"])
def test_one_that_rises_is_enough(paid):
    """A sum of scores rises with the number of steps, while the lowest of them falls."""
    fall, rise = ramp((30, 0.5), (60, 0.2)), ramp((1, 0.3), (60, 0.9))
    falling = {"prm/return": fall, "prm/step": fall, "reward/prm": fall}
    assert f"falls: {paid} from 0.346 to 0.854, accuracy" in hacked(
        lines(60, accuracy=fall, **{**falling, paid: rise})
    )
    assert not hacked(lines(60, accuracy=fall, **falling))


@pytest.mark.parametrize(
    "curves",
    [
        {
            "accuracy": ramp((1, 0.2), (60, 0.6)),
            "prm": ramp((1, 0.2), (60, 0.6)),
        },  # both rise
        {
            "accuracy": ramp((30, 0.5), (60, 0.2)),
            "prm": ramp((30, 0.5), (60, 0.2)),
        },  # both fall
        {"accuracy": ramp((30, 0.5), (60, 0.2)), "prm": lambda n: 0.5},
        {"accuracy": lambda n: 0.5, "prm": ramp((1, 0.2), (60, 0.9))},
        {"accuracy": ramp((30, 0.5), (60, 0.2))},  # no scorer
    ],
)
def test_no_hacking(curves):
    history = lines(60, **curves)
    assert not any(hacked(history[:n]) for n in range(61))


# --- the others ------------------------------------------------------------------------------


def test_flat_groups_say_which_way():
    easy = lines(
        20,
        flat_groups=lambda n: 0.94,
        all_right=lambda n: 0.9,
        all_wrong=lambda n: 0.04,
    )
    hard = lines(
        20,
        flat_groups=lambda n: 0.94,
        all_right=lambda n: 0.04,
        all_wrong=lambda n: 0.9,
    )
    assert (
        flat_groups(easy)
        == f"94% of the groups of {WINDOW} steps have no spread: too easy (90% all right)"
    )
    assert (
        flat_groups(hard)
        == f"94% of the groups of {WINDOW} steps have no spread: too hard (90% all wrong)"
    )
    assert flat_groups(easy[: WINDOW - 1]) == ""
    assert (
        flat_groups(
            lines(
                20,
                flat_groups=lambda n: 0.8,
                all_right=lambda n: 0.8,
                all_wrong=lambda n: 0.0,
            )
        )
        == ""
    )


def test_a_format_that_never_matches():
    assert (
        no_format(lines(WINDOW, format=lambda n: 0.0))
        == f"the format matched in no completion of {WINDOW} steps"
    )
    assert no_format(lines(WINDOW - 1, format=lambda n: 0.0)) == ""
    assert no_format(lines(30, format=lambda n: 0.01 * (n == 25))) == ""
    assert no_format(lines(30, accuracy=lambda n: 0.0)) == ""


def test_a_jump_of_the_kl():
    assert (
        kl_jump(lines(20, kl=ramp((15, 0.02), (16, 0.24))))
        == "KL jumped 12x in 5 steps, from 0.0200 to 0.2400"
    )
    # All beginnings are steep
    assert kl_jump(lines(40, kl=ramp((1, 0.0), (40, 0.8)))[:9]) == ""
    assert kl_jump(lines(20, kl=lambda n: 0.02 if n < 20 else 5.0)) == ""  # one outlier
    # Steep, and still nothing
    assert kl_jump(lines(20, kl=lambda n: 1e-5 * 2**n)[:12]) == ""
    assert kl_jump(lines(20, kl=lambda n: 1e-5 * 2**n)) != ""


# --- when they are said ----------------------------------------------------------------------


def test_an_alarm_that_goes_on_is_said_once():
    history = lines(
        300, flat_groups=lambda n: 1.0, all_right=lambda n: 1.0, all_wrong=lambda n: 0.0
    )
    assert said(history) == [(WINDOW, "flat")]


def test_an_alarm_that_comes_and_goes_is_said_now_and_then():
    history = lines(
        300,
        flat_groups=lambda n: 0.92 if n // 10 % 2 else 0.8,
        all_right=lambda n: 1,
        all_wrong=lambda n: 0,
    )
    steps = [step for step, _ in said(history)]
    assert 2 <= len(steps) <= 1 + 300 // QUIET and min(np.diff(steps)) >= QUIET


def test_measurements_between_the_steps_change_nothing():
    history = lines(
        120, accuracy=FALL, kl=ramp((60, 0.05), (80, 0.6)), flat_groups=lambda n: 0.1
    )
    mixed = [
        line
        for each in history
        for line in (each, {"step": each["step"], "heldout/pass@1": 0.1})
    ]
    assert sounding(mixed) == sounding(history) and "collapse" in sounding(history)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_history_is_judged(data):
    """Whatever the numbers, and whichever of them there are."""
    names = data.draw(
        st.lists(
            st.sampled_from(["pass@1", "kl", "repetition", "reward/format"]),
            unique=True,
        )
    )
    number = st.floats(0, 10)
    history = [
        {"step": n, **{name: data.draw(number) for name in names}}
        for n in range(1, data.draw(st.integers(0, 30)) + 1)
    ]
    texts = new_alarms(history, {})
    assert all(text and "nan" not in text for text in texts.values())
