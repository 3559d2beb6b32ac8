"""What this library sets out to be, and whether a record shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from infopo_kernels.bench.contenders import CONTENDERS, FLOOR, OURS
from infopo_kernels.bench.plan import MAIN_SHAPE
from infopo_kernels.bench.report import Records, Table, points, timings

_FASTER = {"step": 1.1, "frozen": 1.3, "underflowed": 1.5, "half-prompt": 1.8}
"""Times faster than the fastest other implementation, by case (half-prompt: of those that score every position)."""
_LESS_MEMORY = 8.0


def _row(what: str, against: str, target: str, measured: str, met: bool) -> list[str]:
    return [what, against, target, measured, "met" if met else "missed"]


def _speed(record: dict[str, Any]) -> Iterator[list[str]]:
    about = points(record)
    device = record["machine_info"]["device"].split(":")[0]
    for point, measured in timings(record).items():
        info = about[point]
        target = _FASTER.get(info["case"])
        if target is None or OURS not in measured:
            continue
        others = {
            name: timing.median
            for name, timing in measured.items()
            if name not in (OURS, FLOOR)
            and not (info["case"] == "half-prompt" and device in CONTENDERS[name].skips_unscored)
        }
        if not others:
            continue
        best = min(others, key=lambda name: others[name])
        ratio = others[best] / measured[OURS].median
        limit = f"; the floor allows {others[best] / measured[FLOOR].median:.2f}" if FLOOR in measured else ""
        what = f"{info['shape']}, {info['dtype']}: {info['case']}"
        yield _row(what, best, f"≥ {target:g} × faster", f"{ratio:.2f} ×{limit}", ratio >= target)


def _memory(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    peaks = [row for row in rows if row["sweep"] == "peak" and "peak_mib" in row]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in peaks):
        by = {
            row["contender"]: max(row["peak_mib"], 1.0) for row in peaks if (row["case"], row["dtype"]) == (case, dtype)
        }
        ours = by.pop(OURS, None)
        if ours is None or not by:
            continue
        best = min(by, key=lambda name: by[name])
        what = f"{MAIN_SHAPE}, {dtype}: peak memory of {case}"
        yield _row(
            what, best, f"≥ {_LESS_MEMORY:g} × less", f"{by[best] / ours:.1f} ×", by[best] >= _LESS_MEMORY * ours
        )


def _accuracy(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    for dtype, length in dict.fromkeys((row["dtype"], row["length"]) for row in rows):
        by = {
            row["contender"]: row["sequence"]
            for row in rows
            if (row["dtype"], row["length"]) == (dtype, length) and "sequence" in row
        }
        ours = by.pop(OURS, None)
        if ours is None or not by:
            continue
        best = min(by, key=lambda name: by[name])
        what = f"{MAIN_SHAPE}, {dtype}: sequence log-probability of {length} tokens"
        yield _row(what, best, "error at most", f"{ours:.1e} against {by[best]:.1e} nats", ours <= by[best])


def table(records: Records) -> Table:
    """Every target that the records can tell about."""
    result = Table("targets", "Targets, against the best other contender", ["", "against", "target", "measured", ""])
    if "speed" in records:
        result.rows += _speed(records["speed"])
    if "memory" in records:
        result.rows += _memory(records["memory"]["rows"])
    if "accuracy" in records:
        result.rows += _accuracy(records["accuracy"]["rows"])
    return result
