"""The algorithms: pure functions on tensors, each with its equation and its source.

Nothing here knows of models, text or files. Rows are sequences, columns are response
tokens: B sequences (N prompts times G samples), T tokens. A loss is always sum(weights *
per-token loss) with weights from `loss_weights`.

Each axis is a table from names to functions (ADVANTAGES, SAMPLES, BASELINES, SCALES, RATIOS,
CLIPS, AGGREGATIONS, KL_ESTIMATORS, SAMPLER_CORRECTIONS), and a method is a row of PRESETS.
README.md beside this file shows how to add to them.
"""

from .advantages import (
    BASELINES,
    SCALES,
    Rewards,
    decoupled_advantages,
    group_advantages,
    token_rewards,
    whiten,
)
from .credit import (
    CREDITS,
    credit,
    on_tokens,
    process_advantages,
    to_go,
    token_baseline_advantages,
)
from .lessons import (
    ADVANTAGES,
    SAMPLES,
    preference_advantages,
    preferences,
    select_samples,
)
from .losses import (
    AGGREGATIONS,
    CLIPS,
    KL_CORRECTIONS,
    KL_ESTIMATORS,
    RATIOS,
    Tokens,
    kl_estimate,
    kl_loss,
    loss_weights,
    policy_loss,
    response_mask,
)
from .objective import (
    clipped_tokens,
    compute_advantages,
    compute_weights,
    find_objective,
    has_gradient,
    has_group_baseline,
    penalises_kl,
    policy_objective,
    updates_once,
)
from .presets import PRESETS, check
from .selection import (
    SAMPLER_CORRECTIONS,
    overlong_filter,
    sampler_correction,
    top_covariance,
    top_entropy,
)
from .sft import neftune_noise, sft_loss
from .value import explained_variance, gae, value_loss, value_objective

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "BASELINES",
    "CLIPS",
    "CREDITS",
    "SAMPLER_CORRECTIONS",
    "SAMPLES",
    "KL_CORRECTIONS",
    "KL_ESTIMATORS",
    "PRESETS",
    "RATIOS",
    "SCALES",
    "Rewards",
    "Tokens",
    "check",
    "clipped_tokens",
    "compute_advantages",
    "compute_weights",
    "credit",
    "decoupled_advantages",
    "explained_variance",
    "find_objective",
    "gae",
    "group_advantages",
    "has_gradient",
    "has_group_baseline",
    "kl_estimate",
    "kl_loss",
    "loss_weights",
    "neftune_noise",
    "on_tokens",
    "overlong_filter",
    "penalises_kl",
    "policy_loss",
    "policy_objective",
    "preference_advantages",
    "preferences",
    "process_advantages",
    "response_mask",
    "sampler_correction",
    "select_samples",
    "sft_loss",
    "to_go",
    "token_baseline_advantages",
    "token_rewards",
    "top_covariance",
    "top_entropy",
    "updates_once",
    "value_loss",
    "value_objective",
    "whiten",
]
