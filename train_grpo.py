"""Improve a model by reinforcement: sample groups of solutions, reward them, follow the policy
gradient.

    python train_grpo.py configs/tiny/grpo.toml          after configs/tiny/sft.toml; minutes
    python train_grpo.py configs/tiny/grpo.toml algorithm.method=dr_grpo run.name=dr-grpo
    python train_grpo.py configs/tiny/grpo.toml algorithm.kl_coef=0.1 run.name=more-kl
    python train_grpo.py configs/gsm8k/smollm2-135m-grpo.toml model.path=runs/smollm2-135m-sft

Each step: N problems, G completions of each from the current model, rewards r, advantages (r -
mean) / std within the group, one or more clipped updates with a KL penalty to the starting
model (nanomath/training/policy_step.py; GRPO, arXiv 2402.03300). `algorithm.method` makes it
Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++, PPO, ...: see nanomath/algorithms/README.md.
`grpo.source` takes the samples from elsewhere, and [teacher] has another model judge them, so that
SFT, DPO and distillation are the same loop with another loss.
Where the defaults differ from the paper: lr and sizes are for one small machine, KL is
measured by k3 and k1 whether or not it is penalised, and groups whose rewards are all equal
cost no backward pass without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from nanomath import settings
from nanomath.analysis.evaluation import check_measurement, evaluate
from nanomath.commands.main import run_main
from nanomath.config import parse_arguments
from nanomath.data.order import step_indices
from nanomath.data.problem import Problem
from nanomath.data.prompts import PromptTemplate
from nanomath.rollout import Episode, collect_groups, episode_metrics, sample_episodes
from nanomath.rollout.meter import meter
from nanomath.training.build import (
    build_prompts,
    build_scorers,
    build_template,
    needs_start,
    sampling_options,
)
from nanomath.training.critic import build_critic
from nanomath.training.hints import build_hints
from nanomath.training.loop import Metrics
from nanomath.training.planning import plan_rollouts
from nanomath.training.policy_step import PolicyStep
from nanomath.training.rollout_log import records, successes
from nanomath.training.sharding import shard
from nanomath.training.teacher import build_source, build_teacher
from nanomath.training.trainer import RUN_FLAGS, Trainer, use_of_policy

SHOW = {
    "heldout/pass@1": "held-out {:.1%}",
    "reward": "reward {:.3f}",
    "pass@1": "pass@1 {:.1%}",
    "reward/prm": "PRM {:.3f}",
    "kl": "KL {:.4f}",
    "entropy": "entropy {:.3f}",
    "flat_groups": "flat groups {:.0%}",
    "tokens_per_second": "{:.0f} tokens/s",
}


def main(argv: list[str]) -> int:
    config, flags = parse_arguments(settings.GRPOConfig, argv, __doc__, RUN_FLAGS)
    if not config.model.path:
        raise ValueError(
            "model.path is empty: reinforcement needs a model to start from, such as runs/tiny-sft"
        )
    if config.sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature is 0: greedy samples of one problem are all alike and teach "
            "nothing"
        )
    trainer = Trainer(config, "--resume" in flags, use_of_policy(config.heldout.source))
    tokenizer = trainer.tokenizer
    grpo = config.grpo
    algorithm = config.algorithm
    seed = config.run.seed
    sampling_seed = (seed + grpo.sampling_seed) % 2**32
    e = config.evaluation

    template = build_template(config.prompt)
    context = trainer.model.config.max_positions
    problems, prompts = build_prompts(config.train, template, tokenizer, context)
    heldout, heldout_prompts = build_prompts(
        config.heldout, template, tokenizer, context
    )
    check_measurement(heldout, e.samples, e.k, e.by)

    sampler = trainer.sampler()
    sampling = sampling_options(config.sampling)
    ends = config.prompt.reasoning_ends
    scorers = build_scorers(config, tokenizer, problems)
    policy = build_policy_step(config, trainer, template, problems)
    source = build_source(config, sampler, policy.teacher, template, problems, prompts)
    hints = build_hints(config, trainer, sampler, template, problems)
    draw = hints.episodes if hints else partial(sample_episodes, source)

    longest = hints.longest(prompts) if hints else prompts
    plan_rollouts(trainer, policy, sampler, source, longest, heldout_prompts)

    def sample(number: int) -> list[list[Episode]]:
        """Return the groups of rollout `number` with their rewards."""
        chosen = step_indices(len(problems), grpo.prompts, number, seed)
        with meter(sampler, len(chosen) * grpo.group_size) as progress:
            return draw(
                [problems[i] for i in chosen],
                [prompts[i] for i in chosen],
                scorers,
                grpo.group_size,
                seed=(sampling_seed << 32) + number,
                progress=progress,
                **sampling,
            )

    def measure(done: int) -> Metrics:
        report = evaluate(
            sampler,
            heldout,
            heldout_prompts,
            e.samples,
            e.k,
            e.by,
            e.seed,
            reasoning_ends=ends,
            start=policy.reference,
            **sampling,
        )
        trainer.log.add("heldout", done, report.records())
        return report.metrics()

    with trainer.running(measure, SHOW) as steps:
        for step in steps:
            began = time.perf_counter()
            lr = trainer.learning_rate(step)
            first = step * (algorithm.refills + 1)
            kept, sampled = collect_groups(
                lambda refill, first=first: sample(first + refill),
                grpo.prompts,
                algorithm.keep_groups,
                algorithm.refills,
            )
            drawn = time.perf_counter()
            told, replaced = hints.learn() if hints else ({}, [])
            sampled = sampled + replaced
            metrics = policy.step(
                [episode for group in kept for episode in group], step, lr
            )
            trainer.log.add(
                "rollouts",
                step + 1,
                records(kept[: grpo.logged_groups], config.reward.lenient, ends),
            )
            trainer.log.add("groups", step + 1, [successes(sampled)])
            tokens = sum(
                episode.completion.length for group in sampled for episode in group
            )
            steps.record(
                {
                    **episode_metrics(sampled),
                    **{
                        name: value
                        for scorer in scorers
                        for name, value in scorer.metrics(sampled).items()
                    },
                    **metrics,
                    **told,
                    "lr": lr,
                    "groups": len(kept),
                    "groups_sampled": len(sampled),
                    "tokens": tokens,
                    "tokens_per_second": tokens / (drawn - began),
                    "sampling_seconds": drawn - began,
                }
            )
    return trainer.exit_code


def build_policy_step(
    config: settings.GRPOConfig,
    trainer: Trainer,
    template: PromptTemplate,
    problems: Sequence[Problem],
) -> PolicyStep:
    """Make the step that updates the model in training. Its reference is the starting model,
    frozen: loaded again, or the base of the adapters; None where nothing needs it.
    """
    reference = None
    if needs_start(config):
        reference = trainer.starting_model(config.grpo.reference_device)
    critic = build_critic(config, trainer, reference)
    if config.model.sharded and reference:
        shard(reference, reference.dtype)
    return PolicyStep(
        trainer.model,
        reference,
        trainer.optimizer,
        group_size=config.grpo.group_size,
        algorithm=config.algorithm,
        temperature=config.sampling.temperature,
        reward_weights=config.reward.weights,
        step_weight=config.process.weight,
        max_length=config.sampling.max_new_tokens,
        token_budget=config.grpo.token_budget,
        seed=config.run.seed,
        critic=critic,
        critic_optimizer=trainer.train_beside("critic", critic) if critic else None,
        critic_rate=config.algorithm.value_lr / config.optim.lr,
        teacher=build_teacher(config, trainer, reference, template, problems),
    )


if __name__ == "__main__":
    run_main(main)
