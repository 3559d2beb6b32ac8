"""Interleaved timings of one point: every contender and the floor, side by side, after its values were checked."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch

from infopo_kernels.bench.batches import CASES, make_batch
from infopo_kernels.bench.contenders import CONTENDERS, FLOOR, floor
from infopo_kernels.bench.plan import DTYPES, Plan, SpeedPoint, available_gib
from infopo_kernels.bench.shapes import SHAPES
from infopo_kernels.bench.truth import check, run, truth

LEAST: Final = 3
"""Repetitions from which on a median leaves one stall out."""

PATIENCE: Final = 2.5
"""Seconds that those may take, whatever the limit of a run; calls that are slower have fewer."""


@dataclass
class Measured:
    """Seconds of each repetition by contender, and why others have none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Time each call in turn, in an order that rotates, until it has had `rounds` repetitions or `seconds` in all.

    Every call has one repetition at least, and LEAST of them if they fit PATIENCE, so that a stall of the machine is
    not all that is known of it. A machine that slows down for a while slows them all.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.freeze()  # collections look at what the calls make, not at half a million imported objects: 0.2 s each
    try:
        for round_ in range(rounds if names else 0):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                count, spent = len(times[name]), sum(times[name])
                limit = seconds if count >= LEAST else max(seconds, PATIENCE)
                if count and spent + spent / count > limit:
                    continue
                gc.collect()
                synchronize()
                start = time.perf_counter()
                calls[name]()
                synchronize()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
    return times


def message(error: Exception) -> str:
    """A contender's failure in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def measure(point: SpeedPoint, plan: Plan) -> Measured:
    """Time every contender of the plan at `point`."""
    device, dtype = torch.device(plan.device), DTYPES[point.dtype]
    shape, case = SHAPES[point.shape], CASES[point.case]
    result = Measured()
    reason: str | None
    needed = shape.step_gib(2 * point.pairs * point.length, dtype.itemsize)
    if needed > (free := available_gib(plan.device)):
        reason = f"needs {needed:.1f} GiB, {free:.1f} GiB are free"
        return Measured(skipped=dict.fromkeys((*plan.peers, FLOOR), reason))

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    torch.compiler.reset()  # what was compiled for another shape would be recompiled as dynamic, and slower
    batch = make_batch(case, shape, point.pairs, point.length, dtype, device)
    right = truth(batch, torch.float32)
    calls: dict[str, Callable[[], Any]] = {}
    for name in plan.peers:
        contender = CONTENDERS[name]
        reason = contender.unsupported_reason(case, device, dtype)
        if reason is None:
            try:
                reason = check(contender, batch, right)
                synchronize()
            except Exception as error:  # a peer may fail in any way, and that is a row of the table
                reason = message(error)
        batch.clear()
        if reason is not None:
            result.skipped[name] = reason
        else:
            calls[name] = partial(run, contender, batch)
    del right
    calls[FLOOR] = floor(batch)
    calls[FLOOR]()
    result.seconds = interleave(calls, plan.rounds, plan.seconds, synchronize)
    return result
