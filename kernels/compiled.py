"""The CPU forms of the kernels: kernels/cpu.cpp, built once with the machine's C++ compiler
and called by address.

PyTorch would compute a decoding step in some forty small operations a layer, each of which
passes over memory and, with several threads, meets at a barrier: on a small model they cost
several times the matrix products. The file is built for the processor at hand when it is first
needed, in a few seconds, and kept in the user's cache directory. It uses the OpenMP threads
that PyTorch already has. Without a compiler the PyTorch references run, and a warning says so.
CXX and CXXFLAGS are heeded: CXXFLAGS=-march=x86-64-v3 shows how a processor without AVX-512
would do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.cpp")
# Sums are added in the order they are written; a product may be fused with one.
OPTIONS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
]
ATTEMPTS = (
    ["-march=native", "-fopenmp"],
    ["-march=native"],
    [],
)  # not every compiler knows these
PAGE = 16  # keys in a page of the cache, as in cpu.cpp
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
SIGNATURES = {  # in the order of cpu.cpp
    "add_rms_norm": "pppppfii",
    "rms_norm_gradient": "pppppfii",
    "swiglu": "ppii",
    "swiglu_gradient": "pppii",
    "rope_write": "pppppppppppfiiiii",
    "attend": "pppppppiiiiii",
    "causal_attention": "ppppppiiiiii",
    "causal_attention_gradient": "ppppppppiiiiii",
    "lm_head": "pppppppfiii",
    "linear": "ppppiiiiii",
    "prefill": "ppppfii",
    "decode": "ppppppppppppffiiiiii",
}
TYPES = {torch.float32: "float_forms", torch.bfloat16: "bf16_forms"}


def runs_compiled(tensor: Tensor) -> bool:
    """Whether the CPU form is to be used for work on `tensor`."""
    return tensor.is_cpu and tensor.dtype in TYPES and library() is not None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Run a function of cpu.cpp. Tensors are passed by address, None as a null pointer.
    ValueError for a tensor that does not lie in memory as its shape says.
    """
    values = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not argument.is_contiguous():
                raise ValueError(
                    f"{name}: a tensor of shape {list(argument.shape)} is not contiguous"
                )
            argument = argument.data_ptr()
        values.append(argument)
    function = library()[dtype][name]
    # The profiler would not see it otherwise, nor its sizes
    if torch.autograd.profiler._is_profiler_enabled:
        sizes = (str(argument) for argument in arguments if isinstance(argument, int))
        with torch.autograd.profiler.record_function(" ".join((name, *sizes))):
            function(*values)
    else:
        function(*values)


@cache
def library() -> dict[torch.dtype, dict[str, ctypes._CFuncPtr]] | None:
    """The functions of cpu.cpp by dtype and name; None, after a warning, where they cannot be
    built.
    """
    # OpenMP's functions are found in the runtime that PyTorch has loaded: a second one would
    # fight it for the cores.
    for options in ATTEMPTS:
        try:
            loaded = ctypes.CDLL(str(build(options)))
            return {
                dtype: _functions(getattr(loaded, table))
                for dtype, table in TYPES.items()
            }
        except OSError as error:
            reason = error
    warnings.warn(
        f"the CPU kernels could not be built, PyTorch does their work more slowly: {reason}",
        stacklevel=2,
    )
    return None


def _functions(table: ctypes._CFuncPtr) -> dict[str, ctypes._CFuncPtr]:
    table.restype = ctypes.POINTER(ctypes.c_void_p)
    return {
        name: ctypes.CFUNCTYPE(None, *(KINDS[kind] for kind in kinds))(address)
        # The table does not know its end
        for (name, kinds), address in zip(SIGNATURES.items(), table(), strict=False)
        if address
    }


def build(options: list[str]) -> Path:
    """The shared library of cpu.cpp for this processor, built unless it is there, with
    OPTIONS, these options and the environment's CXXFLAGS; OSError when that fails.
    """
    options = [*OPTIONS, *options, *os.environ.get("CXXFLAGS", "").split()]
    compiler = os.environ.get("CXX") or next(
        filter(shutil.which, ("c++", "g++", "clang++")), None
    )
    if compiler is None:
        raise OSError("no C++ compiler was found (install g++ or clang++, or set CXX)")
    cpuinfo = Path("/proc/cpuinfo")
    cores = (
        cpuinfo.read_text(encoding="utf-8").split("\n\n")
        if cpuinfo.is_file()
        else [platform.processor()]
    )
    features = [
        line
        for line in cores[0].splitlines()
        if line.startswith(("flags", "Features", "model name"))
    ]
    state = repr(
        (
            SOURCE.read_text(encoding="utf-8"),
            compiler,
            options,
            features,
            platform.machine(),
        )
    )
    name = f"cpu-{hashlib.sha256(state.encode()).hexdigest()[:16]}.so"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanomath"
    if (home / name).is_file():
        return home / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=home))
    except OSError:  # it cannot be written: this process builds its own
        home = folder = Path(tempfile.mkdtemp())
    try:
        _run(compiler, *options, "-c", str(SOURCE), "-o", str(folder / "cpu.o"))
        _run(compiler, "-shared", str(folder / "cpu.o"), "-o", str(folder / name))
        # In one step: another process may be building it too
        (folder / name).replace(home / name)
    finally:
        if folder != home:
            shutil.rmtree(folder)
    return home / name


def _run(compiler: str, *arguments: str) -> None:
    done = subprocess.run(
        [compiler, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.splitlines()
        said = next(
            (line for line in lines if "error" in line),
            lines[0] if lines else "without a word",
        )
        raise OSError(f"the compiler {compiler!r} failed: {said}")
