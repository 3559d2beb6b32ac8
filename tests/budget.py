"""The error budget of all tests: the largest allowed difference between a right kernel and float64.

`infopo_kernels.backends.base` says what a kernel computes. This file bounds its rounding errors, entry by entry, from
the problem in float64. Here u = 2^-24 (float32 logits and sums; 2^-53 for float64 inputs), s = dz/da / scale is the
slope of the softcap, and p = exp(z - lse). g(n) = min(n, 2 sqrt(n)) u is the error of n roundings in a row, relative to
the sum of the sizes of the summands. (The error is at most n u. Roundings are nearly independent, and then it hardly
ever exceeds 2 sqrt(n) u: Higham, Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
41, 2019.)

    a      H products, their sum, the bias             da   = g(H + 2) (|X| |W|^T + |b|)
    z      a map of few operations                     dz   = effect of da on z, plus 8 u |z|
    lse    exponentials of z - max z, and their sum    dlse = effect of dz on lse, plus 32 u + 4 u |lse|
                                                              + u |z - max z|
    l      z_y - lse                                   dl   = dz_y + dlse + 2 u |l|
    p      exp(z - lse)                                log p has the error e = dz + dlse + u |log p| + 8 u
             where kept logits are 16-bit numbers       e += k (max z - z) + 2^-25 + 2 u |max z|; s likewise
    G      c scale s (1[v = y] - p); s from z          dG   = |c scale| (s dp + |1[v = y] - p| ds
                                                              + (4 u s + 16 u) (1[v = y] + p)), ds: effect of da on s
           if products take G in 16 bits                 + r |c scale| s max(|1[v = y] - p|, p)
    dX     V products and their sum                    ddX  = dG |W| + g(V) |c scale| s (1[v = y] + p) |W|
    dW, db the same over N rows                        ddW, ddb

k = 2^-11 is half a step of float16: a kept logit is relative to a reference that lies between the largest of its group
of words and the largest of the row (`kept_rounding`).

r is the rounding of G as the operand of a product (or of p, if the part of the label is exact). It is 0 if products
take float32. If they take 16 bits, it is half a step of the type for each rounding (2^-8 for bfloat16, 2^-11 for
float16; `operand_rounding`). `assert_within` adds the rounding of a result into its own type.

The exponentials of the bounds are exact, not of first order. So the budget also holds where logits are so large that
float32 cannot tell which entry is the largest. Numbers below 2^-126 may count as 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infopo_kernels.backends import cpp
from infopo_kernels.backends.base import Head
from infopo_kernels.options import ELSEWHERE, IGNORE_INDEX

HALF_STEP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding to the type."""

SMALLEST = {torch.float64: 0.0, torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}
"""Largest absolute error of one rounding below the smallest exponent of the type."""


@dataclass(frozen=True)
class Budget:
    """Allowed errors, before the rounding of a result into its type; float64."""

    l: Tensor  # noqa: E741
    """[N]; 0 for rows that are not scored, as `lse`."""
    lse: Tensor
    hidden: Tensor
    """[N, H]."""
    weight: Tensor
    """[V, H]."""
    bias: Tensor
    """[V]."""


def operand_rounding(backend: str, dtype: torch.dtype, roundings: int = 2) -> float:
    """r: relative error of G as an operand of a backend's products. `roundings`: of the Triton kernels, at most two."""
    if backend == "cpp":
        return HALF_STEP[dtype] if cpp.isa(dtype) in ("avx512_bf16", "amx") else 0.0
    return roundings * HALF_STEP[dtype] if backend == "triton" and dtype.itemsize == 2 else 0.0


def kept_rounding(backend: str, dtype: torch.dtype) -> float:
    """k: relative error of a kept logit, as a distance from its reference, of a backend that keeps 16-bit ones."""
    return HALF_STEP[torch.float16] if backend == "cpp" and operand_rounding(backend, dtype) else 0.0


def accumulated(roundings: int, unit: float) -> float:
    """g(n)."""
    return min(roundings, 2 * roundings**0.5) * unit


def error_budget(
    head: Head,
    labels: Tensor,  # [N] int64
    c: Tensor,  # [N]
    c_error: Tensor | None = None,  # [N]: allowed error of c
    operand: float = 0.0,
    kept: float = 0.0,
) -> Budget:
    """Allowed errors of l, lse, dX, dW and db. They do not depend on the head's workspace.

    `operand` is r; `kept` is k if logits may have been kept.
    """
    (N, H), V = head.hidden.shape, head.weight.shape[0]
    u = HALF_STEP[head.accumulator_dtype]
    scored = labels != IGNORE_INDEX
    y = labels[scored]
    x, w = head.hidden.detach()[scored].double(), head.weight.detach().double()
    b = torch.zeros(V, dtype=torch.float64) if head.bias is None else head.bias.detach().double()
    c = c[scored].double()[:, None]
    c_error = torch.zeros_like(c) if c_error is None else c_error[scored].double()[:, None]
    here = (y != ELSEWHERE)[:, None]
    y = y.where(here[:, 0], 0)
    own = torch.where(here, torch.nn.functional.one_hot(y, V).double(), 0.0)

    a = x @ w.T + b
    masked = a == -torch.inf  # a bias of -inf removes an entry exactly
    da = torch.where(masked, 0.0, accumulated(H + 2, u) * (x.abs() @ w.abs().T + b.abs()))
    if head.softcap is None:
        z, slope, steepest, dslope = head.scale * a, torch.ones_like(a), torch.ones_like(a), torch.zeros_like(a)
    else:
        t, cap = torch.tanh(a / head.softcap), head.softcap
        z, slope = head.scale * cap * t, 1 - t.square()
        steepest, flattest = (1 - torch.tanh(size.relu() / cap).square() for size in (a.abs() - da, a.abs() + da))
        dslope = torch.maximum(steepest - slope, slope - flattest)
    dz = torch.where(masked, 0.0, abs(head.scale) * steepest * da + 8 * u * z.abs())
    lse = z.logsumexp(1, keepdim=True)
    log_p = z - lse
    largest = z.max(1, keepdim=True).values
    # exp(z - max z) has the relative error u |z - max z|, weighted by p: it is 0 where exp is 0
    depth = u * torch.where(masked, 0.0, largest - z).clamp(max=200)
    dlse = torch.maximum((z + dz + depth).logsumexp(1, True) - lse, lse - (z - dz - depth).logsumexp(1, True))
    dlse = dlse + 32 * u + 4 * u * lse.abs()
    l, dz_y = (v.gather(1, y[:, None]) for v in (log_p, dz))  # noqa: E741
    l, dz_y = torch.where(here, l, -lse), torch.where(here, dz_y, 0.0)  # noqa: E741
    dl = dz_y + dlse + 2 * u * torch.where(l.isinf(), 0.0, l).abs()

    e = torch.where(masked, 0.0, dz + dlse + u * log_p.abs() + 8 * u)
    if kept:
        dkept = torch.where(masked, 0.0, kept * (largest - z) + 2.0**-25 + 2 * u * largest.abs())
        e = e + dkept
        if head.softcap is not None:
            dslope = dslope + 2 * (t.abs() + dkept) * dkept / abs(head.scale * head.softcap)
    p = log_p.exp()
    dp = torch.maximum((log_p + e).clamp(max=0).exp() - p, -p * torch.expm1(-e)).clamp(min=0)
    size = (c * head.scale).abs()
    rounded = 4 * u * slope + (0 if head.softcap is None else 16 * u)
    dG = size * (steepest * dp + (own - p).abs() * dslope + rounded * (own + p))
    dG += 2 * SMALLEST[torch.float32] * (1 + size)
    dG += abs(head.scale) * slope * c_error * (own - p).abs()
    dG += operand * size * slope * torch.maximum((own - p).abs(), p)
    if operand > 0 and head.hidden.dtype == torch.float16:
        dG += 2.0**-24 * size.max() if len(y) else 0.0
    terms = size * slope * (own + p)

    def rows(values: Tensor) -> Tensor:
        full = torch.zeros(N, *values.shape[1:], dtype=torch.float64)
        full[scored] = values
        return full

    over_v, over_n = accumulated(V + 4, u), accumulated(len(y) + 4, u)
    return Budget(
        l=rows(dl[:, 0]),
        lse=rows(dlse[:, 0]),
        hidden=rows((dG + over_v * terms) @ w.abs()),
        weight=(dG + over_n * terms).T @ x.abs(),
        bias=(dG + over_n * terms).sum(0),
    )


def assert_within(
    name: str, got: Tensor, truth: Tensor, allowed: Tensor, roundings: int = 1, factor: float = 1.0
) -> None:
    """|got - truth| <= allowed plus `roundings` into got's type. A value that is not finite must be the same in both.

    `factor`: the result was multiplied by this after its rounding; `truth` and `allowed` already contain it.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(truth.shape)}"
    got, truth = got.detach().cpu(), truth.detach().cpu()
    finite = truth.isfinite()
    assert torch.equal(got.double()[~finite].nan_to_num(), truth[~finite].nan_to_num()), f"{name}: NaN or infinity"
    assert torch.equal(got.isfinite(), finite), f"{name}: {int((got.isfinite() != finite).sum())} are not finite"
    step, least = HALF_STEP[got.dtype], SMALLEST[got.dtype]
    limit = allowed + roundings * (step * (truth.abs() + allowed) + least * max(1.0, abs(factor)))
    error, limit = (got.double() - truth).abs()[finite], limit[finite]
    worst = float((error / limit.clamp(min=1e-300)).max()) if error.numel() else 0.0
    assert (error <= limit).all(), f"{name}: error {float(error.max()):.3g}, {worst:.2f} times the budget"
