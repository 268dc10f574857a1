"""What a run keeps of its rollouts: rollouts.jsonl and groups.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nanomath.rewards import extract_answer
from nanomath.rollout.episodes import Episode, Groups


def records(
    groups: Groups, lenient: bool, reasoning_ends: list[str]
) -> Iterator[dict[str, Any]]:
    """What rollouts.jsonl keeps of groups: episodes, with the answer that was found in each."""
    for number, group in enumerate(groups):
        for episode in group:
            text = episode.solution.text
            found = extract_answer(text, lenient=lenient, reasoning_ends=reasoning_ends)
            yield {"prompt": number, **record_of(episode), "found": found}


def record_of(episode: Episode) -> dict[str, Any]:
    """Return what rollouts.jsonl keeps of an episode.

    Numbers that are the same for all tokens are written as one. The sampler's logprobs
    have six decimals, by which two runs can be told apart.
    """
    problem = episode.problem
    completion = episode.completion
    steps = {
        name: [round(x, 6) for x in getattr(episode, name)]
        for name in ("step_scores", "step_rewards")
    }
    hint = episode.hint
    return {
        "problem": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "sample": completion.sample_index,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "rewards": episode.rewards,
        "prompt_tokens": episode.prompt,
        "tokens": completion.tokens,
        "advantages": _rounded(episode.advantages),
        "logprobs": [round(x, 6) for x in completion.logprobs],
        **{name: _rounded(values) for name, values in episode.measured.items()},
        **({"step_ends": episode.step_ends, **steps} if episode.step_ends else {}),
        **({"level": hint.level, "hint": hint.text} if hint else {}),
    }


def _rounded(values: Sequence[float]) -> list[float] | float:
    """Round to three decimals; values that are all equal become one number."""
    rounded = [round(value, 3) + 0.0 for value in values]  # + 0.0: no -0.0
    return rounded[0] if len(set(rounded)) == 1 else rounded


def successes(groups: Groups) -> dict[str, Any]:
    """What groups.jsonl keeps of a step: how many samples of each problem were right, and the
    levels of their hints, if there are any.
    """
    first = [group[0] for group in groups]
    levels = [episode.hint.level if episode.hint else 0.0 for episode in first]
    return {
        "problems": [episode.problem.id for episode in first],
        "right": [sum(bool(e.rewards["accuracy"]) for e in group) for group in groups],
        "samples": len(groups[0]),
        **({"levels": levels} if any(levels) else {}),
    }
