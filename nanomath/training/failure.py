"""How a run fails: with one line that says what, where and why, whatever the cause was.

NaN and infinity are failures too (`check_finite`): a number that is not finite is neither
logged nor saved.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from nanomath.training import ranks
from nanomath.training.runlog import RunFailed

# What a step was doing when it failed, by the module of the innermost frame that has a name
# here.
PHASES = {
    "nanomath.rollout": "sampling",
    "nanomath.rewards": "rewarding",
    "nanomath.models.batches": "forward pass",
    "nanomath.models.scores": "forward pass",
    "nanomath.training.sft_step": "forward and backward pass",
    "nanomath.training.policy_step": "forward and backward pass",
    "nanomath.training.optimizer": "weight update",
}


@contextmanager
def failing(place: str | Callable[[], str]) -> Iterator[None]:
    """Turn an error in the block into a RunFailed of one line: the place, the phase of a
    step, and the reason.
    """
    try:
        yield
    except RunFailed:
        raise
    except (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError) as error:
        phase = phase_of(error)
        why = ranks.lost(error) or reason(error)
        where = place if isinstance(place, str) else place()
        raise RunFailed(f"{where}{phase and f' ({phase})'}: {why}") from error


def phase_of(error: BaseException) -> str:
    """Return what was being done where the error was raised, "" if PHASES does not have it."""
    modules = [
        frame.f_globals.get("__name__", "")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    known = [
        PHASES[name]
        for module in modules
        for name in PHASES
        if module == name or module.startswith(f"{name}.")
    ]
    return known[-1] if known else ""


def reason(error: BaseException) -> str:
    """Describe an error in one line.

    For errors that nobody foresaw it has their type as well, and says how to see more.
    """
    text = str(error).strip().partition("\n")[0]
    if memory := out_of_memory(error):
        return memory
    if isinstance(error, OSError | FloatingPointError):
        return text
    return f"{type(error).__name__}: {text} (NANOMATH_TRACEBACK=1 shows where)"


def out_of_memory(error: BaseException | None) -> str:
    """Return the message of an allocator (Python's, the CPU's or CUDA's) that has no memory
    left, "" for other errors.
    """
    text = str(error)
    if not isinstance(error, MemoryError) and not re.search(
        "out of memory|can't allocate memory|ALLOC_FAILED", text
    ):
        return ""
    asked = re.search(r"ried to allocate ([\d.]+) (bytes|[KMG]iB)", text)
    if not asked:
        return "out of memory"
    number = float(asked[1])
    unit = asked[2]
    return (
        "out of memory: "
        + (f"{number / 2**30:.2f} GiB" if unit == "bytes" else f"{number:g} {unit}")
        + " asked for"
    )


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raise a FloatingPointError that names the first number that is NaN or infinite."""
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
