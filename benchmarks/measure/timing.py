"""Repetitions of several calls, in turns, and what is said of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, Final

import torch

LEAST: Final = 3
"""Repetitions from which on a median leaves one stall out."""

PATIENCE: Final = 2.5
"""Seconds that those may take, whatever the limit of a run; calls that are slower have fewer."""


def interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Time each call in turn, in an order that rotates, until it has had `rounds` repetitions or `seconds` in all.

    Every call has one repetition at least, and LEAST of them if they fit PATIENCE, so that a stall of the machine is
    not all that is known of it. A machine that slows down for a while slows them all.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.freeze()  # collections look at what the calls make, not at half a million imported objects: 0.2 s each
    try:
        for round_ in range(rounds if names else 0):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                count, spent = len(times[name]), sum(times[name])
                most = seconds if count >= LEAST else max(seconds, PATIENCE)
                if count and spent + spent / count > most:
                    continue
                gc.collect()
                synchronize(device)
                start = time.perf_counter()
                calls[name]()
                synchronize(device)
                times[name].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
    return times


def spread(seconds: Sequence[float]) -> float:
    """Half the interquartile range over the median; NaN for a single repetition."""
    if len(seconds) < 2:
        return float("nan")
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / median(seconds)


def message(error: BaseException) -> str:
    """A failure in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
