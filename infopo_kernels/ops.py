"""The `torch.library` ops: the part of the library that `torch.compile`, `opcheck` and autograd see.

    infopo_kernels::row_segments       cu_seqlens -> sequence of each row; checks the values
    infopo_kernels::scored_tokens      scored tokens of each sequence; checks that there are some
    infopo_kernels::logprob            token log-probabilities [N] (and logsumexp), differentiable
    infopo_kernels::logprob_backward   its gradients
    infopo_kernels::linear_preference  an objective's loss and its gradients, formed in the forward pass; differentiable

Each op finds its backend by name when it runs. This file checks values (on a CPU), `functional` checks shapes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infopo_kernels import checks, packing, schedule
from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Backend, Gradients, Head, TailReport
from infopo_kernels.objectives import InfoPO, Objective, Sequences, from_flat
from infopo_kernels.op_schema import define
from infopo_kernels.options import IGNORE_INDEX, KernelOptions, LogitOptions
from infopo_kernels.packing import Rows

_DOUBLE_BACKWARD = (
    "second derivatives are not available: the fused op forms first derivatives only. Call backward() without "
    "create_graph=True, or use the plain functions of infopo_kernels.naive."
)


# --- row_segments and scored_tokens -----------------------------------------------------------------------------------


@torch.library.custom_op("infopo_kernels::row_segments", mutates_args=())
def row_segments(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Sequence of each of `num_rows` rows, [N] int64."""
    if cu_seqlens.device.type == "cpu":
        checks.segment_values(cu_seqlens, num_rows)
    return packing.row_segments(cu_seqlens, num_rows)


@row_segments.register_fake
def _(cu_seqlens: Tensor, num_rows: int) -> Tensor:
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
        """The backend. Checks the label values before the backend sees them.

        Raises:
            ValueError: the backend pools no tail, and a threshold was given.
        """
        backend = dispatch.resolve(self.backend, self.hidden.device, self.hidden.dtype)
        if self.tail_threshold > 0 and not backend.tail_block:
            raise ValueError(
                f"`tail_threshold={self.tail_threshold}` needs a backend that pools tails, and {backend.name!r} does "
                f"not; pass tail_threshold=0 for exact gradients, or backend='torch'."
            )
        if self.labels.device.type == "cpu":
            checks.label_values(self.labels, self.weight.shape[0])
        return backend

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


@define("infopo_kernels::logprob", HeadInputs, LogprobResults)
def _logprob(inputs: HeadInputs) -> LogprobResults:
    runner = inputs.runner()
    with inputs.no_autocast():
        return LogprobResults(*runner.logprob(inputs.head(), inputs.labels))


@_logprob.register_fake
def _(inputs: HeadInputs) -> LogprobResults:
    logp = inputs.hidden.new_empty(inputs.labels.shape, dtype=_accumulator(inputs.hidden))
    return LogprobResults(logp, torch.empty_like(logp))


@dataclass
class LogprobBackwardInputs(HeadInputs):
    lse: Tensor
    row_weight: Tensor
    """[N], gradient of `logp`."""
    wanted: list[bool]
    """Which gradients are wanted: of hidden, weight and bias."""


@define("infopo_kernels::logprob_backward", LogprobBackwardInputs, HeadGradients)
def _logprob_backward(inputs: LogprobBackwardInputs) -> HeadGradients:
    runner, head = dispatch.resolve(inputs.backend, inputs.hidden.device, inputs.hidden.dtype), inputs.head()
    gradients = schedule.zero_gradients(head, schedule.Wanted(*inputs.wanted))
    with inputs.no_autocast():
        row_weight = inputs.row_weight.to(inputs.lse.dtype).contiguous()
        runner.backward(head, inputs.labels, inputs.lse, row_weight, gradients)
    return HeadGradients.of(gradients, inputs.hidden)


@_logprob_backward.register_fake
def _(inputs: LogprobBackwardInputs) -> HeadGradients:
    return HeadGradients(*inputs.fake_gradients(inputs.wanted))


def _save_logprob(ctx: Any, inputs: HeadInputs, results: LogprobResults) -> None:
    ctx.save_for_backward(inputs.hidden, inputs.weight, inputs.bias, inputs.labels, results.lse)
    ctx.settings = inputs.softcap, inputs.scale, inputs.backend, inputs.workspace_mib, inputs.tail_threshold
    ctx.mark_non_differentiable(results.lse)
    ctx.set_materialize_grads(False)


def _differentiate_logprob(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"linear_logps: {_DOUBLE_BACKWARD}")
    wanted = list(ctx.needs_input_grad[:3])
    if grad is None or not any(wanted):
        return ()
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    head = HeadInputs(hidden, weight, bias, labels, *ctx.settings)
    results = _logprob_backward(LogprobBackwardInputs(**head.fields(), lse=lse, row_weight=grad, wanted=wanted))
    return tuple(g if want else None for g, want in zip(results, wanted, strict=True))


_logprob.register_autograd(_save_logprob, _differentiate_logprob)


def logprob(rows: Rows, weight: Tensor, bias: Tensor | None, logit: LogitOptions, kernel: KernelOptions) -> Tensor:
    """Token log-probabilities of rows, [N] in the accumulator type, differentiable."""
    return _logprob(HeadInputs.of(rows, weight, bias, logit, kernel)).logp


# --- linear_preference ------------------------------------------------------------------------------------------------


@dataclass
class PreferenceInputs(HeadInputs):
    cu_seqlens: Tensor
    segments: Tensor
    counts: Tensor
    is_chosen: Tensor
    ref_logps: Tensor
    sequence_weights: Tensor | None
    num_pairs: float
    objective: str
    """Name of the objective."""
    options: list[float]
    """`Objective.to_flat`."""
    wanted: list[bool]
    """Which gradients are wanted: of hidden, weight and bias."""
    report_tail: bool
    """Whether `PreferenceResults.tail` is wanted."""

    def rows(self) -> Rows:
        return Rows(self.hidden, self.labels, self.cu_seqlens, self.segments)

    def sequences(self) -> Sequences:
        return Sequences(self.counts, self.is_chosen, self.ref_logps, self.num_pairs, self.sequence_weights)


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
    """This and the next two as in `HeadGradients`, for an incoming gradient of 1."""
    weight_gradient: Tensor
    bias_gradient: Tensor


@define("infopo_kernels::linear_preference", PreferenceInputs, PreferenceResults)
def _linear_preference(inputs: PreferenceInputs) -> PreferenceResults:
    runner, objective, hidden = inputs.runner(), from_flat(inputs.objective, inputs.options), inputs.hidden
    if hidden.device.type == "cpu":
        checks.scored_sequences(inputs.counts)
        checks.reference_values(inputs.ref_logps)
        if inputs.sequence_weights is not None:
            checks.sequence_weight_values(inputs.sequence_weights)
        if objective.pairwise:
            checks.pairing_values(inputs.is_chosen, objective)
    head, wanted = inputs.head(), schedule.Wanted(*inputs.wanted)
    tail = TailReport.empty(head) if inputs.report_tail else None
    with inputs.no_autocast():
        result, gradients = schedule.preference(
            runner, head, inputs.rows(), inputs.sequences(), objective, wanted, tail
        )
    return PreferenceResults(
        result.loss.to(_accumulator(hidden)),
        result.mi_lower_bound,
        result.logps,
        result.rewards,
        result.weights,
        result.logps.new_empty(0) if tail is None else tail.summary(),
        *HeadGradients.of(gradients, hidden),
    )


@_linear_preference.register_fake
def _(inputs: PreferenceInputs) -> PreferenceResults:
    logps, rewards, weights = (inputs.hidden.new_empty(inputs.is_chosen.shape, dtype=torch.float64) for _ in range(3))
    return PreferenceResults(
        inputs.hidden.new_empty((), dtype=_accumulator(inputs.hidden)),
        inputs.hidden.new_empty((), dtype=torch.float64),
        logps,
        rewards,
        weights,
        inputs.hidden.new_empty(3 if inputs.report_tail else 0, dtype=torch.float64),
        *inputs.fake_gradients(inputs.wanted),
    )


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
    ctx.save_for_backward(results.hidden_gradient, results.weight_gradient, results.bias_gradient)
    ctx.wanted, ctx.backend = inputs.wanted, inputs.backend
    ctx.name = "linear_infopo_loss" if inputs.objective == InfoPO.name else "linear_preference_loss"
    ctx.mark_non_differentiable(*(result for result in results if result is not results.loss))
    ctx.set_materialize_grads(False)


def _differentiate_preference(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{ctx.name}: {_DOUBLE_BACKWARD}")
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            f"{ctx.name}: backward() ran a second time through the same loss. The forward pass formed its gradients, "
            "and the first backward() handed them over; retain_graph=True does not keep them. Call the loss again, or "
            "form it from linear_logps (InfoPO with infopo_loss), which recomputes."
        ) from error
    if grad is None:
        return ()
    return tuple(_scaled(g, grad, ctx.backend) if want else None for g, want in zip(saved, ctx.wanted, strict=True))


_linear_preference.register_autograd(_save_preference, _differentiate_preference)


def linear_preference(
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    sequences: Sequences,
    objective: Objective,
    logit: LogitOptions,
    kernel: KernelOptions,
) -> PreferenceResults:
    """An objective's loss, differentiable, and the values to log; see `schedule.preference`."""
    assert rows.cu_seqlens is not None
    assert rows.segments is not None
    grad = torch.is_grad_enabled()
    return _linear_preference(
        PreferenceInputs(
            **HeadInputs.of(rows, weight, bias, logit, kernel).fields(),
            cu_seqlens=rows.cu_seqlens,
            segments=rows.segments,
            counts=sequences.counts,
            is_chosen=sequences.is_chosen,
            ref_logps=sequences.ref_logps,
            sequence_weights=sequences.weights,
            num_pairs=sequences.num_pairs,
            objective=objective.name,
            options=objective.to_flat(),
            wanted=[grad and t is not None and t.requires_grad for t in (rows.hidden, weight, bias)],
            report_tail=kernel.report_tail,
        )
    )
