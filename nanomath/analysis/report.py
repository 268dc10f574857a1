"""One HTML file that explains one run, or compares several: no server, no network, no account.

The tables are written by a template (page/report.html, with every text escaped), the curves are
drawn by plotly from inside the file, the rollouts by page/viewer.js. Completions are hostile text:
they reach the page only as base64 of compressed JSON and are shown as text, and the page's content
security policy lets it run its own scripts alone and ask the network for nothing.

plotly and not bokeh, both measured with 40 curves of 1,000 points: bokeh needed 7.6 s of Python to
describe them, plotly none, and a curve that is drawn when it is scrolled to costs either 30 to 60
ms. Its script is 4.8 MB, 1.9 MB as it lies in the file.

Numbers of tokens go as whole thousandths in columns over all episodes, compressed: 2,000 episodes
of 200 tokens whose numbers are all different make a page of less than 6 MB.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import numpy as np

from nanomath.analysis.compare import last_measured, measured_at, paired, right_share
from nanomath.analysis.diagnosis import Finding, diagnose
from nanomath.analysis.evaluation import mean_score
from nanomath.analysis.runs import (
    Curve,
    Record,
    Run,
    arms,
    config_differences,
    numbers,
    per_token,
)
from nanomath.analysis.statistics import FEWEST_SEEDS, t_quantile
from nanomath.data.files import read_optional

PAGE = Path(__file__).parent / "page"
METRICS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
POINTS = 2000  # of a curve: a chart has no more pixels
TOKENS = 500_000  # of all episodes of all runs in the page, which keeps it below 6 MB
GENERAL = {"NAME": r"[^/]+", "PART": r"[\w.]+", "KEY=VALUE": r".+=.+", "K": r"\d+"}
KINDS = 8  # a label with more values does not sort problems into kinds
LAYERS = re.compile(r"(update_ratio|grad_norm)/(.+)")


def report(
    runs: Sequence[Run], named: Mapping[str, Sequence[Run]] | None = None
) -> str:
    """The page about the runs, or about those of `named` arms. ValueError without plotly."""
    named = named or arms(runs)
    budget = TOKENS // sum(map(len, named.values()))
    explained = [
        explain(run, arm, called(run, arm, len(seeds)), budget)
        for arm, seeds in named.items()
        for run in seeds
    ]
    bulk = {
        "runs": [run.pop("bulk") for run in explained],
        "metrics": metric_docs(),
        "arms": list(named),
        "t": quantiles(max(map(len, named.values()))),
    }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((PAGE / "report.html").read_text("utf-8"))
    return template.render(
        runs=explained,
        title=" against ".join(named),
        differences=config_differences(
            [run for seeds in named.values() for run in seeds]
        ),
        pairs=pairs_of(named),
        nonce=secrets.token_urlsafe(16),
        style=(PAGE / "report.css").read_text("utf-8"),
        scripts=[
            (PAGE / name).read_text("utf-8") for name in ("viewer.js", "curves.js")
        ],
        plotly=packed(plotly_script()),
        bulk=packed(json.dumps(bulk, separators=(",", ":")).encode("ascii")),
    )


def quantiles(most: int) -> dict[int, float]:
    """By the number of seeds: half the 95% interval of their mean, in standard errors. Nothing
    where scipy is not installed, as for reports of single runs it need not be.
    """
    if find_spec("scipy") is None:
        return {}
    return {n: t_quantile(0.975, n - 1) for n in range(FEWEST_SEEDS, most + 1)}


def plotly_script() -> bytes:
    """plotly's own script. ValueError where it is not installed."""
    spec = find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the report's curves need plotly: pip install plotly")
    return (
        Path(spec.submodule_search_locations[0]) / "package_data/plotly.min.js"
    ).read_bytes()


def packed(content: bytes) -> str:
    """Compressed, as text that means nothing to HTML."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")


def called(run: Run, arm: str, seeds: int) -> str:
    """How the page calls a run: by its arm, and where that has several, by its seed."""
    return f"{arm}, seed {run.config.get('run.seed')}" if seeds > 1 else arm


def explain(run: Run, arm: str, name: str, budget: int) -> dict[str, Any]:
    """What the template shows of a run, and in "bulk" what the scripts do, with episodes of some
    `budget` tokens.
    """
    findings = diagnose(run)
    shown = chosen_episodes(run, findings, budget)
    return {
        "name": name,
        "arm": arm,
        "directory": str(run.directory),
        "facts": facts(run),
        "changed": run.changed(),
        "findings": [asdict(finding) for finding in findings],
        "breakdown": breakdown(run),
        "handoff": for_a_person(run),
        "drift": drift(run),
        "picks": picks(run.rollouts),
        "bulk": {
            "name": name,
            "arm": arm,
            "series": curves(run),
            "layers": layers(run),
            "groups": group_counts(run),
            **episodes(run, shown),
        },
    }


def facts(run: Run) -> dict[str, str]:
    """The header: what the run was made with and what it cost."""
    last = run.lines[-1]["step"] if run.lines else 0
    found = {"steps": f"{last} of {run.config.get('run.steps', '?')}"}
    if run.sittings:
        newest = run.sittings[-1]
        minutes = sum(sitting.get("minutes", 0) for sitting in run.sittings)
        found |= {
            "started": newest["began"],
            "command": " ".join(newest["command"]),
            "commit": newest["commit"] or "unknown",
            "versions": ", ".join(f"{k} {v}" for k, v in newest["versions"].items()),
            "machine": ", ".join(f"{k} {v}" for k, v in newest["machine"].items()),
            "minutes": f"{minutes:.1f} in {len(run.sittings)} sitting(s)",
            "peak memory": f"{max(s.get('peak_memory_gib', 0) for s in run.sittings):.2f} GiB",
        }
    if "tokens" in run.series:
        what = "tokens sampled" if run.kind == "grpo" else "response tokens trained on"
        found[what] = f"{sum(run.series['tokens'][1]):,.0f}"
    return found


def curves(run: Run) -> dict[str, list[list[float]]]:
    """The steps and values of each curve: the metrics without the layers', thinned."""
    return {
        name: thinned(*pair)
        for name, pair in run.series.items()
        if not LAYERS.fullmatch(name)
    }


def thinned(steps: Sequence[int], values: Sequence[float]) -> list[list[float]]:
    """At most POINTS points: of each stretch of steps the lowest and the highest."""
    if len(steps) <= POINTS:
        return [list(steps), list(values)]
    kept: list[int] = []
    for part in np.array_split(np.arange(len(steps)), POINTS // 2):
        low, high = (part[f(np.asarray(values)[part])] for f in (np.argmin, np.argmax))
        kept += sorted({int(low), int(high)})
    return [[steps[i] for i in kept], [values[i] for i in kept]]


def layers(run: Run) -> dict[str, Any]:
    """Matrices [part, step] of what the updates were in each part of the model."""
    found: dict[str, dict[str, Curve]] = {}
    for name, pair in run.series.items():
        if match := LAYERS.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = pair
    return {kind: layer_map(parts) for kind, parts in found.items()}


def layer_map(parts: Mapping[str, Curve]) -> dict[str, Any]:
    """The matrix of one kind, at the steps of the first part's curve."""
    steps, _ = thinned(*next(iter(parts.values())))
    known = [dict(zip(*pair, strict=True)) for pair in parts.values()]
    values = [[row.get(step) for step in steps] for row in known]
    return {"parts": list(parts), "steps": steps, "values": values}


def group_counts(run: Run) -> dict[str, Any]:
    """How many groups of each step had 0, 1, ... G right samples: a matrix [G + 1, step]."""
    lines = run.read("groups.jsonl")
    if not lines:
        return {}
    size = max(line["samples"] for line in lines)
    lines = lines[:: max(1, len(lines) // POINTS)]
    counts = [np.bincount(line["right"], minlength=size + 1) for line in lines]
    return {
        "samples": size,
        "steps": [line["step"] for line in lines],
        "counts": np.transpose(counts).tolist(),
    }


# --- episodes --------------------------------------------------------------------------------


def chosen_episodes(
    run: Run, findings: Sequence[Finding], budget: int = TOKENS
) -> list[Record]:
    """All logged episodes, or of a long run those of steps at even distances and of the steps
    that something is said about.
    """
    total = sum(len(record["tokens"]) for record in run.rollouts)
    if total <= budget:
        return run.rollouts
    steps = sorted({record["step"] for record in run.rollouts})
    every = -(-total // budget) + 1
    named = {finding.episode[0] for finding in findings if finding.episode}
    named |= {pick["step"] for pick in picks(run.rollouts)}
    kept = {*steps[::every], *steps[-1:], *named}
    return [record for record in run.rollouts if record["step"] in kept]


COLUMNS = ("advantages", "logprobs", "gap", "kl", "entropy", "ratio", "clipped")


def episodes(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    """The records for the viewer: texts as they are, tokens as numbers of `pieces`, and the
    numbers of tokens in columns.
    """
    ids = {i for record in records for i in record["tokens"]}
    known = run.pieces(ids) or {}
    pieces = list(dict.fromkeys(known.values()))
    place = {text: number for number, text in enumerate(pieces)}
    number_of = {i: place[text] for i, text in known.items()}
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for record in records:
        for name, values in token_columns(record).items():
            columns[name].extend(values)
    return {
        "pieces": pieces,
        "episodes": [_shown(record, number_of) for record in records],
        "columns": {name: thousandths(values) for name, values in columns.items()},
    }


def token_columns(record: Record) -> dict[str, list[float]]:
    """What is known of each token of an episode; NaN where an older run did not log it."""
    length = len(record["tokens"])
    unlogged = {"ratio": 1.0, "clipped": 0.0}
    return {
        name: per_token(record.get(name, unlogged.get(name, math.nan)), length)
        for name in COLUMNS
    }


def thousandths(values: Sequence[float]) -> list[int | None]:
    """Numbers as whole thousandths, None for NaN."""
    whole = np.rint(1000 * np.clip(np.asarray(values, np.float64), -1e6, 1e6))
    return [None if math.isnan(x) else int(x) for x in whole]


def _shown(record: Record, number_of: dict[int, int]) -> dict[str, Any]:
    names = "step prompt sample problem question answer text finish_reason"
    return {
        **{name: record.get(name) for name in names.split()},
        "found": record.get("found", ""),
        "rewards": record["rewards"],
        "length": len(record["tokens"]),
        "tokens": [number_of[i] for i in record["tokens"]] if number_of else [],
        "ids": [] if number_of else record["tokens"],
        **{
            n: record[n]
            for n in ("step_ends", "step_scores", "step_rewards", "hint", "level")
            if n in record
        },
    }


def picks(rollouts: Sequence[Record]) -> list[dict[str, Any]]:
    """Six episodes chosen by rule, each once."""
    if not rollouts:
        return []
    rules = {
        "highest reward": lambda r: r["rewards"]["total"],
        "lowest reward": lambda r: -r["rewards"]["total"],
        "largest advantage": lambda r: max(
            map(abs, numbers(r, "advantages")), default=0.0
        ),
        "longest": lambda r: len(r["tokens"]),
        "first cut at the limit": lambda r: (
            -r["step"] if r["finish_reason"] != "eos" else None
        ),
        "largest ratio": lambda r: max(
            (abs(math.log(max(x, 1e-9))) for x in numbers(r, "ratio")), default=None
        ),
    }
    found = []
    for name, rule in rules.items():
        values = [
            (value, -i)
            for i, r in enumerate(rollouts)
            if (value := rule(r)) is not None
        ]
        if values:
            record = rollouts[-max(values)[1]]
            found.append(
                {"rule": name, **{n: record[n] for n in ("step", "prompt", "sample")}}
            )
    return found


# --- held-out problems -----------------------------------------------------------------------


def breakdown(run: Run) -> list[dict[str, Any]]:
    """pass@1 of the problems that share a label, at the first and the last measurement, the
    last with its interval. Labels with many values are no kinds.
    """
    steps = sorted({record["step"] for record in run.heldout})
    if not steps:
        return []
    first, last = (measured_at(run, step) for step in (steps[0], steps[-1]))
    keys = dict.fromkeys(
        key for rows in last.values() for key in rows[0].get("labels", {})
    )
    found = []
    for key in keys:
        values = {rows[0]["labels"].get(key) for rows in last.values()} - {None}
        for value in sorted(values, key=str) if 1 < len(values) <= KINDS else ():
            problems = [
                p for p, rows in last.items() if rows[0]["labels"].get(key) == value
            ]
            after = mean_score([right_share(last[p]) for p in problems])
            before = [right_share(first[p]) for p in problems if p in first]
            found.append(
                {
                    "label": f"{key} = {value}",
                    "problems": len(problems),
                    "before": fmean(before) if before else None,
                    "after": after,
                }
            )
    return found


def for_a_person(run: Run) -> list[Record]:
    """The rows of handoff.jsonl, if `eval` wrote one there (confidence.handoff), the least sure
    first.
    """
    sure = []
    for row in run.read("handoff.jsonl"):
        confidence, measure = row.get("confidence"), row.get("measure")
        if not isinstance(confidence, dict) or not isinstance(measure, str):
            continue
        found = confidence.get(measure)
        if found is None or isinstance(found, int | float):
            sure.append((-math.inf if found is None else found, row))
    return [row for _, row in sorted(sure, key=itemgetter(0))]


def drift(run: Run) -> dict[str, Any]:
    """What `drift` found of the run; empty where it was not asked. ValueError for a drift.json of
    another form.
    """
    found = read_optional(run.directory / "drift.json")
    parts = [found.get(name) for name in ("asked", "meaning", "groups")]
    if found and not (
        all(isinstance(part, dict) for part in parts)
        and isinstance(found["groups"].get("all"), dict)
        and isinstance(found.get("refused"), list)
    ):
        raise ValueError(
            f"{run.directory / 'drift.json'} is not what drift writes: run it again"
        )
    return found


def pairs_of(arms: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """The first arm against each other one, by runs of the same seed where there are such, on the
    held-out problems that both were asked. Of a single arm of two runs: these.
    """
    (first, seeds), *others = arms.items()
    found = []
    for arm, runs in others or [(first, seeds[1:2])]:
        pairs = [(a, b) for a in seeds for b in runs if seed_of(a) == seed_of(b)]
        pairs += [(a, b) for a in seeds for b in runs]
        if pairs:
            a, b = pairs[0]
            found.append(
                {
                    "a": called(a, first, len(seeds)),
                    "b": called(b, arm, len(runs) + (arm == first)),
                    "paired": paired(last_measured(a), last_measured(b)),
                }
            )
    return found


def seed_of(run: Run) -> Any:
    return run.config.get("run.seed")


# --- what the metrics mean -------------------------------------------------------------------


def metric_docs() -> list[dict[str, Any]]:
    """The rows of docs/metrics.md: section, pattern of the names, what it is, what to expect.
    Nothing where nanomath is installed without its docs.
    """
    if not METRICS_PAGE.exists():
        return []
    section = ""
    found = []
    for line in METRICS_PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:].split(" (")[0]
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for name in re.findall(r"`([^`]+)`", cells[0]) if len(cells) == 4 else ():
            pattern = re.sub(
                rf"(?<![A-Z])({'|'.join(GENERAL)})(?![A-Z])",
                lambda word: GENERAL[word[0]],
                re.escape(name),
            )
            what, expected = (
                cells[i].replace("\\|", "|").replace("`", "") for i in (1, 3)
            )
            found.append(
                {
                    "section": section,
                    "pattern": f"^{pattern}$",
                    "what": what,
                    "expect": expected,
                }
            )
    return found
