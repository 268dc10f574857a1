"""What happened in a run, in plain words, each sentence with the step that shows it.

The thresholds are rules of thumb (docs/metrics.md says what to expect of each number); those of the
alarms are in nanomath/training/alarms.py, and what they said is repeated here. A claim that
something was learned is made by the interval of a paired difference, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from nanomath.analysis.compare import measured_at, paired
from nanomath.analysis.evaluation import Score
from nanomath.analysis.runs import Record, Run, numbers

WINDOW = 10  # steps an average is taken over
FAST = 0.02  # a larger share of the weights changed by one update is no fine-tuning
HASTY = 0.005  # five times what is usual: named where accuracy fell
CUT = 0.05  # more completions than this cut at the limit are a problem of the limit
MOST = 0.3  # and more than these are why groups have no right sample
SHORTER = 0.8  # the share of their length left to completions that learned to fit
FEW = 0.9  # effective samples below this share are another model's
SWITCHED = 0.1  # of the completions, whose language changed
WRONG_WAY = 0.5  # of the groups, whose advantages fall where rewards rise


@dataclass(frozen=True)
class Finding:
    """A sentence: `level` "good", "note", "warning" or "bad"; `step` is where to look, and
    `episode` (step, prompt, sample) what to look at there.
    """

    level: str
    text: str
    step: int | None = None
    episode: tuple[int, int, int] | None = None


def diagnose(run: Run) -> list[Finding]:
    """All that is to be said of a run, the worst first."""
    if not run.lines:
        return [Finding("note", "Nothing has been logged yet.")]
    found = [finding for rule in RULES for finding in rule(run)]
    order = {"bad": 0, "warning": 1, "good": 2, "note": 3}
    return sorted(found, key=lambda finding: order[finding.level])


def learned(run: Run) -> Iterator[Finding]:
    """Held-out accuracy before and after: by pairs where both measurements are logged."""
    steps, values = run.curve("heldout/pass@1")
    if len(steps) < 2:
        return
    text = f"Held-out pass@1 went from {values[0]:.1%} to {values[-1]:.1%}"
    d = change(run)
    if d is None:
        yield Finding(
            "note", f"{text}; the answers are not logged, so no interval.", steps[-1]
        )
        return
    interval = f"{100 * d.mean:+.1f} points, 95% interval {100 * d.low:+.1f} to {100 * d.high:+.1f}"
    level, verdict = "warning", "no change can be seen"
    if d.low > 0:
        level, verdict = "good", "it learned"
    elif d.high < 0:
        level, verdict = "bad", "it got worse"
    yield Finding(
        level,
        f"{text} ({interval}, these weights on other problems): {verdict}.",
        steps[-1],
    )
    best = int(np.argmax(values))
    if values[best] - values[-1] > max(0.02, d.high - d.low):
        yield Finding(
            "warning",
            f"It was best after step {steps[best]} ({values[best]:.1%}).",
            steps[best],
        )


def change(run: Run) -> Score | None:
    """What held-out accuracy gained from the first measurement to the last, by pairs; None where
    the answers are not logged.
    """
    steps, _ = run.curve("heldout/pass@1")
    if len(steps) < 2:
        return None
    pairs = paired(measured_at(run, steps[0]), measured_at(run, steps[-1]))
    return pairs and pairs.difference


def stopped(run: Run) -> Iterator[Finding]:
    """The step from which the smoothed training accuracy no longer rose."""
    steps, values = run.curve("pass@1")
    if len(values) < 2 * WINDOW:
        return
    smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
    noise = float(np.std(np.diff(values))) / math.sqrt(WINDOW)
    if smooth[-1] < smooth[0] - 2 * noise:
        return  # it fell, which others say
    if smooth.max() - smooth[0] < 2 * noise:
        yield Finding(
            "note", "Training pass@1 did not rise beyond its noise.", steps[-1]
        )
        return
    at = int(np.argmax(smooth >= smooth.max() - noise))
    if at < len(smooth) - WINDOW:
        step = steps[at + WINDOW // 2]
        yield Finding(
            "note", f"Training pass@1 stopped rising around step {step}.", step
        )


def alarmed(run: Run) -> Iterator[Finding]:
    """What the alarms said while it ran."""
    for alarm in run.read("alarms.jsonl"):
        level = "bad" if alarm["alarm"] in ("collapse", "hacked") else "warning"
        name = "The PRM was hacked: " if alarm["alarm"] == "hacked" else "Alarm: "
        step = alarm["step"]
        yield Finding(level, f"{name}{alarm['text']}, said at step {step}.", step)


def invented(run: Run) -> Iterator[Finding]:
    """Of a hacked process reward: the wrong episode whose steps were paid most."""
    if not any(alarm["alarm"] == "hacked" for alarm in run.read("alarms.jsonl")):
        return
    wrong = [
        r
        for r in run.rollouts
        if r.get("step_rewards") and not r["rewards"].get("accuracy")
    ]
    if wrong:
        most = max(wrong, key=lambda r: sum(r["step_rewards"]))
        paid = sum(most["step_rewards"])
        yield Finding(
            "bad",
            f"At step {most['step']} a wrong answer was paid {paid:.2f} for "
            f"{len(most['step_rewards'])} steps, the most of all that were logged.",
            most["step"],
            _place(most),
        )


def advantages_point(run: Run) -> Iterator[Finding]:
    """Whether better rewarded samples have the larger advantages."""
    signs = []
    for group in _groups(run.rollouts):
        rewards = [
            r["rewards"]["total"] + sum(r.get("step_rewards", [])) for r in group
        ]
        advantages = [fmean(numbers(r, "advantages") or [0.0]) for r in group]
        if np.std(rewards) > 0 and np.std(advantages) > 0:
            signs.append((float(np.corrcoef(rewards, advantages)[0, 1]), group[0]))
    wrong = [record for correlation, record in signs if correlation < -0.2]
    if signs and len(wrong) > WRONG_WAY * len(signs):
        yield Finding(
            "bad",
            f"Advantages point the wrong way: in {len(wrong)} of {len(signs)} logged groups the "
            "better rewarded samples have the lower advantages.",
            wrong[0]["step"],
            _place(wrong[0]),
        )


def rate(run: Run) -> Iterator[Finding]:
    """Updates far larger than fine-tuning makes."""
    steps, values = run.curve("update_ratio")
    if not values:
        return
    from_scratch = not run.config.get("model.path")  # where weights have to move far
    most = max(values)
    step = steps[values.index(most)]
    moved = f"moved the weights by {most:.1%} of their size"
    if most > (10 * FAST if from_scratch else FAST):
        yield Finding(
            "bad",
            f"One update {moved} (step {step}; median {median(values):.2%}; 0.1% is usual): "
            f"optim.lr = {run.config.get('optim.lr'):g} is too high.",
            step,
        )
    elif most > HASTY and not from_scratch:
        gained = change(run)
        if gained and gained.high < 0:
            yield Finding(
                "bad",
                f"It got worse, and an update {moved} (step {step}; 0.1% is usual): try a tenth "
                f"of optim.lr = {run.config.get('optim.lr'):g}.",
                step,
            )


def drawn_from_another(run: Run) -> Iterator[Finding]:
    """Samples of a distribution that is not the one they are scored by."""
    config = run.config
    truncated = [
        f"sampling.{name} = {config[f'sampling.{name}']}"
        for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0))
        if config.get(f"sampling.{name}", off) != off
    ]
    if truncated and config.get("algorithm.sampler_correction") == "off":
        yield Finding(
            "bad",
            f"Samples were drawn with {', '.join(truncated)} and the policy is scored on its "
            "full distribution, without algorithm.sampler_correction: the gradient is biased.",
            1,
        )
    if config.get("grpo.source", "policy") != "policy" or config.get("grpo.solutions"):
        return  # they are meant to be another's
    steps, values = run.curve("effective_samples")
    if (least := min(values, default=1.0)) < FEW:
        step = steps[values.index(least)]
        yield Finding(
            "warning",
            f"At step {step} the samples counted as {least:.0%} of their number: "
            "sampler and trainer do not agree.",
            step,
        )
    steps, values = run.curve("gap_mean")
    most = max(values, default=0.0)
    if config.get("model.dtype") == "float32" and most > 1e-3:
        step = steps[values.index(most)]
        yield Finding(
            "bad",
            f"Sampler and trainer differ by {most:.2g} nats a token at step "
            f"{step}; in float32 that is no rounding.",
            step,
        )


def flat(run: Run) -> Iterator[Finding]:
    """How many groups taught nothing at the end, and why, where samples are compared in them."""
    steps, values = run.curve("flat_groups")
    alone = run.config.get("algorithm.baseline") in ("off", "value")
    if not values or (alone and run.config.get("algorithm.samples") != "pair"):
        return
    share = fmean(values[-WINDOW:])
    right = fmean(run.series["all_right"][1][-WINDOW:])
    wrong = fmean(run.series["all_wrong"][1][-WINDOW:])
    if share > 0.5:
        cut = fmean(run.curve("truncated")[1][-WINDOW:] or [0.0])
        hard = f"too long ({cut:.0%} of the completions were cut)"
        why = "too easy" if right > wrong else hard if cut > MOST else "too hard"
        yield Finding(
            "warning",
            f"In the last {min(WINDOW, len(values))} steps {share:.0%} of the groups taught "
            f"nothing: their problems are {why} ({right:.0%} all right, {wrong:.0%} all wrong).",
            steps[-1],
        )


def entropy(run: Run) -> Iterator[Finding]:
    """Exploration that ended, or a distribution that came apart."""
    steps, values = run.curve("entropy")
    if run.kind != "grpo" or len(values) < 2:
        return
    before = values[0]
    after = fmean(values[-min(WINDOW, max(1, len(values) // 4)) :])
    change = f"Entropy went from {before:.2f} to {after:.2f} nats a token"
    if after < 0.2 * before:
        yield Finding("warning", f"{change}: it hardly explores any more.", steps[-1])
    elif after > max(2 * before, before + 0.5):
        yield Finding("bad", f"{change}: its distribution came apart.", steps[-1])
    else:
        yield Finding("note", f"{change}.", steps[-1])


def distance(run: Run) -> Iterator[Finding]:
    """The KL to the starting model at the end."""
    steps, values = run.curve("kl")
    if values:
        held = "not penalised"
        if coefficient := run.config.get("algorithm.kl_coef", 0):
            held = f"held by algorithm.kl_coef = {coefficient:g}"
        yield Finding(
            "bad" if values[-1] > 5 else "note",
            f"The KL to the starting model ended at {values[-1]:.3f} nats a token ({held}).",
            steps[-1],
        )


def lengths(run: Run) -> Iterator[Finding]:
    """Completions cut at the limit, and how their length moved."""
    for name, what in (("truncated", "training"), ("heldout/truncated", "held-out")):
        steps, values = run.curve(name)
        if values and values[-1] > CUT:
            yield Finding(
                "warning",
                f"{values[-1]:.0%} of the {what} completions were cut at the limit at step "
                f"{steps[-1]}: what is cut has no answer.",
                steps[-1],
            )
    steps, values = run.curve("length")
    cut = run.curve("truncated")[1] or [0.0]
    if values and cut[0] > CUT >= cut[-1] and values[-1] < SHORTER * values[0]:
        yield Finding(
            "warning",
            f"At first {cut[0]:.0%} of the completions were cut, now {cut[-1]:.0%}, and they are "
            f"{1 - values[-1] / values[0]:.0%} shorter: what fits sampling.max_new_tokens = "
            f"{run.config.get('sampling.max_new_tokens')} was rewarded. Measure it with a larger "
            "one: it may have unlearned to work problems out.",
            steps[-1],
        )
    if len(values) > 1:
        yield Finding(
            "note",
            f"Completions went from {values[0]:.0f} to {values[-1]:.0f} tokens.",
            steps[-1],
        )


def answers(run: Run) -> Iterator[Finding]:
    """Completions without an answer."""
    steps, values = run.curve("heldout/no_answer")
    if values and values[-1] > CUT:
        yield Finding(
            "warning",
            f"No answer was found in {values[-1]:.0%} of the held-out completions: look at some "
            "before blaming the model.",
            steps[-1],
        )
        if run.config.get("reward.lenient") and values[-1] > values[0] + CUT:
            yield Finding(
                "bad",
                f"Completions without a marked answer went from {values[0]:.0%} to "
                f"{values[-1]:.0%}: reward.lenient pays for them, and held out they do not count.",
                steps[-1],
            )


def languages(run: Run) -> Iterator[Finding]:
    """Another language than before."""
    named = {"en": "in English", "ja": "in Japanese", "mixed": "in both languages"}
    for name, what in named.items():
        steps, values = run.curve(f"heldout/language/{name}")
        if values and abs(values[-1] - values[0]) > SWITCHED:
            yield Finding(
                "warning",
                f"The share of held-out completions {what} went from {values[0]:.0%} to "
                f"{values[-1]:.0%}.",
                steps[-1],
            )


def fitted(run: Run) -> Iterator[Finding]:
    """Fine-tuning: did the loss fall, and did the held-out loss rise again?"""
    steps, values = run.curve("nll")
    if len(values) > 1:
        yield Finding(
            "note",
            f"The loss went from {values[0]:.2f} to {values[-1]:.2f} nats a token.",
            steps[-1],
        )
    steps, values = run.curve("heldout/loss")
    if values and values[-1] > 1.02 * min(values):
        best = int(np.argmin(values))
        yield Finding(
            "warning",
            f"The held-out loss was lowest after step {steps[best]} ({values[best]:.3f}, now "
            f"{values[-1]:.3f}): overfitting.",
            steps[best],
        )


def scored(run: Run) -> Iterator[Finding]:
    """A process reward model: does it tell right steps from wrong ones?"""
    steps, values = run.curve("heldout/auc")
    if values:
        f1 = run.series["heldout/f1"][1][-1]
        yield Finding(
            "good" if values[-1] > 0.7 else "warning",
            f"On held-out steps its AUC went from {values[0]:.2f} to {values[-1]:.2f} (0.5 is "
            f"chance), and it finds the first wrong step with an F1 of {f1:.2f}.",
            steps[-1],
        )


RULES: Sequence[Callable[[Run], Iterator[Finding]]] = (
    learned,
    alarmed,
    invented,
    advantages_point,
    rate,
    drawn_from_another,
    flat,
    entropy,
    lengths,
    answers,
    languages,
    fitted,
    scored,
    stopped,
    distance,
)


def _groups(rollouts: Sequence[Record]) -> list[list[Record]]:
    found: dict[tuple[int, int], list[Record]] = {}
    for record in rollouts:
        found.setdefault((record["step"], record["prompt"]), []).append(record)
    return list(found.values())


def _place(record: Record) -> tuple[int, int, int]:
    return record["step"], record["prompt"], record["sample"]
