"""Say whether two runs are equal, and if not, where they part.

    python -m nanomath diff A B

    python -m nanomath diff runs/tiny-grpo runs/tiny-grpo-again

Exit code 0: equal, times aside; 1: different. A resumed run is equal to an unbroken one. For the
first sample that differs it names the token, what each run drew there and with what probability,
and whether that is rounding (the same token, logprobs apart by less than 1e-4), a draw near a
boundary (the logprobs before agree, the draws do not) or other weights.
"""

from __future__ import annotations

from nanomath.analysis.compare import differences
from nanomath.analysis.runs import read_run


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if len(argv) != 2:
        raise ValueError("diff needs two run directories: python -m nanomath diff A B")
    a, b = (read_run(name) for name in argv)
    found = list(differences(a, b))
    print(
        "\n".join(found)
        or f"equal: {len(a.lines)} lines of metrics, {len(a.rollouts)} episodes"
    )
    return 1 if found else 0
