# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The pooled tail of a tile of G: the choice of words, the columns of G moved together, and what the tail shares.

For the rows C of a chunk that have a weight and a block B of the vocabulary (TAIL_BLOCK words),

    m_v  = max_{t in C} p_tv, infinite at a label               s_v  = sum_{t in C} p_tv
    K    = { v in B : m_v >= threshold, or s_v is NaN }         T = B without K         pi_v = s_v / sum_{v' in T} s_v'
    g~_t = sum_{v in T} G_tv                    W~_h = sum_{v in T} pi_v W_vh   q_t += sum_{v in T} p_tv

Kernels that form G leave m and s of each block of rows, from float32, beside it (`store_tail_stats`). `choose_words`
makes pi of them, `place_words` numbers the kept words of all blocks, `compact_columns` moves their columns of G to the
front of each row and writes g~ behind the tile, a column a block, `mean_words` forms W~. Then, over columns whose
number the products read on the device (`hidden_product.py`, `weight_product.py`),

    dX_t += sum_{v in K} G_tv W_v + g~_t W~         dW_v (+)= sum_t G_tv X_t for v in K,       P = sum_t g~_t X_t

and `spread_tail` adds pi_v P to dW_v for v in T. Nothing is read back to the host, no sum depends on which program ends
first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.base import TailReport
from infopo_kernels.backends.triton.kernels.rows import LiveRows, row_blocks
from infopo_kernels.backends.triton.launch import FUSED, Launch, ceil_div, pools_of
from infopo_kernels.backends.triton.tiles import TAIL_BLOCK

STATS_ROWS = 8
"""Blocks of rows that `choose_words` loads at a time: 64 blocks (8192 rows) are 8 waits for memory."""

COUNTS = 1024
"""Blocks of words whose kept words `place_words` sums at a time: those of 262144 words."""

COMPACT_WORDS = 2048
"""Words of a row that `compact_columns` moves at a time: 16 bytes a thread of 8 warps."""

WORDS, COLUMNS = 8, 256
"""Tile of the passes over W and dW: a warp reads 512 contiguous bytes of one row. With 16 words the means spilled on
sm_100 (Triton 3.9)."""


@dataclass(frozen=True)
class Tail:
    """What pools the tail of a tile of G [C, ld] for a piece of the vocabulary; all on the device.

    Columns of G from `pool0` on are the pools, one a block. Words count from the first of the piece.
    """

    threshold: float
    pool0: int
    report: TailReport | None
    stats: torch.Tensor
    """[blocks of rows, 2, ld] float32: m and s of the words. Kept rows and others begin blocks of their own."""
    p: torch.Tensor
    """[C, ld]: probabilities, float32 or bfloat16, if a report is wanted."""
    share: torch.Tensor
    """[columns] float32: pi of the words of the tail, -1 for kept words."""
    place: torch.Tensor
    """[columns] int32: new columns of kept words, -1 for words of the tail."""
    words: torch.Tensor
    """[columns] int32: the first `count` are the kept words, ascending."""
    kept: torch.Tensor
    """[blocks] int32: kept words of each block."""
    count: torch.Tensor
    """[1] int32: kept words in all."""
    means: torch.Tensor
    """[blocks, H], the input type: W~, if dX is wanted."""
    sums: torch.Tensor
    """[blocks, H] float32: P with the factor of dW, if dW is wanted."""


@triton.jit
def store_tail_stats(p, offs_v, label, counts, stats_ptr, p_ptr, offs_k, offs_p, row_ok, ld, REPORT: tl.constexpr):
    """m and s of the words `offs_v`, columns `offs_k`, in one block of rows, of which `counts` have a weight. Where a p
    is NaN, s is."""
    label = tl.where(counts, label, -1)
    if REPORT:
        tl.store(p_ptr + offs_p, p.to(p_ptr.dtype.element_ty), mask=row_ok[:, None])
    p = tl.where(counts[:, None], p, 0.0)
    tl.store(stats_ptr + ld + offs_k, tl.sum(p, axis=0))
    tl.store(stats_ptr + offs_k, tl.max(tl.where(offs_v[None, :] == label[:, None], float("inf"), p), axis=0))


@triton.jit(do_not_specialize=["row0", "C", "columns"])
def choose_words_kernel(
    stats_ptr,
    share_ptr,
    kept_ptr,
    count_ptr,
    kept_rows_ptr,
    row0,
    C,
    columns,
    ld,
    threshold,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """share[v] = pi_v, or -1 for v in K, and kept[B] = |K| for one block of words."""
    blocks = row_blocks(count_ptr, kept_rows_ptr, row0, C, BLOCK_N)
    pid = tl.program_id(0)
    offs_v = pid * BLOCK + tl.arange(0, BLOCK)
    ok = offs_v < columns
    most = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, ROWS):
        offs_n = start + tl.arange(0, ROWS)
        there = (offs_n < blocks)[:, None] & ok[None, :]
        ptrs = stats_ptr + offs_n.to(tl.int64)[:, None] * (2 * ld) + offs_v[None, :]
        most = tl.maximum(most, tl.max(tl.load(ptrs, mask=there, other=0.0), axis=0))
        total += tl.sum(tl.load(ptrs + ld, mask=there, other=0.0), axis=0)
    keep = ok & ((most >= threshold) | (total != total))
    total = tl.where(keep, 0.0, total)
    mass = tl.sum(total, axis=0)
    share = tl.where(mass > 0.0, total / tl.where(mass > 0.0, mass, 1.0), 0.0)
    tl.store(share_ptr + offs_v, tl.where(keep, -1.0, share), mask=ok)
    tl.store(kept_ptr + pid, tl.sum(keep.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["row0", "columns"])
def place_words_kernel(
    share_ptr,
    kept_ptr,
    place_ptr,
    words_ptr,
    number_ptr,
    report_ptr,
    count_ptr,
    row0,
    columns,
    REPORT: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """place[v] and words[k] for one block of words; the last one writes their number, and adds it to the report."""
    pid = tl.program_id(0)
    before = tl.zeros((COUNTS,), tl.int32)
    for start in range(0, pid, COUNTS):
        offs = start + tl.arange(0, COUNTS)
        before += tl.load(kept_ptr + offs, mask=offs < pid, other=0)
    first = tl.sum(before, axis=0)
    offs_v = pid * BLOCK + tl.arange(0, BLOCK)
    ok = offs_v < columns
    keep = tl.load(share_ptr + offs_v, mask=ok, other=0.0) < 0.0
    flag = keep.to(tl.int32)
    place = first + tl.cumsum(flag, axis=0) - flag
    tl.store(place_ptr + offs_v, tl.where(keep, place, -1), mask=ok)
    tl.store(words_ptr + place, offs_v, mask=keep)
    if pid == tl.num_programs(0) - 1:
        number = first + tl.sum(flag, axis=0)
        tl.store(number_ptr, number)
        if REPORT:
            there = tl.load(count_ptr) > row0  # a chunk without rows has no columns
            tl.store(report_ptr, tl.load(report_ptr) + number.to(tl.float64), mask=there)
            tl.store(report_ptr + 1, tl.load(report_ptr + 1) + tl.cast(columns, tl.float64), mask=there)


@triton.jit
def zero_to_multiple(row_ptr, begin, MULTIPLE: tl.constexpr):
    """Zeros in a row from `begin` to the next multiple: products take whole steps."""
    offs = begin + tl.arange(0, MULTIPLE)
    zero = tl.zeros((MULTIPLE,), row_ptr.dtype.element_ty)
    tl.store(row_ptr + offs, zero, mask=offs < tl.cdiv(begin, MULTIPLE) * MULTIPLE)


@triton.jit(do_not_specialize=["row0", "columns"])
def compact_columns_kernel(
    g_ptr,
    p_ptr,
    place_ptr,
    number_ptr,
    mass_ptr,
    c_ptr,
    rows_ptr,
    count_ptr,
    row0,
    columns,
    pool0,
    ld,
    FIRST: tl.constexpr,
    REPORT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One row of G in place: columns of kept words in front, g~ from `pool0` on; its q is assigned (FIRST) or added to.

    A column only moves to the left, and all of a step are loaded before one of them is stored.
    """
    pid = tl.program_id(0)
    if pid >= tl.load(count_ptr) - row0:
        return
    row_ptr = g_ptr + pid.to(tl.int64) * ld
    mass = tl.zeros((STEP,), tl.float32)
    for start in range(0, columns, STEP):
        offs_v = start + tl.arange(0, STEP)
        ok = offs_v < columns
        place = tl.load(place_ptr + offs_v, mask=ok, other=0)
        tail = place < 0
        g = tl.load(row_ptr + offs_v, mask=ok, other=0.0)
        tl.debug_barrier()
        tl.store(row_ptr + place, g, mask=ok & (place >= 0))
        pooled = tl.sum(tl.reshape(tl.where(tail, g.to(tl.float32), 0.0), (STEP // BLOCK, BLOCK)), axis=1)
        offs_b = start // BLOCK + tl.arange(0, STEP // BLOCK)
        tl.store(row_ptr + pool0 + offs_b, pooled.to(g.dtype), mask=offs_b * BLOCK < columns)
        if REPORT:
            p = tl.load(p_ptr + pid.to(tl.int64) * ld + offs_v, mask=tail, other=0.0)
            mass += p.to(tl.float32)
    zero_to_multiple(row_ptr, tl.load(number_ptr), DEPTH)
    zero_to_multiple(row_ptr + pool0, tl.cdiv(columns, BLOCK), DEPTH)
    if REPORT:
        row = tl.load(rows_ptr + row0 + pid)
        total = tl.sum(mass, axis=0)
        if not FIRST:
            total += tl.load(mass_ptr + row)
        tl.store(mass_ptr + row, total, mask=tl.load(c_ptr + row) != 0.0)


@triton.jit(do_not_specialize=["columns"])
def mean_words_kernel(
    w_ptr,
    share_ptr,
    mean_ptr,
    columns,
    H,
    stride_wv,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """mean[B, h] = sum over the tail of the block of pi_v W_vh."""
    pid = tl.program_id(0)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_ok = offs_h < H
    total = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    for start in range(0, BLOCK, BLOCK_V):
        offs_v = pid * BLOCK + start + tl.arange(0, BLOCK_V)
        share = tl.load(share_ptr + offs_v, mask=offs_v < columns, other=0.0)
        there = (share > 0.0)[:, None] & h_ok[None, :]
        w = tl.load(w_ptr + offs_v.to(tl.int64)[:, None] * stride_wv + offs_h[None, :], mask=there, other=0.0)
        total += tl.maximum(share, 0.0)[:, None] * w.to(tl.float32)
    mean = tl.sum(total, axis=0).to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + pid.to(tl.int64) * H + offs_h, mean, mask=h_ok)


@triton.jit(do_not_specialize=["columns"])
def spread_tail_kernel(
    sums_ptr,
    share_ptr,
    dw_ptr,
    columns,
    H,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dw[v, h] (+)= pi_v P_h for words of the tail, rounded once; dw [columns, H] is contiguous and may be 16-bit."""
    start = tl.program_id(0) * BLOCK_V
    offs_v = start + tl.arange(0, BLOCK_V)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_ok = offs_h < H
    share = tl.load(share_ptr + offs_v, mask=offs_v < columns, other=-1.0)
    # Sums of a chunk without rows are not written; they have no share to be added.
    there = (share > 0.0 if ADD else share >= 0.0)[:, None] & h_ok[None, :]
    sums = tl.load(sums_ptr + (start // BLOCK).to(tl.int64) * H + offs_h, mask=h_ok, other=0.0)
    total = share[:, None] * sums[None, :]
    dw_ptrs = dw_ptr + offs_v.to(tl.int64)[:, None] * H + offs_h[None, :]
    if ADD:
        total += tl.load(dw_ptrs, mask=there, other=0.0).to(tl.float32)
    tl.store(dw_ptrs, total.to(dw_ptr.dtype.element_ty), mask=there)


def stats_of(tail: Tail | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What kernels that form G fill for a tail: its statistics, and probabilities for a report."""
    return (None, None) if tail is None else (tail.stats, tail.p)


def launch_pool_tail(
    launch: Launch,
    live: LiveRows,
    tail: Tail,
    row_weight: torch.Tensor,
    g: torch.Tensor,
    row0: int,
    v0: int,
    columns: int,
    row_block: int,
    *,
    first: bool,
) -> None:
    """Choose the words of columns v0 .. v0 + columns for the rows of `g` [C, ld], whose statistics are in `tail` by
    blocks of `row_block` rows, and compact G. `first`: no other piece of the vocabulary came before for these rows."""
    (c, ld), report, blocks = g.shape, tail.report, pools_of(columns)
    choose_words_kernel[(blocks,)](
        tail.stats,
        tail.share,
        tail.kept,
        live.count,
        live.kept,
        row0,
        c,
        columns,
        ld,
        tail.threshold,
        BLOCK_N=row_block,
        BLOCK=TAIL_BLOCK,
        ROWS=STATS_ROWS,
        num_warps=4,
        **FUSED,
    )
    place_words_kernel[(blocks,)](
        tail.share,
        tail.kept,
        tail.place,
        tail.words,
        tail.count,
        None if report is None else report.columns,
        live.count,
        row0,
        columns,
        REPORT=report is not None,
        BLOCK=TAIL_BLOCK,
        COUNTS=COUNTS,
        num_warps=4,
        **FUSED,
    )
    compact_columns_kernel[(c,)](
        g,
        tail.p,
        tail.place,
        tail.count,
        None if report is None else report.mass,
        row_weight,
        live.index,
        live.count,
        row0,
        columns,
        tail.pool0,
        ld,
        FIRST=first,
        REPORT=report is not None,
        BLOCK=TAIL_BLOCK,
        STEP=COMPACT_WORDS,
        DEPTH=launch.tiles.hidden.depth,
        num_warps=8,
        **FUSED,
    )
    if tail.means.numel():
        weight, h = launch.head.weight[v0 : v0 + columns], launch.hidden_size
        mean_words_kernel[(blocks, ceil_div(h, COLUMNS))](
            weight,
            tail.share,
            tail.means,
            columns,
            h,
            weight.stride(0),
            BLOCK=TAIL_BLOCK,
            BLOCK_V=WORDS,
            BLOCK_H=COLUMNS,
            num_warps=4,
            **FUSED,
        )


def launch_spread_tail(tail: Tail, weight_grad: torch.Tensor, *, add: bool) -> None:
    """Add the tail's share of P to `weight_grad` [columns, H] (or assign it)."""
    columns, h = weight_grad.shape
    spread_tail_kernel[(ceil_div(columns, WORDS), ceil_div(h, COLUMNS))](
        tail.sums,
        tail.share,
        weight_grad,
        columns,
        h,
        ADD=add,
        BLOCK=TAIL_BLOCK,
        BLOCK_V=WORDS,
        BLOCK_H=COLUMNS,
        num_warps=4,
        **FUSED,
    )
