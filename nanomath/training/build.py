"""Makes the parts of a run from the sections of its config, for the scripts and the
commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch

from nanomath import algorithms, settings
from nanomath.data.problem import Problem
from nanomath.data.problem_sets import Fields, load_problems, within_pass_rates
from nanomath.data.prompts import PromptTemplate, render_prompt, render_response
from nanomath.data.world import (
    CHAT_TEMPLATE,
    generate,
    pretraining_documents,
    world_tokenizer,
)
from nanomath.models import (
    ModelConfig,
    Tokenizer,
    Transformer,
    check_vocabulary,
    load_model,
    load_tokenizer,
)
from nanomath.models.batches import Example
from nanomath.models.directory import ADAPTER_CONFIG, base_of, resolve_model_dir
from nanomath.models.hf import read_config
from nanomath.process.judge import Judge, JudgeReward
from nanomath.process.prm import (
    StepScorer,
    length_scores,
    load_prm,
    oracle_scores,
    random_scores,
)
from nanomath.process.rewards import ProcessReward, VerifiedReward
from nanomath.rewards import RewardSet
from nanomath.rollout import Sampler, Scorer
from nanomath.rollout.known import encode_response
from nanomath.training import ranks
from nanomath.training.arithmetic import settle
from nanomath.training.loop import say
from nanomath.training.shared_sampler import SharedScorer

T = TypeVar("T")
TRAINED_ROWS = 512  # tokens of the trial of a dtype: more take longer, and say the same
LEAVE_OUT = "; max_tokens of a problem set leaves out what is longer"
# The world has no end; this many are drawn where no limit is set
WORLD_PROBLEMS = 20000


def build_model(
    section: settings.Model, seed: int, path: str = ""
) -> tuple[Transformer, Tokenizer]:
    """Load the model and tokenizer at `path` (default: the section's), or make new ones for
    the embedded world where it is empty.
    """
    device = choose_device(section.device)
    dtype = getattr(torch, section.dtype)
    path = path or section.path
    if path:
        model = load_model(path, device, dtype, base=section.base)
        tokenizer = load_tokenizer(path, section.base)
        check_vocabulary(model, tokenizer)
    else:
        tokenizer = Tokenizer(
            world_tokenizer(), CHAT_TEMPLATE, eos_token="<|endoftext|>"
        )
        model = new_model(section.new, tokenizer.vocab_size, seed).to(device, dtype)
    model.gradient_checkpointing = section.gradient_checkpointing
    return model, tokenizer


def settle_dtypes(config: Any, path: str = "") -> None:
    """Replace "auto" in model.dtype and sampling.dtype by what is fastest on this machine for the
    model at `path` (default: the config's), and say so; say of a dtype asked for if it is slow.
    """
    section = config.model
    device = choose_device(section.device)
    shape = shape_of(section, path or section.path)
    parts = {"model": (section, TRAINED_ROWS)}
    sampling = getattr(config, "sampling", None)
    if sampling and sampling.dtype:
        parts["sampling"] = sampling, min(sampling.slots, TRAINED_ROWS)
    for name, (part, rows) in parts.items():
        part.dtype, said = settle(part.dtype, f"{name}.dtype", shape, device, rows)
        if said:
            say(said)


def shape_of(section: settings.Model, path: str) -> ModelConfig:
    """The shape of the model at `path`, of an adapter that of its base, or of a new one."""
    if not path:
        return new_shape(section.new, vocab_size=0)
    directory = resolve_model_dir(path)
    if (directory / ADAPTER_CONFIG).is_file():
        directory = base_of(directory, section.base)
    return read_config(directory)


def new_model(section: settings.NewModel, vocab_size: int, seed: int) -> Transformer:
    """Make a model of the section's shape with fresh weights, on the CPU in float32."""
    return Transformer(new_shape(section, vocab_size)).init_weights(seed)


def new_shape(section: settings.NewModel, vocab_size: int) -> ModelConfig:
    """The shape that the section describes."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=section.hidden_size,
        num_layers=section.layers,
        num_heads=section.heads,
        num_kv_heads=section.kv_heads,
        head_dim=section.hidden_size // section.heads,
        intermediate_size=section.intermediate_size,
        max_positions=section.max_positions,
    )


def choose_device(name: str) -> torch.device:
    """Return the named device, or for "auto" a GPU where there is one.

    ValueError for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()  # "meta" exists, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} is not to be had here: {str(error).splitlines()[0]}"
        ) from None
    return torch.device(name)


def build_problems(section: settings.Problems) -> list[Problem]:
    """Load the problems of the world, of a file or of a hub dataset; with pass_rates, those of
    them that are neither too hard nor too easy.
    """
    problems = _all_problems(section)
    if not section.pass_rates:
        return problems
    kept = within_pass_rates(problems, section.pass_rates, *section.pass_rate)
    least, greatest = section.pass_rate
    say(
        f"{len(kept)} of {len(problems)} problems have a pass rate from {least:g} to {greatest:g}"
    )
    return kept


def _all_problems(section: settings.Problems) -> list[Problem]:
    if section.source != "world":
        file = section.file
        fields = Fields(
            question=tuple(file.question),
            answer=file.answer,
            solution=file.solution,
            id=file.id,
            answer_after=None if file.answer_after == "auto" else file.answer_after,
            remove=file.remove,
        )
        return load_problems(
            section.source,
            fields,
            split=section.split,
            header=file.header,
            skip=file.skip,
            limit=section.limit,
        )
    world = section.world
    limit = section.limit or WORLD_PROBLEMS
    share = -(-limit // len(world.families))
    difficulty = tuple(world.difficulty)
    told = world.languages, world.direct, world.wordy
    if world.documents:
        if section.split != "train":
            raise ValueError(
                f"world.documents are of the train split, not of {section.split!r}"
            )
        texts = pretraining_documents(
            limit, 0, difficulty, world.families, *told, world.documents
        )
        return [
            Problem(f"document-{n}", "", text, text) for n, text in enumerate(texts)
        ]
    drawn = [
        generate(family, section.split, share, 0, difficulty, *told, world.shots, True)
        for family in world.families
    ]
    together = [problem for turn in zip_longest(*drawn) for problem in turn if problem]
    return together[:limit]


def build_template(section: settings.Prompt) -> PromptTemplate:
    """Make the prompt template that the section describes."""
    return PromptTemplate(
        section.template,
        section.response,
        section.system,
        section.few_shot,
        section.chat,
    )


def encode_prompts(
    problems: Sequence[Problem],
    template: PromptTemplate,
    tokenizer: Tokenizer,
    longest: int,
) -> list[list[int]]:
    """Return the prompt tokens of every problem.

    ValueError names the first prompt that leaves no room in a context of `longest` tokens.
    """
    return fitting_prompts(problems, template, tokenizer, longest, 0, hint="")[1]


def build_prompts(
    section: settings.Problems,
    template: PromptTemplate,
    tokenizer: Tokenizer,
    longest: int,
) -> tuple[list[Problem], list[list[int]]]:
    """Return the problems that the section names, and their prompt tokens; see
    `fitting_prompts`.
    """
    return fitting_prompts(
        build_problems(section), template, tokenizer, longest, section.max_tokens
    )


def fitting_prompts(
    problems: Sequence[Problem],
    template: PromptTemplate,
    tokenizer: Tokenizer,
    longest: int,
    max_tokens: int,
    hint: str = LEAVE_OUT,
) -> tuple[list[Problem], list[list[int]]]:
    """Return the problems whose prompts have at most `max_tokens` tokens (0: all), and
    these prompts.

    ValueError names the first prompt that leaves no room in a context of `longest` tokens,
    and ends with the `hint`.
    """
    pairs = [
        (problem, encode_prompt(problem, template, tokenizer)) for problem in problems
    ]
    pairs = _short_enough(pairs, [len(prompt) for _, prompt in pairs], max_tokens)
    for problem, prompt in pairs:
        if len(prompt) >= longest:
            raise ValueError(
                f"the prompt of problem {_shown(problem)} has {len(prompt)} tokens: the model's "
                "context holds "
                f"{longest}{hint}"
            )
    return [problem for problem, _ in pairs], [prompt for _, prompt in pairs]


def encode_examples(
    problems: Sequence[Problem],
    template: PromptTemplate,
    tokenizer: Tokenizer,
    longest: int,
    max_tokens: int = 0,
) -> list[Example]:
    """Return the prompt and solution tokens of every problem that has at most `max_tokens`
    of them (0: all). The prompt of a document, which has no question, is the token that
    begins plain text.

    The end-of-sequence token is part of the response. ValueError names the first problem
    that a context of `longest` tokens does not hold.
    """
    examples = []
    start = tokenizer.encode("", add_special_tokens=True) or [tokenizer.eos_id]
    for problem in problems:
        response = [
            *encode_response(tokenizer, render_response(problem, template)),
            tokenizer.eos_id,
        ]
        prompt = (
            encode_prompt(problem, template, tokenizer) if problem.question else start
        )
        examples.append(Example(prompt, response))
    pairs = list(zip(problems, examples, strict=True))
    pairs = _short_enough(pairs, list(map(len, examples)), max_tokens)
    for problem, example in pairs:
        if len(example) > longest:
            raise ValueError(
                f"problem {_shown(problem)} with its solution has {len(example)} tokens: "
                "the model's context holds "
                f"{longest}{LEAVE_OUT}"
            )
    return [example for _, example in pairs]


def encode_prompt(
    problem: Problem, template: PromptTemplate, tokenizer: Tokenizer
) -> list[int]:
    """Return the tokens of a prompt.

    A chat template writes its own special tokens; plain text gets those that the tokenizer
    puts around it.
    """
    text = render_prompt(problem, template, tokenizer.apply_chat_template)
    return tokenizer.encode(text, add_special_tokens=not template.chat)


def _short_enough(
    items: Sequence[T], lengths: Sequence[int], max_tokens: int
) -> list[T]:
    """Return the items of at most `max_tokens` tokens (0: all), and say how many are left out.

    ValueError where none is left.
    """
    if not max_tokens:
        return list(items)
    kept = [
        item
        for item, length in zip(items, lengths, strict=True)
        if length <= max_tokens
    ]
    if items and not kept:
        raise ValueError(
            f"max_tokens = {max_tokens} leaves no problem: the shortest has {min(lengths)} tokens"
        )
    if left_out := len(items) - len(kept):
        say(
            f"{left_out} of {len(items)} problems have more than max_tokens = {max_tokens} tokens "
            "and are left out"
        )
    return kept


def _shown(problem: Problem) -> str:
    """Return the id on one line."""
    return " ".join(problem.id.split())


def sampling_options(section: settings.Sampling) -> dict[str, object]:
    """Return the section as keyword arguments of `Sampler.generate`."""
    options = asdict(section)
    for of_the_sampler in ("slots", "exact", "dtype", "keep"):
        del options[of_the_sampler]
    return options


def build_sampler(
    section: settings.Sampling,
    model: Transformer,
    tokenizer: Tokenizer,
    kind: type[Sampler] = Sampler,
) -> Sampler:
    """Make the sampler that the section describes.

    With `exact` the model's forward pass is made exact as well.
    """
    model.exact = section.exact
    dtype = getattr(torch, section.dtype) if section.dtype else None
    return kind(
        model, tokenizer, section.slots, section.exact, dtype, keep=section.keep
    )


def build_scorers(
    config: settings.GRPOConfig, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> list[Scorer]:
    """Make the scorers of the policy's solutions of `problems`: the verifier first, which
    gives rewards, then those that add to them.
    """
    made = [build(config, tokenizer, problems) for build in SCORERS.values()]
    scorers = [scorer for scorer in made if scorer]
    return scorers if ranks.count() == 1 else list(map(SharedScorer, scorers))


def build_verifier(
    config: settings.GRPOConfig, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> VerifiedReward:
    """Make the scorer of the weighted rewards of [reward]."""
    section = config.reward
    return VerifiedReward(
        RewardSet(
            section.weights,
            section.params,
            section.lenient,
            config.prompt.reasoning_ends,
        )
    )


def build_process_reward(
    config: settings.GRPOConfig, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> ProcessReward | None:
    """Make the scorer of steps that [process] names, None where it names none.

    The oracle knows the `problems`; a PRM computes where the policy does, and in its dtype.
    """
    if not config.process.prm:
        return None
    watching = build_watcher(
        config.process, tokenizer, problems, config.model, config.run.seed
    )
    if (a := config.algorithm).credit == "off":
        return watching
    credit = partial(
        algorithms.credit,
        form=a.credit,
        temperature=a.credit_temperature,
        eta=a.credit_eta,
    )
    return replace(watching, credit=credit)


def build_watcher(
    section: settings.Process,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    model: settings.Model,
    seed: int,
) -> ProcessReward:
    """Make a scorer that scores steps for the log, and rewards none."""
    known = partial(oracle_scores, problems) if section.prm == "oracle" else None
    scorer = known or build_scorer(section.prm, model, seed)
    split = (
        section.steps,
        section.least_tokens,
        section.most_steps,
        section.drop_repeats,
    )
    return ProcessReward(scorer, tokenizer, None, *split)


def build_scorer(name: str, section: settings.Model, seed: int = 0) -> StepScorer:
    """Return the control of that name, "random" or "length", or load the PRM that is there
    onto the section's device.
    """
    if name in ("random", "length"):
        return partial(random_scores, seed=seed) if name == "random" else length_scores
    device = choose_device(section.device)
    shape = shape_of(section, name)
    dtype, _ = settle(section.dtype, "model.dtype", shape, device, TRAINED_ROWS)
    return load_prm(name, device, getattr(torch, dtype))


def build_judge_reward(
    config: settings.GRPOConfig, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> JudgeReward | None:
    """Make the judge of right answers, None where [judge] names none.

    ValueError for a judge whose answers are nonsense.
    """
    section = config.judge
    model = config.model
    if not section.path:
        return None
    device = choose_device(model.device)
    dtype = getattr(torch, model.dtype)
    frozen = load_model(section.path, device, dtype).requires_grad_(False)
    judge = Judge(frozen, load_tokenizer(section.path))
    if section.template:
        fields = ["{question}", "{first}", *(["{second}"] if section.opponents else [])]
        if lacking := [field for field in fields if field not in section.template]:
            raise ValueError(f"judge.template lacks {', '.join(lacking)}")
        if section.opponents:
            judge.pairwise = section.template
        else:
            judge.pointwise = section.template
    judge.check(problems[0].question, problems[0].answer)
    return JudgeReward(judge, section.weight, section.opponents)


SCORERS = {
    "verifier": build_verifier,
    "process": build_process_reward,
    "judge": build_judge_reward,
}


def needs_start(config: settings.GRPOConfig) -> bool:
    """Return whether the KL to the starting model is measured, or a loss, the value model or the
    teacher is made from it.
    """
    a = config.algorithm
    return (
        config.grpo.measure_kl
        or a.kl_coef > 0
        or a.advantage == "preference"
        or a.baseline == "value"
        or config.teacher.path == "start"
    )
