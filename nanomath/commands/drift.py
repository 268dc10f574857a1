"""Say how far training has moved a model, and where: token KL and rank shift on what the tuned
model writes, the shift of the states of each layer, the change of each weight matrix.

    python -m nanomath drift BASE TUNED [TUNED ...] [CONFIG.toml] [key=value ...]

    python -m nanomath drift runs/tiny-sft runs/tiny-grpo drift.by=difficulty
    python -m nanomath drift runs/tiny-sft runs/tiny-grpo problems.world.families=maths,facts \
drift.by=family
    python -m nanomath drift models/base models/tuned problems.source=gsm8k/test.jsonl out=drift

Each model is a Hugging Face directory, a run directory or a hub id; adapters are merged. What is
found is written as drift.json, with pictures beside it: into TUNED where that is a run directory,
whose report then shows it, else into ./drift, or into out where that is set. Of several models
that would go to one place each has a directory of its name there. Everything is computed in
model.dtype, float32 unless it is set.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanomath import settings
from nanomath.analysis import drift as measure
from nanomath.analysis.evaluation import check_measurement, in_kinds
from nanomath.analysis.figures import draw_drift
from nanomath.config import parse_arguments, positional
from nanomath.data.files import as_json, check_directory
from nanomath.data.problem import Problem
from nanomath.models import Tokenizer, Transformer
from nanomath.models.batches import Example
from nanomath.rollout.meter import meter
from nanomath.training.build import (
    build_model,
    build_problems,
    build_sampler,
    build_template,
    encode_prompts,
    fitting_prompts,
    sampling_options,
    settle_dtypes,
    shape_of,
)
from nanomath.training.runlog import write_atomically

Pair = tuple[Transformer, Tokenizer]


def main(argv: list[str]) -> int:
    names = [word for word in positional(argv) if not word.endswith(".toml")]
    if not {"-h", "--help"} & set(argv) and (len(names) < 2 or "" in names):
        raise ValueError(
            "drift needs a base and a tuned model: python -m nanomath drift BASE TUNED "
            "[TUNED ...] [key=value ...]"
        )
    words = [word for word in argv if word not in names]
    config, _ = parse_arguments(
        settings.DriftConfig, [*(f"model.path={n}" for n in names[:1]), *words], __doc__
    )
    section = config.drift
    places = out_directories(names[1:], config.out)
    problems = build_problems(config.problems)
    groups = grouped(problems, section)
    for name in names:
        shape_of(config.model, name)  # is a model there? Better asked before the work
    settle_dtypes(config)
    base = loaded(config.model, names[0])
    states = text_states(base, problems, groups, section)
    for name, place in places.items():
        tuned = loaded(config.model, name)
        found = compare(config, base, tuned, problems, groups, states)
        found["asked"] |= {"base": names[0], "tuned": name}
        del tuned  # before the next one is loaded
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / "drift.json", as_json(found))
        print(*measure.lines(found), f"  written to {place}/drift.json", sep="\n")
        if find_spec("matplotlib"):
            draw_drift(found, place)
        else:
            print(
                "no pictures: they need matplotlib (pip install matplotlib)",
                file=sys.stderr,
            )
    return 0


def loaded(section: settings.Model, name: str) -> Pair:
    """Return a model with its tokenizer. ValueError for weights that are no numbers."""
    model, tokenizer = build_model(section, seed=0, path=name)
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{name}: {key} has entries that are not finite")
    return model, tokenizer


def out_directories(names: Sequence[str], out: str) -> dict[str, Path]:
    """Return where the drift of each tuned model is written. ValueError for one place of
    two models, OSError for one that cannot be written to.
    """
    first = {
        n: Path(out or (n if (Path(n) / "config.toml").is_file() else "drift"))
        for n in names
    }
    shared = Counter(first.values())
    places = {n: at / Path(n).name if shared[at] > 1 else at for n, at in first.items()}
    for at, count in Counter(places.values()).items():
        if count > 1:
            raise ValueError(
                f"the drift of {count} models of one name would be written to {at}"
            )
        check_directory("out", at)
    return places


def grouped(
    problems: Sequence[Problem], section: settings.Drift
) -> dict[str, list[int]]:
    """Return the numbers of the problems of each group, those of all first. ValueError for a group
    of too few.
    """
    check_measurement(problems, 1, by=section.by)
    most = max(section.responses, section.texts)
    groups = {
        name: rows[:most] for name, rows in in_kinds(problems, section.by).items()
    }
    for name, rows in groups.items():
        if len(rows) < measure.FEWEST_TEXTS:
            raise ValueError(
                f"the group {name or 'of all problems'} has {len(rows)}: at least "
                f"{measure.FEWEST_TEXTS} are needed (problems.limit, drift.by)"
            )
    return groups if section.by else {"all": groups[""]}


def members(groups: Mapping[str, list[int]], most: int) -> dict[str, list[int]]:
    """Return at most so many problems of each group, and of all groups together as "all"."""
    cut = {name: rows[:most] for name, rows in groups.items()}
    return {"all": [i for rows in cut.values() for i in rows], **cut}


def text_states(
    model: Pair,
    problems: Sequence[Problem],
    groups: Mapping[str, list[int]],
    section: settings.Drift,
) -> NDArray[np.float32]:
    """Return the features of the texts of all groups. ValueError for a text of less than two
    tokens.
    """
    texts = []
    for i in members(groups, section.texts)["all"]:
        problem = problems[i]
        text = f"{problem.question}\n{problem.solution or problem.answer}"
        texts.append(model[1].encode(text, add_special_tokens=True)[: section.tokens])
        if len(texts[-1]) < 2:
            raise ValueError(
                f"the text of problem {problem.id} has {len(texts[-1])} tokens"
            )
    return measure.features(model[0], texts)


def compare(
    config: settings.DriftConfig,
    base: Pair,
    tuned: Pair,
    problems: Sequence[Problem],
    groups: Mapping[str, list[int]],
    states: NDArray[np.float32],
) -> dict[str, Any]:
    """Return what drift.json holds of one tuned model; "refused" has the reasons for what could
    not be measured.
    """
    section = config.drift
    found: dict[str, Any] = {
        "asked": {
            "source": config.problems.source,
            "split": config.problems.split,
            "temperature": config.sampling.temperature,
            "dtype": config.model.dtype,
            "tokens_of_a_text": section.tokens,
            "seed": section.seed,
        },
        "meaning": measure.MEASURES,
        "groups": {name: {} for name in members(groups, 1)},
        "refused": [],
    }
    refused = found["refused"]
    try:
        found["weights"] = measure.weight_change(base[0], tuned[0])
    except ValueError as error:
        refused.append(f"weights: {error}")
    new = text_states(tuned, problems, groups, section)
    chosen = members(groups, section.texts)
    place = {i: column for column, i in enumerate(chosen["all"])}
    for name, rows in chosen.items():
        at = [place[i] for i in rows]
        try:
            shift = measure.latent_shift(states[:, at], new[:, at], section.seed)
        except ValueError as error:
            refused.append(f"states of {name}: {error}")
            continue
        if reason := shift.pop("refused", ""):
            refused.append(f"states of {name}: {reason}")
        found["groups"][name] |= {"texts": len(rows), **shift}
    try:
        compare_tokens(config, base, tuned, problems, groups, found)
    except ValueError as error:
        refused.append(f"tokens: {error}")
    return found


def compare_tokens(
    config: settings.DriftConfig,
    base: Pair,
    tuned: Pair,
    problems: Sequence[Problem],
    groups: Mapping[str, list[int]],
    found: dict[str, Any],
) -> None:
    """Let the tuned model answer, and put what both say of the answers into `found`."""
    section = config.drift
    chosen = members(groups, section.responses)
    model, tokenizer = tuned
    template = build_template(config.prompt)
    context = min(pair[0].config.max_positions for pair in (base, tuned))
    kept, prompts = fitting_prompts(
        [problems[i] for i in chosen["all"]],
        template,
        tokenizer,
        context,
        config.problems.max_tokens,
    )
    sampler = build_sampler(config.sampling, model, tokenizer)
    with meter(sampler, len(prompts)) as progress:
        drawn = sampler.generate(
            prompts,
            seed=section.seed,
            progress=progress,
            **sampling_options(config.sampling),
        )
    temperature = config.sampling.temperature or 1.0
    if tokenizer.has_tokens_of(base[1]):
        answers = [c.tokens for c in drawn]
        examples = [Example(p, a) for p, a in zip(prompts, answers, strict=True)]
        shifts = measure.token_shift(base[0], model, examples, temperature)
        found["moved"] = measure.moved_tokens(tokenizer, answers, shifts, section.most)
        scored = {
            problem.id: shift for problem, shift in zip(kept, shifts, strict=True)
        }
        measured = measure.token_measures
    else:
        found["refused"].append(
            "KL and ranks: the tokenizers differ; the text of the responses is scored instead"
        )
        asked = encode_prompts(kept, template, base[1], base[0].config.max_positions)
        texts = [c.text for c in drawn]
        values = measure.text_shift((base, tuned), (asked, prompts), texts, temperature)
        rows = zip(kept, texts, values, strict=True)
        scored = {problem.id: value for problem, text, value in rows if text}
        measured = measure.text_measures
    for name, rows in chosen.items():
        of_group = [scored[p] for p in (problems[i].id for i in rows) if p in scored]
        if len(of_group) < 2:
            found["refused"].append(
                f"tokens of {name}: {len(of_group)} responses to score"
            )
            continue
        numbers = measured(of_group, section.seed)
        found["groups"][name] |= {"responses": len(of_group), **numbers}
