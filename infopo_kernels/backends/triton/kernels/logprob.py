# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Token log-probabilities: head product and online log-softmax in one kernel, then a merge, which has the targets.

For each scored row i and each slice S of the vocabulary, in base 2 (`logits.py`),

    m_Si = max_{v in S} unit u_iv        s_Si = sum_{v in S} exp2(unit u_iv - m_Si)

and over the slices

    lse_i = (M + log2(sum_S s_Si exp2(m_Si - M))) factor / unit,  M = max_S m_Si          l_i = z_{i, label_i} - lse_i

where the logit of the label is a product of two rows of its own: 2 H multiplications a row, against a comparison with
the label for each of the row's V logits. Logits live in registers only. Slices let a few rows fill the device; slices
are merged in one order, so that two runs agree bitwise.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.kernels.logits import (
    capped,
    column_parts,
    grouped_tile,
    inside,
    load_labels,
    logit_product,
    nats_of,
    row_maximum,
    row_offsets,
    tanh,
    unit_of,
)
from infopo_kernels.backends.triton.kernels.rows import LiveRows, room_for_rows, rows_in
from infopo_kernels.backends.triton.launch import FUSED, Launch, Sizes, aligned, ceil_div, start_product

WAVES = 8
"""Programs a multiprocessor over a whole launch: the last, partly filled wave then costs at most an eighth."""

MERGE_ROWS, MERGE_SLICES = 8, 128
"""Tile of the merge: 8 rows are a sector of 32 bytes, 128 slices keep 128 of them in flight. With 32 rows a program, a
chunk of 768 rows left four fifths of an H100 idle and took 0.15 ms."""

MERGE_DEPTH, MERGE_DEPTH_UNALIGNED = 256, 64
"""Hidden units a step of the labels' logits: 512 bytes of a row; fewer where every element is loaded separately."""


@triton.jit
def online_softmax(us, unit, running_max, running_sum, NEGATIVE: tl.constexpr):
    """Maximum and sum of exponentials with the parts `us` of a tile taken in, one reduction over all for each."""
    top = us[0]
    for p in tl.static_range(1, len(us)):
        top = tl.minimum(top, us[p]) if NEGATIVE else tl.maximum(top, us[p])
    tile_max, _ = row_maximum(top, unit, NEGATIVE)
    new_max = tl.maximum(running_max, tile_max)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    total = tl.exp2(us[0] * unit - shift[:, None])
    for p in tl.static_range(1, len(us)):
        total += tl.exp2(us[p] * unit - shift[:, None])
    return new_max, running_sum * tl.exp2(running_max - shift) + tl.sum(total, axis=1)


@triton.jit
def take_in(
    parts,
    start,
    running_max,
    running_sum,
    b_ptr,
    V,
    softcap,
    unit,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    EDGE: tl.constexpr,
    PART: tl.constexpr,
):
    """`online_softmax` of the tile of sums that begins at the word `start`."""
    us = ()
    for p in tl.static_range(len(parts)):
        offs = start + p * PART + tl.arange(0, PART)
        u = inside(capped(parts[p], b_ptr, offs, V, softcap, HAS_BIAS, HAS_SOFTCAP), offs, V, EDGE, NEGATIVE)
        if HAS_SOFTCAP:
            # One part after the other: tanh of all of them beside the sums is more than registers hold.
            running_max, running_sum = online_softmax((u,), unit, running_max, running_sum, NEGATIVE)
        else:
            us = us + (u,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred elements)
    if not HAS_SOFTCAP:
        running_max, running_sum = online_softmax(us, unit, running_max, running_sum, NEGATIVE)
    return running_max, running_sum


@triton.jit(do_not_specialize=["row0", "C", "slice_tiles"])
def logprob_kernel(
    x,
    w,
    b_ptr,
    rows_ptr,
    count_ptr,
    max_ptr,
    sum_ptr,
    row0,
    C,
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
    """max[S, i] = m_Si, sum[S, i] = s_Si for the rows and the slice S of one program."""
    here = tl.minimum(tl.load(count_ptr) - row0, C)
    num_n = tl.cdiv(here, BLOCK_N)
    pid = tl.program_id(0)
    if (here <= 0) | (pid >= num_n * slices):
        return
    pid_n, pid_s = grouped_tile(pid, num_n, slices, GROUP)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_x = row_offsets(rows_ptr, row0, offs_n, here, stride_xn, DESCRIPTORS)
    unit = unit_of(softcap, scale, HAS_SOFTCAP)

    running_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    begin = pid_s * slice_tiles * BLOCK_V
    end = tl.minimum(begin + slice_tiles * BLOCK_V, V)
    for start in tl.range(begin, end, BLOCK_V, flatten=DESCRIPTORS):
        acc = logit_product(
            x, offs_x, pid_n * BLOCK_N, w, stride_wv, start, V, H,
            BLOCK_N, BLOCK_V, BLOCK_H, EVEN_H, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        parts = column_parts(acc, BLOCK_N, BLOCK_V, PART)
        # A branch with results inside a flattened loop is more than Triton 3.6 can fuse: there every tile is masked.
        if DESCRIPTORS or start + BLOCK_V > V:
            running_max, running_sum = take_in(
                parts, start, running_max, running_sum, b_ptr, V, softcap, unit, HAS_BIAS, HAS_SOFTCAP, NEGATIVE,
                True, PART,
            )  # fmt: skip
        else:
            running_max, running_sum = take_in(
                parts, start, running_max, running_sum, b_ptr, V, softcap, unit, HAS_BIAS, HAS_SOFTCAP, NEGATIVE,
                False, PART,
            )  # fmt: skip

    row_ok = offs_n < here
    offs_part = pid_s.to(tl.int64) * C + offs_n
    tl.store(max_ptr + offs_part, running_max, mask=row_ok)
    tl.store(sum_ptr + offs_part, running_sum, mask=row_ok)


@triton.jit
def target_logits(
    x_ptr,
    offs_x,
    w_ptr,
    stride_wv,
    b_ptr,
    label,
    ok,
    H,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """z_{i, label_i}; NaN where the label lies outside the vocabulary, 0 where it is in another rank's part."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_w = label.to(tl.int64) * stride_wv
    sums = tl.zeros((ROWS, BLOCK_H), tl.float32)
    for h in range(0, H, BLOCK_H):
        there = ok[:, None] & (offs_h < H - h)[None, :]
        x = tl.load(x_ptr + offs_x[:, None] + (h + offs_h)[None, :], mask=there, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + offs_w[:, None] + (h + offs_h)[None, :], mask=there, other=0.0).to(tl.float32)
        sums += x * w
    a = tl.sum(sums, axis=1)
    if HAS_BIAS:
        a += tl.load(b_ptr + label, mask=ok, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        a = softcap * (tanh(a / softcap) + (a - a))
    return tl.where(ok, a * scale, tl.where(label == -2, 0.0, float("nan")))


@triton.jit(do_not_specialize=["row0", "C", "parts", "stride_mt"])
def merge_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
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
    H,
    stride_xn,
    stride_wv,
    softcap,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """l and lse of rows row0 .. row0 + C of the list from partial results max [parts, stride_mt], sum [parts, C]; with
    KEEP target[i] = z_{i, label_i} as well."""
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
        total_sum = total_sum * tl.exp2(total_max - shift) + tl.sum(
            part_sum * tl.exp2(part_max - shift[None, :]), axis=0
        )
        total_max = new_max
    lse2 = total_max.to(tl.float64) + tl.log2(total_sum).to(tl.float64)
    lse = lse2 * nats_of(softcap, scale, HAS_SOFTCAP)
    row = tl.load(rows_ptr + row0 + offs_n, mask=row_ok, other=0)
    label = load_labels(labels_ptr, row, row_ok, V)
    target = target_logits(
        x_ptr, row.to(tl.int64) * stride_xn, w_ptr, stride_wv, b_ptr, label, label >= 0, H, softcap, scale,
        HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_H,
    )  # fmt: skip
    if KEEP:
        tl.store(target_ptr + offs_n, target, mask=row_ok)
    tl.store(logp_ptr + row, (target.to(tl.float64) - lse).to(tl.float32), mask=row_ok)
    tl.store(lse_ptr + row, lse.to(tl.float32), mask=row_ok)


def logprob_chunk(sizes: Sizes) -> int:
    """Rows of one launch: all, or as many, in whole blocks, as half of the workspace holds where they are gathered."""
    block = sizes.tiles.logits.rows
    most = sizes.workspace_bytes // 2 // (sizes.dtype.itemsize * sizes.gathered_stride) // block * block
    return min(sizes.rows, most) if sizes.descriptors else sizes.rows


@lru_cache(maxsize=256)
def slices_of(sizes: Sizes) -> tuple[int, int]:
    """(slices, tiles a slice): at least WAVES waves of programs, whole tiles, partial results within the workspace.

    Up to four times as many slices as that asks for, where they fill the last wave better.
    """
    tile, rows = sizes.tiles.logits, logprob_chunk(sizes)
    row_blocks = ceil_div(rows, tile.rows)
    tiles = ceil_div(sizes.vocabulary, tile.columns)
    left = sizes.workspace_bytes // 2 if sizes.descriptors else sizes.workspace_bytes
    most = min(tiles, max(1, left // (8 * rows)))
    wanted = min(ceil_div(WAVES * sizes.multiprocessors, row_blocks), most)

    def filled(slice_tiles: int) -> float:
        """Share of the device that works: tiles over what all slots could take in the time of the longest."""
        slices = ceil_div(tiles, slice_tiles)
        return sizes.filled(row_blocks * slices) * tiles / (slices * slice_tiles)

    longest = ceil_div(tiles, wanted)
    slice_tiles = max(range(ceil_div(tiles, min(4 * wanted, most)), longest + 1), key=filled)
    return ceil_div(tiles, slice_tiles), slice_tiles


def launch_logprob(launch: Launch, labels: torch.Tensor, live: LiveRows, logp: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill l and lse of the live rows."""
    sizes, head, tile = launch.sizes, launch.head, launch.tiles.logits
    rows, (slices, slice_tiles) = logprob_chunk(sizes), slices_of(sizes)
    arguments = launch.logit_arguments
    # With Triton 3.9: tanh beside running sums of 128 x 256 logits spilled on sm_90, and float32 sums of 64 columns on
    # sm_80, with tanh of 32 columns on sm_100.
    single = head.hidden.dtype == torch.float32
    most = (16 if single else 32) if head.softcap is not None else 32 if single else arguments["PART"]
    arguments["PART"] = min(arguments["PART"], most)
    partial = torch.empty(2 * slices * rows, dtype=torch.float32, device=labels.device)
    memory = room_for_rows(launch, rows)
    for row0 in range(0, launch.rows, rows):
        c = min(rows, launch.rows - row0)
        part_max, part_sum = partial[: 2 * slices * c].view(2, slices, c)
        gathered = rows_in(launch, live, memory, row0, c)
        start_product(
            logprob_kernel,
            (ceil_div(c, tile.rows) * slices,),
            *launch.operands(gathered),
            head.bias,
            live.index,
            live.count,
            part_max,
            part_sum,
            row0,
            c,
            slices,
            slice_tiles,
            **arguments,
            rows=c,
            present=lambda row0=row0, c=c: live.present(row0, c),  # type: ignore[misc]
            key=("V", "H", "HAS_BIAS", "HAS_SOFTCAP"),
        )
        launch_merge(launch, labels, live, part_max, part_sum, logp, lse, row0)


def launch_merge(
    launch: Launch,
    labels: torch.Tensor,
    live: LiveRows,
    part_max: torch.Tensor,
    part_sum: torch.Tensor,
    logp: torch.Tensor,
    lse: torch.Tensor,
    row0: int,
    target: torch.Tensor | None = None,
) -> None:
    """l and lse of the rows of the list that the partial results [parts, C] stand for; `part_max` may have a stride.

    With `target` [C] the logits of their labels as well.
    """
    (parts, c), head = part_sum.shape, launch.head
    merge_kernel[(ceil_div(c, MERGE_ROWS),)](
        head.hidden,
        head.weight,
        head.bias,
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
        launch.hidden_size,
        head.hidden.stride(0),
        head.weight.stride(0),
        1.0 if head.softcap is None else head.softcap,
        head.scale,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        KEEP=target is not None,
        BLOCK_N=MERGE_ROWS,
        BLOCK_S=MERGE_SLICES,
        BLOCK_H=MERGE_DEPTH if aligned(head) else MERGE_DEPTH_UNALIGNED,
        num_warps=4,
        **FUSED,
    )
