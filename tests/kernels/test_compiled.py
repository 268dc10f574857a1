"""Building the CPU kernels, and what happens where they cannot be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import compiled, packed
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing built yet; what is built here is not optimised, which takes a fifth of the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", "-O0")
    compiled.library.cache_clear()
    yield tmp_path / "nanomath"
    compiled.library.cache_clear()


def test_built_once_and_kept(fresh, monkeypatch):
    first = compiled.library()
    files = list(fresh.iterdir())
    assert first is not None and len(files) == 1 and compiled.library() is first
    compiled.library.cache_clear()
    monkeypatch.setattr(compiled.subprocess, "run", None)  # would fail
    assert compiled.library() is not None and list(fresh.iterdir()) == files


@pytest.mark.parametrize("what", ["none", "broken"])
def test_without_a_compiler_the_references_run(fresh, monkeypatch, what):
    if what == "none":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: None)
        reason = "no C[+][+] compiler was found .install g[+][+]"
    else:
        monkeypatch.setenv("CXX", "false")
        reason = "the compiler .false. failed"
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.warns(
        UserWarning,
        match=f"^the CPU kernels could not be built, .* more slowly: {reason}",
    ):
        found = add_rms_norm(x, None, weight, 1e-5)[1]
    assert torch.equal(found, add_rms_norm_reference(x, None, weight, 1e-5)[1])
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_cache_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    assert compiled.library() is not None


def test_without_openmp_there_is_one_thread(fresh, monkeypatch):
    """As where the compiler knows no -fopenmp, or PyTorch has loaded another runtime."""
    build = compiled.build

    def refuse(options):
        if "-fopenmp" in options:
            raise OSError("undefined symbol: GOMP_parallel")
        return build(options)

    monkeypatch.setattr(compiled, "build", refuse)
    x, weight = torch.randn(300, 80), torch.ones(80)
    assert torch.allclose(
        add_rms_norm(x, None, weight, 1e-5)[1],
        add_rms_norm_reference(x, None, weight, 1e-5)[1],
    )


LEVELS = {
    "AVX2": ["x86-64", "x86-64-v3"],
    "AVX512": ["x86-64", "x86-64-v3", "x86-64-v4"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "level",
    LEVELS.get(torch.backends.cpu.get_cpu_capability(), []) if packed.X86 else [],
)
def test_the_forms_for_other_processors(level, tmp_path):
    """Registers of another width, and fewer, take other tiles: the tests of the CPU forms
    again, built for these.
    """
    here = Path(__file__).parent
    names = ("attention", "lm_head", "packed", "rms_norm", "rope_write", "swiglu")
    files = [str(here / f"test_{name}.py") for name in names] + [
        str(here.parent / "rollout" / "test_small_model.py")
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    chosen = ["-k", "cpu or packed or small_model"]
    environment = os.environ | {
        "CXXFLAGS": f"-march={level}",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [*command, *chosen],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and len(list((tmp_path / "nanomath").iterdir())) == 1, (
        done.stdout[-3000:]
    )
