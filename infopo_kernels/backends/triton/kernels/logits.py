# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Device functions that every kernel with logits shares: the head product of one tile and the map from it to logits.

With x_i a scored row, w_v a row of the head, both as given, and everything from the product on in float32:

    a_iv = x_i . w_v + b_v
    u_iv = a_iv, or tanh(a_iv / softcap) with a softcap
    z_iv = factor u_iv        factor = scale, or scale * softcap with a softcap

Softmaxes are formed in base 2, where exp(z - lse) is one fused multiply-add and one instruction:

    exp(z_iv - lse_i) = exp2(unit u_iv - lse2_i)        unit = factor log2(e) in float32, lse2_i = lse_i unit / factor

Without descriptors nothing masks the common case: rows beyond the last one and words beyond the vocabulary are copies
of the last ones, so that loads need no mask; what belongs to copies is not stored. Only the last tile of the vocabulary
(EDGE) turns its copies' logits into minus infinity, and only tiles that hold a label of their rows compare with labels.

DESCRIPTORS says that x and w are tensor descriptors of the gathered rows of a chunk and of the head: the copy engine
(TMA) loads whole tiles, without an address or a mask in registers. A program then takes tile after tile in one loop
that is flattened with the loop over the depth, so that the next tile is on its way while this one's sums are used.
Triton 3.6 flattens no loop with a branch: every tile masks and compares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infopo_kernels.options import ELSEWHERE

LOG2E = tl.constexpr(1.4426950408889634)
IN_ANOTHER_PART = tl.constexpr(ELSEWHERE)


@triton.jit
def factor_of(softcap, scale, HAS_SOFTCAP: tl.constexpr):
    return tl.cast(scale * softcap if HAS_SOFTCAP else scale, tl.float32)


@triton.jit
def unit_of(softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """`unit`: the same float32 number in every kernel."""
    return factor_of(softcap, scale, HAS_SOFTCAP) * LOG2E


@triton.jit
def nats_of(softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """factor / unit in float64, so that the rounding of `unit`, which every logit has, is taken out again."""
    factor = factor_of(softcap, scale, HAS_SOFTCAP)
    return tl.cast(factor, tl.float64) / tl.cast(unit_of(softcap, scale, HAS_SOFTCAP), tl.float64)


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
    """Labels of rows, int32 (a 64-bit comparison with every column would double its registers); -1 outside [0, V), -2
    for a label in another rank's part of the vocabulary."""
    label = tl.load(labels_ptr + row, mask=row_ok, other=-1)
    outside = tl.where(label == IN_ANOTHER_PART, -2, -1)
    return tl.where((label >= 0) & (label < V), label, outside).to(tl.int32)


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
    """x_i . w_v for rows at element offsets `offs_x` (int64) and columns `offs_v`, copies of the last beyond V."""
    offs_h = tl.arange(0, BLOCK_H)
    x_ptrs = x_ptr + offs_x[:, None] + offs_h[None, :]
    w_ptrs = w_ptr + tl.minimum(offs_v, V - 1).to(tl.int64)[None, :] * stride_wv + offs_h[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for h in range(0, H, BLOCK_H):
        if EVEN_H:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            depth_ok = offs_h < H - h
            x = tl.load(x_ptrs, mask=depth_ok[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=depth_ok[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_H
        w_ptrs += BLOCK_H
    return acc


@triton.jit
def described_product(
    x, w, n0, v0, H, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr
):
    """The same for rows n0 .. and columns v0 .. from descriptors of the gathered rows and of the head; 0 beyond V."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for h in range(0, H, BLOCK_H):
        acc = tl.dot(x.load([n0, h]), w.load([v0, h]).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def row_offsets(rows_ptr, row0, offs_n, here, stride_xn, DESCRIPTORS: tl.constexpr):
    """Element offsets of the rows `offs_n` of a chunk, copies of the last beyond `here`; descriptors need none."""
    if DESCRIPTORS:
        offs = offs_n.to(tl.int64)
    else:
        offs = tl.load(rows_ptr + row0 + tl.minimum(offs_n, here - 1)).to(tl.int64) * stride_xn
    return offs


@triton.jit
def logit_product(
    x,
    offs_x,
    n0,
    w,
    stride_wv,
    v0,
    V,
    H,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_i . w_v of one tile, either way: rows n0 .. of the gathered ones, or those at the offsets `offs_x`."""
    if DESCRIPTORS:
        acc = described_product(x, w, n0, v0, H, BLOCK_N, BLOCK_V, BLOCK_H, PRECISION)
    else:
        acc = head_product(
            x, offs_x, w, stride_wv, v0 + tl.arange(0, BLOCK_V), V, H, BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, PRECISION
        )
    return acc


@triton.jit
def capped(acc, b_ptr, offs_v, V, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """u from the product of columns `offs_v`."""
    if HAS_BIAS:
        acc += tl.load(b_ptr + tl.minimum(offs_v, V - 1)).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        # tanh would turn an infinity into a plausible number; acc - acc turns it into NaN.
        acc = tanh(acc / softcap) + (acc - acc)
    return acc


@triton.jit
def inside(u, offs_v, V, EDGE: tl.constexpr, NEGATIVE: tl.constexpr):
    """u, whose logits are -inf beyond the vocabulary (so that exp gives 0, never 1); NEGATIVE says that `unit` is."""
    if EDGE:
        u = tl.where((offs_v < V)[None, :], u, float("inf") if NEGATIVE else float("-inf"))
    return u


@triton.jit
def row_maximum(u, unit, NEGATIVE: tl.constexpr):
    """The largest unit u_iv of each row, and the same as a shift: 0 where all are -inf (a bias may say so), which must
    count 0, not exp(-inf + inf)."""
    largest = unit * (tl.min(u, axis=1) if NEGATIVE else tl.max(u, axis=1))
    return largest, tl.where(largest == float("-inf"), 0.0, largest)
