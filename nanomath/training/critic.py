"""The value model of PPO: how much reward is still to come, before each response token.

    V_t = w . h_t + b,   h_t the state that predicts token t

h_t comes from the policy itself ("shared": the value loss then also moves the policy's layers)
or from a copy of the model it started from ("own"). The head starts at zero, so that the first
advantages are the rewards themselves.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nanomath import settings
from nanomath.models.batches import Batch, response_states
from nanomath.models.transformer import Transformer
from nanomath.training.sharding import shard
from nanomath.training.trainer import Trainer


class Critic(nn.Module):
    """Computes values [S, R] of a batch's response tokens.

    `trunk` is the model that gives the states, None where the policy's states are used.
    """

    def __init__(self, model: Transformer, own_trunk: bool) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(model).requires_grad_(True) if own_trunk else None
        if self.trunk:  # it predicts no token
            del self.trunk.lm_head
        self.head = nn.Linear(
            model.config.hidden_size, 1, device=model.device, dtype=torch.float32
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, model: Transformer, batch: Batch, states: Tensor | None = None
    ) -> Tensor:
        """Return values, float32 [S, R], zero where there is no token.

        `states` [n, D] are the policy's, where they are known already: that saves a pass.
        """
        if self.trunk or states is None:
            states = response_states(self.trunk or model, batch)
        return batch.matrix(self.head(states.to(self.head.weight.dtype))[:, 0])


def build_critic(
    config: settings.GRPOConfig, trainer: Trainer, start: Transformer
) -> Critic | None:
    """Make the value model of baseline "value", which begins as the starting model, or none."""
    if config.algorithm.baseline != "value":
        return None
    critic = Critic(start, config.algorithm.value_trunk == "own").to(trainer.device)
    if config.model.sharded and critic.trunk:
        shard(critic.trunk, start.dtype)
    return critic
