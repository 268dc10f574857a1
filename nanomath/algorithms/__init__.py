"""The algorithms: pure functions on tensors, each with its equation and its source.

Nothing here knows of models, text or files. Rows are sequences, columns are response tokens: B sequences (N prompts
times G samples), T tokens. A loss is always  sum(weights * per-token loss)  with weights from `loss_weights`.
"""

from .advantages import group_advantages, process_advantages
from .aggregation import loss_weights, response_mask
from .kl import kl_estimate
from .policy import policy_loss
from .sft import neftune_noise, sft_loss
from .value import gae

__all__ = [
    "gae",
    "group_advantages",
    "kl_estimate",
    "loss_weights",
    "neftune_noise",
    "policy_loss",
    "process_advantages",
    "response_mask",
    "sft_loss",
]
