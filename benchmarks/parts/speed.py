"""Times of every contender and of the bare products, in turns, after values were checked.

pytest-benchmark keeps the record: `benchmarks/test_speed.py` is what it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_benchmark  # noqa: F401 (a plugin; pytest would only say that it does not know its options)
import torch

from benchmarks.cases import CASES, DTYPES, SHAPES, make_batch
from benchmarks.contenders import CONTENDERS, FLOOR, floor
from benchmarks.measure.memory import available_gib
from benchmarks.measure.timing import interleave, message
from benchmarks.plan import Plan, SpeedPoint
from benchmarks.truth import check, run, truth

ROOT = Path(__file__).resolve().parents[2]
PLAN = pytest.StashKey[Plan]()
"""Where `benchmarks/conftest.py` finds the plan of a run that did not begin as `pytest benchmarks`."""

SKIPPED: list[dict[str, Any]] = []
"""What the run at hand could not time, for its record."""


@dataclass
class Measured:
    """Seconds of each repetition by contender, and why others have none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def measure(point: SpeedPoint, plan: Plan) -> Measured:
    """Time every contender of the plan at `point`."""
    device, dtype = torch.device(plan.device), DTYPES[point.dtype]
    shape, case = SHAPES[point.shape], CASES[point.case]
    result = Measured()
    needed = shape.step_gib(2 * point.pairs * point.length, dtype.itemsize)
    if needed > (free := available_gib(device)):
        reason = f"needs {needed:.1f} GiB, {free:.1f} GiB are free"
        return Measured(skipped=dict.fromkeys((*plan.peers, FLOOR), reason))
    torch.compiler.reset()  # what was compiled for another shape would be recompiled as dynamic, and slower
    batch = make_batch(case, shape, point.pairs, point.length, dtype, device)
    right = truth(batch, torch.float32)
    calls: dict[str, Callable[[], Any]] = {}
    for name in plan.peers:
        contender = CONTENDERS[name]
        wrong = contender.unsupported_reason(case, device, dtype)
        if wrong is None:
            try:
                wrong = check(contender, batch, right)
            except Exception as error:  # a peer may fail in any way, and that is a row of the table
                wrong = message(error)
        batch.clear()
        if wrong is not None:
            result.skipped[name] = wrong
        else:
            calls[name] = partial(run, contender, batch)
    del right
    calls[FLOOR] = floor(batch)
    calls[FLOOR]()
    result.seconds = interleave(calls, plan.rounds, plan.seconds, device)
    return result


class _Given:
    """Hands the plan to the hooks of `benchmarks/conftest.py`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[PLAN] = self._plan


def speed(plan: Plan, path: Path) -> int:
    """Write pytest-benchmark's record of the plan's points; 1 if this library's values were wrong, else 0."""
    SKIPPED.clear()
    words = [
        str(ROOT / "benchmarks" / "test_speed.py"), "-c", os.devnull, "--rootdir", str(ROOT), "-q", "--tb=short",
        "--benchmark-only", "-p", "no:cacheprovider", "-W", "ignore", "--benchmark-quiet", f"--benchmark-json={path}",
    ]  # fmt: skip
    return int(pytest.main(words, plugins=[_Given(plan)]))
