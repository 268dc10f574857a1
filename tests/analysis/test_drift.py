"""Each measure of drift against a case whose answer is known, or against NumPy in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from nanomath.analysis import drift
from nanomath.models import ModelConfig, Transformer
from nanomath.models.batches import Example

TEXTS = [[3 + (7 * i + j) % 90 for j in range(2 + 3 * i)] for i in range(6)]
EXAMPLES = [Example(text[:2], [*text[2:], 9]) for text in TEXTS]


@pytest.fixture
def base(new_model):
    return new_model()


@pytest.fixture
def other(new_model):
    """The base with another model's weights mixed in."""
    model = new_model()
    with torch.no_grad():
        for one, two in zip(
            model.parameters(), new_model(seed=1).parameters(), strict=True
        ):
            one.lerp_(two, 0.05)
    return model


def untied(model: Transformer) -> Transformer:
    """The same function, with an lm_head of its own."""
    config = ModelConfig(**{**vars(model.config), "tie_embeddings": False})
    new = Transformer(config)
    new.load_state_dict(model.state_dict())
    return new


def logprobs(model: Transformer, example: Example) -> np.ndarray:
    """float64 logprobs [R, V] at each token of a response, by a forward pass of it alone."""
    tokens = torch.tensor([example.prompt + example.response])
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(tokens)[0].double().numpy()
    return log_softmax(logits[len(example.prompt) - 1 : -1], axis=1)


def by_hand(base, tuned, example) -> np.ndarray:
    """The five numbers of each token by sums over the whole vocabulary."""
    q, p = (logprobs(model, example) for model in (base, tuned))
    rows = np.arange(len(q))
    y = np.array(example.response)
    ranks = [(x > x[rows, y][:, None]).sum(1) for x in (q, p)]
    k1 = (p - q)[rows, y]
    forward = (np.exp(p) * (p - q)).sum(1)
    return np.stack([k1, forward, (np.exp(q) * (q - p)).sum(1), *ranks])


# --- equal models ----------------------------------------------------------------------------


def test_a_copy_has_not_moved_at_all(base, tokenizer):
    twin = copy.deepcopy(base)
    shifts = drift.token_shift(base, twin, EXAMPLES)
    measured = drift.token_measures(shifts)
    assert all(n == 0 for name in measured for n in measured[name].values())
    answers = [e.response for e in EXAMPLES]
    moved = drift.moved_tokens(tokenizer, answers, shifts, most=5)
    assert moved == {"shares": dict.fromkeys(drift.KINDS_OF_TOKENS, 0), "tokens": []}
    states = [drift.features(model, TEXTS) for model in (base, twin)]
    latent = drift.latent_shift(*states)
    assert latent["cka"]["mean"] == 1
    assert all(row["cka"] == 1 and row["distance"] == 0 for row in latent["layers"])
    assert all(n == 0 for n in latent["relative_distance"].values())
    weights = drift.weight_change(base, twin)
    assert all(row["change"] == row["changed"] == 0 for row in weights["matrices"])
    assert weights["all"]["effective_rank"] == 0


def test_a_model_rounded_to_bfloat16_has_moved_by_its_rounding(base):
    rounded = copy.deepcopy(base).bfloat16().float()
    measured = drift.token_measures(drift.token_shift(base, rounded, EXAMPLES))
    assert 0 < measured["forward_kl"]["mean"] < 1e-3
    weights = drift.weight_change(base, rounded)["all"]
    assert weights["changed"] == 0  # written in bfloat16 they are the same
    # The error of rounding to 8 bits is even over +-2^-9 of numbers of 1 to 2.
    assert 2**-10 < weights["change"] < 2**-8.5
    states = [drift.features(model, TEXTS) for model in (base, rounded)]
    latent = drift.latent_shift(*states)
    assert 0 < latent["relative_distance"]["mean"] < 0.02
    assert 0.999 < latent["cka"]["mean"] < 1


# --- tokens ----------------------------------------------------------------------------------


def test_token_numbers_are_those_of_the_whole_vocabulary(base, other):
    found = drift.token_shift(base, other, EXAMPLES, token_budget=20)
    for example, shift in zip(EXAMPLES, found, strict=True):
        np.testing.assert_allclose(shift, by_hand(base, other, example), atol=2e-5)
    measured = drift.token_measures(found)
    means = [shift.mean(1) for shift in found]  # of each response first
    assert measured["k1"]["mean"] == pytest.approx(np.mean([m[0] for m in means]))
    assert measured["forward_kl"]["mean"] == pytest.approx(
        np.mean([m[1] for m in means])
    )
    error = np.std([m[1] for m in means], ddof=1) / len(means) ** 0.5
    assert measured["forward_kl"]["stderr"] == pytest.approx(error)
    assert measured["reverse_kl"]["low"] < measured["reverse_kl"]["high"]


def test_chunks_do_not_change_the_numbers(base, other, monkeypatch):
    whole = drift.token_shift(base, other, EXAMPLES)
    monkeypatch.setattr(drift, "CHUNK_LOGITS", 1)
    for one, two in zip(whole, drift.token_shift(base, other, EXAMPLES), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("bias", [1e-3, 1.0, 30.0])
def test_a_bias_on_one_token_gives_its_known_divergence(bias):
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)).double()
    raised = logits.clone()
    raised[:, 7] += bias
    q = torch.softmax(logits, 1)[:, 7].numpy()
    # p(v) = q(v) e^(b [v = 7]) / Z: what the bias adds to one token, all pay by log Z.
    log_z = np.log1p(q * np.expm1(bias))
    forward = bias * q * np.exp(bias - log_z) - log_z
    reverse = log_z - bias * q
    target = torch.full((50,), 7)
    found = drift.compare_logits(logits.float(), raised.float(), target).numpy()
    np.testing.assert_allclose(found[0], bias - log_z, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[1], forward, rtol=5e-3, atol=1e-9)
    np.testing.assert_allclose(found[2], reverse, rtol=5e-3, atol=1e-9)
    assert (found[4] <= found[3]).all()
    exact = drift.compare_logits(logits, raised, target).numpy()
    np.testing.assert_allclose(exact[1], forward, rtol=1e-9, atol=1e-14)


def test_an_lm_head_row_that_changed_is_found(base):
    base = untied(base)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.lm_head.weight[9] += 0.2
    found = drift.token_shift(base, tuned, EXAMPLES)
    for example, shift in zip(EXAMPLES, found, strict=True):
        np.testing.assert_allclose(shift, by_hand(base, tuned, example), atol=2e-5)
    weights = drift.weight_change(base, tuned)
    assert [row["name"] for row in weights["matrices"] if row["change"]] == [
        "lm_head.weight"
    ]
    assert weights["kinds"]["lm_head"]["effective_rank"] == pytest.approx(1)
    assert weights["layers"]["lm_head"]["change"] > weights["all"]["change"] > 0


def test_divergence_of_distributions_with_nothing_in_common():
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    a, b = logits.log_softmax(1), logits.flip(1).log_softmax(1)
    assert drift.divergence(a, b).tolist() == pytest.approx([200])


def test_a_padded_vocabulary_is_cut_to_the_tokens_of_both(base, new_model):
    wide = new_model(vocab_size=base.config.vocab_size + 5)
    with torch.no_grad():
        for one, two in zip(wide.parameters(), base.parameters(), strict=True):
            one[: len(two)] = two
            one[len(two) :] = 3.0
    for shift in drift.token_shift(base, wide, EXAMPLES):
        assert np.abs(shift[:3]).max() < 1e-5 and (shift[3] == shift[4]).all()
    last = Example([3, 4], [base.config.vocab_size + 1])
    with pytest.raises(ValueError, match="of which one model has no row"):
        drift.token_shift(base, wide, [last])
    with pytest.raises(ValueError, match="embed_tokens.weight is"):
        drift.weight_change(base, wide)


def test_tokens_are_ordered_by_how_often_they_were_drawn_times_their_shift(tokenizer):
    words = ["so", "7", "=", "apples", "."]
    ids = [tokenizer.encode(word)[-1] for word in words]
    ranks = np.array([[0, 0, 0, 4, 1], [0, 2, 0, 0, 0]], float)
    shift = np.concatenate([np.zeros((3, 5)), ranks])
    answers = [ids, ids]
    found = drift.moved_tokens(tokenizer, answers, [shift, shift], most=2)
    rows = [(row["token"], row["count"], row["mean_shift"]) for row in found["tokens"]]
    assert rows == [(ids[3], 2, 4), (ids[1], 2, 2)]
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["tokens"][0]["score"] == 8


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" Therefore", "logical"),
        ("=", "logical"),
        ("したがって", "logical"),
        ("次に", "logical"),
        (" apples", "content"),
        ("りんご", "content"),
        (" 42", "number"),
        ("½", "number"),
        (".", "mark"),
        ("", "mark"),
        ("\n\n", "mark"),
        ("\ufffd", "mark"),
    ],
)
def test_kinds_of_tokens(text, kind):
    assert drift.kind_of(text) == kind


def test_texts_are_scored_by_the_character_where_tokenizers_differ(
    base, other, tokenizer
):
    texts = ["so 1+1=2", "", "no"]
    prompts = [[3, 4]] * 3
    found = drift.text_shift(
        [(base, tokenizer), (other, tokenizer)], [prompts, prompts], texts
    )
    assert found[1] == 0
    example = Example([3, 4], tokenizer.encode(texts[0]))
    k1 = by_hand(base, other, example)[0]
    assert found[0] == pytest.approx(k1.sum() / len(texts[0]), abs=1e-5)


# --- states ----------------------------------------------------------------------------------


def test_features_are_means_of_the_states_of_every_layer(base):
    found = drift.features(base, TEXTS)
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for layer in base.model.layers
    ]
    with torch.no_grad():
        last = base.hidden(torch.tensor([TEXTS[4]]))
    for hook in hooks:
        hook.remove()
    by_layer = np.stack([x[0].mean(0).numpy() for x in (*seen, last)])
    np.testing.assert_allclose(found[:, 4], by_layer, atol=1e-5)
    assert len(base.model.embed_tokens._forward_hooks) == 0


def test_features_of_a_text_do_not_depend_on_its_neighbours(base):
    together = drift.features(base, TEXTS)
    for budget in (1, 20):
        np.testing.assert_allclose(
            drift.features(base, TEXTS, budget), together, atol=1e-5
        )
    np.testing.assert_allclose(
        drift.features(base, TEXTS[:1]), together[:, :1], atol=1e-5
    )


def test_the_plane_is_that_of_pca_in_float64():
    x = np.random.default_rng(0).normal(size=(40, 8)) * np.arange(1, 9) + 5
    components, spread = drift.plane(x)
    values, vectors = np.linalg.eigh(np.cov(x.T, ddof=0))
    np.testing.assert_allclose(
        np.abs(components @ vectors[:, :-3:-1]), np.eye(2), atol=1e-9
    )
    assert spread == pytest.approx(np.sqrt(values[-2:].sum()))


def test_a_shift_in_the_plane_has_its_distance_and_one_off_it_has_none():
    base = np.random.default_rng(0).normal(size=(2, 50, 6)) * [9, 5, 1, 1, 1, 1]
    components, spread = drift.plane(base[0])
    inside = base + 3 * components[0] + 4 * components[1]
    found = drift.latent_shift(base[:1], inside[:1])
    assert found["layers"][0]["distance"] == pytest.approx(5)
    assert found["layers"][0]["relative_distance"] == pytest.approx(5 / spread)
    assert found["distance"]["low"] == pytest.approx(5)  # all texts moved alike
    assert found["cka"]["mean"] == pytest.approx(1)
    off = np.linalg.svd(base[0] - base[0].mean(0))[2][-1]
    assert drift.latent_shift(base[:1], base[:1] + 7 * off)["distance"]["mean"] < 1e-9
    # A hundred times the activations: a hundred times the distance, the same share of the spread.
    scaled = drift.latent_shift(100 * base[:1], 100 * inside[:1])
    assert scaled["layers"][0]["distance"] == pytest.approx(500)
    assert scaled["layers"][0]["relative_distance"] == pytest.approx(5 / spread)


def test_the_interval_is_that_of_drawing_texts_anew():
    generator = np.random.default_rng(0)
    base = generator.normal(size=(1, 200, 4)) * [9, 5, 1, 1]
    components, _ = drift.plane(base[0])
    steps = 10 + generator.normal(size=(200, 1))
    found = drift.latent_shift(base, base + steps * components[0])["distance"]
    assert found["mean"] == pytest.approx(steps.mean())
    error = steps.std() / 200**0.5
    assert found["stderr"] == pytest.approx(error, rel=0.1)
    assert found["low"] == pytest.approx(steps.mean() - 1.96 * error, abs=0.3 * error)


def test_cka_knows_no_rotation_and_no_scale():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, 8))
    rotation = np.linalg.qr(generator.normal(size=(8, 8)))[0]
    assert drift.cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    y = generator.normal(size=(30, 5))
    xc, yc = x - x.mean(0), y - y.mean(0)
    norms = np.linalg.norm(xc.T @ xc) * np.linalg.norm(yc.T @ yc)
    assert drift.cka(x, y) == pytest.approx(np.linalg.norm(xc.T @ yc) ** 2 / norms)
    assert drift.cka(x, np.ones((30, 2))) == 0


def permuted(model: Transformer, hidden: bool) -> Transformer:
    """The same function with its hidden units in another order: of the residual stream, or of the
    MLPs.
    """
    new = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    order = torch.randperm(
        config.hidden_size if hidden else config.intermediate_size, generator=generator
    )
    with torch.no_grad():
        for name, p in new.named_parameters():
            if hidden:
                if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
                    p.copy_(p[order])
                else:
                    p.copy_(p[:, order])
            elif "gate_up" in name:
                p.copy_(p[torch.cat([order, order + config.intermediate_size])])
            elif "down" in name:
                p.copy_(p[:, order])
    return new


@pytest.mark.parametrize("hidden", [True, False])
def test_units_in_another_order_are_the_same_function(base, hidden):
    tuned = permuted(base, hidden)
    measured = drift.token_measures(drift.token_shift(base, tuned, EXAMPLES))
    assert abs(measured["forward_kl"]["mean"]) < 1e-8
    states = [drift.features(model, TEXTS) for model in (base, tuned)]
    found = drift.latent_shift(*states)
    assert found["cka"]["mean"] == pytest.approx(1, abs=1e-5)
    if hidden:  # the states point elsewhere: the plane sees what CKA does not
        assert found["relative_distance"]["mean"] > 0.1
    else:
        assert found["relative_distance"]["mean"] < 1e-4
    weights = drift.weight_change(base, tuned)
    touched = {row["kind"] for row in weights["matrices"] if row["change"]}
    mlps = {"gate_proj", "up_proj", "down_proj"}
    assert touched >= mlps if hidden else touched == mlps


def test_other_widths_have_no_plane_and_other_depths_are_set_at_equal_shares(
    base, new_model
):
    states = drift.features(base, TEXTS)
    wide = drift.features(new_model(hidden_size=48), TEXTS)
    found = drift.latent_shift(states, wide)
    assert found["refused"].startswith("distance: the widths are 32 and 48")
    assert "distance" not in found and 0 < found["cka"]["mean"] < 1
    deep = drift.features(new_model(num_layers=4), TEXTS)
    layers = drift.latent_shift(states, deep)["layers"]
    assert [row["layer"] for row in layers] == ["embedding", "0", "1", "2", "3"]
    assert layers[2]["cka"] == pytest.approx(drift.cka(states[1], deep[2]))


def test_what_spans_no_plane_is_refused(base):
    states = drift.features(base, TEXTS)
    with pytest.raises(ValueError, match="2 texts: a plane needs 3"):
        drift.latent_shift(states[:, :2], states[:, :2])
    alike = drift.features(base, [TEXTS[3]] * 4)
    with pytest.raises(ValueError, match="the same for all texts"):
        drift.latent_shift(alike, alike)


# --- weights ---------------------------------------------------------------------------------


def test_a_planted_update_of_rank_one_is_found(base):
    generator = torch.Generator().manual_seed(0)
    tuned = copy.deepcopy(base)
    weight = base.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():  # whole numbers, so that the difference is exact
        weight.copy_(torch.randint(-50, 50, weight.shape, generator=generator))
        u = torch.randint(1, 5, (weight.shape[0],), generator=generator).float()
        v = torch.randint(1, 5, (weight.shape[1],), generator=generator).float()
        tuned.model.layers[1].mlp.down_proj.weight.copy_(weight + torch.outer(u, v))
    weights = drift.weight_change(base, tuned)
    (row,) = [row for row in weights["matrices"] if row["change"]]
    assert row["name"] == "model.layers.1.mlp.down_proj.weight"
    assert row["effective_rank"] == pytest.approx(1, abs=1e-9)
    assert row["norm_of_change"] == pytest.approx(float(u.norm() * v.norm()), rel=1e-6)
    assert row["change"] == pytest.approx(row["norm_of_change"] / row["norm"])
    assert row["norm"] == pytest.approx(float(weight.detach().norm()), rel=1e-6)
    assert row["changed"] == 1  # all below 256, where bfloat16 has every whole number
    assert weights["layers"]["1"]["effective_rank"] == pytest.approx(1)
    assert weights["layers"]["0"]["change"] == 0
    assert weights["kinds"]["down_proj"]["change"] < row["change"]


def test_effective_rank_is_the_entropy_of_the_singular_values():
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert drift.effective_rank(matrix) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert drift.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert drift.effective_rank(torch.zeros(3, 4)) == 0


def test_tied_embeddings_count_once(base):
    one = drift.weight_change(base, copy.deepcopy(base))["all"]["weights"]
    assert one == sum(p.numel() for p in base.parameters())
    both = drift.weight_change(base, untied(base))
    assert both["all"]["weights"] == one + base.lm_head.weight.numel()
    assert both["all"]["change"] == 0
    names = [row["name"] for row in both["matrices"]]
    assert len(set(names)) == len(names)
    assert "model.layers.0.self_attn.q_proj.weight" in names


def test_other_shapes_are_refused(base, new_model):
    with pytest.raises(
        ValueError, match=r"is \(.*\) in the base and \(.*\) in the tuned"
    ):
        drift.weight_change(base, new_model(intermediate_size=64))
    with pytest.raises(
        ValueError, match=r"only one of the models has model\.layers\.2\."
    ):
        drift.weight_change(base, new_model(num_layers=3))
