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
    reasoning_ends: Sequence[str] = REASONING_ENDS,
    **sampling: Any,
) -> list[list[list[bool]]]:
    """Return whether each of `rollouts` continuations is right, for every step of every
    completion; of a last step the one verdict on it, `rollouts` times.

    A completion's `prompt_index` says which of the prompts and problems it answers; steps[i]
    are those of completion i. All prefixes are continued in one call of the sampler, which
    computes each once. sampling: as in `Sampler.generate`. A prefix that fills the context is
    wrong.
    """
    found = []
    places = []  # of each prefix: the verdicts on its step, the problem, tokens of the solution
    prefixes = []
    for completion, its_steps in zip(completions, steps, strict=True):
        problem = problems[completion.prompt_index]
        prompt = prompts[completion.prompt_index]
        right = completion.finished and is_correct(
            problem, completion.text, reasoning_ends=reasoning_ends
        )
        verdicts = [[False] * rollouts for _ in its_steps[:-1]]
        found.append([*verdicts, [right] * rollouts])
        for step, of_step in zip(its_steps[:-1], verdicts, strict=True):
            head = completion.tokens[: step.token + 1]
            if len(prompt) + len(head) < sampler.model.config.max_positions:
                places.append((of_step, problem, head))
                prefixes.append([*prompt, *head])
    drawn = sampler.generate(prefixes, n=rollouts, seed=seed, **sampling)
    for place, group in zip(places, in_groups(drawn, rollouts), strict=True):
        of_step, problem, head = place
        texts = [sampler.tokenizer.decode([*head, *c.tokens]) for c in group]
        of_step[:] = [
            is_correct(problem, t, reasoning_ends=reasoning_ends) for t in texts
        ]
    return found
