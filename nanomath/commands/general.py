"""Measures a model on general benchmarks, for what training in maths does to everything else.

    python -m nanomath eval MODEL general [CONFIG.toml] [key=value ...]

    python -m nanomath eval HuggingFaceTB/SmolLM2-135M-Instruct general save=base.json
    python -m nanomath eval runs/mine general data=benchmarks save=mine.json limit=200
    python -m nanomath eval runs/mine general tasks=arc_challenge,ifeval prompt.chat=false

MODEL is a Hugging Face directory, a run directory or a hub id. docs/general.md says what is run.
`python -m nanomath transfer base.json mine.json` compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nanomath import settings
from nanomath.analysis import general
from nanomath.analysis.evaluation import Score
from nanomath.config import parse_arguments
from nanomath.data.benchmarks import BENCHMARKS, load_benchmark
from nanomath.data.files import as_json, check_file
from nanomath.rollout import Sampler
from nanomath.training.build import build_model, settle_dtypes
from nanomath.training.runlog import write_atomically
from nanomath.training.sittings import commit, program, versions


def main(argv: list[str], model: str) -> int:
    given = [f"model.path={model}"]
    config, _ = parse_arguments(settings.GeneralConfig, [*given, *argv], __doc__)
    out = Path(config.save)
    check_file("save", out)
    if config.data and not Path(config.data).is_dir():
        raise FileNotFoundError(f"data: {config.data} is no directory")
    names = config.tasks or [name for name in BENCHMARKS if name != "gsm8k"]
    loaded = {
        name: load_benchmark(name, config.data, config.sources, config.limit)
        for name in dict.fromkeys(names)
    }
    settle_dtypes(config)
    network, tokenizer = build_model(config.model, config.seed)
    context = network.config.max_positions
    prepared = {
        name: general.prepare(config, name, problems, tokenizer, context)
        for name, (_, problems) in loaded.items()
    }
    sampler = Sampler(network, tokenizer, config.slots)
    report = {
        "model": config.model.path,
        "command": [*program(), *sys.argv[1:]],
        "commit": commit(),
        "versions": versions(),
        "dtype": config.model.dtype,
        "tasks": {},
    }
    for name, (problems, asked) in prepared.items():
        records = general.measure(config, name, problems, asked, sampler)
        task = general.summary(config, name, loaded[name][0], problems, records)
        report["tasks"][name] = task
        write_atomically(out, as_json(report))
        print(f"{name}: {len(problems)} problems; {task['protocol']}")
        for metric, score in task["scores"].items():
            print(f"  {metric:20}{Score(**score)}", flush=True)
    print(f"written to {out}")
    return 0
