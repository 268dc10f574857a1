"""Explain a run, or compare several, in one HTML file that opens without a server or a network.

    python -m nanomath report RUN [RUN ...] [out=FILE]

    python -m nanomath report runs/tiny-grpo              writes runs/tiny-grpo/report.html
    python -m nanomath report runs/tiny-grpo runs/dr-grpo out=two.html

RUN is a run directory; it may still be running. Of several, those that differ by nothing but the
seed are shown as one method, and the held-out answers are compared problem by problem.
"""

from __future__ import annotations

from pathlib import Path

from nanomath.analysis.report import report
from nanomath.analysis.runs import read_run
from nanomath.commands.main import parse_words
from nanomath.data.files import check_file
from nanomath.training.runlog import write_atomically


def main(argv: list[str]) -> int:
    names, given = parse_words(argv, "out", __doc__)
    if not names:
        raise ValueError(
            "report needs a run directory: python -m nanomath report RUN [out=FILE]"
        )
    runs = [read_run(name) for name in names]
    out = runs[0].directory / "report.html" if given is None else Path(given)
    check_file("out", out)
    write_atomically(out, report(runs))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")
    return 0
