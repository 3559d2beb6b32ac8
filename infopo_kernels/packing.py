"""Layouts: padded batches and packed rows, both brought to rows [N], labels [N] and segment bounds `cu_seqlens` [S+1].

padded   hidden [S, T, H], labels [S, T]; the first half of the sequences is chosen, the second rejected, in the
         same order (the convention of TRL and Liger), or `is_chosen` says it
packed   hidden [N, H] (or [1, N, H]), labels [N] (or [1, N]), `cu_seqlens` [S + 1] (the convention of flash-attn)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopo_kernels.options import IGNORE_INDEX


@dataclass(frozen=True)
class Rows:
    """A batch in either layout as rows."""

    hidden: torch.Tensor
    """[N, H]."""
    labels: torch.Tensor
    """[N] int64, IGNORE_INDEX where a row is not scored."""
    cu_seqlens: torch.Tensor | None
    """[S + 1], first row of each sequence and N; None for a packed batch that named none."""


def row_segments(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sequence that each of the N rows belongs to, [N] int64."""
    rows = torch.arange(num_rows, device=cu_seqlens.device)
    return torch.bucketize(rows, cu_seqlens[1:].to(torch.int64), right=True)


def sequence_sums(values: torch.Tensor, segments: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sums of `values` [N] over the rows of each sequence: [S] float64, or int64 for integers and booleans."""
    total = torch.float64 if values.is_floating_point() else torch.int64
    return torch.zeros(num_sequences, dtype=total, device=values.device).index_add(0, segments, values.to(total))


def to_rows(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    shift: bool,
    ignore_index: int,
) -> Rows:
    """Either layout as rows; shapes were checked by `checks.layout`. With `shift`, row t is scored on the label of t+1.

    Hidden states are viewed, not copied, wherever their strides allow it: the shift moves labels only.
    """
    y = labels.to(torch.int64)
    if ignore_index != IGNORE_INDEX:
        y = torch.where(y == IGNORE_INDEX, -1, y)  # a stray -100 is a wrong label here, not an unscored one
        y = torch.where(y == ignore_index, IGNORE_INDEX, y)
    if cu_seqlens is None and labels.ndim == 2:
        S, T = labels.shape
        cu_seqlens = torch.arange(0, S * T + 1, max(T, 1), device=labels.device)
        if shift:
            y = torch.nn.functional.pad(y[:, 1:], (0, 1), value=IGNORE_INDEX)
        y = y.reshape(-1)
    else:
        y = y.reshape(-1)
        if shift:
            y = torch.nn.functional.pad(y[1:], (0, 1), value=IGNORE_INDEX)
            if cu_seqlens is not None:  # the last row of a sequence does not predict the first token of the next
                segments = row_segments(cu_seqlens, len(y))
                follows = torch.nn.functional.pad(segments[1:] == segments[:-1], (0, 1), value=False)
                y = torch.where(follows, y, IGNORE_INDEX)
    return Rows(hidden.reshape(-1, hidden.shape[-1]), y.contiguous(), cu_seqlens)


def default_is_chosen(num_sequences: int, device: torch.device) -> torch.Tensor:
    """Chosen first: [S] bool, True for the first half."""
    return torch.arange(num_sequences, device=device) < num_sequences // 2
