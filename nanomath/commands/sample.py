"""Ask a model a question; the answer appears as it is drawn.

    python -m nanomath sample MODEL "QUESTION" [CONFIG.toml] [key=value ...]

    python -m nanomath sample runs/tiny-grpo "Mia has 12 apples. She buys 7 more. How many now?"
    python -m nanomath sample models/SmolLM2-135M-Instruct "What is 3 + 4?" sampling.temperature=0.7

Greedy unless a temperature is set. The prompt is what the model was trained on: its chat
template, unless prompt.chat=false.
"""

from __future__ import annotations

from nanomath import settings
from nanomath.config import parse_arguments
from nanomath.data.problem import Problem
from nanomath.training.build import (
    build_model,
    build_sampler,
    build_template,
    encode_prompts,
    sampling_options,
    settle_dtypes,
)


def main(argv: list[str]) -> int:
    help_asked = {"-h", "--help"} & set(argv)
    if not help_asked and (len(argv) < 2 or not argv[0] or argv[0].startswith("-")):
        raise ValueError(
            'sample needs a model and a question: python -m nanomath sample MODEL "QUESTION"'
        )
    words = argv if help_asked else [f"model.path={argv[0]}", *argv[2:]]
    config, _ = parse_arguments(settings.SampleConfig, words, __doc__)
    if not argv[1].strip():
        raise ValueError("the question is empty")

    settle_dtypes(config)
    model, tokenizer = build_model(config.model, config.seed)
    question = Problem(id="question", question=argv[1], answer="")
    (prompt,) = encode_prompts(
        [question], build_template(config.prompt), tokenizer, model.config.max_positions
    )
    config.sampling.slots = 1
    sampler = build_sampler(config.sampling, model, tokenizer)
    for piece in sampler.stream(
        prompt, seed=config.seed, **sampling_options(config.sampling)
    ):
        print(piece, end="", flush=True)
    print()
    return 0
