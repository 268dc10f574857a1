"""General benchmarks: log-likelihoods by brute force, what each result is worth, intervals; and
lm-evaluation-harness itself, where it is installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomath import settings
from nanomath.analysis import general
from nanomath.data.benchmarks import BBH_TASKS, BENCHMARKS, as_letter_question
from nanomath.data.problem import Problem


def question(text: str, choices: list[str], right: int = 0) -> Problem:
    told = {"asked": text, "options": choices, "choices": choices, "right": right}
    return Problem(text, text, choices[right], metadata=told)


QUESTIONS = [
    question(
        "Question: Which is a tree?\nAnswer:",
        ["an oak", "a", "größer", "the sea of 12"],
    ),
    question("Question: 1 + 2?\nAnswer:", ["3", "12 apples"], 1),
]


def test_log_likelihoods_are_those_of_whole_sequences(new_model, tokenizer):
    """One pass a choice over prompt and choice, in float64, without shared prompts."""
    model = new_model(3, torch.float64)
    examples = [general.choice_examples(problem, tokenizer) for problem in QUESTIONS]
    found = general.choice_logprobs(model, examples, 64)
    for problem, row in zip(QUESTIONS, found, strict=True):
        start = len(tokenizer.encode(problem.question, add_special_tokens=True))
        for choice, logprob in zip(problem.metadata["choices"], row, strict=True):
            whole = f"{problem.question} {choice}"
            tokens = tokenizer.encode(whole, add_special_tokens=True)
            with torch.no_grad():
                rows = model(torch.tensor([tokens]))[0].log_softmax(-1)
            expected = sum(
                rows[t - 1, tokens[t]].item() for t in range(start, len(tokens))
            )
            # what is kept between are float32 numbers
            assert logprob == pytest.approx(expected, abs=1e-4) and logprob < -1


def test_prompts_are_computed_once(new_model, tokenizer, monkeypatch):
    seen = []
    model = new_model()
    hidden = model.hidden
    monkeypatch.setattr(
        model,
        "hidden",
        lambda tokens, **rest: seen.append(tokens) or hidden(tokens, **rest),
    )
    (examples,) = [general.choice_examples(QUESTIONS[0], tokenizer)]
    general.choice_logprobs(model, [examples], 0)
    own = sum(len(example.response) for example in examples)
    assert [tokens.shape[1] for tokens in seen] == [len(examples[0].prompt) + own]


def test_accuracies_divide_by_characters_and_bytes():
    problem = question("?", ["ab", "größer", "a longer one"])
    scores = [
        general.choice_scores(problem, logprobs)
        for logprobs in ([-1.0, -2.0, -3.0], [-4.0, -12.1, -26.0], [-4.0, -11.9, -26.0])
    ]
    # per character -2, -2.02 or -1.98, -2.17; per byte -2, -1.51 or -1.49, -2.17
    assert [s["acc"] for s in scores] == [1, 1, 1]
    assert [s["acc_norm"] for s in scores] == [0, 1, 0]
    assert [s["acc_bytes"] for s in scores] == [0, 0, 0]


def test_truthfulqa():
    mc = [[0, 1], [1, 0], [2, 0]]
    assert (
        general.mc1(mc, [-1.0, -2.0, -3.0]) == 1 and general.mc1(mc, [-2, -1, -3]) == 0
    )
    labels = [[0, 1], [3, 1], [1, 0]]
    p = np.array([0.2, 0.3, 0.1, 0.05])
    expected = (0.2 + 0.05) / (0.2 + 0.05 + 0.3)
    assert general.mc2(labels, np.log(p)) == pytest.approx(expected)
    # No underflow
    assert general.mc2(labels, np.log(p) - 2000) == pytest.approx(expected)
    told = {"choices": ["a", "b", "c", "d"], "mc1": mc, "mc2": labels}
    scores = general.choice_scores(Problem("x", "x", "a", metadata=told), np.log(p))
    assert scores == {"mc1": 0.0, "mc2": pytest.approx(expected)}


DATES = "Which day?\nOptions:\n(A) 01/02/2001\n(B) 03/04/2005\n(C) 03/04/2005 or so"


@pytest.mark.parametrize(
    ("asked", "gold", "text", "right"),
    [
        ("not True is", "False", " False. True", True),
        ("not True is", "False", "It is true", False),
        (DATES, "(B)", "The answer is (B), not (A)", True),
        (DATES, "(B)", "It was 03/04/2005.", True),
        (DATES, "(C)", "It was 03/04/2005 or so.", True),
        (DATES, "(B)", "Answer: B", True),
        (DATES, "(B)", "Answer: D", False),
        (DATES, "(B)", "", False),
        ("Do you return?\nOptions:\n- Yes\n- No", "No", "no, never", True),
        ("Do you return?\nOptions:\n- Yes\n- No", "No", "Not so: Yes", False),
        ("How many things?", "12", "There are 12 of 13.", True),
        ("How many things?", "12", "There are twelve.", True),
        ("How many things?", "12", "Many.", False),
        ("Does Ann tell the truth?", "No", "Ann does not tell the truth.", True),
        ("Does Ann tell the truth?", "Yes", "Ann tells the truth.", True),
        ("Does Ann tell the truth?", "Yes", "No. Ann lies; yes", False),
        ("Sort: List: oak elm ash", "ash elm oak", "oak elm: ash, elm, oak.", True),
        ("Sort: List: oak elm ash", "ash elm oak", "ash elm", False),
    ],
)
def test_answers_of_bbh(asked, gold, text, right):
    problem = Problem("x", asked, gold, metadata={"asked": asked})
    assert general.exact_match(problem, text) == {"exact_match": float(right)}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True),
        ("(B) because", True),
        (r"So \boxed{B}.", True),
        ("The answer is B.", True),
        ("**B. 12 apples**", True),
        ("A", False),
        ("Because", False),
        ("12 apples", False),
        ("", False),
    ],
)
def test_letters(text, right):
    problem = as_letter_question(QUESTIONS[1])
    assert problem.answer == "B" and "B. 12 apples" in problem.question
    assert general.letter_accuracy(problem, text) == {"acc": float(right)}


def test_instructions_of_a_prompt_are_one_draw():
    """Two prompts of one and of three instructions: 1 of 4 followed, not the mean of 0 and 1/3."""
    config = settings.GeneralConfig()
    problems = [
        Problem(
            str(n),
            "x",
            "x",
            metadata={"instructions": [["punctuation:no_comma", {}]] * n},
        )
        for n in (1, 3)
    ]
    records = [
        {"problem": "1", "prompt_strict": 0.0, "instruction_strict": 0.0, "text": "x"},
        {
            "problem": "3",
            "prompt_strict": 0.0,
            "instruction_strict": 1 / 3,
            "text": "x",
        },
    ]
    scores = general.summary(config, "ifeval", "here", problems, records)["scores"]
    assert scores["instruction_strict"]["mean"] == pytest.approx(0.25)
    assert scores["instruction_strict"]["high"] == pytest.approx(1 / 3)
    assert set(scores) == {"prompt_strict", "instruction_strict"}


def test_protocols_tell_ways_of_asking_apart():
    ways = [
        settings.GeneralConfig(),
        settings.GeneralConfig(choices="generation"),
        settings.GeneralConfig(max_new_tokens=7),
        settings.GeneralConfig(prompt=settings.Prompt(chat=False)),
        settings.GeneralConfig(prompt=settings.Prompt(template="Q: {question}")),
        settings.GeneralConfig(prompt=settings.Prompt(few_shot=[{"question": "1?"}])),
        settings.GeneralConfig(prompt=settings.Prompt(few_shot=[{"question": "2?"}])),
        settings.GeneralConfig(lenient=False),
    ]
    told = {name: [general.protocol(way, name) for way in ways] for name in BENCHMARKS}
    assert [len(set(told[name])) for name in ("arc_challenge", "ifeval", "svamp")] == [
        2,
        3,
        7,
    ]
    for task in BBH_TASKS:
        assert f"bbh_zeroshot_{task}" in told[f"bbh_{task}"][0]


# --- the harness itself ----------------------------------------------------------------------

OURS_OF_THEIRS = {  # benchmark: task file of lm-evaluation-harness, our metric by theirs
    "arc_challenge": ("arc/arc_easy.yaml", {"acc": "acc", "acc_norm": "acc_norm"}),
    "commonsenseqa": ("commonsense_qa/default.yaml", {"acc": "acc"}),
    "truthfulqa": ("truthfulqa/truthfulqa_mc1.yaml", {"acc": "mc1"}),
}


@pytest.mark.slow
def test_lm_evaluation_harness_gives_the_same(new_model, tokenizer, tmp_path):
    """Its own task files on made-up rows: every log-likelihood and every accuracy."""
    lm_eval = pytest.importorskip("lm_eval")
    import yaml
    from lm_eval.models.huggingface import HFLM

    import nanomath
    from nanomath.data.benchmarks import load_benchmark

    sums = [(f"What is {a} + {b}?", [str(a + b + c) for c in range(5)], a % 5)
            for a in range(20, 32) for b in (7, 80)]  # fmt: skip
    rows = [
        {
            "question": asked,
            "choices": {
                "label": list("ABCDE"),
                "text": [f"{t} größer"[: 2 + len(t)] for t in texts],
            },
            "answerKey": "ABCDE"[right],
            "mc1_targets": {"choices": texts, "labels": [1, 0, 0, 0, 0]},
            "mc2_targets": {"choices": texts, "labels": [1, 1, 0, 0, 0]},
        }
        for asked, texts, right in sums
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = new_model(1, max_positions=1024)
    nanomath.save_model(model, tokenizer, tmp_path / "model")
    theirs = HFLM(
        pretrained=str(tmp_path / "model"), dtype="float32", device="cpu", batch_size=8
    )
    config = settings.GeneralConfig()
    for name, (task_file, metrics) in OURS_OF_THEIRS.items():
        path = Path(lm_eval.__file__).parent / "tasks" / task_file
        task = yaml.safe_load(path.read_text("utf-8"))
        task = {
            k: v for k, v in task.items() if not k.endswith(("_split", "_name", "tag"))
        }
        task |= {"task": name, "dataset_path": "json", "test_split": "test"}
        task |= {"dataset_kwargs": {"data_files": {"test": str(file)}}}
        result = lm_eval.simple_evaluate(theirs, tasks=[task], bootstrap_iters=0)
        _, problems = load_benchmark(name, "", {name: str(file)}, 0)
        problems, asked = general.prepare(config, name, problems, tokenizer, 1024)
        logprobs = general.choice_logprobs(model, asked, 2048)
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        for problem, row, sample in zip(problems, logprobs, samples, strict=True):
            assert sample["arguments"][0][0] == problem.question
            ours = row if name != "truthfulqa" else row[: len(sample["filtered_resps"])]
            assert [r[0] for r in sample["filtered_resps"]] == pytest.approx(
                ours, abs=1e-3
            )
        scores = [
            general.choice_scores(p, r) for p, r in zip(problems, logprobs, strict=True)
        ]
        for metric, our in metrics.items():
            found = result["results"][name][f"{metric},none"]
            assert found == pytest.approx(np.mean([s[our] for s in scores]))
            assert 0 < found < 1
