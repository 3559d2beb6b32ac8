"""The same rows on every rank, each multiplied by the rank's own part of the vocabulary: a backend made of backends.

For the part of rank r, the rank's own backend gives lse_r and, where the label lies in the part, l = z_y - lse_r. Over
the ranks

    lse = log sum_r exp(lse_r)        z_y = sum_r z_y,r (0 where the label is elsewhere)        l = z_y - lse

8 bytes a row from every rank. `backward` with the lse of the whole vocabulary gives dW_r and db_r whole, and a part of
dX, which adds up over the ranks at the end of a call. No rank sees a part of another rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.distributed import collectives
from infopo_kernels.objectives import Evaluation, Objective, Sequences
from infopo_kernels.options import ELSEWHERE, IGNORE_INDEX
from infopo_kernels.packing import Rows


def own_labels(labels: Tensor, start: int, stop: int) -> Tensor:
    """Labels as a part of the vocabulary sees them: counted from its start, ELSEWHERE in another part."""
    inside = (labels >= start) & (labels < stop)
    outside = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, ELSEWHERE)
    return torch.where(inside, labels - start, outside)


def merged(labels: Tensor, lse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """l and lse [N] from each part's lse [R, N] and logit of the label [R, N] (0 where the label is elsewhere)."""
    scored = labels != IGNORE_INDEX
    whole = torch.where(scored, lse.double().logsumexp(0), 0.0)
    picked = torch.where(scored, target.double().sum(0), 0.0)
    return (picked - whole).to(lse.dtype), whole.to(lse.dtype)


class SameRows:
    """The three primitives of the whole vocabulary, from those of each rank's part."""

    name: ClassVar[str] = "same_rows"

    def __init__(self, own: Backend, group: str, bounds: list[int], kept_rows: int) -> None:
        """`bounds` [R + 1] are the first entries of the parts, then V; `kept_rows` is the least of all ranks."""
        self._own, self._group, self._kept_rows = own, group, kept_rows
        self.bounds = bounds
        rank = collectives.rank(group)
        self._start, self._stop = bounds[rank], bounds[rank + 1]

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return self._own.unsupported_reason(device, dtype)

    def kept_rows(self, head: Head, weight_gradient: Tensor) -> int:
        """The same number on every rank, because it decides who calls what."""
        del head, weight_gradient
        return self._kept_rows

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        self._own.scale_(values, factor)

    def objective(self, objective: Objective, logp: Tensor, rows: Rows, sequences: Sequences) -> Evaluation | None:
        return self._own.objective(objective, logp, rows, sequences)

    def logprob(self, head: Head, labels: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        part = self._part(head)
        lse = torch.full(labels.shape, -torch.inf, dtype=head.accumulator_dtype, device=labels.device)
        target = torch.zeros_like(lse)
        if len(part.weight):
            y = own_labels(labels, self._start, self._stop)
            l, lse = self._own.logprob(part, y, keep if keep is None else keep[: len(part.weight)])  # noqa: E741
            target = torch.where(y >= 0, l + lse, 0.0)
        both = collectives.gathered(self._group, torch.stack([lse, target]))
        return merged(labels, both[:, 0], both[:, 1])

    def logprob_and_grad(
        self, head: Head, labels: Tensor, row_weight: Tensor, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """One product more than on one device: the lse of the whole vocabulary is known after the merge only."""
        l, lse = self.logprob(head, labels)  # noqa: E741
        self.backward(head, labels, lse, row_weight, gradients)
        return l, lse

    def backward(
        self,
        head: Head,
        labels: Tensor,
        lse: Tensor,
        row_weight: Tensor,
        gradients: Gradients,
        kept: Tensor | None = None,
    ) -> None:
        """dX of this part only; `add_up_hidden_` ends a call."""
        part = self._part(head)
        rows = len(part.weight)
        if kept is not None and gradients.weight is not None:
            gradients.weight[rows:].zero_()
        if not rows:
            return
        own = Gradients(
            gradients.hidden,
            None if gradients.weight is None else gradients.weight[:rows],
            None if gradients.bias is None else gradients.bias[:rows],
        )
        y = own_labels(labels, self._start, self._stop)
        kept = None if kept is None else own_labels(kept, self._start, self._stop)
        self._own.backward(part, y, lse, row_weight, own, kept)

    def add_up_hidden_(self, hidden: Tensor) -> None:
        """dX [N, H] of the whole vocabulary from this part's; sums in float32, rounded once."""
        if hidden.dtype.itemsize > 2:
            collectives.add_up_(self._group, hidden)
            return
        for part in torch.split(hidden, max(1, (1 << 22) // hidden.shape[1])):
            single = part.float()
            collectives.add_up_(self._group, single)
            part.copy_(single)

    def _part(self, head: Head) -> Head:
        """The head without padded rows."""
        rows = self._stop - self._start
        if rows == len(head.weight):
            return head
        return replace(head, weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])
