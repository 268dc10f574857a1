"""Say how much of what training gained in maths came with gains elsewhere (the transferability
index of arXiv 2507.00432), and what it cost: the plain changes by group of tasks.

    python -m nanomath transfer BASE TUNED ... [key=value ...]

    python -m nanomath transfer base.json sft.json grpo.json
    python -m nanomath transfer base.jsonl grpo.jsonl sigma=paper picture=transfer

The files are those of `python -m nanomath eval MODEL general save=FILE.json`, or the completions
of the embedded world, `python -m nanomath eval MODEL world save=FILE.jsonl`, whose families are
the tasks. The first is the base that the others were tuned from.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nanomath import settings
from nanomath.analysis import figures
from nanomath.analysis.transfer import compare_transfer, draw, read_evaluation, table
from nanomath.config import parse_arguments, positional
from nanomath.data.files import as_json, check_file
from nanomath.training.runlog import write_atomically
from nanomath.training.sittings import commit, program


def main(argv: list[str]) -> int:
    names = [word for word in positional(argv) if not word.endswith(".toml")]
    keys = [word for word in argv if word not in names]
    config, _ = parse_arguments(settings.TransferConfig, keys, __doc__)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"{twice[0]} is there twice: name the base and other evaluations"
        )
    if config.save:
        check_file("save", config.save)
    if config.picture:
        figures.check_picture("picture", config.picture)
    files = {name: read_evaluation(name) for name in names}
    report = compare_transfer(files, config.groups, config.sigma, config.seed)
    print(table(report))
    if config.save:
        report |= {"command": [*program(), *sys.argv[1:]], "commit": commit()}
        write_atomically(Path(config.save), as_json(report))
        print(f"written to {config.save}")
    if config.picture:
        print("drawn:", *draw(report, Path(config.picture)))
    return 0
