"""What a run says before its first step: the memory and time that its steps will need, by the
formulas of plan.py. And the number that token_budget = "auto" becomes, which its config keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nanomath.data.order import step_indices
from nanomath.models import Transformer
from nanomath.models.batches import Example
from nanomath.rollout import Sampler
from nanomath.rollout.known import Known
from nanomath.training import plan, ranks
from nanomath.training.loop import say
from nanomath.training.plan import Drawing
from nanomath.training.policy_step import PolicyStep
from nanomath.training.sittings import memory_now
from nanomath.training.trainer import Trainer, memory_knobs

StepExamples = Callable[[int], list[Example]]  # what a step computes
STEPS_SEEN = 100  # of a run, by which it is planned


def plan_rollouts(
    trainer: Trainer,
    policy: PolicyStep,
    sampler: Sampler,
    source: Sampler | Known,
    prompts: Sequence[list[int]],
    heldout_prompts: Sequence[list[int]],
) -> None:
    """Say what rollouts from a source and updates will need, and give `policy` its token_budget.

    Seconds are told of completions as long as in the newest step of a run that goes on, else of
    the longest. What is drawn again (hints, refills) is not foreseen.
    """
    config = trainer.config
    grpo = config.grpo
    samples, longest = grpo.group_size, 0
    while isinstance(source, Known):
        longest = max(longest, source.longest)
        samples -= source.last or samples
        source = source.sampler
    drawn = config.sampling.max_new_tokens
    if samples:
        longest = max(longest, drawn)
    lines = trainer.log.read("metrics.jsonl") if trainer.start else []
    lengths = [line["length"] for line in lines if "length" in line]
    length = max(1, round(lengths[-1])) if lengths else longest

    def rollout(step: int, length: int = longest) -> list[Example]:
        chosen = step_indices(len(prompts), grpo.prompts, step, config.run.seed)
        return [Example(prompts[i], [0] * length) for i in chosen] * grpo.group_size

    usual = rollout(trainer.start, length)
    asked = [example.prompt for example in usual[: grpo.prompts]]
    draws = [(source, Drawing.of(asked, samples, min(length, drawn)))] * (samples > 0)
    measures = sampler, Drawing.of(heldout_prompts, config.evaluation.samples, drawn)
    taught = []
    if config.algorithm.advantage.startswith("teacher"):
        taught = [(policy.teacher.model, rollout(trainer.start))]
    passes = passes_of(policy)
    announce(trainer, "grpo", rollout, usual, passes, [*draws, measures], taught)
    policy.token_budget = grpo.token_budget


def passes_of(policy: PolicyStep) -> tuple[float, int]:
    """Return how often a step computes each episode at most: without a gradient, and with one.
    A pass of a teacher is as many of the policy's as it has more parameters.
    """
    a = policy.algorithm
    own_trunk = bool(policy.critic and policy.critic.trunk)
    scored = bool(policy.reference) + policy.needs_old_pass() + bool(policy.critic)
    if a.advantage.startswith("teacher"):
        models = policy.teacher.model, policy.model
        teacher, ours = (sum(p.numel() for p in m.parameters()) for m in models)
        asked = 1 + a.epochs * (a.advantage == "teacher_full")
        scored += asked * teacher / ours
    return scored, a.epochs * (1 + own_trunk)


def plan_tuning(
    trainer: Trainer,
    sampler: Sampler,
    batch: StepExamples,
    heldout_prompts: Sequence[list[int]],
    heldout: Sequence[Example],
) -> None:
    """Say what steps of these batches, and measurements beside them, will need."""
    config = trainer.config
    longest = config.sampling.max_new_tokens
    measures = Drawing.of(heldout_prompts, config.evaluation.samples, longest)
    usual = batch(trainer.start)
    scored = [(trainer.model, heldout)]
    announce(trainer, "sft", batch, usual, (0, 1), [(sampler, measures)], scored)


def announce(
    trainer: Trainer,
    name: str,
    examples_of: StepExamples,
    usual: Sequence[Example],
    passes: tuple[float, int],
    drawings: Sequence[tuple[Sampler, Drawing]],
    scored: Sequence[tuple[Transformer, Sequence[Example]]],
) -> None:
    """Settle the token_budget of the config's section `name`, and say what a step needs.

    examples_of gives those of a step at their longest, `usual` are those of one whose time is
    told. passes: over them, without a gradient and with one. drawings: what samplers draw in a
    step, if they do, and of held-out problems; scored: by which models what is scored beside.
    """
    *draws, _ = drawings
    longest = trainer.config.sampling.max_new_tokens
    kept: dict[Sampler, float] = {}
    for sampler, one in drawings:
        need = plan.sampling_bytes(sampler, replace(one, completion=longest))
        kept[sampler] = max(need, kept.get(sampler, 0.0))
    sampling = sum(kept.values())
    largest = settle_budget(trainer, name, examples_of, sampling)
    budget = getattr(trainer.config, name).token_budget
    model = trainer.model
    optimizer = trainer.optimizer
    training = max(
        plan.step_bytes(model, optimizer, plan.batches_of(model, largest, budget)),
        *(
            plan.batch_bytes(scorer, part)
            for scorer, examples in scored
            for part in plan.batches_of(model, examples, budget)
        ),
        0,
    )
    memory = {
        "loaded": memory_now(model.device),  # before trials leave something
        "training": training,
        "sampling": sampling,
    }
    seconds = {}
    if not ranks.is_sharded(model):
        speed = plan.bytes_per_s(model)
        seconds["training"] = plan.step_seconds(
            model, optimizer, usual, budget, passes, speed
        )
        for sampler, one in draws:
            seconds["sampling"] = plan.sampling_seconds(sampler, one, speed)
    assumed = "".join(f"completions of {one.completion} tokens, " for _, one in draws)
    expected = plan.sentence(model.device, memory, seconds)
    say(f"{expected}, with {assumed}{name}.token_budget = {budget}")
    lacking = training + sampling - plan.room(model.device)
    if lacking > 0:
        keys = [line.split()[0] for line in memory_knobs(trainer.config).splitlines()]
        say(
            f"it may not fit: {lacking / 2**30:.2f} GiB more than is free; what to turn "
            f"down or on: {', '.join(keys)}"
        )


def settle_budget(
    trainer: Trainer, name: str, examples_of: StepExamples, besides: float = 0
) -> list[Example]:
    """Put a number in the place of token_budget = "auto" in the config's section `name`, and
    return the largest step's examples, of the next STEPS_SEEN steps.

    besides: bytes that other things need.
    """
    last = min(trainer.config.run.steps, trainer.start + STEPS_SEEN)
    steps = map(examples_of, range(trainer.start, last))
    largest = max(steps, key=lambda examples: sum(map(len, examples)))
    section = getattr(trainer.config, name)
    if section.token_budget == "auto":
        section.token_budget = plan.settle_budget(
            trainer.model, trainer.optimizer, largest, besides
        )
    return largest
