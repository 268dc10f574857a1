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
                  tried soon, and of it without layers: the difference for all layers, the
                  whole for all tokens; 17 numbers moved for each that Adam updates, and
                  SEQUENCE_SECONDS
    sampling    = a trial of the first tokens of as many samples as are drawn side by side, as long
                  for the others, what reading a longer context takes at least, and
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
from kernels.linear_logprob import CHUNK_LOGITS
from nanomath.models.batches import (
    Batch,
    Example,
    make_batch,
    response_states,
    states_logprobs,
)
from nanomath.models.config import ModelConfig
from nanomath.models.transformer import Transformer
from nanomath.rollout.cache import Cache, free_memory
from nanomath.rollout.floor import copied_per_s, fastest
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
COPIED = 32 << 20  # bytes at most: a trial must not be the run's peak
TRIAL_FLOPS = {"cpu": 1e11, "cuda": 1e13}  # of what is tried, forward and backward
TRIAL_STEPS = 4  # of decoding
# Of Python for each sequence: losses and metrics of a pass, texts and rewards of sampling. On one
# core of an AMD EPYC (Zen 5) the rest of `bench training` is 60 microseconds.
SEQUENCE_SECONDS = 5e-5


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
        tokens = drawing.completion + drawing.longest / drawing.samples
        each = token_bytes(sampler) * tokens
        weights = matrices * size
    return rows * (each + 8 * c.vocab_size) + weights


def token_bytes(sampler: Sampler) -> int:
    """The bytes of a token's keys and values in all layers."""
    c = sampler.model.config
    numbers = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    return numbers * sampler.decoder.dtype.itemsize


# --- seconds ---------------------------------------------------------------------------------


def bytes_per_s(model: Transformer) -> float:
    """Measure how fast the machine copies as much as the model's weights, or COPIED."""
    size = min(COPIED, sum(p.nbytes for p in model.parameters()))
    return copied_per_s(model.device, size, TRIAL_SECONDS[model.device.type])


def step_seconds(
    model: Transformer,
    optimizer: Optimizer,
    examples: Sequence[Example],
    token_budget: int,
    passes: tuple[int, int],
    speed: float,
) -> float:
    """The seconds of a training step that makes so many passes over the micro-batches without a
    gradient, and with one and an update. speed: `bytes_per_s`.
    """
    parameters = [weight.parameter for weight in optimizer.weights.values()]
    batches = batches_of(model, examples, token_budget)
    sizes = [batch.layout.tokens.numel() for batch in batches]
    most = min(max(sizes), 4 * FAST[model.device.type])  # a trial must not be the peak
    flops = TRIAL_FLOPS[model.device.type]
    layer, head = flops_of_a_token(model.config)
    fitting = max(1, int(min(most, flops / (layer + head))))
    trial = batches_of(model, examples, fitting)[0].to(model.device)
    tried = trial.layout.tokens.numel()
    total = len(model.model.layers)
    some = min(total, 1 + int(flops / (layer * tried)))
    score, learn = (
        (ends + (through - ends) * total / some) * sum(sizes) / tried
        for ends, through in zip(
            pass_seconds(model, parameters, trial, 0),
            pass_seconds(model, parameters, trial, some),
            strict=True,
        )
    )
    adam = 4 * MOVED * sum(p.numel() for p in parameters) / speed
    host = SEQUENCE_SECONDS * len(examples)
    scored, trained = passes
    return scored * (score + host) + trained * (learn + host + adam)


def flops_of_a_token(c: ModelConfig) -> tuple[float, float]:
    """The FLOPs of the products of a layer and of the lm_head, forward and backward."""
    attention = (c.num_heads + c.num_kv_heads) * c.head_dim
    layer = 3 * c.intermediate_size + 2 * attention
    return 6 * c.hidden_size * layer, 6 * c.hidden_size * c.vocab_size


def pass_seconds(
    model: Transformer, parameters: Sequence[Tensor], batch: Batch, layers: int
) -> tuple[float, float]:
    """The seconds of a pass through the first layers and the lm_head, without a gradient and
    with that of the parameters.
    """
    device = model.device
    kept = model.model.layers
    x = torch.zeros(
        batch.layout.tokens.numel(),
        model.config.hidden_size,
        dtype=model.dtype,
        device=device,
        requires_grad=True,
    )

    def logprobs() -> Tensor:
        return states_logprobs(model, response_states(model, batch, x), batch)[0]

    def learn() -> None:
        torch.autograd.grad(logprobs().sum(), [x, *parameters], allow_unused=True)

    model.model.layers = kept[:layers]
    try:
        return tuple(
            fastest(call, device, TRIAL_SECONDS[device.type], least=1)
            for call in (torch.no_grad()(logprobs), learn)
        )
    finally:
        model.model.layers = kept


def sampling_seconds(sampler: Sampler, drawing: Drawing, speed: float) -> float:
    """The seconds in which the sampler draws, if all completions are as long as `drawing` says."""
    rows = min(sampler.slots, drawing.total)
    samples = min(drawing.samples, rows)
    prompts = drawing.prompts[: rows // samples]
    device = sampler.decoder.device
    # A rank's share is tried by the rank alone: others may have other prompts, or none.
    draw = partial(Sampler.generate, sampler, prompts, samples)
    more, first = (  # in this order a GPU's cache is made for both
        fastest(partial(draw, tokens), device, TRIAL_SECONDS[device.type], least=1)
        for tokens in (1 + TRIAL_STEPS, 1)
    )
    longer = (drawing.completion - TRIAL_STEPS) / 2 * rows * token_bytes(sampler)
    step = max(0.0, more - first) / TRIAL_STEPS + longer / speed
    rounds = drawing.total / (len(prompts) * samples)
    round_seconds = first + (drawing.completion - 1) * step
    return rounds * round_seconds + SEQUENCE_SECONDS * drawing.total


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
