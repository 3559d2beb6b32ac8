"""Compile, without a GPU, exactly what the backend launches: it runs on meta tensors against a stand-in for the driver.

`compiled` calls the backend's own primitives, so shapes, strides, types, tiles and specialisations are those of a real
call; Triton's launcher compiles each kernel for the target and is kept from starting it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from infopo_kernels.backends.base import Gradients, Head, TailReport, with_memory_for_logits
from infopo_kernels.backends.triton import launch
from infopo_kernels.backends.triton.backend import TritonBackend
from infopo_kernels.backends.triton.products import LibraryProducts
from infopo_kernels.backends.triton.tiles import Target
from infopo_kernels.objectives import InfoPO, Sequences
from infopo_kernels.options import WORKSPACE_MIB_GPU
from infopo_kernels.packing import Rows

HIDDEN_SIZES = (576, 2048, 4096, 5120, 8192)
VOCABULARIES = (32000, 49152, 128256, 151936, 262144)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Shape:
    """Rows, hidden size and vocabulary of a call, its input type and whether every logit option is on."""

    n: int
    h: int
    v: int
    dtype: torch.dtype
    options: bool
    tf32: bool = False


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    shape: Shape
    """The first shape that asked for it."""
    constants: tuple[tuple[str, Any], ...]
    compiled: Any
    """Triton's CompiledKernel: `asm`, `metadata`."""


class _Driver:
    """What Triton's launcher asks of a driver before it starts a kernel."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def shapes(target: Target) -> Iterator[Shape]:
    """The table of shapes: every hidden size x vocabulary x type x options, one that is aligned to nothing, and one of
    ones, which Triton makes constants of.

    16384 rows take every branch (chunks after the first add to what is there); 64 rows split the sums over the
    vocabulary to fill the device.
    """
    for dtype, options in itertools.product(DTYPES, (False, True)):
        for h, v, n in itertools.product(HIDDEN_SIZES, VOCABULARIES, (16384, 64)):
            yield Shape(n, h, v, dtype, options)
        yield Shape(1000, 577, 32003, dtype, options)
        yield Shape(1, 1, 1, dtype, options)
    if target.backend == "cuda":
        yield Shape(16384, 4096, 128256, torch.float32, True, tf32=True)


def run(shape: Shape) -> None:
    """Every primitive with every combination of buffers that launches kernels of its own."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    n, h, v, dtype = shape.n, shape.h, shape.v, shape.dtype
    bias = empty(v, dtype=dtype) if shape.options else None
    softcap = 30.0 if shape.options else None
    exact = Head(empty(n, h, dtype=dtype), empty(v, h, dtype=dtype), bias, softcap, 1.25, WORKSPACE_MIB_GPU << 20)
    labels, c = empty(n, dtype=torch.int64), empty(n)
    hidden, bias_grad = empty(n, h, dtype=dtype), empty(v) if shape.options else None
    backend = TritonBackend()
    _, lse = backend.logprob(exact, labels)
    pooled, report = replace(exact, tail_threshold=2.0**-13), TailReport.empty(exact)
    for head, gradients in itertools.product(
        (exact, pooled),
        (
            Gradients(hidden, empty(v, h), bias_grad),
            Gradients(hidden, empty(v, h, dtype=dtype), bias_grad),
            Gradients(hidden, None, None, report),
        ),
    ):
        backend.logprob_and_grad(head, labels, c, gradients)
        backend.backward(head, labels, lse, c, gradients)
        for room in (head, replace(head, workspace_bytes=1 << 36)):  # logits in dW, and beside it
            most = 0 if gradients.weight is None else backend.kept_rows(room, gradients.weight)
            if most:
                own, into = with_memory_for_logits(backend, room, gradients, min(most, n))
                backend.logprob(own, labels, into)
                backend.backward(own, labels, lse, c, into, labels)
    backend.scale_(hidden, c)
    backend.scale_(hidden, empty())
    rows = Rows(exact.hidden, labels, empty(9, dtype=torch.int32), None)
    for average, weights in itertools.product((False, True), (None, empty(8, dtype=torch.float64))):
        counts, chosen = empty(8, dtype=torch.int64), empty(8, dtype=torch.bool)
        sequences = Sequences(counts, chosen, empty(8, dtype=torch.float64), 4.0, weights)
        backend.objective(InfoPO(average=average), c, rows, sequences)


@dataclass(frozen=True)
class Launched:
    """One launch that the backend asked for: its kernel, its grid and its arguments by name."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@contextmanager
def recorded(target: Target, live: int | None = None) -> Iterator[list[Launched]]:
    """Collect the launches of what runs inside, on meta tensors, as they would be made on `target`; compile nothing.

    Products of the library are among them, as "library_hidden" and "library_weight". Tensors without storage have no
    number of live rows: the host learns that there are `live` of them, or that all are live.
    """
    launches: list[Launched] = []
    start, find, known = JITFunction.run, launch.target_of, LibraryProducts.known_rows
    own = LibraryProducts.hidden, LibraryProducts.weight

    def hidden(self: LibraryProducts, g: Any, part: Any, row0: int, v0: int, columns: int, *, add: bool) -> None:
        arguments = {"g_ptr": g, "part_ptr": part, "row0": row0, "C": part.shape[1], "columns": columns, "ADD": add}
        launches.append(Launched("library_hidden", (), {**arguments, "H": part.shape[2]}))
        own[0](self, g, part, row0, v0, columns, add=add)

    def weight(self: LibraryProducts, g: Any, gathered: Any, weight_grad: Any, row0: int, *, add: bool) -> None:
        columns, h = weight_grad.shape
        arguments = {"g_ptr": g, "dw_ptr": weight_grad, "row0": row0, "C": len(gathered), "columns": columns, "H": h}
        launches.append(Launched("library_weight", (), {**arguments, "ADD": add}))
        own[1](self, g, gathered, weight_grad, row0, add=add)

    def known_rows(self: LibraryProducts) -> int | None:
        return known(self) if live is None else live

    def collect(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(Launched(self.__name__, grid, arguments))

    JITFunction.run, launch.target_of = collect, lambda device: target  # type: ignore[method-assign]
    LibraryProducts.hidden, LibraryProducts.weight = hidden, weight  # type: ignore[method-assign]
    LibraryProducts.known_rows = known_rows  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run, launch.target_of = start, find
        LibraryProducts.hidden, LibraryProducts.weight = own  # type: ignore[method-assign]
        LibraryProducts.known_rows = known  # type: ignore[method-assign]


@contextmanager
def _standing_in(target: Target, found: dict[int, Kernel], current: list[Shape]) -> Iterator[None]:
    """Send every launch to the compiler for `target`, and keep what it compiles."""
    start, find = JITFunction.run, launch.target_of

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = start(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in found:
            constants = tuple((k, x) for k, x in kwargs.items() if k.isupper() and isinstance(x, (bool, int, str)))
            found[id(kernel)] = Kernel(self.__name__, current[0], constants, kernel)
        return kernel

    JITFunction.run = compile_only
    launch.target_of = lambda device: target
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        JITFunction.run, launch.target_of = start, find


def compiled(target: Target, which: list[Shape]) -> list[Kernel]:
    """Every kernel that the backend would launch on `target` for these shapes, each once.

    Two launches share a kernel where Triton's own key says so: same constants, same types, same divisibility by 16 of
    pointers and sizes. So most hidden sizes and vocabularies of the table compile nothing new.

    Raises:
        RuntimeError: Triton is interpreting; run in a process without TRITON_INTERPRET.
    """
    if launch.INTERPRETED:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it before Triton is imported")
    found: dict[int, Kernel] = {}
    current: list[Shape] = []
    with _standing_in(target, found, current):
        for shape in which:
            current[:] = [shape]
            precision = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32" if shape.tf32 else "ieee"
            try:
                with products("triton"):  # they serve every target while a graph is captured
                    run(shape)
            finally:
                torch.backends.cuda.matmul.fp32_precision = precision
    return list(found.values())


@contextmanager
def products(which: str) -> Iterator[None]:
    """dX and dW by "triton" or "library", whatever the table says."""
    name = "INFOPO_KERNELS_GPU_PRODUCTS"
    before = os.environ.get(name)
    os.environ[name] = which
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
