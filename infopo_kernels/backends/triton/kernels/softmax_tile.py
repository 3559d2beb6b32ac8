# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Logits of a chunk of rows kept once, as unnormalised probabilities, and turned into G when the logsumexp is known.

The first kernel forms the logits, in base 2 (`logits.py`), and keeps, relative to the maximum m of a row within its own
part T of the vocabulary (64 words; 32 where rows are not aligned),

    Q_iv = exp2(unit u_iv - m_Ti) * (1 - tanh(a_iv / softcap)^2)    m_Ti, s_Ti = sum_{v in T} exp2(unit u_iv - m_Ti)

whose largest value is 1, so that rounding Q to the input type costs a relative half step like rounding G itself; the
softmax's sum is taken from float32 before it. Q lies in the workspace, row after row, or part after part in the memory
of a weight gradient (`kept.py`). With lse from the merge, the second kernel finishes in place

    G_iv = -c_i gain exp2(m_Ti - lse2_i) Q_iv                   for v != label_i
    G_iv = c_i gain (1 - exp(l_i)) (1 - (z_iy / (scale softcap))^2),  z_iy = l_i + lse_i,    for v = label_i

(gain from `rows.py`; the factor `scale` is left to the products). One product, where forming G with a known
logsumexp would need the logits a second time; the price is one pass over Q, 4 bytes an element for 2 H operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.kernels.logits import (
    capped,
    column_parts,
    exp,
    grouped_tile,
    inside,
    load_labels,
    logit_product,
    nats_of,
    row_maximum,
    row_offsets,
    rows_first,
    unit_of,
)
from infopo_kernels.backends.triton.kernels.rows import LiveRows
from infopo_kernels.backends.triton.kernels.tail import Tail, stats_of, store_tail_stats
from infopo_kernels.backends.triton.launch import FUSED, Launch, ceil_div, start_product

NORMALISE_ROWS = 32
"""Rows a program of the second kernel: 32 x 128 elements in 4 warps are four 16-byte accesses a thread."""


@triton.jit
def store_softmax_part(
    acc,
    part,
    offs_n,
    row_ok,
    b_ptr,
    q_ptr,
    max_ptr,
    sum_ptr,
    C,
    num_parts,
    stride_qt,
    stride_qn,
    stride_mt,
    V,
    softcap,
    unit,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    EDGE: tl.constexpr,
    PART: tl.constexpr,
):
    """Columns part * PART .. (part + 1) * PART of Q, with their maximum and sum."""
    if EDGE:
        # The last tile of the vocabulary may begin parts that nobody has room for.
        row_ok = row_ok & (offs_n < tl.where(part < num_parts, C, 0))
    offs_v = part * PART + tl.arange(0, PART)
    u = inside(capped(acc, b_ptr, offs_v, V, softcap, HAS_BIAS, HAS_SOFTCAP), offs_v, V, EDGE, NEGATIVE)
    part_max, shift = row_maximum(u, unit, NEGATIVE)
    q = tl.exp2(u * unit - shift[:, None])
    tl.store(max_ptr + part.to(tl.int64) * stride_mt + offs_n, part_max, mask=row_ok)
    tl.store(sum_ptr + part.to(tl.int64) * C + offs_n, tl.sum(q, axis=1), mask=row_ok)
    if HAS_SOFTCAP:
        q = tl.where((offs_v < V)[None, :], q * (1.0 - u * u), 0.0) if EDGE else q * (1.0 - u * u)
    offs_q = part.to(tl.int64) * stride_qt + offs_n.to(tl.int64)[:, None] * stride_qn + tl.arange(0, PART)[None, :]
    tl.store(q_ptr + offs_q, q.to(q_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def store_softmax_tile(
    acc,
    pid_v,
    offs_n,
    row_ok,
    b_ptr,
    q_ptr,
    max_ptr,
    sum_ptr,
    C,
    num_parts,
    stride_qt,
    stride_qn,
    stride_mt,
    V,
    softcap,
    unit,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PART: tl.constexpr,
):
    """The parts of a tile of sums."""
    parts = column_parts(acc, BLOCK_N, BLOCK_V, PART)
    for p in tl.static_range(BLOCK_V // PART):
        store_softmax_part(
            parts[p], pid_v * (BLOCK_V // PART) + p, offs_n, row_ok, b_ptr, q_ptr, max_ptr, sum_ptr,
            C, num_parts, stride_qt, stride_qn, stride_mt, V, softcap, unit, HAS_BIAS, HAS_SOFTCAP, NEGATIVE,
            EDGE, PART,
        )  # fmt: skip


@triton.jit
def softmax_block(
    tile,
    num_n,
    num_v,
    here,
    x,
    w,
    b_ptr,
    rows_ptr,
    q_ptr,
    max_ptr,
    sum_ptr,
    row0,
    C,
    num_parts,
    stride_qt,
    stride_qn,
    stride_mt,
    V,
    H,
    stride_xn,
    stride_wv,
    softcap,
    unit,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    EVEN_H: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of Q."""
    pid_n, pid_v = grouped_tile(tile, num_n, num_v, GROUP)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = offs_n < here
    acc = logit_product(
        x, row_offsets(rows_ptr, row0, offs_n, here, stride_xn, DESCRIPTORS), pid_n * BLOCK_N, w, stride_wv,
        pid_v * BLOCK_V, V, H, BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    # Triton 3.6 cannot flatten a loop with a branch in it: there every tile is masked.
    if DESCRIPTORS or pid_v == num_v - 1:
        store_softmax_tile(
            acc, pid_v, offs_n, row_ok, b_ptr, q_ptr, max_ptr, sum_ptr, C, num_parts, stride_qt, stride_qn, stride_mt,
            V, softcap, unit, HAS_BIAS, HAS_SOFTCAP, NEGATIVE, True, BLOCK_N, BLOCK_V, PART,
        )  # fmt: skip
    else:
        store_softmax_tile(
            acc, pid_v, offs_n, row_ok, b_ptr, q_ptr, max_ptr, sum_ptr, C, num_parts, stride_qt, stride_qn, stride_mt,
            V, softcap, unit, HAS_BIAS, HAS_SOFTCAP, NEGATIVE, False, BLOCK_N, BLOCK_V, PART,
        )  # fmt: skip


@triton.jit(do_not_specialize=["row0", "C", "num_parts", "stride_mt"])
def softmax_tile_kernel(
    x,
    w,
    b_ptr,
    rows_ptr,
    count_ptr,
    q_ptr,
    max_ptr,
    sum_ptr,
    row0,
    C,
    num_parts,
    stride_qt,
    stride_qn,
    stride_mt,
    V,
    H,
    stride_xn,
    stride_wv,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
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
    """q[T, i, v - PART T] = Q_iv (0 for v >= V), max[T, i] = m_Ti, sum[T, i] = s_Ti."""
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    num_n = tl.cdiv(tl.maximum(here, 0), BLOCK_N)
    num_v = tl.cdiv(V, BLOCK_V)
    pid = tl.program_id(0)
    unit = unit_of(softcap, scale, HAS_SOFTCAP)
    if DESCRIPTORS:
        for tile in tl.range(pid, num_n * num_v, tl.num_programs(0), flatten=True):
            softmax_block(
                tile, num_n, num_v, here, x, w, b_ptr, rows_ptr, q_ptr, max_ptr, sum_ptr, row0, C, num_parts,
                stride_qt, stride_qn, stride_mt, V, H, stride_xn, stride_wv, softcap, unit, HAS_BIAS, HAS_SOFTCAP,
                NEGATIVE, BLOCK_N, BLOCK_V, BLOCK_H, PART, EVEN_H, GROUP, DESCRIPTORS, PRECISION,
            )  # fmt: skip
    elif pid < num_n * num_v:
        softmax_block(
            pid, num_n, num_v, here, x, w, b_ptr, rows_ptr, q_ptr, max_ptr, sum_ptr, row0, C, num_parts,
            stride_qt, stride_qn, stride_mt, V, H, stride_xn, stride_wv, softcap, unit, HAS_BIAS, HAS_SOFTCAP,
            NEGATIVE, BLOCK_N, BLOCK_V, BLOCK_H, PART, EVEN_H, GROUP, DESCRIPTORS, PRECISION,
        )  # fmt: skip


@triton.jit
def normalised(q, part_max, offs_v, label, c, logp, lse, softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """G / gain from Q, and p (times the softcap's slope) of the words that are no labels."""
    lse2 = lse.to(tl.float64) * (1.0 / nats_of(softcap, scale, HAS_SOFTCAP))
    # l is NaN where the label lies outside the vocabulary: its row of G is then NaN as well. It is -inf where the
    # label's logit is, and the gradient is finite there.
    # No probability exceeds 1, though lse is rounded: at logits of 1e14 one step of it is 2^23. NaN stays NaN.
    log_most = (part_max.to(tl.float64) - lse2).to(tl.float32)
    shifted = tl.exp2(tl.where(log_most > 0.0, 0.0, log_most))
    other_columns = -c * shifted + tl.where(logp == logp, 0.0, logp)
    at_label = c * (1.0 - exp(tl.where(logp > 0.0, 0.0, logp)))
    if HAS_SOFTCAP:
        t = (logp + lse) / (scale * softcap)
        at_label = at_label * (1.0 - t * t)
    q = q.to(tl.float32)
    g = tl.where(offs_v[None, :] == label[:, None], at_label[:, None], other_columns[:, None] * q)
    return g, shifted[:, None] * q


@triton.jit(do_not_specialize=["row0", "C"])
def normalise_kernel(
    q_ptr,
    max_ptr,
    logp_ptr,
    lse_ptr,
    c_ptr,
    labels_ptr,
    rows_ptr,
    count_ptr,
    gain_ptr,
    db_part_ptr,
    stats_ptr,
    p_ptr,
    row0,
    C,
    ld,
    V,
    softcap,
    scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    TAIL: tl.constexpr,
    REPORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """G in place of Q; db_part[block, v] = sum of G_iv / gain over the block's rows, from float32."""
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    pid_n, pid_v = rows_first(tl.program_id(0), tl.cdiv(C, BLOCK_N))
    if pid_n * BLOCK_N >= here:
        return
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok = offs_n < here
    row = tl.load(rows_ptr + row0 + offs_n, mask=row_ok, other=0)
    c = tl.load(c_ptr + row, mask=row_ok, other=0.0)
    logp = tl.load(logp_ptr + row, mask=row_ok, other=0.0)
    lse = tl.load(lse_ptr + row, mask=row_ok, other=0.0)
    label = load_labels(labels_ptr, row, row_ok, V)
    part_max = tl.load(max_ptr + pid_v.to(tl.int64) * C + offs_n, mask=row_ok, other=float("-inf"))
    offs_q = offs_n.to(tl.int64)[:, None] * ld + offs_v[None, :]
    q = tl.load(q_ptr + offs_q, mask=row_ok[:, None], other=0.0)
    g, p = normalised(q, part_max, offs_v, label, c, logp, lse, softcap, scale, HAS_SOFTCAP)
    if BIAS_GRAD:
        tl.store(db_part_ptr + pid_n.to(tl.int64) * ld + offs_v, tl.sum(g, axis=0))
    if HAS_GAIN:
        g = g * tl.load(gain_ptr)
    if TAIL:
        counts = row_ok & (c != 0.0)
        stats_ptr += pid_n.to(tl.int64) * (2 * ld)
        store_tail_stats(p, offs_v, label, counts, stats_ptr, p_ptr, offs_v, offs_q, row_ok, ld, REPORT)
    tl.store(q_ptr + offs_q, g.to(q_ptr.dtype.element_ty), mask=row_ok[:, None])


def launch_softmax_tile(
    launch: Launch,
    live: LiveRows,
    q: torch.Tensor,
    part_max: torch.Tensor,
    part_sum: torch.Tensor,
    row0: int,
    gathered: torch.Tensor | None = None,
) -> None:
    """Q [parts, C, PART] and (max, sum) [parts, C] for rows row0 .. row0 + C of the list, `gathered` for descriptors.

    `q` and `part_max` may have any strides whose last one is 1; `parts` cover the vocabulary at least.
    """
    (parts, c), tiles = part_sum.shape, ceil_div(launch.vocabulary, launch.tiles.logits.columns)
    head = launch.head
    start_product(
        softmax_tile_kernel,
        (launch.programs(ceil_div(c, launch.tiles.logits.rows) * tiles),),
        *launch.operands(gathered),
        head.bias,
        live.index,
        live.count,
        q,
        part_max,
        part_sum,
        row0,
        c,
        parts,
        q.stride(0),
        q.stride(1),
        part_max.stride(0),
        **launch.logit_arguments,
        rows=c,
        present=lambda: live.present(row0, c),
        key=("V", "H", "HAS_BIAS", "HAS_SOFTCAP"),
    )


def launch_normalise(
    launch: Launch,
    labels: torch.Tensor,
    live: LiveRows,
    q: torch.Tensor,
    part_max: torch.Tensor,
    logp: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    bias_part: torch.Tensor,
    row0: int,
    tail: Tail | None = None,
) -> None:
    """G in place of Q, its column sums for each block of rows, and what `tail` chooses words from."""
    parts, c = part_max.shape
    head = launch.head
    normalise_kernel[(ceil_div(c, NORMALISE_ROWS) * parts,)](
        q,
        part_max,
        logp,
        lse,
        row_weight,
        labels,
        live.index,
        live.count,
        live.gain,
        bias_part,
        *stats_of(tail),
        row0,
        c,
        q.stride(0),
        launch.vocabulary,
        1.0 if head.softcap is None else head.softcap,
        head.scale,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_GAIN=q.dtype == torch.float16,
        BIAS_GRAD=bias_part.numel() > 0,
        TAIL=tail is not None,
        REPORT=tail is not None and tail.report is not None,
        BLOCK_N=NORMALISE_ROWS,
        BLOCK_V=launch.tiles.logits.part,
        num_warps=4,
        **FUSED,
    )
