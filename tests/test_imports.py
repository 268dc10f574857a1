"""Who may import whom, read off the source of every file; and that our `kernels` is in
nobody's way.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels": set(),
    "nanomath": set(),
    "nanomath.algorithms": set(),
    "nanomath.data": set(),
    "nanomath.config": set(),
    "nanomath.settings": {
        *("nanomath.config", "nanomath.algorithms", "nanomath.data"),
        *(
            "nanomath.rewards",
            "nanomath.process",
        ),  # whose tables are the choices of keys
    },
    "nanomath.models": {"kernels", "nanomath.data"},
    "nanomath.rollout": {"kernels", "nanomath.models", "nanomath.data"},
    "nanomath.rewards": {"nanomath.config", "nanomath.data", "nanomath.models"},
    "nanomath.process": {
        "nanomath.rollout",
        "nanomath.rewards",
        "nanomath.models",
        "nanomath.data",
        "nanomath.algorithms",
    },
    "nanomath.training": {
        *(
            "kernels",
            "nanomath.rollout",
            "nanomath.models",
            "nanomath.algorithms",
            "nanomath.data",
        ),
        *(
            "nanomath.settings",
            "nanomath.config",
            "nanomath.rewards",
            "nanomath.process",
        ),
    },
    "nanomath.analysis": {
        *(
            "kernels",
            "nanomath.algorithms",
            "nanomath.data",
            "nanomath.config",
            "nanomath.settings",
        ),
        *(
            "nanomath.models",
            "nanomath.rollout",
            "nanomath.rewards",
            "nanomath.process",
        ),
        "nanomath.training",  # which writes the run directories that are read here
    },
}
TOP = {
    "nanomath.commands",
    "nanomath.__main__",
    "scripts",
}  # these put the parts together


def room_of(module: str) -> str:
    """ "nanomath.data.world.maths" is in the room "nanomath.data"."""
    return ".".join(module.split(".")[: 1 if module.startswith("kernels") else 2])


def sources() -> Iterator[tuple[str, bool, Path]]:
    """Module name, whether it is a package, and file of everything that we ship."""
    for path in sorted([*ROOT.glob("nanomath/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if package else parts), package, path
    for path in sorted(ROOT.glob("train_*.py")):
        yield f"scripts.{path.stem}", False, path


def imported(module: str, package: bool, path: Path) -> set[str]:
    """Every module the file imports, inside functions too; relative names are made absolute."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + package]
            base = ".".join(
                [
                    *(above if node.level else []),
                    *([node.module] if node.module else []),
                ]
            )
            found |= (
                {f"{base}.{alias.name}" for alias in node.names}
                if base == "nanomath"
                else {base}
            )
    return found


FILES = [pytest.param(*source, id=source[0]) for source in sources()]


@pytest.mark.parametrize(("module", "package", "path"), FILES)
def test_rooms_know_only_rooms_below(module, package, path):
    room = "scripts" if module.startswith("scripts") else room_of(module)
    ours = {
        room_of(name)
        for name in imported(module, package, path)
        if name.split(".")[0] in ("nanomath", "kernels")
    }
    if room not in TOP:
        assert ours <= ALLOWED[room] | {room}


@pytest.mark.parametrize(("module", "package", "path"), FILES)
def test_the_library_needs_no_transformers_and_no_script(module, package, path):
    roots = {name.split(".")[0] for name in imported(module, package, path)}
    assert not roots & {"transformers", "train_sft", "train_grpo", "tests"}


def test_importing_costs_nothing():
    done = run(
        "import sys, nanomath; assert 'torch' not in sys.modules; assert nanomath.__version__"
    )
    assert done.returncode == 0, done.stderr


def test_every_promised_name_is_there():
    done = run(
        "import nanomath; [getattr(nanomath, name) for name in nanomath.__all__]"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed"
)
@pytest.mark.slow
def test_transformers_works_beside_our_kernels():
    """transformers looks for a distribution that is called `kernels` as well."""
    done = run(
        "import kernels, kernels.philox; from transformers import AutoModelForCausalLM, "
        "LlamaConfig, LlamaForCausalLM;"
        "LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, "
        "num_hidden_layers=1,"
        "num_attention_heads=1)).generate(max_new_tokens=1, do_sample=False)"
    )
    assert done.returncode == 0, done.stderr


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
