"""How a token is drawn, token by token in plain Python: what the kernels' choices are compared
with.
"""

from __future__ import annotations

from kernels.lm_head import BLOCK


def token_at(weights: list[float], u: list[float]) -> tuple[int, bool]:
    """The token at u, by walking the blocks and then the tokens of one; and whether rounding
    could decide otherwise.
    """
    block, close = _walk(
        [sum(weights[i : i + BLOCK]) for i in range(0, len(weights), BLOCK)], u[0]
    )
    inside, close_too = _walk(weights[block * BLOCK : (block + 1) * BLOCK], u[1])
    return block * BLOCK + inside, close or close_too


def _walk(weights: list[float], u: float) -> tuple[int, bool]:
    level, running, close = u * sum(weights), 0.0, False
    for place, weight in enumerate(weights):
        running += weight
        close |= abs(running - level) < 1e-5 * sum(weights)
        if running > level:
            return place, close
    return len(weights) - 1, True
