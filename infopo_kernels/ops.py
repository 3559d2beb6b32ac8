"""The `torch.library` ops: the part of the library that `torch.compile`, `opcheck` and autograd see.

    infopo_kernels::row_segments       cu_seqlens -> sequence of each row; checks the values
    infopo_kernels::scored_tokens      scored tokens of each sequence; checks that there are some
    infopo_kernels::shared_tokens      the same of sequences whose parts lie on several ranks, which compare their input
    infopo_kernels::logprob            token log-probabilities [N] (and logsumexp), differentiable
    infopo_kernels::logprob_backward   its gradients
    infopo_kernels::linear_preference  an objective's loss and its gradients, formed in the forward pass; differentiable

and, where dW is added to a buffer of the caller in the backward pass (`grad_weight_into`),

    infopo_kernels::logprob_into           `logprob`, whose backward pass is the next one
    infopo_kernels::logprob_backward_into  `logprob_backward`, which adds dW to the buffer
    infopo_kernels::objective              an objective's loss from token log-probabilities, differentiable

The first three ops over a head have a second form, `infopo_kernels::shared_...`, for a head or sequences that ranks
share. Its schema has one argument more; the ops of one device keep theirs.

Each op finds its backend by name when it runs. This file checks values (on a CPU), `functional` checks shapes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infopo_kernels import checks, packing, schedule
from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Backend, Gradients, Head, TailReport, Wanted
from infopo_kernels.distributed import agreement, collectives
from infopo_kernels.distributed.choice import Work
from infopo_kernels.distributed.parallel import Call, Parallel, Together
from infopo_kernels.objectives import Evaluation, InfoPO, Objective, Sequences, from_flat
from infopo_kernels.op_schema import define
from infopo_kernels.options import IGNORE_INDEX, KernelOptions, LogitOptions
from infopo_kernels.packing import Rows

_DOUBLE_BACKWARD = (
    "second derivatives are not available: the fused op forms first derivatives only. Call backward() without "
    "create_graph=True, or use the plain functions of infopo_kernels.naive."
)


# --- row_segments and scored_tokens -----------------------------------------------------------------------------------


@torch.library.custom_op("infopo_kernels::row_segments", mutates_args=())
def row_segments(cu_seqlens: Tensor, num_rows: int, parts: bool = False) -> Tensor:
    """Sequence of each of `num_rows` rows, [N] int64; with `parts`, a sequence may have no row here."""
    if cu_seqlens.device.type == "cpu":
        checks.segment_values(cu_seqlens, num_rows, parts=parts)
    return packing.row_segments(cu_seqlens, num_rows)


@row_segments.register_fake
def _(cu_seqlens: Tensor, num_rows: int, parts: bool = False) -> Tensor:
    return cu_seqlens.new_empty(num_rows, dtype=torch.int64)


@torch.library.custom_op("infopo_kernels::scored_tokens", mutates_args=())
def scored_tokens(labels: Tensor, segments: Tensor, num_sequences: int) -> Tensor:
    """Scored tokens of each sequence, [S] int64; on a CPU every sequence must have one."""
    counts = packing.sequence_sums(labels.ne(IGNORE_INDEX), segments, num_sequences)
    if counts.device.type == "cpu":
        checks.scored_sequences(counts)
    return counts


@scored_tokens.register_fake
def _(labels: Tensor, segments: Tensor, num_sequences: int) -> Tensor:
    return labels.new_empty(num_sequences, dtype=torch.int64)


@torch.library.custom_op("infopo_kernels::shared_tokens", mutates_args=())
def shared_tokens(
    labels: Tensor,
    segments: Tensor,
    is_chosen: Tensor | None,
    ref_logps: Tensor | None,
    sequence_weights: Tensor | None,
    vocabulary: int,
    num_sequences: int,
    group: str,
    same: str,
) -> Tensor:
    """Scored tokens of each sequence over all its parts, [S] int64. The first thing that ranks with parts do together:
    before, they compare what they must pass alike, so that none waits for another.

    Args:
        labels, segments: [N], of this rank's part; on a CPU labels are checked here, unless `vocabulary` is 0.
        is_chosen, ref_logps, sequence_weights: [S], alike on all ranks; compared on a CPU.
        vocabulary: V.
        num_sequences: S.
        group: name of the process group.
        same: what else must be alike: in each line a name, a tab and a value.
    """
    refusal, alike = None, dict[str, object]({"number of sequences": num_sequences})
    pairs = [line.split("\t") for line in same.splitlines()]
    alike |= {pair[0]: pair[1] for pair in pairs}
    if labels.device.type == "cpu":
        given = {"is_chosen": is_chosen, "ref_logps": ref_logps, "sequence_weights": sequence_weights}
        alike |= {name: agreement.Values(value) for name, value in given.items()}
        try:
            if vocabulary:
                checks.label_values(labels, vocabulary)
        except ValueError as error:
            refusal = error
    agreement.compare(group, labels.device, alike, {}, refusal)
    counts = packing.sequence_sums(labels.ne(IGNORE_INDEX), segments, num_sequences)
    collectives.add_up_(group, counts)
    if counts.device.type == "cpu":
        checks.scored_sequences(counts)
    return counts


@shared_tokens.register_fake
def _(
    labels: Tensor,
    segments: Tensor,
    is_chosen: Tensor | None,
    ref_logps: Tensor | None,
    sequence_weights: Tensor | None,
    vocabulary: int,
    num_sequences: int,
    group: str,
    same: str,
) -> Tensor:
    return labels.new_empty(num_sequences, dtype=torch.int64)


# --- the inputs of every op over a head -------------------------------------------------------------------------------
#
# Each call makes three of these objects. The classes are not frozen, because that is ten times faster: an object of 18
# fields takes 0.3 us instead of 3.


@dataclass
class HeadInputs:
    """Rows and head, which `functional` has checked, and the options of logits and kernel, field by field."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    softcap: float | None
    scale: float
    backend: str
    workspace_mib: int | None
    tail_threshold: float

    @classmethod
    def of(
        cls, rows: Rows, weight: Tensor, bias: Tensor | None, logit: LogitOptions, kernel: KernelOptions
    ) -> HeadInputs:
        return cls(
            rows.hidden,
            weight,
            bias,
            rows.labels,
            logit.softcap,
            logit.scale,
            kernel.backend,
            kernel.workspace_mib,
            float(kernel.tail_threshold),
        )

    def fields(self) -> dict[str, Any]:
        """For the inputs of an op that takes more. `vars` is beyond torch.compile of torch 2.10."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def head(self) -> Head:
        limit = KernelOptions(workspace_mib=self.workspace_mib).workspace_bytes(self.hidden.device.type)
        hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.hidden, self.weight))
        bias = None if self.bias is None else self.bias.contiguous()
        return Head(hidden, weight, bias, self.softcap, self.scale, limit, self.tail_threshold)

    def runner(self) -> Backend:
        """This rank's backend.

        Raises:
            ValueError: it pools no tail, and a threshold was given.
        """
        backend = dispatch.resolve(self.backend, self.hidden.device, self.hidden.dtype)
        if self.tail_threshold > 0 and not backend.tail_block:
            raise ValueError(
                f"`tail_threshold={self.tail_threshold}` needs a backend that pools tails, and {backend.name!r} does "
                f"not; pass tail_threshold=0 for exact gradients, or backend='torch'."
            )
        return backend

    def check_values(self, vocabulary: int) -> None:
        """Checks on a CPU what a backend does not."""
        if self.labels.device.type == "cpu":
            checks.label_values(self.labels, vocabulary)

    def call(self) -> Call:
        """For ranks that share a head."""
        return Call(
            check=self.check_values,
            scored=lambda: int((self.labels != IGNORE_INDEX).sum()),
            same={},
            same_rows={"hidden.shape[:-1]": len(self.hidden), "labels": agreement.checksum(self.labels)},
            wanted=[],
            work=Work(logits=True, known=False, hidden=False, weight=False),
        )

    def begin(self) -> tuple[Backend, Together | None]:
        """The backend to compute with, and what the call shares with other ranks. Checks values before."""
        text: str = getattr(self, "parallel", "")
        if not text:
            self.check_values(self.weight.shape[0])
            return self.runner(), None
        together = Parallel.from_text(text).begin(self.runner(), self.head(), self.call())
        return together.backend, together

    def no_autocast(self) -> torch.autocast:
        """Turn autocast off: products inside an op keep the types of their inputs."""
        return torch.autocast(self.hidden.device.type, enabled=False)

    def fake_gradients(self, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (self.hidden.shape, self.weight.shape, self.weight.shape[:1])
        dx, dw, db = (self.hidden.new_empty(s if want else (0,)) for s, want in zip(shapes, wanted, strict=True))
        return dx, dw, db


class HeadGradients(NamedTuple):
    """Gradients, each in the type of its input. One that is not wanted is empty, because an op cannot return None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, gradients: Gradients, hidden: Tensor) -> HeadGradients:
        none = hidden.new_empty(0)
        return cls(
            none if gradients.hidden is None else gradients.hidden,
            none.clone() if gradients.weight is None else gradients.weight,
            none.clone() if gradients.bias is None else gradients.bias.to(hidden.dtype, copy=True),
        )


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


# --- logprob ----------------------------------------------------------------------------------------------------------


class LogprobResults(NamedTuple):
    logp: Tensor
    """[N] in the accumulator type."""
    lse: Tensor
    """[N] in the accumulator type."""


@dataclass
class SharedHeadInputs(HeadInputs):
    parallel: str
    """`Parallel.to_text`."""


@define("infopo_kernels::logprob", HeadInputs, LogprobResults)
def _logprob(inputs: HeadInputs) -> LogprobResults:
    runner, together = inputs.begin()
    with inputs.no_autocast():
        head = inputs.head() if together is None else together.whole_head(inputs.head())
        return LogprobResults(*runner.logprob(head, inputs.labels))


@dataclass
class HeadIntoInputs(SharedHeadInputs):
    weight_gradient: Tensor
    """[V, H], accumulator type; the backward pass adds dW to it."""


_shared_logprob = define("infopo_kernels::shared_logprob", SharedHeadInputs, LogprobResults)(_logprob.run)
_logprob_into = define("infopo_kernels::logprob_into", HeadIntoInputs, LogprobResults)(_logprob.run)


def _fake_logprob(inputs: HeadInputs) -> LogprobResults:
    logp = inputs.hidden.new_empty(inputs.labels.shape, dtype=_accumulator(inputs.hidden))
    return LogprobResults(logp, torch.empty_like(logp))


@dataclass
class LogprobBackwardInputs(HeadInputs):
    lse: Tensor
    row_weight: Tensor
    """[N], gradient of `logp`."""
    wanted: list[bool]
    """Which gradients are wanted: of hidden, weight and bias."""

    def check_values(self, vocabulary: int) -> None:
        """Nothing: `logprob` has checked them."""

    def call(self) -> Call:
        work = Work(logits=False, known=False, hidden=self.wanted[0], weight=self.wanted[1])
        return replace(super().call(), wanted=self.wanted, work=work)


@dataclass
class SharedLogprobBackwardInputs(LogprobBackwardInputs):
    parallel: str


@dataclass
class LogprobBackwardIntoInputs(SharedLogprobBackwardInputs):
    weight_gradient: Tensor
    """[V, H], accumulator type; dW is added to it. `wanted` does not count it."""


@define("infopo_kernels::logprob_backward", LogprobBackwardInputs, HeadGradients)
def _logprob_backward(inputs: LogprobBackwardInputs) -> HeadGradients:
    return _backward(inputs, None)


def _backward(inputs: LogprobBackwardInputs, weight_gradient: Tensor | None) -> HeadGradients:
    """The gradients that are wanted; dW is added to `weight_gradient`, if it is given."""
    runner, together = inputs.begin()
    head = inputs.head() if together is None else together.whole_head(inputs.head())
    gradients = schedule.zero_gradients(head, Wanted(*inputs.wanted))
    if weight_gradient is not None:
        gradients = replace(gradients, weight=weight_gradient)
    with inputs.no_autocast():
        row_weight = inputs.row_weight.to(inputs.lse.dtype).contiguous()
        runner.backward(head, inputs.labels, inputs.lse, row_weight, gradients)
    if together is not None:
        gradients = together.finish(gradients)
    if weight_gradient is not None:
        gradients = replace(gradients, weight=None)
    return HeadGradients.of(gradients, inputs.hidden)


@define("infopo_kernels::logprob_backward_into", LogprobBackwardIntoInputs, HeadGradients, adds_to=("weight_gradient",))
def _logprob_backward_into(inputs: LogprobBackwardIntoInputs) -> HeadGradients:
    return _backward(inputs, inputs.weight_gradient)


_shared_logprob_backward = define(
    "infopo_kernels::shared_logprob_backward", SharedLogprobBackwardInputs, HeadGradients
)(_logprob_backward.run)


def _fake_logprob_backward(inputs: LogprobBackwardInputs) -> HeadGradients:
    return HeadGradients(*inputs.fake_gradients(inputs.wanted))


_logprob_backward.register_fake(_fake_logprob_backward)
_logprob_backward_into.register_fake(_fake_logprob_backward)
_shared_logprob_backward.register_fake(_fake_logprob_backward)


def _save_logprob(ctx: Any, inputs: HeadInputs, results: LogprobResults) -> None:
    ctx.save_for_backward(inputs.hidden, inputs.weight, inputs.bias, inputs.labels, results.lse)
    ctx.settings = inputs.softcap, inputs.scale, inputs.backend, inputs.workspace_mib, inputs.tail_threshold
    ctx.parallel = getattr(inputs, "parallel", "")
    # Not among the saved tensors: every backward pass adds to it, which is no fault of the next one.
    ctx.weight_gradient = getattr(inputs, "weight_gradient", None)
    ctx.mark_non_differentiable(results.lse)
    ctx.set_materialize_grads(False)


def _differentiate_logprob(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"linear_logps: {_DOUBLE_BACKWARD}")
    wanted = list(ctx.needs_input_grad[:3])
    if grad is None or not any(wanted):
        return ()
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    head = HeadInputs(hidden, weight, bias, labels, *ctx.settings).fields()
    more = {"lse": lse, "row_weight": grad, "wanted": wanted}
    if ctx.weight_gradient is not None:
        wanted[1] = False
        into = {"weight_gradient": ctx.weight_gradient, "parallel": ctx.parallel}
        results = _logprob_backward_into(LogprobBackwardIntoInputs(**head, **more, **into))
    elif not ctx.parallel:
        results = _logprob_backward(LogprobBackwardInputs(**head, **more))
    else:
        shared = SharedLogprobBackwardInputs(**head, **more, parallel=ctx.parallel)
        results = _shared_logprob_backward(shared)
    return tuple(g if want else None for g, want in zip(results, wanted, strict=True))


for _op in (_logprob, _shared_logprob, _logprob_into):
    _op.register_fake(_fake_logprob)
    _op.register_autograd(_save_logprob, _differentiate_logprob)


def logprob(
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    logit: LogitOptions,
    kernel: KernelOptions,
    parallel: Parallel | None = None,
    weight_gradient: Tensor | None = None,
) -> Tensor:
    """Token log-probabilities of rows, [N] in the accumulator type, differentiable.

    The backward pass adds dW to `weight_gradient`, if it is given, and the weight gets no gradient.
    """
    inputs = HeadInputs.of(rows, weight, bias, logit, kernel)
    if weight_gradient is not None:
        text = "" if parallel is None else parallel.to_text()
        into = HeadIntoInputs(**inputs.fields(), parallel=text, weight_gradient=weight_gradient)
        return _logprob_into(into).logp
    if parallel is None:
        return _logprob(inputs).logp
    return _shared_logprob(SharedHeadInputs(**inputs.fields(), parallel=parallel.to_text())).logp


# --- linear_preference ------------------------------------------------------------------------------------------------


@dataclass
class ObjectiveFields:
    """An objective and the sequences that it is of; `labels` are among the fields of the inputs that it is part of."""

    cu_seqlens: Tensor
    segments: Tensor
    counts: Tensor
    is_chosen: Tensor
    ref_logps: Tensor
    sequence_weights: Tensor | None
    num_pairs: float | None
    """None: half of the number of sequences. (A number that is traced from it would become a constant of the graph.)"""
    objective: str
    """Name of the objective."""
    options: list[float]
    """`Objective.to_flat`."""

    @classmethod
    def of_sequences(
        cls, rows: Rows, sequences: Sequences, num_pairs: float | None, objective: Objective
    ) -> dict[str, Any]:
        """The fields of this class."""
        assert rows.cu_seqlens is not None
        assert rows.segments is not None
        return {
            "cu_seqlens": rows.cu_seqlens,
            "segments": rows.segments,
            "counts": sequences.counts,
            "is_chosen": sequences.is_chosen,
            "ref_logps": sequences.ref_logps,
            "sequence_weights": sequences.weights,
            "num_pairs": num_pairs,
            "objective": objective.name,
            "options": objective.to_flat(),
        }

    def check_sequences(self) -> None:
        """Checks on a CPU the values of the sequences."""
        if self.counts.device.type != "cpu":
            return
        checks.scored_sequences(self.counts)
        checks.reference_values(self.ref_logps)
        if self.sequence_weights is not None:
            checks.sequence_weight_values(self.sequence_weights)
        objective = from_flat(self.objective, self.options)
        if objective.pairwise:
            checks.pairing_values(self.is_chosen, objective)

    def function(self) -> str:
        """The public function that an error names."""
        return "linear_infopo_loss" if self.objective == InfoPO.name else "linear_preference_loss"

    def sequences(self) -> Sequences:
        num_pairs = len(self.counts) / 2 if self.num_pairs is None else self.num_pairs
        return Sequences(self.counts, self.is_chosen, self.ref_logps, num_pairs, self.sequence_weights)


@dataclass
class PreferenceInputs(ObjectiveFields, HeadInputs):  # the head's fields come first
    wanted: list[bool]
    """Which gradients are wanted: of hidden, weight and bias."""
    report_tail: bool
    """Whether `PreferenceResults.tail` is wanted."""

    def rows(self) -> Rows:
        return Rows(self.hidden, self.labels, self.cu_seqlens, self.segments)

    def check_values(self, vocabulary: int) -> None:
        super().check_values(vocabulary)
        self.check_sequences()

    def call(self) -> Call:
        call, objective = super().call(), from_flat(self.objective, self.options)
        known = objective.known == "all" or not (self.wanted[1] or self.wanted[2])
        return replace(
            call,
            same={"objective": objective},
            same_rows={**call.same_rows, "number of sequences": len(self.counts), "num_pairs": self.num_pairs},
            wanted=self.wanted,
            work=Work(logits=True, known=known, hidden=self.wanted[0], weight=self.wanted[1]),
        )


class PreferenceResults(NamedTuple):
    loss: Tensor
    """[] in the accumulator type; the only differentiable result."""
    mi_lower_bound: Tensor
    """[] float64."""
    logps: Tensor
    """[S] float64, as the next two."""
    rewards: Tensor
    weights: Tensor
    tail: Tensor
    """[3] float64, if wanted: mean and maximum of the pooled mass of a row, share of columns that were kept; else [0].
    """
    hidden_gradient: Tensor
    """This and the next two as in `HeadGradients`, for an incoming gradient of `lift`."""
    weight_gradient: Tensor
    bias_gradient: Tensor
    lift: Tensor
    """[] float32, of float16 gradients (`infopo_kernels.lift`); empty where it is 1."""


@dataclass
class SharedPreferenceInputs(PreferenceInputs):
    parallel: str


@define("infopo_kernels::linear_preference", PreferenceInputs, PreferenceResults)
def _linear_preference(inputs: PreferenceInputs) -> PreferenceResults:
    runner, together = inputs.begin()
    objective, hidden, head = from_flat(inputs.objective, inputs.options), inputs.hidden, inputs.head()
    tail, wanted = TailReport.empty(head) if inputs.report_tail else None, Wanted(*inputs.wanted)
    with inputs.no_autocast():
        result, gradients, lift = schedule.preference(
            runner, head, inputs.rows(), inputs.sequences(), objective, wanted, together, tail
        )
    return PreferenceResults(
        result.loss.to(_accumulator(hidden)),
        result.mi_lower_bound,
        result.logps,
        result.rewards,
        result.weights,
        result.logps.new_empty(0) if tail is None else tail.summary(),
        *HeadGradients.of(gradients, hidden),
        hidden.new_empty(0, dtype=torch.float32) if lift is None else lift,
    )


_shared_linear_preference = define(
    "infopo_kernels::shared_linear_preference", SharedPreferenceInputs, PreferenceResults
)(_linear_preference.run)


def _fake_linear_preference(inputs: PreferenceInputs) -> PreferenceResults:
    logps, rewards, weights = (inputs.hidden.new_empty(inputs.is_chosen.shape, dtype=torch.float64) for _ in range(3))
    half = inputs.hidden.dtype == torch.float16
    return PreferenceResults(
        inputs.hidden.new_empty((), dtype=_accumulator(inputs.hidden)),
        inputs.hidden.new_empty((), dtype=torch.float64),
        logps,
        rewards,
        weights,
        inputs.hidden.new_empty(3 if inputs.report_tail else 0, dtype=torch.float64),
        *inputs.fake_gradients(inputs.wanted),
        inputs.hidden.new_empty(() if half and any(inputs.wanted) else 0, dtype=torch.float32),
    )


@torch.library.custom_op("infopo_kernels::common_gradient", mutates_args=())
def _common_gradient(grad: Tensor, parallel: str) -> Tensor:
    """`grad` [], the gradient of a rank's loss; NaN, and on a CPU an error, if it is another one on another rank.

    dW of a shared head is formed in the forward pass from the rows of all ranks, so that one factor has to serve all.
    """
    return Parallel.from_text(parallel).common_gradient(grad)


@_common_gradient.register_fake
def _(grad: Tensor, parallel: str) -> Tensor:
    return torch.empty_like(grad)


def _scaled(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """factor * gradient, in the gradient's own memory: a second copy would take V * H numbers.

    While a graph is traced, the tensors are subclasses and the product is out of place: the compiler plans the memory.
    """
    if type(gradient) is not Tensor:
        return (gradient * factor).to(gradient.dtype)
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradient
    dispatch.resolve(backend, gradient.device, gradient.dtype).scale_(gradient, factor)
    return gradient


def _save_preference(ctx: Any, inputs: PreferenceInputs, results: PreferenceResults) -> None:
    ctx.save_for_backward(results.hidden_gradient, results.weight_gradient, results.bias_gradient, results.lift)
    ctx.wanted, ctx.backend = inputs.wanted, inputs.backend
    ctx.parallel = inputs.parallel if isinstance(inputs, SharedPreferenceInputs) else None
    ctx.name = inputs.function()
    ctx.mark_non_differentiable(*(result for result in results if result is not results.loss))
    ctx.set_materialize_grads(False)


def _differentiate_preference(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{ctx.name}: {_DOUBLE_BACKWARD}")
    try:
        *saved, lift = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            f"{ctx.name}: backward() ran a second time through the same loss. The forward pass formed its gradients, "
            "and the first backward() handed them over; retain_graph=True does not keep them. Call the loss again, or "
            "form it from linear_logps (InfoPO with infopo_loss), which recomputes."
        ) from error
    if grad is None:
        return ()
    if ctx.parallel is not None:
        grad = _common_gradient(grad, ctx.parallel)
    factor = grad / lift if lift.numel() else grad
    return tuple(_scaled(g, factor, ctx.backend) if want else None for g, want in zip(saved, ctx.wanted, strict=True))


_linear_preference.register_fake(_fake_linear_preference)
_linear_preference.register_autograd(_save_preference, _differentiate_preference)
_shared_linear_preference.register_fake(_fake_linear_preference)
_shared_linear_preference.register_autograd(_save_preference, _differentiate_preference)


def linear_preference(
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    sequences: Sequences,
    num_pairs: float | None,
    objective: Objective,
    logit: LogitOptions,
    kernel: KernelOptions,
    parallel: Parallel | None = None,
) -> PreferenceResults:
    """An objective's loss, differentiable, and the values to log; see `schedule.preference`.

    `num_pairs` replaces that of `sequences`; None: half of the number of sequences.
    """
    grad = torch.is_grad_enabled()
    inputs = PreferenceInputs(
        **HeadInputs.of(rows, weight, bias, logit, kernel).fields(),
        **ObjectiveFields.of_sequences(rows, sequences, num_pairs, objective),
        wanted=[grad and t is not None and t.requires_grad for t in (rows.hidden, weight, bias)],
        report_tail=kernel.report_tail,
    )
    if parallel is None:
        return _linear_preference(inputs)
    return _shared_linear_preference(SharedPreferenceInputs(**inputs.fields(), parallel=parallel.to_text()))


# --- objective --------------------------------------------------------------------------------------------------------


@dataclass
class LogpInputs:
    logp: Tensor
    """[N] in the accumulator type."""
    labels: Tensor
    backend: str
    parallel: str
    """`Parallel.to_text`; "" on one device."""


@dataclass
class ObjectiveInputs(ObjectiveFields, LogpInputs):  # logp comes first
    pass


@define("infopo_kernels::objective", ObjectiveInputs, Evaluation)
def _objective(inputs: ObjectiveInputs) -> Evaluation:
    """`loss` is in the type of the log-probabilities, and the only differentiable result."""
    inputs.check_sequences()
    logp = inputs.logp
    backend = dispatch.resolve(inputs.backend, logp.device, logp.dtype)
    together = Together(Parallel.from_text(inputs.parallel), backend, None) if inputs.parallel else None
    rows = Rows(logp[:, None], inputs.labels, inputs.cu_seqlens, inputs.segments)  # nothing reads hidden states here
    objective = from_flat(inputs.objective, inputs.options)
    result = schedule.evaluator(backend, rows, inputs.sequences(), objective, together)(logp)
    return result._replace(loss=result.loss.to(logp.dtype))


def _fake_objective(inputs: ObjectiveInputs) -> Evaluation:
    logps, rewards, weights = (inputs.logp.new_empty(inputs.is_chosen.shape, dtype=torch.float64) for _ in range(3))
    bound = inputs.logp.new_empty((), dtype=torch.float64)
    return Evaluation(inputs.logp.new_empty(()), bound, logps, rewards, weights, torch.empty_like(inputs.logp))


def _save_objective(ctx: Any, inputs: ObjectiveInputs, results: Evaluation) -> None:
    ctx.save_for_backward(results.row_weight)
    ctx.name = inputs.function()
    ctx.mark_non_differentiable(*results[1:])
    ctx.set_materialize_grads(False)


def _differentiate_objective(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{ctx.name}: {_DOUBLE_BACKWARD}")
    (row_weight,) = ctx.saved_tensors
    return () if grad is None else (row_weight * grad,)


_objective.register_fake(_fake_objective)
_objective.register_autograd(_save_objective, _differentiate_objective)


def objective_of_logps(
    logp: Tensor,
    rows: Rows,
    sequences: Sequences,
    num_pairs: float | None,
    objective: Objective,
    kernel: KernelOptions,
    parallel: Parallel | None = None,
) -> Evaluation:
    """An objective's loss from token log-probabilities [N], differentiable; the arguments of `linear_preference`."""
    fields = ObjectiveFields.of_sequences(rows, sequences, num_pairs, objective)
    text = "" if parallel is None else parallel.to_text()
    return _objective(ObjectiveInputs(logp, rows.labels, kernel.backend, text, **fields))
