"""The same rows on every rank, each multiplied by the rank's own part of the vocabulary: a backend made of backends.

For the part of rank r, the rank's own backend gives lse_r and, where the label lies in the part, l = z_y - lse_r. Over
the ranks

    lse = log sum_r exp(lse_r)        z_y = sum_r z_y,r (0 where the label is elsewhere)        l = z_y - lse

8 bytes a row from every rank. `backward` with the lse of the whole vocabulary gives dW_r and db_r whole, and a part of
dX, which adds up over the ranks at the end of a call. No rank sees a part of another rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.distributed import collectives
from infopo_kernels.distributed.parts import Parts, logit_of_label, merged
from infopo_kernels.distributed.shared_backend import SharedBackend


class SameRows(SharedBackend):
    """The three primitives of the whole vocabulary, from those of each rank's part."""

    name: ClassVar[str] = "same_rows"

    def __init__(self, own: Backend, parts: Parts, kept_rows: int) -> None:
        """`kept_rows` is the least of all ranks."""
        super().__init__(own, parts)
        self._kept_rows = kept_rows

    def kept_rows(self, head: Head, weight_gradient: Tensor) -> int:
        """The same number on every rank, because it decides who calls what."""
        del head, weight_gradient
        return self._kept_rows

    def memory_for_logits(self, head: Head, weight_gradient: Tensor, rows: int) -> Tensor | None:
        part = self._parts.own(head)
        own = weight_gradient[: len(part.weight)]
        return self._own.memory_for_logits(part, own, rows) if len(own) else None

    def logprob(self, head: Head, labels: Tensor, keep: Gradients | None = None) -> tuple[Tensor, Tensor]:
        part = self._parts.own(head)
        lse = torch.full(labels.shape, -torch.inf, dtype=head.accumulator_dtype, device=labels.device)
        target = torch.zeros_like(lse)
        if len(part.weight):
            y = self._parts.labels(labels, self._parts.rank)
            logp, lse = self._own.logprob(part, y, None if keep is None else self._parts.own_gradients(keep))
            target = logit_of_label(y, logp, lse)
        both = collectives.gathered(self._parts.group, torch.stack([lse, target]))
        return merged(labels, both[:, 0], both[:, 1])

    def logprob_and_grad(
        self, head: Head, labels: Tensor, row_weight: Tensor, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """One product more than on one device: the lse of the whole vocabulary is known after the merge only."""
        logp, lse = self.logprob(head, labels)
        self.backward(head, labels, lse, row_weight, gradients)
        return logp, lse

    def backward(
        self,
        head: Head,
        labels: Tensor,
        lse: Tensor,
        row_weight: Tensor,
        gradients: Gradients,
        kept: Tensor | None = None,
    ) -> None:
        """dX of this part only; `finish` adds up."""
        parts = self._parts
        if kept is not None and gradients.weight is not None:
            gradients.weight[parts.rows(parts.rank) :].zero_()
        if not parts.rows(parts.rank):
            return
        y = parts.labels(labels, parts.rank)
        kept = None if kept is None else parts.labels(kept, parts.rank)
        self._own.backward(parts.own(head), y, lse, row_weight, parts.own_gradients(gradients), kept)

    def finish(self, gradients: Gradients) -> Gradients:
        """dX [N, H] of the whole vocabulary from this part's, in place; sums in float32, rounded once."""
        hidden = gradients.hidden
        if hidden is None:
            return gradients
        if hidden.dtype.itemsize > 2:
            collectives.add_up_(self._parts.group, hidden)
            return gradients
        for part in torch.split(hidden, max(1, (1 << 22) // hidden.shape[1])):
            single = part.float()
            collectives.add_up_(self._parts.group, single)
            part.copy_(single)
        return gradients
