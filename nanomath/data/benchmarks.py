r"""General benchmarks: where the rows of each are found, and what a model is asked for a row.

ARC-Challenge (arXiv 1803.05457), CommonsenseQA (1811.00937), TruthfulQA (2109.07958), six tasks
of BIG-Bench Hard (2210.09261), IFEval (2311.07911), SVAMP (2103.07191), MGSM (2210.03057) and
GSM8K (2110.14168). Prompts and choices are those of lm-evaluation-harness 0.4.13 (tasks
arc_challenge, commonsense_qa, truthfulqa_mc1 and _mc2, bbh_zeroshot_*, ifeval), all without
examples but for the fixed preset of TruthfulQA.

A row becomes a Problem whose question is the prompt as the model sees it. One that offers
choices has them in its metadata: `choices`, what may follow the prompt; `asked` and `options`,
from which a prompt is made that asks for a letter; and for each metric which choices are right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from nanomath.data.problem import Problem
from nanomath.data.problem_sets import find_records, load_problems

GROUPS = ("maths", "other_reasoning", "non_reasoning")
# How LLM-Adapters (arXiv 2304.01933) writes a question with choices.
ADAPTERS = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\n(Answer1: .*)\n\nAnswer format: .*",
    re.DOTALL,
)
# What stands before every question of TruthfulQA (its paper's appendix E, as in the harness).
TRUTHFULQA_PRESET = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""
BBH_TASKS = {  # what the task is, which stands before the question
    "boolean_expressions": "Evaluate the result of a random Boolean expression.",
    "date_understanding": "Infer the date from context.",
    "navigate": "Given a series of navigation instructions, determine whether one would end up "
    "back at the starting point.",
    "object_counting": "Questions that involve enumerating objects and asking the model to count "
    "them.",
    "web_of_lies": "Evaluate a random boolean function expressed as a word problem.",
    "word_sorting": "Sort a list of words.",
}

Make = Callable[[str, Any], Problem]  # (id, row) -> problem


# --- rows to problems ------------------------------------------------------------------------


def choices_of(row: Any) -> tuple[str, list[str], int]:
    """Return question, texts of the choices and which is right, of a row as the hub, the
    makers of ARC and CommonsenseQA, or LLM-Adapters write it.
    """
    if "instruction" in row:
        question, listed = ADAPTERS.fullmatch(row["instruction"]).groups()
        _, *parts = re.split(r"\s*\bAnswer(\d+): ", listed)
        labels, texts = parts[::2], parts[1::2]
        return question, texts, labels.index(row["answer"].removeprefix("answer"))
    inside = row["question"]
    question, choices = (
        (inside["stem"], inside["choices"])
        if isinstance(inside, dict)
        else (inside, row["choices"])
    )
    if isinstance(choices, dict):
        labels, texts = choices["label"], choices["text"]
    else:
        labels, texts = zip(
            *((one["label"], one["text"]) for one in choices), strict=True
        )
    return question, list(texts), list(labels).index(row["answerKey"])


def arc(name: str, row: Any) -> Problem:
    """The choices are the texts of the answers."""
    question, texts, right = choices_of(row)
    told = {"asked": question, "options": texts, "choices": texts, "right": right}
    return Problem(name, f"Question: {question}\nAnswer:", texts[right], metadata=told)


def commonsenseqa(name: str, row: Any) -> Problem:
    """The choices are the letters of the answers, which stand in the prompt."""
    question, texts, right = choices_of(row)
    letters = list(ascii_uppercase[: len(texts)])
    told = {"asked": question, "options": texts, "choices": letters, "right": right}
    prompt = f"Question: {question.strip()}\n{lettered(texts)}\nAnswer:"
    return Problem(name, prompt, texts[right], metadata=told)


def truthfulqa(name: str, row: Any) -> Problem:
    """The choices are those of MC1 (one of them is true) and of MC2 (some are); `mc1` and
    `mc2` say of each which they are and which of them are true.
    """
    targets = [row["mc1_targets"], row["mc2_targets"]]
    mc1, mc2 = (
        dict(zip(t["choices"], t["labels"], strict=True)) if "choices" in t else t
        for t in targets
    )
    choices = list(mc1 | mc2)
    (true,) = (text for text, label in mc1.items() if label)
    if not {0, 1} <= set(mc2.values()):
        raise ValueError("mc2_targets needs true and false choices")
    options = sorted(mc1)  # in the files the true one comes first
    told = {"asked": row["question"], "options": options, "right": options.index(true)}
    told["choices"] = choices
    for key, labels in ("mc1", mc1), ("mc2", mc2):
        told[key] = [
            [choices.index(text), int(label)] for text, label in labels.items()
        ]
    prompt = f"{TRUTHFULQA_PRESET}Q: {row['question']}\nA:"
    return Problem(name, prompt, true, metadata=told)


def ifeval(name: str, row: Any) -> Problem:
    """The instructions, each with what is given to its checker."""
    given = [
        {key: value for key, value in kwargs.items() if value is not None}
        for kwargs in row["kwargs"]
    ]
    instructions = list(zip(row["instruction_id_list"], given, strict=True))
    if not instructions:
        raise ValueError("instruction_id_list is empty")
    told = {"instructions": [list(pair) for pair in instructions]}
    name = f"ifeval-{row['key']}"
    return Problem(name, row["prompt"], "all instructions followed", metadata=told)


def lettered(texts: Sequence[str]) -> str:
    """Return the texts on lines that begin with A., B., ..."""
    return "\n".join(
        f"{letter}. {text}"
        for letter, text in zip(ascii_uppercase, texts, strict=False)
    )


def as_letter_question(problem: Problem) -> Problem:
    """Return the problem with a prompt that asks for the letter of the right choice."""
    told = problem.metadata
    prompt = (
        f"{told['asked']}\n\n{lettered(told['options'])}\n\n"
        "Answer with the letter of the right choice."
    )
    return Problem(problem.id, prompt, ascii_uppercase[told["right"]], metadata=told)


def from_rows(make: Make, source: str, split: str, limit: int) -> list[Problem]:
    """Return the problems that `make` makes of the first `limit` rows (0: of all).

    ValueError, with the place, for a row of another layout.
    """
    problems = []
    for name, place, row in islice(find_records(source, split), limit or None):
        try:
            problems.append(make(name, row))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            shown = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{place}: no row of {make.__name__} as it is known "
                f"({type(error).__name__}: {error}); there is: {shown:.200}"
            ) from None
    if not problems:
        raise ValueError(f"{source}: no problems")
    return problems


def bbh(task: str, source: str, split: str, limit: int) -> list[Problem]:
    """Return the problems of a task of BIG-Bench Hard."""
    return [
        Problem(
            problem.id,
            f"{BBH_TASKS[task]}\n\nQ: {problem.question}\nA:",
            problem.answer,
            metadata={"asked": problem.question},
        )
        for problem in load_problems(source, split=split, limit=limit)
    ]


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its group, where it is on the hub and what its file is usually called
    (under some directory, the first that is there), how it is loaded, its metric in
    comparisons and what its protocol is. `new_tokens` is the longest answer, 0 where choices
    are compared by log-likelihood; `own_prompt` is false where the config's template asks.
    """

    group: str
    hub: str
    split: str
    files: tuple[str, ...]
    load: Callable[[str, str, int], list[Problem]]
    metric: str
    protocol: str
    new_tokens: int = 0
    stop: tuple[str, ...] = ()
    own_prompt: bool = True


def maths_benchmark(hub: str, files: tuple[str, ...], header: bool = True) -> Benchmark:
    """Return a benchmark whose problems are asked as the config's [prompt] says."""

    def load(source: str, split: str, limit: int) -> list[Problem]:
        return load_problems(source, split=split, limit=limit, header=header)

    return Benchmark(
        "maths",
        hub,
        "test",
        files,
        load,
        "accuracy",
        "the answer found by the verifier",
        512,
        own_prompt=False,
    )


LIKELIEST = "the likeliest choice after the prompt of {}, no examples"

BENCHMARKS: dict[str, Benchmark] = {
    "arc_challenge": Benchmark(
        "other_reasoning",
        "allenai/ai2_arc:ARC-Challenge",
        "test",
        ("arc_challenge/test.json*", "ARC-Challenge-Test.jsonl"),
        partial(from_rows, arc),
        "acc_norm",
        LIKELIEST.format("lm-evaluation-harness' arc_challenge"),
    ),
    "commonsenseqa": Benchmark(
        "non_reasoning",
        "tau/commonsense_qa",
        "validation",
        ("commonsenseqa/dev_rand_split.jsonl", "dev_rand_split.jsonl"),
        partial(from_rows, commonsenseqa),
        "acc",
        LIKELIEST.format("lm-evaluation-harness' commonsense_qa"),
    ),
    "truthfulqa": Benchmark(
        "non_reasoning",
        "truthfulqa/truthful_qa:multiple_choice",
        "validation",
        ("truthfulqa/mc_task.json", "mc_task.json"),
        partial(from_rows, truthfulqa),
        "mc2",
        LIKELIEST.format("lm-evaluation-harness' truthfulqa_mc1 and truthfulqa_mc2")
        + " but for its preset of six",
    ),
    **{
        f"bbh_{task}": Benchmark(
            "other_reasoning",
            f"lukaemon/bbh:{task}",
            "test",
            (f"bbh/{task}.json", f"{task}.json"),
            partial(bbh, task),
            "exact_match",
            f"the answer found in the text as in lm-evaluation-harness' bbh_zeroshot_{task}, "
            "flexible-extract; no examples",
            256,
            ("</s>", "Q:", "<|im_end|>"),
        )
        for task in BBH_TASKS
    },
    "ifeval": Benchmark(
        "non_reasoning",
        "google/IFEval",
        "train",
        ("ifeval/input_data.jsonl", "input_data.jsonl"),
        partial(from_rows, ifeval),
        "prompt_strict",
        "25 instructions checked by rules (arXiv 2311.07911); no examples",
        1280,
    ),
    "svamp": maths_benchmark("ChilleD/SVAMP", ("svamp/test.jsonl", "SVAMP.json")),
    **{
        f"mgsm_{language}": maths_benchmark(
            f"juletxara/mgsm:{language}", (f"mgsm_{language}.tsv",), header=False
        )
        for language in ("en", "ja")
    },
    "gsm8k": maths_benchmark("openai/gsm8k:main", ("gsm8k/test.jsonl",)),
}


def load_benchmark(
    name: str, data: str, sources: Mapping[str, str], limit: int
) -> tuple[str, list[Problem]]:
    """Return where a benchmark was found and its problems: in the file or hub dataset that
    `sources` names, or in the directory `data` or below, or on the hub where that is empty.

    FileNotFoundError where it is not there; ValueError for several files of its name, and for
    what is in them.
    """
    benchmark = BENCHMARKS[name]
    source = sources.get(name) or (
        find_file(name, benchmark.files, data) if data else benchmark.hub
    )
    return source, benchmark.load(source, benchmark.split, limit)


def find_file(name: str, files: Sequence[str], data: str) -> str:
    """Return the file of a benchmark in the directory `data` or below."""
    for pattern in files:
        found = sorted(map(str, Path(data).rglob(pattern)))
        if len(found) > 1:
            raise ValueError(
                f"{data} holds several files of {name}: {', '.join(found):.300}; "
                f"name one of them in sources.{name}"
            )
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{data} holds no {name} (looked for {', '.join(files)} in it and below); name its file or "
        f"hub dataset in sources.{name}"
    )
