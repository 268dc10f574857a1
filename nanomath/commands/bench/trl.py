"""The same GRPO step by trl: https://huggingface.co/docs/trl/grpo_trainer (trl 1.16).

`rollout_func` hands out the completions, or with `sampled` trl draws as many tokens itself, by
transformers' generate. A step is what lies between the trainer's own "step begins" and "step
ends": sampling, the reference's pass, rewards and advantages, all forward and backward passes,
and the optimizer. Nothing is logged, saved, or evaluated.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nanomath.commands.bench.measure import CALLS, Found, goes_on, peak_memory
from nanomath.commands.bench.stages import silent_stderr
from nanomath.models import Transformer, save_model
from nanomath.models.batches import Example


def measure_trl(model: Transformer, examples: Sequence[Example], config: Any) -> Found:
    """Return seconds of the fastest step, and bytes at the peak beyond weights and moments."""
    transformers = importlib.import_module("transformers")
    device = model.device
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: object, model: Any, **__: object) -> None:
            if not seconds:
                moments = 2 * sum(parameter.nbytes for parameter in model.parameters())
                self.before = peak_memory(device, restart=True) + moments
            self.began = time.perf_counter()

        def on_step_end(
            self, _: object, __: object, control: Any, **___: object
        ) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - self.began)
            control.should_training_stop = not goes_on(seconds)

    clock = Clock()
    vocabulary = model.config.vocab_size
    with TemporaryDirectory() as directory, silent_stderr():
        save_model(model, None, directory)
        del model
        new_trainer(directory, examples, config, [clock], vocabulary).train()
    return {"seconds": min(seconds), "bytes": max(0, peak_memory(device) - clock.before)}


def new_trainer(
    directory: str,
    examples: Sequence[Example],
    config: Any,
    callbacks: Sequence[Any],
    vocabulary: int,
) -> Any:
    """Return the trainer of the model in a directory, with the settings of our own step.

    A micro-batch holds as many sequences as fit into the token budget and divide their number.
    """
    datasets, tokenizers, transformers, trl = map(
        importlib.import_module, ("datasets", "tokenizers", "transformers", "trl")
    )
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(i): i for i in range(vocabulary)}, "0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    asked = [
        " ".join(map(str, example.prompt)) for example in examples[:: config.groups]
    ]
    count = len(examples)
    room = (
        config.token_budget // max(map(len, examples)) if config.token_budget else count
    )
    micro = max([1, *(n for n in range(1, room + 1) if count % n == 0)])
    arguments = trl.GRPOConfig(
        directory,
        model_init_kwargs={"dtype": config.dtype},
        use_cpu=not config.on_gpu,
        bf16=False,
        max_steps=CALLS,
        max_completion_length=config.response,
        generation_kwargs={"min_new_tokens": config.response},
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=count // micro,
        num_generations=config.groups,
        gradient_checkpointing=config.gradient_checkpointing,
        shuffle_dataset=False,
        loss_type="grpo",
        beta=0.04,
        adam_beta2=0.95,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )

    def completions(prompts: list[str], _: object) -> dict[str, list]:
        """What was sampled, in the order of the dataset: each prompt once for each sample."""
        assert prompts == [asked[i // config.groups] for i in range(count)]
        return {
            "prompt_ids": [example.prompt for example in examples],
            "completion_ids": [example.response for example in examples],
            "logprobs": [[-5.0] * len(example.response) for example in examples],
        }

    trainer = trl.GRPOTrainer(
        directory,
        lambda prompts, **_: [i % 2 for i in range(len(prompts))],  # rewards
        arguments,
        datasets.Dataset.from_dict({"prompt": asked}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="0"
        ),
        callbacks=callbacks,
        rollout_func=None if config.sampled else completions,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
