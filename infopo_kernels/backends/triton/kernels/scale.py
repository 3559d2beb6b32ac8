# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""values *= factor in one launch, in float32, without waiting for the factor.

    x_th = f_t x_th for rows, or x = f x for one factor

A factor of 1 is found on the device, and its elements are neither read nor written: a loss whose gradient from above is
1 spares a pass over dW (2 V H elements), which the host could only know by waiting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.launch import FUSED, ceil_div, programs_at_once

BLOCK = 4096
"""Elements a step: 4 warps with four 16-byte accesses in flight a thread."""

ROW_BLOCK = 1024
"""Elements of a row a step."""


@triton.jit
def scale_rows_kernel(x_ptr, factor_ptr, H, stride, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0)
    factor = tl.load(factor_ptr + row).to(tl.float32)
    if factor == 1.0:
        return
    offs = tl.arange(0, BLOCK)
    x_ptr += row.to(tl.int64) * stride
    for start in range(0, H, BLOCK):
        inside = start + offs < H
        x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + start + offs, (x * factor).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["steps"])
def scale_kernel(x_ptr, factor_ptr, size, steps, BLOCK: tl.constexpr):
    """Programs take blocks in turn: as many as run at once, so that leaving early costs a launch and no more."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    for step in range(0, steps):
        offs = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (x * factor).to(x_ptr.dtype.element_ty), mask=offs < size)


def launch_scale(values: torch.Tensor, factor: torch.Tensor) -> None:
    """`values` contiguous, `factor` []; or `values` [N, H] with a last stride of 1, `factor` [N]."""
    if values.numel() == 0:
        return
    if factor.ndim:
        n, h = values.shape
        scale_rows_kernel[(n,)](values, factor, h, values.stride(0), BLOCK=ROW_BLOCK, num_warps=4, **FUSED)
        return
    blocks = ceil_div(values.numel(), BLOCK)
    programs = min(blocks, programs_at_once(values.device))
    steps = ceil_div(blocks, programs)
    scale_kernel[(programs,)](values, factor, values.numel(), steps, BLOCK=BLOCK, num_warps=4, **FUSED)
