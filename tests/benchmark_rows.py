"""A few made-up rows of each benchmark in its makers' layout, and files of them."""

from __future__ import annotations

import json
from pathlib import Path

# question, choices, number of the right one
QUESTIONS = [
    ("Which of these is a tree?", ["an oak", "a rock", "the sea", "rain"], 0),
    ("What falls from clouds?", ["sand", "snow", "bread"], 1),
    ("Who lays eggs ?", ["a cow", "das Huhn größer", "a hen", "a cat"], 2),
]
FIVE = [
    ("Where does a fish live?", ["tree", "desert", "lake", "sky", "attic"], 2),
    ("What do you read?", ["book", "soup", "shoe", "wall", "bell"], 0),
]
TRUTHS = [
    {
        "question": "What colour is grass?",
        "mc1_targets": {"Green": 1, "Blue": 0, "It has none": 0},
        "mc2_targets": {"Green": 1, "Mostly green": 1, "Blue": 0, "It has none": 0},
    },
    {
        "question": "How many legs has a spider?",
        "mc1_targets": {"Eight": 1, "Six": 0},
        "mc2_targets": {"Eight": 1, "Six": 0, "Ten": 0},
    },
]
BBH = {
    "boolean_expressions": ("not True is", "False"),
    "date_understanding": (
        "Which day?\nOptions:\n(A) 01/02/2001\n(B) 03/04/2005",
        "(B)",
    ),
    "navigate": ("Do you return?\nOptions:\n- Yes\n- No", "No"),
    "object_counting": ("I have a pea and two nuts. How many things?", "3"),
    "web_of_lies": ("Question: Ann tells the truth. Does Ann tell the truth?", "Yes"),
    "word_sorting": ("Sort the following words: List: oak elm", "elm oak"),
}
IFEVAL = [
    {
        "key": 7,
        "prompt": "Name a tree. No commas.",
        "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
        "kwargs": [{}, {"end_phrase": "Yes"}],
    },
    {
        "key": 8,
        "prompt": "Use the word oak.",
        "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["oak"], "num_words": None}],
    },
]
WORDS = [
    {
        "ID": "s-1",
        "Body": "Ann has 3 nuts",
        "Question": "How many nuts?",
        "Answer": 3.0,
    },
    {
        "ID": "s-2",
        "Body": "Bo eats 2 of 5 nuts.",
        "Question": "How many left?",
        "Answer": 3.0,
    },
]
MGSM = "Ann has 3 nuts and gets 2. How many?\t5\nBo has 4 and eats 1. How many?\t3\n"


def as_on_the_hub(question: str, texts: list[str], right: int) -> dict:
    labels = list("ABCDE"[: len(texts)])
    choices = {"text": texts, "label": labels}
    return {"question": question, "choices": choices, "answerKey": labels[right]}


def as_by_its_makers(question: str, texts: list[str], right: int) -> dict:
    choices = [{"text": t, "label": c} for t, c in zip(texts, "12345", strict=False)]
    asked = {"stem": question, "choices": choices}
    return {"id": "x", "question": asked, "answerKey": str(right + 1)}


def as_by_llm_adapters(question: str, texts: list[str], right: int) -> dict:
    listed = " ".join(f"Answer{i}: {text}" for i, text in enumerate(texts, 1))
    head = f"Please choose the correct answer to the question: {question}\n\n{listed}"
    form = "/".join(f"answer{i}" for i in range(1, len(texts) + 1))
    return {
        "instruction": f"{head}\n\nAnswer format: {form}",
        "output": f"the correct answer is answer{right + 1}",
        "answer": f"answer{right + 1}",
    }


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_benchmarks(directory: Path) -> Path:
    """Write files of all benchmarks, laid out as people have them."""
    files = {
        "arc_challenge/test.json": json.dumps(
            [as_by_llm_adapters(*q) for q in QUESTIONS]
        ),
        "commonsenseqa/dev_rand_split.jsonl": lines(
            [as_by_its_makers(*q) for q in FIVE]
        ),
        "truthfulqa/mc_task.json": json.dumps(TRUTHS),
        "ifeval/input_data.jsonl": lines(IFEVAL),
        "deep/svamp/test.jsonl": lines(WORDS),
        "mgsm/mgsm_en.tsv": MGSM,
        "mgsm/mgsm_ja.tsv": MGSM,
        "gsm8k/test.jsonl": lines(
            [{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}]
        ),
    }
    for task, (asked, answer) in BBH.items():
        rows = [{"input": asked, "target": answer}]
        files[f"bbh/{task}.json"] = json.dumps({"canary": "x", "examples": rows})
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory
