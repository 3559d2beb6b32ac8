"""What the backends that compute with other ranks have in common: the primitives apart, they ask the rank's own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.distributed.parts import Parts
from infopo_kernels.objectives import Evaluation, Objective, Sequences
from infopo_kernels.packing import Rows


class SharedBackend:
    """`backends.base.Backend` without the primitives, and what a call needs before and after them.

    Each rank pools the tail of its own part of the head, in the blocks of its own backend.
    """

    tail_block: ClassVar[int] = 0
    tail_exact_above: ClassVar[float] = 1.0

    def __init__(self, own: Backend, parts: Parts, *, average: bool = False) -> None:
        """With `average`, dW and db are divided by the number of ranks, as a wrapper that averages gradients does."""
        self._own, self._parts, self._average = own, parts, average

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return self._own.unsupported_reason(device, dtype)

    def kept_rows(self, head: Head, weight_gradient: Tensor) -> int:
        """None: a part of the head holds logits of one rank's rows only while no other rank's are multiplied by it."""
        del head, weight_gradient
        return 0

    def memory_for_logits(self, head: Head, weight_gradient: Tensor, rows: int) -> Tensor | None:
        del head, weight_gradient, rows
        return None

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        self._own.scale_(values, factor)

    def objective(self, objective: Objective, logp: Tensor, rows: Rows, sequences: Sequences) -> Evaluation | None:
        return self._own.objective(objective, logp, rows, sequences)

    def whole_head(self, head: Head) -> Head:
        """The head that the primitives get."""
        return head

    def without_padding(self, head: Head) -> Head:
        return self._parts.own(head)

    def finish(self, gradients: Gradients) -> Gradients:
        """This rank's gradients, from those of the primitives."""
        return gradients
