"""The truth: the same functions with materialised logits, in plain PyTorch with autograd, on request in float64.

The tests check every backend against this file, and this file against finite differences. It holds [N, V] logits in
memory: use it on small shapes only.
"""

from __future__ import annotations

from typing import NamedTuple

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


class TailGradients(NamedTuple):
    """The result of `tail_gradients`; float64."""

    hidden: Tensor
    """[N, H]."""
    weight: Tensor
    """[V, H]."""
    bias: Tensor
    """[V]."""
    mass: Tensor
    """[N]: q, the pooled probability of each row; NaN for rows in no chunk."""
    kept: int
    """Columns that were kept, summed over chunks."""


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


def tail_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    chunks: list[Tensor],
    *,
    threshold: float,
    block: int,
    exact_above: float = 1.0,
    bias: Tensor | None = None,
    logit: LogitOptions | None = None,
) -> TailGradients:
    """The gradients of ``(row_weight * token_logps).sum()`` with a pooled tail, in float64, by plain loops.

    `infopo_kernels.backends.base` has the definition. `hidden` [N, H], `labels` and `row_weight` [N]; each of `chunks`
    lists the rows of a chunk, which all are scored and have a weight. `block`, `exact_above`: as a backend states them.
    """
    options = logit or LogitOptions()
    x, w = hidden.detach().double(), weight.detach().double()
    b = None if bias is None else bias.detach().double()
    (N, H), V = x.shape, len(w)
    dx, dw, db, mass = w.new_zeros(N, H), w.new_zeros(V, H), w.new_zeros(V), w.new_full((N,), torch.nan)
    kept = 0
    for chunk in chunks:
        y, c = labels[chunk], row_weight[chunk].double()
        z = logits(x[chunk], w, b, options)
        p = z.softmax(1)
        own = torch.nn.functional.one_hot(y, V)
        g = c[:, None] * (own - p) * options.scale
        if options.softcap is not None:
            g = g * (1 - (z / (options.scale * options.softcap)).square())
        keep = (p >= threshold).any(0) | own.bool().any(0)
        mass[chunk] = 0
        for start in range(0, V, block):
            words = torch.arange(start, min(start + block, V))
            if keep[words].sum() > exact_above * len(words):
                keep[words] = True
            K, T = words[keep[words]], words[~keep[words]]
            kept += len(K)
            dx[chunk] += g[:, K] @ w[K]
            dw[K] += g[:, K].T @ x[chunk]
            db[K] += g[:, K].sum(0)
            if not len(T):
                continue
            share = p[:, T].sum(0) / p[:, T].sum().clamp(min=torch.finfo(torch.float64).tiny)
            pooled = g[:, T].sum(1)
            dx[chunk] += torch.outer(pooled, share @ w[T])
            dw[T] += torch.outer(share, pooled @ x[chunk])
            db[T] += share * pooled.sum()
            mass[chunk] += p[:, T].sum(1)
    return TailGradients(dx, dw, db, mass, kept)


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
