"""Which way of sharing a head moves the fewest bytes. R ranks, N scored rows on the rank that has most, and

    f = (R - 1) / R        E bytes of a number of X and W, A of a float32 (float64) sum        k gathers of X

| way | bytes that a rank receives in a call | what it holds beyond its own part |
| --- | --- | --- |
| rows | f R N H E (k + 1 for dX) | a chunk, within the workspace |
| ring | f V H E a round + V H A for dW | 2 V H / R (E + A) |
| gather | f V H E (1 + 1 for dW) | V H 2 E |

A round is one for the logits and one for the gradients. dX counts where hidden states are trained, dW where the weight
is. "gather" is a choice only where it fits the workspace, because it holds a head that the rank does not own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OwnRows = Literal["rows", "ring", "gather"]


@dataclass(frozen=True)
class Work:
    """What a call computes."""

    logits: bool
    """Log-probabilities are formed."""
    known: bool
    """Weights are known with the log-probabilities: rows that travel once serve both."""
    hidden: bool
    """dX is formed."""
    weight: bool
    """dW is formed."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call, the same on all ranks."""

    ranks: int
    rows: int
    """N, scored rows on the rank that has most."""
    vocabulary: int
    hidden: int
    element: int
    """E."""
    accumulator: int = 4
    """A."""


def received_bytes(way: OwnRows, sizes: Sizes, work: Work) -> float:
    """Bytes that a rank receives in a call, in the table above; without numbers of a row or of the bias."""
    R, E, A = sizes.ranks, sizes.element, sizes.accumulator
    f, head = (R - 1) / R, sizes.vocabulary * sizes.hidden
    gradients = work.hidden or work.weight
    if way == "rows":
        gathers = 1 if work.known or not (work.logits and gradients) else 2
        return f * R * sizes.rows * sizes.hidden * E * (gathers + work.hidden)
    if way == "ring":
        return f * head * E * (work.logits + gradients) + head * A * work.weight
    return f * head * E * (1 + work.weight)


def cheapest(sizes: Sizes, work: Work, workspace_bytes: int) -> OwnRows:
    """The way that moves the fewest bytes; "gather" only if the head and its gradient fit the workspace."""
    ways: list[OwnRows] = ["rows", "ring"]
    if sizes.vocabulary * sizes.hidden * sizes.element * (1 + work.weight) <= workspace_bytes // 2:
        ways.append("gather")
    return min(ways, key=lambda way: received_bytes(way, sizes, work))
