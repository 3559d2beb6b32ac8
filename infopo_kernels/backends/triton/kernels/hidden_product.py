# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""dX = G W, accumulated in float32 over pieces of the vocabulary and rounded once.

    part[s, i, h] (+)= sum_{v in slice s of the piece} G_iv W_vh
    dX[t_i, h]       = (scale / gain) sum_s part[s, i, h]

The sum over the vocabulary is long and the result [C, H] small: slices of it (split-K) fill the device. They are added
in one order, so two runs agree bitwise.

With a pooled tail (`tail.py`) the sum runs over the columns of kept words, whose number is read on the device and whose
rows of W are loaded by index, and the last slice goes on over the pools and the mean rows that belong to them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.kernels.logits import column_parts, grouped_tile
from infopo_kernels.backends.triton.kernels.rows import LiveRows
from infopo_kernels.backends.triton.kernels.tail import Tail
from infopo_kernels.backends.triton.launch import FUSED, RELEASE, Launch, Sizes, ceil_div, pools_of, start_product

STORE_ROWS, STORE_COLUMNS = 8, 256
"""Tile of the rounding pass: a warp writes 512 contiguous bytes of one row."""


@triton.jit
def store_sums_part(acc, part_ptr, offs_row, offs_h, row_ok, H, ADD: tl.constexpr):
    """Columns `offs_h` of a tile of sums."""
    part_ptrs = part_ptr + offs_row[:, None] + offs_h[None, :]
    ok = row_ok[:, None] & (offs_h < H)[None, :]
    if ADD:
        acc += tl.load(part_ptrs, mask=ok, other=0.0)
    tl.store(part_ptrs, acc, mask=ok)


@triton.jit(do_not_specialize=["row0", "C", "columns", "pools"])
def hidden_product_kernel(
    g_ptr,
    w_ptr,
    part_ptr,
    count_ptr,
    words_ptr,
    number_ptr,
    means_ptr,
    row0,
    C,
    columns,
    pools,
    pool0,
    ld,
    H,
    stride_wv,
    ADD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """part[s, i, h] for one tile (i, h) and slice s; added to what is there if ADD."""
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    num_n = tl.cdiv(here, BLOCK_N)
    num_h = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    if pid >= num_n * num_h:
        return
    pid_s = tl.program_id(1)
    pid_n, pid_h = grouped_tile(pid, num_n, num_h, GROUP)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_v = tl.arange(0, BLOCK_V)
    row_ok = offs_n < here
    column_ok = offs_h < H
    if TAIL:
        columns = tl.load(number_ptr)
    # In steps of BLOCK_V, so that the compiler knows G's addresses to be aligned.
    slice_steps = tl.cdiv(tl.cdiv(columns, BLOCK_V), tl.num_programs(1))
    begin = pid_s * slice_steps * BLOCK_V
    end = tl.minimum(begin + slice_steps * BLOCK_V, columns)

    # G is 0 from `columns` to the end of its last tile, so only rows of W need a mask along the sum.
    g_ptrs = g_ptr + offs_n.to(tl.int64)[:, None] * ld + (begin + offs_v)[None, :]
    w_ptrs = w_ptr + (begin + offs_v).to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for v in range(begin, end, BLOCK_V):
        if TAIL:
            word = tl.load(words_ptr + v + offs_v, mask=offs_v < end - v, other=0)
            w_ptrs = w_ptr + word.to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
        g = tl.load(g_ptrs, mask=row_ok[:, None], other=0.0)
        w = tl.load(w_ptrs, mask=(offs_v < end - v)[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
        g_ptrs += BLOCK_V
        w_ptrs += tl.cast(stride_wv, tl.int64) * BLOCK_V

    if TAIL:
        g_ptrs = g_ptr + offs_n.to(tl.int64)[:, None] * ld + (pool0 + offs_v)[None, :]
        w_ptrs = means_ptr + offs_v.to(tl.int64)[:, None] * H + offs_h[None, :]
        here = tl.where(pid_s == tl.num_programs(1) - 1, pools, 0)
        for b in range(0, here, BLOCK_V):
            g = tl.load(g_ptrs, mask=row_ok[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=(offs_v < here - b)[:, None] & column_ok[None, :], other=0.0)
            acc = tl.dot(g, w, acc, input_precision=PRECISION)
            g_ptrs += BLOCK_V
            w_ptrs += tl.cast(H, tl.int64) * BLOCK_V

    offs_row = (pid_s.to(tl.int64) * C + offs_n) * H
    parts = column_parts(acc, BLOCK_N, BLOCK_H, PART)
    for p in tl.static_range(BLOCK_H // PART):
        store_sums_part(parts[p], part_ptr, offs_row, pid_h * BLOCK_H + p * PART + tl.arange(0, PART), row_ok, H, ADD)


@triton.jit(do_not_specialize=["row0", "C"])
def store_hidden_kernel(
    part_ptr,
    dx_ptr,
    rows_ptr,
    count_ptr,
    gain_ptr,
    row0,
    C,
    H,
    scale,
    SLICES: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dX[t_i, h] from the slices, rounded once."""
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    pid_n = tl.program_id(0)
    if pid_n * BLOCK_N >= here:
        return
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_ok = offs_n < here
    ok = row_ok[:, None] & (offs_h < H)[None, :]
    row = tl.load(rows_ptr + row0 + offs_n, mask=row_ok, other=0)
    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for s in tl.static_range(SLICES):
        offs_part = (tl.cast(s, tl.int64) * C + offs_n)[:, None] * H + offs_h[None, :]
        total += tl.load(part_ptr + offs_part, mask=ok, other=0.0)
    if HAS_GAIN:
        scale = scale / tl.load(gain_ptr)
    offs_x = row.to(tl.int64)[:, None] * H + offs_h[None, :]
    tl.store(dx_ptr + offs_x, (total * scale).to(dx_ptr.dtype.element_ty), mask=ok)


def slices_of(sizes: Sizes, rows: int, columns: int) -> int:
    """Slices of a sum over `columns` so that `rows` rows fill the device twice; a power of two, at most 16.

    One for the library, which divides long sums by itself.
    """
    if sizes.library:
        return 1
    tile = sizes.tiles.hidden
    tiles = ceil_div(rows, tile.rows) * ceil_div(sizes.hidden_size, tile.columns)
    steps = ceil_div(columns, tile.depth)
    slices = 1
    while slices < 16 and slices * tiles < 2 * sizes.multiprocessors and 16 * slices < steps:
        slices *= 2
    return slices


def launch_hidden_product(
    launch: Launch,
    live: LiveRows,
    g: torch.Tensor,
    part: torch.Tensor,
    row0: int,
    v0: int,
    columns: int,
    tail: Tail | None = None,
    *,
    add: bool,
) -> None:
    """Add G [C, ld] times the rows v0 .. v0 + columns of the head to `part` [slices, C, H] (or assign it); `tail`: of a
    compact G."""
    tile = launch.tiles.hidden
    # Where compact columns are assigned, Triton 3.7 spills two registers of float32 on sm_100 in narrower parts.
    widened = RELEASE == (3, 7) and launch.precision == "ieee" and tail is not None and not add
    columns_a_part = min(64, tile.columns) if widened else tile.part
    slices, c, h = part.shape
    weight = launch.head.weight[v0 : v0 + columns]
    words, number, means, pools, pool0 = (None, None, None, 0, 0)
    if tail is not None:
        words, number, means, pools, pool0 = tail.words, tail.count, tail.means, pools_of(columns), tail.pool0
    start_product(
        hidden_product_kernel,
        (ceil_div(c, tile.rows) * ceil_div(h, tile.columns), slices),
        g,
        weight,
        part,
        live.count,
        words,
        number,
        means,
        row0,
        c,
        columns,
        pools,
        pool0,
        g.stride(0),
        h,
        weight.stride(0),
        ADD=add,
        TAIL=tail is not None,
        BLOCK_N=tile.rows,
        BLOCK_H=tile.columns,
        BLOCK_V=tile.depth,
        PART=columns_a_part,
        GROUP=tile.group,
        **launch.product_arguments(tile),
        rows=c,
        present=lambda: live.present(row0, c),
        key=("H", "ld", "ADD"),
        in_place="part_ptr",
    )


def launch_store_hidden(
    launch: Launch, live: LiveRows, part: torch.Tensor, hidden_grad: torch.Tensor, row0: int
) -> None:
    """Round `part` [slices, C, H] into the rows of dX [N, H] that it stands for."""
    slices, c, h = part.shape
    store_hidden_kernel[(ceil_div(c, STORE_ROWS), ceil_div(h, STORE_COLUMNS))](
        part,
        hidden_grad,
        live.index,
        live.count,
        live.gain,
        row0,
        c,
        h,
        launch.head.scale,
        SLICES=slices,
        HAS_GAIN=hidden_grad.dtype == torch.float16,
        BLOCK_N=STORE_ROWS,
        BLOCK_H=STORE_COLUMNS,
        num_warps=4,
        **FUSED,
    )
