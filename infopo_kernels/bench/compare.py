"""Two speed records: what became slower, by its ratio to the floor of its own run.

Absolute times differ between machines and between hours; the bare products were timed in turn with the contender, so
their quotient does not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from infopo_kernels.bench.contenders import FLOOR, OURS
from infopo_kernels.bench.report import Table, Timing, load, timings

TOLERANCE: Final = 0.10
"""A ratio that grew by less is no regression; nor is one that grew by less than twice the spreads of all four."""


@dataclass(frozen=True)
class Change:
    """One contender at one point of both records."""

    point: str
    contender: str
    old: float
    """Ratio to the floor."""
    new: float
    allowed: float
    """Growth that is within the noise."""

    @property
    def growth(self) -> float:
        return self.new / self.old - 1

    @property
    def is_regression(self) -> bool:
        return self.growth > self.allowed

    @property
    def is_ours(self) -> bool:
        return self.contender == OURS


def _record(path: Path) -> dict[str, Any]:
    record = load(path).get("speed", {}) if path.is_dir() else json.loads(path.read_text())
    if "benchmarks" not in record:
        raise ValueError(f"{path} is no speed record of pytest-benchmark.")
    result: dict[str, Any] = record
    return result


def _noise(*timings: Timing) -> float:
    return 2 * math.hypot(*(timing.spread or 0.0 for timing in timings))


def compare(old: Path, new: Path) -> list[Change]:
    """Every contender at every point that both records (files, or folders of them) have.

    Raises:
        ValueError, OSError: not a speed record, or nothing in common.
    """
    before, after = timings(_record(old)), timings(_record(new))
    changes = []
    for point in before:
        a, b = before[point], after.get(point, {})
        if FLOOR not in a or FLOOR not in b:
            continue
        for name in a:
            if name == FLOOR or name not in b:
                continue
            ratio_a, ratio_b = a[name].median / a[FLOOR].median, b[name].median / b[FLOOR].median
            allowed = max(TOLERANCE, _noise(a[name], a[FLOOR], b[name], b[FLOOR]))
            changes.append(Change(point, name, ratio_a, ratio_b, allowed))
    if not changes:
        raise ValueError(f"{old} and {new} have no point in common: run both with the same sizes.")
    return changes


def table(changes: list[Change]) -> Table:
    """The changes, regressions first."""
    result = Table("speed", "Times the floor, old and new", ["point", "contender", "old", "new", "change", ""])
    for change in sorted(changes, key=lambda change: -change.growth):
        verdict = "slower" if change.is_regression else "faster" if change.growth < -change.allowed else "within noise"
        result.rows.append(
            [
                change.point, change.contender, f"{change.old:.2f}", f"{change.new:.2f}", f"{change.growth:+.1%}",
                f"{verdict} (allowed {change.allowed:.0%})",
            ]
        )  # fmt: skip
    return result
