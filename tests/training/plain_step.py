"""A policy step written plainly, to hold the real one against: loops over episodes and tokens,
in float64.

The formulas are those of the papers that nanomath/algorithms cites, one token at a time.
Nothing of nanomath.algorithms or of the policy step is used here, but for the choice of the
episodes that make up a minibatch, which is handed in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nanomath.data.problem import Problem
from nanomath.rollout import Completion, Episode
from nanomath.settings import Algorithm
from nanomath.training.critic import Critic
from nanomath.training.policy_step import PolicyStep

GROUPS, SIZE = 3, 4
ACCURACY = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
FORM = [
    1.0,
    0.5,
    -0.5,
    0.0,
    0.25,
    0.25,
    0.25,
    0.25,
    0.0,
    1.0,
    0.75,
    0.5,
]  # the second group is flat
WEIGHTS = {"accuracy": 1.0, "form": 0.5}
CUT_OFF = (3, 8)  # of the episodes, those that did not end by themselves
EOS = 0  # make_batch pads with 0 as well
Place = tuple[int, int]  # episode, token


def new_episodes(
    model: nn.Module, temperature: float = 1.0, noise: float = 0.0
) -> list[Episode]:
    """Random completions of one to five tokens; the sampler's logprobs are the model's plus
    noise, those of the truncated distribution a little above.
    """
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for i in range(GROUPS * SIZE):
        prompt, ended = [3 + i // SIZE] * (1 + i // SIZE), i not in CUT_OFF
        tokens = [
            *torch.randint(1, 300, (i % 5,), generator=generator).tolist(),
            EOS if ended else 7,
        ]
        with torch.no_grad():
            logprobs, _ = token_logprobs(
                model, token_states(model, prompt, tokens), tokens, temperature
            )
        logprobs += noise * torch.randn(len(tokens), generator=generator)
        drawn_from = (
            logprobs + noise * torch.rand(len(tokens), generator=generator)
        ).tolist()
        completion = Completion(
            i // SIZE,
            i % SIZE,
            tokens,
            logprobs.tolist(),
            drawn_from,
            "",
            "eos" if ended else "length",
        )
        rewards = {"accuracy": ACCURACY[i], "form": FORM[i]}
        rewards["total"] = sum(WEIGHTS[name] * value for name, value in rewards.items())
        episodes.append(
            Episode(Problem(f"p{i // SIZE}", "q", "a"), prompt, completion, rewards)
        )
    return episodes


def new_step(
    policy, reference, optimizer, group_size: int = SIZE, **options
) -> PolicyStep:
    """A policy step; options of the algorithm and of the step are told apart by name. Without
    a KL unless asked for.
    """
    keys = {f.name for f in dataclasses.fields(Algorithm)}
    algorithm = Algorithm(
        **{"kl_coef": 0.0}
        | {name: value for name, value in options.items() if name in keys}
    )
    rest = {name: value for name, value in options.items() if name not in keys}
    return PolicyStep(policy, reference, optimizer, group_size, algorithm, **rest)


def new_critic(policy: nn.Module, own_trunk: bool) -> Critic:
    """A value model of the policy's own precision that has learned something already: its head
    is not zero.
    """
    critic = Critic(policy, own_trunk).to(policy.dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in critic.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for parameter in critic.trunk.parameters() if own_trunk else ():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return critic


class Descent:
    """w <- w - lr g, and the gradients g on the way; its metrics are no more than how many
    there were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def step(self, lr: float) -> dict[str, float]:
        found = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in self.model.named_parameters()
        }
        self.gradients.append(found)
        for name, parameter in self.model.named_parameters():
            parameter -= lr * found[name]
            parameter.grad = None
        return {
            "grad_norm": float(len(self.gradients)),
            "update_ratio": 10.0 * len(self.gradients),
        }


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    """Equal up to `tolerance` times the largest gradient of all, which must not be zero."""
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0 and found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def without_zeros(gradients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Minibatches that teach nothing may be skipped or not."""
    return [
        found
        for found in gradients
        if any(gradient.any() for gradient in found.values())
    ]


def token_states(model: nn.Module, prompt: list[int], tokens: list[int]) -> Tensor:
    """The states [T, D] that predict the tokens of one completion."""
    return model.hidden(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]


def token_logprobs(
    model: nn.Module, states: Tensor, tokens: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies [T] of one completion, from the full logits."""
    logprobs = (model.logits(states) / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(tokens)), torch.tensor(tokens)], -(
        logprobs.exp() * logprobs
    ).sum(-1).detach()


@dataclass
class Facts:
    """One episode: what stood before the first update, what was made of it, and what the last
    pass showed.
    """

    episode: Episode
    counted: bool
    policy: list[float]
    entropy: list[float]
    reference: list[float]
    old: list[float]
    values: list[float]
    teacher: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    clipped: list[int] = field(default_factory=list)  # -1 low, 1 high

    @property
    def tokens(self) -> range:
        return range(self.episode.completion.length)


@dataclass
class PlainStep:
    """`step(episodes, minibatches, lr)`: the gradients of every update, and the metrics."""

    policy: nn.Module
    reference: nn.Module
    algorithm: Algorithm
    temperature: float = 1.0
    max_length: int = 0
    critic: Critic | None = None
    critic_rate: float = 1.0
    teacher: nn.Module | None = None

    def step(
        self, episodes: list[Episode], minibatches: list[list[int]], lr: float
    ) -> dict[str, float]:
        self.facts = [self._facts(episode) for episode in episodes]
        self._select()
        self._set_advantages()
        self.gradients: list[dict[str, Tensor]] = []
        self.critic_gradients: list[dict[str, Tensor]] = []
        losses, gap = [], {}
        for chosen in minibatches:
            loss = self._loss(chosen)
            losses.append(loss.item())
            gap = gap or self._gap(chosen)
            self._descend(loss, lr)
        return {"loss": mean(losses), **self._metrics(), **gap}

    def _descend(self, loss: Tensor, lr: float) -> None:
        parts = [(self.policy, self.gradients, lr)]
        if self.critic:
            parts.append((self.critic, self.critic_gradients, lr * self.critic_rate))
        wanted = [p for model, _, _ in parts for p in model.parameters()]
        slopes = iter(
            torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        )
        for model, kept, rate in parts:
            kept.append({name: next(slopes) for name, _ in model.named_parameters()})
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter -= rate * kept[-1][name]

    # What the rollout was.

    def _facts(self, episode: Episode) -> Facts:
        a, c = self.algorithm, episode.completion
        with torch.no_grad():
            policy, entropy, values = self._pass(episode)
            states = token_states(self.reference, episode.prompt, c.tokens)
            reference, _ = token_logprobs(
                self.reference, states, c.tokens, self.temperature
            )
        old = policy.tolist() if a.old_logprobs == "trainer" else c.logprobs
        teacher = []
        if self.teacher:
            with torch.no_grad():
                states = token_states(self.teacher, episode.prompt, c.tokens)
                teacher, _ = token_logprobs(
                    self.teacher, states, c.tokens, self.temperature
                )
                teacher = teacher.tolist()
        counted = c.finish_reason != "length" or not a.overlong_filter
        return Facts(
            episode,
            counted,
            policy.tolist(),
            entropy.tolist(),
            reference.tolist(),
            old,
            values.tolist(),
            teacher,
        )

    def _select(self) -> None:
        """Leave the loss to the right ones, the best one or a pair of each group."""
        how = self.algorithm.samples
        self.pairs = []
        for start in range(0, len(self.facts) * (how != "all"), SIZE):
            group = [f for f in self.facts[start : start + SIZE] if f.counted]
            right = [f for f in group if f.episode.rewards["accuracy"]]
            wrong = [f for f in group if f not in right]
            chosen = right
            if how == "best":
                chosen = [max(group, key=lambda f: f.episode.rewards["total"])]
            if how == "pair":
                chosen = [right[0], wrong[0]] if right and wrong else []
                self.pairs += [chosen] if chosen else []
            for f in self.facts[start : start + SIZE]:
                f.counted = f in chosen

    def _pass(self, episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's logprobs and entropies, and the values (0 without a value model), [T]
        each.
        """
        prompt, tokens = episode.prompt, episode.completion.tokens
        states = token_states(self.policy, prompt, tokens)
        values = torch.zeros(len(tokens))
        if self.critic:
            trunk = self.critic.trunk
            values = self.critic.head(
                states if trunk is None else token_states(trunk, prompt, tokens)
            )[:, 0]
        return *token_logprobs(self.policy, states, tokens, self.temperature), values

    def _set_advantages(self) -> None:
        a = self.algorithm
        if a.advantage != "reward":
            for f in self.facts:
                f.advantages = self._without_rewards(f)
        elif a.baseline in ("off", "value"):
            for f in self.facts:
                f.advantages, f.returns = self._gae(f)
        elif a.components == "apart":
            parts = {
                name: self._compare([f.episode.rewards[name] for f in self.facts])
                for name in WEIGHTS
            }
            for i, f in enumerate(self.facts):
                f.advantages = [
                    sum(WEIGHTS[name] * part[i] for name, part in parts.items())
                ] * len(f.tokens)
        else:
            for f, value in zip(
                self.facts,
                self._compare([sum(self._rewards(f)) for f in self.facts]),
                strict=True,
            ):
                f.advantages = [value] * len(f.tokens)
        if a.whiten:
            self._whiten()

    def _without_rewards(self, f: Facts) -> list[float]:
        a = self.algorithm
        if a.advantage == "teacher":
            return [t - old for t, old in zip(f.teacher, f.old, strict=True)]
        if a.advantage == "preference":
            for pair in self.pairs:
                if f in pair:
                    sign = 1 if f is pair[0] else -1
                    weight = 1 / (1 + math.exp(self._margin(pair)))
                    return [2 * sign * a.preference_beta * weight] * len(f.tokens)
        return [float(a.advantage == "one")] * len(f.tokens)

    def _margin(self, pair: list[Facts]) -> float:
        """beta times log pi / pi_ref of the right one less that of the wrong one."""
        one, other = (math.fsum(f.old) - math.fsum(f.reference) for f in pair)
        return self.algorithm.preference_beta * (one - other)

    def _rewards(self, f: Facts) -> list[float]:
        """-beta (log pi_old - log pi_ref) at every token, and the reward at the last."""
        a, rewards = self.algorithm, [0.0] * len(f.tokens)
        if a.kl_in == "reward":
            rewards = [
                -a.kl_coef * (old - ref)
                for old, ref in zip(f.old, f.reference, strict=True)
            ]
        rewards[-1] += f.episode.rewards["total"]
        return rewards

    def _gae(self, f: Facts) -> tuple[list[float], list[float]]:
        """A_t = sum_k (gamma lambda)^k delta_{t+k}; without a value model the rewards to go."""
        a, rewards = self.algorithm, self._rewards(f)
        values, lam = [*f.values, 0.0], a.lam if self.critic else 1.0
        deltas = [rewards[t] + a.gamma * values[t + 1] - values[t] for t in f.tokens]
        advantages = [
            sum((a.gamma * lam) ** (k - t) * deltas[k] for k in f.tokens[t:])
            for t in f.tokens
        ]
        return advantages, [
            advantage + values[t] for t, advantage in enumerate(advantages)
        ]

    def _compare(self, rewards: list[float]) -> list[float]:
        """Each reward against its group's."""
        a, result = self.algorithm, []
        for start in range(0, len(rewards), SIZE):
            group = rewards[start : start + SIZE]
            scale = {
                "group": lambda g=group: std(g) + 1e-4,
                "batch": lambda: std(rewards) + 1e-4,
                "off": lambda: 1.0,
            }
            for i, reward in enumerate(group):
                others = group if a.baseline == "group" else group[:i] + group[i + 1 :]
                result.append(
                    0.0
                    if len(set(group)) == 1
                    else (reward - mean(others)) / scale[a.scale]()
                )
        return result

    def _whiten(self) -> None:
        every = [
            advantage for f in self.facts if f.counted for advantage in f.advantages
        ]
        for f in self.facts:
            f.advantages = [
                (x - mean(every)) / (std(every) + 1e-8) if f.counted else 0.0
                for x in f.advantages
            ]

    # The loss of one update.

    def _loss(self, chosen: list[int]) -> Tensor:
        a = self.algorithm
        places = [
            (i, t)
            for i in chosen
            if self.facts[i].counted
            for t in self.facts[i].tokens
        ]
        unsure = top(
            {(i, t): self.facts[i].entropy[t] for i, t in places}, a.top_entropy
        )
        steep = self._steep(places) if a.covariance != "off" else set()
        total = torch.zeros((), dtype=torch.float64)
        for i in chosen:
            f = self.facts[i]
            new, entropies, values = self._pass(f.episode)
            f.logprobs, f.entropies, f.clipped = (
                new.tolist(),
                entropies.tolist(),
                [0] * len(f.tokens),
            )
            completions = len({i for i, _ in places})
            for t in f.tokens if f.counted else ():
                share = self._share(
                    len(f.tokens), len(places), len(chosen), completions
                )
                on = (i, t) in unsure and not (
                    a.covariance == "clip" and (i, t) in steep
                )
                on = on * self._correction(f, t)
                total = total + share * (
                    self._rest(f, t, new[t], values[t]) - on * self._gain(f, t, new)
                )
                if a.advantage == "teacher_full":
                    total = total + share * self._distance(f, t)
                if not on:
                    f.clipped[t] = 0
                if a.covariance == "kl" and (i, t) in steep:
                    total = (
                        total + share * a.covariance_coef * (new[t] - f.old[t]).abs()
                    )
        return total

    def _share(
        self, length: int, tokens: int, episodes: int, completions: int
    ) -> float:
        how = self.algorithm.aggregation
        return (
            1
            / {
                "token": tokens,
                "sequence": episodes * length,
                "constant": episodes * self.max_length,
                "sum": completions,
            }[how]
        )

    def _steep(self, places: list[Place]) -> set[Place]:
        """Where advantage and logprob vary together the most."""
        advantage = mean([self.facts[i].advantages[t] for i, t in places])
        logprob = mean([self.facts[i].old[t] for i, t in places])
        covariance = {
            (i, t): (self.facts[i].advantages[t] - advantage)
            * (self.facts[i].old[t] - logprob)
            for i, t in places
        }
        return {
            place
            for place in top(covariance, self.algorithm.covariance_share)
            if covariance[place] > 0
        }

    def _correction(self, f: Facts, t: int) -> float:
        """pi_trainer / pi_sampler before the first update."""
        a, weight = (
            self.algorithm,
            math.exp(f.policy[t] - f.episode.completion.sampling_logprobs[t]),
        )
        if a.sampler_correction == "truncate":
            return min(weight, a.correction_high)
        if a.sampler_correction == "mask":
            return weight if a.correction_low <= weight <= a.correction_high else 0.0
        return 1.0

    def _gain(self, f: Facts, t: int, new: Tensor) -> Tensor:
        """What token t adds to the surrogate objective; notes whether it is clipped."""
        a, advantage = self.algorithm, f.advantages[t]
        old = (
            new.detach()
            if a.ratio == "off"
            else torch.tensor(f.old, dtype=torch.float64)
        )
        ratio = (
            (new - old).mean().exp()
            if a.ratio == "sequence"
            else (new[t] - old[t]).exp()
        )
        f.clipped[t] = int(advantage > 0 and ratio > 1 + a.clip_high) - int(
            advantage < 0 and ratio < 1 - a.clip_low
        )
        bounded = ratio.clamp(1 - a.clip_low, 1 + a.clip_high)
        if a.clip == "off":
            return ratio * advantage
        if a.clip == "cispo":
            return bounded.item() * advantage * new[t]
        gain = min(ratio * advantage, bounded * advantage)
        if a.clip == "dual" and advantage < 0:
            gain = max(gain, torch.tensor(a.dual_clip * advantage, dtype=torch.float64))
        return gain

    def _distance(self, f: Facts, t: int) -> Tensor:
        """sum_v pi(v) (log pi(v) - log pi_T(v)) where token t is drawn."""
        prompt, tokens = f.episode.prompt, f.episode.completion.tokens
        ours, theirs = (
            (model.logits(token_states(model, prompt, tokens)[t]) / self.temperature)
            for model in (self.policy, self.teacher)
        )
        p = ours.softmax(-1)
        return (p * (p.log() - theirs.detach().softmax(-1).log())).sum()

    def _rest(self, f: Facts, t: int, new: Tensor, value: Tensor) -> Tensor:
        """The KL and the value loss of token t."""
        a, x = self.algorithm, new - f.reference[t]
        total = torch.zeros((), dtype=torch.float64)
        if a.kl_in == "loss" and a.kl_coef:
            k2, k3 = x * x / 2, (-x).exp() - 1 + x
            kl = {"k1": x, "k2": k2, "k3": k3, "k3+": k2 + (k3 - k2).detach()}[
                a.kl_estimator
            ]
            ratio = (new - f.old[t]).exp()
            total = (
                total
                + a.kl_coef
                * kl
                * {"off": 1.0, "weight": ratio.detach(), "ratio": ratio}[
                    a.kl_correction
                ]
            )
        if self.critic:
            near = f.values[t] + (value - f.values[t]).clamp(
                -a.value_clip, a.value_clip
            )
            total = (
                total
                + a.value_coef
                * max((value - f.returns[t]) ** 2, (near - f.returns[t]) ** 2)
                / 2
            )
        return total

    # Metrics.

    def _metrics(self) -> dict[str, float]:
        facts = self.facts
        x = [a - b for f in facts for a, b in zip(f.logprobs, f.reference, strict=True)]
        entropies = {
            (i, t): f.entropies[t] for i, f in enumerate(facts) for t in f.tokens
        }
        clipped = [c for f in facts for c in f.clipped]
        metrics = {
            "kl_k1": mean(x),
            "kl": mean([math.exp(-v) - 1 + v for v in x]),
            "entropy": mean(entropies.values()),
            "entropy_top": mean([entropies[place] for place in top(entropies, 0.2)]),
            "clipped_low": mean([c == -1 for c in clipped]),
            "clipped_high": mean([c == 1 for c in clipped]),
        }
        if self.algorithm.samples != "all":
            metrics["taught"] = mean([f.counted for f in facts])
            metrics["nll"] = -mean(p for f in facts if f.counted for p in f.logprobs)
        if self.algorithm.advantage == "preference":
            margins = [self._margin(pair) for pair in self.pairs]
            metrics["pairs"] = len(margins) / GROUPS
            metrics["preference/loss"] = mean(
                [math.log1p(math.exp(-m)) for m in margins]
            )
            metrics["preference/margin"] = mean(margins)
            metrics["preference/accuracy"] = mean([m > 0 for m in margins])
        if self.teacher:
            gaps = [o - t for f in facts for o, t in zip(f.old, f.teacher, strict=True)]
            metrics |= {"teacher_kl": mean(gaps), "demonstrated": 0.0}
        if self.critic:
            returns = [r for f in facts for r in f.returns]
            errors = [
                r - v for f in facts for r, v in zip(f.returns, f.values, strict=True)
            ]
            metrics["explained_variance"] = 1 - std(errors) ** 2 / std(returns) ** 2
        return metrics

    def _gap(self, chosen: list[int]) -> dict[str, float]:
        """Trainer against sampler in the first pass."""
        completions = [
            (self.facts[i].logprobs, self.facts[i].episode.completion) for i in chosen
        ]
        gaps = [
            abs(a - b)
            for mine, c in completions
            for a, b in zip(mine, c.logprobs, strict=True)
        ]
        w = [
            math.exp(a - b)
            for mine, c in completions
            for a, b in zip(mine, c.sampling_logprobs, strict=True)
        ]
        size = sum(w) ** 2 / len(w) / sum(v * v for v in w)
        return {"gap_mean": mean(gaps), "gap_max": max(gaps), "effective_samples": size}


def top(values: dict[Place, float], share: float) -> set[Place]:
    """The round(share n) places of the highest values, at least one, and what equals the last
    of them.
    """
    last = sorted(values.values(), reverse=True)[max(1, round(share * len(values))) - 1]
    return {
        place
        for place, value in values.items()
        if value >= last - 1e-5 * max(map(abs, values.values()))
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def std(values: list[float]) -> float:
    """With n - 1 in the denominator."""
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))
