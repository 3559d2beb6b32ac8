"""Repetitions of several calls in turn, and their statistics."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, Final

import torch

LEAST: Final = 3
"""Number of repetitions from which the median is not affected by one stall."""

PATIENCE: Final = 2.5
"""Seconds that these repetitions may take, independent of the limit of a run; slower calls have fewer repetitions."""


def interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Time the calls in turn, in an order that rotates, until each has `rounds` repetitions or took `seconds` in total.

    Each call has at least one repetition, and LEAST of them if they fit PATIENCE, so that the figure is not a single
    stall of the machine. If the machine is slow for a while, it slows all calls.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.freeze()  # a collection then skips half a million imported objects, which take 0.2 s each time
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
    """Half the interquartile range divided by the median; NaN for a single repetition."""
    if len(seconds) < 2:
        return float("nan")
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / median(seconds)


def message(error: BaseException) -> str:
    """The description of a failure in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
