r"""Running general benchmarks: choices by log-likelihood, written answers by greedy decoding.

    log p(choice | prompt) = sum_t log pi(y_t | prompt, y_<t),   y the tokens of " " + choice

    acc        the choice of highest log p is right
    acc_norm   the same of log p / characters of the choice; acc_bytes: / bytes in UTF-8
    mc1        acc over the choices of which one is true (TruthfulQA, arXiv 2109.07958)
    mc2        sum of p over true choices / sum of p over all

These are lm-evaluation-harness' definitions (0.4.13; its acc_norm counts characters). So is the
tokenisation: the tokens of a choice are those of prompt + choice after as many as the prompt
alone has. All choices of a question share its prompt, which is computed once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np
from tqdm import tqdm

from nanomath import settings
from nanomath.analysis.evaluation import mean_score
from nanomath.data.benchmarks import BENCHMARKS, as_letter_question
from nanomath.data.problem import Problem
from nanomath.data.prompts import PromptTemplate
from nanomath.models import Tokenizer, Transformer
from nanomath.models.batches import Example
from nanomath.models.scores import response_scores
from nanomath.rewards import extract_answer, is_correct
from nanomath.rewards.extraction import after_reasoning
from nanomath.rewards.instructions import check_instructions, loose, strict
from nanomath.rollout import Sampler
from nanomath.rollout.meter import meter
from nanomath.training.build import build_template, encode_prompts

AT_ONCE = 64  # questions whose choices are scored before the progress is shown again
NUMBERS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
"""
Scores = dict[str, float]
Record = dict[str, Any]

# --- what a result is worth ------------------------------------------------------------------


def choice_scores(problem: Problem, logprobs: Sequence[float]) -> Scores:
    """Score one question by the log-likelihoods of its choices."""
    told = problem.metadata
    if "mc1" in told:
        return {"mc1": mc1(told["mc1"], logprobs), "mc2": mc2(told["mc2"], logprobs)}
    choices = told["choices"]
    lengths = {
        "acc": [1] * len(choices),
        "acc_norm": [len(choice) for choice in choices],
        "acc_bytes": [len(choice.encode()) for choice in choices],
    }
    return {
        name: float(np.argmax(np.divide(logprobs, by)) == told["right"])
        for name, by in lengths.items()
    }


def mc1(labels: Sequence[Sequence[int]], logprobs: Sequence[float]) -> float:
    """Say whether the likeliest of the labelled choices [number, is it true] is true."""
    best = max(labels, key=lambda label: logprobs[label[0]])
    return float(best[1])


def mc2(labels: Sequence[Sequence[int]], logprobs: Sequence[float]) -> float:
    """Return the share of the probability of the labelled choices that true ones have."""
    among = np.array([logprobs[number] for number, _ in labels])
    chance = np.exp(among - among.max())
    return float(chance @ np.array([true for _, true in labels]) / chance.sum())


def bbh_answer(problem: Problem, text: str) -> str:
    """Find the answer to a task of BIG-Bench Hard in a text, "" where there is none."""
    asked = problem.metadata["asked"]
    if re.fullmatch(r"\([A-Z]\)", problem.answer):
        return option_in(text, asked)
    if problem.answer in ("True", "False"):
        return first(r"\b(?:True|False)\b", text)
    if re.fullmatch(r"\d+", problem.answer):
        return first(r"[-0-9]+", text) or number_word(text)
    if "List:" in asked:
        return sorted_words(text, asked)
    if "truth" in asked:
        return truth(text)
    return first(r"\b(?:Yes|No|yes|no)\b", text)


def first(pattern: str, text: str) -> str:
    """Return the first match of a pattern, "" where there is none."""
    found = re.search(pattern, text)
    return found[0] if found else ""


def truth(text: str) -> str:
    """Return whether someone is said to tell the truth."""
    said = first(
        r"\b(?:no|does not tell the truth|is not telling the truth"
        r"|yes|tells the truth|is telling the truth)\b",
        text.lower(),
    )
    return "" if not said else "no" if re.match("no$|.*not", said) else "yes"


def number_word(text: str) -> str:
    """Return the first number up to twenty that is written as a word, in digits."""
    words = NUMBERS.split()
    found = first(rf"\b(?:{'|'.join(words)})\b", text.lower())
    return str(words.index(found)) if found else ""


def sorted_words(text: str, asked: str) -> str:
    """Return the words of the list in the order in which they stand last in the text."""
    listed = map(re.escape, asked.split("List:")[1].split())
    found = re.findall("|".join(rf"\b{word}\b" for word in listed), text)
    return " ".join(reversed(dict.fromkeys(reversed(found))))


def option_in(text: str, asked: str) -> str:
    """Return the first "(A)" of a text; or the letter of the option that it words; or the letter
    after a colon.
    """
    if found := first(r"\([A-Z]\)", text):
        return found
    words = {
        re.sub(r"[^\w\s]", "", option).strip().lower(): f"({letter})"
        for letter, option in re.findall(r"\(([A-Z])\)([^\n(]*)", asked)
    }
    plain = re.sub(r"[^\w\s]", "", text).lower()
    longest = sorted(filter(None, words), key=len, reverse=True)
    if found := longest and first("|".join(map(re.escape, longest)), plain):
        return words[found]
    letter = re.search(rf":\s*([A-{ascii_uppercase[max(len(words) - 1, 0)]}])", text)
    return f"({letter[1]})" if letter else ""


def exact_match(problem: Problem, text: str) -> Scores:
    """Compare answers without case, commas, quotes, backslashes, line ends and a last point."""
    one, other = (
        re.sub(r"\.$|[,\n\\\"]", "", answer).lower()
        for answer in (bbh_answer(problem, text), problem.answer)
    )
    return {"exact_match": float(one == other)}


def letter_accuracy(problem: Problem, text: str) -> Scores:
    """Say whether the marked answer, or else the letter that the text begins with, is right."""
    marked = extract_answer(text) or text
    letter = re.match(r"[\s(*\"']*([A-Z])(?![\w'])", marked) or re.search(
        r"answer (?:is|:)\s*[(*\"']*([A-Z])(?![\w'])", text
    )
    return {"acc": float(letter is not None and letter[1] == problem.answer)}


def instruction_scores(problem: Problem, text: str) -> Scores:
    """Score a response to a prompt with instructions: all of them followed, and the share."""
    instructions = problem.metadata["instructions"]
    scores = {}
    for name, follows in {"strict": strict, "loose": loose}.items():
        verdicts = follows(instructions, text)
        scores[f"prompt_{name}"] = float(all(verdicts))
        scores[f"instruction_{name}"] = sum(verdicts) / len(verdicts)
    return scores


def text_scores(
    config: settings.GeneralConfig, name: str
) -> Callable[[Problem, str], Scores]:
    """Return what scores the texts written for a benchmark."""
    metric = BENCHMARKS[name].metric
    if metric == "accuracy":
        ends = config.prompt.reasoning_ends
        return lambda problem, text: {
            "accuracy": float(is_correct(problem, text, config.lenient, ends))
        }
    graders = {"exact_match": exact_match, "prompt_strict": instruction_scores}
    grade = graders.get(metric, letter_accuracy)
    return lambda problem, text: grade(
        problem, after_reasoning(text, config.prompt.reasoning_ends)
    )


# --- asking a model --------------------------------------------------------------------------


def scores_choices(config: settings.GeneralConfig, name: str) -> bool:
    """Say whether a benchmark is answered by log-likelihoods."""
    return not BENCHMARKS[name].new_tokens and config.choices == "loglikelihood"


def metric_of(config: settings.GeneralConfig, name: str) -> str:
    """Return the metric by which models are compared on a benchmark."""
    choice = not BENCHMARKS[name].new_tokens
    return (
        "acc" if choice and config.choices == "generation" else BENCHMARKS[name].metric
    )


def protocol(config: settings.GeneralConfig, name: str) -> str:
    """Say in words how a benchmark is answered: scores of other words are not comparable."""
    benchmark = BENCHMARKS[name]
    if scores_choices(config, name):
        return benchmark.protocol
    how = (
        benchmark.protocol
        if benchmark.new_tokens
        else "the letter of a choice is asked for"
    )
    tokens = config.max_new_tokens or benchmark.new_tokens or 32
    prompt = config.prompt
    parts = [how, f"greedy, at most {tokens} tokens", f"chat {prompt.chat}"]
    if prompt.system:
        parts.append(f"system {prompt.system!r}")
    if benchmark.new_tokens and not benchmark.own_prompt:
        parts.append(f"template {prompt.template!r}")
        if prompt.few_shot:
            parts.append(f"examples {prompt.few_shot} as {prompt.response!r}")
        parts.append(f"lenient {config.lenient}")
    return "; ".join(parts)


def prepare(
    config: settings.GeneralConfig,
    name: str,
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    context: int,
) -> tuple[list[Problem], list[list[int]] | list[list[Example]]]:
    """Return the problems of a benchmark as they are asked, and for each the tokens of its
    prompt or those of its choices. ValueError for one that a context does not hold.
    """
    if scores_choices(config, name):
        examples = [choice_examples(problem, tokenizer) for problem in problems]
        for problem, choices in zip(problems, examples, strict=True):
            if (longest := max(map(len, choices))) > context:
                raise ValueError(
                    f"{name}: {problem.id} has {longest} tokens with a choice: the model's context "
                    f"holds {context}; leave the benchmark out by tasks="
                )
        return list(problems), examples
    benchmark = BENCHMARKS[name]
    if not benchmark.new_tokens:
        problems = [as_letter_question(problem) for problem in problems]
    template = build_template(config.prompt)
    if benchmark.own_prompt:
        template = PromptTemplate(system=template.system, chat=template.chat)
    for problem in problems:
        check_instructions(
            problem.metadata.get("instructions", []), f"{name}: {problem.id}"
        )
    return list(problems), encode_prompts(problems, template, tokenizer, context)


def choice_examples(problem: Problem, tokenizer: Tokenizer) -> list[Example]:
    """Return the prompt with each choice after it, as tokens."""
    prompt = tokenizer.encode(problem.question, add_special_tokens=True)
    return [
        Example(
            prompt,
            tokenizer.encode(f"{problem.question} {choice}", add_special_tokens=True)[
                len(prompt) :
            ],
        )
        for choice in problem.metadata["choices"]
    ]


def choice_logprobs(
    model: Transformer, questions: Sequence[Sequence[Example]], token_budget: int
) -> list[list[float]]:
    """Return log p(choice | prompt) of every choice of every question."""
    found: list[list[float]] = []
    with tqdm(total=len(questions), unit="question", disable=None, leave=False) as bar:
        for start in range(0, len(questions), AT_ONCE):
            some = questions[start : start + AT_ONCE]
            flat = [example for question in some for example in question]
            logprobs, _ = response_scores(model, flat, token_budget)
            sums = iter(logprobs.double().sum(1).tolist())
            found += [[next(sums) for _ in question] for question in some]
            bar.update(len(some))
    return found


def measure(
    config: settings.GeneralConfig,
    name: str,
    problems: Sequence[Problem],
    asked: list[list[int]] | list[list[Example]],
    sampler: Sampler,
) -> list[Record]:
    """Let the model answer what `prepare` returned, and return a record of every problem: its
    id, its scores, and the log-likelihoods or the text that they are made of.
    """
    if scores_choices(config, name):
        logprobs = choice_logprobs(sampler.model, asked, config.token_budget)
        return [
            {"problem": problem.id, **choice_scores(problem, row), "logprobs": row}
            for problem, row in zip(problems, logprobs, strict=True)
        ]
    benchmark = BENCHMARKS[name]
    score = text_scores(config, name)
    with meter(sampler, len(problems)) as progress:
        completions = sampler.generate(
            asked,
            max_new_tokens=config.max_new_tokens or benchmark.new_tokens or 32,
            temperature=0.0,
            stop=benchmark.stop,
            progress=progress,
        )
    return [
        {
            "problem": problem.id,
            **score(problem, completion.text),
            "text": completion.text,
            "tokens": completion.length,
            "finish_reason": completion.finish_reason,
        }
        for problem, completion in zip(problems, completions, strict=True)
    ]


def summary(
    config: settings.GeneralConfig,
    name: str,
    source: str,
    problems: Sequence[Problem],
    records: Sequence[Record],
) -> Record:
    """Return what is written of a benchmark: every metric with its interval over problems
    (instructions of one prompt are drawn together), and all records.
    """
    metrics = [key for key, value in records[0].items() if type(value) is float]
    instructions = [len(p.metadata.get("instructions", "1")) for p in problems]
    scores = {
        metric: vars(
            mean_score(
                [record[metric] for record in records],
                config.seed,
                instructions if metric.startswith("instruction_") else None,
            )
        )
        for metric in metrics
    }
    text = "\0".join(f"{p.id}\0{p.question}\0{p.answer}" for p in problems)
    return {
        "group": BENCHMARKS[name].group,
        "metric": metric_of(config, name),
        "protocol": protocol(config, name),
        "source": source,
        "problems": len(problems),
        "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
        "scores": scores,
        "records": list(records),
    }
