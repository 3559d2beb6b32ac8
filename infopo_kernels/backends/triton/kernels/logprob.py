# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Token log-probabilities: head product, online log-softmax and target gather in one kernel, then a merge.

For each scored row i and each slice S of the vocabulary

    m_Si = max_{v in S} z_iv        s_Si = sum_{v in S} exp(z_iv - m_Si)        y_i = z_{i, label_i}

and over the slices

    lse_i = M + log(sum_S s_Si exp(m_Si - M)),  M = max_S m_Si          l_i = y_i - lse_i

Logits live in registers only. Slices let a few rows fill the device; slices are merged in one order, so that two runs
agree bitwise.
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
from infopo_kernels.backends.triton.launch import FUSED, Launch, ceil_div, start_product

WAVES = 8
"""Programs a multiprocessor over a whole launch: the last, partly filled wave then costs at most an eighth."""

MERGE_ROWS, MERGE_SLICES = 32, 32
"""Tile of the merge: 32 rows are one coalesced 128-byte access, 32 slices keep 32 of them in flight."""


@triton.jit
def online_softmax(z, offs_v, label, running_max, running_sum, target):
    """Maximum, sum of exponentials and target logit with the columns `offs_v` taken in."""
    target += tl.sum(tl.where(offs_v[None, :] == label[:, None], z, 0.0), axis=1)
    new_max = tl.maximum(running_max, tl.max(z, axis=1))
    # Logits that are all -inf so far (a bias may say so) must count 0, not exp(-inf + inf).
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    running_sum = running_sum * exp(running_max - shift) + tl.sum(exp(z - shift[:, None]), axis=1)
    return new_max, running_sum, target


@triton.jit(do_not_specialize=["N", "slice_tiles"])
def logprob_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    labels_ptr,
    rows_ptr,
    count_ptr,
    max_ptr,
    sum_ptr,
    target_ptr,
    N,
    slices,
    slice_tiles,
    V,
    H,
    stride_xn,
    stride_wv,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    EVEN_H: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """max[S, i] = m_Si, sum[S, i] = s_Si, target[i] = y_i for the rows and the slice S of one program."""
    count = tl.load(count_ptr)
    num_n = tl.cdiv(count, BLOCK_N)
    pid = tl.program_id(0)
    if pid >= num_n * slices:
        return
    pid_n, pid_s = grouped_tile(pid, num_n, slices, GROUP)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = offs_n < count
    row = tl.load(rows_ptr + offs_n, mask=row_ok, other=0)
    label = load_labels(labels_ptr, row, row_ok, V)
    offs_x = row.to(tl.int64) * stride_xn

    running_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    target = tl.zeros((BLOCK_N,), tl.float32)
    begin = pid_s * slice_tiles * BLOCK_V
    end = tl.minimum(begin + slice_tiles * BLOCK_V, V)
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        acc = head_product(
            x_ptr, offs_x, row_ok, w_ptr, stride_wv, offs_v, V, H, BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, PRECISION
        )  # fmt: skip
        parts = column_parts(acc, BLOCK_N, BLOCK_V, PART)
        for p in tl.static_range(BLOCK_V // PART):
            offs_p = start + p * PART + tl.arange(0, PART)
            z = to_logits(parts[p], b_ptr, offs_p, V, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
            running_max, running_sum, target = online_softmax(z, offs_p, label, running_max, running_sum, target)

    offs_part = pid_s.to(tl.int64) * N + offs_n
    tl.store(max_ptr + offs_part, running_max, mask=row_ok)
    tl.store(sum_ptr + offs_part, running_sum, mask=row_ok)
    here = (label >= begin) & (label < end)
    tl.store(target_ptr + offs_n, target, mask=row_ok & here)


@triton.jit(do_not_specialize=["row0", "C", "parts", "stride_mt"])
def merge_kernel(
    max_ptr,
    sum_ptr,
    target_ptr,
    labels_ptr,
    rows_ptr,
    count_ptr,
    logp_ptr,
    lse_ptr,
    row0,
    C,
    parts,
    stride_mt,
    V,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """l and lse of rows row0 .. row0 + C of the list from partial results max [parts, stride_mt], sum [parts, C]."""
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    pid = tl.program_id(0)
    if pid * BLOCK_N >= here:
        return
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = offs_n < here
    total_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, parts, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        offs_max = offs_s.to(tl.int64)[:, None] * stride_mt + offs_n[None, :]
        offs_sum = offs_s.to(tl.int64)[:, None] * C + offs_n[None, :]
        ok = (offs_s < parts)[:, None] & row_ok[None, :]
        part_max = tl.load(max_ptr + offs_max, mask=ok, other=float("-inf"))
        part_sum = tl.load(sum_ptr + offs_sum, mask=ok, other=0.0)
        new_max = tl.maximum(total_max, tl.max(part_max, axis=0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        total_sum = total_sum * exp(total_max - shift) + tl.sum(part_sum * exp(part_max - shift[None, :]), axis=0)
        total_max = new_max
    lse = total_max + tl.log(total_sum)
    row = tl.load(rows_ptr + row0 + offs_n, mask=row_ok, other=0)
    label = load_labels(labels_ptr, row, row_ok, V)
    target = tl.load(target_ptr + offs_n, mask=row_ok & (label >= 0), other=float("nan"))
    tl.store(logp_ptr + row, target - lse, mask=row_ok)
    tl.store(lse_ptr + row, lse, mask=row_ok)


def slices_of(launch: Launch) -> tuple[int, int]:
    """(slices, tiles a slice): at least WAVES waves of programs, whole tiles, partial results within the workspace.

    Up to four times as many slices as that asks for, where they fill the last wave better.
    """
    tile = launch.tiles.logits
    row_blocks = ceil_div(launch.rows, tile.rows)
    tiles = ceil_div(launch.vocabulary, tile.columns)
    affordable = max(1, launch.head.workspace_bytes // (8 * launch.rows))
    most = min(tiles, affordable)
    wanted = min(ceil_div(WAVES * launch.multiprocessors, row_blocks), most)

    def filled(slice_tiles: int) -> float:
        """Share of the device that works: tiles over what all slots could take in the time of the longest."""
        slices = ceil_div(tiles, slice_tiles)
        return launch.filled(row_blocks * slices) * tiles / (slices * slice_tiles)

    longest = ceil_div(tiles, wanted)
    slice_tiles = max(range(ceil_div(tiles, min(4 * wanted, most)), longest + 1), key=filled)
    return ceil_div(tiles, slice_tiles), slice_tiles


def launch_logprob(launch: Launch, labels: torch.Tensor, live: LiveRows, logp: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill l and lse of the live rows."""
    n, head = launch.rows, launch.head
    slices, slice_tiles = slices_of(launch)
    arguments = launch.logit_arguments
    if head.softcap is not None and head.hidden.dtype != torch.float32:
        # tanh beside running sums of 128 x 256 logits spilled on sm_90.
        arguments["PART"] = min(arguments["PART"], 32)
    partial = torch.empty(2, slices, n, dtype=torch.float32, device=labels.device)
    target = torch.empty(n, dtype=torch.float32, device=labels.device)
    start_product(
        logprob_kernel,
        (ceil_div(n, launch.tiles.logits.rows) * slices,),
        head.hidden,
        head.weight,
        head.bias,
        labels,
        live.index,
        live.count,
        partial[0],
        partial[1],
        target,
        n,
        slices,
        slice_tiles,
        **arguments,
        rows=n,
        present=lambda: live.present(0, n),
        key=("V", "H", "HAS_BIAS", "HAS_SOFTCAP"),
    )
    launch_merge(launch, labels, live, partial[0], partial[1], target, logp, lse, row0=0)


def launch_merge(
    launch: Launch,
    labels: torch.Tensor,
    live: LiveRows,
    part_max: torch.Tensor,
    part_sum: torch.Tensor,
    target: torch.Tensor,
    logp: torch.Tensor,
    lse: torch.Tensor,
    row0: int,
) -> None:
    """l and lse of the rows of the list that the partial results [parts, C] stand for; `part_max` may have a stride."""
    parts, c = part_sum.shape
    merge_kernel[(ceil_div(c, MERGE_ROWS),)](
        part_max,
        part_sum,
        target,
        labels,
        live.index,
        live.count,
        logp,
        lse,
        row0,
        c,
        parts,
        part_max.stride(0),
        launch.vocabulary,
        BLOCK_N=MERGE_ROWS,
        BLOCK_S=MERGE_SLICES,
        num_warps=4,
        **FUSED,
    )
