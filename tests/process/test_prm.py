"""PRMs: every format against transformers or the formula, and what a score may and may not
depend on.
"""

from __future__ import annotations

import json
import random
from functools import partial

import pytest
import tokenizers
import torch

from nanomath.data.world import generate
from nanomath.models import Tokenizer, save_model
from nanomath.process.formats import FORMATS, MathShepherd, Qwen, TokenClassification
from nanomath.process.prm import (
    PRM,
    length_scores,
    load_prm,
    new_prm,
    oracle_scores,
    random_scores,
)

QUESTION = "Mia has 12 apples. She buys 8 more. How many apples does Mia have now?"
STEPS = [
    "Buying 8 more: 12 + 8 = 20.",
    "So she has 20.\n\nThat is it.",
    "The answer is \\boxed{20}.",
]
SOLUTIONS = [
    (QUESTION, STEPS),
    (QUESTION, STEPS[:1]),
    ("1 + 1?", ["2"]),
    ("", ["a", "b", "答え"]),
]


def with_marker(tokenizer: Tokenizer) -> Tokenizer:
    """The same with Qwen's token."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<extra_0>"])
    return Tokenizer(
        backend, tokenizer.chat_template, tokenizer.eos_ids, **tokenizer.special_tokens
    )


@pytest.fixture
def build(new_model, new_tokenizer):
    """build(format) makes a PRM with a head that says something."""

    def make(name: str, seed: int = 1, **shape) -> PRM:
        tokenizer = with_marker(new_tokenizer())
        model = new_model(
            seed, vocab_size=tokenizer.vocab_size, max_positions=256, **shape
        )
        prm = new_prm(model, tokenizer, FORMATS[name]())
        if hasattr(model, "score"):
            with torch.no_grad():
                for number, parameter in enumerate(model.score.parameters()):
                    generator = torch.Generator().manual_seed(seed + number)
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=generator) * 0.3
                    )
        return prm

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_a_score_depends_on_nothing_later_and_on_no_batch(build, name):
    prm = build(name)
    together = prm(SOLUTIONS)
    assert [len(scores) for scores in together] == [
        len(steps) for _, steps in SOLUTIONS
    ]
    distinct = {round(score, 5) for scores in together for score in scores}
    assert len(distinct) == sum(map(len, together)) - 1  # one is said twice
    assert all(0 < score < 1 for scores in together for score in scores)
    for (question, steps), scores in zip(SOLUTIONS, together, strict=True):
        for k in range(1, len(steps) + 1):
            assert prm([(question, steps[:k])])[0] == pytest.approx(
                scores[:k], abs=1e-5
            )
    prm.token_budget = 1
    for alone, scores in zip(prm(SOLUTIONS), together, strict=True):
        assert alone == pytest.approx(scores, abs=1e-5)
    assert prm([]) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_marker_in_a_solution_is_no_step(build, name):
    """A policy that writes the PRM's marker would else be scored at places of its own choice."""
    prm = build(name)
    for marker in ("<extra_0>", "ки", "\n"):
        step = f"12 + 8{marker} = 20{marker}{marker}"
        (scores,) = prm([(QUESTION + marker, [step, STEPS[2]])])
        assert len(scores) == 2


@pytest.mark.parametrize(
    "shape",
    [{}, {"tie_embeddings": False}, {"model_type": "qwen2", "qkv_bias": True}],
    ids=str,
)
@pytest.mark.parametrize("name", FORMATS)
def test_saved_and_loaded(build, name, shape, tmp_path):
    prm = build(name, **shape)
    save_model(prm.model, prm.tokenizer, tmp_path / "prm")
    loaded = load_prm(tmp_path / "prm")
    assert loaded.format == prm.format
    assert loaded(SOLUTIONS) == prm(SOLUTIONS)


def test_another_separator_is_kept(build, tmp_path):
    prm = build("token_classification")
    again = PRM(prm.model, prm.tokenizer, TokenClassification("\n\n"))
    save_model(again.model, again.tokenizer, tmp_path / "prm")
    assert load_prm(tmp_path / "prm").format.separator == "\n\n"


def test_token_classification_is_that_of_transformers(build, tmp_path):
    transformers = pytest.importorskip("transformers")
    prm = build("token_classification")
    save_model(prm.model, prm.tokenizer, tmp_path / "prm")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "prm"
    ).eval()
    assert type(theirs).__name__ == "LlamaForTokenClassification"
    for question, steps in SOLUTIONS:
        tokens = prm.tokenizer.encode(question)
        expected = []
        for step in steps:
            tokens += prm.tokenizer.encode(step) + prm.tokenizer.encode("\n")
            with torch.no_grad():
                expected.append(
                    float(theirs(torch.tensor([tokens])).logits[0, -1].softmax(-1)[1])
                )
        assert prm([(question, steps)])[0] == pytest.approx(expected, abs=1e-5)


def test_math_shepherd_is_a_choice_of_two_tokens(build, tmp_path):
    transformers = pytest.importorskip("transformers")
    prm = build("math_shepherd")
    save_model(prm.model, prm.tokenizer, tmp_path / "prm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "prm").eval()
    wrong, right = (prm.tokenizer.encode(f" {sign}")[-1] for sign in "-+")
    numbered = [f"Step {k}: {step}" for k, step in enumerate(STEPS, start=1)]
    for steps in (STEPS, numbered):
        text, expected = f"{QUESTION} ", []
        for step in numbered:
            text += f"{step} ки"
            with torch.no_grad():
                logits = theirs(torch.tensor([prm.tokenizer.encode(text)])).logits[
                    0, -1
                ]
            expected.append(float(logits[[wrong, right]].softmax(-1)[1]))
            text += "\n"
        assert prm([(QUESTION, steps)])[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("chat", [True, False])
def test_qwen_is_a_head_at_its_marker(build, chat):
    prm = build("qwen")
    prm.tokenizer.chat_template = prm.tokenizer.chat_template if chat else None
    answer = "".join(f"{step}<extra_0>" for step in STEPS)
    text = f"{QUESTION}\n{answer}"
    if chat:
        roles = [
            (
                "system",
                "Please reason step by step, and put your final answer within \\boxed{}.",
            )
        ]
        roles += [("user", QUESTION), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in roles]
        text = prm.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    tokens = torch.tensor(prm.tokenizer.encode(text, add_special_tokens=not chat))
    first, _, second = prm.model.score
    states = prm.model.hidden(tokens[None])[0][
        tokens == prm.tokenizer.backend.token_to_id("<extra_0>")
    ]
    logits = (states @ first.weight.T + first.bias).clamp(
        min=0
    ) @ second.weight.T + second.bias
    assert prm([(QUESTION, STEPS)])[0] == pytest.approx(
        logits.softmax(-1)[:, 1].tolist(), abs=1e-5
    )


@pytest.mark.parametrize("name", ["qwen", "token_classification"])
def test_a_new_prm_knows_nothing(new_model, new_tokenizer, name):
    tokenizer = with_marker(new_tokenizer())
    prm = new_prm(
        new_model(0, vocab_size=tokenizer.vocab_size), tokenizer, FORMATS[name]()
    )
    assert prm([(QUESTION, STEPS)])[0] == [0.5] * 3


@pytest.mark.parametrize("name", FORMATS)
def test_steps_beyond_the_context_score_0(build, name):
    prm = build(name)
    with pytest.warns(
        UserWarning,
        match="steps that end beyond the 256 tokens of the PRM's context score 0",
    ):
        long, short, unread = prm(
            [(QUESTION, STEPS * 40), (QUESTION, STEPS), (QUESTION * 40, STEPS)]
        )
    assert long[:3] == pytest.approx(short, abs=1e-5) and all(short)
    assert unread == [0.0] * 3 and len(long) == 120
    fitting = 120 - long[::-1].index(next(score for score in long[::-1] if score))
    assert 3 < fitting < 120 and all(long[:fitting])
    assert long[:fitting] == pytest.approx(
        prm([(QUESTION, (STEPS * 40)[:fitting])])[0], abs=1e-5
    )


def test_errors(build, new_model, new_tokenizer, tmp_path):
    prm = build("token_classification")
    with pytest.raises(
        ValueError,
        match="solution 1 of 'Mia has 12 apples.*is empty: there is no step to score",
    ):
        prm([(QUESTION, STEPS), (QUESTION, [])])
    with pytest.raises(
        ValueError, match="solution 0 of .* tokens: the PRM's context holds 256"
    ):
        prm.lay_out(0, QUESTION, STEPS * 40)
    with pytest.raises(ValueError, match="has no token '<extra_0>'"):
        new_prm(new_model(), Tokenizer(new_tokenizer().backend), Qwen())
    with pytest.raises(ValueError, match=r"makes no token of the separator ''"):
        PRM(prm.model, prm.tokenizer, TokenClassification(""))
    with pytest.raises(ValueError, match="no tokens of their own"):
        PRM(prm.model, prm.tokenizer, MathShepherd(right="-"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "'LlamaForSequenceClassification' is no PRM",
        ),
        ({"architectures": None}, "'' is no PRM"),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}},
            "the head has 3 labels, a PRM's has two",
        ),
        (
            {"architectures": ["LlamaForProcessRewardModel"]},
            "lack 4 tensors: score.0.bias",
        ),
    ],
)
def test_files_that_are_no_prm(build, tmp_path, changes, message):
    prm = build("token_classification")
    save_model(prm.model, prm.tokenizer, tmp_path / "prm")
    config = json.loads((tmp_path / "prm" / "config.json").read_text())
    (tmp_path / "prm" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_prm(tmp_path / "prm")


def test_a_prm_whose_head_is_missing(new_model, new_tokenizer, tmp_path):
    model = new_model()
    model.hf_keys = TokenClassification().config_keys("Llama")
    save_model(model, new_tokenizer(), tmp_path / "prm")
    with pytest.raises(ValueError, match="lack 2 tensors: score.bias, score.weight"):
        load_prm(tmp_path / "prm")


def test_the_oracle_is_the_worlds():
    problems = list(
        generate("maths", "test", 20, languages=("en", "ja"), difficulty=(2, 4))
    )
    oracle = partial(oracle_scores, problems)
    draw = random.Random(0)
    for problem in problems:
        steps = problem.solution.split("\n\n")
        assert oracle([(problem.question, steps)]) == [[1.0] * len(steps)]
        merged = ["\n\n".join(steps[:2]), *steps[2:]]
        assert oracle([(problem.question, merged)]) == [[1.0] * len(merged)]
        wrong = draw.randrange(len(steps) - 1)
        spoilt = [
            step.replace("=", "= 9") if k == wrong else step
            for k, step in enumerate(steps)
        ]
        expected = [float(k < wrong) for k in range(len(steps))]
        assert oracle([(problem.question, spoilt)]) == [expected]
    with pytest.raises(ValueError, match="the oracle knows no problem that asks 'Why"):
        oracle([("Why?", ["a"])])


def test_controls():
    scores = random_scores([(str(i), ["a", "b"]) for i in range(2000)], 3)
    flat = torch.tensor(scores).flatten()
    assert scores == random_scores([(str(i), ["a", "b"]) for i in range(2000)], 3)
    assert float(flat.mean()) == pytest.approx(0.5, abs=0.02) and float(
        flat.std()
    ) == pytest.approx(12**-0.5, abs=0.02)
    assert len(flat.unique()) == len(flat)
    assert random_scores([("1", ["a"])], 4) != random_scores([("1", ["a"])], 3)
    assert length_scores([("q", ["a", " ab\n", "abcdef"]), ("q", [])], 4) == [
        [0.25, 0.5, 1.0],
        [],
    ]
