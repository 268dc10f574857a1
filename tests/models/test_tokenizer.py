"""The tokenizer and the chat templates against transformers: the same ids, the same text, the
same prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from nanomath.models import Tokenizer, load_tokenizer
from nanomath.models.chat import chosen_template

TEMPLATES = {
    file.stem: file
    for file in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
SPECIAL = ["<s>", "<|im_end|>", "<|end|>", "<|pad|>"]
CORPUS = [
    "What is 12 + 30? First add the tens, then the ones. The answer is 42.",
    "りんごが三つ、みかんが五つあります。全部でいくつですか。",
    r"\boxed{\frac{1}{2}} and $x^2 + 1$" + "\n\n\tStep 2: done.",
] * 3
TEXTS = [
    "",
    " ",
    "What is 12 + 30?",
    "  two spaces,\n\nblank line\r\n\ttab",
    "りんごは🍎 3 個 — naïve café",
    "<|im_end|>inside<s> and <|im_start|> unknown",
    r"\boxed{42}",
]


def trained() -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 tokens with special tokens that writes <s> before plain text, as
    Llama 3's does.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    begin = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), begin]
    )
    return backend


BACKEND = trained()
NAMES = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}


def ours(chat_template: str | None = None, eos_ids: tuple[int, ...] = ()) -> Tokenizer:
    return Tokenizer(BACKEND, chat_template, eos_ids, **NAMES)


def theirs(chat_template: str | None = None):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=BACKEND, chat_template=chat_template, **NAMES
    )


def assert_same_as_theirs(text: str) -> None:
    tokenizer, oracle = ours(), theirs()
    expected = oracle(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tokenizer.encode(text)
    assert ids == expected["input_ids"]
    assert tokenizer.offsets(text) == (ids, expected["offset_mapping"])
    assert tokenizer.encode(text, add_special_tokens=True) == oracle(text)["input_ids"]
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special=False) == oracle.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_text_and_offsets_are_those_of_transformers(text: str) -> None:
    assert_same_as_theirs(text)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=12), st.sampled_from([*SPECIAL, "<think>", "12", "三つ"])
        )
    ).map("".join)
)
def test_any_text(text: str) -> None:
    assert_same_as_theirs(text)


def test_offsets_cut_the_text_into_its_tokens() -> None:
    text = "What is 12 + 30? <think> りんご"
    ids, spans = ours().offsets(text)
    whole = [
        (token, text[start:end]) for token, (start, end) in zip(ids, spans, strict=True)
    ]
    assert ("".join(part for _, part in whole[:4])) == text[: spans[3][1]]
    assert (BACKEND.token_to_id("<think>"), "<think>") in whole


def test_half_a_character_decodes_to_the_replacement_character() -> None:
    ids = ours().encode("🍎")
    assert ours().decode(ids[:1]) == "\ufffd"
    assert ours().decode(ids) == "🍎"


def test_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    tokenizer = ours()
    assert tokenizer.decode([*tokenizer.encode("12"), tokenizer.vocab_size + 5]) == "12"


def test_special_ids() -> None:
    tokenizer = ours(eos_ids=(7, 1, 2))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.eos_ids == (1, 7, 2)
    assert tokenizer.vocab_size == len(theirs()) == len(BACKEND.get_vocab())
    assert Tokenizer(BACKEND).bos_id is None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        _ = Tokenizer(BACKEND).eos_id
    with pytest.raises(ValueError, match="pad_token is '<nothing>', which is not in"):
        Tokenizer(BACKEND, pad_token="<nothing>")


def test_stored_truncation_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(BACKEND.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXTS[2]) == ours().encode(TEXTS[2])
    assert len(ours().encode(TEXTS[2])) > 4


def test_round_trip_here_and_in_transformers(tmp_path: Path) -> None:
    tokenizer = ours("{{ bos_token }}{{ messages[0].content }}", eos_ids=(2,))
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_ids, loaded.special_tokens, loaded.chat_template) == (
        (1, 2),
        NAMES,
        tokenizer.chat_template,
    )
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    for text in TEXTS:
        assert (
            loaded.encode(text)
            == tokenizer.encode(text)
            == oracle(text, add_special_tokens=False)["input_ids"]
        )
        assert loaded.decode(loaded.encode(text), skip_special=False) == text
    assert (
        loaded.apply_chat_template(messages)
        == oracle.apply_chat_template(messages, tokenize=False)
        == "<s>hi"
    )
    assert (oracle.eos_token_id, oracle.pad_token_id, oracle.bos_token_id) == (1, 3, 0)


def write(directory: Path, name: str, content: object) -> None:
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    oracle = theirs("{{ eos_token }}")
    oracle.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_tokens == NAMES
    assert loaded.apply_chat_template([]) == "<|im_end|>"


def test_old_spellings_of_the_files(tmp_path: Path) -> None:
    BACKEND.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path,
        "special_tokens_map.json",
        {"pad_token": "<|pad|>", "eos_token": {"content": "<|end|>"}},
    )
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "plain"},
    ]
    config = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "bos_token": None,
        "chat_template": named,
    }
    write(tmp_path, "tokenizer_config.json", config)
    write(tmp_path, "config.json", {"eos_token_id": 0})
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_tokens == {
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
    }  # the map goes before the config
    assert loaded.eos_ids == (2, 0)
    assert loaded.apply_chat_template([]) == "plain"
    write(tmp_path, "generation_config.json", {"eos_token_id": [2, 1]})
    (tmp_path / "chat_template.jinja").write_text("from its own file", encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_ids == (2, 1)
    assert loaded.apply_chat_template([]) == "from its own file"


TEMPLATES_OF = {
    "one": {"tokenizer_config.json": "config {{ tools is none }}"},
    "one with a name": {
        "tokenizer_config.json": [{"name": "default", "template": "default"}]
    },
    "two": {
        "tokenizer_config.json": [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools"},
        ]
    },
    "no tool_use": {
        "tokenizer_config.json": [
            {"name": "default", "template": "plain"},
            {"name": "rag", "template": ""},
        ]
    },
    "a file": {
        "tokenizer_config.json": [{"name": "tool_use", "template": "no"}],
        "chat_template.jinja": "file",
    },
    "files": {
        "chat_template.jinja": "plain file",
        "additional_chat_templates/tool_use.jinja": "tools file",
    },
    "files and a name": {
        "tokenizer_config.json": "no",
        "additional_chat_templates/default.jinja": "default file",
    },
}


def with_templates(directory: Path, files: dict[str, object]) -> Path:
    ours().save(directory)
    (directory / "additional_chat_templates").mkdir()
    for name, content in files.items():
        if name == "tokenizer_config.json":
            write(
                directory,
                name,
                {
                    **NAMES,
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "chat_template": content,
                },
            )
        else:
            (directory / name).write_text(str(content), encoding="utf-8")
    return directory


@pytest.mark.parametrize("tools", [None, [], [{"type": "function"}]])
@pytest.mark.parametrize("case", TEMPLATES_OF)
def test_the_template_of_a_name_is_that_of_transformers(
    case: str, tools: list | None, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    directory = with_templates(tmp_path, TEMPLATES_OF[case])
    loaded, oracle = (
        load_tokenizer(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
    )
    rendered = loaded.apply_chat_template(
        [{"role": "user", "content": "?"}], tools=tools
    )
    expected = oracle.apply_chat_template(
        [{"role": "user", "content": "?"}], tools=tools, tokenize=False
    )
    assert rendered == expected != "no"
    loaded.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.chat_template == loaded.chat_template
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert oracle.get_chat_template(tools=tools) == chosen_template(
        again.chat_template, tools is not None
    )


def test_templates_without_a_default(tmp_path: Path) -> None:
    loaded = load_tokenizer(
        with_templates(tmp_path, {"additional_chat_templates/tool_use.jinja": "tools"})
    )
    assert loaded.apply_chat_template([], tools=[]) == "tools"
    with pytest.raises(
        ValueError, match="no chat template of the name 'default', but 'tool_use'"
    ):
        loaded.apply_chat_template([])


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in "):
        load_tokenizer(tmp_path)


TEMPLATE_LACKS_A_TOKEN = json.loads(BACKEND.to_str())
TEMPLATE_LACKS_A_TOKEN["post_processor"]["processors"][1]["special_tokens"] = {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", {"version": 7}, " is not a readable tokenizer: "),
        ("tokenizer.json", TEMPLATE_LACKS_A_TOKEN, " is not a readable tokenizer: "),
        ("tokenizer_config.json", [1], " must hold a JSON object, not list"),
        (
            "tokenizer_config.json",
            {"eos_token": "<no>"},
            ": eos_token is '<no>', which is not in",
        ),
        ("tokenizer_config.json", {"eos_token": 1}, ": eos_token = 1 must be text"),
        (
            "tokenizer_config.json",
            {"eos_token": {"text": "<s>"}},
            ": eos_token = None must be text",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": 1},
            ": chat_template = 1 must be text",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": ["a"]},
            ": chat_template = ['a'] must be text, or a list of obj",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default"}]},
            ": chat_template.template = None must be",
        ),
        (
            "tokenizer_config.json",
            {"additional_special_tokens": "<s>"},
            ": additional_special_tokens = '<s>' must be a",
        ),
        (
            "generation_config.json",
            {"eos_token_id": "1"},
            ": eos_token_id = '1' must be a whole number from 0 to ",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [1, [2]]},
            ": eos_token_id = [2] must be a whole number from 0 to",
        ),
        (
            "generation_config.json",
            {"eos_token_id": -1},
            ": eos_token_id = -1 must be a whole number from 0 to ",
        ),
        (
            "generation_config.json",
            {"eos_token_id": True},
            ": eos_token_id = True must be a whole number from 0 to ",
        ),
        (
            "config.json",
            {"eos_token_id": 1.5},
            ": eos_token_id = 1.5 must be a whole number from 0 to ",
        ),
    ],
)
def test_broken_files_are_named(
    name: str, content: object, message: str, tmp_path: Path
) -> None:
    ours().save(tmp_path)
    if name == "config.json":
        (tmp_path / "generation_config.json").unlink()
    write(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{name}{message}")
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    ours().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ 1 }}\xff")
    with pytest.raises(
        ValueError, match=r"chat_template.jinja: not UTF-8 text \(byte 7\)"
    ):
        load_tokenizer(tmp_path)


def test_ids_with_a_point_are_whole_numbers(tmp_path: Path) -> None:
    ours().save(tmp_path)
    write(tmp_path, "generation_config.json", {"eos_token_id": [2.0, 3]})
    assert repr(load_tokenizer(tmp_path).eos_ids) == "(1, 2, 3)"


USER = {"role": "user", "content": "  What is 6 × 7? "}
REPLY = {
    "role": "assistant",
    "content": "<think>\nsix sevens\n</think>\n\nThe answer is 42.\n",
}
SYSTEM = {"role": "system", "content": "Answer in \\boxed{}.\n"}
CHATS = {
    "one question": [USER],
    "system": [SYSTEM, USER],
    "several turns": [
        USER,
        REPLY,
        {"role": "user", "content": "そうですか？ <b>'sure'</b> & \"why\""},
    ],
    "system and several turns": [SYSTEM, USER, REPLY, USER, REPLY, USER],
    "finished": [USER, REPLY],
    "reasoning apart": [
        USER,
        {"role": "assistant", "content": "42", "reasoning_content": "\nsix sevens\n"},
    ],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "計算 <of> 'terms'",
        "parameters": {"z": 1, "a": [1.5, None]},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "calculate", "arguments": {"term": "6 × 7 < 43"}},
        }
    ],
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_render_as_in_transformers(
    name: str, chat: str, add_generation_prompt: bool
) -> None:
    template = TEMPLATES[name].read_text(encoding="utf-8")
    rendered = ours(template).apply_chat_template(CHATS[chat], add_generation_prompt)
    expected = theirs(template).apply_chat_template(
        CHATS[chat], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert rendered == expected
    assert "6 × 7?" in rendered


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1"])
@pytest.mark.parametrize(
    "chat", [[USER], [SYSTEM, USER, CALL, {"role": "tool", "content": "42"}]]
)
def test_tools_render_as_in_transformers(name: str, chat: list[dict]) -> None:
    template = TEMPLATES[name].read_text(encoding="utf-8")
    expected = theirs(template).apply_chat_template(
        chat, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    rendered = ours(template).apply_chat_template(chat, tools=[TOOL])
    assert rendered == expected
    assert "計算 <of> 'terms'" in rendered


def test_extra_variables_reach_the_template() -> None:
    template = TEMPLATES["qwen3"].read_text(encoding="utf-8")
    closed = ours(template).apply_chat_template([USER], enable_thinking=False)
    assert (
        closed == ours(template).apply_chat_template([USER]) + "<think>\n\n</think>\n\n"
    )
    dated = TEMPLATES["llama3.1"].read_text(encoding="utf-8")
    assert "Today Date: 1 Jan 2030" in ours(dated).apply_chat_template(
        [USER], date_string="1 Jan 2030"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content "
        "}}{% endfor %}",
        "{% for m in messages %}\n  {% generation %}\n{{ m.content }}\n  {% endgeneration "
        "%}\n{% endfor %}\nend\n",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(ensure_ascii=True, "
        "sort_keys=True) }}",
        "{{ unset }}{{ unk_token }}{{ pad_token }}{{ tools is none }}{{ documents is defined }}",
        "{{ strftime_now('%Y') }}{{ messages[0].missing is defined }}",
    ],
)
def test_the_dialect_is_that_of_transformers(template: str) -> None:
    chat = CHATS["several turns"]
    assert ours(template).apply_chat_template(
        chat, add_generation_prompt=False
    ) == theirs(template).apply_chat_template(chat, tokenize=False)


def test_no_template_says_what_to_do() -> None:
    with pytest.raises(
        ValueError,
        match="no chat template: chat=false in the config uses plain prompts",
    ):
        ours().apply_chat_template([USER])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            TEMPLATES["mistral"].read_text(encoding="utf-8"),
            "roles must alternate user/assistant",
        ),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        (
            "{{ ''.__class__.__mro__ }}",
            "attribute '__class__' of 'str' object is unsafe",
        ),
        (
            "{{ raise_exception.__globals__['os'] }}",
            "attribute '__globals__' of 'function' object is unsafe",
        ),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_failing_or_hostile_template_is_one_clear_error(
    template: str, reason: str
) -> None:
    with pytest.raises(
        ValueError, match="the chat template failed on these messages: "
    ) as caught:
        ours(template).apply_chat_template([REPLY, REPLY])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, jinja2.TemplateError)
