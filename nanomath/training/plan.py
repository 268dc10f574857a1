"""What the steps of a run will need at most, said before the first: memory and seconds; and the
micro-batch that token_budget = "auto" stands for.

Peak memory, resident in the process on a CPU and allocated by torch on a GPU, in bytes; s of a
number of the model's dtype, N tokens that differ of the largest micro-batch, n of them predicted,
L layers, D width, F of the MLP, H E and K E of the queries and keys, V vocabulary:

    peak        = loaded + max(training, scoring) + sampling
    loaded      = what there is before the first step, as measured: Python and torch themselves,
                  weights, Adam's two means, masters of rounded weights, reference, critic
    training    = head + max(gradients, KEPT L layer + logits)      one micro-batch
                  head + gradients + KEPT L layer + logits          several: sums are kept
    gradients   = those of all that is trained, in the precision of its masters
    head        = 4 V D, a gradient before it is added, where the lm_head is trained; in a
                  lower precision it is rounded as well: (4 + 2 s) V D
    layer       = N (s (4 D + 2 (H + K) E + 3 F) + 4 H), which the backward pass needs; with
                  checkpointing N D s, and one whole layer more. Without the CPU forms of kernels/
                  it is N (s (4 D + H E + 4 F) + 8 D) + s attention,
    attention   = 2 S R H E + 2 S T K E + S R T of S pieces, filled up to R queries and T keys;
                  S R T is a mask, and not there where none goes on from another
    logits      = 4 V min(n, a chunk of linear_logprob); in a lower precision (4 + s) V ...
    scoring     = layer + logits, a pass without gradient
    sampling    = keys and values of the slots + weights packed for a CPU + 8 V slots

KEPT is what the C library loses between blocks of changing sizes, more after the first. Nor does
it give them all back, and a GPU keeps the sampler's cache: so training and sampling are added.
Seconds, where nothing else wants the processor:

    training    = a trial of a micro-batch, or of so many of its tokens and of the layers as are
                  tried soon, its time for all layers and all tokens, 17 numbers moved for each
                  that Adam updates, and SEQUENCE_SECONDS
    sampling    = a trial of the first tokens of as many samples as are drawn side by side, as long
                  for the others, what reading a longer context takes at least (floor.py), and
                  SEQUENCE_SECONDS

The longest completions are assumed, or in time those of the last step of a run that goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.compiled import runs_compiled
from kernels.linear_logprob import CHUNK_LOGITS, linear_logprob
from nanomath.models.batches import Batch, Example, layout_states, make_batch
from nanomath.models.config import ModelConfig
from nanomath.models.transformer import Transformer
from nanomath.rollout.cache import Cache, free_memory
from nanomath.rollout.floor import Machine, fastest, measure_machine, step_floor
from nanomath.rollout.sampler import Sampler
from nanomath.training import ranks
from nanomath.training.optimizer import Optimizer

# Of one micro-batch, and of several. Measured: 1.35 (6 layers of width 128) and 1.28 (the shape of
# SmolLM2-135M), 1.94 (tiny) and 1.58 (SmolLM2); on a GPU torch counts only what is in use.
KEPT = {"cpu": (1.35, 1.7), "cuda": (1.0, 1.0)}
MARGIN = 0.9  # of the free memory that "auto" plans with
# Tokens from which more at a time are hardly faster. On one core of an AMD EPYC (Zen 5),
# microseconds a token forward and backward with 256, 512, 1024, 2048, 4096 at a time: tiny 46,
# 37, 38, 36, 37; SmolLM2's shape with 4 layers 1973, 1706, 1959, 1819, 1791, in bfloat16 955,
# 947, 1212, 1065, 986. A GPU has not been measured.
FAST = {"cpu": 1024, "cuda": 16384}
LEAST = 256  # tokens of a micro-batch that is not worth halving
MOVED = 17  # numbers read and written for each weight in the optimizer's step
TRIAL_SECONDS = {"cpu": 0.005, "cuda": 0.05}  # at least, for each measurement
# (rows, width), none for all of floor.py's: on a CPU these take long, and this one alone is within
# 5% of their fastest (float32 and bfloat16, one core of an AMD EPYC).
TRIAL_PRODUCTS = {"cpu": ((128, 1024),), "cuda": ()}
COPIED = 32 << 20  # bytes at most: a trial must not be the run's peak
TRIAL_FLOPS = {"cpu": 3e10, "cuda": 4e12}  # of what is tried
TRIAL_STEPS = 4  # of decoding
# Seconds of Python for each sequence, in a pass: batches, losses, metrics; in sampling: texts and
# rewards. On one core of an AMD EPYC (Zen 5) with the tiny model 60 to 90 and 110 microseconds.
SEQUENCE_SECONDS = 8e-5


@dataclass(frozen=True)
class Drawing:
    """What a sampler is asked for: `samples` of each prompt, `completion` tokens at most."""

    prompts: Sequence[list[int]]
    samples: int
    completion: int

    @classmethod
    def of(cls, prompts: Sequence[list[int]], samples: int, completion: int) -> Drawing:
        """That of a rank's share of these prompts."""
        return cls(ranks.share(prompts) or [[0]], samples, completion)

    @property
    def total(self) -> int:
        """The number of samples."""
        return len(self.prompts) * self.samples

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt."""
        return max(map(len, self.prompts))


def batches_of(
    model: Transformer, examples: Sequence[Example], token_budget: int
) -> list[Batch]:
    """The micro-batches that this rank makes of a step's examples."""
    return [
        make_batch([examples[i] for i in rows.tolist()])
        for rows, _ in ranks.micro_batches_of(model, examples, token_budget)
    ]


def settle_budget(
    model: Transformer,
    optimizer: Optimizer,
    examples: Sequence[Example],
    besides: float,
) -> int:
    """The micro-batch that "auto" stands for in steps of these examples, for all ranks alike.

    besides: bytes that other things need.
    """

    def need(budget: int) -> float:
        return (
            step_bytes(model, optimizer, batches_of(model, examples, budget)) + besides
        )

    device = model.device
    found = choose_budget(need, MARGIN * room(device), FAST[device.type])
    return min(ranks.gather([found]))


def room(device: torch.device) -> float:
    """The free bytes for this rank: those of a machine share its memory, but not their GPUs."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    return free_memory(device) / sharing


def choose_budget(need: Callable[[int], float], room: float, fast: int) -> int:
    """The largest of fast, fast / 2, fast / 4, ... tokens that need at most `room` bytes, or the
    smallest that is at least LEAST.
    """
    budget = fast
    while need(budget) > room and budget // 2 >= LEAST:
        budget //= 2
    return budget


# --- memory ----------------------------------------------------------------------------------


def step_bytes(
    model: Transformer, optimizer: Optimizer, batches: Sequence[Batch]
) -> float:
    """The bytes that a training step on these micro-batches needs at its peak."""
    gradients = sum(w.master.nbytes for w in optimizer.weights.values())
    # A PRM may have a head of its own, and no gradient of this size but the embedding's.
    weight = getattr(model, "lm_head", model.model.embed_tokens).weight
    size = weight.dtype.itemsize
    head = weight.numel() * weight.requires_grad * (4 + 2 * size * (size < 4))
    several = len(batches) > 1
    kept = KEPT[model.device.type][several]
    passes = max((batch_bytes(model, batch, kept) for batch in batches), default=0.0)
    return head + (gradients + passes if several else max(gradients, passes))


def batch_bytes(model: Transformer, batch: Batch, kept: float = 0) -> float:
    """The bytes that the passes over a micro-batch need: layers and logits.

    kept: KEPT of a forward and backward pass, 0 for a pass without gradient.
    """
    c = model.config
    size = model.dtype.itemsize
    tokens = batch.layout.tokens.numel()
    layer = layer_bytes(c, batch, size, runs_compiled(model.model.norm.weight))
    wide = 4 + size * (size < 4)
    logits = (
        wide
        * c.vocab_size
        * min(len(batch.target), max(64, CHUNK_LOGITS // c.vocab_size))
    )
    if not kept:
        return layer + logits
    layers = c.num_layers * layer
    if model.gradient_checkpointing:
        layers = c.num_layers * tokens * c.hidden_size * size + layer
    return kept * layers + logits


def layer_bytes(c: ModelConfig, batch: Batch, size: int, compiled: bool = True) -> int:
    """The bytes of what one layer keeps for its backward pass, `size` bytes a number.

    compiled: by the CPU forms of kernels/, which keep no copy of keys, scores or masks.
    """
    tokens = batch.layout.tokens.numel()
    queries = c.num_heads * c.head_dim
    keys = c.num_kv_heads * c.head_dim
    width = 4 * c.hidden_size + queries + 3 * c.intermediate_size
    if compiled:
        width += queries + 2 * keys
        return tokens * (size * width + 4 * c.num_heads)
    block = batch.layout.pieces.block
    (rows, length), seen = block.queries.shape, block.keys.shape[1]
    mask = rows * length * seen * (not block.whole)
    attention = 2 * rows * (length * queries + seen * keys) + mask
    width += c.intermediate_size
    return tokens * (size * width + 8 * c.hidden_size) + size * attention


def sampling_bytes(sampler: Sampler, drawing: Drawing) -> float:
    """The bytes that the sampler needs at its peak: its cache, on a CPU as far as it is written
    to, weights in its own layout, and logits.
    """
    c = sampler.model.config
    size = sampler.decoder.dtype.itemsize
    rows = min(sampler.slots, drawing.total)
    matrices = sum(p.numel() for p in sampler.model.parameters() if p.dim() == 2)
    if sampler.decoder.on_gpu:
        longest = drawing.longest + drawing.completion
        each = Cache.bytes_per_slot(sampler.decoder, longest, drawing.longest)
        weights = matrices * size * (sampler.decoder.dtype != sampler.model.dtype)
    else:
        token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * size
        each = token * (drawing.completion + drawing.longest / drawing.samples)
        weights = matrices * size
    return rows * (each + 8 * c.vocab_size) + weights


# --- seconds ---------------------------------------------------------------------------------


def machine_of(model: Transformer, dtype: torch.dtype) -> Machine:
    """Measure the machine in a fifth of a second at most and little memory."""
    copied = min(COPIED, sum(p.nbytes for p in model.parameters()))
    kind = model.device.type
    trial = TRIAL_SECONDS[kind], copied, TRIAL_PRODUCTS[kind]
    return measure_machine(model.device, dtype, *trial)


def step_seconds(
    model: Transformer,
    optimizer: Optimizer,
    examples: Sequence[Example],
    token_budget: int,
    passes: tuple[int, int],
    machine: Machine,
) -> float:
    """The seconds of a training step that makes so many passes over the micro-batches without a
    gradient, and with one and an update.
    """
    parameters = [weight.parameter for weight in optimizer.weights.values()]
    batches = batches_of(model, examples, token_budget)
    sizes = [batch.layout.tokens.numel() for batch in batches]
    most = min(max(sizes), 4 * FAST[model.device.type])  # a trial must not be the peak
    trial = trial_batch(model, examples, most).to(model.device)
    layers = layer_seconds(model, parameters, trial)
    head = head_seconds(model, trial)
    tokens = len(model.model.layers) * sum(sizes)
    targets = sum(len(b.target) for b in batches)
    score, learn = (
        tokens * layer + targets * logits
        for layer, logits in zip(layers, head, strict=True)
    )
    moved = 4 * MOVED * sum(p.numel() for p in parameters)
    host = SEQUENCE_SECONDS * len(examples)
    scored, trained = passes
    update = learn + host + machine.seconds(moved, 0)
    return scored * (score + host) + trained * update


def trial_batch(model: Transformer, examples: Sequence[Example], most: int) -> Batch:
    """The first examples, as many as a pass of TRIAL_FLOPS over one layer takes, about `most`
    tokens at the most: those of a micro-batch, for its memory costs time as well.
    """
    flops = TRIAL_FLOPS[model.device.type]
    tokens = min(flops / layer_flops(model.config, 1), most)
    chosen = list(examples[:1])
    for example in examples[1:]:
        if sum(len(e.response) for e in chosen) < tokens:
            chosen.append(example)
    return make_batch(chosen)


def layer_seconds(
    model: Transformer, parameters: Sequence[Tensor], batch: Batch
) -> tuple[float, float]:
    """The seconds of a layer for a token of the batch, without a gradient and with one: of as
    many layers as a pass of TRIAL_FLOPS goes through.
    """
    layers = model.model.layers
    ends = (model.model.embed_tokens.weight, model.lm_head.weight)
    inside = [p for p in parameters if all(p is not end for end in ends)]
    size = batch.layout.tokens.numel(), model.config.hidden_size
    x = torch.zeros(size, dtype=model.dtype, device=model.device, requires_grad=True)
    most = TRIAL_FLOPS[model.device.type] // layer_flops(model.config, len(x))
    tried = layers[: max(1, int(most))]

    def states() -> Tensor:
        return layout_states(model, batch.layout, x)

    model.model.layers = tried
    try:
        return seconds_each(states, [x, *inside], model.device, len(tried) * len(x))
    finally:
        model.model.layers = layers


def layer_flops(c: ModelConfig, tokens: float) -> float:
    """The FLOPs of the products of a layer forward and backward, without attention's."""
    attention = (c.num_heads + c.num_kv_heads) * c.head_dim
    weights = c.hidden_size * (3 * c.intermediate_size + 2 * attention)
    return 6 * weights * tokens


def head_seconds(model: Transformer, batch: Batch) -> tuple[float, float]:
    """The seconds of the logprob of a token, without a gradient and with one."""
    weight = model.lm_head.weight
    # So many that laying the weight out for them counts for no more than in a step
    most = 3 * TRIAL_FLOPS[weight.device.type] / (6 * weight.numel())
    target = batch.target[: max(1, int(most))]
    states = torch.zeros(
        len(target), weight.shape[1], dtype=weight.dtype, device=weight.device
    ).requires_grad_()

    def logprobs() -> Tensor:
        return linear_logprob(states, weight, target)[0]

    inside = [states, *[weight] * weight.requires_grad]
    return seconds_each(logprobs, inside, weight.device, len(target))


def seconds_each(
    run: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    device: torch.device,
    tokens: int,
) -> tuple[float, float]:
    """The seconds of a function of so many tokens for one of them, without a gradient and with
    that of `inputs`.
    """

    def learn() -> None:
        torch.autograd.grad(run().sum(), inputs, allow_unused=True)

    return tuple(
        fastest(call, device, TRIAL_SECONDS[device.type]) / tokens
        for call in (torch.no_grad()(run), learn)
    )


def sampling_seconds(sampler: Sampler, drawing: Drawing, machine: Machine) -> float:
    """The seconds in which the sampler draws, if all completions are as long as `drawing` says."""
    rows = min(sampler.slots, drawing.total)
    samples = min(drawing.samples, rows)
    prompts = drawing.prompts[: rows // samples]
    device = sampler.decoder.device
    # A rank's share is tried by the rank alone: others may have other prompts, or none.
    draw = partial(Sampler.generate, sampler, prompts, samples)
    first, more = (
        fastest(partial(draw, tokens), device, TRIAL_SECONDS[device.type], least=1)
        for tokens in (1, 1 + TRIAL_STEPS)
    )
    tried, usual = (
        step_floor(
            sampler.model.config,
            rows,
            drawing.longest + tokens / 2,
            sampler.decoder.dtype,
            machine,
            drawing.longest,
            samples,
        )["attention"]
        for tokens in (TRIAL_STEPS, drawing.completion)
    )
    step = max(0.0, more - first) / TRIAL_STEPS + usual - tried
    rounds = drawing.total / (len(prompts) * samples)
    drawn = rounds * (first + (drawing.completion - 1) * step)
    return drawn + SEQUENCE_SECONDS * drawing.total


# --- what is said ----------------------------------------------------------------------------


def sentence(
    device: torch.device, memory: dict[str, float], seconds: dict[str, float]
) -> str:
    """What a run says before its first step of its bytes and seconds, by their parts."""
    kind = "allocated" if device.type == "cuda" else "resident"
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    said = f"expected: at most {sum(memory.values()) / 2**30:.2f} GiB {kind} ({parts})"
    if not seconds:
        return said
    parts = ", ".join(f"{name} {part:.3g}" for name, part in seconds.items())
    return f"{said}; about {sum(seconds.values()):.3g} s a step ({parts})"
