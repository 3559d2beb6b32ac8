"""Layouts: padded batches and packed rows. Both become rows [N], labels [N] and the sequence of each row.

padded   hidden [S, T, H], labels [S, T]; the first half of the sequences is chosen, the second half rejected, in the
         same order (the convention of TRL and Liger); `is_chosen` can give another order
packed   hidden [N, H] (or [1, N, H]), labels [N] (or [1, N]), `cu_seqlens` [S + 1] (the convention of flash-attn)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopo_kernels.options import IGNORE_INDEX


@dataclass(frozen=True)
class Rows:
    """A batch in either layout as rows, with the sequence of each row, which is derived only once."""

    hidden: torch.Tensor
    """[N, H]."""
    labels: torch.Tensor
    """[N] int64, IGNORE_INDEX where a row is not scored."""
    cu_seqlens: torch.Tensor | None
    """[S + 1], the first row of each sequence, then N; None for a packed batch without bounds."""
    segments: torch.Tensor | None
    """[N] int64, the sequence of each row; None if `cu_seqlens` is None."""


def row_segments(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The sequence of each of the N rows, [N] int64, in [0, S) whatever the bounds say."""
    rows = torch.arange(num_rows, device=cu_seqlens.device)
    segments = torch.bucketize(rows, cu_seqlens[1:].to(torch.int64), right=True)
    return segments.clamp_(max=len(cu_seqlens) - 2)


def bounds_hold(cu_seqlens: torch.Tensor, num_rows: int, *, parts: bool = False) -> torch.Tensor:
    """Whether `cu_seqlens` starts at 0, increases (with `parts`: does not decrease), and ends at N: [] bool."""
    steps = (cu_seqlens[1:] - cu_seqlens[:-1] >= (0 if parts else 1)).all()
    return steps & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_rows)


def sequence_sums(values: torch.Tensor, segments: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sums of `values` [N] over the rows of each sequence: [S] float64, or int64 for integers and booleans.

    Two runs agree bitwise. On a GPU `index_add` adds by atomics, in any order; `index_put` sorts first.
    """
    total = torch.float64 if values.is_floating_point() else torch.int64
    zeros, values = torch.zeros(num_sequences, dtype=total, device=values.device), values.to(total)
    if values.device.type == "cpu":
        return zeros.index_add(0, segments, values)
    return zeros.index_put((segments,), values, accumulate=True)


def padded_rows(hidden: torch.Tensor, labels: torch.Tensor, *, shift: bool, ignore_index: int) -> Rows:
    """A padded batch as rows. With `shift`, row t is scored on the label of t + 1.

    The shift moves labels only. Hidden states are not copied where their strides allow a view.
    """
    S, T = labels.shape
    y = _own_ignore_index(labels, ignore_index)
    if shift:
        y = _next_labels(y)
    sequence = torch.arange(S, device=labels.device)
    cu_seqlens = torch.arange(S + 1, device=labels.device) * T
    segments = sequence[:, None].expand(S, T).reshape(-1)
    return Rows(hidden.reshape(-1, hidden.shape[-1]), y.reshape(-1).contiguous(), cu_seqlens, segments)


def packed_rows(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    segments: torch.Tensor | None,
    *,
    shift: bool,
    ignore_index: int,
    parts: bool = False,
) -> Rows:
    """Packed rows with their sequences from `row_segments`; `shift` as in `padded_rows`, inside each sequence.

    With `parts` the rows are parts of sequences, and a sequence may have none.
    """
    y = _own_ignore_index(labels, ignore_index).reshape(-1)
    if shift:
        y = _next_labels(y)
        if segments is not None:  # the last row of a sequence does not predict the first token of the next
            follows = torch.nn.functional.pad(segments[1:] == segments[:-1], (0, 1), value=False)
            y = torch.where(follows, y, IGNORE_INDEX)
    if cu_seqlens is not None and cu_seqlens.device.type != "cpu":
        # Nobody could check the bounds without waiting for the device: wrong ones make every label one that no
        # vocabulary has, whose log-probability is NaN.
        y = torch.where(bounds_hold(cu_seqlens, y.shape[0], parts=parts), y, -1)
    return Rows(hidden.reshape(-1, hidden.shape[-1]), y.contiguous(), cu_seqlens, segments)


def _next_labels(y: torch.Tensor) -> torch.Tensor:
    """The label of the next row in the last dimension, which may be empty; IGNORE_INDEX for the last row."""
    following = torch.full_like(y, IGNORE_INDEX)
    following[..., :-1] = y[..., 1:]
    return following


def _own_ignore_index(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels as int64, with IGNORE_INDEX instead of the caller's `ignore_index`."""
    y = labels.to(torch.int64)
    if ignore_index != IGNORE_INDEX:
        y = torch.where(y == IGNORE_INDEX, -1, y)  # a stray -100 is a wrong label here, not an unscored one
        y = torch.where(y == ignore_index, IGNORE_INDEX, y)
    return y


def default_is_chosen(num_sequences: int, device: torch.device) -> torch.Tensor:
    """Chosen first: [S] bool, True for the first half."""
    return torch.arange(num_sequences, device=device) < num_sequences // 2
