"""A pretended GPU: runs on a machine without one what nanomath does on "cuda", and is as
strict about it.

Its tensors say that they are on cuda:0 and compute on the CPU; Triton's kernels are
interpreted. As on a GPU

- operations that mix devices are refused, but for copies, indices, and numbers without dimension,
- memory that was only allocated holds nothing of use: NaN, or integers that are far out of range,
- a CUDA graph is captured without anything being computed; what makes the host wait, or reads the
  host's memory, is refused; a replay does the same operations on the same memory, and sees nothing
  of what Python has changed since.

It cannot show what only the hardware does: speed, races, how much memory there is, the sums of
tensor cores.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

CONVERT = interpreter._convert_float
aten = torch.ops.aten
MEMORY = 8 << 30  # bytes it says it has
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
}
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class GpuTensor(Tensor):
    """A tensor on cuda:0 whose numbers are `inner`, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", 0))
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        layout = inner.size(), inner.stride(), inner.storage_offset()
        # PyTorch itself must take it for a tensor of the CPU: without CUDA it has no gradients
        # for others.
        made = Tensor._make_wrapper_subclass(
            cls, *layout, dtype=inner.dtype, device="cpu"
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function}: this tensor outlived its GPU")

    def to(self, *args, **kwargs) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = args[0].device, args[0].dtype
        copy = kwargs.pop("copy", False)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        here = Tensor.to(self, dtype or self.dtype, copy=copy)
        return (
            here
            if device is None or device.type == "cuda"
            else aten._to_copy(here, device=device)
        )

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *_, **__) -> None:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first"
        )

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:
        return f"{self.inner} on cuda:0"

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copied = GpuTensor(self.inner.detach().clone())
            memo[id(self)] = (
                nn.Parameter(copied, self.requires_grad)
                if isinstance(self, nn.Parameter)
                else copied
            )
        return memo[id(self)]


class Event:
    """Stands for torch.cuda.Event, with the clock of the CPU."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.seconds - self.seconds) * 1e3


class Graph:
    """Stands for torch.cuda.CUDAGraph: kernels in the order in which they were captured."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.own: set[int] = set()  # storages that were allocated while it was captured
        self.before: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # memory that is written meanwhile, and what was in it
        self.alive: list[Tensor] = []

    def pool(self) -> int:
        return id(self)

    def replay(self) -> None:
        for operation in self.operations:
            operation()

    def will_write(self, tensor: Tensor) -> None:
        """Remember what is in the memory of a tensor that the graph did not allocate itself."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own | self.before.keys():
            everything = torch.empty(0, dtype=torch.uint8).set_(
                storage, 0, (storage.nbytes(),)
            )
            self.before[storage.data_ptr()] = everything, everything.clone()

    def captured(
        self,
        function: torch._ops.OpOverload,
        run: Callable,
        inputs: list[Tensor],
        out: object,
    ) -> None:
        """An operation that gave `out`."""
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        memory = {x.untyped_storage().data_ptr() for x in inputs}
        fresh = {
            i: x
            for i, x in enumerate(outputs)
            if x.untyped_storage().data_ptr() not in memory
        }
        self.own |= {x.untyped_storage().data_ptr() for x in fresh.values()}
        self.alive += [*inputs, *outputs]

        def again() -> None:
            found = [x for x in tree_leaves(run()) if isinstance(x, Tensor)]
            for i, x in fresh.items():
                x.copy_(found[i])

        allocates = function.overloadpacket.__name__ in ALLOCATES
        # Any other only names memory
        if function._schema.is_mutable or (fresh and not allocates):
            self.operations.append(again)

    def end(self) -> None:
        """Capturing computes nothing: put back what was written."""
        for tensor, value in self.before.values():
            tensor.copy_(value)


class PretendedGpu(TorchDispatchMode):
    """While it is entered there is a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.capturing: Graph | None = None
        self.in_backward = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inputs = [x.inner for x in given if isinstance(x, GpuTensor)]
        on_gpu = self._is_on_gpu(name, kwargs, given)
        if not on_gpu and not inputs:
            return function(*args, **kwargs)
        _check_devices(function, name, args, given)
        if self.capturing:
            _check_captures(function, name, args, given, on_gpu)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        here = tree_map_only(GpuTensor, lambda x: x.inner, (args, kwargs))
        if not on_gpu:
            return function(*here[0], **here[1])
        if self.capturing:
            for tensor in _written(function, *here):
                self.capturing.will_write(tensor)
        out = _compute(function, name, *here)
        if self.capturing:
            self.capturing.captured(
                function, lambda: _compute(function, name, *here), inputs, out
            )
        known = {id(x.inner): x for x in given if isinstance(x, GpuTensor)}
        return tree_map_only(
            Tensor, lambda x: known[id(x)] if id(x) in known else GpuTensor(x), out
        )

    def _is_on_gpu(self, name: str, kwargs: dict, given: list[Tensor]) -> bool:
        """Whether an operation gives something on the GPU."""
        device = kwargs.get("device")
        if name == "copy_":
            return isinstance(given[0], GpuTensor)
        ours = any(isinstance(x, GpuTensor) for x in given)
        if device is None or torch.device(device).type == "cuda":
            return ours or device is not None
        # PyTorch's own code asks for what it takes the device of a tensor to be.
        like = (
            name.startswith("new_")
            or name.endswith("_like")
            or (self.in_backward and "layout" in kwargs)
        )
        return like and ours if given else self.in_backward

    def launch(
        self, run: Callable, kernel: InterpretedFunction, args: tuple, kwargs: dict
    ) -> None:
        """Run a kernel of Triton's; `run` is what the interpreter would do."""
        for tensor in (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)):
            if not isinstance(tensor, GpuTensor):
                raise ValueError(
                    "Pointer argument cannot be accessed from Triton (cpu tensor?)"
                )
            if self.capturing:
                self.capturing.will_write(tensor.inner)
        args, kwargs = tree_map_only(GpuTensor, lambda x: x.inner, (args, kwargs))
        run(kernel, *args, **kwargs)
        if self.capturing:
            self.capturing.operations.append(lambda: run(kernel, *args, **kwargs))

    @contextlib.contextmanager
    def capture(self, graph: Graph, pool: int | None = None) -> Iterator[None]:
        """Stands for torch.cuda.graph."""
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None
            graph.end()


def _check_devices(
    function: torch._ops.OpOverload, name: str, args: tuple, given: list[Tensor]
) -> None:
    """RuntimeError for what needs its tensors on one device."""
    if name in INDEXING:  # the indices may be anywhere
        given = [args[0], *(x for x in args[2:3] if isinstance(x, Tensor))]
    strangers = [x for x in given if not isinstance(x, GpuTensor) and x.dim()]
    if (
        name not in COPIES
        and strangers
        and (len(strangers) < len(given) or name in INDEXING)
    ):
        raise RuntimeError(
            f"{function}: expected all tensors on one device, but found cuda:0 and cpu"
        )


def _check_captures(
    function: torch._ops.OpOverload,
    name: str,
    args: tuple,
    given: list[Tensor],
    on_gpu: bool,
) -> None:
    """RuntimeError for what makes the host wait, or reads its memory."""
    masks = (
        [x for x in args[1] if x is not None and x.dtype == torch.bool]
        if name in INDEXING
        else []
    )
    hosts = [
        x for x in given if not isinstance(x, GpuTensor) and (x.dim() or name in COPIES)
    ]
    if name in WAITS or masks or hosts or not on_gpu:
        raise RuntimeError(
            f"{function}: operation not permitted when stream is capturing"
        )


def _written(
    function: torch._ops.OpOverload, args: tuple, kwargs: dict
) -> list[Tensor]:
    """The tensors that an operation writes."""
    named = zip(function._schema.arguments, args, strict=False)
    named = [
        *named,
        *((a, kwargs[a.name]) for a in function._schema.arguments if a.name in kwargs),
    ]
    written = [
        value
        for argument, value in named
        if argument.alias_info and argument.alias_info.is_write
    ]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]


def _compute(
    function: torch._ops.OpOverload, name: str, args: tuple, kwargs: dict
) -> object:
    """The operation, on the CPU."""
    # The CPU has no products of bfloat16 that are summed up in float32
    if function is aten.mm.dtype:
        return torch.mm(args[0].to(args[2]), args[1].to(args[2]))
    if function is aten.addmm.dtype_out:
        return torch.addmm(args[0], args[1].to(args[3]), args[2].to(args[3]), **kwargs)
    out = function(*args, **kwargs)
    if name in ALLOCATES and out.dtype != torch.bool:
        out.fill_(
            torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max // 2
        )
    return out


def converted(
    values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object
) -> np.ndarray:
    """Stands for the interpreter's conversion of numbers, which cuts float32 off to bfloat16
    where a GPU rounds.
    """
    if (source, target) != (tl.float32, tl.bfloat16):
        return CONVERT(values, source, target, rounding)
    rounded = torch.tensor(values.view(np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


class Numbered(TorchFunctionMode):
    """Calls that say "cuda" say "cuda:0": PyTorch would have to ask a driver which one is
    meant.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.to and isinstance(args[1], GpuTensor):
            args = args[0], args[1].device, args[1].dtype
        if function is not torch.device:
            args, kwargs = tree_map(_numbered, (args, kwargs))
        if function is torch.tensor:  # which would copy to the device by itself
            device = kwargs.pop("device", None)
            return function(*args, **kwargs).to(device or "cpu")
        return function(*args, **kwargs)


def _numbered(value: object) -> object:
    return (
        torch.device("cuda", 0)
        if isinstance(value, str | torch.device) and str(value) == "cuda"
        else value
    )


class AnyGenerator(torch.Generator):
    """Random numbers for any device."""

    def __new__(cls, device: object = "cpu") -> AnyGenerator:
        return super().__new__(cls)


def move(module: nn.Module, *args, **kwargs) -> nn.Module:
    """Stands for `nn.Module.to`, which puts other memory under a parameter where only its
    class would be another.
    """
    device, dtype, *_ = torch._C._nn._parse_to(
        *tree_map(_numbered, args), **tree_map(_numbered, kwargs)
    )
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for named in (part._parameters, part._buffers):
            for name, value in named.items():
                if value is not None and id(value) not in moved:
                    new = value.detach().to(
                        device or value.device,
                        dtype if value.is_floating_point() else None,
                    )
                    is_parameter = isinstance(value, nn.Parameter)
                    moved[id(value)] = (
                        nn.Parameter(new, value.requires_grad) if is_parameter else new
                    )
                named[name] = None if value is None else moved[id(value)]
    return module


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Inside there is a GPU, "cuda"."""
    gpu, interpret, engine = (
        PretendedGpu(),
        InterpretedFunction.run,
        torch.autograd._engine_run_backward,
    )
    stream = SimpleNamespace(wait_stream=lambda _: None)
    properties = SimpleNamespace(
        total_memory=MEMORY, shared_memory_per_block_optin=227 << 10
    )

    def backward(roots: tuple[Tensor, ...], *args, **kwargs) -> object:
        before, gpu.in_backward = (
            gpu.in_backward,
            any(isinstance(x, GpuTensor) for x in roots),
        )
        try:
            return engine(roots, *args, **kwargs)
        finally:
            gpu.in_backward = before

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "synchronize": None,
        "empty_cache": None,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 1 << 20,
        "reset_peak_memory_stats": None,
        "get_device_name": "a pretended GPU",
        "get_device_properties": properties,
        "Stream": stream,
        "current_stream": stream,
        "stream": contextlib.nullcontext(),
        "_lazy_init": None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", gpu.capture)
        patch.setattr(interpreter, "_convert_float", converted)
        patch.setattr(torch, "Generator", AnyGenerator)
        patch.setattr(nn.Module, "to", move)
        patch.setattr(torch.autograd, "_engine_run_backward", backward)
        patch.setattr(
            InterpretedFunction,
            "run",
            lambda kernel, *a, **k: gpu.launch(interpret, kernel, a, k),
        )
        with gpu, Numbered():
            yield gpu
