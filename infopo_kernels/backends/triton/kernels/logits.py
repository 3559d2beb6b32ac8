# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Device functions that every kernel with logits shares: the head product of one tile and the map from it to logits.

With x_i a scored row, w_v a row of the head, both as given, and everything from the product on in float32:

    a_iv = x_i . w_v + b_v
    z_iv = scale * softcap * tanh(a_iv / softcap)        (scale * a_iv without a softcap), -inf for v >= V
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
"""exp(x) is evaluated as exp2(x * LOG2E): one instruction on every target."""


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy: the odd series where 1 - 2 / (exp(2x) + 1) would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.125, series, 1.0 - 2.0 / (exp(2.0 * x) + 1.0))


@triton.jit
def grouped_tile(pid, num_n, num_v, GROUP: tl.constexpr):
    """Tile (n, v) of program `pid`: GROUP row blocks pass over the vocabulary together, so that a tile of the head
    is fetched once for all of them and their rows stay in L2."""
    width = GROUP * num_v
    first = (pid // width) * GROUP
    size = tl.minimum(num_n - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def rows_first(pid, num_n):
    """Tile (n, v) of program `pid`, one column of tiles after the other: a grid's second dimension ends at 65535."""
    return pid % num_n, pid // num_n


@triton.jit
def load_labels(labels_ptr, row, row_ok, V):
    """Labels of rows, int32 (a 64-bit comparison with every column would double its registers); -1 outside [0, V)."""
    label = tl.load(labels_ptr + row, mask=row_ok, other=-1)
    return tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)


@triton.jit
def column_parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    """A tile of sums as parts of PART columns, left to right; COLUMNS / PART is a power of two.

    What follows a product takes one part after the other: the addresses and intermediates of a whole 128 x 256 tile,
    beside its sums, are more than a thread's registers hold.
    """
    if COLUMNS <= PART:
        parts = (tile,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        parts = column_parts(left, ROWS, COLUMNS // 2, PART) + column_parts(right, ROWS, COLUMNS // 2, PART)
    return parts


@triton.jit
def head_product(
    x_ptr,
    offs_x,
    row_ok,
    w_ptr,
    stride_wv,
    offs_v,
    V,
    H,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_i . w_v for rows at element offsets `offs_x` (int64) and columns `offs_v`; 0 where either is masked."""
    offs_h = tl.arange(0, BLOCK_H)
    x_ptrs = x_ptr + offs_x[:, None] + offs_h[None, :]
    w_ptrs = w_ptr + offs_v.to(tl.int64)[None, :] * stride_wv + offs_h[:, None]
    column_ok = offs_v < V
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for h in range(0, H, BLOCK_H):
        if EVEN_H:
            x = tl.load(x_ptrs, mask=row_ok[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=column_ok[None, :], other=0.0)
        else:
            depth_ok = offs_h < H - h
            x = tl.load(x_ptrs, mask=row_ok[:, None] & depth_ok[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=column_ok[None, :] & depth_ok[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_H
        w_ptrs += BLOCK_H
    return acc


@triton.jit
def to_logits(
    acc,
    b_ptr,
    offs_v,
    V,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """z from the product: bias, softcap, scale, and -inf beyond the vocabulary (so that exp gives 0, never 1)."""
    column_ok = offs_v < V
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_v, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        # tanh would turn an infinity into a plausible number; acc - acc turns it into NaN.
        acc = softcap * tanh(acc / softcap) + (acc - acc)
    return tl.where(column_ok[None, :], acc * scale, float("-inf"))
