"""run.json: what a run was made with, one object for each time it was started or resumed.

Each sitting has the command, the commit of nanomath where it runs from a clone, the versions and
the machine, and, as of the last checkpoint or the end: the steps done, minutes and peak memory.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("nanomath", "torch", "tokenizers", "safetensors", "numpy", "triton")


class Sittings:
    """Keeps run.json at `path`; this sitting began at update `start` on `device`."""

    def __init__(self, path: Path, start: int, device: torch.device) -> None:
        self.path = path
        self.device = device
        self.clock = time.perf_counter()
        before = json.loads(path.read_text("utf-8")) if start and path.exists() else []
        self.all = [sitting for sitting in before if sitting["from_step"] < start]
        self.all.append(
            {
                "command": [*program(), *sys.argv[1:]],
                "began": datetime.now(UTC).isoformat(timespec="seconds"),
                "from_step": start,
                "commit": commit(),
                "versions": versions(),
                "machine": machine(device),
            }
        )

    def text(self, step: int) -> str:
        """Return the content of run.json when `step` updates have been done."""
        self.all[-1] |= {
            "to_step": step,
            "minutes": round((time.perf_counter() - self.clock) / 60, 2),
            "peak_memory_gib": round(peak_memory(self.device) / 2**30, 3),
        }
        return json.dumps(self.all, indent=1) + "\n"


def program() -> list[str]:
    """What was started, as it is typed after `python`."""
    name = Path(sys.argv[0]).name
    return ["-m", "nanomath"] if name == "__main__.py" else [name]


def commit() -> str:
    """Return the commit of the clone that nanomath runs from, with "+" where files have
    changed since.

    It is empty where nanomath runs from no clone.
    """
    if not (ROOT / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return Python's version and those of the packages, by default what a run is made with."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Return processor, threads, memory and GPU."""
    facts = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(total_memory(torch.device("cpu")) / 2**30, 1),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def processor() -> str:
    """Return the processor's name as Linux gives it, or else the kind of machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.exists() else []
    names = [
        line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def peak_memory(device: torch.device, restart: bool = False) -> int:
    """Return the most bytes used at a time: of the GPU, or resident in this process.

    With `restart` the peak is counted from now on, where the system allows it.
    """
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if restart and status.is_file():
        Path("/proc/self/clear_refs").write_text("5")
    text = status.read_text("utf-8") if status.is_file() else ""
    if found := re.search(r"VmHWM:\s*(\d+)", text):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_now(device: torch.device) -> int:
    """Return the bytes in use: of the GPU, or resident in this process, where Linux tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/statm")
    if not status.is_file():
        return peak_memory(device)
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def total_memory(device: torch.device) -> int:
    """Return all bytes of the GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
