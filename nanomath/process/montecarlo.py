"""Labels without labellers: from how many continuations of a step the right answer is reached.

    label(step k) = right answers among N completions of  question + steps 1 .. k  / N        soft
                    1 if there is one, else 0                                                 hard

Math-Shepherd, arXiv 2312.08935. This is the value of being there under the policy that
completes: a step after a mistake may be labelled right where the policy often recovers, and a
right one wrong where it never gets through (arXiv 2501.07301). The last step is followed by
nothing: its label is whether its answer is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanomath.data.problem import Problem
from nanomath.process.steps import Step
from nanomath.rewards import is_correct
from nanomath.rewards.extraction import REASONING_ENDS
from nanomath.rollout import Completion, Sampler, in_groups


def monte_carlo(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    steps: Sequence[Sequence[Step]],
    rollouts: int,
    seed: int,
    lenient: bool = False,
    reasoning_ends: Sequence[str] = REASONING_ENDS,
    **sampling: Any,
) -> list[list[list[bool]]]:
    """Whether each of `rollouts` continuations is right, for every step of every completion;
    of a last step the one verdict on it, `rollouts` times.

    A completion's `prompt_index` says which of the prompts and problems it answers; steps[i]
    are those of completion i. All prefixes are continued in one call of the sampler, which
    computes each once. sampling: as in `Sampler.generate`. A prefix that fills the context is
    wrong.
    """
    # a place: completion and step
    found = []
    places = []
    prefixes = []
    for i, completion in enumerate(completions):
        problem = problems[completion.prompt_index]
        right = completion.finished and is_correct(
            problem, completion.text, lenient, reasoning_ends
        )
        found.append([[False] * rollouts for _ in steps[i][:-1]] + [[right] * rollouts])
        for k, step in enumerate(steps[i][:-1]):
            prefix = [
                *prompts[completion.prompt_index],
                *completion.tokens[: step.token + 1],
            ]
            if len(prefix) < sampler.model.config.max_positions:
                places.append((i, k))
                prefixes.append(prefix)
    continued = in_groups(
        sampler.generate(prefixes, n=rollouts, seed=seed, **sampling), rollouts
    )
    for (i, k), group in zip(places, continued, strict=True):
        problem = problems[completions[i].prompt_index]
        head = completions[i].tokens[: steps[i][k].token + 1]
        texts = [sampler.tokenizer.decode([*head, *c.tokens]) for c in group]
        found[i][k] = [is_correct(problem, text, lenient, reasoning_ends) for text in texts]
    return found
