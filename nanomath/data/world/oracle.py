"""The oracle: whether each step of a solution is right given the ones before, and whether the
answer is right.

A step is right if and only if it follows from the problem and from what the steps before it
state. So after the first wrong step every later one is wrong too; and while all steps are
right, the stated values are the true ones: step k only has to say the same as step k of the
worked solution, after an aside or without one. Everything is computed from `problem.metadata`.
"""

from __future__ import annotations

import re

from nanomath.data.problem import Problem

from .family import ASIDES
from .generator import REGISTRY

ASIDE = re.compile(
    "|".join(re.escape(text) for texts in ASIDES.values() for text in texts)
)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def check_steps(problem: Problem, text: str) -> list[bool]:
    """Return a verdict for each step (paragraph) of `text`: whether it is right.

    A box before the closing step is wrong, and so is a step after it.
    """
    name = problem.metadata.get("family")
    if name not in REGISTRY:
        raise ValueError(
            f"problem {problem.id}: the oracle needs metadata of the embedded world, "
            f"got family {name!r}"
        )
    family = REGISTRY[name]
    worked, answer = family.solve(problem.metadata)
    verdicts = []
    right = True
    for index, step in enumerate(split_steps(text)):
        if index < len(worked):
            aside = ASIDE.match(step)
            said = step[aside.end() :] if aside else step
            says_the_same = family.essence(said) == family.essence(worked[index])
            right = right and says_the_same and not BOXED.search(step)
        else:
            right = right and index == len(worked) and closes(step, answer)
        verdicts.append(right)
    return verdicts


def split_steps(text: str) -> list[str]:
    """Split `text` at blank lines into paragraphs, stripped, without empty ones."""
    return [step.strip() for step in re.split(r"\n\s*\n", text) if step.strip()]


def closes(step: str, answer: str) -> bool:
    """Return whether `step` states `answer` in its only box, and no number or operator
    outside it.
    """
    boxes = [content.strip() for content in BOXED.findall(step)]
    return boxes == [answer] and not re.search(r"[\d+\-*/=]", BOXED.sub("", step))
