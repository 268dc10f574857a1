"""What one process and two must do alike, and a way to have two do it."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from nanomath.data.problem import Problem
from nanomath.data.world import CHAT_TEMPLATE, world_tokenizer
from nanomath.models import ModelConfig, Tokenizer, Transformer
from nanomath.models.batches import Example
from nanomath.process.rewards import VerifiedReward
from nanomath.rollout import sample_episodes
from nanomath.training import ranks
from nanomath.training.optimizer import Optimizer
from nanomath.training.ranks import is_sharded
from nanomath.training.sft_step import SFTStep, heldout_loss
from nanomath.training.sharding import shard, whole
from nanomath.training.shared_sampler import SharedSampler, SharedScorer

EXAMPLES = [
    Example([5, 6, 7], [8, 9, 0]),
    Example([11], [0]),
    Example([3] * 9, [4, 4, 1, 2, 3, 4, 5, 0]),
    Example([20, 21], [22, 23, 24, 25, 0]),
    Example([30, 31, 32, 33], []),
]
PROMPTS = [
    [5],
    [7, 300, 12, 44],
    [7, 300, 12, 44],
    [9] * 11,
    [7, 300, 12, 44],
    [700, 3, 3],
    [5],
]
LAYOUTS = {  # of the SFT step, and of the model
    "plain": ({}, {}),
    "sequence mean, DFT": ({"aggregation": "sequence", "dft": True}, {}),
    "budget": ({"token_budget": 12}, {}),
    "packed": ({"token_budget": 20}, {"num_kv_heads": 4}),
    "NEFTune": ({"neftune_alpha": 5.0, "token_budget": 1}, {"qkv_bias": True}),
    "untied": ({"token_budget": 12}, {"tie_embeddings": False}),
}
STORES = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, moments in bfloat16": (torch.bfloat16, {"state_dtype": torch.bfloat16}),
}
KINDS = ("replicated", "sharded")


class Scenes:
    """Everything is done with replicated weights, or with sharded ones."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind = directory, kind

    def model(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
        """The same random weights in all processes; nothing divides evenly by two."""
        config = {
            "vocab_size": 1025,
            "hidden_size": 30,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "intermediate_size": 47,
            "max_positions": 64,
        }
        model = Transformer(ModelConfig(**{**config, **changes})).init_weights(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
        return self.shard(model.to(dtype), dtype)

    def shard(self, model: Transformer, dtype: torch.dtype) -> Transformer:
        return shard(model, dtype) if self.kind == "sharded" else model

    def gradient(self, examples: list[Example], layout: str) -> dict[str, Any]:
        """Metrics and gradient of an SFT step in float64: without a memory, Adam's mean is the
        gradient.
        """
        options, changes = LAYOUTS[layout]
        model = self.model(torch.float64, **changes)
        optimizer = Optimizer(model, 0.0, (0.0, 0.9), 1e-8, math.inf)
        metrics = SFTStep(model, optimizer, **options).step(examples, 3, 1e-3)
        state = optimizer.state()
        return {
            "metrics": metrics,
            "gradient": {k: v for k, v in state.items() if k.startswith("exp_avg.")},
        }

    def training(
        self, store: str, steps: range, resume: Path | None = None
    ) -> dict[str, Any]:
        """Some steps of SFT from the start, or from a file that holds what this returned."""
        dtype, options = STORES[store]
        model, saved = self.model(dtype), None
        if resume:
            saved = torch.load(resume, weights_only=False)
            model = self.shard(
                load_weights(
                    Scenes(self.directory, "replicated").model(dtype), saved["weights"]
                ),
                dtype,
            )
        optimizer = Optimizer(model, 0.1, (0.9, 0.95), 1e-8, 1.0, **options)
        if saved:
            optimizer.load_state(saved["state"])
            assert same_bits(
                optimizer.state(), saved["state"] if ranks.is_main() else {}
            ), "loaded and saved again"
        step = SFTStep(model, optimizer, token_budget=12, neftune_alpha=2.0)
        history = [step.step(EXAMPLES, number, 1e-2) for number in steps]
        loss, state = heldout_loss(model, EXAMPLES, 12), optimizer.state()
        with whole(model):
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return {"weights": weights, "state": state, "metrics": history, "heldout": loss}

    def sampler(self) -> SharedSampler:
        tokenizer = Tokenizer(
            world_tokenizer(),
            CHAT_TEMPLATE,
            range(0, 1000, 25),
            eos_token="<|endoftext|>",
        )
        return SharedSampler(self.model(), tokenizer, slots=4)

    def samples(self) -> list[tuple]:
        """Completions of more prompts than ranks, some of them equal, of fewer, and of none."""
        sampler = self.sampler()
        found = sampler.generate(PROMPTS, n=2, max_new_tokens=12, seed=3)
        found += sampler.generate(
            PROMPTS[1:2],
            n=3,
            max_new_tokens=12,
            temperature=0.7,
            top_k=20,
            stop=["the"],
        )
        found += sampler.generate([])
        return [
            (c.prompt_index, c.sample_index, c.tokens, c.text, c.finish_reason)
            for c in found
        ]

    def episodes(self) -> list[tuple]:
        scorers = [SharedScorer(VerifiedReward(reward_of_this_rank))]
        problems = [Problem(name, "?", "1") for name in "abcdefg"]
        groups = sample_episodes(
            self.sampler(), problems, PROMPTS, scorers, 2, max_new_tokens=6
        )
        found = [e for group in groups for e in group]
        return [
            (
                e.problem.id,
                e.completion.prompt_index,
                e.completion.tokens,
                e.rewards["total"],
            )
            for e in found
        ]

    def bad_number(self) -> str:
        """What is said when a number that only one rank computes is none."""
        model = self.model()
        optimizer = Optimizer(model, 0.1, (0.9, 0.95), 1e-8, 1.0)
        step = SFTStep(model, optimizer, token_budget=12)
        step._noise = lambda examples, number: [
            torch.full((len(e), 30), math.nan if e is EXAMPLES[3] else 0.0)
            for e in examples
        ]
        try:
            step.step(EXAMPLES, 0, 1e-2)
        except FloatingPointError as error:
            return str(error)
        return "nothing"


def load_weights(model: Transformer, weights: dict[str, torch.Tensor]) -> Transformer:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def same_bits(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def reward_of_this_rank(problem: Problem, completions: list) -> list[dict[str, float]]:
    """A grader that does not judge alike everywhere, as one with a timeout."""
    return [{"total": float(len(c.tokens) + 100 * ranks.number())} for c in completions]


def do_everything(directory: Path) -> dict[str, Any]:
    """By one rank or by two together; what main saves in `directory` is for the others to go
    on from.
    """
    n = ranks.count()
    result: dict[str, Any] = {
        "any": [
            ranks.any_rank(False),
            ranks.any_rank(True),
            ranks.any_rank(ranks.number() == n - 1),
        ],
        "from main": ranks.from_main({"rank": ranks.number()}),
        "gather": [ranks.gather(ranks.share(list(range(size)))) for size in range(6)],
        "sum": sums(),
    }
    for kind in KINDS:
        scenes = Scenes(directory, kind)
        halves = {store: scenes.training(store, range(2)) for store in STORES}
        for store in STORES if ranks.is_main() else ():
            torch.save(halves[store], directory / f"{n} {kind} {store}.pt")
        result[kind] = {
            "is sharded": is_sharded(scenes.model()),
            "gradients": {
                layout: scenes.gradient(EXAMPLES, layout) for layout in LAYOUTS
            },
            "gradient of one": scenes.gradient(EXAMPLES[2:3], "plain"),
            "training": {store: scenes.training(store, range(4)) for store in STORES},
            "samples": scenes.samples(),
            "episodes": scenes.episodes(),
            "bad number": scenes.bad_number(),
        }
    return result


def go_on(directory: Path, others: int) -> dict[tuple[str, str, str], Any]:
    """The second halves of the trainings whose first halves so many `others` saved."""
    return {
        (store, before, now): Scenes(directory, now).training(
            store, range(2, 4), resume=directory / f"{others} {before} {store}.pt"
        )
        for store in STORES
        for before in KINDS
        for now in KINDS
    }


def sums() -> list[torch.Tensor]:
    """Tensors of many kinds whose sum over all ranks is 6, in buckets of at most 8 numbers."""
    shapes = {(3,): 2, (2, 2): 0, (): 0, (0,): 0, (20,): 1, (5,): 1, (4,): 2, (7,): 0}
    types = (torch.float32, torch.float64, torch.int32)
    tensors = [
        torch.full(shape, 6 // ranks.count(), dtype=types[kind])
        for shape, kind in shapes.items()
    ]
    tensors.append(torch.full((4, 3), 6.0 / ranks.count()).T)  # not contiguous
    before, ranks.BUCKET = ranks.BUCKET, 8
    ranks.sum_(tensors)
    ranks.BUCKET = before
    return tensors


def after_a_death(directory: Path) -> list[str]:
    """What rank 0 makes of the errors it gets when rank 1 is no longer there."""
    model = Scenes(directory, "sharded").model()
    model(torch.arange(5)[None]).sum().backward()
    if ranks.number() == 1:
        os._exit(0)
    said = []
    for together in (
        lambda: model(torch.arange(5)[None]),
        lambda: ranks.any_rank(True),
        lambda: ranks.gather([1]),
    ):
        try:
            together()
        except RuntimeError as error:
            said.append(ranks.lost(error))
    return [*said, ranks.lost(RuntimeError("a mistake of one's own"))]


# --- two processes ---------------------------------------------------------------------------


def run_two(directory: Path) -> list[dict[str, Any]]:
    """What each of two ranks has done, said and gone on from."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(be_a_rank, (port, directory), nprocs=2)
    return [
        torch.load(directory / f"rank{rank}.pt", weights_only=False)
        for rank in range(2)
    ]


def be_a_rank(rank: int, port: int, directory: Path) -> None:
    """A process as torchrun starts it, all its life."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    ranks.start(torch.device("cpu"))
    done: dict[str, Any] = {
        "everything": do_everything(directory),
        "gone on": go_on(directory, others=1),
    }
    torch.save(done, directory / f"rank{rank}.pt")
    done["death"] = after_a_death(directory)
    torch.save(done, directory / f"rank{rank}.pt")
