"""Rows of its own on every rank, and parts of the head that go round: for more rows than the head has.

At step s rank r holds the part of rank r - s, takes its rows' lse and logits of labels from it, and passes it on. dX
adds up where the rows are. dW of a part goes round with it, and each rank adds what its rows give; after R steps it is
home. While a part is used, the next one travels. A rank holds two parts and their dW beside its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.distributed import collectives
from infopo_kernels.distributed.parts import Parts, logit_of_label
from infopo_kernels.distributed.shared_backend import SharedBackend
from infopo_kernels.options import IGNORE_INDEX


class Ring(SharedBackend):
    """The three primitives of the whole vocabulary, for rows that differ from rank to rank."""

    name: ClassVar[str] = "ring"

    def logprob(self, head: Head, labels: Tensor, keep: Gradients | None = None) -> tuple[Tensor, Tensor]:
        assert keep is None, "kept_rows is 0"
        lse = torch.full(labels.shape, -torch.inf, dtype=torch.float64, device=labels.device)
        target = torch.zeros_like(lse)
        for owner, part in self._passing(head):
            if len(part.weight):
                y = self._parts.labels(labels, owner)
                logp, own_lse = self._own.logprob(part, y)
                target += logit_of_label(y, logp, own_lse)
                lse = torch.logaddexp(lse, own_lse.double())
        scored = labels != IGNORE_INDEX
        lse = torch.where(scored, lse, 0.0)
        kind = head.accumulator_dtype
        return torch.where(scored, target - lse, 0.0).to(kind), lse.to(kind)

    def logprob_and_grad(
        self, head: Head, labels: Tensor, row_weight: Tensor, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """Two rounds: the lse of the whole vocabulary is known after the first."""
        logp, lse = self.logprob(head, labels)
        if gradients.hidden is not None:  # `backward` does not write rows of weight 0
            gradients.hidden.masked_fill_((labels != IGNORE_INDEX)[:, None], 0)
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
        assert kept is None, "kept_rows is 0"
        parts, kind = self._parts, head.accumulator_dtype
        live = (labels != IGNORE_INDEX) & (row_weight != 0)
        c = row_weight / parts.ranks if self._average else row_weight
        dx = None if gradients.hidden is None else torch.zeros(head.hidden.shape, dtype=kind, device=labels.device)
        step = torch.zeros_like(head.hidden) if dx is not None else None
        H = head.hidden.shape[1]
        dw = _GoingRound(parts, gradients.weight is not None, (H,), kind)
        db = _GoingRound(parts, gradients.bias is not None, (), kind)
        for owner, part in self._passing(head):
            into = Gradients(step, dw.arrived(owner, labels.device), db.arrived(owner, labels.device))
            if len(part.weight):
                self._own.backward(part, parts.labels(labels, owner), lse, c, into)
                if dx is not None and step is not None:
                    dx += torch.where(live[:, None], step, 0.0)
            dw.pass_on(owner, into.weight)
            db.pass_on(owner, into.bias)
        own = parts.own_gradients(gradients)
        dw.add_to(own.weight)
        db.add_to(own.bias)
        if dx is not None and gradients.hidden is not None:
            if self._average:
                dx *= parts.ranks
            gradients.hidden.copy_(torch.where(live[:, None], dx.to(gradients.hidden.dtype), gradients.hidden))

    def _passing(self, head: Head) -> Iterator[tuple[int, Head]]:
        """Whose part it is, and the head with it, R times; the next one is on its way while one is used."""
        parts = self._parts
        R, rank = parts.ranks, parts.rank
        part = parts.own(head)
        for step in range(R):
            owner = (rank - step) % R
            following = (owner - 1) % R
            weight = bias = None
            if step < R - 1:
                shape = (parts.rows(following), head.weight.shape[1])
                weight = collectives.start_pass_on(parts.group, part.weight, shape)
                if part.bias is not None:
                    bias = collectives.start_pass_on(parts.group, part.bias, shape[:1])
            yield owner, part
            if weight is not None:
                part = replace(part, weight=weight.wait(), bias=None if bias is None else bias.wait())


class _GoingRound:
    """The gradient of the part that is here: it came from the rank before, and goes on to the next."""

    def __init__(self, parts: Parts, wanted: bool, width: tuple[int, ...], kind: torch.dtype) -> None:
        self._parts, self._wanted, self._width, self._kind = parts, wanted, width, kind
        self._pending: collectives.Pending | None = None

    def arrived(self, owner: int, device: torch.device) -> Tensor | None:
        """The buffer for the part of `owner`; 0 at the start of the round. None if it is not wanted."""
        if not self._wanted:
            return None
        if self._pending is None:
            return torch.zeros(self._parts.rows(owner), *self._width, dtype=self._kind, device=device)
        return self._pending.wait()

    def pass_on(self, owner: int, values: Tensor | None) -> None:
        if values is not None:
            coming = self._parts.rows((owner - 1) % self._parts.ranks)
            self._pending = collectives.start_pass_on(self._parts.group, values, (coming, *self._width))

    def add_to(self, own: Tensor | None) -> None:
        """The round has ended: what came last is this rank's."""
        if own is not None and self._pending is not None:
            own.add_(self._pending.wait())
