"""Labels without labellers: from how many continuations of a step the right answer is reached.

    label(step k) = right answers among N completions of  question + steps 1 .. k  / N        soft
                    1 if there is one, else 0                                                 hard

Math-Shepherd, arXiv 2312.08935. This is the value of being there under the policy that completes: a step after a
mistake may be labelled right where the policy often recovers, and a right one wrong where it never gets through
(arXiv 2501.07301). The last step is followed by nothing: its label is whether its answer is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanomath.data.problem import Problem
from nanomath.process.steps import Step
from nanomath.rewards import is_correct
from nanomath.rollout import Completion, Sampler, in_groups


def monte_carlo(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    completions: Sequence[Sequence[Completion]],
    steps: Sequence[Sequence[Sequence[Step]]],
    rollouts: int,
    seed: int,
    lenient: bool = False,
    **sampling: Any,
) -> list[list[list[list[bool]]]]:
    """Whether each of `rollouts` continuations is right, for every step of every completion of every problem; of a last
    step the one verdict on it, `rollouts` times.

    completions[i] and steps[i] are those of problem i; all prefixes are continued in one call of the sampler, which
    computes each once. sampling: as in `Sampler.generate`. A prefix that fills the context is wrong.
    """
    context = sampler.model.config.max_positions
    places, prefixes = [], []  # problem, completion, step
    found: list[list[list[list[bool]]]] = []
    for i, (problem, drawn) in enumerate(zip(problems, completions, strict=True)):
        found.append([])
        for j, completion in enumerate(drawn):
            right = completion.finished and is_correct(problem, completion.text, lenient)
            found[i].append([[right] * rollouts for _ in steps[i][j]])
            for k, step in enumerate(steps[i][j][:-1]):
                prefix = [*prompts[i], *completion.tokens[: step.token + 1]]
                if len(prefix) < context:
                    places.append((i, j, k))
                    prefixes.append(prefix)
                else:
                    found[i][j][k] = [False] * rollouts
    continued = in_groups(sampler.generate(prefixes, n=rollouts, seed=seed, **sampling), rollouts)
    for (i, j, k), group in zip(places, continued, strict=True):
        head = completions[i][j].tokens[: steps[i][j][k].token + 1]
        texts = [sampler.tokenizer.decode([*head, *c.tokens]) for c in group]
        found[i][j][k] = [is_correct(problems[i], text, lenient) for text in texts]
    return found
