"""Where samples are from that the policy did not draw, and a teacher that scores those it drew.

    A_t = log pi_T(o_t | prompt of the teacher, o_<t) - log pi(o_t | prompt, o_<t)

A teacher that is larger is distilled on the policy's own samples (arXiv 2306.13649). One that is
the policy, or what it started from, knows more by what its prompt shows: the worked solution (SDFT,
arXiv 2601.19897), or a right sample of the same problem (SDPO, arXiv 2601.20802).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nanomath import settings
from nanomath.data.problem import Problem
from nanomath.data.prompts import PromptTemplate, render_response
from nanomath.models import Tokenizer, Transformer
from nanomath.models.batches import Batch, Example, make_batch, response_states
from nanomath.models.scores import states_kl
from nanomath.rollout import Completion, Episode, Sampler, in_groups
from nanomath.rollout.known import Known, certain, read_samples
from nanomath.training.build import build_model, build_sampler, encode_prompt
from nanomath.training.sharding import shard
from nanomath.training.trainer import Trainer


@dataclass
class Teacher:
    """A model, and the prompts under which it scores completions.

    shows: "nothing", "solution" or "sibling". asks: in place of the template's own question,
    with {demonstration}; the few-shot examples are left out.
    """

    model: Transformer
    tokenizer: Tokenizer
    template: PromptTemplate
    shows: str = "nothing"
    asks: str = "{question}"

    def examples(self, episodes: Sequence[Episode], group_size: int) -> list[Example]:
        """Return the episodes' completions under the teacher's prompts, which go on with the
        hint that began an answer.

        The prompt is the policy's where there is nothing to show: no other sample of the group
        is right, or the context has no room for it.
        """
        found = []
        for group in in_groups(episodes, group_size):
            prompts: dict[str | None, list[int]] = {None: []}  # by what is shown
            for episode in group:
                shows = self._demonstration(episode, group)
                if shows not in prompts:
                    prompts[shows] = self._prompt(episode.problem, shows)
                prompt = prompts[shows]
                begun = episode.hint.prefix if prompt and episode.hint else []
                shown = Example(prompt + begun, episode.completion.tokens)
                if not prompt or len(shown) > self.model.config.max_positions:
                    shown = replace(shown, prompt=episode.prompt)
                found.append(shown)
        return found

    def _demonstration(self, episode: Episode, group: Sequence[Episode]) -> str | None:
        """Return what the teacher is shown beside the problem, None for nothing."""
        if self.shows == "nothing":
            return None
        if self.shows == "solution":
            return render_response(episode.problem, self.template)
        others = (e for e in group if e is not episode and e.rewards["accuracy"] > 0)
        return next((other.solution.text for other in others), None)

    def kl(
        self,
        policy: Transformer,
        states: Tensor,
        examples: Sequence[Example],
        batch: Batch,
        temperature: float,
    ) -> Tensor:
        """Return KL(pi || pi_T) [S, R] over the whole vocabulary, from the policy's states of a
        batch and its examples as the teacher sees them.
        """
        shown = make_batch(examples).to(self.model.device)
        with torch.no_grad():
            theirs = response_states(self.model, shown)
        return states_kl(policy, states, self.model, theirs, batch, temperature)

    def with_solution(self, problem: Problem) -> list[int]:
        """Return the prompt of a problem with its worked solution. ValueError if it has none."""
        return self._prompt(problem, render_response(problem, self.template))

    def _prompt(self, problem: Problem, demonstration: str) -> list[int]:
        fields = {**problem.metadata, "demonstration": demonstration}
        template = replace(self.template, template=self.asks, few_shot=())
        return encode_prompt(
            replace(problem, metadata=fields), template, self.tokenizer
        )


def build_teacher(
    config: settings.GRPOConfig,
    trainer: Trainer,
    reference: Transformer | None,
    template: PromptTemplate,
    problems: Sequence[Problem],
) -> Teacher | None:
    """Make the teacher of the policy on `problems`, None where [teacher] names none.

    ValueError for one of another tokenizer, and for a problem for which its context is too small.
    """
    section = config.teacher
    if not section.path:
        return None
    ours = {"policy": trainer.model, "start": reference}
    model = ours.get(section.path) or _load(config, trainer)
    teacher = Teacher(
        model, trainer.tokenizer, template, section.shows, section.template
    )
    context = model.config.max_positions
    room = context - config.sampling.max_new_tokens
    solved = section.shows == "solution"
    smaller = context < trainer.model.config.max_positions
    plain = partial(encode_prompt, template=template, tokenizer=trainer.tokenizer)
    for problem in problems if solved or smaller else ():
        length = len(teacher.with_solution(problem) if solved else plain(problem))
        if length > room:
            raise ValueError(
                f"the teacher's prompt of problem {problem.id} has {length} tokens"
                f"{' with its solution' * solved}: sampling.max_new_tokens leaves {room} of its "
                f"context of {context}"
            )
    return teacher


def _load(config: settings.GRPOConfig, trainer: Trainer) -> Transformer:
    section = config.teacher
    device = section.device or trainer.device
    place = replace(config.model, path=section.path, base="", device=device)
    model, tokenizer = build_model(place, config.run.seed)
    if not tokenizer.has_tokens_of(trainer.tokenizer):
        raise ValueError(
            f"teacher.path = {section.path!r} has another tokenizer than the policy: its tokens "
            "mean something else. Write samples of it with `python -m nanomath eval ... save=FILE` "
            "and set grpo.source = FILE"
        )
    model.requires_grad_(False)
    return shard(model, model.dtype) if config.model.sharded else model


def build_source(
    config: settings.GRPOConfig,
    policy: Sampler,
    teacher: Teacher | None,
    template: PromptTemplate,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
) -> Sampler | Known:
    """Make what gives the samples of a rollout: the policy's sampler, or what `grpo.source` and
    `grpo.solutions` put in its place.

    ValueError names a problem of which a file has too few samples, and one without a solution.
    """
    grpo = config.grpo
    tokenizer = policy.tokenizer
    context = policy.model.config.max_positions
    source: Sampler | Known = policy
    if grpo.source == "teacher" and config.teacher.path != "policy":
        source = build_sampler(config.sampling, teacher.model, tokenizer, type(policy))
    elif grpo.source not in ("policy", "teacher"):
        a = config.algorithm
        weighed = a.old_logprobs == "sampler" or a.sampler_correction != "off"
        samples = read_samples(grpo.source, tokenizer, weighed)
        of_file = [samples.get(problem.question.strip(), []) for problem in problems]
        wanted = grpo.group_size - grpo.solutions
        for problem, found in zip(problems, of_file, strict=True):
            if len(found) < wanted:
                raise ValueError(
                    f"{grpo.source} has {len(found)} samples of problem {problem.id}, but a "
                    f"group takes {wanted}: train on problems it has (train.source, train.limit), "
                    "or set grpo.group_size"
                )
        known = _by_prompt(problems, prompts, of_file, context)
        source = Known(known, policy)
    if grpo.solutions:
        texts = (render_response(problem, template) for problem in problems)
        solutions = [[certain(text, tokenizer)] for text in texts]
        known = _by_prompt(problems, prompts, solutions, context)
        source = Known(known, source, last=1)
    return source


def _by_prompt(
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    completions: Sequence[list[Completion]],
    context: int,
) -> dict[tuple[int, ...], list[Completion]]:
    """Return the completions of each prompt. ValueError where the context has no room for one."""
    for problem, prompt, found in zip(problems, prompts, completions, strict=True):
        longest = len(prompt) + max(completion.length for completion in found)
        if longest > context:
            raise ValueError(
                f"problem {problem.id} with a sample has {longest} tokens: the model's context "
                f"holds {context}"
            )
    return dict(zip(map(tuple, prompts), completions, strict=True))
