"""How much memory is free: for keys and values, and for the micro-batches of a training."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # of a limit and of what is used of it
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> int:
    """Return how many bytes could be allocated now, by the machine and, on a CPU, the limits of
    the control groups that this process is in.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # what the operating system would give up its caches for
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        available = 1024 * next(
            int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
        return min(available, *rooms(CGROUPS, Path("/proc/self/cgroup")))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rooms(root: Path, membership: Path) -> list[int]:
    """Return what each control group above this process leaves of its limit, in bytes; the
    files' names are those of version 2 and 1. Memory that holds read files counts as left. A
    group whose files cannot be read says nothing.
    """
    named = membership.read_text().splitlines() if membership.is_file() else []
    places = {root, root / "memory"}
    for line in named:  # 0::/PATH, or N:memory:/PATH
        _, kind, path = line.split(":", 2)
        here = (root / "memory" if kind else root) / path.lstrip("/")
        places |= {
            place for place in (here, *here.parents) if place.is_relative_to(root)
        }
    found = [sys.maxsize]
    for place, (limit, used) in product(places, CGROUP_FILES):
        with suppress(OSError, ValueError):  # ValueError: the limit is "max"
            most = int((place / limit).read_text())
            stat = dict(map(str.split, (place / "memory.stat").read_text().splitlines()))
            taken = int((place / used).read_text()) - int(stat.get("inactive_file", 0))
            found.append(max(0, most - taken))
    return found
