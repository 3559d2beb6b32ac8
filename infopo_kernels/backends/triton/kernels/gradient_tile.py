# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""G for a known logsumexp, from logits that never leave registers.

    p_iv = exp(z_iv - lse_i)        g_iv = c_i (1[v = label_i] - p_iv)
    G_iv = gain g_iv (1 - tanh(a_iv / softcap)^2)

(p in base 2, as `logits.py` has it) each element once, in float32, rounded on its way to memory as an operand of
dX = G W and dW = G^T X (the factor `scale / gain` is left to those products; gain is that of `rows.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.kernels.logits import (
    capped,
    column_parts,
    factor_of,
    grouped_tile,
    inside,
    load_labels,
    logit_product,
    nats_of,
    unit_of,
)
from infopo_kernels.backends.triton.kernels.rows import LiveRows
from infopo_kernels.backends.triton.kernels.tail import Tail, stats_of, store_tail_stats
from infopo_kernels.backends.triton.launch import Launch, ceil_div, start_product


@triton.jit
def store_gradient_part(
    acc,
    offs_n,
    offs_k,
    v0,
    row_ok,
    label,
    level,
    c,
    gain,
    b_ptr,
    g_ptr,
    db_part_ptr,
    stats_ptr,
    p_ptr,
    ld,
    V,
    softcap,
    unit,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SPECIAL: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    REPORT: tl.constexpr,
):
    """Columns `offs_k` of a block of G, and their sums; SPECIAL where a label or the end of the vocabulary is there."""
    offs_v = v0 + offs_k
    u = inside(capped(acc, b_ptr, offs_v, V, softcap, HAS_BIAS, HAS_SOFTCAP), offs_v, V, SPECIAL, NEGATIVE)
    # Differences first: where p is near 1 they are exact, and a float32 G has digits to lose.
    precise: tl.constexpr = g_ptr.dtype.element_ty == tl.float32
    log_p = (u - level[:, None]) * unit if precise else u * unit - level[:, None]
    p = tl.exp2(tl.minimum(log_p, 0.0, propagate_nan=tl.PropagateNan.ALL))  # lse is rounded, and p is at most 1
    g = c[:, None] * (tl.where(offs_v[None, :] == label[:, None], 1.0 - p, -p) if SPECIAL else -p)
    if HAS_SOFTCAP:
        slope = 1.0 - u * u
        g = tl.where((offs_v < V)[None, :], g * slope, 0.0) if SPECIAL else g * slope
    if BIAS_GRAD:
        tl.store(db_part_ptr + offs_k, tl.sum(tl.where(row_ok[:, None], g, 0.0), axis=0) / gain)
    offs_g = offs_n.to(tl.int64)[:, None] * ld + offs_k[None, :]
    if TAIL:
        counts = row_ok & (c != 0.0)
        store_tail_stats(p, offs_v, label, counts, stats_ptr, p_ptr, offs_k, offs_g, row_ok, ld, REPORT)
    tl.store(g_ptr + offs_g, g.to(g_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def store_gradient_tile(
    acc,
    offs_n,
    pid_v,
    v0,
    row_ok,
    label,
    level,
    c,
    gain,
    b_ptr,
    g_ptr,
    db_part_ptr,
    stats_ptr,
    p_ptr,
    ld,
    V,
    softcap,
    unit,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SPECIAL: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    REPORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PART: tl.constexpr,
):
    """The parts of a tile of sums."""
    parts = column_parts(acc, BLOCK_N, BLOCK_V, PART)
    for p in tl.static_range(BLOCK_V // PART):
        store_gradient_part(
            parts[p], offs_n, pid_v * BLOCK_V + p * PART + tl.arange(0, PART), v0, row_ok, label, level, c, gain,
            b_ptr, g_ptr, db_part_ptr, stats_ptr, p_ptr, ld, V, softcap, unit, HAS_BIAS, HAS_SOFTCAP, NEGATIVE, SPECIAL,
            BIAS_GRAD, TAIL, REPORT,
        )  # fmt: skip


@triton.jit
def gradient_block(
    tile,
    num_n,
    num_v,
    here,
    begin,
    x,
    w,
    b_ptr,
    labels_ptr,
    lse_ptr,
    c_ptr,
    rows_ptr,
    g_ptr,
    db_part_ptr,
    stats_ptr,
    p_ptr,
    gain,
    row0,
    v0,
    ld,
    V,
    H,
    stride_xn,
    stride_wv,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    REPORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    EVEN_H: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of G."""
    pid_n, pid_v = grouped_tile(tile, num_n, num_v, GROUP)
    offs_n = begin + pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = offs_n < here
    row = tl.load(rows_ptr + row0 + tl.minimum(offs_n, here - 1))
    first = v0 + pid_v * BLOCK_V
    acc = logit_product(
        x, row.to(tl.int64) * stride_xn, begin + pid_n * BLOCK_N, w, stride_wv, first, V, H,
        BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    label = load_labels(labels_ptr, row, row_ok, V)
    lse = tl.load(lse_ptr + row)
    # lse in units of u for float32, in base 2 else (`store_gradient_part`).
    if g_ptr.dtype.element_ty == tl.float32:
        level = lse / factor_of(softcap, scale, HAS_SOFTCAP)
    else:
        level = (lse.to(tl.float64) * (1.0 / nats_of(softcap, scale, HAS_SOFTCAP))).to(tl.float32)
    c = tl.load(c_ptr + row, mask=row_ok, other=0.0)
    c = tl.where(label != -1, c, float("nan"))
    c = c * gain
    unit = unit_of(softcap, scale, HAS_SOFTCAP)
    block = pid_n.to(tl.int64) + tl.cdiv(begin, BLOCK_N)  # behind those of rows whose logits are kept
    db_part_ptr += block * ld
    if TAIL:
        stats_ptr += block * (2 * ld)
    labels_here = tl.sum(((label >= first) & (label < first + BLOCK_V)).to(tl.int32), axis=0)
    # A label of 128 rows lies in a fifth of the tiles of 256 words (V 151936): comparing every element is left to them.
    # Triton 3.6 cannot flatten a loop with a branch in it: there all tiles compare.
    if DESCRIPTORS or (labels_here > 0) | (first + BLOCK_V > V):
        store_gradient_tile(
            acc, offs_n, pid_v, v0, row_ok, label, level, c, gain, b_ptr, g_ptr, db_part_ptr, stats_ptr, p_ptr, ld, V,
            softcap, unit, HAS_BIAS, HAS_SOFTCAP, NEGATIVE, True, BIAS_GRAD, TAIL, REPORT, BLOCK_N, BLOCK_V, PART,
        )  # fmt: skip
    else:
        store_gradient_tile(
            acc, offs_n, pid_v, v0, row_ok, label, level, c, gain, b_ptr, g_ptr, db_part_ptr, stats_ptr, p_ptr, ld, V,
            softcap, unit, HAS_BIAS, HAS_SOFTCAP, NEGATIVE, False, BIAS_GRAD, TAIL, REPORT, BLOCK_N, BLOCK_V, PART,
        )  # fmt: skip


@triton.jit(do_not_specialize=["row0", "C", "v0", "columns"])
def gradient_tile_kernel(
    x,
    w,
    b_ptr,
    labels_ptr,
    lse_ptr,
    c_ptr,
    rows_ptr,
    count_ptr,
    kept_ptr,
    gain_ptr,
    g_ptr,
    db_part_ptr,
    stats_ptr,
    p_ptr,
    row0,
    C,
    v0,
    columns,
    ld,
    V,
    H,
    stride_xn,
    stride_wv,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    REPORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    EVEN_H: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """g[i, v - v0] = G_iv (0 for v >= V), db_part[block, v - v0] = sum of G_iv / gain over the block's rows.

    Rows at the head of the list whose logits are kept get their G from there (`kept.py`); blocks begin after them.
    """
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    begin = tl.maximum(tl.load(kept_ptr) - row0, 0)
    num_n = tl.cdiv(tl.maximum(here - begin, 0), BLOCK_N)
    num_v = tl.cdiv(columns, BLOCK_V)
    pid = tl.program_id(0)
    gain = tl.load(gain_ptr) if HAS_GAIN else 1.0
    if DESCRIPTORS:
        for tile in tl.range(pid, num_n * num_v, tl.num_programs(0), flatten=True):
            gradient_block(
                tile, num_n, num_v, here, begin, x, w, b_ptr, labels_ptr, lse_ptr, c_ptr, rows_ptr, g_ptr, db_part_ptr,
                stats_ptr, p_ptr, gain, row0, v0, ld, V, H, stride_xn, stride_wv, softcap, scale, HAS_BIAS, HAS_SOFTCAP,
                NEGATIVE, BIAS_GRAD, TAIL, REPORT, BLOCK_N, BLOCK_V, BLOCK_H, PART, EVEN_H, GROUP, DESCRIPTORS,
                PRECISION,
            )  # fmt: skip
    elif pid < num_n * num_v:
        gradient_block(
            pid, num_n, num_v, here, begin, x, w, b_ptr, labels_ptr, lse_ptr, c_ptr, rows_ptr, g_ptr, db_part_ptr,
            stats_ptr, p_ptr, gain, row0, v0, ld, V, H, stride_xn, stride_wv, softcap, scale, HAS_BIAS, HAS_SOFTCAP,
            NEGATIVE, BIAS_GRAD, TAIL, REPORT, BLOCK_N, BLOCK_V, BLOCK_H, PART, EVEN_H, GROUP, DESCRIPTORS,
            PRECISION,
        )  # fmt: skip


def launch_gradient_tile(
    launch: Launch,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    live: LiveRows,
    g: torch.Tensor,
    bias_part: torch.Tensor,
    row0: int,
    v0: int,
    columns: int,
    gathered: torch.Tensor | None = None,
    tail: Tail | None = None,
) -> None:
    """G [C, ld] for rows row0 .. row0 + C of the list and columns v0 .. v0 + columns, its column sums, and what `tail`
    chooses words from.

    `gathered` are those rows of X, if descriptors load them.
    """
    head, tile = launch.head, launch.tiles.logits
    c, ld = g.shape
    reports = tail is not None and tail.report is not None
    arguments = launch.logit_arguments
    arguments["PART"] = launch.gradient_part
    start_product(
        gradient_tile_kernel,
        (launch.programs(ceil_div(c, tile.rows) * ceil_div(columns, tile.columns)),),
        *launch.operands(gathered),
        head.bias,
        labels,
        lse,
        row_weight,
        live.index,
        live.count,
        live.kept,
        live.gain,
        g,
        bias_part,
        *stats_of(tail),
        row0,
        c,
        v0,
        columns,
        ld,
        HAS_GAIN=g.dtype == torch.float16,
        BIAS_GRAD=bias_part.numel() > 0,
        TAIL=tail is not None,
        REPORT=reports,
        **arguments,
        rows=c,
        present=lambda: live.present(row0, c, kept=False),
        key=("V", "H", "HAS_BIAS", "HAS_SOFTCAP"),
    )
