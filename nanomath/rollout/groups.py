"""Which groups of episodes are kept, and what is logged of them all.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) keeps the groups that teach something
and samples others in place of the rest, here at most so many times: a model that solves
everything, or nothing, must not sample for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from nanomath.data.language import language_metrics, repeated_share
from nanomath.rollout.episodes import Episode, Groups


def is_mixed(group: Sequence[Episode]) -> bool:
    """Return whether the group has right answers and wrong ones."""
    return len({bool(e.rewards["accuracy"]) for e in group}) > 1


def is_uneven(group: Sequence[Episode]) -> bool:
    """Return whether the group's rewards, or those of its steps, differ: otherwise all of
    its advantages are zero.
    """
    return len({(e.rewards["total"], *e.step_rewards) for e in group}) > 1


KEEP_GROUPS: dict[str, Callable[[Sequence[Episode]], bool]] = {
    "all": lambda group: True,
    "mixed": is_mixed,
    "uneven": is_uneven,
}


def collect_groups(
    sample: Callable[[int], list[list[Episode]]], wanted: int, keep: str, refills: int
) -> tuple[list[list[Episode]], list[list[Episode]]]:
    """Return up to `wanted` groups worth keeping, and all groups that were sampled to find
    them.

    sample(k) draws the groups of refill k: refill 0 always, then refills 1 to `refills`
    while groups are missing. keep: a key of KEEP_GROUPS. When no group is worth keeping,
    those of the last refill are returned: the step then measures them, and has no gradient.
    """
    kept: list[list[Episode]] = []
    sampled: list[list[Episode]] = []
    for refill in range(refills + 1):
        groups = sample(refill)
        sampled += groups
        kept += [group for group in groups if KEEP_GROUPS[keep](group)]
        if len(kept) >= wanted:
            break
    return kept[:wanted] or groups, sampled


def episode_metrics(groups: Groups) -> dict[str, float]:
    """Return the means over a rollout's episodes: each reward, pass@1, flat groups,
    lengths.

    A group is flat when its rewards are all equal, so that its advantages are zero. Lengths
    are in tokens; the mean length of right, of wrong and of truncated completions is left
    out where there are none. nanomath/data/language.py says what language a completion is in.
    """
    episodes = [episode for group in groups for episode in group]
    right = [[bool(e.rewards["accuracy"]) for e in group] for group in groups]
    kinds = {
        "length": episodes,
        "length/right": [e for e in episodes if e.rewards["accuracy"]],
        "length/wrong": [e for e in episodes if not e.rewards["accuracy"]],
        "length/truncated": [e for e in episodes if not e.completion.finished],
    }
    return {
        "reward": _mean(e.rewards["total"] for e in episodes),
        "pass@1": _mean(ok for group in right for ok in group),
        **{
            f"reward/{name}": _mean(e.rewards[name] for e in episodes)
            for name in episodes[0].rewards
            if name != "total"
        },
        "flat_groups": _mean(not is_uneven(group) for group in groups),
        "all_right": _mean(all(group) for group in right),
        "all_wrong": _mean(not any(group) for group in right),
        **{
            name: _mean(e.completion.length for e in some)
            for name, some in kinds.items()
            if some
        },
        "truncated": _mean(not e.completion.finished for e in episodes),
        "repetition": _mean(repeated_share(e.completion.tokens) for e in episodes),
        **language_metrics((e.problem.question, e.completion.text) for e in episodes),
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
