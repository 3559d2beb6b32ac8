"""What every launch needs to know about the head, the device and the precision, found once a call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from infopo_kernels.backends.base import Head
from infopo_kernels.backends.triton.support import release
from infopo_kernels.backends.triton.tiles import INTERPRETER, TAIL_BLOCK, TARGETS, Products, Target, Tile
from infopo_kernels.libraries import warn_untested

warn_untested("triton")

FUSED = {"enable_fp_fusion": True}
"""a * b + c in one rounding, whatever Triton's default: it halves the work of every epilogue."""

MIN_GATHERED = 1024
"""Rows that half of the workspace must hold for logits to be formed from gathered ones: eight blocks of the widest tile
at least pass over the head together."""

RELEASE = release(triton.__version__)
"""Of Triton: some spill registers where others do not."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 at import: kernels run as numpy on CPU tensors."""

if INTERPRETED:
    from infopo_kernels.backends.triton.interpreter import repair

    repair()


@dataclass(frozen=True)
class Sizes:
    """What the division of a call's work follows from: no tensor, so that a division can be cached."""

    rows: int
    hidden_size: int
    vocabulary: int
    dtype: torch.dtype
    bias: bool
    workspace_bytes: int
    tiles: Products
    multiprocessors: int
    library: bool
    """Whether dX and dW are the library's products (`products.py`)."""
    descriptors: bool
    """Whether logits are formed from gathered rows by tensor descriptors (`kernels/logits.py`)."""
    tail: bool
    """Whether the tail of G is pooled (`kernels/tail.py`)."""

    def filled(self, programs: int) -> float:
        """Share of the device that works on `programs` equal programs, one a multiprocessor, until the last is done."""
        return programs / (ceil_div(programs, self.multiprocessors) * self.multiprocessors)

    def pool_columns(self, columns: int) -> int:
        """Columns of G behind those of a piece: one for each block that pools its tail, up to whole tiles of dW and
        whole steps of dX."""
        unit = max(self.tiles.weight.rows, self.tiles.hidden.depth)
        return ceil_div(pools_of(columns), unit) * unit if self.tail else 0

    @property
    def gathered_stride(self) -> int:
        """Elements between gathered rows: a multiple of 16, so that every row starts on 16 bytes."""
        return ceil_div(self.hidden_size, 16) * 16

    def gathered(self, rows: int) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and type of gathered rows."""
        return (rows, self.gathered_stride), self.dtype


@dataclass(frozen=True)
class Launch:
    """The head with everything that its kernels' launches have in common."""

    head: Head
    sizes: Sizes
    precision: str
    """`input_precision` of float32 products: "ieee", or "tf32" where torch allows it."""
    gradient_part: int
    """Columns of G that follow a product of logits at a time (`kernels/gradient_tile.py`)."""

    @property
    def tiles(self) -> Products:
        return self.sizes.tiles

    @property
    def rows(self) -> int:
        return self.sizes.rows

    @property
    def hidden_size(self) -> int:
        return self.sizes.hidden_size

    @property
    def vocabulary(self) -> int:
        return self.sizes.vocabulary

    @property
    def library(self) -> bool:
        return self.sizes.library

    def programs(self, tiles: int) -> int:
        """Programs of a kernel of logits: one a tile, or one a multiprocessor that takes tile after tile."""
        return min(tiles, self.sizes.multiprocessors) if self.sizes.descriptors else tiles

    def operands(self, gathered: torch.Tensor | None) -> tuple[Any, Any]:
        """X and W as kernels of logits take them: the tensors, or descriptors of the gathered rows and of W."""
        if not self.sizes.descriptors:
            return self.head.hidden, self.head.weight
        assert gathered is not None
        return self._described(gathered, self.tiles.logits.rows), self._weight_described

    @cached_property
    def _weight_described(self) -> TensorDescriptor:
        return self._described(self.head.weight, self.tiles.logits.columns)

    def _described(self, matrix: torch.Tensor, rows: int) -> TensorDescriptor:
        """Of a matrix [.., H], in blocks of so many rows."""
        shape, block = [len(matrix), self.hidden_size], [rows, self.tiles.logits.depth]
        return TensorDescriptor(matrix, shape, [matrix.stride(0), 1], block)

    @property
    def keeps_logits(self) -> bool:
        """Whether G may be formed from kept exponentials: with a softcap they hold its slope too (`softmax_tile.py`),
        and a pooled tail wants the probabilities."""
        return self.head.softcap is None or not self.sizes.tail

    @property
    def logit_arguments(self) -> dict[str, Any]:
        """Arguments of every kernel that forms logits."""
        head, tile = self.head, self.tiles.logits
        return {
            "V": self.vocabulary,
            "H": self.hidden_size,
            "stride_xn": head.hidden.stride(0),
            "stride_wv": head.weight.stride(0),
            "softcap": 1.0 if head.softcap is None else head.softcap,
            "scale": head.scale,
            "HAS_BIAS": head.bias is not None,
            "HAS_SOFTCAP": head.softcap is not None,
            "NEGATIVE": head.scale < 0,
            "BLOCK_N": tile.rows,
            "BLOCK_V": tile.columns,
            "BLOCK_H": tile.depth,
            "PART": tile.part,
            "EVEN_H": self.hidden_size % tile.depth == 0,
            "GROUP": tile.group,
            "DESCRIPTORS": self.sizes.descriptors,
            **self.product_arguments(tile),
        }

    def product_arguments(self, tile: Tile) -> dict[str, Any]:
        """Arguments of every kernel with a product."""
        return {"PRECISION": self.precision, "num_warps": tile.warps, "num_stages": tile.stages, **FUSED}


_TUNED: set[tuple[Any, ...]] = set()
"""Kernel, type and values of its key for which the autotuner has chosen in this process."""


def start_product(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    key: tuple[str, ...],
    rows: int,
    present: Callable[[], int],
    in_place: str | None = None,
    **named: Any,
) -> None:
    """Start a kernel with a product as the table says, or as Triton's autotuner finds (INFOPO_KERNELS_AUTOTUNE=1).

    `key` names the arguments that a choice depends on, beside the size class of `rows`, which the grid is laid out
    for. `present` reads from the device how many of them there are: trials of a launch with little to do would choose
    at random, so that below half of `rows` the table serves until a fuller launch comes. `in_place` is the buffer that
    is added to, which trials have to restore (a copy of it is made then: the first call of a shape is not held to the
    workspace).
    """
    named["ROWS"] = 0
    if os.environ.get("INFOPO_KERNELS_AUTOTUNE") == "1" and not INTERPRETED:
        named["ROWS"] = 1 << (rows - 1).bit_length()
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        types = tuple(value.dtype for value in arguments if isinstance(value, torch.Tensor))
        choice = (kernel, types, *(values[name] for name in (*key, "ROWS")))
        if choice in _TUNED or 2 * present() >= rows:
            _TUNED.add(choice)
            kernel = _tuned(kernel, (*key, "ROWS"), in_place)
            named = {name: value for name, value in named.items() if name not in ("GROUP", "num_warps", "num_stages")}
    kernel[grid](*arguments, **named)


@cache
def _tuned(kernel: Any, key: tuple[str, ...], in_place: str | None) -> Any:
    """The kernel behind Triton's autotuner, its choices cached on disk.

    Blocks stay those of the table, because layouts of temporaries follow from them.
    """
    return triton.autotune(
        configs=[
            triton.Config({"GROUP": group}, num_warps=warps, num_stages=stages)
            for group in (4, 8, 16)
            for warps in (4, 8)
            for stages in (2, 3, 4)
        ],
        key=list(key),
        restore_value=[in_place] if in_place is not None else None,
        cache_results=True,
    )(kernel)


def prepare(head: Head) -> Launch:
    """The launch of `head` on its device, which has to be the current one."""
    device = head.hidden.device
    target, single, whole = target_of(device), head.hidden.dtype == torch.float32, aligned(head)
    precision = "tf32" if target.backend == "cuda" and _tf32_allowed() else "ieee"
    tail = head.tail_threshold > 0
    library = whole and head.weight.stride(0) >= head.weight.shape[1] and _library_wanted(target, single=single)
    library = library and not tail  # the number of kept columns is on the device
    if library and device.type == "cuda":
        library = not torch.cuda.is_current_stream_capturing()
    (rows, h), tiles = head.hidden.shape, target.products(single=single, aligned=whole, release=RELEASE)
    described = target.descriptors and whole and not single
    described = described and MIN_GATHERED * 2 * h <= head.workspace_bytes // 2
    gradient_part = target.gradient_part(
        tiles.logits, single=single, softcap=head.softcap is not None, tail=tail, described=described, release=RELEASE
    )
    sizes = Sizes(
        rows,
        h,
        head.weight.shape[0],
        head.hidden.dtype,
        head.bias is not None,
        head.workspace_bytes,
        tiles,
        _multiprocessors(device, target),
        library,
        described,
        tail,
    )
    return Launch(head, sizes, precision, gradient_part)


def _library_wanted(target: Target, *, single: bool) -> bool:
    """What the table says of the library's products, or INFOPO_KERNELS_GPU_PRODUCTS."""
    named = os.environ.get("INFOPO_KERNELS_GPU_PRODUCTS")
    if named is None:
        return target.library_single if single else target.library_half
    if named not in ("library", "triton"):
        raise ValueError(f"INFOPO_KERNELS_GPU_PRODUCTS must be 'library' or 'triton', got {named!r}; or unset it.")
    return named == "library"


def aligned(head: Head) -> bool:
    """Whether Triton can tell that rows of X and W begin on 16 elements: it knows divisibility by 16 or none."""
    sizes = head.hidden.shape[1], head.hidden.stride(0), head.weight.stride(0)
    return all(size % 16 == 0 for size in (*sizes, head.hidden.data_ptr(), head.weight.data_ptr()))


def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def target_of(device: torch.device) -> Target:
    """The table's row for a device: its own, or the newest one of its maker that is not newer than it.

    Raises:
        KeyError: no row serves it.
    """
    if device.type == "cpu":
        return INTERPRETER
    active = triton.runtime.driver.active.get_current_target()
    return target_for(active.backend, active.arch)


@cache
def target_for(backend: str, arch: int | str) -> Target:
    if backend == "hip":
        return TARGETS[str(arch).split(":")[0]]
    older = [t for t in TARGETS.values() if t.backend == "cuda" and int(t.arch) <= int(arch)]
    if not older:
        raise KeyError(f"sm_{arch}")
    return max(older, key=lambda t: int(t.arch))


def programs_at_once(device: torch.device) -> int:
    """Programs of 4 warps that keep a device's memory busy."""
    return 8 * _multiprocessors(device, target_of(device))


def _multiprocessors(device: torch.device, target: Target) -> int:
    if device.type != "cuda":
        return target.multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; make that the tensors' own."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pools_of(columns: int) -> int:
    """Blocks of a piece of the vocabulary that pool their tail."""
    return ceil_div(columns, TAIL_BLOCK)
