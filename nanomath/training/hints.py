"""Groups whose problems may come with a hint: difficulty is estimated, a level chosen, the group
sampled (again, where the ladder says so), and all of it learnt from.

The rules are in nanomath/rollout/hints.py, the estimate in nanomath/rollout/difficulty.py. How
much a right sample y depends on its hint h is measured as its reliance,

    1/T [ log pi(y | q, h) - log pi(y | q) ]                 the hint ends the user's turn
    1/T [ log pi(y | q, h) - log pi(h, y | q) ]              it begins the assistant's

per token of what stands on the left of the bar (HiLL, 2026): high where the policy would not have
found the way by itself. Held-out problems are measured elsewhere and never have a hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nanomath import settings
from nanomath.data.order import generator_of
from nanomath.data.problem import Problem
from nanomath.data.prompts import PromptTemplate, render_response
from nanomath.models.batches import Example
from nanomath.models.scores import response_scores
from nanomath.process.states import states_at
from nanomath.process.steps import split_text
from nanomath.rollout import Episode, Sampler, Scorer, sample_episodes
from nanomath.rollout.difficulty import Difficulty
from nanomath.rollout.episodes import Groups
from nanomath.rollout.groups import is_uneven
from nanomath.rollout.hints import (
    Chooser,
    Controller,
    Hint,
    Ladder,
    Learned,
    Schedule,
    beginning,
    upper_reward,
)
from nanomath.rollout.known import encode_response
from nanomath.rollout.sampler import Progress
from nanomath.training import ranks
from nanomath.training.build import encode_prompt
from nanomath.training.sharding import whole
from nanomath.training.trainer import Trainer

LEVELS = {  # those of the papers; the upper policy may also give no hint
    "ladder": [0.25, 0.5, 0.75],
    "schedule": [0.5, 0.25, 0.0],
    "learned": [0.0, 0.25, 0.5, 0.75],
}
RETRY = 28  # further tries have seeds that are this many bits away: no step has such a number
# Of the estimate, in the log.
BINS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


@dataclass
class Try:
    """A group as it was sampled once. `estimate` is the pass rate predicted without a hint,
    `predicted` are those with it (see `Difficulty.predict`), `chosen` whether the level was
    the chooser's.
    """

    problem: int
    state: Tensor
    estimate: float
    predicted: Tensor
    level: float
    chosen: bool
    group: list[Episode]
    first: bool = True
    replaced: bool = False

    @property
    def told(self) -> float:
        """The level, 0 where the solution is too short for a hint."""
        return self.level if self.group[0].hint else 0.0

    @property
    def right(self) -> list[Episode]:
        return [episode for episode in self.group if episode.rewards["accuracy"]]

    @property
    def rate(self) -> float:
        return len(self.right) / len(self.group)


@dataclass
class Hints:
    """`hints.episodes` samples groups in the place of `sample_episodes`; `hints.learn`
    ends a step. step, steps: updates done, and those of the whole run.
    """

    section: settings.Hints
    trainer: Trainer
    sampler: Sampler
    template: PromptTemplate
    problems: Sequence[Problem]
    split: str
    chooser: Chooser
    difficulty: Difficulty
    step: int
    steps: int

    def __post_init__(self) -> None:
        self.places = {problem.id: i for i, problem in enumerate(self.problems)}
        self.tries: list[Try] = []
        self.given: dict[tuple[int, ...], Hint] = {}

    @property
    def token_budget(self) -> int:
        """Of passes without a gradient: the number that the planner makes of "auto"."""
        return self.trainer.config.grpo.token_budget

    def longest(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return the prompts of all problems with their longest hints.

        ValueError for a problem without a solution, for one whose hint leaves no room in the
        model's context, and where no solution has two steps.
        """
        most = self.chooser.most
        context = self.trainer.model.config.max_positions
        longest = []
        for problem, prompt in zip(self.problems, prompts, strict=True):
            hint = self.hint(problem, prompt, most)
            longest.append(self.prompt(problem, hint) if hint else prompt)
            if (size := len(longest[-1])) >= context:
                raise ValueError(
                    f"problem {problem.id!r} with a hint of level {most:g} has a prompt of {size} "
                    f"tokens: the model's context holds {context}; lower the levels of [hints], "
                    "or leave the problem out"
                )
        if most and longest == list(prompts):
            raise ValueError(
                f"hints.chooser = {self.section.chooser!r}, but no problem has a solution of two "
                f"steps (process.steps = {self.split!r}) that could be begun"
            )
        return longest

    def hint(self, problem: Problem, bare: list[int], level: float) -> Hint | None:
        """Return the hint of that level, None where it is empty. ValueError for a problem
        without a solution.
        """
        if not level:
            return None
        if not problem.solution:
            raise ValueError(
                f"hints.chooser = {self.section.chooser!r}, but problem {problem.id!r} has no "
                "solution to take a hint from"
            )
        response = render_response(problem, self.template)
        ends = [end for _, end in split_text(response, self.split)]
        text = beginning(response, ends, level)
        if not text:
            return None
        assistant = self.section.place == "assistant"
        return Hint(
            level,
            text,
            bare,
            encode_response(self.trainer.tokenizer, text) if assistant else [],
        )

    def prompt(self, problem: Problem, hint: Hint) -> list[int]:
        """Return the tokens of the prompt with the hint."""
        if hint.prefix:
            return hint.bare + hint.prefix
        told = self.section.template.replace("{hint}", hint.text.rstrip())
        asked = replace(problem, question=problem.question + told)
        return encode_prompt(asked, self.template, self.trainer.tokenizer)

    def episodes(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        scorers: Sequence[Scorer],
        group_size: int,
        seed: int,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> list[list[Episode]]:
        """Choose the levels, and sample and score a group for each problem."""
        options = {"scorers": scorers, "group_size": group_size, **sampling}
        places = torch.tensor([self.places[problem.id] for problem in problems])
        states = self.states(prompts)
        estimates = self.difficulty.predict(
            places, states, torch.zeros(len(places)).double()
        )[0]
        chosen = (estimates < self.section.below) & (self.step >= self.section.start)
        drawn = generator_of(seed, 1)  # what is drawn is a function of the seed
        levels = self.chooser.choose(places, estimates, self.progress, drawn) * chosen

        def sample(
            which: Sequence[int], levels: Tensor, seed: int, **shown: Any
        ) -> list[Try]:
            asked = [(problems[i], prompts[i]) for i in which]
            groups = self.groups(asked, levels.tolist(), seed=seed, **options, **shown)
            told = levels * torch.tensor([bool(group[0].hint) for group in groups])
            predicted = self.difficulty.predict(places[which], states[which], told)
            return [
                Try(
                    int(places[i]),
                    states[i],
                    float(estimates[i]),
                    predicted[:, row],
                    float(levels[row]),
                    bool(chosen[i]),
                    groups[row],
                )
                for row, i in enumerate(which)
            ]

        tries = sample(range(len(problems)), levels, seed, progress=progress)
        for number, level in enumerate(self.chooser.again, start=1):
            hard = [i for i, one in enumerate(tries) if one.chosen and not one.right]
            if not hard:
                break
            self.tries += [replace(tries[i], replaced=True) for i in hard]
            again = torch.full((len(hard),), level, dtype=torch.float64)
            for i, one in zip(
                hard, sample(hard, again, seed + (number << RETRY)), strict=True
            ):
                tries[i] = replace(one, first=False)
        self.tries += tries
        return [one.group for one in tries]

    @property
    def progress(self) -> float:
        return self.step / self.steps

    def groups(
        self,
        asked: Sequence[tuple[Problem, list[int]]],
        levels: Sequence[float],
        scorers: Sequence[Scorer],
        **sampling: Any,
    ) -> list[list[Episode]]:
        """Sample and score groups at these levels. The hint is put into the episodes by a
        first scorer, so that the ranks need to be told nothing else.
        """
        prompts = []
        self.given = {}
        for (problem, prompt), level in zip(asked, levels, strict=True):
            if hint := self.hint(problem, prompt, level):
                prompt = self.prompt(problem, hint)
                self.given[tuple(prompt)] = hint
            prompts.append(prompt)
        problems = [problem for problem, _ in asked]
        scorers = [self.attach, *scorers]
        return sample_episodes(self.sampler, problems, prompts, scorers, **sampling)

    def attach(self, groups: Groups) -> None:
        """Tell episodes their hints; scored without it, their prompt is the one without it."""
        for group in groups:
            for episode in group:
                episode.hint = self.given.get(tuple(episode.prompt))
                if episode.hint and self.section.score == "bare":
                    episode.prompt = episode.hint.bare

    @torch.no_grad()
    def states(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return the policy's last states [n, D] of the prompts, the same on all ranks."""
        model = self.trainer.model
        found = torch.zeros(len(prompts), model.config.hidden_size, dtype=torch.float64)
        examples = [Example(prompt, []) for prompt in prompts]
        last = [[len(prompt) - 1] for prompt in prompts]
        with whole(model):
            for rows, states in states_at(model, examples, last, self.token_budget):
                found[rows] = states.double().cpu()
        return ranks.from_main(found)

    def reliance(self, episodes: Sequence[Episode]) -> list[float]:
        """Return the reliance of each episode that has a hint, under the present weights."""
        mine = ranks.share(episodes)
        model = self.trainer.model
        examples = [
            Example(e.hint.bare, e.hint.prefix + e.completion.tokens) for e in mine
        ]
        temperature = self.trainer.config.sampling.temperature
        with whole(model):
            bare, _ = response_scores(model, examples, self.token_budget, temperature)
        found = []
        for e, example, logprobs in zip(mine, examples, bare.double(), strict=True):
            gap = sum(e.completion.logprobs) - float(logprobs.sum())
            found.append(gap / len(example.response))
        return ranks.gather(found)

    def learn(self) -> tuple[dict[str, float], list[list[Episode]]]:
        """Learn from the groups since the last call, and go on to the next step. Returns
        metrics, and the groups that were sampled again and so are not trained on.

        It must come before the update: reliance is that of the policy that sampled.
        """
        tries = self.tries
        first = [one for one in tries if one.first]
        final = [one for one in tries if not one.replaced]
        hinted = [e for one in final for e in one.right if e.hint]
        reliance = dict(zip(map(id, hinted), self.reliance(hinted), strict=True))
        rates = column(one.rate for one in first)
        metrics = self.difficulty.calibrate(
            torch.stack([one.predicted for one in first], dim=1), rates
        )
        self.difficulty.learn(
            torch.tensor([one.problem for one in tries]),
            torch.stack([one.state for one in tries]),
            column(one.told for one in tries),
            column(len(one.right) for one in tries),
            len(tries[0].group),
        )
        if chosen := [one for one in first if one.chosen]:
            relied = [[reliance.get(id(e), 0.0) for e in one.right] for one in chosen]
            rates = column(one.rate for one in chosen)
            rewards = upper_reward(
                rates,
                column(fmean(values) if values else 0.0 for values in relied),
                self.section.transfer,
            )
            metrics |= self.chooser.learn(
                torch.tensor([one.problem for one in chosen]),
                column(one.estimate for one in chosen),
                column(one.level for one in chosen),
                rates,
                rewards,
                self.progress,
            )
        if hinted:
            metrics["hints/reliance"] = fmean(reliance.values())
        self.tries = []
        self.step += 1
        again = [one.group for one in tries if one.replaced]
        return {**metrics, **hint_metrics(final), "hints/again": len(again)}, again

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: all that was learnt."""
        of = {"difficulty": self.difficulty.tensors, "chooser": self.chooser.tensors}
        return {
            f"{part}.{name}": t
            for part, tensors in of.items()
            for name, t in tensors.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `state()`. ValueError where it is that of other hints or problems."""
        for name, tensor in self.state().items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape:
                shape = "missing" if found is None else f"of shape {list(found.shape)}"
                raise ValueError(
                    f"the checkpoint's state of [hints] is of another run: {name} is {shape}, "
                    f"expected {list(tensor.shape)}"
                )
            tensor.copy_(found)


def hint_metrics(tries: Sequence[Try]) -> dict[str, float]:
    """Return of the groups that are trained on: the share with a hint and the mean level, in
    all and by the estimated pass rate; the estimate; the share without spread.
    """
    found = {
        "hints/estimate": fmean(one.estimate for one in tries),
        "hints/flat_groups": fmean(not is_uneven(one.group) for one in tries),
    }
    parts = {"": tries}
    for low, high in BINS:
        parts[f"/{low:g}-{high:g}"] = [
            one
            for one in tries
            if low <= one.estimate and (one.estimate < high or high == 1)
        ]
    for name, part in parts.items():
        if part:
            found[f"hints/rate{name}"] = fmean(one.told > 0 for one in part)
            found[f"hints/level{name}"] = fmean(one.told for one in part)
    return found


def column(values: Any) -> Tensor:
    """Return numbers as float64 [n]."""
    return torch.tensor(list(values), dtype=torch.float64)


def build_hints(
    config: settings.GRPOConfig,
    trainer: Trainer,
    sampler: Sampler,
    template: PromptTemplate,
    problems: Sequence[Problem],
) -> Hints | None:
    """Make what gives hints on these problems, None where [hints] is off; checkpoints hold its
    state.
    """
    section = config.hints
    if section.chooser == "off":
        return None
    levels = section.levels or LEVELS.get(section.chooser, [])
    choosers = {
        "ladder": lambda: Ladder(levels),
        "schedule": lambda: Schedule(levels),
        "controller": lambda: Controller(len(problems), section.gain, section.most),
        "learned": lambda: Learned(levels, section.upper_rate),
    }
    width = trainer.model.config.hidden_size
    hints = Hints(
        section,
        trainer,
        sampler,
        template,
        problems,
        config.process.steps,
        choosers[section.chooser](),
        Difficulty(len(problems), width, section.strength, section.discount),
        trainer.start,
        config.run.steps,
    )
    return trainer.keep("hints", hints)
