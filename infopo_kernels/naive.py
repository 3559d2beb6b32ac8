"""The truth: the same functions with materialised logits, plain PyTorch and autograd, in float64 if asked.

Every backend is checked against this file, and this file against finite differences. It holds [N, V] logits: use it
on small shapes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infopo_kernels.objective import sequence_objective
from infopo_kernels.options import IGNORE_INDEX, InfoPOOptions, LogitOptions
from infopo_kernels.packing import default_is_chosen, row_segments, sequence_sums, to_rows


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
    rows = to_rows(hidden, labels, cu_seqlens, shift=shift, ignore_index=ignore_index)
    logps = token_logps(logits(rows.hidden, weight, bias, logit), rows.labels)
    if reduction == "none":
        return logps.reshape(labels.shape)
    assert rows.cu_seqlens is not None
    segments, S = row_segments(rows.cu_seqlens, len(rows.labels)), len(rows.cu_seqlens) - 1
    sums = sequence_sums(logps, segments, S)
    return sums if reduction == "sum" else sums / sequence_sums(rows.labels != IGNORE_INDEX, segments, S)


def linear_infopo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_chosen: Tensor | None = None,
    num_pairs: float | None = None,
    ref_logps: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = IGNORE_INDEX,
    options: InfoPOOptions | None = None,
    logit: LogitOptions | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss of `infopo_kernels.linear_infopo_loss` with materialised logits, computed in `dtype`."""
    options = options or InfoPOOptions()
    hidden, weight, bias = _cast(dtype, hidden, weight, bias)
    rows = to_rows(hidden, labels, cu_seqlens, shift=shift, ignore_index=ignore_index)
    logps = token_logps(logits(rows.hidden, weight, bias, logit), rows.labels)
    assert rows.cu_seqlens is not None
    segments, S = row_segments(rows.cu_seqlens, len(rows.labels)), len(rows.cu_seqlens) - 1
    if is_chosen is None:
        is_chosen = default_is_chosen(S, hidden.device)
    reference = torch.zeros(S, dtype=torch.float64, device=hidden.device) if ref_logps is None else ref_logps.double()
    counts = sequence_sums(rows.labels != IGNORE_INDEX, segments, S)
    each = sequence_objective(sequence_sums(logps, segments, S), counts, is_chosen, reference, options)
    return (each.terms.sum() + each.sft_terms.sum()) / (S / 2 if num_pairs is None else num_pairs)


def _cast(
    dtype: torch.dtype | None, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if dtype is None:
        return hidden, weight, bias
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
