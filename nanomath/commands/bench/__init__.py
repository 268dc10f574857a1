"""Measure time and memory on this machine.

    python -m nanomath bench TARGET [key=value ...]
    python -m nanomath bench rollout qwen2.5-0.5b rows=64,256 prompt=960 against=transformers
    python -m nanomath bench kernels --check
    python -m nanomath bench all out=runs/bench

  rollout     the sampler against the machine's floor, the trainer's logprobs and transformers
  kernels     every kernel against its floor and its PyTorch reference; --check: their tests
  training    SFT and GRPO steps against their floor, the plain way and trl
  all         everything above in one go, as one JSON file and one Markdown table

TARGET --help lists the keys of a target.
"""

from __future__ import annotations

from importlib import import_module

TARGETS = ("rollout", "kernels", "training", "all")


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if not argv or argv[0] not in TARGETS:
        found = f"unknown target {argv[0]!r}" if argv else "bench needs a target"
        raise ValueError(f"{found}: expected one of {', '.join(TARGETS)}")
    return import_module(f"{__name__}.{argv[0]}").main(argv[1:])
