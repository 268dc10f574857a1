"""Building the CPU kernels, and what happens where they cannot be built."""

from __future__ import annotations

import shutil

import pytest
import torch

from kernels import compiled
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
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
    with pytest.warns(UserWarning, match=f"^the CPU kernels could not be built, .* more slowly: {reason}"):
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
    assert torch.allclose(add_rms_norm(x, None, weight, 1e-5)[1], add_rms_norm_reference(x, None, weight, 1e-5)[1])
