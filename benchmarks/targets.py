"""The targets of this library, and whether a record meets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from benchmarks.cases import MAIN_SHAPE
from benchmarks.contenders import CONTENDERS, FLOOR, OURS
from benchmarks.records import Record, Records, absent

if TYPE_CHECKING:
    import pandas as pd

_FASTER: Final = {"step": 1.1, "frozen": 1.3, "underflowed": 1.5, "half-prompt": 1.8}
"""For each case: how many times faster than the fastest other implementation (for half-prompt: than the fastest of
those that score every position)."""
_LESS_MEMORY: Final = 8.0

Row = list[str]


def _row(what: str, against: str, target: str, measured: str, met: bool) -> Row:
    return [what, against, target, measured, "met" if met else "missed"]


def _best(rows: pd.DataFrame, figure: str) -> Iterator[tuple[pd.Series, str, float, float]]:
    """For each shape, type, case and length: a row, the best other contender, its figure, and our figure."""
    for _, group in rows.groupby([c for c in ("shape", "dtype", "case", "length") if c in rows], sort=False):
        figures = group.set_index("contender")[figure].dropna()
        others = figures.drop([OURS, FLOOR], errors="ignore")
        if OURS in figures and len(others):
            yield group.iloc[0], str(others.idxmin()), float(others.min()), float(figures[OURS])


def _speed(record: Record) -> Iterator[Row]:
    device = record.machine["device"].split(":")[0]
    skip_prompts = [name for name, contender in CONTENDERS.items() if device in contender.skips_unscored]
    rows = record.rows
    left_out = (rows["case"] == "half-prompt") & rows["contender"].isin(skip_prompts) & (rows["contender"] != OURS)
    for info, best, seconds, ours in _best(rows[~left_out & rows["case"].isin(list(_FASTER))], "seconds"):
        target, ratio = _FASTER[info["case"]], seconds / ours
        limit = "" if absent(info["floor"]) else f"; the floor allows {seconds / info['floor']:.2f}"
        what = f"{info['shape']}, {info['dtype']}: {info['case']}"
        yield _row(what, best, f"≥ {target:g} × faster", f"{ratio:.2f} ×{limit}", ratio >= target)


def _memory(record: Record) -> Iterator[Row]:
    rows = record.rows[record.rows["sweep"] == "peak"]
    # The expected memory of the gradients is subtracted. If a step takes less than that, it counts as 1 MiB.
    for info, best, peak, ours in _best(rows.assign(peak_mib=rows["peak_mib"].clip(lower=1.0)), "peak_mib"):
        what = f"{MAIN_SHAPE}, {info['dtype']}: peak memory of {info['case']}"
        yield _row(what, best, f"≥ {_LESS_MEMORY:g} × less", f"{peak / ours:.1f} ×", peak >= _LESS_MEMORY * ours)


def _accuracy(record: Record) -> Iterator[Row]:
    for info, best, error, ours in _best(record.rows, "sequence"):
        what = f"{MAIN_SHAPE}, {info['dtype']}: sequence log-probability of {info['length']} tokens"
        yield _row(what, best, "error at most", f"{ours:.1e} against {error:.1e} nats", ours <= error)


def rows(records: Records) -> list[Row]:
    """The rows of all targets for which there are records."""
    builders = {"speed": _speed, "memory": _memory, "accuracy": _accuracy}
    return [row for part, build in builders.items() if part in records for row in build(records[part])]
