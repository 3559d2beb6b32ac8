"""The scale of float16 gradients that are formed before the factor from above is known.

The loss forms its gradients in the forward pass, for a factor of 1. float16 holds nothing below 2^-24: with
`average=True` and 512 tokens, 92 % of dW would round to 0, and no GradScaler could bring that back. So the row weights
are multiplied by a power of two first, the largest one with

    lift * 2 |scale| max_t |c_t| max |W|        <= 2^15       which bounds |dX|                       (1)
    lift * |scale| sum_t |c_t| max_h |X_th|     <= 2^15       which bounds |dW|                       (2)
    lift * |scale| sum_t |c_t|                  <= 2^15       which bounds |db|                       (3)

and the backward pass multiplies by factor / lift in float32. So no gradient overflows before that, and a factor of 0
gives 0. Each bound holds because a row of G sums to at most 2 |scale c_t| in absolute value, and none of its entries
exceeds |scale c_t|. The host does not wait for the device. Ranks that share a head agree on one lift, because parts of
a gradient add up over them.

Gradients in float32 until the factor is there would not need this, but V * H * 2 bytes more. bfloat16 reaches as far
as float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.options import IGNORE_INDEX

_TOP = 2.0**15
_SMALLEST_BOUND = 2.0**-80
"""Keeps 1 / lift among float32's normal numbers."""


@dataclass(frozen=True)
class Lift:
    """The lift of a call's gradients."""

    head: Head
    labels: torch.Tensor
    """[N]."""
    over_ranks: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    """For ranks that share a head: the maxima [2] and the sums [2] of all ranks, from this rank's."""

    def __call__(
        self, row_weight: torch.Tensor, gradients: Gradients, unit: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """lift * row weights [N], and lift [] float32; the row weights as they are and None for another type.

        `gradients` are those that are wanted. `unit` is the lift of dX for row weights of 1, if it is known; W is not
        read then.
        """
        if self.head.weight.dtype != torch.float16:
            return row_weight, None
        lift = self._lift(row_weight, gradients, unit)
        return row_weight * lift, lift

    def _lift(self, row_weight: torch.Tensor, gradients: Gradients, unit: torch.Tensor | None) -> torch.Tensor:
        head, scale = self.head, abs(self.head.scale)
        # An infinite or NaN weight spoils its own row; it must not choose the scale of the others.
        c = row_weight.abs()
        c = torch.where((self.labels != IGNORE_INDEX) & c.isfinite(), c, 0.0)
        zero = c.new_zeros(())
        c_most, of_one, dw, db = zero, zero, zero, zero
        if gradients.hidden is not None:
            c_most = torch.cat([c, zero[None]]).max()
            of_one = 2 * scale * _largest(head.weight) if unit is None else _TOP / unit
        if gradients.weight is not None:
            terms = c * _largest(head.hidden, dim=1)
            dw = scale * torch.where(terms.isfinite(), terms, 0.0).sum()  # rows that are not scored may hold NaN
        if gradients.bias is not None:
            db = scale * c.sum()
        most, sums = torch.stack([c_most, of_one]), torch.stack([dw, db])
        if self.over_ranks is not None:
            most, sums = self.over_ranks(most, sums)
        bound = torch.maximum(most.prod(), sums.max())
        usable = bound.isfinite() & (bound > 0)
        return torch.where(usable, _power_of_two_below(_TOP / bound.clamp(min=_SMALLEST_BOUND)), 1.0)


def _largest(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """max |x| in float32, in one pass without a copy; 0 for nothing."""
    if not x.numel():
        return x.new_zeros(() if dim is None else x.shape[:dim], dtype=torch.float32)
    low, high = torch.aminmax(x, dim=dim)
    return torch.maximum(high.float(), -low.float())


def _power_of_two_below(x: torch.Tensor) -> torch.Tensor:
    """The largest power of two that is at most x > 0, exactly."""
    return x / torch.frexp(x).mantissa / 2
