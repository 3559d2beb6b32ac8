# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""G for a known logsumexp, from logits that never leave registers.

    p_iv = exp(z_iv - lse_i)        g_iv = c_i (1[v = label_i] - p_iv)
    G_iv = gain g_iv (1 - tanh(a_iv / softcap)^2)

each element once, in float32, rounded on its way to memory as an operand of dX = G W and dW = G^T X (the factor
`scale / gain` is left to those products; gain is that of `rows.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.kernels.logits import (
    column_parts,
    exp,
    grouped_tile,
    head_product,
    load_labels,
    to_logits,
)
from infopo_kernels.backends.triton.kernels.rows import LiveRows
from infopo_kernels.backends.triton.launch import Launch, ceil_div, start_product


@triton.jit
def store_gradient_part(
    acc,
    offs_n,
    offs_k,
    v0,
    row_ok,
    label,
    lse,
    c,
    gain,
    b_ptr,
    g_ptr,
    db_part_ptr,
    ld,
    V,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
):
    """Columns `offs_k` of a block of G, and their sums."""
    offs_v = v0 + offs_k
    z = to_logits(acc, b_ptr, offs_v, V, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
    p = exp(z - lse[:, None])
    g = c[:, None] * tl.where(offs_v[None, :] == label[:, None], 1.0 - p, -p)
    if HAS_SOFTCAP:
        t = z / (scale * softcap)
        g = tl.where(offs_v[None, :] < V, g * (1.0 - t * t), 0.0)
    if BIAS_GRAD:
        tl.store(db_part_ptr + offs_k, tl.sum(tl.where(row_ok[:, None], g, 0.0), axis=0) / gain)
    offs_g = offs_n.to(tl.int64)[:, None] * ld + offs_k[None, :]
    tl.store(g_ptr + offs_g, g.to(g_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit(do_not_specialize=["row0", "C", "v0", "columns"])
def gradient_tile_kernel(
    x_ptr,
    w_ptr,
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
    HAS_GAIN: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    EVEN_H: tl.constexpr,
    GROUP: tl.constexpr,
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
    if pid >= num_n * num_v:
        return
    pid_n, pid_v = grouped_tile(pid, num_n, num_v, GROUP)
    offs_n = begin + pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok = offs_n < here
    row = tl.load(rows_ptr + row0 + offs_n, mask=row_ok, other=0)
    acc = head_product(
        x_ptr, row.to(tl.int64) * stride_xn, row_ok, w_ptr, stride_wv, v0 + offs_k, V, H,
        BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, PRECISION,
    )  # fmt: skip
    label = load_labels(labels_ptr, row, row_ok, V)
    lse = tl.load(lse_ptr + row, mask=row_ok, other=0.0)
    c = tl.load(c_ptr + row, mask=row_ok, other=0.0)
    c = tl.where(label >= 0, c, float("nan"))
    gain = tl.load(gain_ptr) if HAS_GAIN else 1.0
    c = c * gain
    offs_part = pid_n.to(tl.int64) * ld
    parts = column_parts(acc, BLOCK_N, BLOCK_V, PART)
    for p in tl.static_range(BLOCK_V // PART):
        offs_p = pid_v * BLOCK_V + p * PART + tl.arange(0, PART)
        store_gradient_part(
            parts[p], offs_n, offs_p, v0, row_ok, label, lse, c, gain, b_ptr, g_ptr, db_part_ptr + offs_part, ld, V,
            softcap, scale, HAS_BIAS, HAS_SOFTCAP, BIAS_GRAD,
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
) -> None:
    """G [C, ld] for rows row0 .. row0 + C of the list and columns v0 .. v0 + columns, and its column sums."""
    head, tile = launch.head, launch.tiles.logits
    c, ld = g.shape
    start_product(
        gradient_tile_kernel,
        (ceil_div(c, tile.rows) * ceil_div(columns, tile.columns),),
        head.hidden,
        head.weight,
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
        row0,
        c,
        v0,
        columns,
        ld,
        HAS_GAIN=g.dtype == torch.float16,
        BIAS_GRAD=bias_part.numel() > 0,
        **launch.logit_arguments,
        rows=c,
        present=lambda: live.present(row0, c, kept=False),
        key=("V", "H", "HAS_BIAS", "HAS_SOFTCAP"),
    )
