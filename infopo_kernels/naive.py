"""The truth: the same functions with materialised logits, plain PyTorch and autograd, in float64 if asked.

Every backend is checked against this file, and this file against finite differences. It holds [N, V] logits: use it
on small shapes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infopo_kernels.objectives import Objective, Sequences
from infopo_kernels.objectives.base import weighted
from infopo_kernels.options import IGNORE_INDEX, LogitOptions
from infopo_kernels.packing import Rows, default_is_chosen, packed_rows, padded_rows, row_segments, sequence_sums


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, options: LogitOptions | None = None) -> Tensor:
    """z = logit_scale * softcap(hidden @ weight.T + bias) / temperature, [..., V], in the type of the inputs."""
    options = options or LogitOptions()
    a = torch.nn.functional.linear(hidden, weight, bias)
    if options.softcap is not None:
        a = options.softcap * torch.tanh(a / options.softcap)
    return a * options.scale


def token_logps(z: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label under logits z [N, V]; 0 where the label is IGNORE_INDEX."""
    scored = labels != IGNORE_INDEX
    picked = z.log_softmax(-1).gather(-1, labels.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(scored, picked, 0.0)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: bool = False,
    reduction: str = "none",
    ignore_index: int = IGNORE_INDEX,
    logit: LogitOptions | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`infopo_kernels.linear_logps` with materialised logits, computed in `dtype` (the inputs' if None)."""
    hidden, weight, bias = _cast(dtype, hidden, weight, bias)
    rows = _rows(hidden, labels, cu_seqlens, shift, ignore_index)
    logps = token_logps(logits(rows.hidden, weight, bias, logit), rows.labels)
    if reduction == "none":
        return logps.reshape(labels.shape)
    sums, counts = _sums_and_counts(rows, logps)
    return sums if reduction == "sum" else sums / counts


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_chosen: Tensor | None = None,
    num_pairs: float | None = None,
    sequence_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = IGNORE_INDEX,
    logit: LogitOptions | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss of `infopo_kernels.linear_preference_loss` with materialised logits, computed in `dtype`."""
    hidden, weight, bias = _cast(dtype, hidden, weight, bias)
    rows = _rows(hidden, labels, cu_seqlens, shift, ignore_index)
    sums, counts = _sums_and_counts(rows, token_logps(logits(rows.hidden, weight, bias, logit), rows.labels))
    S = len(sums)
    sequences = Sequences(
        counts=counts,
        is_chosen=default_is_chosen(S, hidden.device) if is_chosen is None else is_chosen,
        ref_logps=torch.zeros_like(sums) if ref_logps is None else ref_logps.double(),
        num_pairs=S / 2 if num_pairs is None else num_pairs,
        weights=None if sequence_weights is None else sequence_weights.double(),
    )
    if objective.pairwise:
        sequences = sequences.paired()
    return weighted(objective.terms(sums, sequences).loss, sequences.weights).sum() / sequences.num_pairs


def _rows(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> Rows:
    if cu_seqlens is None and labels.ndim == 2:
        return padded_rows(hidden, labels, shift=shift, ignore_index=ignore_index)
    segments = None if cu_seqlens is None else row_segments(cu_seqlens, labels.numel())
    return packed_rows(hidden, labels, cu_seqlens, segments, shift=shift, ignore_index=ignore_index)


def _sums_and_counts(rows: Rows, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of log-probabilities [S] float64 and number of scored tokens [S] of each sequence."""
    assert rows.cu_seqlens is not None
    assert rows.segments is not None
    S = len(rows.cu_seqlens) - 1
    return sequence_sums(logps, rows.segments, S), sequence_sums(rows.labels != IGNORE_INDEX, rows.segments, S)


def _cast(
    dtype: torch.dtype | None, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if dtype is None:
        return hidden, weight, bias
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
