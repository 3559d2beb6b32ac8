"""From rows to an objective's loss and its gradients: which rows take which primitive.

The table counts products of size N V H. They depend on what is trained, and on the row weights that the objective knows
before any log-probability (`Objective.known`):

    D       decided rows: their weight is known, and it is not 0
    Z       rows that are decided too, with weight 0
    U       undecided rows; `live` of them turn out to have a weight
    K       rows whose logits stay in the memory of the weight gradient, and in what the workspace can spare beside it,
            until the gradient is written, undecided rows first; K counts those that are live and would otherwise need
            their logits twice

InfoPO: D chosen, U rejected. SFT: D chosen, Z rejected. DPO, IPO, SimPO: all rows are U.

    nothing                       logprob on all                                              D + U + Z

    every weight known            logprob_and_grad on decided rows, logprob on the others     3 D + Z
      hidden only                                                                             2 D + Z

    else
    hidden only (frozen head)     logprob_and_grad on all with unit weights; each
                                  sequence's dX is scaled when its sum is known               2 (D + U + Z)
    head, float32 accumulator     logprob on undecided and other kept rows, then
                                  backward on live ones; logprob_and_grad on the other
                                  decided rows                                                3 D + U + 3 live + Z - K
    head, 16-bit gradient         logprob on all, then one backward on decided and live
                                  rows, so that each dW entry is rounded once                 4 D + U + 3 live + Z - K
      with a dX whose float32     logprob_and_grad with unit weights for dX, then backward
      accumulator is too large    for dW only                                                 4 D + 2 U + 2 live + 2 Z
      and where no row is kept
    head, added to a buffer of    logprob on all; the backward pass, which knows its
    the caller's                  factor, calls backward on decided and live rows             4 D + U + 3 live + Z

If all rows can be kept, they are, and everything takes 3 products at most. A 16-bit dW takes the float32 way if a
float32 copy of it fits half of the workspace. With every weight known, a 16-bit dW may take a fourth product
(`backends.base`). So DPO takes 4 products, 3 where logits are kept, and 2 with a frozen head. `linear_logps` and a loss
by hand take 4, and 3 with a frozen head.

A buffer of the caller's (`grad_weight_into`) may hold gradients of other calls already. So it can keep no logits, and
nothing may be added to it before the factor is known, which is when the backward pass begins. The loss is then the
objective of `linear_logps`; no gradient exists between the passes, and the memory of a weight gradient is saved.

float16 gradients are formed relative to a scale of their own (`infopo_kernels.lift`).

Where ranks share a head, the lse of the whole vocabulary is known only after they have met. So every weight counts as
unknown there: logprob on all, then backward on live rows, with two meetings. Rows that travel are the exception: they
take the ways above, because a row whose weight is known travels once. So does a head that is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from infopo_kernels.backends.base import Backend, Gradients, Head, TailReport, Wanted, with_memory_for_logits
from infopo_kernels.distributed.parallel import Together
from infopo_kernels.lift import Lift
from infopo_kernels.objectives import Evaluation, Objective, Sequences
from infopo_kernels.objectives import evaluate as evaluate_in_pytorch
from infopo_kernels.objectives.base import weighted
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.packing import Rows

Evaluate = Callable[[torch.Tensor], Evaluation]
"""The objective from token log-probabilities [N]."""


def evaluator(
    backend: Backend, rows: Rows, sequences: Sequences, objective: Objective, together: Together | None
) -> Evaluate:
    """The objective of these sequences as a function of the log-probabilities of their tokens."""
    if objective.pairwise:
        sequences = sequences.paired()

    def evaluate(logp: torch.Tensor) -> Evaluation:
        if together is not None and together.parts_of_sequences:
            return evaluate_in_pytorch(objective, logp, rows, sequences, together.whole_sequences)
        result = backend.objective(objective, logp, rows, sequences)
        return evaluate_in_pytorch(objective, logp, rows, sequences) if result is None else result

    return evaluate


def zero_gradients(head: Head, wanted: Wanted) -> Gradients:
    """Result buffers filled with 0; the bias accumulates in float32."""
    return Gradients(
        torch.zeros_like(head.hidden, memory_format=torch.contiguous_format) if wanted.hidden else None,
        torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if wanted.weight else None,
        None
        if not wanted.bias or head.bias is None
        else torch.zeros_like(head.bias, dtype=head.accumulator_dtype, memory_format=torch.contiguous_format),
    )


def hidden_gradient_apart(head: Head, kept_rows: int) -> bool:
    """Whether to form dX and a 16-bit dW one after the other: no row is kept, and float32 sums of dX are too large."""
    dx_bytes = head.hidden.numel() * head.accumulator_dtype.itemsize
    return kept_rows == 0 and dx_bytes > head.workspace_bytes // 4


def preference(
    backend: Backend,
    head: Head,
    rows: Rows,
    sequences: Sequences,
    objective: Objective,
    wanted: Wanted,
    together: Together | None = None,
    tail: TailReport | None = None,
) -> tuple[Evaluation, Gradients, torch.Tensor | None]:
    """The value of the objective for a batch, the gradients of its loss, and the factor that they carry (`Lift`).

    `together`, if given, is what the call shares with other ranks; `backend` is its backend then. Fills `tail`, if it
    is given.
    """
    if together is not None:
        head = together.whole_head(head)
        result, gradients, factor = _preference(backend, head, rows, sequences, objective, wanted, together, tail)
        return result, together.finish(gradients), factor
    return _preference(backend, head, rows, sequences, objective, wanted, None, tail)


def _preference(
    backend: Backend,
    head: Head,
    rows: Rows,
    sequences: Sequences,
    objective: Objective,
    wanted: Wanted,
    together: Together | None,
    tail: TailReport | None,
) -> tuple[Evaluation, Gradients, torch.Tensor | None]:
    evaluate = evaluator(backend, rows, sequences, objective, together)
    if not (wanted.hidden or wanted.weight or wanted.bias):
        return evaluate(backend.logprob(head, rows.labels)[0]), Gradients(None, None, None), None

    if together is None:
        lift = Lift(head, rows.labels)
    else:
        lift = Lift(together.without_padding(head), rows.labels, together.bounds)

    alone = together is None or together.own_backend
    at_once = together is None or together.known_weights_pay
    known = objective.known if at_once else "none"
    if at_once and known != "all" and not (wanted.weight or wanted.bias):
        gradients = zero_gradients(head, wanted)
        into = replace(gradients, tail=tail)
        result, _, _, factor = _unit_hidden_gradient(backend, head, rows.labels, into, evaluate, lift)
        return result, gradients, factor

    gradients = replace(zero_gradients(head, replace(wanted, weight=False)), tail=tail)
    if wanted.weight:  # not zeroed here: it may hold logits first
        empty = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
        gradients = replace(gradients, weight=empty)
        # Parts of sequences: every rank has to ask for as many sums, however many rows it has.
        as_many = objective.known == "none" or together is None or not together.parts_of_sequences
        if known != "all" and as_many and backend.kept_rows(head, empty) >= len(rows.labels):
            result, factor = _every_row_kept(backend, head, rows.labels, gradients, evaluate, lift)
            return result, gradients, factor
    # Sizes of parts and numbers of rows differ between ranks, and all have to make the same calls of a shared backend.
    into, head = _accumulators(head, gradients) if alone else (gradients, head)
    if known == "all":
        weights = _known_row_weights(head, rows, sequences, objective)
        result, factor = _every_weight_known(backend, head, rows.labels, weights, into, evaluate, lift)
    elif known == "some" and _adds_up(head, into):
        weights = _known_row_weights(head, rows, sequences, objective)
        result, factor = _some_weights_known(backend, head, rows.labels, weights, into, evaluate, lift)
    else:
        result, factor = _no_weight_known(backend, head, rows.labels, into, evaluate, lift, alone=alone)
    if gradients.weight is not None and into.weight is not None and into.weight is not gradients.weight:
        gradients.weight.copy_(into.weight)
    return result, gradients, factor


Lifted = tuple[Evaluation, torch.Tensor | None]
"""The objective, and the factor of the gradients (`Lift`)."""


def _every_weight_known(
    backend: Backend,
    head: Head,
    labels: torch.Tensor,
    known: torch.Tensor,
    into: Gradients,
    evaluate: Evaluate,
    lift: Lift,
) -> Lifted:
    decided = known != 0  # NaN is not 0
    if into.weight is not None:
        into.weight.zero_()
    c, factor = lift(known, into)
    logp, _ = backend.logprob_and_grad(head, torch.where(decided, labels, IGNORE_INDEX), c, into)
    return evaluate(logp.add_(backend.logprob(head, torch.where(decided, IGNORE_INDEX, labels))[0])), factor


def _every_row_kept(
    backend: Backend, head: Head, labels: torch.Tensor, into: Gradients, evaluate: Evaluate, lift: Lift
) -> Lifted:
    """Two calls and no list of which row goes where: half of the launches of a small batch, which they take longer to
    start than to run."""
    head, into = with_memory_for_logits(backend, head, into, len(labels))
    logp, lse = backend.logprob(head, labels, into)
    result = evaluate(logp)
    c, factor = lift(result.row_weight, into)
    backend.backward(head, labels, lse, c, into, labels)
    return result, factor


def _some_weights_known(
    backend: Backend,
    head: Head,
    labels: torch.Tensor,
    known: torch.Tensor,
    into: Gradients,
    evaluate: Evaluate,
    lift: Lift,
) -> Lifted:
    decided = known.abs() > 0  # neither 0 nor NaN
    later = torch.where(decided, labels, IGNORE_INDEX)
    slots = _kept_rows(backend, head, into.weight)
    whole, (head, into) = head, with_memory_for_logits(backend, head, into, min(slots, len(labels)))
    kept = _first_rows(slots, torch.where(known.isnan(), labels, IGNORE_INDEX), later) if slots else None
    first = torch.where(decided, IGNORE_INDEX, labels)
    if kept is not None:
        first = torch.where(kept != IGNORE_INDEX, kept, first)
        later = torch.where(kept != IGNORE_INDEX, IGNORE_INDEX, later)
    logp, lse = _logprob_keeping(backend, head, first, kept, into)
    # The log-probabilities of decided rows may still be missing here; the weights of undecided rows do not need them.
    c, factor = lift(evaluate(logp).row_weight, into)
    backend.backward(head, first, lse, c, into, kept)
    known = known if factor is None else known * factor
    head, into = whole, replace(into, logits=None)
    return evaluate(logp.add_(backend.logprob_and_grad(head, later, known, into)[0])), factor


def _no_weight_known(
    backend: Backend,
    head: Head,
    labels: torch.Tensor,
    into: Gradients,
    evaluate: Evaluate,
    lift: Lift,
    *,
    alone: bool,
) -> Lifted:
    slots = _kept_rows(backend, head, into.weight)
    if alone and into.hidden is not None and not _adds_up(head, into) and hidden_gradient_apart(head, slots):
        assert into.weight is not None
        result, c, lse, factor = _unit_hidden_gradient(backend, head, labels, into, evaluate, lift)
        into.weight.zero_()
        backend.backward(head, labels, lse, c, replace(into, hidden=None))
        return result, factor
    head, into = with_memory_for_logits(backend, head, into, min(slots, len(labels)))
    kept = _first_rows(slots, labels) if slots else None
    logp, lse = _logprob_keeping(backend, head, labels, kept, into)
    result = evaluate(logp)
    c, factor = lift(result.row_weight, into)
    backend.backward(head, labels, lse, c, into, kept)
    return result, factor


def _known_row_weights(head: Head, rows: Rows, sequences: Sequences, objective: Objective) -> torch.Tensor:
    """d loss / d l_t [N] in the accumulator type where it is known beforehand; NaN elsewhere."""
    assert rows.segments is not None
    slopes = weighted(objective.known_slopes(sequences), sequences.weights) / sequences.num_pairs
    return slopes.to(head.accumulator_dtype)[rows.segments]


def _kept_rows(backend: Backend, head: Head, weight_gradient: torch.Tensor | None) -> int:
    return 0 if weight_gradient is None else backend.kept_rows(head, weight_gradient)


def _first_rows(most: int, *groups: torch.Tensor) -> torch.Tensor:
    """Labels [N] of the first `most` scored rows. The first group comes first, then the next one."""
    kept = torch.full_like(groups[0], IGNORE_INDEX)
    before: torch.Tensor | int = 0
    for labels in groups:
        rank = (labels != IGNORE_INDEX).cumsum(0) + before
        kept = torch.where((labels != IGNORE_INDEX) & (rank <= most), labels, kept)
        before = rank[-1:]
    return kept


def _logprob_keeping(
    backend: Backend, head: Head, labels: torch.Tensor, kept: torch.Tensor | None, into: Gradients
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logprob` of all scored rows. The logits of rows scored in `kept` stay in the memory of `into`.

    Without `kept` this sets the weight gradient to 0, because `backward` adds to it then.
    """
    if kept is None:
        if into.weight is not None:
            into.weight.zero_()
        return backend.logprob(head, labels)
    logp, lse = backend.logprob(head, kept, into)
    others = backend.logprob(head, torch.where(kept != IGNORE_INDEX, IGNORE_INDEX, labels))
    return logp.add_(others[0]), lse.add_(others[1])


def _unit_hidden_gradient(
    backend: Backend, head: Head, labels: torch.Tensor, into: Gradients, evaluate: Evaluate, lift: Lift
) -> tuple[Evaluation, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The objective, the row weights for the other gradients, lse, and the factor of all gradients.

    Forms dX for row weights of 1, and scales it when the objective knows the weights.
    """
    assert into.hidden is not None
    hidden = replace(into, weight=None, bias=None)
    ones = torch.ones(labels.shape, dtype=head.accumulator_dtype, device=labels.device)
    ones, unit = lift(ones, hidden)
    logp, lse = backend.logprob_and_grad(head, labels, ones, hidden)
    result = evaluate(logp)
    c, factor = lift(result.row_weight, into, unit)
    backend.scale_(into.hidden, c if unit is None else c / unit)
    return result, c, lse, factor


def _accumulators(head: Head, gradients: Gradients) -> tuple[Gradients, Head]:
    """Buffers in which gradients add up over calls, and the head with the rest of the workspace.

    A float32 buffer replaces a 16-bit dW if it fits half of the workspace. Otherwise a single call has to form each
    entry, so that the entry is rounded only once.
    """
    weight = gradients.weight
    if weight is None or weight.dtype == head.accumulator_dtype:
        return gradients, head
    size = weight.numel() * head.accumulator_dtype.itemsize
    if size > head.workspace_bytes // 2:
        return gradients, head
    accumulator = torch.empty_like(weight, dtype=head.accumulator_dtype, memory_format=torch.contiguous_format)
    return replace(gradients, weight=accumulator), replace(head, workspace_bytes=head.workspace_bytes - size)


def _adds_up(head: Head, into: Gradients) -> bool:
    """Whether calls may add to the weight gradient one after the other."""
    return into.weight is None or into.weight.dtype == head.accumulator_dtype
