"""How hard a problem is for the policy, said before it is tried.

    q(h) = sigmoid(w . x + b + c h)                        the head: any problem, hint level h
    m    = (right + s q(0)) / (right + wrong + s)          a Beta prior of mean q(0), strength s
    p(h) = sigmoid(logit m + c h)                          what is predicted

x is the policy's last state of the prompt, at unit length; right and wrong are what was
remembered of the problem's own samples without a hint. Everything remembered fades by the
discount g in each step, because the policy moves on: a count of k steps ago weighs g^k.

The head is a logistic regression that is trained online: each step w takes the maximum of

    sum_i [ r_i log q_i + (n_i - r_i) log (1 - q_i) ] - 1/2 (w - w0)' P (w - w0)

over the step's problems, r_i right of n_i samples, where w0 and the precision P are what
earlier steps left (Laplace's approximation, Spiegelhalter & Lauritzen 1990): P becomes
g P + (1 - g) RIDGE + sum_i n_i q_i (1 - q_i) x_i x_i'. There is no learning rate.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

RIDGE = 0.1  # precision of the head's weights before anything was seen
NEWTON = 20  # Newton's steps at most
BINS = 10  # of the calibration error


class Difficulty:
    """Predicts the pass rate of `problems` problems from states of width `width`.

    strength: how many samples the head's prediction is worth beside a problem's own.
    discount: what memory is multiplied by in each step. All it knows is in `tensors`.
    """

    def __init__(
        self, problems: int, width: int, strength: float = 2.0, discount: float = 0.95
    ) -> None:
        self.strength = strength
        self.discount = discount
        size = width + 2
        self.tensors = {
            "right": torch.zeros(problems, dtype=torch.float64),
            "wrong": torch.zeros(problems, dtype=torch.float64),
            "weights": torch.zeros(size, dtype=torch.float64),
            "precision": RIDGE * torch.eye(size, dtype=torch.float64),
            # Of p and of q: how many problems fell into each bin, their predictions, their rates.
            "bins": torch.zeros(2, BINS, 3, dtype=torch.float64),
        }

    def predict(self, problems: Tensor, states: Tensor, levels: Tensor) -> Tensor:
        """Return p and q [2, n] of the problems at places [n], given their states [n, D] and
        the levels [n] of their hints.
        """
        t = self.tensors
        logits = features(states, levels) @ t["weights"]
        helps = t["weights"][-1] * levels
        prior = self.strength * (logits - helps).sigmoid()
        right, wrong = t["right"][problems], t["wrong"][problems]
        mean = (right + prior) / (right + wrong + self.strength)
        return torch.stack([(mean.logit() + helps).sigmoid(), logits.sigmoid()])

    def learn(
        self,
        problems: Tensor,
        states: Tensor,
        levels: Tensor,
        right: Tensor,
        samples: int,
    ) -> None:
        """Take in how many of so many samples [n] of each problem were right."""
        t = self.tensors
        bare = levels == 0
        for name, counts in (("right", right), ("wrong", samples - right)):
            t[name].mul_(self.discount).index_add_(0, problems[bare], counts[bare])
        old = t["precision"].lerp(
            RIDGE * torch.eye(len(t["weights"])).double(), 1 - self.discount
        )
        x = features(states, levels)
        t["weights"], t["precision"] = posterior(t["weights"], old, x, right, samples)

    def calibrate(self, predictions: Tensor, rates: Tensor) -> dict[str, float]:
        """Compare predictions [2, n] with the pass rates [n] that followed.

        Returns for p and for q the Brier score, mean (prediction - outcome)^2 over samples, and
        the calibration error, mean |prediction - rate| over bins of the predictions, in which
        earlier steps count as well.
        """
        bins = self.tensors["bins"].mul_(self.discount)
        found = {}
        for p, kept, name in zip(predictions, bins, ("", "_head"), strict=True):
            rows = torch.stack([torch.ones_like(p), p, rates], dim=1)
            kept.index_add_(0, (BINS * p).long().clamp(max=BINS - 1), rows)
            gap = (kept[:, 1] - kept[:, 2]).abs().sum() / kept[:, 0].sum()
            brier = ((p - rates).square() + rates * (1 - rates)).mean()
            found |= {
                f"hints/brier{name}": float(brier),
                f"hints/ece{name}": float(gap),
            }
        return found


def features(states: Tensor, levels: Tensor) -> Tensor:
    """Return what the head sees [n, D + 2]: the states at unit length, 1, and the levels."""
    x = normalize(states.double(), dim=1)
    return torch.cat([x, torch.ones_like(levels)[:, None], levels[:, None]], dim=1)


def posterior(
    mean: Tensor, precision: Tensor, x: Tensor, right: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Return mean and precision of the weights after the observations, by Newton's method;
    steps that would make the objective larger are halved.
    """

    def objective(w: Tensor) -> Tensor:
        z = x @ w
        nll = (samples * softplus(z) - right * z).sum()
        return nll + (w - mean) @ precision @ (w - mean) / 2

    def curvature(w: Tensor) -> Tensor:
        q = (x @ w).sigmoid()
        return precision + (x.T * (samples * q * (1 - q))) @ x

    w = mean
    for _ in range(NEWTON):
        gradient = precision @ (w - mean) + x.T @ (samples * (x @ w).sigmoid() - right)
        step = torch.linalg.solve(curvature(w), gradient)
        here = objective(w)
        while objective(w - step) > here and step.abs().max() > 1e-9:
            step = step / 2
        w = w - step
        if step.abs().max() < 1e-9:
            break
    return w, curvature(w)
