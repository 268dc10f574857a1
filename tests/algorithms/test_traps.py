"""What every public function has to stand, one table of calls against one property at a time.

Inputs stay as they are, views and strides do not matter, garbage outside the mask never
counts, nor do padding, the order of rows or how a batch is cut; low precision and far-off
policies stay finite; and eos gets its gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GRPO, LENGTHS, choices, new_batch, randoms
from torch import Tensor

from nanomath import algorithms
from nanomath.algorithms import (
    CREDITS,
    PRESETS,
    Rewards,
    Tokens,
    clipped_tokens,
    compute_advantages,
    compute_weights,
    credit,
    decoupled_advantages,
    explained_variance,
    gae,
    group_advantages,
    has_gradient,
    kl_estimate,
    kl_loss,
    loss_weights,
    on_tokens,
    overlong_filter,
    policy_loss,
    policy_objective,
    preference_advantages,
    preferences,
    process_advantages,
    response_mask,
    sampler_correction,
    select_samples,
    sft_loss,
    to_go,
    token_baseline_advantages,
    token_rewards,
    top_covariance,
    top_entropy,
    value_loss,
    value_objective,
    whiten,
)
from nanomath.settings import Algorithm

RATIOS, CLIPS = ("token", "sequence", "off"), ("ppo", "dual", "cispo", "off")
ESTIMATORS, CORRECTIONS = ("k1", "k2", "k3", "k3+"), ("off", "weight", "ratio")
Call = Callable[[SimpleNamespace], Tensor]


def policy_call(ratio: str, clip: str, b: SimpleNamespace) -> Tensor:
    return policy_loss(
        b.new, b.old, b.advantages, b.weights, ratio=ratio, clip=clip, mask=b.mask
    )[0]


def kl_call(kind: str, correction: str, b: SimpleNamespace) -> Tensor:
    return kl_loss(b.new, b.ref, b.old, b.weights, kind, correction)


def tokens_of(b: SimpleNamespace) -> Tokens:
    return Tokens(
        mask=b.mask,
        loss_mask=b.mask,
        sampler_logprobs=b.sampled,
        behavior_logprobs=b.sampled,
        old_logprobs=b.old,
        old_entropy=b.values,
        ref_logprobs=b.ref,
        teacher_logprobs=b.sampled,
        values=b.old_values,
        returns=b.rewards,
        advantages=torch.where(b.mask, b.advantages, 0.0),
        weights=b.weights,
        policy_weights=b.weights,
        covariance_weights=b.weights,
    )


def objective_call(options: dict, b: SimpleNamespace) -> Tensor:
    return policy_objective(Algorithm(**options), b.new, tokens_of(b))


def advantages_call(options: dict, b: SimpleNamespace) -> Tensor:
    components = b.outcomes[None], torch.ones(1)
    rewards = Rewards(b.outcomes, *components, 1, 0.5, b.step_rewards, b.step_ends)
    return compute_advantages(Algorithm(scale="off", **options), rewards, tokens_of(b))[
        0
    ]


UNREWARDED = {"baseline": "off", "scale": "off", "clip": "off", "kl_coef": 0.0}
LESSONS = {
    "one": {"advantage": "one"},
    "teacher": {"advantage": "teacher"},
    "teacher_full": {"advantage": "teacher_full"},
    "preference": PRESETS["dpo"],
}


def pairs_of(b: SimpleNamespace) -> Rewards:
    """Groups of two, where there are that many."""
    components = b.outcomes[None], torch.ones(1)
    size = 1 if len(b.outcomes) % 2 else 2
    return Rewards(b.outcomes, *components, size, 0.5, right=b.outcomes > 0)


def lesson_call(options: dict, b: SimpleNamespace) -> Tensor:
    a = Algorithm(**{**UNREWARDED, **options})
    return compute_advantages(a, pairs_of(b), tokens_of(b))[0]


def selected(how: str, b: SimpleNamespace) -> Tensor:
    return select_samples(Algorithm(samples=how), pairs_of(b), b.mask)


OBJECTIVES = {
    "KL in the loss": {"kl_coef": 0.3},
    "sequences": {"ratio": "sequence", "kl_coef": 0.0, "minibatches": 2},
    "KL-Cov": {"covariance": "kl", "clip": "off"},
}

# A scalar, as a sum over tokens with weights that were made for the whole batch.
LOSSES: dict[str, Call] = {
    **{
        f"policy_loss {pair}": partial(policy_call, *pair)
        for pair in itertools.product(RATIOS, CLIPS)
    },
    **{
        f"kl_loss {pair}": partial(kl_call, *pair)
        for pair in itertools.product(ESTIMATORS, CORRECTIONS)
    },
    "policy_loss without mask": lambda b: policy_loss(
        b.new, b.old, b.advantages, b.weights, ratio="sequence"
    )[0],
    **{
        f"policy_objective {name}": partial(objective_call, options)
        for name, options in OBJECTIVES.items()
    },
    "value_objective": lambda b: value_objective(Algorithm(), b.new, tokens_of(b)),
    "value_loss": lambda b: value_loss(b.new, b.old_values, b.rewards, b.weights),
    "sft_loss": lambda b: sft_loss(b.new, b.weights),
    "sft_loss dft": lambda b: sft_loss(b.new, b.weights, dft=True),
}

# A matrix [B, T] of which only what the mask holds is looked at.
MATRICES: dict[str, Call] = {
    "gae": lambda b: gae(b.rewards, b.values, b.mask, 0.9, 0.8)[0],
    "gae returns": lambda b: gae(b.rewards, b.values, b.mask, 0.9, 0.8)[1],
    "token_rewards": lambda b: token_rewards(b.outcomes, b.mask, b.values, 0.3),
    "whiten": lambda b: whiten(b.advantages, b.mask),
    "top_entropy": lambda b: top_entropy(b.values, b.mask, 0.4),
    "top_covariance": lambda b: top_covariance(b.new, b.advantages, b.mask, 0.4),
    "overlong_filter": lambda b: overlong_filter(b.mask, b.outcomes > 0),
    "compute_advantages off": partial(
        advantages_call, {"baseline": "off", "kl_in": "reward", "kl_estimator": "k1"}
    ),
    "compute_advantages value": partial(advantages_call, {"baseline": "value"}),
    **{
        f"compute_advantages {name}": partial(lesson_call, options)
        for name, options in LESSONS.items()
    },
    **{
        f"select_samples {how}": partial(selected, how)
        for how in ("right", "best", "pair")
    },
    "compute_weights": lambda b: compute_weights(
        Algorithm(top_entropy=0.4), tokens_of(b), 9
    )["policy_weights"],
    "clipped_tokens": lambda b: clipped_tokens(Algorithm(), b.new, tokens_of(b))[
        "clipped_low"
    ],
    "clipped_low": lambda b: policy_loss(b.new, b.old, b.advantages, b.weights)[1][
        "clipped_low"
    ],
    "clipped_high": lambda b: policy_loss(b.new, b.old, b.advantages, b.weights)[1][
        "clipped_high"
    ],
    "process_advantages": lambda b: process_advantages(
        b.step_rewards, b.step_ends, b.mask.shape[1]
    ),
    "token_baseline_advantages": lambda b: token_baseline_advantages(
        b.step_rewards, b.step_ends, b.mask.sum(1), b.mask.shape[1]
    ),
    "on_tokens": lambda b: on_tokens(b.step_rewards, b.step_ends, b.mask.shape[1]),
    "to_go": lambda b: to_go(torch.where(b.mask, b.rewards, 0.0)),
    "kl_estimate": lambda b: torch.where(b.mask, kl_estimate(b.new, b.ref), 0.0),
    **{
        f"sampler_correction {how}": partial(
            lambda how, b: (
                sampler_correction(b.old, b.sampled, b.mask, how, 0.5, 2.0) * b.mask
            ),
            how,
        )
        for how in ("off", "truncate", "mask")
    },
    **{
        f"loss_weights {how}": partial(lambda how, b: loss_weights(b.mask, how, 9), how)
        for how in ("token", "sequence", "constant", "sum")
    },
}

# Of other shapes, or a single number for the whole batch.
OTHERS: dict[str, Call] = {
    "explained_variance": lambda b: torch.tensor(
        explained_variance(b.values, b.rewards, b.mask)
    ),
    "group_advantages": lambda b: group_advantages(b.group_rewards),
    "decoupled_advantages": lambda b: decoupled_advantages(
        b.components, b.component_weights, "leave_one_out", "batch"
    ),
    "has_gradient": lambda b: has_gradient(Algorithm(), tokens_of(b)),
    "preferences": lambda b: preferences(Algorithm(), pairs_of(b), tokens_of(b))[1],
    "preference_advantages": lambda b: preference_advantages(
        b.group_rewards, b.group_rewards > 0, b.group_rewards > -1, 0.5
    )[0],
    "response_mask": lambda b: response_mask(b.mask.sum(1)),
    **{
        f"credit {form}": partial(
            lambda form, b: credit(b.step_rewards, b.step_ends, form), form
        )
        for form in CREDITS
    },
}
NOT_OF_A_BATCH = {
    "Rewards",
    "Tokens",
    "find_objective",
    "check",
    "has_group_baseline",
    "penalises_kl",
    "updates_once",
    "neftune_noise",
}
EVERYTHING = {**LOSSES, **MATRICES, **OTHERS}


def batch_of(seed: int = 2, lengths: list[int] = LENGTHS) -> SimpleNamespace:
    """A batch with what the calls above need besides."""
    b = new_batch(seed, lengths)
    shapes = (len(lengths),), (2, 3), (4, 2, 3), (4,), (len(lengths), 3)
    b.outcomes, b.group_rewards, b.components, b.component_weights, b.step_rewards = (
        randoms(seed + 1, *shapes)
    )
    b.step_ends = torch.stack([b.mask.sum(1) - 1 - j for j in range(3)], dim=1)
    return b


def each(change: Callable[[Tensor], Tensor], b: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{name: change(value) for name, value in vars(b).items()})


def of_tokens(
    change: Callable[[Tensor], Tensor], b: SimpleNamespace
) -> SimpleNamespace:
    """Changes the matrices [B, T] of numbers, but neither the mask nor the weights."""
    kept = {"mask": b.mask, "weights": b.weights}
    changed = {
        k: change(v)
        for k, v in vars(b).items()
        if v.shape == b.mask.shape and k not in kept
    }
    return SimpleNamespace(**{**vars(b), **changed})


def value_and_gradient(call: Call, b: SimpleNamespace) -> tuple[Tensor, Tensor]:
    b = SimpleNamespace(**{**vars(b), "new": b.new.detach().clone().requires_grad_()})
    loss = call(b)
    loss.backward()
    return loss.detach(), b.new.grad


def test_every_public_function_is_in_the_tables():
    public = {
        name for name in algorithms.__all__ if callable(getattr(algorithms, name))
    }
    assert (
        public
        == {name.split()[0] for name in EVERYTHING} - {"clipped_low", "clipped_high"}
        | NOT_OF_A_BATCH
    )


@pytest.mark.parametrize("name", EVERYTHING)
def test_inputs_stay_as_they_are_and_strides_do_not_matter(name):
    """Each input is the inside of a larger tensor, every other element of it: writing on a
    view would show outside.
    """
    b = batch_of()
    around = each(lambda x: torch.zeros([2 * n + 3 for n in x.shape], dtype=x.dtype), b)
    inside = each(lambda x: x[tuple(slice(1, -2, 2) for _ in x.shape)], around)
    for key, value in vars(inside).items():
        value.copy_(getattr(b, key))
    before = each(Tensor.clone, around)
    expected, found = EVERYTHING[name](batch_of()), EVERYTHING[name](inside)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert all(
        torch.equal(value, getattr(before, key)) for key, value in vars(around).items()
    )


@pytest.mark.parametrize("name", EVERYTHING)
def test_transposed_inputs(name):
    b = each(lambda x: x.mT.contiguous().mT if x.dim() > 1 else x, batch_of())
    torch.testing.assert_close(
        EVERYTHING[name](b), EVERYTHING[name](batch_of()), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_garbage_outside_the_mask_reaches_neither_value_nor_gradient(name, junk):
    b = batch_of()
    dirty = of_tokens(lambda x: torch.where(b.mask, x, junk), b)
    (loss, gradient), (clean, clean_gradient) = (
        value_and_gradient(LOSSES[name], x) for x in (dirty, b)
    )
    assert torch.equal(loss, clean) and torch.equal(gradient, clean_gradient)
    assert (gradient[~b.mask] == 0).all()


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", [*MATRICES, "explained_variance"])
def test_garbage_outside_the_mask_does_not_show(name, junk):
    b = batch_of()
    dirty = of_tokens(lambda x: torch.where(b.mask, x, junk), b)
    found, clean = EVERYTHING[name](dirty), EVERYTHING[name](b)
    assert torch.equal(found, clean)
    assert found.dim() == 0 or not found[~b.mask].any()


@pytest.mark.parametrize("name", [*LOSSES, *MATRICES])
def test_padding_and_the_order_of_rows_do_not_matter(name):
    b, order = batch_of(), torch.tensor([2, 3, 0, 1])
    wide = each(
        lambda x: (
            torch.cat([x, torch.zeros_like(x[:, :3])], 1)
            if x.shape == b.mask.shape
            else x
        ),
        b,
    )
    mixed = each(lambda x: x[order] if len(x) == len(order) else x, wide)
    found, moved, expected = (EVERYTHING[name](x) for x in (wide, mixed, b))
    if found.dim():
        found, moved, expected = (
            found[:, : b.mask.shape[1]],
            moved[:, : b.mask.shape[1]],
            expected,
        )
        moved = moved[order.argsort()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=4, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 5), min_size=2, max_size=6),
    st.integers(1, 5),
)
def test_the_parts_of_a_batch_sum_to_the_whole(name, seed, lengths, cut):
    """Each part is padded to its own longest row, as a micro-batch is."""
    b = batch_of(seed, lengths)
    loss, gradient = value_and_gradient(LOSSES[name], b)
    total, pieces = 0.0, torch.zeros_like(gradient)
    for rows in torch.arange(len(lengths)).split(cut):
        width = max(lengths[i] for i in rows)
        part = each(lambda x: x[rows][:, :width] if x.shape == b.mask.shape else x, b)  # noqa: B023
        value, pieces[rows, :width] = value_and_gradient(LOSSES[name], part)
        total += value
    assert float(total) == pytest.approx(float(loss), abs=1e-12)
    torch.testing.assert_close(pieces, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[0, 0], [0], [1, 1], [1]])
@pytest.mark.parametrize("name", [*LOSSES, *MATRICES, "explained_variance"])
def test_empty_and_one_token_completions(name, lengths):
    found = EVERYTHING[name](batch_of(0, lengths))
    assert found.isfinite().all()
    if not sum(lengths):
        assert not found.any()


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_gives_the_same_roughly(name, dtype, rtol):
    """Weights stay float64, as loss_weights makes them."""
    b = of_tokens(lambda x: x.bfloat16().double(), batch_of())
    low = of_tokens(lambda x: x.to(dtype), b)
    (loss, gradient), (expected, expected_gradient) = (
        value_and_gradient(LOSSES[name], x) for x in (low, b)
    )
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=rtol, atol=rtol
    )


# exp(1000) is no probability
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft_loss dft"])
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_far_off_policies_leave_everything_finite(name, gap):
    b = of_tokens(Tensor.float, batch_of())
    b.new = b.new + gap
    loss, gradient = value_and_gradient(LOSSES[name], b)
    assert loss.isfinite() and gradient.isfinite().all()


LEARNING = {
    "policy_loss": lambda b: policy_loss(b.new, b.new.detach(), b.outcomes, b.weights)[
        0
    ],
    "kl_loss": lambda b: kl_loss(b.new, b.ref, b.new.detach(), b.weights, "k2"),
    "sft_loss": lambda b: sft_loss(b.new, b.weights),
}


@pytest.mark.parametrize("loss", LEARNING.values(), ids=LEARNING.keys())
def test_the_eos_that_ends_a_completion_is_taught_though_pads_look_like_it(loss):
    """Ids 0 end completions and fill the rows up: logits of the first 0 get a gradient, those
    after it none.
    """
    eos = 0
    tokens = torch.tensor(
        [[3, 1, eos, eos, eos], [2, eos, eos, eos, eos], [1, 2, 3, 1, eos]]
    )
    lengths = torch.tensor([3, 2, 5])
    logits = randoms(0, (3, 5, 4))[0].requires_grad_()
    b = batch_of(0, [3, 2, 5])
    mask = response_mask(lengths)
    new = logits.log_softmax(-1).gather(-1, tokens[:, :, None])[:, :, 0]
    old, ref = new.detach() - 0.1, new.detach() - 0.2
    batch = SimpleNamespace(
        new=new,
        old=old,
        ref=ref,
        outcomes=b.outcomes,
        weights=loss_weights(mask, "token"),
    )
    loss(batch).backward()
    touched = (logits.grad != 0).any(dim=-1)
    assert torch.equal(touched, mask)


def test_choices_are_not_changed_by_checking():
    a = choices()
    algorithms.check(a)
    assert vars(a) == GRPO
