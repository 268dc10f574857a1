"""What a gradient must not depend on: how a batch is cut, padded and ordered, and what
the padding holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_step import (
    EOS,
    GROUPS,
    SIZE,
    WEIGHTS,
    Descent,
    assert_same,
    new_critic,
    new_episodes,
    new_step,
    without_zeros,
)

from nanomath.algorithms import PRESETS
from nanomath.models.batches import Batch, Example, make_batch
from nanomath.training import policy_step, sft_step
from nanomath.training.sft_step import SFTStep
from nanomath.training.teacher import Teacher

Gradients = list[dict[str, torch.Tensor]]
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]
few = partial(settings, deadline=None)
budgets = st.sampled_from([0, 1, 9, 12, 16, 25, 40])
group_orders = st.permutations(range(GROUPS))
sample_orders = st.lists(st.permutations(range(SIZE)), min_size=GROUPS, max_size=GROUPS)
OFF_POLICY = {"old_logprobs": "sampler", "minibatches": 1}
METHODS = {
    "grpo": {"kl_coef": 0.04},
    "dapo": {**PRESETS["dapo"], "overlong_filter": True, **OFF_POLICY},
    "gspo": {**PRESETS["gspo"], "clip_low": 0.1, "clip_high": 0.1, **OFF_POLICY},
    "gdpo": {
        **PRESETS["gdpo"],
        "sampler_correction": "truncate",
        "correction_high": 1.1,
        "kl_coef": 0.04,
    },
    "ppo": {**PRESETS["ppo"], **OFF_POLICY},
    "ppo, shared": {**PRESETS["ppo"], "value_trunk": "shared", **OFF_POLICY},
    "reinforce_pp": {**PRESETS["reinforce_pp"], "kl_coef": 0.3},
    "kl_cov": {**PRESETS["kl_cov"], "covariance_share": 0.2, **OFF_POLICY},
    "top_entropy": {"top_entropy": 0.3, "aggregation": "token", "kl_coef": 0.0},
    "ties": {
        "top_entropy": 0.52,
        "aggregation": "token",
        "kl_coef": 0.0,
    },  # first tokens of a group, all or none
}


@pytest.fixture(scope="module")
def policy_gradients(new_model) -> Callable[..., Gradients]:
    """policy_gradients(options, dtype, order, token_budget): those of all updates of a step
    that moves.
    """

    @cache
    def start(dtype: torch.dtype):
        policy = new_model(0, dtype)
        return (
            policy,
            new_model(1, dtype).requires_grad_(False),
            new_episodes(policy, noise=0.3),
        )

    def gradients(
        options: dict,
        dtype: torch.dtype,
        order: Sequence[int] | None = None,
        token_budget=0,
    ) -> Gradients:
        policy, reference, episodes = start(dtype)
        policy = copy.deepcopy(policy)
        step = new_step(
            policy, reference, Descent(policy), token_budget=token_budget, **options
        )
        step.max_length, step.reward_weights = 9, WEIGHTS
        if step.algorithm.advantage == "teacher":
            step.teacher = Teacher(reference, None, None)
        if step.algorithm.baseline == "value":
            step.critic = new_critic(policy, step.algorithm.value_trunk == "own")
            step.critic_optimizer = Descent(step.critic)
        step.step(episodes if order is None else [episodes[i] for i in order], 3, 1e-3)
        return step.optimizer.gradients + (
            step.critic_optimizer.gradients if step.critic else []
        )

    return gradients


def assert_all_same(found: Gradients, expected: Gradients, tolerance: float) -> None:
    found, expected = without_zeros(found), without_zeros(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_neither_cut_nor_order_changes_a_policy_gradient(
    policy_gradients, options, dtype
):
    expected = policy_gradients(options, dtype)

    @few(max_examples=5)
    @given(groups=group_orders, samples=sample_orders, token_budget=budgets)
    def check(groups, samples, token_budget):
        order = [group * SIZE + sample for group in groups for sample in samples[group]]
        assert_all_same(
            policy_gradients(options, dtype, order, token_budget),
            expected,
            EXACT[dtype],
        )

    check()


# Those with parts of their own; the others differ in formulas.
SPECIAL = ("grpo", "dapo", "ppo", "process_grpo", "kl_cov", "opd")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "method",
    [m if m in SPECIAL else pytest.param(m, marks=pytest.mark.slow) for m in PRESETS],
)
def test_the_cut_changes_no_gradient_of_a_minibatch(policy_gradients, method, dtype):
    options = {"kl_coef": 0.04, "covariance_share": 0.8, **PRESETS[method]}
    if options.get("ratio") != "off":
        options |= {"minibatches": 2, "epochs": 2}
    expected = policy_gradients(options, dtype)
    for token_budget in (1, 40):
        assert_all_same(
            policy_gradients(options, dtype, None, token_budget), expected, EXACT[dtype]
        )


def scribbled(examples: Sequence[Example], share: bool = True) -> Batch:
    """A batch whose attention is three columns wider, filled with any tokens' places."""
    batch = make_batch(examples, share)
    block = batch.layout.pieces.block
    rows, width = block.queries.shape
    some = torch.arange(3).expand(rows, 3) % batch.layout.tokens.shape[1]
    vars(batch.layout.pieces)["block"] = block._replace(
        queries=torch.cat((block.queries, some), dim=1),
        keys=torch.cat((block.keys, some), dim=1),
        kept=block.kept + 3 * (block.kept // width),
    )
    return batch


@pytest.mark.parametrize("method", ["grpo", "gspo", "ppo", "top_entropy"])
def test_what_pads_a_rollout_changes_no_gradient(policy_gradients, monkeypatch, method):
    expected = policy_gradients(METHODS[method], torch.float64)
    monkeypatch.setattr(policy_step, "make_batch", scribbled)
    assert_all_same(policy_gradients(METHODS[method], torch.float64), expected, 1e-10)


# --- supervised fine-tuning ------------------------------------------------------------------

EXAMPLES = [
    Example([5, 6, 7], [8, 9, EOS]),
    Example([11], [EOS]),
    Example([3] * 9, [4, 4, 1, 2, 3, 4, 5, EOS]),
    Example([20, 21], [22, 23, 24, 25, EOS]),
    Example([30, 31, 32, 33], []),
    Example([3] * 9, [4, 4, EOS]),
]
SFT = {
    "token": {},
    "sequence": {"aggregation": "sequence"},
    "dft": {"dft": True},
    "neftune": {"neftune_alpha": 5.0},
}


def sft_gradient(
    model, order: Sequence[int] | None = None, **options
) -> dict[str, torch.Tensor]:
    optimizer = Descent(model)
    examples = EXAMPLES if order is None else [EXAMPLES[i] for i in order]
    SFTStep(model, optimizer, seed=1, **options).step(examples, 4, 0.0)
    return optimizer.gradients[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SFT.values(), ids=SFT)
def test_neither_cut_nor_order_changes_an_sft_gradient(new_model, options, dtype):
    """But NEFTune's noise belongs to a place in the batch."""
    model = new_model(0, dtype)
    expected = sft_gradient(model, **options)
    orders = (
        st.none()
        if "neftune_alpha" in options
        else st.permutations(range(len(EXAMPLES)))
    )

    @few(max_examples=15)
    @given(order=orders, token_budget=budgets)
    def check(order, token_budget):
        found = sft_gradient(model, order, token_budget=token_budget, **options)
        assert_same(found, expected, EXACT[dtype])

    check()


def test_the_cut_changes_nothing_for_any_family(new_model, family_shape):
    model = new_model(0, torch.float64, **family_shape)
    together = sft_gradient(model, [2, 0, 5, 4, 1, 3])
    assert_same(together, sft_gradient(model, token_budget=1))


def test_what_pads_a_batch_changes_no_gradient(new_model, monkeypatch):
    model = new_model(0, torch.float64)
    expected = sft_gradient(model)
    monkeypatch.setattr(sft_step, "make_batch", scribbled)
    assert_same(sft_gradient(model), expected)
