"""The two products on a tile of G behind one seam: dX = G W and dW = G^T X, by PyTorch's library or by Triton.

    part[s, i, h] (+)= sum_{v in slice s of the piece} G_iv W_vh            (hidden)
    dW_vh         (+)= (scale / gain) sum_i G_iv X_ih                       (weight)

The library (cuBLAS) takes its sizes from the host, which does not know how many rows are live. So the number travels to
pinned memory behind the kernel that counts, and the host waits for it only when the first product is due: the logits
kernel of the same rows is queued by then and keeps the device busy. Rows beyond the number do not exist for a product,
and chunks without rows are not launched. While a CUDA graph is captured nothing may be waited for: Triton's products
read the number on the device.

With a pooled tail products run over as many columns as words are kept. Only the device knows this number, and the host
would have to wait for it between each tile of logits and its products. So Triton's products serve, which read it there.

Which one runs is a line of the table (`tiles.Target`); INFOPO_KERNELS_GPU_PRODUCTS=library or =triton overrules it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from infopo_kernels.backends.triton.kernels.hidden_product import launch_hidden_product
from infopo_kernels.backends.triton.kernels.rows import LiveRows
from infopo_kernels.backends.triton.kernels.tail import Tail
from infopo_kernels.backends.triton.kernels.weight_product import launch_weight_product
from infopo_kernels.backends.triton.launch import Launch

_REDUCED_SUMS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


class Products(Protocol):
    """The products of one call: `row0` is the first row of the list that `g` [C, ld] stands for."""

    def hidden(self, g: torch.Tensor, part: torch.Tensor, row0: int, v0: int, columns: int, *, add: bool) -> None:
        """Add G times the rows v0 .. v0 + columns of the head to `part` [slices, C, H] float32 (or assign it)."""
        ...

    def weight(
        self, g: torch.Tensor, gathered: torch.Tensor, weight_grad: torch.Tensor, row0: int, *, add: bool
    ) -> None:
        """Add G^T times the gathered rows to `weight_grad` [columns, H] (or assign it)."""
        ...

    def done(self, row0: int) -> bool:
        """Whether the host knows that the list has no row at `row0` or behind it."""
        ...

    def known_rows(self) -> int | None:
        """Live rows, once a product has been asked for; None where the host does not learn their number."""
        ...


def products_of(launch: Launch, live: LiveRows, tail: Tail | None = None) -> Products:
    """The products of the rows of a list that a kernel has just been started to fill; with `tail` of a compact G."""
    return LibraryProducts(launch, live) if launch.library else TritonProducts(launch, live, tail)


@dataclass(frozen=True)
class TritonProducts:
    """Kernels whose grids are laid out for every row and column; programs beyond those that are there leave at once."""

    launch: Launch
    live: LiveRows
    tail: Tail | None

    def hidden(self, g: torch.Tensor, part: torch.Tensor, row0: int, v0: int, columns: int, *, add: bool) -> None:
        launch_hidden_product(self.launch, self.live, g, part, row0, v0, columns, self.tail, add=add)

    def weight(
        self, g: torch.Tensor, gathered: torch.Tensor, weight_grad: torch.Tensor, row0: int, *, add: bool
    ) -> None:
        launch_weight_product(self.launch, self.live, g, gathered, weight_grad, row0, self.tail, add=add)

    def done(self, row0: int) -> bool:
        return False

    def known_rows(self) -> int | None:
        return None


class LibraryProducts:
    """`torch.addmm` on exactly the live rows, with float32 sums."""

    def __init__(self, launch: Launch, live: LiveRows) -> None:
        self.launch, self._live = launch, live
        self._coming = _Coming(live)

    @cached_property
    def _numbers(self) -> tuple[int, float]:
        """Live rows and gain. The first use waits for the device."""
        count, gain = self._coming.arrived()
        return count, gain if self.launch.head.hidden.dtype == torch.float16 else 1.0

    def _here(self, row0: int, rows: int) -> int:
        return min(max(self._numbers[0] - row0, 0), rows)

    def hidden(self, g: torch.Tensor, part: torch.Tensor, row0: int, v0: int, columns: int, *, add: bool) -> None:
        (total,) = part  # one slice: the library divides long sums by itself
        here = self._here(row0, len(total))
        if here:
            _product(total[:here], g[:here, :columns], self.launch.head.weight[v0 : v0 + columns], add=add, factor=1.0)

    def weight(
        self, g: torch.Tensor, gathered: torch.Tensor, weight_grad: torch.Tensor, row0: int, *, add: bool
    ) -> None:
        if add and weight_grad.dtype != torch.float32:
            # The library rounds the product before it adds it to 16 bits (H100, CUDA 13.0: an error of 2.15e-3 where
            # one rounding is 1.66e-3).
            launch_weight_product(self.launch, self._live, g, gathered, weight_grad, row0, add=True)
            return
        (columns, h), here = weight_grad.shape, self._here(row0, len(gathered))
        if here:
            factor = self.launch.head.scale / self._numbers[1]
            _product(weight_grad, g[:here, :columns].T, gathered[:here, :h], add=add, factor=factor)
        elif not add:
            weight_grad.zero_()

    def done(self, row0: int) -> bool:
        return row0 > 0 and row0 >= self._numbers[0]

    def known_rows(self) -> int | None:
        return self._numbers[0]


class _Coming:
    """The numbers of a list on their way to the host."""

    def __init__(self, live: LiveRows) -> None:
        self._rows, self._numbers, self._event = len(live.index), live.numbers, None
        if live.numbers.device.type == "cuda":
            self._numbers = torch.empty(live.numbers.shape, dtype=live.numbers.dtype, pin_memory=True)
            self._numbers.copy_(live.numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def arrived(self) -> tuple[int, float]:
        """Live rows and gain; all rows for tensors without storage, which have no numbers."""
        if self._numbers.device.type == "meta":
            return self._rows, 1.0
        if self._event is not None:
            self._event.synchronize()
        count, _, bits = self._numbers.tolist()
        return count, struct.unpack("f", struct.pack("i", bits))[0]


def _product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool, factor: float) -> None:
    """out = factor a b, or out += factor a b: float32 sums, rounded once into `out`."""
    beta = 1.0 if add else 0.0
    if out.device.type == "cpu":
        # PyTorch has no 16-bit product with a float32 result on a CPU; interpreted kernels are met by the same values.
        total = (a.float() @ b.float()) * factor
        out.copy_(total + out.float() if add else total)
    elif out.dtype == a.dtype:
        with _sums_in_float32(out.dtype):
            torch.addmm(out, a, b, beta=beta, alpha=factor, out=out)
    else:
        try:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=factor, out=out)
        except TypeError:
            # PyTorch 2.11 does not know this call for tensors without storage, which have no values either.
            if out.device.type != "meta":
                raise


@contextmanager
def _sums_in_float32(dtype: torch.dtype) -> Iterator[None]:
    """By default PyTorch lets the library add partial sums of a 16-bit result in 16 bits."""
    matmul, name = torch.backends.cuda.matmul, _REDUCED_SUMS.get(dtype)
    if name is None or not getattr(matmul, name):
        yield
        return
    setattr(matmul, name, False)
    try:
        yield
    finally:
        setattr(matmul, name, True)
