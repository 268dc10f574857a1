"""Every key of every config, with its meaning, where it stands; `python -m nanomath config`
prints the same as a page.

`SFTConfig` and `GRPOConfig` are what train_sft.py and train_grpo.py read, `EvalConfig` and
`SampleConfig` what the commands `eval` and `sample` take on the command line. They share the
sections below.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanomath import algorithms
from nanomath.config import option, section
from nanomath.rewards.extraction import REASONING_ENDS

MAX_SEED = 2**32 - 1
STEP_ENDS = (
    "blank_line",
    "line",
    "step_k",
)  # the keys of SEPARATORS in nanomath/process/steps.py


@dataclass
class Run:
    """The run: its name, its length, and what it keeps."""

    name: str = option("run", "the run is written to DIRECTORY/NAME")
    directory: str = option("runs", "where runs are written")
    seed: int = option(0, "seed of everything random in the run", minimum=0, maximum=MAX_SEED)
    steps: int = option(100, "optimizer steps (SFT) or rollouts (GRPO)", minimum=1)
    eval_every: int = option(
        0,
        "steps between measurements on held-out problems, 0: only before and after",
        minimum=0,
    )
    save_every: int = option(0, "steps between checkpoints, 0: only at the end", minimum=0)
    keep_last: int = option(2, "how many checkpoints to keep, 0: all of them", minimum=0)
    keep_best: bool = option(
        False, "also keep the best by held-out pass@1, as checkpoints/best"
    )
    minutes: float = option(
        0.0, "save and stop before so many minutes have passed, 0: no limit", minimum=0
    )
    on_collapse: str = option(
        "warn",
        "when accuracy collapses, or falls while a PRM's scores rise (see the alarms): say so, or save and stop",
        choices=("warn", "stop"),
    )
    threads: int = option(0, "CPU threads, 0: let torch decide", minimum=0)
    deterministic: str = option(
        "auto",
        "only algorithms that give the same bits every time; auto: on a CPU",
        choices=("auto", "true", "false"),
    )

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name is empty: a run needs a directory of its own")


@dataclass
class Model:
    """The model to start from: a checkpoint, or a new one with fresh weights."""

    path: str = option(
        "", "HF directory, run directory or hub id; empty: a new model for the embedded world"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = option(
        "float32", "what it computes in", choices=("float32", "bfloat16", "float16")
    )
    gradient_checkpointing: bool = option(
        False, "recompute each layer in the backward pass to save memory"
    )
    sharded: bool = option(
        False, "torchrun: cut the weights over the ranks (FSDP2) instead of copying them"
    )
    hidden_size: int = option(128, "width of a new model", minimum=1)
    layers: int = option(4, "layers of a new model", minimum=1)
    heads: int = option(4, "query heads of a new model", minimum=1)
    kv_heads: int = option(2, "key/value heads of a new model", minimum=1)
    intermediate_size: int = option(
        352, "width of a new model's feed-forward network", minimum=1
    )
    max_positions: int = option(512, "context length of a new model", minimum=2)


@dataclass
class Problems:
    """A problem set: the embedded world, a file, or a hub dataset."""

    source: str = option(
        "world",
        '"world", a .jsonl/.json/.tsv/.csv file (also .gz), or a hub id org/name[:config]',
    )
    split: str = option(
        "train", "split of the world (train, validation, test) or of a hub dataset"
    )
    skip: int = option(0, "leave out the first so many rows of a file", minimum=0)
    limit: int = option(
        0, "use at most so many problems, 0: all (20000 of the world)", minimum=0
    )
    max_tokens: int = option(
        0,
        "leave out problems whose prompt, or in SFT prompt and solution, is longer; 0: one too long stops",
        minimum=0,
    )
    families: list[str] = option(["maths"], "world: families in equal parts")
    difficulty: list[int] = option(
        [1, 4], "world: least and greatest number of steps", minimum=1, maximum=8
    )
    direct: float = option(
        0.0, "world: share of the solutions that state the answer alone", minimum=0, maximum=1
    )
    languages: list[str] = option(["en"], "world: languages in turn", choices=("en", "ja"))
    question: list[str] = option(
        [],
        "file: fields of the question (or prompt.0.content), joined; empty: the usual names",
    )
    answer: str = option(
        "",
        "file: field of the gold answer (or reward_model.ground_truth); empty: the usual names",
    )
    solution: str = option("", "file: field of the worked solution; empty: the usual names")
    id: str = option("", "file: field of the id; empty: the usual names, or the row")
    answer_after: str | None = option(
        None, "file: the gold answer follows this marker; none: #### where there is one"
    )
    remove: str = option(
        "", "file: regular expression deleted from solutions (GSM8K: <<[^>]*>>)"
    )
    header: bool = option(
        True, "file: whether a .tsv or .csv names its columns; without it they are 0, 1, ..."
    )

    def __post_init__(self) -> None:
        if len(self.difficulty) != 2 or self.difficulty[0] > self.difficulty[1]:
            raise ValueError(f"difficulty is {self.difficulty}: expected [least, greatest]")


@dataclass
class Prompt:
    """How a problem becomes a prompt, and its solution a response."""

    chat: bool = option(True, "put the question into the tokenizer's chat template")
    system: str = option("", "system message of the chat")
    template: str = option(
        "{question}",
        "the question as the model sees it; any field of the problem may stand in {}",
    )
    response: str = option(
        "{solution}",
        "what fine-tuning teaches to answer; any field of the problem may stand in {}",
    )
    few_shot: list[dict[str, str]] = option(
        [], "worked examples shown first, each with question and solution"
    )
    reasoning_ends: list[str] = option(
        list(REASONING_ENDS),
        "marks that end a completion's reasoning: an answer counts after the last of them",
    )


@dataclass
class Optim:
    """AdamW and its learning-rate schedule."""

    lr: float = option(1e-5, "peak learning rate", above=0)
    schedule: str = option(
        "cosine", "what follows the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup: int = option(0, "steps over which the rate rises", minimum=0)
    final: float = option(0.0, "rate at the end as a share of the peak", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "decay of matrices; vectors never decay", minimum=0)
    beta1: float = option(0.9, "decay of the mean gradient", minimum=0, below=1)
    beta2: float = option(0.95, "decay of the mean squared gradient", minimum=0, below=1)
    eps: float = option(1e-8, "added to the root of the mean squared gradient", above=0)
    max_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    state_dtype: str = option(
        "float32", "what Adam's two means are kept in", choices=("float32", "bfloat16")
    )
    device: str = option(
        "",
        "where float32 weights and Adam's means are kept; empty: beside the model",
        choices=("", "cpu"),
    )


@dataclass
class SFT:
    """The supervised step."""

    batch_size: int = option(32, "problems a step", minimum=1)
    token_budget: int = option(
        16384, "padded tokens computed at once; the gradient does not depend on it", minimum=0
    )
    row_length: int = option(
        0, "pack problems into rows of so many tokens, 0: one a row", minimum=0
    )
    aggregation: str = option(
        "token", "mean over tokens, or over sequences", choices=("token", "sequence")
    )
    dft: bool = option(
        False, "weigh each token by its own probability (DFT, arXiv 2508.05629)"
    )
    neftune_alpha: float = option(
        0.0, "noise on the embeddings (NEFTune, arXiv 2310.05914), usually 5", minimum=0
    )


@dataclass
class Sampling:
    """How completions are drawn."""

    temperature: float = option(1.0, "0 is greedy", minimum=0)
    top_k: int = option(0, "keep the k likeliest tokens, 0: all", minimum=0)
    top_p: float = option(
        1.0, "keep the likeliest tokens that make up this share", above=0, maximum=1
    )
    min_p: float = option(
        0.0, "drop tokens less likely than this share of the likeliest", minimum=0, maximum=1
    )
    max_new_tokens: int = option(256, "longest completion in tokens", minimum=1)
    stop: list[str] = option([], "strings that end a completion")
    slots: int = option(64, "sequences decoded side by side", minimum=1)
    exact: bool = option(
        False,
        "logprobs bit for bit those of the training pass, and completions that depend on no slots or order",
    )
    dtype: str = option(
        "",
        "what the sampler computes in; empty: what the model does",
        choices=("", "float32", "bfloat16", "float16"),
    )
    keep: bool = option(
        True, "on a GPU keep the cache between rollouts; false leaves its memory to training"
    )


@dataclass
class Reward:
    """What a completion is worth: the weighted sum of components, each logged apart."""

    weights: dict[str, float] = option(
        {"accuracy": 1.0}, "weight of each reward; see nanomath/rewards/functions.py"
    )
    params: dict[str, dict[str, float]] = option(
        {}, "parameters of a reward, as {cosine = {max_length = 2000}}"
    )
    lenient: bool = option(False, "without a marked answer take the last number of the text")


@dataclass
class Process:
    """Rewards for the steps of a solution, which algorithm.credit turns into advantages."""

    prm: str = option(
        "",
        'directory or hub id of a process reward model, or "oracle" (of the world), "random", "length"; empty: none',
    )
    weight: float = option(
        1.0,
        "what the rewards of steps are multiplied by before they are added to [reward]",
        minimum=0,
    )
    steps: str = option("blank_line", "what ends a step", choices=STEP_ENDS)
    least_tokens: int = option(1, "shorter steps are merged into the next", minimum=1)
    most_steps: int = option(
        0, "what comes after so many steps is merged into the last of them, 0: any", minimum=0
    )
    drop_repeats: bool = option(
        False, "a step that repeats an earlier one is merged into the one before"
    )
    token_budget: int = option(16384, "padded tokens that the model scores at once", minimum=0)


@dataclass
class Judge:
    """AI feedback: a frozen language model that ranks right answers."""

    path: str = option("", "HF directory, run directory or hub id of the judge; empty: none")
    mode: str = option(
        "pairwise",
        "compare samples of a problem, or mark each",
        choices=("pairwise", "pointwise"),
    )
    weight: float = option(
        0.3, "a right answer earns weight * (judge - 1/2) more", minimum=0, maximum=1
    )
    opponents: int = option(
        4, "pairwise: samples that each is compared with, in both orders", minimum=1
    )
    pointwise: str = option(
        "", "the question, with {question} and {first}; empty: nanomath/process/judge.py's"
    )
    pairwise: str = option(
        "", "the question, with {question}, {first} and {second}; empty: the same"
    )
    token_budget: int = option(16384, "padded tokens that the judge reads at once", minimum=0)


@dataclass
class Algorithm:
    """What is computed from a rollout: a method, or any choice of its own; formulas in
    nanomath/algorithms.
    """

    PRESET = ("method", algorithms.PRESETS)  # not a key: no annotation

    method: str = option(
        "grpo", "the row of PRESETS that the other keys start from", choices=algorithms.PRESETS
    )
    baseline: str = option(
        "group",
        "what a reward is compared with: its group's mean, the mean of the others, nothing, or a value model",
        choices=lambda: (*algorithms.BASELINES, "off", "value"),
    )
    credit: str = option(
        "off",
        "how the scores of steps become their rewards (nanomath/algorithms/credit.py); off: they are not rewarded",
        choices=lambda: (*algorithms.CREDITS, "off"),
    )
    credit_temperature: float = option(
        0.1,
        "credit min: temperature of the softmax over steps that picks the lowest score",
        above=0,
    )
    credit_eta: float = option(
        0.5, "credit clip, clip_delta: a step's reward is min(score - eta, 0)", minimum=0
    )
    components: str = option(
        "sum",
        "several rewards: sum them before advantages are taken, or take advantages of each and sum those (GDPO)",
        choices=("sum", "apart"),
    )
    scale: str = option(
        "group",
        "advantages are divided by the standard deviation of the rewards of the group, of the batch, or not",
        choices=lambda: (*algorithms.SCALES, "off"),
    )
    whiten: bool = option(
        False,
        "bring the advantages of all tokens of the rollout to mean 0 and standard deviation 1",
    )
    loss: str = option(
        "",
        "module.function of a loss of one's own, f(algorithm, logprobs, tokens); empty: algorithms/objective.py's",
    )
    ratio: str = option(
        "token",
        "importance ratio: per token, per sequence (GSPO), or off",
        choices=algorithms.RATIOS,
    )
    clip: str = option(
        "ppo",
        "what bounds the ratio: PPO's clip, with a bound for negative advantages (dual), CISPO's weight, or nothing",
        choices=algorithms.CLIPS,
    )
    clip_low: float = option(
        0.2, "the ratio's range begins at 1 - clip_low", minimum=0, maximum=1
    )
    clip_high: float = option(0.2, "the ratio's range ends at 1 + clip_high", minimum=0)
    dual_clip: float = option(
        3.0, "clip dual: largest ratio that counts where the advantage is negative", above=1
    )
    aggregation: str = option(
        "sequence",
        "token losses are averaged over all tokens, within sequences first, or divided by a constant (Dr. GRPO)",
        choices=algorithms.AGGREGATIONS,
    )
    kl_coef: float = option(
        0.04, "weight of the KL to the starting model; it is logged at 0 as well", minimum=0
    )
    kl_estimator: str = option(
        "k3",
        "estimator of the KL that is penalised (http://joschu.net/blog/kl-approx.html)",
        choices=algorithms.KL_ESTIMATORS,
    )
    kl_in: str = option(
        "loss",
        "the KL is a term of the loss, or is subtracted from the reward of each token",
        choices=("loss", "reward"),
    )
    kl_correction: str = option(
        "off",
        "KL in the loss: multiply it by the importance ratio, as a constant weight or with the ratio's gradient",
        choices=algorithms.KL_CORRECTIONS,
    )
    old_logprobs: str = option(
        "trainer",
        "pi_old of the ratio: logprobs computed by the trainer, or those of the sampler",
        choices=("trainer", "sampler"),
    )
    sampler_correction: str = option(
        "off",
        "multiply token losses by trainer / sampler probability, cut off at a largest value, or 0 outside a range",
        choices=lambda: (*algorithms.SAMPLER_CORRECTIONS, "off"),
    )
    correction_low: float = option(
        0.5, "sampler_correction mask: the range begins here", minimum=0
    )
    correction_high: float = option(
        2.0, "sampler_correction: largest weight (truncate), end of the range (mask)", above=0
    )
    overlong_filter: bool = option(
        False, "completions cut off at the length limit carry no loss"
    )
    keep_groups: str = option(
        "all",
        "dynamic sampling: train on groups with right and wrong answers only, or with unequal rewards only",
        choices=("all", "mixed", "uneven"),
    )
    refills: int = option(
        0,
        "dynamic sampling: how often more problems are sampled in place of others",
        minimum=0,
    )
    covariance: str = option(
        "off",
        "tokens whose advantage and logprob vary together most: no gradient (Clip-Cov), or a penalty (KL-Cov)",
        choices=("off", "clip", "kl"),
    )
    covariance_share: float = option(
        2e-4, "covariance: share of tokens that are clipped or penalised", above=0, maximum=1
    )
    covariance_coef: float = option(
        1.0, "KL-Cov: weight of the penalty |log pi - log pi_old|", minimum=0
    )
    top_entropy: float = option(
        1.0,
        "share of tokens, those of highest entropy, that have a policy gradient",
        above=0,
        maximum=1,
    )
    gamma: float = option(1.0, "discount (baseline off, value)", minimum=0, maximum=1)
    lam: float = option(
        0.95,
        "lambda of generalised advantage estimation (baseline value)",
        minimum=0,
        maximum=1,
    )
    value_trunk: str = option(
        "own", "value model: a copy of the model, or its states", choices=("own", "shared")
    )
    value_coef: float = option(0.5, "weight of the value loss", minimum=0)
    value_clip: float = option(
        0.2,
        "value model: a value may move so far in one rollout before its loss is clipped",
        above=0,
    )
    value_lr: float = option(
        1e-4, "peak learning rate of the value model; the schedule is the policy's", above=0
    )
    epochs: int = option(1, "passes over each rollout", minimum=1)
    minibatches: int = option(1, "optimizer steps in each pass", minimum=1)

    def __post_init__(self) -> None:
        algorithms.check(self)


@dataclass
class GRPO:
    """Sizes of the policy step."""

    prompts: int = option(16, "problems a rollout", minimum=1)
    group_size: int = option(8, "samples of each problem", minimum=1)
    reference_device: str = option(
        "", "where the frozen reference lives; empty: beside the model"
    )
    token_budget: int = option(
        16384, "padded tokens computed at once; the gradient does not depend on it", minimum=0
    )
    logged_groups: int = option(
        2, "groups of each rollout written to rollouts.jsonl", minimum=0
    )


@dataclass
class Evaluation:
    """How held-out problems are measured."""

    samples: int = option(4, "completions of each problem", minimum=1)
    k: list[int] = option(
        [1], "report pass@k and maj@k for these k, at most `samples`", minimum=1
    )
    by: str = option(
        "", "also report pass@1 by this metadata key of the problems, such as difficulty"
    )
    seed: int = option(
        0, "seed of the samples and of the bootstrap", minimum=0, maximum=MAX_SEED
    )


@dataclass
class SFTConfig:
    """Fine-tune a model on worked solutions."""

    run: Run = section(Run)
    model: Model = section(Model)
    train: Problems = section(Problems)
    heldout: Problems = section(Problems, split="validation", limit=256)
    prompt: Prompt = section(Prompt)
    optim: Optim = section(Optim)
    sft: SFT = section(SFT)
    sampling: Sampling = section(Sampling)
    evaluation: Evaluation = section(Evaluation)


@dataclass
class GRPOConfig:
    """Improve a model by reinforcement: sample groups, reward them, follow the policy
    gradient.
    """

    run: Run = section(Run)
    model: Model = section(Model)
    train: Problems = section(Problems)
    heldout: Problems = section(Problems, split="validation", limit=256)
    prompt: Prompt = section(Prompt)
    sampling: Sampling = section(Sampling)
    reward: Reward = section(Reward)
    process: Process = section(Process)
    judge: Judge = section(Judge)
    algorithm: Algorithm = section(Algorithm)
    grpo: GRPO = section(GRPO)
    optim: Optim = section(Optim, lr=1e-6)
    evaluation: Evaluation = section(Evaluation)

    def __post_init__(self) -> None:
        if self.grpo.group_size < 2 and algorithms.has_group_baseline(self.algorithm):
            raise ValueError(
                f"grpo.group_size = {self.grpo.group_size}, but algorithm.baseline = {self.algorithm.baseline!r} "
                "compares the samples of a problem with one another: take at least 2"
            )
        if self.sampling.exact and self.sampling.dtype not in ("", self.model.dtype):
            raise ValueError(
                f"sampling.exact with sampling.dtype = {self.sampling.dtype!r} and model.dtype = {self.model.dtype!r}: "
                "logprobs can only be equal in the same dtype"
            )
        if self.algorithm.credit != "off" and not self.process.prm:
            raise ValueError(
                f"algorithm.credit = {self.algorithm.credit!r} rewards steps of solutions, but process.prm is empty: "
                'name a process reward model, or "oracle", "random", "length"'
            )
        if self.algorithm.minibatches > (episodes := self.grpo.prompts * self.grpo.group_size):
            raise ValueError(
                f"algorithm.minibatches = {self.algorithm.minibatches}, but a rollout has {episodes} episodes"
            )


@dataclass
class EvalConfig:
    """Measure a model on a problem set."""

    model: Model = section(Model)
    problems: Problems = section(Problems, split="test", limit=256)
    prompt: Prompt = section(Prompt)
    sampling: Sampling = section(Sampling)
    evaluation: Evaluation = section(Evaluation)
    process: Process = section(Process)
    aggregate: str = option(
        "min",
        "process.prm: a completion's score for best@k and wmaj@k, from those of its steps",
        choices=("min", "last", "product", "mean"),
    )
    lenient: bool = option(False, "without a marked answer take the last number of the text")
    save: str = option("", "write every completion to this JSONL file")


@dataclass
class SampleConfig:
    """Ask a model a question."""

    model: Model = section(Model)
    prompt: Prompt = section(Prompt)
    sampling: Sampling = section(Sampling, temperature=0.0)
    seed: int = option(0, "seed of the sample", minimum=0, maximum=MAX_SEED)


@dataclass
class Labelling:
    """How solutions are drawn, and their steps labelled."""

    by: str = option(
        "oracle",
        "the world's oracle, or the share of continuations that are right",
        choices=("oracle", "monte_carlo"),
    )
    save: str = option(
        "",
        "JSONL file that labelled solutions are appended to; problems that it has are left out",
    )
    samples: int = option(4, "solutions of each problem; of equal ones one is kept", minimum=1)
    rollouts: int = option(8, "monte_carlo: continuations of every step", minimum=1)
    hard: bool = option(
        False,
        "monte_carlo: 1 where a continuation is right, else 0, instead of the share that is",
    )
    steps: str = option("blank_line", "what ends a step", choices=STEP_ENDS)
    problems_at_once: int = option(64, "problems between two writes to the file", minimum=1)
    seed: int = option(0, "seed of the samples", minimum=0, maximum=MAX_SEED)


@dataclass
class LabelConfig:
    """Draw solutions from a model and label their steps."""

    model: Model = section(Model)
    problems: Problems = section(Problems)
    prompt: Prompt = section(Prompt)
    sampling: Sampling = section(Sampling)
    label: Labelling = section(Labelling)


@dataclass
class PRM:
    """A process reward model and what it learns from."""

    format: str = option(
        "token_classification",
        "what it is built as",
        choices=("token_classification", "qwen", "math_shepherd"),
    )
    train: str = option(
        "", "file of labelled solutions (trl, Math-Shepherd, PRM800K, ProcessBench)"
    )
    heldout: str = option("", "file of labelled solutions to measure on")
    limit: int = option(0, "use at most so many held-out solutions, 0: all", minimum=0)
    neutral: str = option(
        "right", "what PRM800K's neutral rating counts as", choices=("right", "wrong", "skip")
    )
    batch_size: int = option(32, "solutions a step", minimum=1)
    token_budget: int = option(
        16384, "padded tokens computed at once; the gradient does not depend on it", minimum=0
    )
    head_steps: int = option(0, "steps in which only the new head learns", minimum=0)
    balance: bool = option(True, "right and wrong steps count for as much in all")

    def __post_init__(self) -> None:
        if self.head_steps and self.format == "math_shepherd":
            raise ValueError(
                "head_steps trains a new head first, but the format math_shepherd has none"
            )


@dataclass
class PRMConfig:
    """Train a process reward model on labelled solutions, from any causal language model."""

    run: Run = section(Run, name="prm")
    model: Model = section(Model)
    prm: PRM = section(PRM)
    optim: Optim = section(Optim)


@dataclass
class PRMEvalConfig:
    """Measure a process reward model on labelled solutions."""

    model: Model = section(Model)
    neutral: str = option(
        "right", "what PRM800K's neutral rating counts as", choices=("right", "wrong", "skip")
    )
    limit: int = option(0, "use at most so many solutions, 0: all", minimum=0)
    threshold: float = option(
        0.5, "a step is called wrong below this score", minimum=0, maximum=1
    )
    token_budget: int = option(16384, "padded tokens computed at once", minimum=0)
    save: str = option("", "write the scores of every solution to this JSONL file")
