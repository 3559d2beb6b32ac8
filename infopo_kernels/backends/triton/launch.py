"""What every launch needs to know about the head, the device and the precision, found once a call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from infopo_kernels.backends.base import Head
from infopo_kernels.backends.triton.tiles import INTERPRETER, TARGETS, Products, Target, Tile

FUSED = {"enable_fp_fusion": True}
"""a * b + c in one rounding, whatever Triton's default: it halves the work of every epilogue."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 at import: kernels run as numpy on CPU tensors."""

if INTERPRETED:
    from infopo_kernels.backends.triton.interpreter import repair

    repair()


@dataclass(frozen=True)
class Launch:
    """The head with everything that its kernels' launches have in common."""

    head: Head
    tiles: Products
    precision: str
    """`input_precision` of float32 products: "ieee", or "tf32" where torch allows it."""
    multiprocessors: int

    @property
    def rows(self) -> int:
        return self.head.hidden.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.head.hidden.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]

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
            "BLOCK_N": tile.rows,
            "BLOCK_V": tile.columns,
            "BLOCK_H": tile.depth,
            "PART": tile.part,
            "EVEN_H": self.hidden_size % tile.depth == 0,
            "GROUP": tile.group,
            **self.product_arguments(tile),
        }

    def filled(self, programs: int) -> float:
        """Share of the device that works on `programs` equal programs, one a multiprocessor, until the last is done."""
        return programs / (ceil_div(programs, self.multiprocessors) * self.multiprocessors)

    def product_arguments(self, tile: Tile) -> dict[str, Any]:
        """Arguments of every kernel with a product."""
        return {"PRECISION": self.precision, "num_warps": tile.warps, "num_stages": tile.stages, **FUSED}


def start_product(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, key: tuple[str, ...], in_place: str | None = None, **named: Any
) -> None:
    """Start a kernel with a product as the table says, or as Triton's autotuner finds (INFOPO_KERNELS_AUTOTUNE=1).

    `key` names the arguments that a choice depends on, `in_place` the buffer that is added to, which trials have to
    restore (a copy of it is made then: the first call of a shape is not held to the workspace).
    """
    if os.environ.get("INFOPO_KERNELS_AUTOTUNE") == "1" and not INTERPRETED:
        kernel = _tuned(kernel, key, in_place)
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
    """The launch of `head` on its device."""
    target = target_of(head.hidden.device)
    tiles = target.products(single=head.hidden.dtype == torch.float32, aligned=aligned(head))
    precision = "tf32" if target.backend == "cuda" and _tf32_allowed() else "ieee"
    return Launch(head, tiles, precision, _multiprocessors(head.hidden.device, target))


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
