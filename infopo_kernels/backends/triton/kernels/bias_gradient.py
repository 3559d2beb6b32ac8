# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""db += scale * sum of the column sums of G that other kernels left for each block of rows.

    db_v += scale sum_block part[block, v]

and with a pooled tail (`tail.py`), where T are the words of a block of the vocabulary that are not kept,

    db_v += scale pi_v sum_{v' in T} sum_block part[block, v']        for v in T

Blocks are added in one order, so two runs agree bitwise; atomics would not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.kernels.rows import LiveRows, row_blocks
from infopo_kernels.backends.triton.kernels.tail import Tail
from infopo_kernels.backends.triton.launch import FUSED, Launch, ceil_div
from infopo_kernels.backends.triton.tiles import TAIL_BLOCK

COLUMNS = TAIL_BLOCK
"""Columns a program: a block of words that pools its tail, one coalesced kilobyte a block of rows."""


@triton.jit(do_not_specialize=["row0", "C", "columns"])
def bias_gradient_kernel(
    part_ptr,
    db_ptr,
    count_ptr,
    kept_ptr,
    share_ptr,
    row0,
    C,
    columns,
    ld,
    scale,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """db[v] for one block of columns."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    ok = offs_v < columns
    total = tl.zeros((BLOCK_V,), tl.float32)
    for block in range(0, row_blocks(count_ptr, kept_ptr, row0, C, BLOCK_N)):
        total += tl.load(part_ptr + tl.cast(block, tl.int64) * ld + offs_v, mask=ok, other=0.0)
    if TAIL:
        share = tl.load(share_ptr + offs_v, mask=ok, other=-1.0)
        total = tl.where(share < 0.0, total, share * tl.sum(tl.where(share < 0.0, 0.0, total), axis=0))
    tl.store(db_ptr + offs_v, tl.load(db_ptr + offs_v, mask=ok, other=0.0) + total * scale, mask=ok)


def launch_bias_gradient(
    launch: Launch,
    live: LiveRows,
    part: torch.Tensor,
    bias_grad: torch.Tensor,
    row0: int,
    rows: int,
    block_rows: int,
    tail: Tail | None = None,
) -> None:
    """Add the column sums `part` [blocks, ld] of `rows` rows to `bias_grad` [columns]."""
    columns = bias_grad.numel()
    bias_gradient_kernel[(ceil_div(columns, COLUMNS),)](
        part,
        bias_grad,
        live.count,
        live.kept,
        None if tail is None else tail.share,
        row0,
        rows,
        columns,
        part.stride(0),
        launch.head.scale,
        TAIL=tail is not None,
        BLOCK_N=block_rows,
        BLOCK_V=COLUMNS,
        num_warps=4,
        **FUSED,
    )
