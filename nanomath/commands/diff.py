"""Say whether two runs are equal, and if not, where they part; of two evaluations, what each
problem's accuracy and tokens did.

    python -m nanomath diff A B
    python -m nanomath diff A.json B.json [out=NAME]

    python -m nanomath diff runs/tiny-grpo runs/tiny-grpo-again

Exit code 0: equal, times aside; 1: different. A resumed run is equal to an unbroken one. For the
first sample that differs it names the token, what each run drew there and with what probability,
and whether that is rounding (the same token, logprobs apart by less than 1e-4), a draw near a
boundary (the logprobs before agree, the draws do not) or other weights.

Of two eval.json (`eval` with out=DIRECTORY) it says how accuracy and tokens changed, by how much A
solved each problem; out=NAME draws every problem's way into NAME.png and NAME.svg.
"""

from __future__ import annotations

from pathlib import Path

from nanomath.analysis import figures
from nanomath.analysis.budget import arrows, changes
from nanomath.analysis.compare import differences
from nanomath.analysis.runs import read_run
from nanomath.commands.main import parse_words
from nanomath.data.problem_sets import read_measured


def main(argv: list[str]) -> int:
    names, out = parse_words(argv, "out", __doc__)
    measured = {name.endswith(".json") for name in names}
    if len(names) != 2 or len(measured) > 1 or (out is not None and False in measured):
        raise ValueError(
            "diff needs two run directories, or two eval.json: python -m nanomath diff A B, "
            "python -m nanomath diff A.json B.json [out=NAME]"
        )
    if True in measured:
        return diff_measured(*names, out)
    a, b = (read_run(name) for name in names)
    found = list(differences(a, b))
    print(
        "\n".join(found)
        or f"equal: {len(a.lines)} lines of metrics, {len(a.rollouts)} episodes"
    )
    return 1 if found else 0


def diff_measured(a: str, b: str, out: str | None) -> int:
    """Compare two eval.json problem by problem."""
    if out:
        figures.check_picture("out", out)
    before, after = read_measured(a), read_measured(b)
    found = arrows(before, after)
    print("\n".join(changes(found)))
    if out:
        for path in figures.save(figures.problem_arrows(found), Path(out)):
            print(f"{path}")
    return 0 if before == after else 1
