"""The sampler against plain forward passes, whatever the slots, the order of the prompts and
the time between looks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import tokenizers
import torch

from nanomath.data.world import world_tokenizer
from nanomath.models import Tokenizer
from nanomath.rollout import Completion, Sampler
from nanomath.rollout.sampler import first_samples
from nanomath.rollout.stops import text_before_stop

PROMPTS = [[5], [7, 300, 12, 44], [9] * 11, [700, 3, 3], [1, 2, 3, 4, 5, 6]]
# 4% of the vocabulary, so that random models end at all kinds of lengths
EOS = range(0, 1000, 25)


@pytest.fixture(scope="module")
def sampler(new_model, new_tokenizer) -> Sampler:
    return Sampler(new_model(), new_tokenizer(EOS), slots=4)


def by_prompt(
    prompts: list[list[int]], completions: list[Completion]
) -> dict[tuple, tuple]:
    return {
        (tuple(prompts[c.prompt_index]), c.sample_index): (
            c.tokens,
            c.text,
            c.finish_reason,
        )
        for c in completions
    }


def forward_logprobs(
    model, prompt: list[int], tokens: list[int], temperature: float = 1.0
) -> list[float]:
    logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()


@pytest.fixture(scope="module")
def drawn(sampler) -> list[Completion]:
    return sampler.generate(PROMPTS, n=4, max_new_tokens=30, seed=1)


@pytest.mark.parametrize("slots", [1, 3, 16, 64])
@pytest.mark.parametrize("check_every", [1, 5])
def test_a_sample_depends_on_nothing_around_it(sampler, drawn, slots, check_every):
    other = Sampler(sampler.model, sampler.tokenizer, slots)
    other.check_every = check_every
    order = [3, 0, 4, 2, 1]
    shuffled = [PROMPTS[i] for i in order]
    found = other.generate(shuffled, n=4, max_new_tokens=30, seed=1)
    assert by_prompt(shuffled, found) == by_prompt(PROMPTS, drawn)
    alone = other.generate([PROMPTS[1]], n=2, max_new_tokens=30, seed=1)
    assert by_prompt([PROMPTS[1]], alone).items() <= by_prompt(PROMPTS, drawn).items()


def test_results_are_in_prompt_major_order(drawn):
    assert [(c.prompt_index, c.sample_index) for c in drawn] == [
        (p, s) for p in range(5) for s in range(4)
    ]


def test_samples_seeds_and_copies_of_a_prompt_differ(sampler, drawn):
    group = [tuple(c.tokens) for c in drawn[4:8]]
    assert len(set(group)) == 4
    twice = sampler.generate([PROMPTS[1], PROMPTS[1]], n=2, max_new_tokens=30, seed=1)
    assert [
        tuple(c.tokens) for c in twice
    ] == group  # the second copy goes on where the first one ended
    other = sampler.generate([PROMPTS[1]], n=4, max_new_tokens=30, seed=2)
    assert not {tuple(c.tokens) for c in other} & set(group)


def test_part_of_a_list_can_be_sampled_as_part_of_the_list(sampler):
    """As ranks do that share prompts out: copies of a prompt in other hands keep their
    numbers.
    """
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    first = first_samples(prompts, 2)
    assert first == [0, 0, 2, 4]
    options = {"n": 2, "max_new_tokens": 12, "seed": 1}
    whole = [c.tokens for c in sampler.generate(prompts, **options)]
    for part in ([0, 2], [3, 1], [2]):
        found = sampler.generate(
            [prompts[i] for i in part], first=[first[i] for i in part], **options
        )
        assert [c.tokens for c in found] == [
            tokens for i in part for tokens in whole[2 * i : 2 * i + 2]
        ]
        assert [c.sample_index for c in found] == [0, 1] * len(part)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("check_every", [1, 5])
def test_logprobs_are_those_of_a_full_forward_pass(
    new_model, new_tokenizer, family_shape, temperature, check_every
):
    model = new_model(1, **family_shape)
    sampler = Sampler(model, new_tokenizer(EOS), slots=3)
    sampler.check_every = check_every
    found = sampler.generate(
        PROMPTS, n=2, max_new_tokens=20, temperature=temperature, top_k=50, seed=4
    )
    assert max(c.length for c in found) > 6  # longer than the sliding window
    for c in found:
        expected = forward_logprobs(
            model, PROMPTS[c.prompt_index], c.tokens, temperature
        )
        assert c.logprobs == pytest.approx(expected, abs=2e-5)
        assert all(
            a >= b - 1e-6 for a, b in zip(c.sampling_logprobs, c.logprobs, strict=True)
        )
        assert max(c.sampling_logprobs) <= 1e-6


def test_truncated_logprobs_are_renormalised_over_what_was_kept(sampler):
    for c in sampler.generate(PROMPTS[:2], n=3, max_new_tokens=8, top_k=5):
        prompt = PROMPTS[c.prompt_index]
        logprobs = sampler.model(torch.tensor([prompt + c.tokens]))[
            0, len(prompt) - 1 : -1
        ].log_softmax(-1)
        top, ids = logprobs.topk(5)
        assert all(
            token in row for token, row in zip(c.tokens, ids.tolist(), strict=True)
        )
        expected = torch.tensor(c.logprobs) - top.logsumexp(-1)
        assert c.sampling_logprobs == pytest.approx(expected.tolist(), abs=2e-5)


def test_greedy_is_the_loop_of_argmax(new_model, new_tokenizer, family_shape):
    model, tokenizer = new_model(2, **family_shape), new_tokenizer(EOS)
    found = Sampler(model, tokenizer, 2).generate(
        PROMPTS, max_new_tokens=12, temperature=0
    )
    for prompt, completion in zip(PROMPTS, found, strict=True):
        tokens: list[int] = []
        while len(tokens) < 12 and not (tokens and tokens[-1] in tokenizer.eos_ids):
            tokens.append(int(model(torch.tensor([prompt + tokens]))[0, -1].argmax()))
        assert completion.tokens == tokens
        assert completion.sampling_logprobs == [0.0] * len(tokens)
        assert completion.logprobs == pytest.approx(
            forward_logprobs(model, prompt, tokens), abs=2e-5
        )


def test_the_frequencies_are_the_softmax(new_model, new_tokenizer):
    model = new_model(3, vocab_size=16)
    found = Sampler(model, new_tokenizer(), 500).generate(
        [[3, 5]], n=3000, max_new_tokens=1, seed=8
    )
    p = model(torch.tensor([[3, 5]]))[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in found]), minlength=16)
    p = p.detach()
    deviation = (counts - 3000 * p) / (3000 * p * (1 - p)).sqrt().clamp(min=1)
    assert float(deviation.abs().max()) < 4


@pytest.mark.parametrize("check_every", [1, 5])
def test_ends(sampler, check_every):
    sampler = Sampler(sampler.model, sampler.tokenizer, 4)
    sampler.check_every = check_every
    found = sampler.generate(PROMPTS, n=6, max_new_tokens=12, seed=5)
    eos = set(sampler.tokenizer.eos_ids)
    assert {c.finish_reason for c in found} == {"eos", "length"}
    for c in found:
        assert not eos & set(c.tokens[:-1])
        assert (
            len(c.tokens)
            == len(c.logprobs)
            == len(c.sampling_logprobs)
            == c.length
            <= 12
        )
        ended = c.tokens[-1] in eos
        assert c.finish_reason == ("eos" if ended else "length") and c.finished == ended
        assert ended or c.length == 12
        assert c.text == sampler.tokenizer.decode(c.tokens[:-1] if ended else c.tokens)


@pytest.mark.parametrize("check_every", [1, 5])
def test_the_end_of_the_context(new_model, tokenizer, check_every):
    sampler = Sampler(new_model(max_positions=16), tokenizer, 2)
    sampler.check_every = check_every
    prompts = [[8] * 15, [8, 9], [8] * 10]
    found = sampler.generate(prompts, n=2, max_new_tokens=50, seed=3)
    assert [c.length for c in found if c.finish_reason == "length"]
    for c in found:
        room = 16 - len(prompts[c.prompt_index])
        assert c.length == room if c.finish_reason == "length" else c.length <= room
        assert c.logprobs == pytest.approx(
            forward_logprobs(sampler.model, prompts[c.prompt_index], c.tokens), abs=2e-5
        )


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("slots", [2, 64])
def test_stop_strings(sampler, check_every, slots):
    """Stops taken from the middle of free samples, across tokens: the same samples, cut at the
    earliest one.
    """
    sampler = Sampler(sampler.model, sampler.tokenizer, slots)
    sampler.check_every = check_every
    free = sampler.generate(PROMPTS, n=4, max_new_tokens=25, seed=6)
    pieces = [piece for c in free for piece in re.findall("[ -~]{4}", c.text)]
    stops = [
        *pieces[:2],
        *pieces[-2:],
        *(piece[1:3] for piece in pieces[2:5]),
        "never in any text",
    ]
    cut = sampler.generate(PROMPTS, n=4, max_new_tokens=25, seed=6, stop=stops)
    assert sum(c.finish_reason == "stop" for c in cut) >= 3
    decode = sampler.tokenizer.decode
    for whole, c in zip(free, cut, strict=True):
        assert c.tokens == whole.tokens[: c.length]
        assert c.logprobs == pytest.approx(whole.logprobs[: c.length], abs=2e-5)
        assert len(c.tokens) == len(c.logprobs) == len(c.sampling_logprobs)
        places = [
            place for stop in stops if (place := decode(whole.tokens).find(stop)) >= 0
        ]
        assert (c.finish_reason == "stop") == bool(places)
        if places:
            assert c.text == decode(whole.tokens)[: len(c.text)]
            assert not any(stop in c.text for stop in stops)
            assert any(stop in decode(c.tokens) for stop in stops), (
                "the stop string is complete"
            )
            assert not any(stop in decode(c.tokens[:-1]) for stop in stops), (
                "by the last token"
            )
        else:
            assert (c.tokens, c.text, c.finish_reason) == (
                whole.tokens,
                whole.text,
                whole.finish_reason,
            )


def test_stream_is_the_text_of_generate(sampler):
    for seed in range(4):
        options = {"max_new_tokens": 20, "temperature": 1.3, "top_k": 200, "seed": seed}
        pieces = list(sampler.stream(PROMPTS[1], **options))
        assert "".join(pieces) == sampler.generate([PROMPTS[1]], **options)[0].text


def test_progress_counts_up_to_everything(sampler):
    seen = []
    sampler = Sampler(sampler.model, sampler.tokenizer, sampler.slots)
    sampler.check_every = 1
    found = sampler.generate(
        PROMPTS, n=2, max_new_tokens=6, progress=lambda *now: seen.append(now)
    )
    finished, drawn, live, length = zip(*seen, strict=True)
    assert list(finished) == sorted(finished) and list(drawn) == sorted(drawn)
    assert live[0] == 4 and length[0] == 1 + (0 + 0 + 3 + 3) / 4
    assert seen[-1] == (10, sum(c.length for c in found), 0, len(PROMPTS[-1]) - 1 + 6)


def test_no_prompts_no_completions(sampler):
    assert sampler.generate([]) == []


def test_prompts_longer_than_one_prefill(sampler, drawn, monkeypatch):
    monkeypatch.setattr("nanomath.rollout.sampler.PREFILL_TOKENS", 12)
    found = Sampler(sampler.model, sampler.tokenizer, 64).generate(
        PROMPTS, n=4, max_new_tokens=30, seed=1
    )
    assert by_prompt(PROMPTS, found) == by_prompt(PROMPTS, drawn)


def test_bfloat16(new_model, new_tokenizer):
    model = new_model(dtype=torch.bfloat16)
    found = Sampler(model, new_tokenizer(EOS), 3).generate(
        PROMPTS, n=2, max_new_tokens=10
    )
    for c in found:
        expected = forward_logprobs(model, PROMPTS[c.prompt_index], c.tokens)
        assert c.logprobs == pytest.approx(expected, abs=0.5)
    assert len(found) == 10


def test_the_model_is_left_as_it_was(new_model, tokenizer):
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Sampler(model, tokenizer).generate(PROMPTS, max_new_tokens=3)
    list(Sampler(model, tokenizer).stream(PROMPTS[0], max_new_tokens=3))
    assert torch.is_grad_enabled()
    assert all(
        p.grad is None and p.requires_grad and p.grad_fn is None
        for p in model.parameters()
    )
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    model(torch.tensor([[1, 2]])).sum().backward()


def test_new_weights_are_sampled_from_at_once(new_model, tokenizer):
    model = new_model()
    sampler = Sampler(model, tokenizer)
    sampler.generate(PROMPTS, max_new_tokens=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    for c in sampler.generate(PROMPTS, max_new_tokens=5):
        assert c.logprobs == pytest.approx(
            forward_logprobs(model, PROMPTS[c.prompt_index], c.tokens), abs=2e-5
        )


@pytest.fixture(scope="module")
def unusual(new_model) -> Sampler:
    """A sampler whose vocabulary has a special token in every four, none of them an eos."""
    backend = tokenizers.Tokenizer.from_str(world_tokenizer().to_str())
    backend.add_special_tokens(
        [
            token
            for i in range(100, 1000, 4)
            if (token := backend.id_to_token(i)).isascii()
        ]
    )
    return Sampler(new_model(), Tokenizer(backend, eos_token="<|endoftext|>"), slots=3)


@pytest.mark.parametrize("check_every", [1, 5])
def test_stop_strings_may_hold_special_tokens(unusual, check_every):
    """Special tokens with what stands before and after them, whole or cut: the free samples,
    up to there.
    """
    unusual.check_every = check_every
    decode, options = (
        unusual.tokenizer.decode,
        {"n": 3, "max_new_tokens": 20, "seed": 6},
    )
    free = unusual.generate(PROMPTS, **options)
    for c in free[::4]:
        special = [not decode([token]) for token in c.tokens]
        places = [place for place in range(1, c.length - 1) if special[place]]
        pieces = [
            decode(c.tokens[p + a : p + b], False)
            for p in places[:2]
            for a, b in ((0, 1), (-1, 1), (0, 2))
        ]
        for stop in [*pieces, *(piece[1:] for piece in pieces if len(piece) > 1)]:
            cut = unusual.generate(PROMPTS, stop=[stop], **options)
            assert any(one.finish_reason == "stop" for one in cut)
            for one, whole in zip(cut, free, strict=True):
                check_cut(one, whole, stop, decode)


def check_cut(
    c: Completion, whole: Completion, stop: str, decode: Callable[..., str]
) -> None:
    """It is the sample `whole` up to the first token that makes the stop string complete, and
    shows nothing of it.
    """
    texts = [
        (decode(whole.tokens[:i]), decode(whole.tokens[:i], False))
        for i in range(whole.length + 1)
    ]
    ends = [i for i, pair in enumerate(texts) if stop in pair[0] or stop in pair[1]]
    length = ends[0] if ends else whole.length
    assert c.tokens == whole.tokens[:length]
    assert c.logprobs == pytest.approx(whole.logprobs[:length], abs=2e-5)
    assert len(c.tokens) == len(c.logprobs) == len(c.sampling_logprobs)
    assert (
        (c.finish_reason, c.text) == ("stop", c.text)
        if ends
        else (whole.finish_reason, whole.text)
    )
    if ends and stop in texts[length][1]:
        place = texts[length][1].find(stop)
        before, after = (
            [shown for shown, written in texts if len(written) - place < over]
            for over in (1, len(stop))
        )
        assert after[-1].startswith(c.text) and c.text.startswith(before[-1])


@pytest.mark.parametrize(
    ("written", "stop", "text"),
    [
        ("So 8.<|user|>\nno", "<|user|>", "So 8."),
        ("So 8.<|user|>\nno", "<|user|>\n", "So 8."),
        ("So 8.<|user|>\nno", " 8.<|user|>", "So"),
        ("So 8.<|user|>\nno", "user|>", "So 8."),
        ("So 8.<|user|>\nno", "8.\n", "So "),
        ("<|user|>So<|user|> 8.<|assistant|>", "<|assistant|>", "So 8."),
        ("<|user|>So<|user|> 8.<|assistant|>", ".<|assistant|>", "So 8"),
        ("<|user|>", "<|user|>", ""),
        ("答え 🙂<|user|>", "<|user|>", "答え 🙂"),
        ("答え 🙂<|user|>", "🙂<|user|>", "答え "),
        ("答え 🙂。<|user|>🙂", "🙂。", "答え "),
        ("So 8.", "<|user|>", None),
        ("So <|user|>", "So  ", None),
    ],
)
def test_the_text_before_a_stop_string(sampler, written, stop, text):
    tokens = sampler.tokenizer.encode(written)
    assert text_before_stop(sampler.tokenizer, [stop], tokens) == text


def test_an_eos_is_an_eos_though_it_is_a_stop_string_as_well(sampler):
    free = sampler.generate(PROMPTS, n=4, max_new_tokens=25, seed=6)
    stops = [
        sampler.tokenizer.decode([token], skip_special=False)
        for token in sampler.tokenizer.eos_ids[:1]
    ]
    assert (
        stops == ["<|endoftext|>"]
        and sampler.generate(PROMPTS, n=4, max_new_tokens=25, seed=6, stop=stops)
        == free
    )


def test_one_stop_string_may_stand_alone(sampler):
    expected = sampler.generate(PROMPTS, n=2, max_new_tokens=25, seed=6, stop=["e"])
    assert any(c.finish_reason == "stop" for c in expected)
    for stop in ("e", ("e",), {"e"}, iter(["e"])):
        assert (
            sampler.generate(PROMPTS, n=2, max_new_tokens=25, seed=6, stop=stop)
            == expected
        )
    free = sampler.generate(PROMPTS, n=2, max_new_tokens=25, seed=6)
    assert sampler.generate(PROMPTS, n=2, max_new_tokens=25, seed=6, stop=None) == free


QUESTION = "Tom has 8 pens."


@pytest.mark.parametrize(
    ("given", "lists"),
    [
        ([5, 6], [[5, 6]]),
        ((5, 6), [[5, 6]]),
        (range(5, 7), [[5, 6]]),
        ([(5, 6), range(3)], [[5, 6], [0, 1, 2]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([torch.tensor([5, 6]), torch.tensor([7])], [[5, 6], [7]]),
        (np.array([5, 6], dtype=np.uint16), [[5, 6]]),
        ([np.array([5, 6]), [np.int64(7)]], [[5, 6], [7]]),
        ([np.int32(5), torch.tensor(6)], [[5, 6]]),
        pytest.param(iter([[5, 6], [7]]), [[5, 6], [7]], id="an iterator"),
        (QUESTION, [QUESTION]),
        ([QUESTION, [5]], [QUESTION, [5]]),
    ],
    ids=str,
)
def test_prompts_in_any_form_that_means_one_thing(sampler, given, lists):
    lists = [
        sampler.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        for prompt in lists
    ]
    expected = sampler.generate(lists, n=2, max_new_tokens=4, seed=2)
    assert sampler.generate(given, n=2, max_new_tokens=4, seed=2) == expected


def test_numbers_of_numpy_are_numbers(sampler):
    options = {
        "n": 2,
        "max_new_tokens": 4,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.5,
        "min_p": 0.25,
        "seed": 3,
    }
    typed = {
        name: np.float32(x) if isinstance(x, float) else np.int64(x)
        for name, x in options.items()
    }
    assert sampler.generate(PROMPTS, **typed) == sampler.generate(PROMPTS, **options)
    assert list(sampler.stream(torch.tensor([5]), 4)) == list(sampler.stream([5], 4))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], ""], {}, "prompt 1 is empty"),
        ([[1] * 128], {}, "prompt 0 has 128 tokens"),
        (
            ["one two " * 100],
            {},
            "prompt 0 has [0-9]+ tokens: the model's context holds 128",
        ),
        ([[1], [2], [10**6]], {}, "prompt 2 has a token outside"),
        ([[-1]], {}, "prompt 0 has a token outside"),
        ([[10**30]], {}, "prompt 0 has a token outside"),
        (
            [[1.0, 2.0]],
            {},
            r"prompt 0 is \[1.0, 2.0\]: it must be a text or a list of token ids",
        ),
        ([[True]], {}, r"prompt 0 is \[True\]"),
        ([[1], None], {}, "prompt 1 is None"),
        ([[1], 2], {}, "prompt 1 is 2"),
        ([[[1]]], {}, r"prompt 0 is \[\[1\]\]"),
        ([["a", "b"]], {}, r"prompt 0 is \['a', 'b'\]"),
        ([{"role": "user"}], {}, "prompt 0 is {'role': 'user'}"),
        ([b"text"], {}, "prompt 0 is b'text'"),
        (["\ud800"], {}, r"prompt 0 is '\\ud800': it is no valid Unicode text"),
        (torch.tensor([1.5]), {}, "prompt 0 is 1.5"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), {}, r"prompt 0 is \[\[0\]\]"),
        (
            torch.tensor(3),
            {},
            "prompts is 3: it must be a list of texts or of lists of token ids",
        ),
        ({"input_ids": [[1]]}, {}, "prompts is {'input_ids'"),
        (None, {}, "prompts is None"),
        (7, {}, "prompts is 7"),
        *[
            ([[1]], {"n": n}, f"n is {n!r}: it must be an integer, at least 1")
            for n in (0, -1, 1.0, True, None, "2")
        ],
        *[
            ([[1]], {"max_new_tokens": n}, f"max_new_tokens is {n!r}")
            for n in (0, -5, 2.5, None, "8", math.inf)
        ],
        *[
            ([[1]], {"temperature": t}, f"temperature is {t!r}")
            for t in (-1.0, math.nan, math.inf, None, "1", True)
        ],
        *[
            ([[1]], {"temperature": t}, "temperature is ")
            for t in (10**400, 1j, [1.0], torch.ones(2, 2))
        ],
        *[
            ([[1]], {"top_p": p}, f"top_p is {p!r}")
            for p in (0.0, -0.5, 1.5, math.nan, None, "1")
        ],
        *[([[1]], {"top_k": k}, f"top_k is {k!r}") for k in (-1, 2.0, math.nan, None)],
        *[
            ([[1]], {"min_p": p}, f"min_p is {p!r}")
            for p in (-0.1, 1.1, math.nan, None)
        ],
        *[
            ([[1]], {"seed": seed}, f"seed is {seed!r}: it must be an integer")
            for seed in (-1, 2**64, 1.5, None)
        ],
        *[
            ([[1]], {"stop": stop}, "stop is ")
            for stop in ("", ("",), ("a", ""), [3], 3, 0, [None], b"ab", [["a"]])
        ],
    ],
)
def test_mistakes_are_one_line(sampler, prompts, options, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        sampler.generate(prompts, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    if isinstance(prompts, list) and len(prompts) == 1 and "n" not in options:
        with pytest.raises(ValueError, match=message):
            next(sampler.stream(prompts[0], **options))


@pytest.mark.parametrize("slots", [0, -1, 1.5, None])
def test_slots_must_be_positive(sampler, slots):
    with pytest.raises(ValueError, match=f"slots is {slots}"):
        Sampler(sampler.model, sampler.tokenizer, slots)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}], ids=str)
def test_logits_that_are_not_numbers_are_named(new_model, tokenizer, options):
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError,
        match="^the logprob of token 0 of sample 0 of prompt 0 is nan$",
    ):
        Sampler(model, tokenizer).generate(
            [[5, 6], [7]], n=2, max_new_tokens=3, **options
        )
