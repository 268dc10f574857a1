"""AI feedback: a frozen language model judges solutions, by the probabilities of its next
token, without decoding.

    pointwise   s_i = (sum_k P(k) k - 1) / (K - 1),  k = 1 .. K     expected mark, arXiv 2309.00267
    pairwise    s_i = mean over j of 1/2 [P("A" | i, j) + P("B" | j, i)]    share of wins

P is over the possible answers alone. A judge likes what stands first, or what is long, and is
often wrong: so it ranks right answers only,

    total_i += weight * correct_i * (s_i - 1/2),

and every rollout reports whether it says the same in both orders, whether it knows right from
wrong, and how much its scores have to do with length. Q prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import correlation, fmean

import torch
from torch import Tensor

from nanomath.models.tokenizer import Tokenizer
from nanomath.models.transformer import Transformer
from nanomath.process.measures import auc
from nanomath.process.states import states_at, with_common_prompts
from nanomath.rollout.episodes import Groups

MARKS = ("1", "2", "3", "4", "5")
SIDES = ("A", "B")
POINTWISE = (
    "Here is a problem and a solution.\n\nProblem: {question}\n\nSolution: {first}\n\n"
    "How clear and well explained is the solution? Answer with a mark from 1 (worst) to 5 "
    "(best), and nothing else."
)
PAIRWISE = (
    "Here is a problem with two solutions.\n\nProblem: {question}\n\nSolution A: "
    "{first}\n\nSolution B: {second}\n\n"
    "Which solution is clearer and better explained? Answer with A or B, and nothing else."
)
# A judge whose possible answers have less of the probability does not answer the question.
LEAST_MASS = 0.01


@dataclass
class Judge:
    """A model with the questions that it is asked, templates with {question}, {first} and
    {second}. token_budget: tokens computed at once. masses: the probability of the
    possible answers, of all questions since they were last asked for. ValueError where the
    tokenizer cannot tell the answers apart.
    """

    model: Transformer
    tokenizer: Tokenizer
    pointwise: str = POINTWISE
    pairwise: str = PAIRWISE
    token_budget: int = 16384
    masses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for answers in (MARKS, SIDES):
            tokens = [token for answer in answers for token in self._tokens(answer)]
            if len(tokens) != len(set(tokens)):
                raise ValueError(
                    f"the judge's tokenizer has no tokens of their own for {', '.join(answers)}"
                )

    def _tokens(self, answer: str) -> set[int]:
        """With and without a space before it."""
        return {self.tokenizer.encode(text)[-1] for text in (answer, f" {answer}")}

    @torch.no_grad()
    def probabilities(
        self, prompts: Sequence[str], answers: Sequence[str], groups: Sequence[str]
    ) -> Tensor:
        """Return [Q, answers] of each answer after each prompt, among these; float64, on the
        CPU. What the prompts of a group begin with is computed once.
        """
        tokens = [self._encode(prompt) for prompt in prompts]
        ends = [[len(prompt) - 1] for prompt in tokens]
        columns = [sorted(self._tokens(answer)) for answer in answers]
        found = torch.zeros(len(prompts), len(answers), dtype=torch.float64)
        examples = with_common_prompts(tokens, ends, groups)
        for rows, states in states_at(self.model, examples, ends, self.token_budget):
            chances = self.model.logits(states).double().softmax(dim=1)
            mine = [chances[:, column].sum(dim=1) for column in columns]
            found[rows] = torch.stack(mine, dim=1).cpu()
        self.masses += found.sum(dim=1).tolist()
        return found / found.sum(dim=1, keepdim=True).clamp(min=1e-300)

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            tokens = self.tokenizer.encode(
                prompt + "\n\nAnswer:", add_special_tokens=True
            )
        else:
            chat = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}]
            )
            tokens = self.tokenizer.encode(chat)
        if len(tokens) >= (context := self.model.config.max_positions):
            raise ValueError(
                f"what the judge is asked has {len(tokens)} tokens: its context holds {context}"
            )
        return tokens

    def check(self, question: str, answer: str) -> None:
        """Raise a ValueError for a judge that answers nonsense: hardly any of its probability
        is on a possible answer.
        """
        prompt = fill(self.pairwise, question, answer, answer)
        self.probabilities([prompt], SIDES, [question])
        if (mass := self.masses.pop()) < LEAST_MASS:
            raise ValueError(
                f"the judge gives A and B {mass:.2%} of the probability: it does not answer "
                "the question; take a model that follows instructions"
            )

    def mark(self, solutions: Sequence[tuple[str, str]]) -> list[float]:
        """Return the expected mark of every (question, solution), from 0 to 1."""
        prompts = [fill(self.pointwise, *solution) for solution in solutions]
        values = torch.arange(len(MARKS), dtype=torch.float64) / (len(MARKS) - 1)
        questions = [question for question, _ in solutions]
        return (self.probabilities(prompts, MARKS, questions) @ values).tolist()

    def compare(
        self, pairs: Sequence[tuple[str, str, str]]
    ) -> list[tuple[float, float]]:
        """Return for every (question, one, other) the probability that `one` is preferred:
        standing first, standing second.
        """
        orders = [
            order
            for question, one, other in pairs
            for order in ((question, one, other), (question, other, one))
        ]
        prompts = [fill(self.pairwise, *order) for order in orders]
        questions = [question for question, _, _ in orders]
        chances = self.probabilities(prompts, SIDES, questions)
        first = chances[0::2, 0].tolist()
        second = chances[1::2, 1].tolist()
        return list(zip(first, second, strict=True))


def fill(template: str, question: str, first: str, second: str = "") -> str:
    """Return the template with the three put in, in one pass: what a solution writes in braces
    stays as it is.
    """
    fields = {"question": question, "first": first, "second": second}
    return re.sub(
        r"\{(question|first|second)\}", lambda field: fields[field[1]], template
    )


def judge_pairwise(
    judge: Judge, groups: Sequence[tuple[str, Sequence[str]]], opponents: int
) -> tuple[list[float], float | None]:
    """Compare each solution with `opponents` others of its group (question, solutions).

    The opponents are those that follow it, in both orders; equal ones are not compared, and a
    solution without an opponent has 1/2. Return the scores of all solutions, and how often both
    orders of a pair named the same winner (None: there were no pairs).
    """
    pairs = []
    places = []  # of both of a pair, among all solutions
    wins: list[list[float]] = []
    for question, texts in groups:
        for i, text in enumerate(texts):
            for step in range(1, min(opponents, len(texts) - 1) + 1):
                j = (i + step) % len(texts)
                if texts[j] != text:
                    pairs.append((question, text, texts[j]))
                    places.append((len(wins) + i, len(wins) + j))
        wins += [[] for _ in texts]
    agreed = []
    for (i, j), (first, second) in zip(places, judge.compare(pairs), strict=True):
        wins[i].append((first + second) / 2)
        wins[j].append(1 - (first + second) / 2)
        agreed.append((first > 0.5) == (second > 0.5))
    scores = [sum(won) / len(won) if won else 0.5 for won in wins]
    return scores, fmean(agreed) if agreed else None


@dataclass
class JudgeReward:
    """`judge_reward(groups)` adds to the rewards "judge" and "total".

    opponents: of each sample, 0 for marks. consistency: of the rollouts since the metrics were
    last asked for.
    """

    judge: Judge
    weight: float = 0.3
    opponents: int = 4
    consistency: list[float] = field(default_factory=list)

    def __call__(self, groups: Groups) -> None:
        asked = [
            (group[0].problem.question, [episode.solution.text for episode in group])
            for group in groups
        ]
        if self.opponents:
            scores, consistency = judge_pairwise(self.judge, asked, self.opponents)
            if consistency is not None:
                self.consistency.append(consistency)
        else:
            scores = self.judge.mark(
                [(q, text) for q, texts in asked for text in texts]
            )
        for episode, score in zip(chain.from_iterable(groups), scores, strict=True):
            episode.rewards["judge"] = score
            if episode.rewards["accuracy"]:
                episode.rewards["total"] += self.weight * (score - 0.5)

    def metrics(self, groups: Groups) -> dict[str, float]:
        """Return of a rollout: agreement with the verifier (AUC), correlation with length,
        consistency of both orders, and the probability of the possible answers; what there is
        nothing to take from is left out.
        """
        episodes = list(chain.from_iterable(groups))
        scores = [e.rewards["judge"] for e in episodes]
        lengths = [e.completion.length for e in episodes]
        right = [bool(e.rewards["accuracy"]) for e in episodes]
        found = {"judge/mass": fmean(self.judge.masses)} if self.judge.masses else {}
        if self.consistency:
            found["judge/consistency"] = fmean(self.consistency)
        if len(set(right)) == 2:
            found["judge/auc"] = auc(scores, right)
        if len(set(scores)) > 1 and len(set(lengths)) > 1:
            found["judge/length_correlation"] = correlation(scores, lengths)
        self.judge.masses.clear()
        self.consistency.clear()
        return found
