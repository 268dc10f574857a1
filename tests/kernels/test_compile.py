"""Every kernel, as launched, compiles for three generations of GPUs: no spills, and the matrix
units it should use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from gate import Compiled

ROOT = Path(__file__).parents[2]
LISTS = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
ARCHITECTURES = (80, 90, 100)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="session")
def compiled() -> dict[str, list[Compiled]]:
    """What became of each list of cases. The gate's processes compile for real, not for the
    interpreter.
    """
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    }
    found = {}
    for name in LISTS:
        command = [
            sys.executable,
            str(Path(__file__).with_name("gate.py")),
            name,
            *map(str, ARCHITECTURES),
        ]
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = [
            Compiled(**json.loads(line)) for line in done.stdout.splitlines()
        ]
    return found


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("name", LISTS)
def test_compiles_without_spills_and_with_the_expected_instructions(compiled, name, sm):
    kernels = [kernel for kernel in compiled[name] if kernel.sm == sm]
    assert kernels, "no case launched a kernel"
    faults = [f"{k.case}: {k.kernel} {fault}" for k in kernels for fault in k.faults()]
    assert not faults, "\n".join(faults)
