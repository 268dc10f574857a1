"""A model laid out as llm-jp-3's are: a Llama with a tokenizer of SentencePiece's unigram kind,
whose bytes stand in for unknown characters, that marks spaces and puts one before a text, and the
chat template of the instruct models.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from nanomath.__main__ import main
from nanomath.data.problem import Problem
from nanomath.data.prompts import PromptTemplate
from nanomath.models import Tokenizer, load_model, load_tokenizer
from nanomath.process.steps import steps_of, texts_of
from nanomath.rollout import Sampler
from nanomath.rollout.known import certain, encode_response
from nanomath.rollout.stops import text_before_stop
from nanomath.training.build import encode_examples, encode_prompt

transformers = pytest.importorskip("transformers")
SPECIAL = ["<unk>", "<s>", "</s>", "<MASK|LLM-jp>", "<PAD|LLM-jp>"]
TASK = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '\n\n### 指示:\n' + message['content'] }}"
    "{% elif message['role'] == 'system' %}{{ '" + TASK + "' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\n\n### 応答:\n' + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '\n\n### 応答:\n' }}{% endif %}"
    "{% endfor %}"
)
CORPUS = [
    TASK,
    "### 指示:\nりんごが三つ、みかんが五つあります。全部で何個ですか。\n\n### 応答:\n3 + 5 = 8。",
    "もらうと 3+5=8。\n\n答えは\\boxed{8}です。",
    "Mia has 3 apples. She buys 5 more. How many?\n\nThe answer is \\boxed{8}.",
] * 4
TEXTS = [
    "",
    "答えは\\boxed{８}です。",
    "りんごは 3 個、𠮷野家で🍎を買う。",
    "  two  spaces\n\n  and a line\n",
    "The answer is 8.\n\n次は 12/3=4。",
    "\tタブ",
]
QUESTION = "りんごが3個と5個あります。全部で何個ですか。"


def unigram() -> tokenizers.Tokenizer:
    """What llm-jp's converter makes: "▁" at the beginning, and for every space."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=160, show_progress=False)
    )
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    extra = [(token, 0.0) for token in SPECIAL]
    known = [(piece, score) for piece, score in pieces if piece not in SPECIAL]
    known += [(p, -9.0) for p in ("▁", "\n", "\n\n") if p not in dict(known)]
    backend = tokenizers.Tokenizer(
        models.Unigram([*extra, *bytes_, *known], 0, byte_fallback=True)
    )
    backend.add_special_tokens(SPECIAL)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("^"), "▁"),
            normalizers.Replace(Regex("\n▁"), "\n"),
            normalizers.Replace(Regex(" "), "▁"),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("▁"), " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(Regex("\n"), "\n "),
            decoders.Replace(Regex("^ "), ""),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The files that a hub directory of llm-jp-3 has, but for the sizes."""
    place = tmp_path_factory.mktemp("llm-jp-3")
    backend = unigram()
    backend.save(str(place / "tokenizer.json"))
    names = dict(zip(("unk", "bos", "eos", "mask", "pad"), SPECIAL, strict=True))
    settings = {
        **{f"{kind}_token": token for kind, token in names.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "eod_token": "</s>",
        "extra_ids": 0,
        "sp_model_kwargs": {},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "special_tokens_map_file": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
    }
    (place / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    config = transformers.LlamaConfig(
        vocab_size=-(-backend.get_vocab_size() // 64) * 64,  # padded, as theirs
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def tokenizer(directory) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_go_round_as_in_transformers(text, tokenizer, theirs):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=True) == theirs.encode(text)
    assert tokenizer.decode(ids) == theirs.decode(ids) == text


def test_special_tokens(tokenizer):
    assert tokenizer.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<PAD|LLM-jp>",
        "unk_token": "<unk>",
    }
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, (2,))
    assert tokenizer.encode("終わり</s>")[-1] == 2
    assert tokenizer.decode([*tokenizer.encode("終わり"), 2]) == "終わり"


@pytest.mark.parametrize("system", ["", TASK])
def test_chats_render_as_in_transformers(system, tokenizer, theirs):
    template = PromptTemplate(system=system)
    problem = Problem("p", QUESTION, "8")
    chat = [{"role": "system", "content": system}] * bool(system)
    chat += [{"role": "user", "content": QUESTION}]
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    begin = f"<s>{TASK}" if system else "<s>"
    assert text == f"{begin}\n\n### 指示:\n{QUESTION}\n\n### 応答:\n"
    ids = encode_prompt(problem, template, tokenizer)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ids.count(1) == 1  # the template writes it


@pytest.mark.parametrize("solution", TEXTS[1:])
def test_a_solution_has_the_tokens_that_it_has_after_its_prompt(solution, tokenizer):
    """No space is made up where the answer begins."""
    problem = Problem("p", QUESTION, "8", solution)
    (example,) = encode_examples([problem], PromptTemplate(), tokenizer, 256)
    *response, end = example.response
    assert (tokenizer.decode(response), end) == (solution, 2)
    assert certain(solution, tokenizer).tokens == example.response
    chat = [{"role": "user", "content": QUESTION}]
    whole = tokenizer.apply_chat_template(chat) + solution
    if not solution[0].isspace():
        assert example.prompt + response == tokenizer.encode(whole)
        assert len(response) < len(tokenizer.encode(solution)) or solution[0] in "T\t"


@pytest.mark.parametrize("scheme", ["llm-jp", "first", "always", "in the normalizer"])
@pytest.mark.parametrize("text", ["", "答えは8です。", "\n答えは8です。", "\n"])
def test_no_space_is_made_up_after_a_prompt(scheme, text, tokenizer):
    """Also by SentencePiece's other kind, as Llama 2 has it, and where a text begins a line."""
    if scheme != "llm-jp":
        backend = tokenizers.Tokenizer(models.BPE())
        if scheme == "in the normalizer":
            steps = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
            backend.normalizer = normalizers.Sequence(list(steps))
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
        backend.train_from_iterator([*CORPUS, "答え\n答え"], trainer)
        tokenizer = Tokenizer(backend, eos_token="</s>")
    prompt = "りんごが 3 個"
    ids = encode_response(tokenizer, text)
    assert tokenizer.encode(prompt) + ids == tokenizer.encode(prompt + text)
    assert tokenizer.decode(ids) == text


def test_half_a_character_is_not_text_yet(tokenizer):
    """A character of four bytes: until the last of them nothing is cut, and no step ends."""
    text = "🍎です。\n\n答えは8"
    ids = encode_response(tokenizer, text)
    pieces = [tokenizer.backend.id_to_token(i) for i in ids]
    assert pieces[:4] == ["<0xF0>", "<0x9F>", "<0x8D>", "<0x8E>"]
    for count in (1, 2, 3):
        assert set(tokenizer.decode(ids[:count])) == {"\ufffd"}
        assert text_before_stop(tokenizer, ["🍎"], ids[:count]) is None
    assert tokenizer.decode(ids[:4]) == "🍎"
    assert text_before_stop(tokenizer, ["🍎"], ids[:4]) == ""
    blank = ids.index(tokenizer.backend.token_to_id("\n\n"))
    assert text_before_stop(tokenizer, ["\n\n"], ids[:blank]) is None
    assert text_before_stop(tokenizer, ["\n\n"], ids) == "🍎です。"
    steps = steps_of(tokenizer, ids)
    assert texts_of(tokenizer, ids, steps) == ["🍎です。\n\n", "答えは8"]
    assert [step.token for step in steps] == [blank, len(ids) - 1]


def test_logits_are_those_of_transformers(directory, tokenizer):
    model = load_model(directory)
    other = transformers.LlamaForCausalLM.from_pretrained(directory)
    ids = torch.tensor(
        [encode_prompt(Problem("p", QUESTION, "8"), PromptTemplate(), tokenizer)]
    )
    with torch.no_grad():
        expected = other(ids).logits
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
        greedy = other.generate(ids, max_new_tokens=12, do_sample=False)[
            0, ids.shape[1] :
        ]
    (completion,) = Sampler(model, tokenizer).generate(
        ids.tolist(), max_new_tokens=12, temperature=0.0
    )
    assert completion.tokens == greedy.tolist()


def test_the_benchmarks_in_both_languages_are_asked_of_it(
    directory, tokenizer, tmp_path, capsys
):
    """`eval MODEL general`, with Japanese prompts in the model's own chat."""
    (tmp_path / "mgsm_ja.tsv").write_text(f"{QUESTION}\t8\n3足す4は？\t7\n", "utf-8")
    (tmp_path / "mgsm_en.tsv").write_text("3 apples and 5. How many?\t8\n", "utf-8")
    words = ("tasks=mgsm_ja,mgsm_en", f"prompt.system={TASK}", "max_new_tokens=8")
    saved = tmp_path / "found.json"
    command = ["eval", str(directory), "general", f"data={tmp_path}", *words]
    assert main([*command, f"save={saved}", "model.device=cpu"]) == 0
    found = json.loads(saved.read_text("utf-8"))
    assert "mgsm_ja" in capsys.readouterr().out
    assert len(found["tasks"]["mgsm_ja"]["records"]) == 2
