"""Rows of its own on every rank, and a part of the head: scored rows travel in chunks, parts of the head stay.

A chunk is C scored rows of each of R ranks, [R C, H]. Every rank multiplies all of it by its own part of the
vocabulary. With lse_r and z_y,r as in `same_rows`, each rank gets those of its own rows back from all parts, 8 bytes a
row and part, and its dX as a sum over the parts. dW and db never leave the rank that owns them.

While a chunk is multiplied, the next one travels. A rank holds two chunks, their dX, and what comes back of it: C is
the largest for which this takes half of the workspace. Rows whose weight is known travel once, others twice; a row of
weight 0 does not travel for its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.distributed import collectives
from infopo_kernels.distributed.parts import Parts, logit_of_label, merged
from infopo_kernels.distributed.shared_backend import SharedBackend
from infopo_kernels.options import IGNORE_INDEX


@dataclass
class _Chunk:
    """C rows of each rank."""

    own: Tensor
    """[n] int64, n <= C: which of this rank's rows these are."""
    hidden: Tensor
    """[R C, H]."""
    labels: Tensor
    """[R C] int64 in the whole vocabulary, IGNORE_INDEX in rows that fill a chunk up."""
    lse: Tensor
    """[R C], as known to the callers."""
    row_weight: Tensor
    """[R C]."""


class TravellingRows(SharedBackend):
    """The three primitives of the whole vocabulary, for rows that differ from rank to rank."""

    name: ClassVar[str] = "rows"

    def logprob(self, head: Head, labels: Tensor, keep: Gradients | None = None) -> tuple[Tensor, Tensor]:
        assert keep is None, "kept_rows is 0"
        logp = torch.zeros(labels.shape, dtype=head.accumulator_dtype, device=labels.device)
        lse = torch.zeros_like(logp)
        for chunk in self._chunks(head, labels, labels != IGNORE_INDEX, logp, logp):
            own_logp, own_lse = self._merged(head, chunk)
            logp[chunk.own], lse[chunk.own] = own_logp[: len(chunk.own)], own_lse[: len(chunk.own)]
        return logp, lse

    def logprob_and_grad(
        self, head: Head, labels: Tensor, row_weight: Tensor, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """The rows travel once: logits are formed twice, because lse is whole only after the merge."""
        logp = torch.zeros(labels.shape, dtype=head.accumulator_dtype, device=labels.device)
        lse = torch.zeros_like(logp)
        with _Sums(self._parts, head, gradients) as sums:
            for chunk in self._chunks(head, labels, labels != IGNORE_INDEX, logp, row_weight):
                own_logp, own_lse = self._merged(head, chunk)
                logp[chunk.own], lse[chunk.own] = own_logp[: len(chunk.own)], own_lse[: len(chunk.own)]
                chunk.lse = collectives.gathered(self._parts.group, own_lse).reshape(-1)
                self._gradients_of(head, chunk, sums, gradients.hidden)
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
        assert kept is None, "kept_rows is 0"
        live = (labels != IGNORE_INDEX) & (row_weight != 0)
        with _Sums(self._parts, head, gradients) as sums:
            for chunk in self._chunks(head, labels, live, lse, row_weight):
                self._gradients_of(head, chunk, sums, gradients.hidden)

    def _chunks(self, head: Head, labels: Tensor, which: Tensor, lse: Tensor, row_weight: Tensor) -> Iterator[_Chunk]:
        """The chunks of the rows of `which`, as many on every rank; the next one is on its way while one is used."""
        group, R, H = self._parts.group, self._parts.ranks, head.hidden.shape[1]
        rows = which.nonzero().squeeze(1)
        most = int(collectives.gathered(group, torch.tensor(len(rows), device=labels.device)).max())
        C = min(most, chunk_rows(head, R))
        weight = row_weight / R if self._average else row_weight

        def start(first: int) -> tuple[Tensor, collectives.Pending, collectives.Pending]:
            own = rows[first : first + C]
            hidden = head.hidden.new_zeros(C, H)
            torch.index_select(head.hidden, 0, own, out=hidden[: len(own)])
            # A label, and float32 numbers, as they are in float64: one collective for all.
            numbers = torch.zeros(3, C, dtype=torch.float64, device=labels.device)
            numbers[0] = IGNORE_INDEX
            for line, values in zip(numbers, (labels, lse, weight), strict=True):
                line[: len(own)] = values[own]
            return own, collectives.start_gather(group, hidden), collectives.start_gather(group, numbers)

        pending = start(0) if most else None
        for first in range(0, most, max(C, 1)):
            assert pending is not None
            own, hidden, numbers = pending[0], pending[1].wait(), pending[2].wait()
            pending = start(first + C) if first + C < most else None
            y, known, c = numbers.transpose(0, 1).reshape(3, R * C)
            kind = head.accumulator_dtype
            yield _Chunk(own, hidden.reshape(R * C, H), y.to(torch.int64), known.to(kind), c.to(kind))

    def _part(self, head: Head, chunk: _Chunk) -> Head:
        """This rank's part of the head, with the rows of a chunk and what chunks leave of the workspace."""
        return replace(self._parts.own(head), hidden=chunk.hidden, workspace_bytes=head.workspace_bytes // 2)

    def _merged(self, head: Head, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """l and lse [C] of this rank's rows of a chunk."""
        parts, part = self._parts, self._part(head, chunk)
        R, C = parts.ranks, len(chunk.labels) // parts.ranks
        lse = torch.full(chunk.labels.shape, -torch.inf, dtype=head.accumulator_dtype, device=chunk.labels.device)
        target = torch.zeros_like(lse)
        if len(part.weight):
            y = parts.labels(chunk.labels, parts.rank)
            logp, lse = self._own.logprob(part, y)
            target = logit_of_label(y, logp, lse)
        both = collectives.exchanged(parts.group, torch.stack([lse.view(R, C), target.view(R, C)], dim=1))
        return merged(chunk.labels.view(R, C)[parts.rank], both[:, 0], both[:, 1])

    def _gradients_of(self, head: Head, chunk: _Chunk, sums: _Sums, hidden_gradient: Tensor | None) -> None:
        parts, part = self._parts, self._part(head, chunk)
        wanted = hidden_gradient is not None
        dx = torch.zeros_like(chunk.hidden) if wanted else None
        if len(part.weight):
            y = parts.labels(chunk.labels, parts.rank)
            into = Gradients(dx, sums.weight, sums.bias)
            self._own.backward(part, y, chunk.lse, chunk.row_weight, into)
        if dx is None or hidden_gradient is None:
            return
        back = collectives.exchanged(parts.group, dx.view(parts.ranks, -1, dx.shape[1]))
        own = back[:, : len(chunk.own)].sum(0, dtype=head.accumulator_dtype)
        if self._average:
            own *= parts.ranks
        hidden_gradient[chunk.own] = own.to(hidden_gradient.dtype)


def chunk_rows(head: Head, ranks: int) -> int:
    """C: rows of each rank in a chunk. Two chunks, dX of one, and what comes back take half of the workspace."""
    row_bytes = 4 * ranks * head.hidden.shape[1] * head.hidden.dtype.itemsize
    return max(16, head.workspace_bytes // 2 // row_bytes)


class _Sums:
    """Buffers of dW and db of this rank's part that several calls add to; a 16-bit dW is rounded once, at the end."""

    def __init__(self, parts: Parts, head: Head, gradients: Gradients) -> None:
        own = parts.own_gradients(gradients)
        self._result, self.weight, self.bias = own.weight, own.weight, own.bias
        if own.weight is not None and own.weight.dtype != head.accumulator_dtype:
            self.weight = torch.zeros_like(own.weight, dtype=head.accumulator_dtype)

    def __enter__(self) -> _Sums:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._result is not None and self.weight is not None and self.weight is not self._result:
            self._result.add_(self.weight)
