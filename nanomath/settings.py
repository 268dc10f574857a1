"""Every key of every config, with its meaning, where it stands.

`SFTConfig` and `GRPOConfig` are what train_sft.py and train_grpo.py read; the other classes
that end in `Config` are read by the commands. They share the sections below.
`python -m nanomath config` prints all of it as a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from nanomath import algorithms
from nanomath.config import option, section
from nanomath.data.benchmarks import BENCHMARKS, GROUPS
from nanomath.data.world import FAMILIES
from nanomath.data.world.family import LANGUAGES
from nanomath.process.formats import FORMATS
from nanomath.process.labelled import NEUTRAL
from nanomath.process.rewards import AGGREGATES
from nanomath.process.steps import SEPARATORS
from nanomath.rewards.extraction import REASONING_ENDS

MAX_SEED = 2**32 - 1
DTYPES = ("float32", "bfloat16", "float16")
CONFIDENCES = (  # nanomath/analysis/confidence.py
    *("majority", "mean_logprob"),
    *("deepconf_mean", "deepconf_tail", "deepconf_lowest", "deepconf_bottom"),
    *("self_certainty", "prm", "p_true"),
)
LINEAR_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)

# Keys by the numbers that they may have: from 1 on, from 0 on, above 0, from 0 to 1.
count = partial(option, minimum=1)
amount = partial(option, minimum=0)
positive = partial(option, above=0)
share = partial(option, minimum=0, maximum=1)
random_seed = partial(option, 0, minimum=0, maximum=MAX_SEED)
tokens_at_once = partial(
    amount,
    16384,
    "tokens computed at once, a shared prompt counted once; it changes no gradient; 0: all; "
    "auto: what is fast and fits into free memory as the run begins, and is then kept",
    word="auto",
)


@dataclass
class Run:
    """The run: its name, its length, and what it keeps."""

    name: str = option("run", "the run is written to DIRECTORY/NAME")
    directory: str = option("runs", "the directory that runs are written to")
    seed: int = random_seed("everything random in the run depends on this seed")
    steps: int = count(
        100, "how many optimizer steps (SFT, PRM) or rollouts (GRPO) the run has"
    )
    eval_every: int = amount(
        0,
        "held-out problems are measured every so many steps; 0: only before and after the run",
    )
    save_every: int = amount(
        0, "a checkpoint is saved every so many steps; 0: only at the end"
    )
    keep_last: int = amount(
        2, "how many of the newest checkpoints are kept; 0: all of them"
    )
    keep_best: bool = option(
        False,
        "also keep the checkpoint with the best held-out score, as checkpoints/best",
    )
    minutes: float = amount(
        0.0, "save and stop before so many minutes have passed; 0: no limit"
    )
    tokens: int = amount(
        0,
        "the run is done once it has sampled (GRPO) or trained on (SFT) so many tokens, of answers "
        "alone, or after run.steps; the learning rate follows the share used; 0: no limit",
    )
    seconds: float = amount(
        0.0,
        "the same for the seconds of its steps, without measuring and saving; such a run is never "
        "the same twice; 0: no limit",
    )
    on_collapse: str = option(
        "warn",
        "when accuracy collapses, or falls while a PRM's scores rise (see the alarms): warn, save "
        "and stop, or end the run as done once the alarm has lasted for 20 steps",
        choices=("warn", "stop", "end"),
    )
    track: list[str] = option(
        [],
        "where metrics go beside metrics.jsonl, for those who have dashboards",
        choices=("tensorboard",),
    )
    threads: int = amount(0, "how many CPU threads torch uses; 0: torch decides")
    deterministic: str = option(
        "auto",
        "use only algorithms that give the same bits every time; auto: on a CPU",
        choices=("auto", "true", "false"),
    )

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name is empty: a run needs a directory of its own")


@dataclass
class NewModel:
    """The shape of a new model with fresh weights, made where model.path is empty."""

    hidden_size: int = count(128, "width of the hidden states")
    layers: int = count(4, "number of layers")
    heads: int = count(4, "number of query heads; they divide hidden_size")
    kv_heads: int = count(2, "number of key/value heads; they divide heads")
    intermediate_size: int = count(352, "width of the feed-forward network")
    max_positions: int = option(512, "context length in tokens", minimum=2)

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide hidden_size = {self.hidden_size}"
            )


@dataclass
class Model:
    """The model to start from, and how it computes."""

    path: str = option(
        "",
        "HF directory, run directory or hub id of a checkpoint or an adapter; empty: a new "
        "model for the embedded world",
    )
    base: str = option(
        "",
        "where path is an adapter: the model it was trained on; empty: what the adapter names",
    )
    device: str = option(
        "auto",
        "device the model is on: cpu, cuda, cuda:1, ...; auto: cuda where there is one",
    )
    dtype: str = option(
        "float32",
        "dtype the model computes in; auto: float32, or bfloat16 where it is 1.5 times as fast on "
        "this machine; float16 is not for training",
        choices=("auto", *DTYPES),
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute each layer in the backward pass, which saves memory and costs time",
    )
    sharded: bool = option(
        False,
        "under torchrun: cut the weights over the ranks (FSDP2) instead of copying them",
    )
    new: NewModel = section(NewModel)


@dataclass
class LoRA:
    """Adapters that are trained in place of the weights (nanomath/models/lora.py)."""

    rank: int = amount(
        0,
        "rank of the adapters; the weights stay as they are, and checkpoints hold the adapters "
        "alone; 0: no adapters, the weights are trained",
    )
    alpha: float = positive(32.0, "what an adapter gives is multiplied by alpha / rank")
    targets: list[str] = option(
        list(LINEAR_LAYERS),
        "linear layers of every block that have an adapter",
        choices=LINEAR_LAYERS,
    )

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets is empty: name at least one linear layer")


@dataclass
class World:
    """Problems of the embedded world, where the source is "world"."""

    families: list[str] = option(
        ["maths"],
        "families of problems, in equal parts as far as each has so many",
        choices=FAMILIES,
    )
    difficulty: list[int] = count(
        [1, 4], "least and greatest number of steps of a solution", maximum=8
    )
    documents: int = amount(
        0,
        "for pre-training: texts without a prompt in place of problems, each of at most so many "
        "problems of one kind, or a statement of facts; 0: problems",
    )
    shots: int = amount(
        0,
        "the field {shots} for prompt.template: so many worked problems of the same kind; 0: none",
    )
    direct: float = share(0.0, "share of the solutions that state the answer alone")
    wordy: float = share(
        0.0, "share of the solutions that say something idle before every step"
    )
    languages: list[str] = option(
        ["en"], "languages of the questions, which take turns", choices=LANGUAGES
    )

    def __post_init__(self) -> None:
        if not self.families:
            raise ValueError("families is empty: name at least one family of the world")
        if len(self.difficulty) != 2 or self.difficulty[0] > self.difficulty[1]:
            raise ValueError(
                f"difficulty is {self.difficulty}: expected [least, greatest]"
            )
        if self.direct + self.wordy > 1:
            raise ValueError(
                f"direct = {self.direct} and wordy = {self.wordy} are shares: more than 1 in all"
            )


@dataclass
class File:
    """How a file or a hub dataset is read: the fields of its rows, and which rows count."""

    question: list[str] = option(
        [],
        "fields of the question (or prompt.0.content), joined with a space; empty: the usual names",
    )
    answer: str = option(
        "",
        "field of the gold answer (or reward_model.ground_truth); empty: the usual names",
    )
    solution: str = option("", "field of the worked solution; empty: the usual names")
    id: str = option(
        "", "field of the id; empty: the usual names, or else the number of the row"
    )
    answer_after: str = option(
        "auto",
        "the gold answer is what follows this marker in its field; auto: #### where there is "
        "one; empty: the whole field is the answer",
    )
    remove: str = option(
        "",
        "regular expression whose matches are deleted from solutions (GSM8K: <<[^>]*>>)",
    )
    header: bool = option(
        True,
        "the first row of a .tsv or .csv file names its columns; false: they are called 0, 1, ...",
    )
    skip: int = amount(0, "how many rows at the beginning are left out")


@dataclass
class Problems:
    """A problem set: the embedded world, a file, or a hub dataset."""

    source: str = option(
        "world",
        '"world", a .jsonl/.json/.tsv/.csv file (also .gz), or a hub id org/name[:config]',
    )
    split: str = option(
        "train",
        "split of the world (train, validation, test; templates: unseen wordings; numbers: beyond "
        "those of train) or of a hub dataset",
    )
    limit: int = amount(
        0, "at most so many problems are used; 0: all of them (of the world 20000)"
    )
    max_tokens: int = amount(
        0,
        "problems whose prompt (in SFT: prompt and solution) has more tokens are left out; "
        "0: none is, and one that does not fit the context is an error",
    )
    pass_rate: list[float] = share(
        [0.0, 1.0],
        "with pass_rates: of these problems only those are used whose measured share of right "
        "answers is in this range, ends included",
    )
    pass_rates: str = option(
        "",
        "the eval.json of a measurement of these problems (`eval` with out=DIRECTORY); empty: none",
    )
    world: World = section(World)
    file: File = section(File)

    def __post_init__(self) -> None:
        if len(self.pass_rate) != 2 or self.pass_rate[0] > self.pass_rate[1]:
            raise ValueError(
                f"pass_rate is {self.pass_rate}: expected [least, greatest]"
            )
        if self.pass_rate != [0, 1] and not self.pass_rates:
            raise ValueError(
                f"pass_rate is {self.pass_rate}, but pass_rates names no file that says what "
                "the rates are: write one with eval and out=DIRECTORY"
            )


@dataclass
class Prompt:
    """How a problem becomes a prompt, and its solution a response."""

    chat: bool = option(True, "put the question into the tokenizer's chat template")
    system: str = option("", "system message of the chat; empty: none")
    template: str = option(
        "{question}",
        "the question as the model sees it; {question} and any other field of the problem are "
        "filled in",
    )
    response: str = option(
        "{solution}",
        "the answer that fine-tuning teaches; {solution} and any other field are filled in",
    )
    few_shot: list[dict[str, str]] = option(
        [], "worked examples that are shown first, each with question and solution"
    )
    reasoning_ends: list[str] = option(
        list(REASONING_ENDS),
        "marks that end a completion's reasoning: only an answer after the last of them counts",
    )


@dataclass
class Optim:
    """AdamW and its learning-rate schedule."""

    lr: float = positive(1e-5, "peak learning rate")
    schedule: str = option(
        "cosine",
        "how the learning rate moves after the warm-up",
        choices=("constant", "linear", "cosine"),
    )
    warmup: int = amount(0, "steps over which the learning rate rises to its peak")
    final: float = share(
        0.0, "learning rate at the end of the run, as a share of the peak"
    )
    weight_decay: float = amount(
        0.0, "AdamW's decay of the matrices; vectors never decay"
    )
    beta1: float = amount(0.9, "decay of the running mean of gradients", below=1)
    beta2: float = amount(
        0.95, "decay of the running mean of squared gradients", below=1
    )
    eps: float = positive(
        1e-8, "added to the root of the mean squared gradient before dividing by it"
    )
    max_norm: float = positive(
        1.0, "gradients with a larger norm are scaled down to this one"
    )
    l2_start: float = amount(
        0.0,
        "lambda of a penalty lambda * ||weights - those before the run||^2 (L2-SP, arXiv "
        "1802.01483), whose gradient is added before clipping; it keeps the weights once more",
    )
    state_dtype: str = option(
        "float32",
        "dtype that Adam's two running means are kept in",
        choices=("float32", "bfloat16"),
    )
    device: str = option(
        "",
        "where the float32 weights and Adam's means are kept; empty: beside the model",
        choices=("", "cpu"),
    )


@dataclass
class SFT:
    """The supervised step."""

    batch_size: int = count(32, "how many problems a step learns from")
    token_budget: int = tokens_at_once()
    aggregation: str = option(
        "token",
        "the loss is the mean over all tokens, or the mean over solutions of their means",
        choices=("token", "sequence"),
    )
    dft: bool = option(
        False, "weigh each token by its own probability (DFT, arXiv 2508.05629)"
    )
    neftune_alpha: float = amount(
        0.0,
        "size of the noise added to embeddings (NEFTune, arXiv 2310.05914), usually 5; 0: none",
    )
    kl_coef: float = amount(
        0.0,
        "weight of KL(model || the starting model) over the whole vocabulary at the solutions' "
        "tokens; 0: none",
    )


@dataclass
class Sampling:
    """How completions are drawn."""

    temperature: float = amount(
        1.0, "logits are divided by this; 0: always the likeliest token (greedy)"
    )
    top_k: int = amount(0, "draw only from the k likeliest tokens; 0: from all")
    top_p: float = positive(
        1.0,
        "draw only from the likeliest tokens that together have this probability",
        maximum=1,
    )
    min_p: float = share(
        0.0,
        "drop tokens whose probability is below this share of the likeliest token's",
    )
    max_new_tokens: int = count(256, "longest completion in tokens")
    stop: list[str] = option([], "strings that end a completion")
    slots: int = count(64, "how many sequences are decoded side by side")
    exact: bool = option(
        False,
        "logprobs are bit for bit those of the training pass, and completions do not depend on "
        "slots or order; slower",
    )
    dtype: str = option(
        "",
        "dtype the sampler computes in; empty: the dtype of the model; auto: as model.dtype",
        choices=("", "auto", *DTYPES),
    )
    keep: bool = option(
        True,
        "on a GPU keep the cache between rollouts; false: training gets its memory meanwhile",
    )


@dataclass
class Reward:
    """What a completion is worth: a weighted sum of components, each logged by itself."""

    weights: dict[str, float] = option(
        {"accuracy": 1.0},
        "weight of each reward by its name in nanomath/rewards/functions.py",
    )
    params: dict[str, dict[str, float]] = option(
        {}, "parameters of rewards by name, such as {cosine = {max_length = 2000}}"
    )
    lenient: bool = option(
        False, "where no answer is marked, take the last number of the text for it"
    )


@dataclass
class Process:
    """Rewards for the steps of a solution, which algorithm.credit turns into advantages."""

    prm: str = option(
        "",
        "what scores the steps: directory or hub id of a process reward model, or the controls "
        '"oracle" (of the world), "random", "length"; empty: nothing',
    )
    weight: float = amount(
        1.0,
        "rewards of steps are multiplied by this before they are added to those of [reward]",
    )
    steps: str = option(
        "blank_line", "what ends a step of a solution", choices=SEPARATORS
    )
    least_tokens: int = count(1, "a step of fewer tokens is merged into the next one")
    most_steps: int = amount(
        0, "all steps beyond so many are merged into the last of them; 0: no limit"
    )
    drop_repeats: bool = option(
        False, "a step that repeats an earlier one is merged into the step before it"
    )


@dataclass
class Hints:
    """The beginning of the worked solution, where a problem is too hard (docs/hints.md)."""

    chooser: str = option(
        "off",
        "what chooses the level, the share of the solution's steps that is told: groups without "
        "a right sample are sampled again at rising levels (ladder), one level for all falls "
        "during the run (schedule), each problem is held at a pass rate of one half and the "
        "hints are withdrawn at the end (controller), or an upper policy chooses by the "
        "estimated pass rate (learned)",
        choices=("off", "ladder", "schedule", "controller", "learned"),
    )
    levels: list[float] = share(
        [],
        "levels of the ladder (all 0: the same further samples without hints), of the schedule's "
        "equal parts, or to choose from; empty: 0.25, 0.5, 0.75, or 0.5, 0.25, 0, or 0, 0.25, "
        "0.5, 0.75",
    )
    place: str = option(
        "assistant",
        "where the hint stands: it begins the assistant's turn, which the sampler goes on with "
        "and no loss is on, or it ends the user's turn",
        choices=("assistant", "user"),
    )
    template: str = option(
        "\n\nThis is how a solution begins:\n\n{hint}",
        "place user: what is added to the question",
    )
    score: str = option(
        "hinted",
        "the policy whose probabilities are trained: with the hint in its prompt (hinted), or "
        "without it, weighted by pi(y|q) / pi(y|q,h) unless algorithm.ratio is off (bare, needs "
        "place user)",
        choices=("hinted", "bare"),
    )
    below: float = share(
        1.0, "only problems with an estimated pass rate below this are given hints"
    )
    start: int = amount(0, "steps before the first hint")
    gain: float = positive(
        0.5, "controller: the level moves by this times 1/2 - pass rate"
    )
    most: float = share(0.75, "controller: the highest level")
    upper_rate: float = positive(0.5, "learned: step size of the upper policy")
    transfer: float = amount(
        1.0,
        "learned: the reward 4 r (1 - r) is multiplied by exp(-transfer * reliance)",
    )
    strength: float = positive(
        2.0,
        "samples that the prediction from the prompt is worth beside those of the problem",
    )
    discount: float = positive(
        0.95,
        "what is remembered of pass rates is multiplied by this in each step",
        maximum=1,
    )

    def __post_init__(self) -> None:
        if self.chooser == "controller" and self.levels:
            raise ValueError(
                "levels are for the other choosers: the controller goes from 0 to `most`"
            )
        if self.chooser == "learned" and len(self.levels) == 1:
            raise ValueError(
                "levels has one entry: the upper policy has nothing to choose"
            )
        if "{hint}" not in self.template:
            raise ValueError(f"template is {self.template!r}: it must contain {{hint}}")
        if self.score == "bare" and self.place == "assistant":
            raise ValueError(
                'score = "bare" with place = "assistant": what follows a beginning means nothing '
                'without it; set place = "user"'
            )


@dataclass
class Judge:
    """AI feedback: a frozen language model that ranks right answers."""

    path: str = option(
        "", "HF directory, run directory or hub id of the judge; empty: none"
    )
    weight: float = share(
        0.3, "a right answer earns weight * (the judge's score - 1/2) more"
    )
    opponents: int = amount(
        4,
        "with how many other samples of its problem each sample is compared, in both orders; "
        "0: each sample is marked by itself",
    )
    template: str = option(
        "",
        "what the judge is asked, with {question} and {first}, and {second} where samples are "
        "compared; empty: the question of nanomath/process/judge.py",
    )


@dataclass
class Teacher:
    """A frozen model to learn from: by its samples (grpo.source), or by what it makes of the
    policy's (algorithm.advantage)."""

    path: str = option(
        "",
        "HF directory, run directory or hub id of a model with the same tokenizer; start: the "
        "starting model; policy: the model in training; empty: none",
    )
    device: str = option(
        "", "where a teacher of its own computes; empty: beside the model"
    )
    shows: str = option(
        "nothing",
        "what is in the prompt under which the teacher scores: the problem alone (nothing), its "
        "worked solution as well, or a right sample of the same group (sibling)",
        choices=("nothing", "solution", "sibling"),
    )
    template: str = option(
        "{question}\n\nA solution of it:\n\n{demonstration}\n\nNow solve it yourself.",
        "the question as the teacher sees it where it is shown a {demonstration}",
    )


@dataclass
class Algorithm:
    """What is computed from a rollout; nanomath/algorithms has the formulas."""

    PRESET = ("method", algorithms.PRESETS)  # not a key: no annotation

    method: str = option(
        "grpo",
        "the method (row of PRESETS) that the other keys take their defaults from",
        choices=algorithms.PRESETS,
    )
    advantage: str = option(
        "reward",
        "what a token's advantage is: its rewards against the baseline, 1, DPO's weight of a pair "
        "(preference), the teacher's logprob less the policy's (teacher), or 0 with the KL to the "
        "teacher over the whole vocabulary as the loss (teacher_full)",
        choices=lambda: ("reward", *algorithms.ADVANTAGES),
    )
    samples: str = option(
        "all",
        "which samples of a group have a loss: all, the right ones, the best one, or the first "
        "right and the first wrong one (pair)",
        choices=lambda: ("all", *algorithms.SAMPLES),
    )
    preference_beta: float = positive(
        0.1, "advantage preference: DPO's beta, on log pi / pi_ref"
    )
    baseline: str = option(
        "group",
        "subtracted from a reward: its group's mean, the mean of the others in the group, "
        "nothing, or a value model's estimate",
        choices=lambda: (*algorithms.BASELINES, "off", "value"),
    )
    credit: str = option(
        "off",
        "how the scores of a solution's steps become their rewards "
        "(nanomath/algorithms/credit.py); off: steps are not rewarded",
        choices=lambda: (*algorithms.CREDITS, "off"),
    )
    credit_temperature: float = positive(
        0.1,
        "credit min: temperature of the softmax over steps that weighs the lowest score most",
    )
    credit_eta: float = amount(
        0.5, "credit clip and clip_delta: a step's reward is min(score - eta, 0)"
    )
    components: str = option(
        "sum",
        "with several rewards: advantages are taken of their sum, or of each one apart and "
        "then summed (GDPO)",
        choices=("sum", "apart"),
    )
    scale: str = option(
        "group",
        "advantages are divided by the standard deviation of rewards in the group, in the "
        "batch, or not at all",
        choices=lambda: (*algorithms.SCALES, "off"),
    )
    whiten: bool = option(
        False,
        "bring the advantages of all tokens of the rollout to mean 0 and standard deviation 1",
    )
    loss: str = option(
        "",
        "module.function of a loss of your own, f(algorithm, logprobs, tokens); empty: the "
        "objective of nanomath/algorithms/objective.py",
    )
    ratio: str = option(
        "token",
        "importance ratio: per token, per sequence (GSPO), or off",
        choices=algorithms.RATIOS,
    )
    clip: str = option(
        "ppo",
        "what bounds the ratio: PPO's clip, the same with a second bound for negative "
        "advantages (dual), CISPO's clipped weight, or nothing (off)",
        choices=algorithms.CLIPS,
    )
    clip_low: float = share(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: float = amount(0.2, "the ratio is clipped above 1 + clip_high")
    dual_clip: float = option(
        3.0,
        "clip dual: largest ratio that counts where the advantage is negative",
        above=1,
    )
    aggregation: str = option(
        "sequence",
        "token losses are averaged over all tokens, within each sequence first, divided by a "
        "constant (Dr. GRPO), or summed in each sequence",
        choices=algorithms.AGGREGATIONS,
    )
    kl_coef: float = amount(
        0.04,
        "weight of the KL to the starting model; 0: the KL is logged but not penalised",
    )
    kl_estimator: str = option(
        "k3",
        "estimator of the KL that is penalised (http://joschu.net/blog/kl-approx.html)",
        choices=algorithms.KL_ESTIMATORS,
    )
    kl_in: str = option(
        "loss",
        "the KL is added to the loss, or is subtracted from the reward of each token",
        choices=("loss", "reward"),
    )
    kl_correction: str = option(
        "off",
        "the KL in the loss is multiplied by the importance ratio, as a constant weight or "
        "with the ratio's gradient, or not",
        choices=algorithms.KL_CORRECTIONS,
    )
    old_logprobs: str = option(
        "trainer",
        "pi_old of the ratio: logprobs that the trainer computes, or those of the sampler",
        choices=("trainer", "sampler"),
    )
    sampler_correction: str = option(
        "off",
        "token losses are multiplied by the trainer's probability / the sampler's, which is cut "
        "off at a largest value (truncate), or 0 outside a range (mask)",
        choices=lambda: (*algorithms.SAMPLER_CORRECTIONS, "off"),
    )
    correction_low: float = amount(
        0.5, "sampler_correction mask: the range begins at this weight"
    )
    correction_high: float = positive(
        2.0,
        "sampler_correction: the largest weight (truncate), or the end of the range (mask)",
    )
    overlong_filter: bool = option(
        False, "completions that were cut off at the length limit have no loss"
    )
    keep_groups: str = option(
        "all",
        "dynamic sampling: train on all groups, on those with right and wrong answers (mixed), "
        "or on those with unequal rewards (uneven)",
        choices=("all", "mixed", "uneven"),
    )
    refills: int = amount(
        0,
        "dynamic sampling: how often further problems are sampled in place of dropped groups",
    )
    covariance: str = option(
        "off",
        "tokens whose advantage and logprob vary together most have no gradient (Clip-Cov), or "
        "a penalty (KL-Cov)",
        choices=("off", "clip", "kl"),
    )
    covariance_share: float = positive(
        2e-4,
        "covariance: the share of tokens that have no gradient, or a penalty",
        maximum=1,
    )
    covariance_coef: float = amount(
        1.0, "covariance kl: weight of the penalty |log pi - log pi_old|"
    )
    top_entropy: float = positive(
        1.0,
        "only this share of the tokens, those of highest entropy, has a policy gradient",
        maximum=1,
    )
    gamma: float = share(1.0, "baseline off and value: discount of later rewards")
    lam: float = share(
        0.95, "baseline value: lambda of generalised advantage estimation"
    )
    value_trunk: str = option(
        "own",
        "the value model is a copy of the model with a head (own), or a head on the policy's "
        "hidden states (shared)",
        choices=("own", "shared"),
    )
    value_coef: float = amount(0.5, "weight of the value model's loss")
    value_clip: float = positive(
        0.2, "how far a value may move in one rollout before its loss is clipped"
    )
    value_lr: float = positive(
        1e-4, "peak learning rate of the value model; the schedule is the policy's"
    )
    epochs: int = count(1, "passes over each rollout")
    minibatches: int = count(1, "optimizer steps in each pass")

    def __post_init__(self) -> None:
        algorithms.check(self)


@dataclass
class GRPO:
    """Sizes of the policy step."""

    prompts: int = count(16, "problems of a rollout")
    group_size: int = count(8, "samples of each problem")
    sampling_seed: int = random_seed(
        "added to run.seed where completions are drawn: another one draws other samples of the "
        "same problems in the same order"
    )
    source: str = option(
        "policy",
        "where samples are from: policy, teacher, or a .jsonl file as rollouts.jsonl or what eval "
        "saves; the ratio's pi_old is the policy's before the update, unless "
        "algorithm.old_logprobs is sampler: then it is the source's",
    )
    solutions: bool = option(
        False, "the last sample of each problem is its worked solution, of logprob 0"
    )
    measure_kl: bool = option(
        True,
        "the KL to the starting model is measured where nothing is computed from it; false "
        "saves a pass over each rollout and a second model",
    )
    reference_device: str = option(
        "",
        "where the frozen reference model computes; empty: beside the model, and with "
        "lora.rank it is the model without its adapters",
    )
    token_budget: int = tokens_at_once()
    logged_groups: int = amount(
        2, "how many groups of each rollout are written to rollouts.jsonl"
    )


@dataclass
class Evaluation:
    """How held-out problems are measured."""

    samples: int = count(4, "completions of each problem")
    k: list[int] = count(
        [1], "pass@k and maj@k are reported for these k, which are at most `samples`"
    )
    by: list[str] = option(
        [],
        "pass@1 is also reported for each value of this metadata key of the problems, such as "
        "difficulty, or for each combination of the values of several; empty: of none",
    )
    seed: int = random_seed("seed of the samples and of the bootstrap")


@dataclass
class Confidence:
    """How sure a model is of its answers, and which of them a person should see."""

    measures: list[str] = option(
        [],
        "how confidence in the most frequent answer is measured; the first of these decides what "
        "a person sees; empty: it is not measured",
        choices=CONFIDENCES,
    )
    top: int = count(
        20, "deepconf: a token's confidence is of so many likeliest tokens"
    )
    window: int = count(
        16,
        "deepconf: tokens of a window, and of the tail; the authors take 2048 for long reasoning",
    )
    ask: str = option(
        "Problem: {question}\n\nProposed answer: {answer}\n\nIs the proposed answer right?\n"
        "A: it is right\nB: it is wrong\n\nAnswer with A or B, and nothing else.",
        "p_true: what the model is asked, with {question} and {answer}; A says that it is right",
    )
    target: float = positive(
        0.95, "accuracy that answers without a person should have", maximum=1
    )
    validation: float = positive(
        0.5,
        "share of the problems on which thresholds are chosen; the others are the test",
        below=1,
    )
    cluster: str = option(
        "template",
        "problems with the same value of this metadata key are drawn together, and are never "
        "divided between validation and test",
    )
    handoff: str = option(
        "",
        "answers of the test that a person should see are written to this JSONL file; empty: none",
    )

    def __post_init__(self) -> None:
        if len(set(self.measures)) < len(self.measures):
            raise ValueError(f"measures is {self.measures}: one is there twice")
        if self.handoff and not self.measures:
            raise ValueError("handoff needs a confidence to decide by: set measures")
        if lacking := [f for f in ("{question}", "{answer}") if f not in self.ask]:
            raise ValueError(f"ask lacks {', '.join(lacking)}")


def check_lora(config: SFTConfig | GRPOConfig) -> None:
    """ValueError where adapters do not go with the model, its sampler or its optimizer."""
    rank = config.lora.rank
    model = config.model
    reasons = {
        "model.path is empty: adapters are trained on a model that is there": not model.path,
        "model.sharded: adapters are only trained on whole weights": model.sharded,
        "sampling.exact: the sampler runs merged weights, which round otherwise": (
            config.sampling.exact
        ),
        "optim.l2_start: optim.weight_decay pulls adapters to 0, the start": (
            config.optim.l2_start
        ),
    }
    for reason, holds in reasons.items():
        if rank and holds:
            raise ValueError(f"lora.rank = {rank}, but {reason}")


def check_source(config: GRPOConfig) -> None:
    """ValueError where the source of samples, or the teacher, does not go with the algorithm."""
    a = config.algorithm
    teacher = config.teacher
    grpo = config.grpo
    taught = a.advantage.startswith("teacher")
    hinted = config.hints.chooser != "off"
    others = [f"grpo.source = {grpo.source!r}"] * (grpo.source != "policy")
    others += ["grpo.solutions = true"] * grpo.solutions
    bare = ['hints.score = "bare"'] * (hinted and config.hints.score == "bare")
    foreign = others + bare
    whose = " and ".join(foreign)
    pairs = a.samples == "pair"
    reasons = {
        f"hints.chooser = {config.hints.chooser!r}, but of {whose} the samples are not the "
        "policy's": hinted and others,
        "grpo.source is empty: policy, teacher, or a .jsonl file of samples": not grpo.source,
        f"algorithm.advantage = {a.advantage!r}, but teacher.path is empty": (
            taught and not teacher.path
        ),
        'grpo.source = "teacher", but teacher.path is empty': (
            grpo.source == "teacher" and not teacher.path
        ),
        f"teacher.path = {teacher.path!r}, but nothing asks it: set grpo.source = "
        '"teacher", or algorithm.method = "opd"': (
            teacher.path and not taught and grpo.source != "teacher"
        ),
        f"teacher.shows = {teacher.shows!r} is for scoring: set algorithm.method = "
        '"opd"': teacher.shows != "nothing" and not taught,
        'teacher.path = "policy" with teacher.shows = "nothing" scores as the policy does: every '
        "advantage is 0": (
            taught and teacher.path == "policy" and teacher.shows == "nothing"
        ),
        "teacher.template lacks {demonstration}, which teacher.shows asks for": (
            teacher.shows != "nothing" and "{demonstration}" not in teacher.template
        ),
        f"sampling.exact, but of {whose} the samples are not the policy's": (
            config.sampling.exact and foreign
        ),
        'algorithm.kl_in = "reward" needs samples of the policy, but of '
        f'{whose} they are not: set kl_in = "loss" or kl_coef = 0': (
            algorithms.penalises_kl(a, "reward") and foreign
        ),
        'algorithm.old_logprobs = "sampler" takes what drew the samples for the policy, with which '
        f"the teacher is compared, but of {whose} it is another: set old_logprobs = "
        '"trainer"': taught and a.old_logprobs == "sampler" and foreign,
        'hints.score = "bare" trains pi(y|q) / pi(y|q,h), whose lower part only the sampler '
        'knows: set algorithm.old_logprobs = "sampler", or algorithm.ratio = "off"': (
            bare and a.ratio != "off" and a.old_logprobs != "sampler"
        ),
        f'grpo.group_size = {grpo.group_size}, but algorithm.samples = "pair" takes two: take at '
        "least 2": (grpo.group_size < 2 and pairs),
        f"grpo.group_size = {grpo.group_size}, and grpo.solutions is that one: nothing is compared "
        'with it; take at least 2, or algorithm.method = "sft"': (
            grpo.group_size < 2 and grpo.solutions and a.advantage != "one"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(reason)


@dataclass
class SFTConfig:
    """Fine-tune a model on worked solutions."""

    run: Run = section(Run)
    model: Model = section(Model)
    lora: LoRA = section(LoRA)
    train: Problems = section(Problems)
    heldout: Problems = section(Problems, split="validation", limit=256)
    prompt: Prompt = section(Prompt)
    optim: Optim = section(Optim)
    sft: SFT = section(SFT)
    sampling: Sampling = section(Sampling)
    evaluation: Evaluation = section(Evaluation)

    def __post_init__(self) -> None:
        check_lora(self)


@dataclass
class GRPOConfig:
    """Reinforcement: sample groups, reward them, follow the policy gradient."""

    run: Run = section(Run)
    model: Model = section(Model)
    lora: LoRA = section(LoRA)
    train: Problems = section(Problems)
    heldout: Problems = section(Problems, split="validation", limit=256)
    prompt: Prompt = section(Prompt)
    sampling: Sampling = section(Sampling)
    reward: Reward = section(Reward)
    process: Process = section(Process)
    judge: Judge = section(Judge)
    teacher: Teacher = section(Teacher)
    hints: Hints = section(Hints)
    algorithm: Algorithm = section(Algorithm)
    grpo: GRPO = section(GRPO)
    optim: Optim = section(Optim, lr=1e-6)
    evaluation: Evaluation = section(Evaluation)

    def __post_init__(self) -> None:
        check_lora(self)
        if self.grpo.group_size < 2 and algorithms.has_group_baseline(self.algorithm):
            raise ValueError(
                f"grpo.group_size = {self.grpo.group_size}, but algorithm.baseline = "
                f"{self.algorithm.baseline!r} compares the samples of a problem with one another: "
                "take at least 2"
            )
        check_source(self)
        if self.sampling.exact and self.sampling.dtype not in ("", self.model.dtype):
            raise ValueError(
                f"sampling.exact with sampling.dtype = {self.sampling.dtype!r} and model.dtype = "
                f"{self.model.dtype!r}: logprobs can only be equal in the same dtype"
            )
        if self.algorithm.credit != "off" and not self.process.prm:
            raise ValueError(
                f"algorithm.credit = {self.algorithm.credit!r} rewards steps of solutions, but "
                'process.prm is empty: name a process reward model, or "oracle", "random", "length"'
            )
        episodes = self.grpo.prompts * self.grpo.group_size
        if self.algorithm.minibatches > episodes:
            raise ValueError(
                f"algorithm.minibatches = {self.algorithm.minibatches}, but a rollout has "
                f"{episodes} episodes"
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
        "with process.prm: how the scores of a completion's steps become one score, for best@k "
        "and wmaj@k",
        choices=AGGREGATES,
    )
    lenient: bool = option(
        False, "where no answer is marked, take the last number of the text for it"
    )
    confidence: Confidence = section(Confidence)
    budgets: list[int] = count(
        [], "accuracy is also reported when cut at so many tokens"
    )
    save: str = option(
        "", "every completion is written to this JSONL file; empty: to none"
    )
    saved: str = option(
        "",
        "a file that save=FILE wrote: its completions are measured, and none are drawn",
    )
    solutions: str = option(
        "",
        "the shortest right completion of each problem is written to this JSONL file, a problem "
        "set to fine-tune on; empty: to none",
    )
    out: str = option(
        "",
        "directory for eval.json (every number, by problem too) and pictures; NAME.json: a file "
        "for the numbers alone; empty: none",
    )

    def __post_init__(self) -> None:
        if "prm" in self.confidence.measures and not self.process.prm:
            raise ValueError(
                "confidence.measures has prm, but process.prm is empty: name a process reward "
                'model, or "oracle", "random", "length"'
            )
        longest = self.sampling.max_new_tokens
        if max(self.budgets, default=0) > longest:
            raise ValueError(
                f"budgets has {max(self.budgets)}, but completions are cut at "
                f"sampling.max_new_tokens = {longest}"
            )


@dataclass
class GeneralConfig:
    """Measure a model on general benchmarks (docs/general.md)."""

    model: Model = section(Model)
    prompt: Prompt = section(Prompt)
    data: str = option(
        "",
        "directory in which, or below which, the benchmarks' files are; empty: the hub's datasets",
    )
    sources: dict[str, str] = option(
        {}, "file or hub id org/name[:config] of a benchmark in place of the usual one"
    )
    tasks: list[str] = option(
        [],
        "benchmarks to run; empty: all but gsm8k, of whose problems mgsm_en is a part",
        choices=BENCHMARKS,
    )
    limit: int = amount(
        0, "at most so many problems of each benchmark are used; 0: all"
    )
    choices: str = option(
        "loglikelihood",
        "a choice is the likeliest continuation, or a letter that the model writes",
        choices=("loglikelihood", "generation"),
    )
    max_new_tokens: int = amount(
        0, "longest answer in tokens; 0: what each benchmark has"
    )
    lenient: bool = option(
        True,
        "svamp, mgsm, gsm8k: where no answer is marked, take the last number of the text for it",
    )
    slots: int = count(64, "how many sequences are decoded side by side")
    token_budget: int = amount(
        16384, "tokens computed at once, a shared prompt counted once; 0: all"
    )
    seed: int = random_seed("seed of the bootstrap")
    save: str = option(
        "general.json",
        "scores and the record of every problem are written to this JSON file, after each "
        "benchmark",
    )

    def __post_init__(self) -> None:
        if unknown := [name for name in self.sources if name not in BENCHMARKS]:
            raise ValueError(
                f"sources.{unknown[0]}: no such benchmark; there are: {', '.join(BENCHMARKS)}"
            )


@dataclass
class TransferConfig:
    """Say how much of what training gained in maths came with gains elsewhere."""

    groups: dict[str, str] = option(
        {},
        "group of a task or of a family of the world in place of its own; none: it is left out",
        choices=(*GROUPS, "none"),
    )
    sigma: str = option(
        "pooled",
        "what changes are divided by, beside 1: their standard deviation in the group over all "
        "models compared, or the constants of the paper's audit (arXiv 2507.00432)",
        choices=("pooled", "paper"),
    )
    seed: int = random_seed("seed of the bootstrap")
    save: str = option("transfer.json", "everything is written to this JSON file")
    picture: str = option(
        "", "a picture is written to this path with .png and .svg; empty: none"
    )


@dataclass
class SampleConfig:
    """Ask a model a question."""

    model: Model = section(Model)
    prompt: Prompt = section(Prompt)
    sampling: Sampling = section(Sampling, temperature=0.0)
    seed: int = random_seed("seed of the sample")


@dataclass
class MergeConfig:
    """Write a model as a Hugging Face directory, an adapter merged into its base."""

    model: Model = section(Model)


@dataclass
class Drift:
    """What is measured of how far a model has moved."""

    responses: int = option(
        100,
        "so many problems, of each group the first, are answered by the tuned model and scored by "
        "both",
        minimum=2,
    )
    texts: int = option(
        100,
        "the states of so many texts, question and solution, of each group are compared",
        minimum=3,
    )
    tokens: int = option(128, "a text is cut to so many tokens", minimum=2)
    by: list[str] = option(
        [],
        "groups are the problems with the same value of this metadata key, such as group, family "
        "or difficulty, or of several; empty: all problems are one group",
    )
    most: int = count(40, "so many of the tokens that moved most are listed")
    seed: int = random_seed("seed of the responses and of the bootstrap")


@dataclass
class DriftConfig:
    """Measure how far models have moved from the one they were trained from."""

    model: Model = section(Model)
    problems: Problems = section(Problems, split="test", limit=1000)
    prompt: Prompt = section(Prompt)
    sampling: Sampling = section(Sampling)
    drift: Drift = section(Drift)
    out: str = option(
        "",
        "directory to write to; empty: a tuned model that is a run directory itself, any other "
        "./drift",
    )


@dataclass
class Labelling:
    """How solutions are drawn, and their steps labelled."""

    by: str = option(
        "oracle",
        "a step's label is the verdict of the world's oracle, or the share of its continuations "
        "that are right",
        choices=("oracle", "monte_carlo"),
    )
    save: str = option(
        "",
        "labelled solutions are appended to this JSONL file; problems that it has are left out",
    )
    samples: int = count(
        4, "solutions drawn of each problem; of equal ones one is kept"
    )
    rollouts: int = count(8, "monte_carlo: continuations drawn of every step")
    hard: bool = option(
        False,
        "monte_carlo: a label is 1 where any continuation is right, else 0, instead of the share",
    )
    steps: str = option(
        "blank_line", "what ends a step of a solution", choices=SEPARATORS
    )
    seed: int = random_seed("seed of the samples")


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
        "where a step's score is read: from a linear head after the step, from Qwen's head at a "
        "marker token, or from the words + and - (math_shepherd)",
        choices=FORMATS,
    )
    train: str = option(
        "",
        "file of labelled solutions to learn from (trl, Math-Shepherd, PRM800K, ProcessBench)",
    )
    heldout: str = option("", "file of labelled solutions to measure on")
    limit: int = amount(0, "at most so many held-out solutions are used; 0: all")
    neutral: str = option(
        "right", "what PRM800K's neutral rating counts as", choices=NEUTRAL
    )
    batch_size: int = count(32, "how many solutions a step learns from")
    token_budget: int = tokens_at_once()
    head_steps: int = amount(
        0, "steps at the beginning in which only the new head learns"
    )
    balance: bool = option(
        True, "right and wrong steps weigh the same in all, whatever their number"
    )

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

    def __post_init__(self) -> None:
        if self.run.tokens:
            raise ValueError(
                f"run.tokens = {self.run.tokens}, but the training of a PRM counts no tokens"
            )


@dataclass
class PRMEvalConfig:
    """Measure a process reward model on labelled solutions."""

    model: Model = section(Model)
    neutral: str = option(
        "right", "what PRM800K's neutral rating counts as", choices=NEUTRAL
    )
    limit: int = amount(0, "at most so many solutions are used; 0: all")
    threshold: float = share(0.5, "a step with a score below this is called wrong")
    save: str = option(
        "",
        "the scores of every solution are written to this JSONL file; empty: to none",
    )
