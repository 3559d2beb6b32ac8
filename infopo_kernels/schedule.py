"""Which rows take which primitive: from a batch in rows to the InfoPO loss and its gradients.

Products of size N V H, by what is trained (C chosen, R rejected rows; `live` rejected rows still have a weight; K rows
whose logits the memory of the weight gradient keeps until it is written, rejected ones first where it is known which):

    nothing                       logprob on all                                              C + R
    hidden only (frozen head)     logprob_and_grad on all with unit weights; each
                                  sequence's dX is scaled when its sum is known               2 (C + R)
    head, float32 accumulator     logprob on rejected rows and what else is kept, then
                                  backward on live ones; logprob_and_grad on the other
                                  chosen rows, whose weight is known                          3 C + R + 3 live - K
    head, 16-bit gradient         logprob on all, then one backward on chosen and live
                                  rows, so that each dW entry is rounded once                 4 C + R + 3 live - K
      with a dX whose float32     logprob_and_grad with unit weights for dX, then backward
      accumulator is too large    for dW only                                                 4 C + 2 R + 2 live
      and where no row is kept

K counts kept rows that are live and would else need their logits twice. A 16-bit dW takes the float32 way where a
float32 copy of it fits half of the workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from infopo_kernels.backends.base import Backend, Gradients, Head
from infopo_kernels.objective import Objective, known_row_weights, objective
from infopo_kernels.options import IGNORE_INDEX, InfoPOOptions
from infopo_kernels.packing import row_segments, sequence_sums


@dataclass(frozen=True)
class Batch:
    """Labels and sequences of a batch in rows."""

    labels: torch.Tensor
    """[N] int64."""
    cu_seqlens: torch.Tensor
    """[S + 1]."""
    is_chosen: torch.Tensor
    """[S] bool."""
    ref_logps: torch.Tensor
    """[S] float64."""


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def zero_gradients(head: Head, wanted: Wanted) -> Gradients:
    """Zeroed result buffers; the bias accumulates in float32."""
    return Gradients(
        torch.zeros_like(head.hidden, memory_format=torch.contiguous_format) if wanted.hidden else None,
        torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if wanted.weight else None,
        None
        if not wanted.bias or head.bias is None
        else torch.zeros_like(head.bias, dtype=head.accumulator_dtype, memory_format=torch.contiguous_format),
    )


def hidden_gradient_apart(head: Head, kept_rows: int) -> bool:
    """Whether dX and a 16-bit dW come one after the other: no row is kept, and float32 sums of dX are too large."""
    dx_bytes = head.hidden.numel() * head.accumulator_dtype.itemsize
    return kept_rows == 0 and dx_bytes > head.workspace_bytes // 4


def infopo(
    backend: Backend, head: Head, batch: Batch, options: InfoPOOptions, num_pairs: float, wanted: Wanted
) -> tuple[Objective, Gradients]:
    """The objective of `batch` and the gradients of its loss."""
    gradients = zero_gradients(head, replace(wanted, weight=False))
    if wanted.weight:  # may hold logits first: cleared where it does not
        empty = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
        gradients = replace(gradients, weight=empty)

    def evaluate(logp: torch.Tensor) -> Objective:
        own = getattr(backend, "objective", objective)  # a backend may bring it as one launch
        result: Objective = own(
            logp, batch.labels, batch.cu_seqlens, batch.is_chosen, batch.ref_logps, options, num_pairs
        )
        return result

    if not (wanted.hidden or wanted.weight or wanted.bias):
        return evaluate(backend.logprob(head, batch.labels)[0]), gradients

    if gradients.hidden is not None and not (wanted.weight or wanted.bias):
        return _unit_hidden_gradient(backend, head, batch.labels, gradients.hidden, evaluate)[0], gradients

    accumulator, head = _float32_weight_gradient(head, gradients)
    if accumulator is None:
        assert gradients.weight is not None
        slots = _kept_rows(backend, head, gradients.weight)
        if gradients.hidden is not None and hidden_gradient_apart(head, slots):
            result, lse = _unit_hidden_gradient(backend, head, batch.labels, gradients.hidden, evaluate)
            gradients.weight.zero_()
            backend.backward(head, batch.labels, lse, result.row_weight, replace(gradients, hidden=None))
        else:
            kept = _first_rows(slots, batch.labels)
            logp, lse = _logprob_keeping(backend, head, batch.labels, kept, gradients.weight)
            result = evaluate(logp)
            backend.backward(head, batch.labels, lse, result.row_weight, gradients, kept)
        return result, gradients

    into = replace(gradients, weight=accumulator if wanted.weight else None)
    segments = row_segments(batch.cu_seqlens, len(batch.labels))
    row_is_chosen = batch.is_chosen[segments]
    rejected = torch.where(row_is_chosen, IGNORE_INDEX, batch.labels)
    chosen = torch.where(row_is_chosen, batch.labels, IGNORE_INDEX)
    kept = _first_rows(_kept_rows(backend, head, into.weight), rejected, chosen)
    first = rejected if kept is None else torch.where(kept != IGNORE_INDEX, kept, rejected)
    logp, lse = _logprob_keeping(backend, head, first, kept, into.weight)
    # Weights of rejected sequences do not depend on chosen ones, whose log-probabilities may not be there yet.
    backend.backward(head, first, lse, evaluate(logp).row_weight, into, kept)
    others = torch.where(first != IGNORE_INDEX, IGNORE_INDEX, chosen)
    counts = sequence_sums(batch.labels != IGNORE_INDEX, segments, len(batch.is_chosen))
    known = known_row_weights(counts, batch.is_chosen, options, num_pairs)[segments].to(head.accumulator_dtype)
    result = evaluate(logp.add_(backend.logprob_and_grad(head, others, known, into)[0]))
    if gradients.weight is not None and gradients.weight is not accumulator:
        gradients.weight.copy_(accumulator)
    return result, gradients


def _kept_rows(backend: Backend, head: Head, weight_gradient: torch.Tensor | None) -> int:
    return 0 if weight_gradient is None else backend.kept_rows(head, weight_gradient)


def _first_rows(most: int, *groups: torch.Tensor) -> torch.Tensor | None:
    """Labels [N] of the first `most` scored rows, those of the first group before those of the next; None for none."""
    if most == 0:
        return None
    kept = torch.full_like(groups[0], IGNORE_INDEX)
    before: torch.Tensor | int = 0
    for labels in groups:
        rank = (labels != IGNORE_INDEX).cumsum(0) + before
        kept = torch.where((labels != IGNORE_INDEX) & (rank <= most), labels, kept)
        before = rank[-1:]
    return kept


def _logprob_keeping(
    backend: Backend, head: Head, labels: torch.Tensor, kept: torch.Tensor | None, weight_gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logprob` of all scored rows; the logits of those scored in `kept` stay in the weight gradient's memory.

    Without `kept` that is cleared, since `backward` adds to it then.
    """
    if kept is None:
        if weight_gradient is not None:
            weight_gradient.zero_()
        return backend.logprob(head, labels)
    logp, lse = backend.logprob(head, kept, weight_gradient)
    others = backend.logprob(head, torch.where(kept != IGNORE_INDEX, IGNORE_INDEX, labels))
    return logp.add_(others[0]), lse.add_(others[1])


def _unit_hidden_gradient(
    backend: Backend,
    head: Head,
    labels: torch.Tensor,
    hidden_gradient: torch.Tensor,
    evaluate: Callable[[torch.Tensor], Objective],
) -> tuple[Objective, torch.Tensor]:
    """dX for unit row weights beside the log-probabilities, scaled once the objective knows the weights; and lse."""
    ones = torch.ones(labels.shape, dtype=head.accumulator_dtype, device=labels.device)
    logp, lse = backend.logprob_and_grad(head, labels, ones, Gradients(hidden_gradient, None, None))
    result = evaluate(logp)
    scale_rows_(hidden_gradient, result.row_weight)
    return result, lse


def scale_rows_(rows: torch.Tensor, scale: torch.Tensor) -> None:
    """rows[t] *= scale[t] in place, in float32, a bounded part at a time (a mixed product copies its operands)."""
    step = max(1, (1 << 18) // rows.shape[1])
    for part, factor in zip(torch.split(rows, step), torch.split(scale, step), strict=True):
        part.mul_(factor[:, None])


def _float32_weight_gradient(head: Head, gradients: Gradients) -> tuple[torch.Tensor | None, Head]:
    """A buffer in which dW may be added up over calls, and the head with the workspace that is left; or None."""
    if gradients.weight is None or gradients.weight.dtype == head.accumulator_dtype:
        return gradients.weight if gradients.weight is not None else head.weight.new_empty(0), head
    size = gradients.weight.numel() * head.accumulator_dtype.itemsize
    if size > head.workspace_bytes // 2:
        return None, head
    accumulator = torch.empty_like(gradients.weight, dtype=head.accumulator_dtype)
    return accumulator, replace(head, workspace_bytes=head.workspace_bytes - size)
