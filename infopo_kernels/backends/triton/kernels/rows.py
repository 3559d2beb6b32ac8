# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Which rows are computed: the list of scored rows, their number and a scale for their gradients, all on the device.

    rows  = [t : y_t != IGNORE_INDEX (and c_t != 0, if rows of weight zero are dropped)], ascending
    count = len(rows)
    gain  = 2^(GAIN_BITS - ceil(log2(max_t |c_t|)))

Later kernels read the count on the device: their grids are laid out for all rows that may be there, and programs beyond
the count leave at once. Where the library forms products, the host learns it for them (`products.py`); then chunks
without rows are not launched, and pieces behind the first are planned for the live rows. `gain` lifts gradients to the
top of float16's range, whose smallest number (6e-8) would otherwise swallow c_t * p_tv; products divide by it in
float32.

A chunk's rows of X may be gathered into contiguous memory, for descriptors and for dW's sum over rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.launch import FUSED, Launch, ceil_div
from infopo_kernels.options import IGNORE_INDEX

GAIN_BITS = tl.constexpr(12)
"""2^12 leaves 2^3 of float16's range above the largest gradient and takes its smallest to 2^-36 of it."""

BLOCK = 4096
"""Rows a step: one program walks all of them (a prefix sum over N is short beside one product)."""


GATHER_ROWS, GATHER_COLUMNS = 8, 256
"""Tile of the gather: a warp reads 512 contiguous bytes of one row."""


@dataclass(frozen=True)
class LiveRows:
    """The rows that are computed. All tensors live on the device of the labels."""

    index: torch.Tensor
    """[N] int32; the first `count` entries hold row numbers, ascending; the others are not defined."""
    numbers: torch.Tensor
    """[3] int32: the memory of the next three, which so reach the host in one copy."""
    count: torch.Tensor
    """[1] int32."""
    kept: torch.Tensor
    """[1] int32; as many rows at the head of the list have their logits kept (`kept.py`), 0 in most calls."""
    gain: torch.Tensor
    """[1] float32, a power of two; defined only where it was asked for."""

    def present(self, row0: int, rows: int, *, kept: bool = True) -> int:
        """How many of the rows row0 .. row0 + rows of the list there are, with those whose logits are kept or without.

        The host waits for the device.
        """
        count, first, _ = (min(max(number - row0, 0), rows) for number in self.numbers.tolist())
        return count if kept else count - first


@triton.jit
def largest_weight(largest, c, live):
    """The largest |c| with the weights of live rows taken in."""
    # A NaN or infinite weight spoils its own row; it must not choose the scale of the others.
    finite = live & (tl.abs(c) < float("inf"))
    return tl.maximum(largest, tl.max(tl.where(finite, tl.abs(c), 0.0), axis=0))


@triton.jit
def gain_of(largest):
    """The power of two that lifts `largest` to the top of float16's range."""
    exponent = GAIN_BITS - tl.ceil(tl.log2(tl.maximum(largest, 1e-30)))
    return tl.where(largest > 0.0, tl.exp2(exponent), 1.0)


@triton.jit(do_not_specialize=["N"])
def live_rows_kernel(
    labels_ptr,
    c_ptr,
    rows_ptr,
    count_ptr,
    gain_ptr,
    kept_ptr,
    logp_ptr,
    lse_ptr,
    N,
    IGNORE: tl.constexpr,
    SKIP_ZERO: tl.constexpr,
    CLEAR: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rows, count and gain as above, kept = 0; with CLEAR, l_t = lse_t = 0 for the rows that are left out."""
    count = 0
    largest = 0.0
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        inside = offs_n < N
        live = tl.load(labels_ptr + offs_n, mask=inside, other=IGNORE) != IGNORE
        if SKIP_ZERO or GAIN:
            c = tl.load(c_ptr + offs_n, mask=inside, other=0.0)
        if SKIP_ZERO:
            live = live & (c != 0.0)
        if GAIN:
            largest = largest_weight(largest, c, live)
        flag = live.to(tl.int32)
        tl.store(rows_ptr + count + tl.cumsum(flag, axis=0) - flag, offs_n, mask=live)
        if CLEAR:
            tl.store(logp_ptr + offs_n, 0.0, mask=inside & (flag == 0))
            tl.store(lse_ptr + offs_n, 0.0, mask=inside & (flag == 0))
        count += tl.sum(flag, axis=0)
    tl.store(count_ptr, count)
    tl.store(kept_ptr, 0)
    if GAIN:
        tl.store(gain_ptr, gain_of(largest))


@triton.jit
def row_blocks(count_ptr, kept_ptr, row0, C, BLOCK_N: tl.constexpr):
    """Blocks of the rows row0 .. row0 + C of the list: kept logits and others begin blocks of their own."""
    here = tl.maximum(tl.minimum(tl.load(count_ptr) - row0, C), 0)
    kept = tl.minimum(tl.maximum(tl.load(kept_ptr) - row0, 0), here)
    return tl.cdiv(kept, BLOCK_N) + tl.cdiv(here - kept, BLOCK_N)


def new_list(labels: torch.Tensor) -> LiveRows:
    """A list for these rows, yet to be filled.

    Raises:
        ValueError: 2^31 rows or more.
    """
    n, device = labels.numel(), labels.device
    if n >= 2**31 - BLOCK:
        raise ValueError(f"`labels` must have fewer than 2^31 - {BLOCK} rows on a GPU, got {n}; split the batch.")
    numbers = torch.empty(3, dtype=torch.int32, device=device)
    count, kept, gain = numbers.split(1)
    return LiveRows(torch.empty(n, dtype=torch.int32, device=device), numbers, count, kept, gain.view(torch.float32))


def find_live_rows(
    labels: torch.Tensor,
    row_weight: torch.Tensor | None,
    *,
    skip_zero: bool,
    gain: bool,
    cleared: tuple[torch.Tensor, torch.Tensor] | None,
) -> LiveRows:
    """Launch the kernel; `cleared` are (l, lse), set to 0 in the rows that are left out."""
    live, n = new_list(labels), labels.numel()
    logp, lse = cleared if cleared is not None else (None, None)
    live_rows_kernel[(1,)](
        labels,
        row_weight,
        live.index,
        live.count,
        live.gain,
        live.kept,
        logp,
        lse,
        n,
        IGNORE=IGNORE_INDEX,
        SKIP_ZERO=skip_zero,
        CLEAR=cleared is not None,
        GAIN=gain,
        BLOCK=BLOCK,
        num_warps=8,
        **FUSED,
    )
    return live


@triton.jit(do_not_specialize=["row0", "C"])
def gather_rows_kernel(
    x_ptr,
    out_ptr,
    rows_ptr,
    count_ptr,
    row0,
    C,
    H,
    stride_xn,
    stride_on,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[i] = x[t_i] for the rows row0 .. row0 + C of the list."""
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    pid_n = tl.program_id(0)
    if pid_n * BLOCK_N >= here:
        return
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_ok = offs_n < here
    ok = row_ok[:, None] & (offs_h < H)[None, :]
    row = tl.load(rows_ptr + row0 + offs_n, mask=row_ok, other=0)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride_xn + offs_h[None, :], mask=ok)
    tl.store(out_ptr + offs_n.to(tl.int64)[:, None] * stride_on + offs_h[None, :], x, mask=ok)


def launch_gather_rows(launch: Launch, live: LiveRows, gathered: torch.Tensor, row0: int) -> None:
    """Fill `gathered` [C, >= H] with the rows row0 .. row0 + C of the list."""
    hidden, c = launch.head.hidden, gathered.shape[0]
    gather_rows_kernel[(ceil_div(c, GATHER_ROWS), ceil_div(launch.hidden_size, GATHER_COLUMNS))](
        hidden,
        gathered,
        live.index,
        live.count,
        row0,
        c,
        launch.hidden_size,
        hidden.stride(0),
        gathered.stride(0),
        BLOCK_N=GATHER_ROWS,
        BLOCK_H=GATHER_COLUMNS,
        num_warps=4,
        **FUSED,
    )


def room_for_rows(launch: Launch, rows: int) -> torch.Tensor | None:
    """Memory for the gathered rows of a chunk; None where kernels of logits do without."""
    sizes = launch.sizes
    return launch.head.hidden.new_empty(sizes.gathered(rows)[0]) if sizes.descriptors else None


def rows_in(launch: Launch, live: LiveRows, memory: torch.Tensor | None, row0: int, rows: int) -> torch.Tensor | None:
    """The rows row0 .. row0 + rows of the list, gathered in `memory` (`room_for_rows`); None without."""
    if memory is None:
        return None
    launch_gather_rows(launch, live, memory[:rows], row0)
    return memory[:rows]
