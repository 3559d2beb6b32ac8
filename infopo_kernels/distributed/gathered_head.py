"""Rows of its own on every rank, and a head that is gathered for the call: what FSDP does, for one op.

The only way that holds V H numbers which a rank does not own. It moves fewer bytes than the ring, so it is taken where
the head and its gradient fit the workspace.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.distributed import collectives
from infopo_kernels.distributed.parts import Parts


class GatheredHead:
    """The rank's own backend, on the whole head."""

    def __init__(self, parts: Parts, backend: Backend, own_rows: int, *, average: bool) -> None:
        """`own_rows` are the rows of this rank's weight with its padding."""
        self.backend, self._parts, self._own_rows, self._average = backend, parts, own_rows, average

    def whole_head(self, head: Head) -> Head:
        part = self._parts.own(head)
        return replace(
            head, weight=self._whole(part.weight), bias=None if part.bias is None else self._whole(part.bias)
        )

    def without_padding(self, head: Head) -> Head:
        """`head` is that of `whole_head`, which has none."""
        return head

    def finish(self, gradients: Gradients) -> Gradients:
        """dW and db of this rank's part, summed over the rows of all ranks."""
        weight, bias = gradients.weight, gradients.bias
        return replace(
            gradients,
            weight=None if weight is None else self._own_part(weight),
            bias=None if bias is None else self._own_part(bias),
        )

    def _whole(self, part: Tensor) -> Tensor:
        parts = self._parts
        most = max(map(parts.rows, range(parts.ranks)))
        if most * parts.ranks == parts.bounds[-1]:  # parts of one size: no copy
            return collectives.gathered(parts.group, part).flatten(0, 1)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        every = collectives.gathered(parts.group, padded)
        return torch.cat([every[rank, : parts.rows(rank)] for rank in range(parts.ranks)])

    def _own_part(self, whole: Tensor) -> Tensor:
        parts = self._parts
        most = max(map(parts.rows, range(parts.ranks)))
        if most * parts.ranks == parts.bounds[-1]:
            sent = whole.view(parts.ranks, most, *whole.shape[1:])
        else:
            sent = whole.new_zeros(parts.ranks, most, *whole.shape[1:])
            for rank in range(parts.ranks):
                sent[rank, : parts.rows(rank)] = whole[parts.bounds[rank] : parts.bounds[rank + 1]]
        total = collectives.exchanged(parts.group, sent).sum(0, dtype=torch.promote_types(whole.dtype, torch.float32))
        if self._average:
            total /= parts.ranks
        own = whole.new_zeros(self._own_rows, *whole.shape[1:])
        own[: parts.rows(parts.rank)] = total[: parts.rows(parts.rank)]
        return own
