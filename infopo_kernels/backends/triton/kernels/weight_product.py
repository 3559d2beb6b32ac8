# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""dW += G^T X, summed over the rows of a chunk in float32.

    dW_vh += (scale / gain) sum_i G_iv X_ih

With a pooled tail (`tail.py`) the columns of kept words come first in G. Their number is read on the device, and their
sums go to the rows of dW of those words. The columns of the pools give P, which `tail.py` spreads over the tail.

The rows of X are gathered once a chunk (`rows.py`): along the sum they would otherwise be fetched through the list of
rows inside the innermost loop, once for every tile of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.kernels.logits import column_parts, grouped_tile
from infopo_kernels.backends.triton.kernels.rows import LiveRows
from infopo_kernels.backends.triton.kernels.tail import Tail, launch_spread_tail
from infopo_kernels.backends.triton.launch import Launch, ceil_div, pools_of, start_product


@triton.jit
def store_weight_part(acc, dw_ptr, row, row_ok, offs_h, H, scale, ADD: tl.constexpr):
    """Columns `offs_h` of a tile of dW, rounded once."""
    acc = acc * scale
    dw_ptrs = dw_ptr + row.to(tl.int64)[:, None] * H + offs_h[None, :]
    ok = row_ok[:, None] & (offs_h < H)[None, :]
    if ADD:
        acc += tl.load(dw_ptrs, mask=ok, other=0.0).to(tl.float32)
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=ok)


@triton.jit
def store_weight_tile(
    acc,
    dw_ptr,
    row,
    row_ok,
    first_h,
    H,
    scale,
    ADD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
):
    """The parts of a tile of sums."""
    parts = column_parts(acc, BLOCK_V, BLOCK_H, PART)
    for p in tl.static_range(BLOCK_H // PART):
        store_weight_part(parts[p], dw_ptr, row, row_ok, first_h + p * PART + tl.arange(0, PART), H, scale, ADD)


@triton.jit(do_not_specialize=["row0", "C", "columns", "pools"])
def weight_product_kernel(
    g_ptr,
    x_ptr,
    dw_ptr,
    count_ptr,
    gain_ptr,
    words_ptr,
    number_ptr,
    sums_ptr,
    row0,
    C,
    columns,
    pools,
    pool0,
    ld,
    H,
    stride_xn,
    scale,
    ADD: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dw[v, h] of one tile, added to what is there if ADD; dw [columns, H] is contiguous and may be 16-bit. With TAIL
    of kept words v, or sums[B, h] = P_h of the pools."""
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    if ADD and here <= 0:
        return
    if TAIL:
        columns = tl.load(number_ptr)
    num_v = tl.cdiv(columns, BLOCK_V)
    num_h = tl.cdiv(H, BLOCK_H)
    if TAIL:
        of_words = num_v
        num_v += tl.cdiv(pools, BLOCK_V)
        if tl.program_id(0) >= num_v * num_h:
            return
    pid_v, pid_h = grouped_tile(tl.program_id(0), num_v, num_h, GROUP)
    first = pid_v * BLOCK_V
    if TAIL:
        first = tl.where(pid_v < of_words, first, pool0 + (pid_v - of_words) * BLOCK_V)
    offs_v = first + tl.arange(0, BLOCK_V)
    offs_h = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_n = tl.arange(0, BLOCK_N)
    column_ok = offs_h < H

    # Columns of G beyond `columns` exist up to the end of their tile; what they give is not stored.
    g_ptrs = g_ptr + offs_n.to(tl.int64)[:, None] * ld + offs_v[None, :]
    x_ptrs = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + offs_h[None, :]
    acc = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    for n in range(0, here, BLOCK_N):
        row_ok = offs_n < here - n
        g = tl.load(g_ptrs, mask=row_ok[:, None], other=0.0)
        x = tl.load(x_ptrs, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
        g_ptrs += tl.cast(ld, tl.int64) * BLOCK_N
        x_ptrs += tl.cast(stride_xn, tl.int64) * BLOCK_N

    if HAS_GAIN:
        scale = scale / tl.load(gain_ptr)
    first_h = pid_h * BLOCK_H
    if not TAIL:
        store_weight_tile(acc, dw_ptr, offs_v, offs_v < columns, first_h, H, scale, ADD, BLOCK_V, BLOCK_H, PART)
    elif pid_v < of_words:
        kept = offs_v < columns
        word = tl.load(words_ptr + offs_v, mask=kept, other=0)
        store_weight_tile(acc, dw_ptr, word, kept, first_h, H, scale, ADD, BLOCK_V, BLOCK_H, PART)
    else:
        pool = offs_v - pool0
        store_weight_tile(acc, sums_ptr, pool, pool < pools, first_h, H, scale, False, BLOCK_V, BLOCK_H, PART)


def launch_weight_product(
    launch: Launch,
    live: LiveRows,
    g: torch.Tensor,
    gathered: torch.Tensor,
    weight_grad: torch.Tensor,
    row0: int,
    tail: Tail | None = None,
    *,
    add: bool,
) -> None:
    """Add G [C, ld]^T times the gathered rows to `weight_grad` [columns, H] (or assign it); `tail`: of a compact G."""
    tile = launch.tiles.weight
    columns, h = weight_grad.shape
    words, number, sums, pools, pool0 = (None, None, None, 0, 0)
    if tail is not None:
        words, number, sums, pools, pool0 = tail.words, tail.count, tail.sums, pools_of(columns), tail.pool0
    start_product(
        weight_product_kernel,
        ((ceil_div(columns, tile.rows) + ceil_div(pools, tile.rows)) * ceil_div(h, tile.columns),),
        g,
        gathered,
        weight_grad,
        live.count,
        live.gain,
        words,
        number,
        sums,
        row0,
        gathered.shape[0],
        columns,
        pools,
        pool0,
        g.stride(0),
        h,
        gathered.stride(0),
        launch.head.scale,
        ADD=add,
        TAIL=tail is not None,
        HAS_GAIN=g.dtype == torch.float16,
        BLOCK_V=tile.rows,
        BLOCK_H=tile.columns,
        BLOCK_N=tile.depth,
        PART=tile.part,
        GROUP=tile.group,
        **launch.product_arguments(tile),
        rows=gathered.shape[0],
        present=lambda: live.present(row0, gathered.shape[0]),
        key=("H", "ld", "ADD"),
        in_place="dw_ptr",
    )
    if tail is not None:
        launch_spread_tail(tail, weight_grad, add=add)
