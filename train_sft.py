"""Fine-tune a model on worked solutions.

    python train_sft.py configs/tiny/sft.toml            a new model, the embedded world; minutes
    python train_sft.py configs/tiny/sft.toml optim.lr=1e-3 run.name=lower-rate
    python train_sft.py configs/gsm8k/smollm2-135m-sft.toml model.path=models/SmolLM2-135M-Instruct

It minimises  - sum w log pi(solution | question)  over the tokens of the solutions
(nanomath/algorithms/sft.py), with `sft.kl_coef` plus the KL to the starting model, with
`optim.l2_start` plus the squared distance of the weights from it.
"""

from __future__ import annotations

from nanomath import settings
from nanomath.analysis.evaluation import check_measurement, evaluate
from nanomath.commands.main import run_main
from nanomath.config import parse_arguments
from nanomath.data.order import step_indices
from nanomath.models import Transformer
from nanomath.models.batches import Example
from nanomath.training.build import (
    build_problems,
    build_prompts,
    build_template,
    encode_examples,
    sampling_options,
)
from nanomath.training.loop import Metrics
from nanomath.training.planning import plan_tuning
from nanomath.training.sft_step import SFTStep, heldout_loss
from nanomath.training.sharding import shard
from nanomath.training.trainer import RUN_FLAGS, Trainer, use_of_policy

SHOW = {
    "heldout/pass@1": "held-out {:.1%}",
    "heldout/loss": "held-out loss {:.3f}",
    "nll": "nll {:.3f}",
    "grad_norm": "norm {:.2f}",
    "lr": "lr {:.1e}",
}


def main(argv: list[str]) -> int:
    config, flags = parse_arguments(settings.SFTConfig, argv, __doc__, RUN_FLAGS)
    trainer = Trainer(config, "--resume" in flags, use_of_policy(config.heldout.source))
    model = trainer.model
    tokenizer = trainer.tokenizer
    sft = config.sft
    seed = config.run.seed
    e = config.evaluation

    template = build_template(config.prompt)
    context = model.config.max_positions
    examples = encode_examples(
        build_problems(config.train),
        template,
        tokenizer,
        context,
        config.train.max_tokens,
    )
    heldout, heldout_prompts = build_prompts(
        config.heldout, template, tokenizer, context
    )
    solved = [problem for problem in heldout if problem.solution]
    heldout_examples = encode_examples(
        solved, template, tokenizer, context, config.heldout.max_tokens
    )
    check_measurement(heldout, e.samples, e.k, e.by)

    sampler = trainer.sampler()
    sampling = sampling_options(config.sampling)
    ends = config.prompt.reasoning_ends

    def batch(step: int) -> list[Example]:
        chosen = step_indices(len(examples), sft.batch_size, step, seed)
        return [examples[i] for i in chosen]

    plan_tuning(trainer, sampler, batch, heldout_prompts, heldout_examples)
    tuning = SFTStep(
        model,
        trainer.optimizer,
        aggregation=sft.aggregation,
        token_budget=sft.token_budget,
        dft=sft.dft,
        neftune_alpha=sft.neftune_alpha,
        seed=seed,
        kl_coef=sft.kl_coef,
        reference=build_reference(config, trainer) if sft.kl_coef else None,
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
            **sampling,
        )
        trainer.log.add("heldout", done, report.records())
        loss = (
            {"heldout/loss": heldout_loss(model, heldout_examples, sft.token_budget)}
            if heldout_examples
            else {}
        )
        return {**report.metrics(), **loss}

    with trainer.running(measure, SHOW) as steps:
        for step in steps:
            lr = trainer.learning_rate(step)
            metrics = tuning.step(batch(step), step, lr)
            steps.record({**metrics, "lr": lr})
    return trainer.exit_code


def build_reference(config: settings.SFTConfig, trainer: Trainer) -> Transformer:
    """Return the starting model, frozen."""
    reference = trainer.starting_model()
    return shard(reference, reference.dtype) if config.model.sharded else reference


if __name__ == "__main__":
    run_main(main)
