"""The `torch.library` ops: what `torch.compile`, `opcheck` and autograd see of the library.

    infopo_kernels::row_segments      cu_seqlens -> sequence of each row; checks the values
    infopo_kernels::scored_tokens     scored tokens of each sequence; checks that there are some
    infopo_kernels::logprob           token log-probabilities [N] (and logsumexp), differentiable
    infopo_kernels::logprob_backward  its gradients
    infopo_kernels::linear_infopo     the InfoPO loss with its gradients, formed in the forward pass; differentiable

Each op resolves its backend by name when it runs. Values are checked here (on a CPU), shapes in `functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infopo_kernels import checks, packing, schedule
from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.options import IGNORE_INDEX, InfoPOOptions, KernelOptions

_DOUBLE_BACKWARD = (
    "second derivatives are not available: the fused op forms first derivatives only. Call backward() without "
    "create_graph=True, or use the plain functions of infopo_kernels.naive."
)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    workspace_mib: int | None,
) -> Head:
    limit = KernelOptions(workspace_mib=workspace_mib).workspace_bytes(hidden.device.type)
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    return Head(hidden, weight, None if bias is None else bias.contiguous(), softcap, scale, limit)


def _no_autocast(device: torch.device) -> torch.autocast:
    """Products inside an op have the types that they were given."""
    return torch.autocast(device.type, enabled=False)


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


# --- row_segments -----------------------------------------------------------------------------------------------------


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


# --- logprob ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("infopo_kernels::logprob", mutates_args=())
def logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    scale: float,
    backend: str,
    workspace_mib: int | None,
) -> tuple[Tensor, Tensor]:
    """Token log-probabilities and logsumexp of rows, each [N] in the accumulator type."""
    runner = dispatch.resolve(backend, hidden.device, hidden.dtype)
    if labels.device.type == "cpu":
        checks.label_values(labels, weight.shape[0])
    with _no_autocast(hidden.device):
        return runner.logprob(_head(hidden, weight, bias, softcap, scale, workspace_mib), labels)


@logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    scale: float,
    backend: str,
    workspace_mib: int | None,
) -> tuple[Tensor, Tensor]:
    logp = hidden.new_empty(labels.shape, dtype=_accumulator(hidden))
    return logp, torch.empty_like(logp)


@torch.library.custom_op("infopo_kernels::logprob_backward", mutates_args=())
def logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    softcap: float | None,
    scale: float,
    wanted: list[bool],
    backend: str,
    workspace_mib: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for row weights `grad` [N]: hidden, weight, bias; of zero elements where `wanted` is False."""
    runner = dispatch.resolve(backend, hidden.device, hidden.dtype)
    head = _head(hidden, weight, bias, softcap, scale, workspace_mib)
    gradients = schedule.zero_gradients(head, schedule.Wanted(*wanted))
    with _no_autocast(hidden.device):
        runner.backward(head, labels, lse, grad.to(lse.dtype).contiguous(), gradients)
    return _results(gradients, hidden)


@logprob_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    softcap: float | None,
    scale: float,
    wanted: list[bool],
    backend: str,
    workspace_mib: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_results(hidden, weight, wanted)


def _results(gradients: Gradients, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The buffers in the types of what they are gradients of; an op cannot return None."""
    none = hidden.new_empty(0)
    return (
        none if gradients.hidden is None else gradients.hidden,
        none.clone() if gradients.weight is None else gradients.weight,
        none.clone() if gradients.bias is None else gradients.bias.to(hidden.dtype, copy=True),
    )


def _fake_results(hidden: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (hidden.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))
    return dx, dw, db


def _logprob_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, softcap, scale, backend, workspace_mib = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])
    ctx.settings = softcap, scale, backend, workspace_mib
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _logprob_autograd(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"linear_logps: {_DOUBLE_BACKWARD}")
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    softcap, scale, backend, workspace_mib = ctx.settings
    wanted = list(ctx.needs_input_grad[:3])
    if grad is None or not any(wanted):
        return (None,) * 8
    results = logprob_backward(grad, hidden, weight, bias, labels, lse, softcap, scale, wanted, backend, workspace_mib)
    return *(g if want else None for g, want in zip(results, wanted, strict=True)), *(None,) * 5


logprob.register_autograd(_logprob_autograd, setup_context=_logprob_context)


# --- linear_infopo ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("infopo_kernels::linear_infopo", mutates_args=())
def linear_infopo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    is_chosen: Tensor,
    ref_logps: Tensor,
    softcap: float | None,
    scale: float,
    beta: float,
    offset: float,
    max_log_weight: float | None,
    min_log_weight: float | None,
    sft_weight: float,
    average: bool,
    num_pairs: float,
    wanted: list[bool],
    backend: str,
    workspace_mib: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [] float32 (float64), bound [], logps, rewards, weights, scored tokens [S]; and gradients as `wanted`."""
    runner = dispatch.resolve(backend, hidden.device, hidden.dtype)
    if labels.device.type == "cpu":
        checks.label_values(labels, weight.shape[0])
        checks.segment_values(cu_seqlens, len(labels))
        scored_tokens(labels, packing.row_segments(cu_seqlens, len(labels)), len(is_chosen))
        checks.reference_values(ref_logps)
    options = InfoPOOptions(beta, offset, max_log_weight, min_log_weight, sft_weight, average)
    head = _head(hidden, weight, bias, softcap, scale, workspace_mib)
    batch = schedule.Batch(labels, cu_seqlens, is_chosen, ref_logps)
    with _no_autocast(hidden.device):
        result, gradients = schedule.infopo(runner, head, batch, options, num_pairs, schedule.Wanted(*wanted))
    return (
        result.loss.to(_accumulator(hidden)),
        result.mi_lower_bound,
        result.logps,
        result.rewards,
        result.weights,
        result.scored_tokens,
        *_results(gradients, hidden),
    )


@linear_infopo.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    is_chosen: Tensor,
    ref_logps: Tensor,
    softcap: float | None,
    scale: float,
    beta: float,
    offset: float,
    max_log_weight: float | None,
    min_log_weight: float | None,
    sft_weight: float,
    average: bool,
    num_pairs: float,
    wanted: list[bool],
    backend: str,
    workspace_mib: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_sequence = [hidden.new_empty(is_chosen.shape, dtype=torch.float64) for _ in range(3)]
    return (
        hidden.new_empty((), dtype=_accumulator(hidden)),
        hidden.new_empty((), dtype=torch.float64),
        per_sequence[0],
        per_sequence[1],
        per_sequence[2],
        hidden.new_empty(is_chosen.shape, dtype=torch.int64),
        *_fake_results(hidden, weight, wanted),
    )


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """factor * gradient, in the gradient's own memory: a second copy of the head would cost V * H.

    While a graph is traced (the tensors are subclasses then) out of place: the compiler plans the memory.
    """
    if type(gradient) is not Tensor:
        return (gradient * factor).to(gradient.dtype)
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradient
    return gradient.mul_(factor)


def _infopo_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[6:])
    ctx.wanted = inputs[-3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _infopo_autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"linear_infopo_loss: {_DOUBLE_BACKWARD}")
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            "linear_infopo_loss: backward() ran a second time through the same loss. Its gradients were formed in the "
            "forward pass and handed over by the first backward(), which retain_graph=True does not keep; call the "
            "loss again, or build it from linear_logps and infopo_loss, which recompute."
        ) from error
    if grad is None:
        return (None,) * 19
    gradients = (_scaled(g, grad) if want else None for g, want in zip(saved, ctx.wanted, strict=True))
    return *gradients, *(None,) * 16


linear_infopo.register_autograd(_infopo_autograd, setup_context=_infopo_context)
