"""What the ranks of a group must have in common is compared before they compute: an error on every rank, never a hang.

One all-gather of 256 bytes a call. It takes 0.2 ms on gloo with two ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from infopo_kernels.distributed import collectives

WIDTH = 32
"""Numbers that each rank sends, whatever it compares: ranks that compare different things must not wait for more."""


class Values:
    """Numbers of a tensor, or None, to be compared; an error shows the first few."""

    def __init__(self, tensor: torch.Tensor | None) -> None:
        self._numbers = None if tensor is None else tensor.detach().flatten().tolist()

    def __repr__(self) -> str:
        return repr(self._numbers)

    def __str__(self) -> str:
        text = repr(None if self._numbers is None else self._numbers[:4])
        return text if self._numbers is None or len(self._numbers) <= 4 else text[:-1] + ", ...]"


def coded(value: object) -> int:
    """A whole number as it is, anything else as a checksum that is the same in every process."""
    return int(value) if isinstance(value, int) else zlib.crc32(repr(value).encode())


def checksum(values: torch.Tensor) -> int:
    """A number that differs where whole numbers [N] differ, or their order; the host waits for it."""
    places = torch.arange(1, len(values) + 1, device=values.device)
    return int((values * places).sum())


def compare(
    name: str,
    device: torch.device,
    same: Mapping[str, object],
    own: Mapping[str, int],
    refusal: Exception | None = None,
) -> dict[str, list[int]]:
    """Compare what must be equal, and hand round what need not be.

    Args:
        name: the group.
        device: where its collectives run.
        same: by the name of the argument, what has to be equal on all ranks.
        own: whole numbers that every rank may have of its own.
        refusal: an error that this rank found in its own input; the other ranks raise too then.

    Returns:
        For each entry of `own` the numbers of all ranks.

    Raises:
        ValueError: on every rank, naming what differs, and where.
    """
    same = {"kind of call": tuple(same), **same}
    sent = [int(refusal is not None), *map(coded, same.values()), *own.values()]
    sent += [0] * (WIDTH - len(sent))
    assert len(sent) == WIDTH, "raise WIDTH"
    rows = collectives.gathered(name, torch.tensor(sent, dtype=torch.int64, device=device)).tolist()
    if refusal is not None:
        raise refusal
    me = collectives.rank(name)
    if refused := [r for r, row in enumerate(rows) if row[0]]:
        raise ValueError(f"Rank {refused[0]} of the group refused its input; its error says why.")
    for column, (argument, value) in enumerate(same.items(), start=1):
        others = [r for r, row in enumerate(rows) if row[column] != rows[me][column]]
        if not others:
            continue
        there = rows[others[0]][column]
        came = f"{value} on rank {me} and {there if isinstance(value, int) else 'another'} on rank {others[0]}"
        raise ValueError(f"`{argument}` must be the same on all {len(rows)} ranks of the group, got {came}.")
    first = 1 + len(same)
    return {key: [row[first + i] for row in rows] for i, key in enumerate(own)}
