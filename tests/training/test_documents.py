"""Pre-training on plain documents of the world, and prompts of a base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_sft
from nanomath import settings
from nanomath.config import load
from nanomath.data.prompts import PromptTemplate
from nanomath.data.world import CHAT_TEMPLATE, FAMILIES, generate, world_tokenizer
from nanomath.models import Tokenizer
from nanomath.training.build import build_problems, build_prompts, encode_examples

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
TOKENIZER = Tokenizer(world_tokenizer(), CHAT_TEMPLATE, eos_token="<|endoftext|>")
PLAIN = PromptTemplate("{question}\n", chat=False)


def problems_of(**keys: object) -> settings.Problems:
    words = [
        f"problems.{key.replace('__', '.')}={value}" for key, value in keys.items()
    ]
    return load(settings.EvalConfig, None, words).problems


@pytest.mark.parametrize("template", [PLAIN, PromptTemplate(system="Think.")])
def test_a_document_is_learned_from_its_first_token_to_its_end(
    template: PromptTemplate,
) -> None:
    section = problems_of(split="train", limit=300, world__documents=2)
    section.world.families = list(FAMILIES)
    documents = build_problems(section)
    assert len({document.id for document in documents}) == 300
    for document, example in zip(
        documents, encode_examples(documents, template, TOKENIZER, 512), strict=True
    ):
        assert example.prompt == [0] and example.response[-1] == 0
        assert TOKENIZER.decode(example.response[:-1]) == document.solution


def test_shots_and_few_shot_examples_are_the_beginning_of_a_document() -> None:
    section = problems_of(split="test", limit=6, world__shots=2, world__families="grid")
    problems, prompts = build_prompts(
        section, PromptTemplate("{shots}{question}\n", chat=False), TOKENIZER, 512
    )
    assert [p.question for p in problems] == [
        p.question for p in generate("grid", "test", 6)
    ]
    for problem, prompt in zip(problems, prompts, strict=True):
        told = problem.metadata["shots"].split("\n\n\n")[:-1]
        pairs = [text.split("\n", 1) for text in told]
        examples = [{"question": q, "solution": s + "\n"} for q, s in pairs]
        few_shot = PromptTemplate("{question}\n", few_shot=examples, chat=False)
        section = problems_of(split="test", limit=6, world__families="grid")
        _, by_hand = build_prompts(section, few_shot, TOKENIZER, 512)
        assert prompt in by_hand
        document = "\n\n\n".join([*told, f"{problem.question}\n{problem.solution}"])
        assert (
            TOKENIZER.encode(document, add_special_tokens=True)[: len(prompt)] == prompt
        )


def test_a_limit_takes_what_a_small_family_has() -> None:
    section = problems_of(split="test", limit=300, world__families="facts,maths")
    kinds = [p.metadata["family"] for p in build_problems(section)]
    assert kinds[:4] == ["facts", "maths"] * 2
    assert (kinds.count("facts"), kinds.count("maths")) == (56, 150)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"split": "test", "world__documents": 1},
            "documents are of the train split, not of",
        ),
        (
            {"split": "numbers", "world__families": "maths,facts"},
            "facts has no numbers",
        ),
    ],
)
def test_splits_that_there_are_not_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_problems(problems_of(**keys))


def test_the_base_config_trains_and_measures_every_family_and_language(
    tmp_path: Path,
) -> None:
    words = f"run.directory={tmp_path} run.steps=8 run.eval_every=0 train.limit=300"
    small = "model.new.layers=1 model.new.hidden_size=32 model.new.intermediate_size=64"
    measured = (
        "heldout.limit=14 sampling.max_new_tokens=4 evaluation.by=family,language"
    )
    argv = [
        str(CONFIGS / "base.toml"),
        *words.split(),
        *small.split(),
        *measured.split(),
    ]
    assert train_sft.main([*argv, "evaluation.samples=1"]) == 0
    lines = (tmp_path / "tiny-base" / "metrics.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    assert last["heldout/loss"] < first["heldout/loss"]
    for family in FAMILIES:
        for language in ("en", "ja"):
            assert f"heldout/pass@1/family={family},language={language}" in last
