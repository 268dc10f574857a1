"""Compiles the Triton kernels for GPUs that are not here, exactly as their launchers would
have launched them.

A case runs a launcher on meta tensors (so it also shows that the launcher reads no device
data: a meta tensor has none). Instead of launching, Triton's JIT records the kernel, its
arguments and its options; these are compiled for each architecture, `cuobjdump` tells the
registers, the stack and the spills of the cubin, and the PTX which matrix instructions it has.
Runs in a process of its own, without TRITON_INTERPRET:

    python tests/kernels/gate.py [--show] cases_layers 80 90 100
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

SHARED_LIMIT = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # bytes of shared memory a block may have
MMA = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Case:
    """One call of a launcher on meta tensors.

    mma: the matrix instruction class ("mma", "wgmma", "tcgen05") of each kernel on sm_80,
    sm_90 and sm_100, by the kernel's name, "mma|wgmma" where its launches differ; the kernels
    that are not named must have none.
    """

    name: str
    launch: Callable[[], object]
    mma: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    sms: tuple[int, ...] = (80, 90, 100)  # where the launcher would launch it like this


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel of a case on one architecture; `shared` includes what is
    allocated at the launch.
    """

    case: str
    kernel: str
    sm: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    mma: list[str]
    expected: str | None

    def faults(self) -> list[str]:
        """Why this must not be launched."""
        found = []
        if self.stack or self.local:
            found.append(f"spills {max(self.stack, self.local)} bytes")
        if self.registers * self.warps * 32 > 65536:
            found.append(
                f"needs {self.registers} registers in each of {self.warps} warps"
            )
        if self.shared > SHARED_LIMIT[self.sm]:
            found.append(
                f"needs {self.shared} bytes of shared memory of {SHARED_LIMIT[self.sm]}"
            )
        if not (
            self.mma == []
            if self.expected is None
            else "".join(self.mma) in self.expected.split("|")
        ):
            found.append(
                f"uses {self.mma or 'no matrix instruction'}, expected {self.expected or 'none'}"
            )
        return found


def recorded(launch: Callable[[], object]) -> list[tuple]:
    """(kernel, its arguments by name, options) of every launch that `launch` would have made."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel, *args, grid, warmup, **named):
        parameters = [parameter.name for parameter in kernel.params]
        values = dict(zip(parameters, args, strict=False))
        values |= {name: named.pop(name) for name in parameters if name in named}
        values |= {p.name: p.default for p in kernel.params if p.name not in values}
        launches.append((kernel, values, named))

    run, JITFunction.run = JITFunction.run, record
    try:
        launch()
    finally:
        JITFunction.run = run
    return launches


def source(kernel, values: dict[str, object]):
    """The ASTSource that Triton's JIT would make: 1 and None become constants, multiples of 16
    are marked as such.
    """
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = (
                "*" + TYPES[value.dtype],
                True,
            )  # as the allocator aligns
        else:
            wide = isinstance(value, int) and abs(value) >= 1 << 31
            signature[parameter.name] = (
                "fp32" if isinstance(value, float) else "i64" if wide else "i32"
            )
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the one kernel in a cubin, in cuobjdump's words."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout
    return {
        name: int(number)
        for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)
    }


def compile_case(case: Case, sms: tuple[int, ...], seen: dict) -> Iterator[Compiled]:
    """Every kernel of the case on every architecture; `seen` keeps what cases have in common."""
    import triton
    from triton.backends.compiler import GPUTarget

    for kernel, values, options in recorded(case.launch):
        built = source(kernel, values)
        for sm in set(sms) & set(case.sms):
            key = (kernel.__name__, built.hash(), str(options), sm)
            if key not in seen:
                done = triton.compile(
                    built, target=GPUTarget("cuda", sm, 32), options=options
                )
                mma = [
                    name
                    for name, instruction in MMA.items()
                    if instruction in done.asm["ptx"]
                ]
                seen[key] = resources(done.asm["cubin"]), done.metadata, mma
            used, metadata, mma = seen[key]
            expected = case.mma.get(kernel.__name__)
            yield Compiled(
                case=case.name,
                kernel=kernel.__name__,
                sm=sm,
                registers=used["REG"],
                stack=used["STACK"],
                local=used["LOCAL"],
                shared=metadata.shared,
                warps=metadata.num_warps,
                mma=mma,
                expected=expected and expected[(80, 90, 100).index(sm)],
            )


def main(module: str, *sms: str) -> None:
    """Print one JSON object a kernel, case and architecture, or with --show a table."""
    show = "--show" in sys.argv
    seen: dict = {}
    for case in importlib.import_module(module).CASES:
        for compiled in compile_case(case, tuple(map(int, sms)), seen):
            if show:
                c, faults = compiled, "; ".join(compiled.faults())
                print(
                    f"{c.case:40} {c.kernel:22} sm_{c.sm:<4} {c.registers:4} regs "
                    f"{c.warps:2} warps "
                    f"{c.shared:7} B {','.join(c.mma):8} {faults}",
                    flush=True,
                )
            else:
                print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]
    sys.modules["gate"] = sys.modules[
        "__main__"
    ]  # the cases' own import of `gate` finds this module
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--")))
