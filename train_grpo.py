"""Improve a model by reinforcement: sample groups of solutions, reward them, follow the policy gradient.

    python train_grpo.py configs/tiny/grpo.toml                    after configs/tiny/sft.toml; a CPU, minutes
    python train_grpo.py configs/tiny/grpo.toml grpo.kl_coef=0.1 run.name=more-kl
    python train_grpo.py configs/gsm8k/smollm2-135m-grpo.toml model.path=runs/smollm2-135m-sft

Each step: N problems, G completions of each from the current model, rewards r, advantages (r - mean) / std within the
group, one or more clipped updates with a KL penalty to the starting model (nanomath/training/policy_step.py; GRPO,
arXiv 2402.03300). Where the defaults differ from the paper: lr and sizes are for one small machine, KL is measured by
k3 and k1 whether or not it is penalised, and groups whose rewards are all equal cost no backward pass without it.
"""

from __future__ import annotations

import time
from dataclasses import replace

from nanomath import settings
from nanomath.analysis.evaluation import check_measurement, evaluate
from nanomath.commands.build import (
    build_model,
    build_problems,
    build_template,
    encode_prompts,
    sampling_options,
)
from nanomath.commands.main import run_main
from nanomath.commands.trainee import RUN_FLAGS, Trainee
from nanomath.config import parse_arguments
from nanomath.data.order import step_indices
from nanomath.rewards import RewardSet
from nanomath.rollout import Sampler, episode_metrics, sample_episodes
from nanomath.training.loop import Loop, Metrics
from nanomath.training.policy_step import PolicyStep

SHOW = {
    "heldout/pass@1": "held-out {:.1%}",
    "reward": "reward {:.3f}",
    "pass@1": "pass@1 {:.1%}",
    "kl": "KL {:.4f}",
    "entropy": "entropy {:.3f}",
    "flat_groups": "flat groups {:.0%}",
    "tokens_per_second": "{:.0f} tokens/s",
}


def main(argv: list[str]) -> int:
    config, flags = parse_arguments(settings.GRPOConfig, argv, __doc__, RUN_FLAGS)
    if not config.model.path:
        raise ValueError("model.path is empty: reinforcement needs a model to start from, such as runs/tiny-sft")
    if config.sampling.temperature == 0:
        raise ValueError("sampling.temperature is 0: greedy samples of one problem are all alike and teach nothing")
    trainee = Trainee(config, resume="--resume" in flags)
    model, tokenizer = trainee.model, trainee.tokenizer
    template, context = build_template(config.prompt), model.config.max_positions

    problems, heldout = build_problems(config.train), build_problems(config.heldout)
    prompts, heldout_prompts = (encode_prompts(p, template, tokenizer, context) for p in (problems, heldout))
    check_measurement(heldout, config.evaluation.samples, config.evaluation.k, config.evaluation.by)
    reward = RewardSet(config.reward.weights, config.reward.params, config.reward.lenient)
    sampler = Sampler(model, tokenizer, config.sampling.slots)
    options, grpo, seed = sampling_options(config.sampling), config.grpo, config.run.seed
    policy = PolicyStep(
        model,
        build_model(reference_section(config), seed)[0].requires_grad_(False),
        trainee.optimizer,
        group_size=grpo.group_size,
        temperature=config.sampling.temperature,
        advantage_std=grpo.advantage_std,
        aggregation=grpo.aggregation,
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        kl_coef=grpo.kl_coef,
        kl_estimator=grpo.kl_estimator,
        epochs=grpo.epochs,
        minibatches=grpo.minibatches,
        old_logprobs=grpo.old_logprobs,
        max_length=config.sampling.max_new_tokens,
        token_budget=grpo.token_budget,
        seed=seed,
    )

    def step(done: int) -> Metrics:
        began = time.perf_counter()
        chosen = step_indices(len(problems), grpo.prompts, done, seed)
        episodes = sample_episodes(
            sampler,
            [problems[i] for i in chosen],
            [prompts[i] for i in chosen],
            reward,
            grpo.group_size,
            seed=(seed << 32) + done,
            **options,
        )
        sampled, lr = time.perf_counter(), trainee.learning_rate(done)
        metrics = policy.step(episodes, done, lr)
        trainee.log.rollouts(done + 1, [e.record() for e in episodes[: grpo.logged_groups * grpo.group_size]])
        tokens = sum(e.completion.length for e in episodes)
        return {
            **episode_metrics(episodes, grpo.group_size),
            **metrics,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": tokens / (sampled - began),
            "sampling_seconds": sampled - began,
        }

    def measure() -> Metrics:
        e = config.evaluation
        return evaluate(sampler, heldout, heldout_prompts, e.samples, e.k, e.by, e.seed, **options).metrics()

    trainee.begin()
    run = config.run
    loop = Loop(trainee.log, run.steps, step, trainee.save, measure, run.eval_every, run.save_every, SHOW)
    return trainee.conclude(finished=loop.run(trainee.start))


def reference_section(config: settings.GRPOConfig) -> settings.Model:
    """The starting model again, frozen, on its own device."""
    return replace(config.model, device=config.grpo.reference_device or config.model.device)


if __name__ == "__main__":
    run_main(main)
